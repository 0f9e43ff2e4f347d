"""What the words after `llmkit estimate` mean: a place for the model, a setting, quants."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import output
from .quantize import size_argument

if TYPE_CHECKING:
    from ..convert import GgufDraft
    from ..memory.devices.device_table import Device
    from ..memory.setting import Setting

USUAL_CONTEXT = 4096
MLX = "mlx"


@dataclass(frozen=True)
class Place:
    """Where the model is to fit: bytes for it, and the devices that have them, none where a size was named."""

    nbytes: int
    devices: tuple[Device, ...] = ()

    @property
    def name(self) -> str:
        """The devices' names."""
        return " + ".join(device.name for device in self.devices) or "as asked"

    @property
    def words(self) -> str:
        """The bytes, and where."""
        return f"{output.size(self.nbytes, binary=True)} {'usable of ' if self.devices else ''}{self.name}"

    @property
    def gpus(self) -> list[tuple[str, int]]:
        """Its GPUs: names, and bytes for a model."""
        from ..memory import devices

        return [(each.name, devices.usable_nbytes(each)) for each in self.devices if each.processor == "gpu"]

    @property
    def device(self) -> Device | None:
        """The one device, None where there are several or none."""
        return self.devices[0] if len(self.devices) == 1 else None


def place(wanted: str | None) -> Place:
    """A size, one or several devices by name, or this machine."""
    from ..memory import devices

    if wanted is not None:
        try:
            return Place(size_argument(wanted))
        except argparse.ArgumentTypeError:
            pass
    found = _devices(wanted or "this")
    for device in dict.fromkeys(found):
        if len(device.memory) > 1:
            *others, most = (f"{size >> 30}" for size in device.memory)
            output.note(f"note: {device.name}: {most} GB are assumed; '{device.name} {others[0]}GB' names another size")
    return Place(sum(devices.usable_nbytes(device) for device in found), found)


def _devices(text: str) -> tuple[Device, ...]:
    """One device, whose name may have a comma in it, or several with commas between. Raises Unsupported."""
    from ..errors import Unsupported
    from ..memory import devices

    if "," in text:
        try:
            return (devices.find(text),)
        except Unsupported:
            pass
    return tuple(devices.find(name.strip()) for name in text.split(","))


def setting(args: argparse.Namespace, trained: int) -> Setting:
    """The runtime's setting with what the user changes; remarks as notes. Raises Unsupported with the nearest names."""
    from ..errors import Unsupported, nearest_hint
    from ..memory.setting import KV_TYPES, RUNTIMES

    kind = args.kv_type.lower() if args.kv_type else None
    if kind is not None and kind not in KV_TYPES:
        raise Unsupported(f"unknown type of the KV cache '{args.kv_type}'", nearest_hint(kind, KV_TYPES))
    chosen = RUNTIMES.get(args.runtime.lower())
    if chosen is None:
        raise Unsupported(f"unknown runtime '{args.runtime}'", nearest_hint(args.runtime, (*RUNTIMES, MLX)))
    if chosen.remark:
        output.note(f"note: {chosen.remark}")
    context = trained if args.context == "max" else args.context
    if context > trained:
        output.note(f"note: the model was trained for {trained:,} tokens; beyond them it may lose the thread")
    return chosen.with_context(
        context,
        batch=args.batch,
        ubatch=args.ubatch,
        parallel=args.parallel,
        kv_k=kind,
        kv_v=kind,
        flash_attention=args.flash_attention,
        mmap=False if args.no_mmap else None,
    )


def labels(args: argparse.Namespace, draft: GgufDraft) -> list[str]:
    """The quants to compare: those named, the one in MODEL, the file as it is when it is quantized, else all widths."""
    from .. import model
    from ..memory.estimate import COPY
    from ..memory.table import LABELS
    from ..quants import QUANTS

    if any(tensor.type.quantized for tensor in draft.tensors):
        return names(args.quants) or [COPY]
    if named := names(args.quants or [model.parse(args.model).quant]):
        return named
    own = draft.own_type.name
    return [own if label == "BF16" and own in QUANTS and own != "F32" else label for label in LABELS]


def names(given: Sequence[str | None]) -> list[str]:
    """The quants' own names, each once. Raises Unsupported for names of none."""
    from ..quants import quant

    return list(dict.fromkeys(quant(name).name for name in given if name))


def only_for_the_engine(args: argparse.Namespace, what: str) -> None:
    """Refuse options whose answers need the engine's layout, rather than pass them over. Raises Unsupported."""
    from ..errors import Unsupported

    if args.runtime.lower() == MLX and what != "MLX":
        raise Unsupported(f"MLX's formats need the shapes of tensors, which {what} has not")
    for option in ("techniques", "gpu_layers", "verify", "plot", "projector", "draft"):
        if getattr(args, option) not in (None, False):
            raise Unsupported(f"--{option.replace('_', '-')} needs the engine's own layout, which {what} has not")
