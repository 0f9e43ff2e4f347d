"""How `llmkit inspect quant` draws what it found: the textbook, blocks, losses, histograms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from .. import output

if TYPE_CHECKING:
    from ...inspection.blocks import Block, Group
    from ...inspection.losses import Histogram, Loss
    from ...inspection.scaling import Scaled
    from .quant import Shown

_WORDS = ("post-training quantization", "weight-only", "dynamic quantization", "static quantization", "QAT")
_FIRST = 8  # codes shown of a sub-block, weights of a scaling
_SCALES = "each block has a scale of its own"


def show_textbook(cases: Sequence[Scaled]) -> None:
    """The same eight numbers by absmax and zero-point, in 8 and 4 bits; then words for what this is and is not."""
    first = cases[0]
    output.emit(f"{len(first.codes)} weights, the largest magnitude {_number(first.largest)}. The textbook's question:")
    output.emit(f"what becomes of {_number(first.codes[0].value)} in 8 bits?  {_answer(first)}")
    output.emit()
    for case in cases:
        _show_scaling(case)
    output.emit("What this is, and what it is not:")
    _show_words()


def show(shown: Shown) -> None:
    """A tensor."""
    shape = " × ".join(f"{size:,}" for size in shown.shape)
    output.emit(output.paint(f"{shown.tensor}", bold=True) + f"  {shape}, stored as {shown.type}  ({shown.model})")
    output.emit()
    for case in (shown.scalings[0], shown.scalings[2]):
        count = len(case.codes)
        _show_scaling(case, f"row {shown.row}, its first {count} weights, {_FIRST} of them shown")
    for block, before in zip(shown.blocks, shown.before, strict=True):
        _show_block(block, before, shown)
    _show_losses(shown)
    if shown.histogram is not None:
        _show_histogram(shown.histogram, str(shown.histogram_of))


# ── absmax and zero-point ──


def _answer(case: Scaled) -> str:
    one = case.codes[0]
    return (
        f"round({_number(one.value)} · {case.highest} / {_number(case.largest)}) = round({_number(one.exact, 3)})"
        f" = {one.code} → {one.code} · {_number(case.largest)} / {case.highest} = {_number(one.back, 4)}"
    )


def _show_scaling(case: Scaled, what: str = "") -> None:
    top = max(abs(case.smallest), abs(case.largest))
    if case.kind == "absmax":
        scale = f"scale = {_number(top)} / {case.highest} = {_number(case.scale)}, code = round(w / scale)"
    else:
        low, high = min(case.smallest, Fraction()), max(case.largest, Fraction())
        scale = (
            f"scale = ({_number(high)} − {_bracketed(low)}) / {case.highest} = {_number(case.scale)},"
            f" zero = round({_number(-low)} / scale) = {case.zero}, code = round(w / scale) + zero"
        )
    title = f"{case.kind}, {case.bits} bits: codes {_minus(case.lowest)} … {case.highest}"
    output.emit(output.paint(title, bold=True) + (f"  ({what})" if what else ""))
    output.emit(f"  {scale}")
    cells = [
        ("w", *(_number(each.value) for each in case.codes[:_FIRST])),
        ("before rounding", *(_number(each.exact, 4) for each in case.codes[:_FIRST])),
        ("code", *(_minus(each.code) for each in case.codes[:_FIRST])),
        ("back", *(_number(each.back) for each in case.codes[:_FIRST])),
        ("error", *(_signed(each.error) for each in case.codes[:_FIRST])),
    ]
    _columns(cells)
    rmse = float(case.squared_error) ** 0.5
    output.emit(
        f"  RMSE {rmse:.4g}, largest error {_number(case.largest_error)} (half a step is {_number(case.scale / 2)})"
    )
    output.emit()


def _bracketed(value: Fraction) -> str:
    return f"({_number(value)})" if value < 0 else _number(value)


def _show_words() -> None:
    from ...inspection import explain

    for name in _WORDS:
        term = explain.find(name)
        output.emit(f"  {term.first} {term.third}")


# ── blocks ──


def _show_block(block: Block, before: tuple[float, ...] | None, shown: Shown) -> None:
    from ...inspection.block_layouts import FAMILIES

    bits = f"{block.weights} weights in {block.nbytes} bytes, {float(block.bits_per_weight):g} bits per weight"
    output.emit(f"{output.paint(block.type, bold=True)}  {block.family}: {FAMILIES[block.family]}")
    made = "as it stands in the file" if before is None else "made now of these weights by the engine's kernel"
    output.emit(f"  {bits}; {made}")
    output.emit(f"  {block.formula}    [{block.source}]")
    rows = [
        (f"{part.first}–{part.first + part.nbytes - 1}" if part.nbytes > 1 else str(part.first), part.name,
         "" if part.value is None else _number(part.value), part.meaning, _cut(part.hex))
        for part in block.parts
    ]  # fmt: skip
    _columns([("bytes", "field", "value", "meaning", "the bytes"), *rows], "rlrll")
    if len(block.groups) > 1:
        _show_groups(block)
    for line in block.packing:
        output.emit(f"  6 bits: {line}")
    if block.points:
        output.emit(f"  points: {' '.join(map(_minus, block.points))}")
    if len(block.groups) == 1:
        _show_weights(block.groups[0], before)
    if block.worked:
        output.emit(f"  {block.worked}" + _was(block, before))
    if not block.unpacked:
        output.emit("  Which points the codes mean is looked up in the engine's grid: the values are the engine's.")
    output.emit()


def _was(block: Block, before: tuple[float, ...] | None) -> str:
    if before is None or block.worked is None:
        return ""
    number = int(block.worked.split()[1].rstrip(":"))
    error = block.values[number] - before[number]
    return f"; it was {_number(before[number])}: error {_signed(error)}"


def _show_groups(block: Block) -> None:
    head = ["sub-block", "weights"]
    first = block.groups[0]
    head += ["scale"] * (first.scale_code is not None) + ["min"] * (first.min_code is not None)
    head += [f"step = {block.scaling}" if block.scaling else "step"]
    head += ["minimum = dmin · min"] * (first.minimum is not None)
    size = len(first.values)
    head.append(f"first {_FIRST} of {size} codes" if first.codes else f"first {_FIRST} of {size} values")
    _columns([head, *(_group_row(group) for group in block.groups)], "r" * (len(head) - 1) + "l")


def _group_row(group: Group) -> list[str]:
    row = [str(group.index), f"{group.first}–{group.first + len(group.values) - 1}"]
    row += [_minus(code) for code in (group.scale_code, group.min_code) if code is not None]
    row.append(_number(group.step))
    if group.minimum is not None:
        row.append(_number(group.minimum))
    codes = map(str, group.codes[:_FIRST]) if group.codes else (_number(value, 3) for value in group.values[:_FIRST])
    return [*row, " ".join(codes)]


def _show_weights(group: Group, before: tuple[float, ...] | None) -> None:
    """The first weights of a block without sub-blocks, code by code."""
    cells: list[tuple[str, ...]] = []
    if before is not None:
        cells.append(("w", *(_number(value, 4) for value in before[:_FIRST])))
    if group.codes is not None and group.levels is not None:
        cells.append(("code q", *(str(code) for code in group.codes[:_FIRST])))
        if group.codes != group.levels:
            cells.append(("stands for", *(_minus(level) for level in group.levels[:_FIRST])))
    cells.append(("value", *(_number(value, 4) for value in group.values[:_FIRST])))
    _columns(cells)


# ── losses ──


def _show_losses(shown: Shown) -> None:
    output.emit(output.paint("What each type loses", bold=True) + f"  ({shown.sampling}; measured)")
    output.emit(f"  Relative to {shown.relative_to}; weighted by {shown.weighted_by}.")
    rows = [_loss_row(loss) for loss in shown.losses if loss.missing is None]
    head = ("type", "bits per weight", "RMSE", "relative", "SNR", "largest", "weighted", "")
    _columns([head, *rows], "lrrrrrrl")
    missing: dict[str, list[str]] = {}
    for loss in shown.losses:
        if loss.missing:
            missing.setdefault(loss.missing, []).append(loss.type)
    for why, names in missing.items():
        output.emit(f"  Not {', '.join(names)}: {why}.")
    output.emit()


def _loss_row(loss: Loss) -> tuple[str, ...]:
    figures = [f"{value:.3g}" if value is not None else "-" for value in (loss.rmse, loss.largest, loss.weighted)]
    relative = "-" if loss.relative is None else f"{100 * loss.relative:.3g} %"
    snr = "-" if loss.snr_db is None else f"{loss.snr_db:.1f} dB"
    bar = "" if loss.relative is None else "█" * min(round(100 * loss.relative), 40)
    return loss.type, f"{float(loss.bits_per_weight):g}", figures[0], relative, snr, figures[1], figures[2], bar


def _show_histogram(histogram: Histogram, kind: str) -> None:
    distinct = f"{histogram.distinct_before:,} different values before, {histogram.distinct_after:,} after: {_SCALES}"
    output.emit(output.paint(f"Where the values lie, before and after {kind}", bold=True) + f"  ({distinct})")
    width = (histogram.high - histogram.low) / len(histogram.before)
    most = max(*histogram.before, *histogram.after, 1)
    rows: list[tuple[str, ...]] = [("from", "before", "", "after", "")]
    for index, (before, after) in enumerate(zip(histogram.before, histogram.after, strict=True)):
        low = _number(histogram.low + index * width, 3)
        low = "below" if index == 0 and histogram.cut else low
        rows.append((low, bar(before / most, 24), f"{before:,}", bar(after / most, 24), f"{after:,}"))
    _columns(rows, "rlrlr")


def bar(share: float, width: int) -> str:
    """A bar of `share` of `width` columns, in eighths; a sliver for anything above 0."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return output.blocks(eighths)


# ── words for numbers ──


def _columns(rows: Iterable[Sequence[str]], sides: str = "") -> None:
    """Aligned columns, indented, no header line of its own."""
    lines = [tuple(row) for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    sides = sides or "l" + "r" * (len(widths) - 1)
    for line in lines:
        cells = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        )
        output.emit("  " + "  ".join(cells).rstrip())


def _number(value: Fraction | float, digits: int = 5) -> str:
    return f"{float(value):.{digits}g}".replace("-", "−") if value else "0"


def _signed(value: Fraction | float) -> str:
    return f"{float(value):+.2g}".replace("-", "−") if value else "0"


def _minus(value: int) -> str:
    return str(value).replace("-", "−")


def _cut(text: str, width: int = 47) -> str:
    return text if len(text) <= width else f"{text[: width - 2]} …"
