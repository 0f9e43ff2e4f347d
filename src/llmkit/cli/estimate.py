"""Tell what a model takes in memory, to the byte, before it is made or fetched.

The engine itself lays the model out without its weights, in a child process, so the figures are those llama.cpp will
allocate. With no QUANT all bit widths are compared; with one its parts are shown. Of a model of the Hub only headers
are fetched. MODEL may also be a mere count of parameters, such as 7B: then the rule of thumb answers.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import memory_views, models, output
from .quantize import count_argument, size_argument

if TYPE_CHECKING:
    from ..convert import GgufDraft
    from ..memory.devices.device_table import Device
    from ..memory.setting import Setting
    from ..memory.table import Row
    from .models import Source

EXAMPLES = (
    "llmkit estimate Qwen/Qwen3-8B",
    "llmkit estimate Qwen/Qwen3-8B Q4_K_M --context 32768 --techniques",
    "llmkit estimate model-Q4_K_M.gguf --runtime llama-server --kv-type q8_0",
    "llmkit estimate Qwen/Qwen3-8B --fit 'RTX 4060 Ti' --gpu-layers auto",
    "llmkit estimate model-Q4_K_M.gguf --verify",
    "llmkit estimate 70B",
)
_CONTEXT = 4096
_COUNT = re.compile(r"(\d+x)?\d+(\.\d+)?[KMBTkmbt]")
_USUAL = "Q4_K_M"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, quants, and how it will be run."""
    parser.add_argument("model", metavar="MODEL", help=f"{models.MODEL_HELP}; or a count: 7B")
    parser.add_argument("quants", nargs="*", metavar="QUANT", help="compare these (default: one for each bit width)")
    parser.add_argument("--context", type=_context, default=_CONTEXT, metavar="N|max", help="tokens (default 4096)")
    parser.add_argument(
        "--fit", metavar="SIZE|DEVICE", help="memory there is: 8GB, 'RTX 4090', 'M2 Max 64GB' (default: this machine)"
    )
    parser.add_argument(
        "--runtime", default="llmkit", metavar="NAME", help="llmkit, llama-server, llama-cpp-python, ollama, mlx"
    )
    parser.add_argument("--kv-type", metavar="TYPE", help="type of the KV cache: f16, q8_0, q4_0 …")
    parser.add_argument("--batch", type=count_argument, metavar="N", help="tokens handed over at once")
    parser.add_argument("--ubatch", type=count_argument, metavar="N", help="tokens worked on at once")
    parser.add_argument("--parallel", type=count_argument, metavar="N", help="conversations at the same time")
    parser.add_argument("--no-flash-attention", action="store_true", help="as without flash attention")
    parser.add_argument("--no-mmap", action="store_true", help="load the file instead of mapping it")
    parser.add_argument(
        "--gpu-layers", type=_layers, metavar="N|auto", help="split over the GPUs of --fit (commas between several)"
    )
    parser.add_argument("--cpu-moe", action="store_true", help="with --gpu-layers: experts stay on the CPU")
    parser.add_argument("--projector", type=Path, metavar="FILE", help="a multimodal projector (mmproj) beside it")
    parser.add_argument("--draft", type=Path, metavar="FILE", help="a draft model beside it, for speculative decoding")
    parser.add_argument("--techniques", action="store_true", help="what each way of saving memory saves on this model")
    parser.add_argument("--verify", action="store_true", help="load it for real and compare; exit 1 on a difference")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against context, as .png or .svg")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _context(text: str) -> int | str:
    return text if text == "max" else count_argument(text)


def _layers(text: str) -> int | str:
    return text if text == "auto" else count_argument(text, least=0)


@dataclass(frozen=True)
class Place:
    """Where the model is to fit: bytes for it, how they are known, and the devices, if any were named."""

    nbytes: int
    words: str
    devices: tuple[Device, ...] = ()

    @property
    def device(self) -> Device | None:
        """The one device, None where there are several or none."""
        return self.devices[0] if len(self.devices) == 1 else None


def run(args: argparse.Namespace) -> int:
    """Measure and show."""
    if args.plot:
        from ..memory import plot

        plot.check(args.plot)
    place = _place(args.fit)
    if _COUNT.fullmatch(args.model) and not Path(args.model).exists():
        return _rough(args, place)
    with models.outline(args.model) as source:
        draft = _draft(source)
        if draft is None:
            return _closed(args, source, place)
        trained = trained_context(draft)
        if args.runtime.lower() == "mlx":
            return _mlx(args, draft, trained, place)
        setting = _setting(args, trained)
        if setting.context > trained:
            output.note(f"note: the model was trained for {trained:,} tokens; beyond them it may lose the thread")
        if args.verify:
            return _verify(args, source, setting)
        return _exact(args, source, draft, setting, place)


def _exact(args: argparse.Namespace, source: Source, draft: GgufDraft, setting: Setting, place: Place) -> int:
    from ..memory import table

    trained = trained_context(draft)
    labels = _labels(args, draft)
    rows = table.rows(draft, labels, setting, trained=trained, budget=place.nbytes, device=place.device)
    rows = [_with_companions(args, row, place) for row in rows]
    if args.plot:
        memory_views.plot(args.plot, draft, rows, setting, trained, place.nbytes, place.words)
    facts: dict[str, object] = {
        "fetched_nbytes": source.shadow.fetched_nbytes if source.shadow else 0,
        "context_trained": trained,
    }
    one = rows[0] if len(rows) == 1 else None
    if args.techniques:
        facts["techniques"] = _techniques(args, draft, one or _usual(rows), setting, place)
    if args.gpu_layers is not None:
        facts["split"] = _split(args, draft, one or _usual(rows), place)
    if args.json:
        output.emit_json(_facts(args, setting, place, rows) | facts)
        return 0
    if not (args.techniques or args.gpu_layers is not None):
        if one:
            memory_views.parts(one, place.words)
        else:
            memory_views.table(draft, rows, setting)
        _close(args, draft, rows, setting, place)
    return 0


def _usual(rows: list[Row]) -> Row:
    """The row techniques are shown on when several were asked for: the usual quant, else the first."""
    return next((row for row in rows if row.estimate.variant.label == _USUAL), rows[0])


def _place(wanted: str | None) -> Place:
    """A size, one or several devices by name, or this machine."""
    from ..memory import devices

    if wanted is not None:
        try:
            nbytes = size_argument(wanted)
            return Place(nbytes, f"{output.size(nbytes, binary=True)} as asked")
        except argparse.ArgumentTypeError:
            pass
    found = tuple(devices.find(name.strip()) for name in (wanted or "this").split(","))
    nbytes = sum(devices.usable_nbytes(device) for device in found)
    names = " + ".join(device.name for device in found)
    return Place(nbytes, f"{output.size(nbytes, binary=True)} usable of {names}", found)


def _draft(source: Source) -> GgufDraft | None:
    """The model's outline; with its tokenizer where that is here, which makes the figures exact to the last token.

    None where nobody here knows the architecture: config.json alone has to do then.
    """
    from .. import convert
    from ..errors import ModelNotFound, Unsupported

    try:
        return convert.open_draft(source.path, tokenizer=source.shadow is None)
    except ModelNotFound as error:
        if source.shadow is not None or not (source.path / "config.json").is_file():
            raise
        output.note(f"note: {error.message}; measured without it")
        return convert.open_draft(source.path, tokenizer=False)
    except Unsupported as error:
        if not source.path.is_dir():
            raise
        output.note(f"note: {error.message}; so closed forms answer, from config.json alone")
        return None


def trained_context(draft: GgufDraft) -> int:
    """Tokens the model was trained for, as its header says."""
    architecture = draft.metadata["general.architecture"].data
    value = draft.metadata.get(f"{architecture}.context_length")
    return int(value.data) if value is not None and isinstance(value.data, int) else _CONTEXT


def _setting(args: argparse.Namespace, trained: int) -> Setting:
    from ..errors import Unsupported, nearest_hint
    from ..memory.setting import KV_TYPES, runtime

    kind = args.kv_type.lower() if args.kv_type else None
    if kind is not None and kind not in KV_TYPES:
        raise Unsupported(f"unknown type of the KV cache '{args.kv_type}'", nearest_hint(kind, KV_TYPES))
    chosen = runtime(args.runtime)
    if chosen.remark:
        output.note(f"note: {chosen.remark}")
    return chosen.with_context(
        trained if args.context == "max" else args.context,
        batch=args.batch,
        ubatch=args.ubatch,
        parallel=args.parallel,
        kv_k=kind,
        kv_v=kind,
        flash_attention=False if args.no_flash_attention else None,
        mmap=False if args.no_mmap else None,
    )


def _labels(args: argparse.Namespace, draft: GgufDraft) -> list[str]:
    """The quants to compare: those named, the one in MODEL, the file as it is when it is quantized, else all widths."""
    from .. import model
    from ..memory.table import LABELS
    from ..quants import QUANTS, quant

    named = args.quants or [name for name in [model.parse(args.model).quant] if name]
    if any(tensor.type.quantized for tensor in draft.tensors):
        return [quant(name).name for name in dict.fromkeys(args.quants)] or ["COPY"]
    if named:
        return list(dict.fromkeys(quant(name).name for name in named))
    own = draft.own_type.name
    return [own if label == "BF16" and own in QUANTS and own != "F32" else label for label in LABELS]


def _with_companions(args: argparse.Namespace, row: Row, place: Place) -> Row:
    """The row with a projector and a draft model beside it, where they were named."""
    from dataclasses import replace

    from ..memory import companions

    for path, role in ((args.projector, companions.PROJECTOR), (args.draft, companions.DRAFT)):
        if path is not None and row.estimate.error is None:
            estimate, remarks = companions.add_model(row.estimate, path, role)
            for remark in remarks:
                output.note(f"note: {remark}")
            fits = estimate.needed_nbytes <= place.nbytes
            row = replace(row, estimate=estimate, longest=None, fits=fits)
    return row


# ── other questions ──


def _techniques(args: argparse.Namespace, draft: GgufDraft, row: Row, setting: Setting, place: Place) -> object:
    from ..memory import techniques

    found = techniques.techniques(draft, row.estimate.variant, setting, gpus=_gpus(place))
    if not args.json:
        memory_views.techniques(found, row, args.model)
    return found


def _gpus(place: Place) -> list[tuple[str, int]]:
    from ..memory import devices

    return [(each.name, devices.usable_nbytes(each)) for each in place.devices if each.processor == "gpu"]


def _split(args: argparse.Namespace, draft: GgufDraft, row: Row, place: Place) -> object:
    from ..errors import LlmkitError
    from ..memory import split

    gpus = _gpus(place)
    if not gpus:
        raise LlmkitError(
            "--gpu-layers: there is no GPU here", "Name one: --fit 'RTX 4090', or two: --fit 'A100,A100'."
        )
    metal = any(device.kind == "apple" for device in place.devices)
    count = None if args.gpu_layers == "auto" else args.gpu_layers
    found = split.split(
        draft,
        row.estimate,
        gpus,
        gpu_layers=count,
        cpu_experts=args.cpu_moe,
        context_nbytes=(0, 0) if metal else split.CUDA_CONTEXT,
    )
    if not args.json:
        memory_views.split(found, row)
    return found


def _verify(args: argparse.Namespace, source: Source, setting: Setting) -> int:
    """Load for real and compare. A checkpoint is quantized to a temporary file first."""
    import tempfile

    from ..errors import LlmkitError
    from ..memory import reality

    if source.shadow is not None:
        raise LlmkitError(f"{args.model}: is not on this machine", f"llmkit download {output.shell_word(args.model)}")
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        path = source.path
        if path.is_dir():
            if len(args.quants) != 1:
                raise LlmkitError("--verify of a checkpoint needs one QUANT to make and load", "For example Q4_K_M.")
            output.note(f"Quantizing to {args.quants[0]} in a temporary folder …")
            path = models.made_in(path, args.quants[0], Path(folder))
        found = reality.verify(path, setting)
    if args.json:
        output.emit_json(
            {"model": args.model, "setting": setting, "differences": found, "holds": [f.holds for f in found]}
        )
    else:
        memory_views.differences(found)
    return 0 if all(each.holds for each in found) else 1


def _mlx(args: argparse.Namespace, draft: GgufDraft, trained: int, place: Place) -> int:
    from ..memory import mlx_estimate

    context = trained if args.context == "max" else args.context
    found = mlx_estimate.rows(draft, context)
    if args.json:
        output.emit_json({"model": args.model, "runtime": "mlx", "budget_nbytes": place.nbytes, "rows": found})
    else:
        memory_views.mlx(found, place.nbytes, place.words)
    return 0


def _closed(args: argparse.Namespace, source: Source, place: Place) -> int:
    """Tier B from config.json alone."""
    from .. import checkpoint
    from ..memory import fallback, table

    config = checkpoint.read_json(source.path / "config.json")
    setting = _setting(args, _trained_of_config(config))
    labels = args.quants or list(table.LABELS)
    rows = table.without_engine(fallback.of_config(config, labels, setting), place.nbytes)
    return _show_rows(args, rows, setting, place)


def _trained_of_config(config: dict[str, object]) -> int:
    from ..memory.closed_form import shape

    return shape.of_config(config).context_trained or _CONTEXT


def _rough(args: argparse.Namespace, place: Place) -> int:
    """Tier C from a count."""
    from ..memory import closed_form, fallback, table

    count = closed_form.parse_count(args.model)
    setting = _setting(args, _CONTEXT)
    rows = table.without_engine(fallback.of_count(count, setting), place.nbytes)
    return _show_rows(args, rows, setting, place)


def _show_rows(args: argparse.Namespace, rows: list[Row], setting: Setting, place: Place) -> int:
    if args.json:
        output.emit_json(_facts(args, setting, place, rows))
    elif len(rows) == 1:
        memory_views.parts(rows[0], place.words)
    else:
        memory_views.table(None, rows, setting)
    return 0


# ── closing ──


def _close(args: argparse.Namespace, draft: GgufDraft, rows: list[Row], setting: Setting, place: Place) -> None:
    """The best that fits, why, which knobs would help, and the next command."""
    from ..memory import knobs, table

    chosen = table.best(rows)
    asked = chosen or rows[-1]
    if args.fit and asked.estimate.error is None:
        found = knobs.of(draft, asked.estimate.variant, setting)[:4]
        if found:
            output.note(f"What would help most ({asked.estimate.variant.label}):")
        for knob in found:
            output.note(f"  {output.size(knob.saved, binary=True):>10}  {knob.name} ({knob.option}); costs {knob.cost}")
    if chosen is None:
        output.note(f"{'It does not fit' if len(rows) == 1 else 'None of them fits'}: {place.words}.")
        return
    label = chosen.estimate.variant.label
    longest = f", up to {chosen.longest:,} tokens" if chosen.longest else ""
    why = "" if len(rows) == 1 else " the least published loss of those that fit;"
    output.note(
        f"{label}:{why} {place.words}, {output.size(chosen.estimate.needed_nbytes, binary=True)} needed{longest}."
    )
    word = output.shell_word(args.model)
    output.next_command(f"llmkit chat {word}" if label == "COPY" else f"llmkit quantize {word} {label}")


def _facts(args: argparse.Namespace, setting: Setting, place: Place, rows: list[Row]) -> dict[str, object]:
    return {
        "model": args.model,
        "setting": setting,
        "budget_nbytes": place.nbytes,
        "devices": [device.name for device in place.devices],
        "rows": [memory_views.row_facts(row) for row in rows],
    }
