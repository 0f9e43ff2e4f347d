"""Devices by name, what of their memory a model may have, and this machine as a device.

    find("rtx4090"), find("M2 Max 64GB")     case, spaces and dashes do not matter; a size chooses among variants
    usable_nbytes(device)                    and usable_rule(device) says by which rule
    this_machine()                           its GPUs and its processor, measured

The rows are device_table.py. Figures of this machine are measured or asked; those of its GPUs are looked up by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ...errors import LlmkitError, Unsupported, nearest
from . import bandwidth, machine
from .device_table import ABOUT_TOPS, DEVICES, GB, GIB, USABLE_RULES, Compute, Device

__all__ = [
    "ABOUT_TOPS", "DEVICES", "THIS", "Compute", "Device", "Machine", "fewest_operations", "find", "is_this",
    "nearest_names", "this_machine", "usable_nbytes", "usable_rule",
]  # fmt: skip

THIS = "this machine"
_THIS_KEYS = ("this", "thismachine", "here", "me")
_SIZE = re.compile(r"[\s_(,-]*\b(\d+(?:\.\d+)?)\s*(?:gi?b|g)\b\)?|(?<=\D)(\d+)gi?b$", re.IGNORECASE)
_MAKERS = re.compile(r"^(?:nvidia|geforce|apple|amd|intel|tesla)+")
_WORDS = re.compile(r"bionic|tensorcoregpu|developerkit|unifiedmemory|ram$")
_REVISION = re.compile(r"\s+rev\s+[\d.]+$", re.IGNORECASE)


# ── by name ──


def find(name: str) -> Device:
    """The device called `name`, with that one size of memory when the name tells it ("M2 Max 64GB").

    Where a name stands for several variants ("M3 Max", "A100"), the one with the lowest bandwidth. "this" is this
    machine. Raises Unsupported for unknown names, with the nearest, and for sizes that are not sold, with those sold.
    """
    if is_this(name):
        return this_machine().best
    whole = _matching(name)
    if whole:
        return min(whole, key=_rate)
    size, rest = _split_size(name)
    found = _matching(rest)
    if not found or size is None:
        close = ", ".join(nearest_names(name))
        raise Unsupported(
            f"unknown device '{name}'", f"Nearest: {close}." if close else "`llmkit devices` shows them all."
        )
    fitting = [device for device in found if size in device.memory or not device.memory]
    if not fitting:
        sold = sorted({each for device in found for each in device.memory})
        sizes = ", ".join(f"{each / GIB:g}" for each in sold)
        raise Unsupported(f"{rest.strip()} is not sold with {size / GIB:g} GB", f"Sizes in GB: {sizes}.")
    return replace(min(fitting, key=_rate), memory=(size,))


def is_this(name: str) -> bool:
    """Whether `name` means this machine."""
    return _key(name) in _THIS_KEYS


def nearest_names(name: str) -> list[str]:
    """Names of devices that look like `name`; may be empty."""
    known: dict[str, str] = {}
    for device in DEVICES:
        for each in (device.name, *device.aliases):
            known.setdefault(_key(each), device.name)
    return list(dict.fromkeys(known[key] for key in nearest(_key(_split_size(name)[1]), known, 4)))


def _matching(name: str) -> list[Device]:
    key = _key(name)
    return [device for device in DEVICES if key in map(_key, (device.name, *device.aliases))]


def _key(name: str) -> str:
    """`name` without case, spaces, punctuation, makers and words that tell nothing."""
    plain = re.sub(r"[^a-z0-9.+]", "", name.lower())
    return _WORDS.sub("", _MAKERS.sub("", plain)) or plain


def _split_size(name: str) -> tuple[int | None, str]:
    """The memory that `name` tells last, in bytes, and the name without it."""
    matches = list(_SIZE.finditer(name))
    if not matches:
        return None, name
    match = matches[-1]
    return round(float(match[1] or match[2]) * GIB), name[: match.start()] + " " + name[match.end() :]


def _rate(device: Device) -> float:
    return device.bandwidth or 0.0


# ── what a model may have ──


def usable_nbytes(device: Device, memory: int | None = None) -> int:
    """Bytes that weights, caches and buffers may take of `memory`, by default the largest size sold.

    Raises LlmkitError where any memory can be plugged in and none was named.
    """
    if device.usable == "free" and device.free_nbytes is not None:
        return device.free_nbytes
    size = memory or max(device.memory, default=0)
    if not size:
        raise LlmkitError(f"{device.name}: how much memory?", f"Name it with a size: '{device.name} 32GB'.")
    return max(0, _USABLE[device.usable](size))


def usable_rule(device: Device) -> str:
    """The rule behind `usable_nbytes`, in words."""
    return USABLE_RULES[device.usable]


_USABLE: dict[str, Callable[[int], int]] = {
    "metal": lambda size: size * 2 // 3 if size <= 36 * GIB else size * 3 // 4,
    "vram": lambda size: size - 3 * GB // 2,
    "shared": lambda size: size - 3 * GB // 2,
    "small": lambda size: size - GB // 2,
    "ram": lambda size: size - 2 * GB,
    "phone": lambda size: size // 2,
    "free": lambda size: size,
}


def fewest_operations(devices: Iterable[Device]) -> tuple[Device, Compute, float] | None:
    """The device that can do the fewest operations for a byte it reads, by its largest figure; None without any."""
    ratios = [
        (device, each, each.tera * 1e12 / device.bandwidth)
        for device in devices
        if device.bandwidth and device.compute
        for each in [max(device.compute, key=lambda compute: compute.tera)]
    ]
    return min(ratios, key=lambda row: row[2], default=None)


# ── this machine ──


@dataclass(frozen=True)
class Machine:
    """This machine: its processor and GPUs as devices, its memory, the measurement, and what went wrong in words."""

    cpu: Device
    gpus: tuple[Device, ...]
    ram: machine.Ram
    measured: bandwidth.Bandwidth | None
    remarks: tuple[str, ...]

    @property
    def devices(self) -> tuple[Device, ...]:
        """GPUs first: the engine takes them when it can."""
        return (*self.gpus, self.cpu)

    @property
    def best(self) -> Device:
        """What the engine would compute on: the GPU with most memory, else the processor."""
        return max(self.gpus, key=lambda gpu: gpu.memory, default=self.cpu)


def this_machine(*, measure: bool = True, again: bool = False) -> Machine:
    """This machine as devices. `measure` its bandwidth unless that is remembered (a second), `again` in any case.

    An engine that is missing or dies costs the GPUs, and a remark. Raises LlmkitError where nobody says how much memory
    there is.
    """
    ram, remarks = machine.ram(), []
    measured = bandwidth.of_this_machine(again=again) if measure or again else None
    try:
        seen = machine.gpus()
    except LlmkitError as error:
        seen = ()
        remarks.append(f"GPUs are not known: {error.message.splitlines()[0]}")
    if ram.limit is not None:
        remarks.append(f"a container limits memory to {ram.limit / GIB:.1f} GiB")
    gpus = tuple(_gpu(each, ram) for each in seen)
    return Machine(_processor(ram, measured), gpus, ram, measured, tuple(remarks))


def _processor(ram: machine.Ram, measured: bandwidth.Bandwidth | None) -> Device:
    name = machine.board_name() or machine.cpu_name()
    row = _known(name)
    rate: float | None = None
    how, source = "", "not measured"
    if measured:
        rate, how, source = measured.nbytes_per_second, "measured", f"measured {measured.date}: {measured.remark}"
    elif row and row.processor == "cpu":
        rate, how, source = row.bandwidth, row.how, row.source
    return Device(
        f"{THIS}: {name}", THIS, "cpu", (ram.total,), rate, "ram" if ram.available is None else "free", source,
        free_nbytes=ram.available, how=how,
    )  # fmt: skip


def _gpu(gpu: machine.Gpu, ram: machine.Ram) -> Device:
    """A GPU of this machine: memory as the engine says, the rest looked up by its name, or its board's.

    Variants of one name differ by their memory: a card's own; with Apple and Jetson, where it is shared, the machine's.
    """
    sizes = [f" {round(size / GIB)}GB" for size in (gpu.total, ram.total)]
    names = [name for name in (gpu.description, machine.board_name()) if name]
    row = next((row for name in names for size in (*sizes, "") if (row := _known(name + size))), None)
    return Device(
        f"{THIS}: {gpu.description or gpu.name}", THIS, "gpu", (gpu.total,), row.bandwidth if row else None, "free",
        f"memory: asked of the engine; bandwidth: {row.source if row else 'not known by this name'}",
        row.compute if row else (), free_nbytes=gpu.free, how=row.how if row else "",
    )  # fmt: skip


def _known(name: str) -> Device | None:
    """The row for a name that a system gives, or None."""
    try:
        return None if is_this(name) else find(_REVISION.sub("", name))
    except Unsupported:
        return None
