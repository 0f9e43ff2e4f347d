"""How memory is shown: the table per bit width, the parts of one quant, techniques, splits, comparisons, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from ..convert import GgufDraft
    from ..memory.closed_form import Rough
    from ..memory.mlx_estimate import MlxEstimate
    from ..memory.parts import MemoryEstimate, Part
    from ..memory.reality import Difference
    from ..memory.setting import Setting
    from ..memory.split import Place, Split
    from ..memory.table import Row
    from ..memory.techniques import Technique


def _gib(nbytes: int) -> str:
    return output.size(nbytes, binary=True)


# ── bit widths ──


def table(rows: Sequence[Row], setting: Setting, *, on_gpu: bool) -> None:
    """One line a quant, and how the figures were got; `on_gpu`: a GPU is to take part."""
    told, timed = any(row.token for row in rows), any(row.speed for row in rows)
    headers = ["quant", "file", "bits/weight", f"RAM at {setting.context:,}", "longest context", "fits"]
    headers += [*(["token reads"] if told else []), *(["tokens/s"] if timed else []), "published loss"]
    output.table(headers, [_cells(row, told, timed) for row in rows], "lrrrrl" + "r" * (told + timed) + "l")
    output.emit()
    for line in _legend(rows, on_gpu):
        output.emit(line)


def _cells(row: Row, told: bool, timed: bool) -> list[str]:
    each, variant = row.estimate, row.estimate.variant
    cells = [
        variant.label,
        output.size(variant.file_nbytes),
        f"{float(variant.bits_per_weight):.2f}",
        "refused" if each.error else _gib(each.needed_nbytes),
        "-" if row.longest is None else f"{row.longest:,}",
        {True: "yes", False: "no", None: "-"}[row.fits],
    ]
    if told:
        cells.append(output.size(row.token.read_nbytes) if row.token else "-")
    if timed:
        cells.append(f"{speed(row.speed.low)}–{speed(row.speed.high)}" if row.speed and row.fits else "-")
    imatrix = " (imatrix)" if row.hint and row.hint.imatrix else ""
    return [*cells, f"{row.hint.word}, {row.hint.divergence:.3f}{imatrix}" if row.hint else "-"]


def speed(tokens: float) -> str:
    """Tokens per second: no more digits than a range deserves."""
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.2g}"


_TIERS = {
    "exact": "weights, caches and compute buffer as the engine itself lays them out, to the byte; vocabulary, runtime"
    " and small buffers derived: together within 3 % of what a process shows",
    "closed form": "derived from the shape, without the engine: usually within 2 %",
    "rough": "the rule of thumb, parameters × bits / 8, and what it is known to leave out",
}
_GPU = (
    "Laid out as for a CPU, and compared with the GPU's memory: its buffers differ somewhat; --gpu-layers auto tells"
    " what lies where (derived)."
)


def _told(tier: str, on_gpu: bool) -> Iterator[str]:
    yield f"RAM: {tier}: {_TIERS[tier]}."
    if on_gpu:
        yield _GPU


def _legend(rows: Sequence[Row], on_gpu: bool) -> Iterator[str]:
    """How the figures were got."""
    from ..memory.published import SOURCE

    refused = next((row.estimate.error for row in rows if row.estimate.error), None)
    if refused:
        yield f"Refused: {refused}"
    yield from _told(rows[0].estimate.tier, on_gpu)
    if any(row.longest for row in rows):
        yield "Longest context: derived from that, up to what the model was trained for, or what was asked for."
    yield f"Published loss: looked up, mean KL divergence in nats ({SOURCE}); not measured on this model."
    timed = next((row.speed for row in rows if row.speed and row.fits), None)
    if timed:
        yield "tokens/s: derived, with the context full. " + "; ".join(timed.reasons) + "."
    token = next((row.token for row in rows if row.token), None)
    if token:
        yield (
            f"A token takes {token.operations / 1e9:.1f} billion operations, whatever the quant, and reads its share of"
            " the weights and the full cache: bytes decide (derived)."
        )


def row_facts(row: Row) -> dict[str, object]:
    """A row as plain data."""
    each = row.estimate
    return {
        "quant": each.variant.label,
        "file_nbytes": each.variant.file_nbytes,
        "bits_per_weight": each.variant.bits_per_weight,
        "tier": each.tier,
        "context": each.context,
        "parts": each.parts,
        "needed_nbytes": each.needed_nbytes,
        "resident_nbytes": each.resident_nbytes,
        "longest_context": row.longest,
        "fits": row.fits,
        "published": row.hint,
        "token": row.token,
        "speed": row.speed,
        "error": each.error,
        "why_not_asked": each.why_not_asked or None,
    }


# ── one quant ──


def parts(row: Row, label: str, where: str, *, on_gpu: bool) -> None:
    """The tree of parts with their sums, what a token costs, and how fast that may be on the device `where`."""
    each = row.estimate
    output.emit(_title(label, each))
    output.emit()
    lines: list[tuple[str, str, str, str]] = []
    for part in each.parts:
        _lines(part, 0, lines)
    lines.append(("needed", f"{each.needed_nbytes:,}", _gib(each.needed_nbytes), each.tier))
    if each.resident_nbytes != each.needed_nbytes:
        lines.append(("shown as taken", f"{each.resident_nbytes:,}", _gib(each.resident_nbytes), each.tier))
    output.table(("part", "bytes", "", "how"), lines, "lrrl")
    output.emit()
    for line in _told(each.tier, on_gpu):
        output.emit(line)
    if not row.token:
        return
    read, operations = output.size(row.token.read_nbytes), row.token.operations / 1e9
    output.emit(f"A token with the context full reads {read} and takes {operations:.1f} billion operations (derived).")
    if row.speed and row.fits:
        low, high, ceiling = row.speed.low, row.speed.high, row.speed.ceiling
        output.emit(f"On {where}: {speed(low)} to {speed(high)} tokens/s, ceiling {speed(ceiling)} (derived).")
        output.emit("; ".join(row.speed.reasons) + ".")


def _title(label: str, each: MemoryEstimate) -> str:
    """The quant, its file, the context; what the engine makes of it where that is more."""
    asked = each.setting.context
    rounded = f" (rounded up from {asked:,})" if each.context != asked else ""
    bits = float(each.variant.bits_per_weight)
    size = output.size(each.variant.file_nbytes)
    return f"{label}: a file of {size}, {bits:.2f} bits a weight; {each.context:,} tokens of context{rounded}"


def _lines(part: Part, depth: int, lines: list[tuple[str, str, str, str]]) -> None:
    name = "  " * depth + part.name + (" (can be dropped)" if part.evictable else "")
    lines.append((name, f"{part.nbytes:,}", _gib(part.nbytes), part.how))
    for inner in part.parts:
        _lines(inner, depth + 1, lines)


# ── other questions ──


def rough(rules: Mapping[str, Rough], budget: int, where: str) -> None:
    """The rule of thumb beside the truth about models of such a size. Derived, and looked up."""
    rows = [
        (
            label,
            output.size(rule.nbytes),
            output.size(rule.with_overhead),
            f"{output.size(rule.least)} to {output.size(rule.most)}",
            f"{rule.least / rule.nbytes - 1:+.0%} to {rule.most / rule.nbytes - 1:+.0%}",
            "yes" if rule.most <= budget else "no" if rule.least > budget else "perhaps",
        )
        for label, rule in rules.items()
    ]
    output.table(("quant", "rule", "rule × 1.2", "truth", "off by", "fits"), rows, "lrrrrl")
    output.emit()
    output.emit(f"Rule: rough: parameters × bits / 8 (derived). Fits: the truth, in {where}.")
    output.emit(
        "Truth: looked up: what known models of such a size take with 4,096 tokens of context. It differs because names"
        " round (7B is 6.74 billion), quants keep scales and some tensors in more bits, and the cache and buffers come"
        " on top. Name a model for exact figures."
    )


def techniques(found: Sequence[Technique], row: Row, label: str, model: str) -> None:
    """What each way of saving memory saves on this model, what it costs, and the command."""
    output.emit(
        f"{label}, {row.estimate.context:,} tokens: {_gib(row.estimate.needed_nbytes)} needed ({row.estimate.tier})"
    )
    output.emit()
    shown = [
        (each.name, "-" if each.saved is None else _gib(each.saved), each.what, each.state, each.how) for each in found
    ]
    output.table(("technique", "saves", "what", "state", "how"), shown, "lrlll")
    for each in found:
        output.emit()
        output.emit(f"{each.name}: costs {each.cost}" + (f". {each.why}" if each.why else ""))
        if each.command:
            output.emit(f"    {each.command.replace('MODEL', output.shell_word(model))}")


def split(found: Split, label: str) -> None:
    """What lies on each device. Derived: nothing of it was measured on a GPU."""
    total = found.n_layer + 1
    output.emit(f"{label}: {found.gpu_layers} of {total} layers on GPUs (derived by llama.cpp's rules)")
    output.emit()
    names = list(dict.fromkeys(part.name for place in _places(found) for part in place.parts))
    lines = [
        [name, *(_gib(place.part(name)) if place.part(name) else "-" for place in _places(found))] for name in names
    ]
    lines.append(["sum", *(_gib(place.nbytes) for place in _places(found))])
    lines.append(["beside it", *(_span(place.unaccounted) for place in _places(found))])
    lines.append(["free", *("-" if place.free_nbytes is None else _gib(place.free_nbytes) for place in _places(found))])
    lines.append(
        ["fits", *("-" if place.free_nbytes is None else "yes" if place.fits else "no" for place in _places(found))]
    )
    output.table(("part", *(place.name for place in _places(found))), lines, "l" + "r" * (len(found.devices) + 1))
    for remark in found.remarks:
        output.note(f"note: {remark}")


def _places(found: Split) -> tuple[Place, ...]:
    return (*found.devices, found.host)


def _span(bounds: tuple[int, int]) -> str:
    return "-" if not any(bounds) else f"{_gib(bounds[0])} to {_gib(bounds[1])}"


def differences(found: Sequence[Difference]) -> None:
    """Estimate beside reality, part by part."""
    rows = [
        (
            each.part,
            f"{each.estimated:,}",
            f"{each.real:,}",
            f"{each.real - each.estimated:+,}",
            f"{each.allowed:,}",
            "yes" if each.holds else "NO",
        )
        for each in found
    ]
    output.table(("part", "estimated", "measured", "difference", "allowed", "holds"), rows, "lrrrrl")


def mlx(found: Sequence[MlxEstimate], budget: int, where: str) -> None:
    """The model in MLX's formats. Derived."""
    from ..memory.mlx_estimate import WARNS_ABOVE

    rows = [
        (
            f"{each.bits} bits, groups of {each.group}" if each.bits else "16 bits",
            f"{each.bits_per_weight:.2f}",
            *(_gib(each.part(name)) if each.part(name) else "-" for name in ("weights", "KV cache", "recurrent state")),
            _gib(each.nbytes),
            "no" if each.nbytes > budget else "tight" if each.share(budget) > WARNS_ABOVE else "yes",
        )
        for each in found
    ]
    headers = ("MLX format", "bits/weight", "weights", "KV cache", "state", "together", "fits")
    output.table(headers, rows, "lrrrrrl")
    output.emit()
    output.emit(f"Derived from MLX's formats, nothing measured. {where}; tight: mlx-lm warns above {WARNS_ABOVE:.0%}.")
    for remark in dict.fromkeys(remark for each in found for remark in each.remarks):
        output.emit(remark)


def plot(
    path: Path, draft: GgufDraft, rows: Sequence[Row], setting: Setting, trained: int, budget: int, where: str
) -> None:
    """Draw memory against context for every quant that was estimated, and the line of what there is."""
    from ..memory import estimate as memory
    from ..memory import fit
    from ..memory import plot as picture

    estimates = [row.estimate for row in rows]
    grown = fit.growth(draft, estimates[0].variant, setting, fit.context_points(trained, setting.context))
    lines = [
        picture.Line(
            memory.own_label(draft) if each.variant.label == memory.COPY else each.variant.label,
            grown.contexts,
            tuple(round(each.needed_nbytes - grown.at(each.context) + nbytes) for nbytes in grown.nbytes),
        )
        for each in estimates
    ]
    limit = picture.Limit(where, budget)
    picture.draw(path, f"{draft.name}: memory against context", lines, limit=limit)
    output.note(f"{path}: drawn")
