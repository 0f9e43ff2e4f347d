"""Show what numbers become in FP32, BF16, FP16, FP8, INT8 …: their bits, the value they hold, the error.

All digits are exact: numbers are worked out as fractions, with the one rounding the format makes. Whole numbers (int8,
int4 …) need a scale: the largest of the numbers given, or --absmax.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from typing import TYPE_CHECKING

from .. import output

if TYPE_CHECKING:
    from ...inspection.numbers import Held, Range, Real

EXAMPLES = (
    "llmkit inspect numbers 0.1 --as fp32,fp16,bf16",
    "llmkit inspect numbers 0.1 3.2 --as int8,int4,fp8_e4m3",
    "llmkit inspect numbers 1/3 65504 1e-8 inf --as fp16 --ranges",
    "llmkit inspect numbers 0.1 --absmax 3.2 --as int8 --json",
)
_SIGN, _EXPONENT, _MANTISSA = 160, 178, 37
_LONGEST = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Numbers and formats."""
    parser.add_argument("numbers", nargs="+", metavar="NUMBER", help="0.1, -2e-3, 1/3, 0x1.8p-3, inf, nan")
    parser.add_argument(
        "--as",
        dest="formats",
        default="",
        metavar="FORMATS",
        help="with commas: fp64 fp32 tf32 fp16 bf16 fp8_e4m3 fp8_e5m2 fp6_e2m3 fp6_e3m2 fp4_e2m1 int16 int8 int4 int2",
    )
    parser.add_argument("--absmax", metavar="X", help="largest magnitude of the numbers that share the scale (int…)")
    parser.add_argument("--ranges", action="store_true", help="show what each format reaches, too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, numbers with all their digits")


def run(args: argparse.Namespace) -> int:
    """Hold each number in each format, and show it."""
    from ...errors import LlmkitError
    from ...inspection import numbers

    names = [name for name in args.formats.split(",") if name.strip()] or list(numbers.USUAL)
    kinds = list(dict.fromkeys(map(numbers.format_named, names)))
    absmax = numbers.parse(args.absmax) if args.absmax is not None else None
    if absmax is not None and not (isinstance(absmax, Fraction) and absmax):
        raise LlmkitError(f"--absmax {args.absmax}: is no scale", "Give a number that is not 0, such as 3.2.")
    held = numbers.all_held([numbers.parse(text) for text in args.numbers], kinds, absmax)
    if args.json:
        output.emit_json([_plain(text, each) for text, row in zip(args.numbers, held, strict=True) for each in row])
        return 0
    for text, row in zip(args.numbers, held, strict=True):
        for each in row:
            _show(text, each)
    if args.ranges:
        _show_ranges(held[0])
    if len(args.numbers) == 1 and args.absmax is None and "int8" not in names:
        output.next_command(f"llmkit inspect numbers {output.shell_word(args.numbers[0])} --absmax 3.2 --as int8")
    return 0


def _plain(text: str, held: Held) -> dict[str, object]:
    """JSON: every number as a string with all digits, and as a float."""
    from ...inspection.numbers import decimal

    def both(value: Real | None) -> object:
        return None if value is None else {"exact": decimal(value).replace("−", "-"), "float": _float(value)}

    reach = held.range
    return {
        "given": text, "format": held.format, "title": held.title, "bits": held.bits, "hex": held.hex,
        "code": held.code, "kind": held.kind, "formula": held.formula, "remark": held.remark,
        **{name: both(getattr(held, name)) for name in ("value", "error", "below", "above", "step", "scale")},
        "relative_error": _float(held.relative_error) if held.relative_error is not None else None,
        "range": reach and {
            **{name: both(getattr(reach, name)) for name in _REACHES},
            "infinities": reach.infinities, "nans": reach.nans,
        },
        "rounding": "to nearest; a half to the even neighbour (whole numbers: away from zero)",
    }  # fmt: skip


_REACHES = {
    "largest": "largest",
    "smallest_normal": "smallest normal",
    "smallest_subnormal": "smallest subnormal",
    "epsilon": "step at 1",
}


def _float(value: Real) -> float:
    """As float, which plain numbers beyond FP64 are not."""
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _show(text: str, held: Held) -> None:
    from ...inspection.numbers import decimal

    output.emit(f"{output.paint(f'{text} in {held.format}', bold=True)}  {held.title}")
    output.emit(f"  bits        {_painted(held)}  {held.hex}  ({_legend(held)})")
    output.emit(f"  formula     {held.formula}")
    told = f"  {held.kind}" if held.kind in ("zero", "subnormal") else ""
    output.emit(f"  value       {_digits(decimal(held.value))}{told}")
    if held.error is not None:
        share = f"  ({100 * float(held.relative_error):+.3g} % of the number)" if held.relative_error else ""
        output.emit(f"  error       {_short(held.error)}{share}" if held.error else "  error       none: held exactly")
    if held.below is not None or held.above is not None:
        digits = 17 if held.format == "fp64" else 10
        pairs = (("below", held.below), ("above", held.above))
        sides = ", ".join(f"{word} {_short(side, digits)}" for word, side in pairs if side is not None)
        output.emit(f"  neighbours  {sides}; step {_short(held.step)}")
    if held.remark:
        output.emit(f"  note        {held.remark}")
    output.emit()


def _painted(held: Held) -> str:
    fields = held.bits.split(" ")
    if len(fields) == 1:
        return held.bits
    colours = (_SIGN, _EXPONENT, _MANTISSA)
    return " ".join(output.paint(field, colour=colour) for field, colour in zip(fields, colours, strict=True))


def _legend(held: Held) -> str:
    fields = held.bits.split(" ")
    if len(fields) == 1:
        return f"{len(held.bits)} bits, two's complement: code {held.code}"
    return f"sign 1, exponent {len(fields[1])}, mantissa {len(fields[2])}"


def _digits(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text.strip('−').replace('.', ''))} digits)"


def _short(value: Real | None, digits: int = 10) -> str:
    """So many digits, and ≈ where they are not all."""
    from ...inspection.numbers import decimal

    if value is None:
        return "-"
    exact = decimal(value)
    if len(exact) <= 16:
        return exact
    return f"≈ {_float(value):.{digits}g}".replace("-", "−")


def _show_ranges(row: list[Held]) -> None:
    rows = [_range_row(held.format, held.range) for held in row if held.range is not None]
    if rows:
        output.table(("format", "bits", *_REACHES.values(), "infinities", "NaN codes"), rows, "lrrrrrlr")


def _range_row(name: str, reach: Range) -> tuple[object, ...]:
    from ...inspection.numbers import format_named

    numbers = (f"{float(getattr(reach, field)):.8g}" for field in _REACHES)
    return name, format_named(name).bits, *numbers, "yes" if reach.infinities else "no", f"{reach.nans:,}"
