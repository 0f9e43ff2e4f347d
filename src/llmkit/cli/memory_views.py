"""How memory is shown: the table per bit width, the parts of one quant, techniques, splits, comparisons, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from ..convert import GgufDraft
    from ..memory.mlx_estimate import MlxEstimate
    from ..memory.parts import Part
    from ..memory.reality import Difference
    from ..memory.setting import Setting
    from ..memory.split import Place, Split
    from ..memory.table import Row
    from ..memory.techniques import Technique


def _gib(nbytes: int) -> str:
    return output.size(nbytes, binary=True)


# ── bit widths ──


def table(draft: GgufDraft | None, rows: Sequence[Row], setting: Setting) -> None:
    """One line a quant, and how the figures were got."""
    timed = any(row.speed for row in rows)
    own = draft.own_type.name if draft else ""
    headers = ["quant", "file", "bits/weight", f"RAM at {setting.context:,}", "longest context", "fits"]
    headers += [*(["tokens/s"] if timed else []), "published loss"]
    output.table(headers, [_cells(row, own, timed) for row in rows], "lrrrrl" + "r" * timed + "l")
    output.emit()
    for line in _legend(rows):
        output.emit(line)


def _cells(row: Row, own: str, timed: bool) -> list[str]:
    each, variant = row.estimate, row.estimate.variant
    cells = [
        own if variant.label == "COPY" else variant.label,
        output.size(variant.file_nbytes),
        f"{float(variant.bits_per_weight):.2f}",
        "refused" if each.error else _gib(each.needed_nbytes),
        "-" if row.longest is None else f"{row.longest:,}",
        {True: "yes", False: "no", None: "-"}[row.fits],
    ]
    if timed:
        cells.append(f"{row.speed.low:.3g}–{row.speed.high:.3g}" if row.speed and row.fits else "-")
    imatrix = " (imatrix)" if row.hint and row.hint.imatrix else ""
    return [*cells, f"{row.hint.word}, {row.hint.divergence:.3f}{imatrix}" if row.hint else "-"]


_TIERS = {
    "exact": "laid out by the engine itself, to the byte; name one quant to see its parts",
    "closed form": "derived from the shape, usually within 2 %, without the engine, which does not know this model",
    "rough": "the rule of thumb, parameters × bits / 8, and what it is known to leave out; the file column is the rule"
    " alone. Real names round, quants keep scales, and cache and buffers come on top: name a model for exact figures",
}


def _legend(rows: Sequence[Row]) -> Iterator[str]:
    """How the figures were got."""
    from ..memory.published import SOURCE

    refused = next((row.estimate.error for row in rows if row.estimate.error), None)
    if refused:
        yield f"Refused: {refused}"
    tier = rows[0].estimate.tier
    yield f"RAM: {tier}: {_TIERS[tier]}."
    if any(row.longest for row in rows):
        yield "Longest context: derived from that, up to what the model was trained for."
    yield f"Published loss: looked up, mean KL divergence in nats ({SOURCE}); not measured on this model."
    timed = next((row.speed for row in rows if row.speed and row.fits), None)
    if timed:
        yield "tokens/s: derived, with the context full. " + "; ".join(timed.reasons) + "."
    token = next((row.token for row in rows if row.token), None)
    if token:
        yield f"A token takes {token.operations / 1e9:.1f} billion operations, whatever the quant; bytes read decide."


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
    }


# ── one quant ──


def parts(row: Row, where: str) -> None:
    """The tree of parts with their sums, what a token costs, and how fast that may be."""
    each = row.estimate
    if each.error:
        output.emit(f"The engine refuses this setting: {each.error}")
        return
    lines: list[tuple[str, str, str, str]] = []
    for part in each.parts:
        _lines(part, 0, lines)
    lines.append(("needed", f"{each.needed_nbytes:,}", _gib(each.needed_nbytes), each.tier))
    if each.resident_nbytes != each.needed_nbytes:
        lines.append(("shown as taken", f"{each.resident_nbytes:,}", _gib(each.resident_nbytes), each.tier))
    output.table(("part", "bytes", "", "how"), lines, "lrrl")
    if not row.token:
        return
    output.emit()
    read, operations = output.size(row.token.read_nbytes), row.token.operations / 1e9
    output.emit(f"A token with the context full reads {read} and takes {operations:.1f} billion operations (derived).")
    if row.speed and row.fits:
        low, high, ceiling = row.speed.low, row.speed.high, row.speed.ceiling
        device = where.partition(" of ")[2]
        output.emit(f"On {device}: {low:.3g} to {high:.3g} tokens/s, ceiling {ceiling:.3g} (derived).")
        output.emit("; ".join(row.speed.reasons) + ".")


def _lines(part: Part, depth: int, lines: list[tuple[str, str, str, str]]) -> None:
    name = "  " * depth + part.name + (" (can be dropped)" if part.evictable else "")
    lines.append((name, f"{part.nbytes:,}", _gib(part.nbytes), part.how))
    for inner in part.parts:
        _lines(inner, depth + 1, lines)


# ── other questions ──


def techniques(found: Sequence[Technique], row: Row, model: str) -> None:
    """What each way of saving memory saves on this model, what it costs, and the command."""
    label = row.estimate.variant.label
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


def split(found: Split, row: Row) -> None:
    """What lies on each device. Derived: nothing of it was measured on a GPU."""
    total = found.n_layer + 1
    output.emit(
        f"{row.estimate.variant.label}: {found.gpu_layers} of {total} layers on GPUs (derived by llama.cpp's rules)"
    )
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
    rows = [
        (
            f"{each.bits} bits, groups of {each.group}" if each.bits else "16 bits",
            f"{each.bits_per_weight:.2f}",
            *(_gib(each.part(name)) if each.part(name) else "-" for name in ("weights", "KV cache", "recurrent state")),
            _gib(each.nbytes),
            "yes" if each.nbytes <= budget else "no",
        )
        for each in found
    ]
    headers = ("MLX format", "bits/weight", "weights", "KV cache", "state", "together", "fits")
    output.table(headers, rows, "lrrrrrl")
    output.emit()
    output.emit(f"Derived from MLX's formats, nothing measured. {where}.")
    for remark in dict.fromkeys(remark for each in found for remark in each.remarks):
        output.emit(remark)


def plot(
    path: Path, draft: GgufDraft, rows: Sequence[Row], setting: Setting, trained: int, budget: int, where: str
) -> None:
    """Draw memory against context for every quant that was estimated, and the line of what there is."""
    from ..memory import fit
    from ..memory import plot as picture

    first = rows[0].estimate.variant
    grown = fit.growth(draft, first, setting, fit.context_points(trained, setting.context))
    lines = [
        picture.Line(
            draft.own_type.name if row.estimate.variant.label == "COPY" else row.estimate.variant.label,
            grown.contexts,
            tuple(row.estimate.part("weights") + nbytes for nbytes in grown.nbytes),
        )
        for row in rows
    ]
    limit = picture.Limit(where.partition(" of ")[2] or "as asked", budget)
    picture.draw(path, f"{draft.name}: memory against context", lines, limit=limit)
    output.note(f"{path}: drawn")
