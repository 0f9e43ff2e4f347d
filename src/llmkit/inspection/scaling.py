"""Whole numbers in place of weights: absmax and zero-point, the two ways to choose a scale, worked out exactly.

absmax (symmetric, llama.cpp's "type-0"):      scale = largest |x| / highest code,  code = round(x / scale)
zero-point (asymmetric, in spirit "type-1"):   scale = (largest − smallest) / codes, code = round(x / scale) + zero

Everything is a fraction: no rounding but the one that is shown. It is half away from zero, as C's roundf in llama.cpp:
ggml/src/ggml-quants.c, quantize_row_q8_0_ref; PyTorch and numpy take a half to the even neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from ..errors import LlmkitError

TEXTBOOK = tuple(map(Fraction, ("0.1", "-0.7", "1.2", "-2.4", "3.2", "0", "2.05", "-1.6")))


@dataclass(frozen=True)
class Code:
    """One number: `exact` is its code before rounding, `back` what the code stands for, `error` is back − value."""

    value: Fraction
    exact: Fraction
    code: int
    back: Fraction
    error: Fraction


@dataclass(frozen=True)
class Scaled:
    """Numbers as codes from `lowest` to `highest`: value ≈ (code − zero) · scale."""

    kind: str
    bits: int
    scale: Fraction
    zero: int
    lowest: int
    highest: int
    smallest: Fraction
    largest: Fraction
    codes: tuple[Code, ...]

    @property
    def squared_error(self) -> Fraction:
        """Mean of the squared errors; its root is the RMSE."""
        return sum((each.error**2 for each in self.codes), Fraction()) / len(self.codes)

    @property
    def largest_error(self) -> Fraction:
        """Largest absolute error."""
        return max(abs(each.error) for each in self.codes)


def absmax(values: Iterable[Fraction], bits: int = 8, largest: Fraction | None = None) -> Scaled:
    """Symmetric: zero is code 0, the largest magnitude the highest code. `largest` where it is known already.

    Codes go from −(2^(bits−1) − 1) to 2^(bits−1) − 1; what is beyond `largest` is cut there. Raises LlmkitError without
    numbers.
    """
    numbers = _some(values)
    top = max(map(abs, numbers)) if largest is None else abs(largest)
    highest = 2 ** (bits - 1) - 1
    scale = top / highest if top else Fraction(1)
    codes = tuple(_code(number, scale, 0, -highest, highest) for number in numbers)
    return Scaled("absmax", bits, scale, 0, -highest, highest, min(numbers), max(numbers), codes)


def zero_point(values: Iterable[Fraction], bits: int = 8) -> Scaled:
    """Asymmetric: the codes 0 … 2^bits − 1 are spread from the smallest number to the largest, 0 included.

    `zero` is the code of 0, which is exact (Jacob et al. 2017, arXiv:1712.05877, §2.1). Raises LlmkitError without
    numbers.
    """
    numbers = _some(values)
    low, high = min(*numbers, Fraction()), max(*numbers, Fraction())
    highest = 2**bits - 1
    scale = (high - low) / highest if high > low else Fraction(1)
    zero = nearest(-low / scale)
    codes = tuple(_code(number, scale, zero, 0, highest) for number in numbers)
    return Scaled("zero-point", bits, scale, zero, 0, highest, min(numbers), max(numbers), codes)


def nearest(value: Fraction) -> int:
    """The nearest whole number, a half away from zero."""
    whole = floor(abs(value) + Fraction(1, 2))
    return -whole if value < 0 else whole


def _code(value: Fraction, scale: Fraction, zero: int, lowest: int, highest: int) -> Code:
    exact = value / scale + zero
    code = min(max(nearest(value / scale) + zero, lowest), highest)
    back = (code - zero) * scale
    return Code(value, exact, code, back, back - value)


def _some(values: Iterable[Fraction]) -> Sequence[Fraction]:
    numbers = [Fraction(value) for value in values]
    if not numbers:
        raise LlmkitError("no numbers were given to be scaled")
    return numbers
