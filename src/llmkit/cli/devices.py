"""Show devices: memory, bandwidth, TOPS and what they mean; compare them for a model.

This machine comes first, its bandwidth measured once. Other rows are looked up, each with its source. With --compare,
what MODEL needs is asked of the engine, and the speed is a range derived from bandwidth.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import memory_views, models, output
from .quantize import count_argument

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ..memory.devices import Machine
    from ..memory.devices.device_table import Device
    from ..memory.speed import SpeedRange, Traffic

EXAMPLES = (
    "llmkit devices",
    "llmkit devices 'M2 Max' rtx4090 'Raspberry Pi 5'",
    "llmkit devices this --measure",
    "llmkit devices --compare 'M1 Max 64GB' rtx4090 --model Qwen/Qwen3-0.6B --quant Q8_0 --context 16384",
)
_GIB, _GB = 1 << 30, 10**9
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAMES, or a comparison."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these: 'm1max', 'RTX 4090', 'M2 Max 64GB', this")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="DEVICE", help="what fits on each of these, and how fast"
    )
    parser.add_argument("--model", metavar="MODEL", help=f"to compare with: {models.MODEL_HELP}")
    parser.add_argument("--quant", metavar="QUANT", help="as what (default: as the GGUF is; of a checkpoint Q4_K_M)")
    parser.add_argument("--context", type=count_argument, default=4096, metavar="N", help="tokens (default 4096)")
    parser.add_argument("--measure", action="store_true", help="measure this machine's bandwidth anew (a second)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Show the table, or the comparison."""
    from ..errors import LlmkitError

    if args.compare:
        if args.model is None:
            raise LlmkitError("--compare needs a model", "For instance: --model Qwen/Qwen3-0.6B")
        compare(args)
    elif args.model:
        raise LlmkitError("--model is for --compare", "llmkit devices --compare this 'M2 Max' --model …")
    else:
        show(args)
    return 0


# ── the table ──


def show(args: argparse.Namespace) -> None:
    """This machine and all the devices, or those that are named."""
    from ..memory import devices

    here: Machine | None = None
    if not args.names or any(map(devices.is_this, args.names)) or args.measure:
        here = devices.this_machine(again=args.measure)
    chosen = [devices.find(name) for name in args.names if not devices.is_this(name)]
    listed = [*(here.devices if here else ()), *(chosen if args.names else devices.DEVICES)]
    if args.json:
        output.emit_json({"devices": [_plain(each) for each in listed], "this_machine": here})
        return
    sources = list(dict.fromkeys(source for each in listed for source in _sources(each)))
    headers = ("device", "memory GB", "GB/s", "how", "usable GiB", "TOPS, and what they mean", "source")
    output.table(headers, [_row(each, sources) for each in listed], "lrrlrll")
    output.emit()
    for number, source in enumerate(sources, 1):
        output.emit(f"[{number}] {source}")
    _tell_rules(listed)
    for remark in here.remarks if here else ():
        output.note(f"note: {remark}")
    for paragraph in _why():
        output.emit()
        output.emit(textwrap.fill(paragraph, _WIDTH))


def _plain(device: Device) -> dict[str, Any]:
    from ..memory import devices

    usable = {str(size): devices.usable_nbytes(device, size) for size in device.memory}
    facts: dict[str, Any] = output.plain(device)
    return {**facts, "usable_nbytes": usable, "usable_rule": devices.usable_rule(device)}


def _sources(device: Device) -> list[str]:
    return [device.source, *(each.source for each in device.compute)]


def _row(device: Device, sources: Sequence[str]) -> tuple[str, ...]:
    from ..memory import devices

    marks = dict.fromkeys(f"[{sources.index(source) + 1}]" for source in _sources(device))
    return (
        device.name,
        ", ".join(_gib(size) for size in device.memory) or "any",
        "-" if device.bandwidth is None else f"{device.bandwidth / _GB:.4g}",
        device.how or "-",
        ", ".join(_gib(devices.usable_nbytes(device, size)) for size in device.memory) or "-",
        "; ".join(map(str, device.compute)) or "-",
        "".join(marks),
    )


def _gib(nbytes: float) -> str:
    return f"{round(nbytes / _GIB, 1):g}"


def _tell_rules(listed: Iterable[Device]) -> None:
    """The rules behind the usable shares, each with what it is for."""
    from ..memory import devices

    rules: dict[str, list[str]] = {}
    for each in listed:
        rules.setdefault(devices.usable_rule(each), []).append(each.name)
    output.emit()
    output.emit("Usable for a model:")
    for rule, names in rules.items():
        output.emit(f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {rule}")


def _why() -> Iterator[str]:
    """Why decoding follows bandwidth, in figures of the table."""
    from ..memory import devices, speed

    first, large, later = (devices.find(name) for name in ("M1", "M1 Max", "M4"))
    text = (
        "Decoding follows bandwidth, not TOPS. Each token reads every active weight once and does 2 operations with"
        f" it: at Q4_K_M, with about {speed.USUAL_BITS:g} bits a weight, {16 / speed.USUAL_BITS:.1f} operations for a"
        " byte."
    )
    if least := devices.fewest_operations(devices.DEVICES):
        device, figure, ratio = least
        text += (
            f" The least of this table, {device.name}, can do {ratio:.0f} for each byte that it reads"
            f" ({figure.tera:g} {figure.unit}, {_rate(device)}): it waits for memory, and so do the others."
        )
    yield (
        f"{text} So {large.name} ({large.compute[0].tera:g} TOPS, {_rate(large)}) decodes faster than {later.name}"
        f" ({later.compute[0].tera:g} TOPS, {_rate(later)}): {speed.BANDWIDTH_WINS}. But {speed.PROMPT_REMARK}."
    )
    yield (
        f"Figures for one chip disagree because they count different things: {first.name} has"
        f" {' and '.join(map(str, first.compute))}; llama.cpp computes on the GPU and the CPU, never on the Neural"
        f" Engine. {devices.ABOUT_TOPS}"
    )


def _rate(device: Device) -> str:
    return "-" if device.bandwidth is None else f"{device.bandwidth / _GB:.4g} GB/s"


# ── a comparison ──


@dataclass(frozen=True)
class Need:
    """What a model needs at one context: bytes in all, and what one token reads and computes with it filled."""

    label: str
    context: int
    weight_nbytes: int
    cache_nbytes: int
    other_nbytes: int
    traffic: Traffic
    read_nbytes: int
    operations: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weight_nbytes + self.cache_nbytes + self.other_nbytes


@dataclass(frozen=True)
class Verdict:
    """One device with one size of memory: what a model may have there, whether it fits, how fast it decodes."""

    device: str
    memory_nbytes: int
    usable_nbytes: int
    fits: bool
    bandwidth: float | None
    bandwidth_how: str
    speed: SpeedRange | None


def compare(args: argparse.Namespace) -> None:
    """What fits on each device, and the range of its speed."""
    from ..memory import devices

    if args.measure:
        devices.this_machine(again=True)
    chosen = [devices.find(name) for name in args.compare]
    with models.outline(args.model) as source:
        need = _need(source.path, args)
    verdicts = [_verdict(device, size, need) for device in chosen for size in device.memory or (0,)]
    if args.json:
        output.emit_json({"need": need, "nbytes": need.nbytes, "devices": verdicts})
        return
    headers = ("device", "memory GB", "usable GiB", "needs GiB", "fits", "GB/s", "tokens/s", "ceiling")
    output.table(headers, [_verdict_row(each, need) for each in verdicts], "lrrrlrrr")
    output.emit()
    output.emit(
        f"{need.label}, {need.context:,} tokens of context: weights {output.size(need.weight_nbytes, binary=True)},"
        f" caches {output.size(need.cache_nbytes, binary=True)}, buffers {output.size(need.other_nbytes, binary=True)}"
        " (asked of the engine, as it lays them out for a CPU; on a GPU the buffers differ)."
    )
    output.emit(
        f"A token with the context full reads {need.read_nbytes / _GB:.2f} GB and takes {need.operations / 1e9:.1f}"
        f" billion operations: {need.operations / need.read_nbytes:.1f} for a byte. Ceiling: bandwidth over bytes."
    )
    for reason in dict.fromkeys(reason for each in verdicts if each.speed for reason in each.speed.reasons):
        output.emit(f"  {reason}")


def _verdict(device: Device, size: int, need: Need) -> Verdict:
    from ..memory import devices, speed

    usable = devices.usable_nbytes(device, size or None)
    fits = need.nbytes <= usable
    estimate = None
    if fits and device.bandwidth:
        estimate = speed.decode_range(
            need.traffic, need.read_nbytes - need.traffic.weight_nbytes,
            bandwidth=device.bandwidth, processor=device.processor, measured=device.how == "measured",
        )  # fmt: skip
    return Verdict(device.name, size, usable, fits, device.bandwidth, device.how, estimate)


def _verdict_row(verdict: Verdict, need: Need) -> tuple[str, ...]:
    left = verdict.usable_nbytes - need.nbytes
    estimate = verdict.speed
    return (
        verdict.device,
        _gib(verdict.memory_nbytes),
        _gib(verdict.usable_nbytes),
        _gib(need.nbytes),
        f"yes, {_gib(left)} left" if verdict.fits else f"no, {_gib(-left)} short",
        "-" if verdict.bandwidth is None else f"{verdict.bandwidth / _GB:.4g}",
        f"{memory_views.speed(estimate.low)} to {memory_views.speed(estimate.high)}" if estimate else "-",
        memory_views.speed(estimate.ceiling) if estimate else "-",
    )


def _need(path: Path, args: argparse.Namespace) -> Need:
    """What the model at `path` needs, asked of the engine."""
    from .. import convert, model
    from ..errors import EngineError
    from ..memory import decoding, estimate, setting
    from ..quants import quant

    draft = convert.open_draft(path, tokenizer=False)
    label = args.quant or model.parse(args.model).quant or (None if path.is_file() else "Q4_K_M")
    as_it_is = label is None or (path.is_file() and args.quant is None)
    (variant,) = estimate.variants(draft, ["COPY" if as_it_is or label is None else quant(label).name])
    asked = setting.runtime("llmkit").with_context(args.context)
    found = estimate.estimate(draft, [variant], [asked])[0][0]
    if found.error:
        raise EngineError(f"{draft.name}: the engine refuses {args.context} tokens of context: {found.error}")
    token = decoding.of(draft, found)
    weights, caches = found.part("weights"), found.part("KV cache") + found.part("recurrent state")
    return Need(
        f"{draft.name} {label or draft.own_type.name}",
        found.context,
        weights,
        caches,
        found.needed_nbytes - weights - caches,
        token.traffic,
        token.read_nbytes,
        token.operations,
    )
