"""What a number becomes in a format: sign, exponent and mantissa bits, the value they really hold, the error.

    x = (−1)^s · 2^(e − bias) · 1.m        normal numbers
    x = (−1)^s · 2^(1 − bias) · 0.m        subnormal ones: the exponent field is 0
    x = code · absmax / highest            whole numbers, which need a scale beside them

Everything is worked out in fractions, with one rounding: to nearest, a half to the even neighbour (IEEE 754), as
numpy, PyTorch and ml_dtypes do. FP8: OCP 8-bit floating point (arXiv:2209.05433); what is too large for E4M3 becomes
NaN, as in ml_dtypes, where PyTorch and most engines cut it to 448. FP4 and FP6: OCP Microscaling formats 1.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from ..errors import LlmkitError, Unsupported, nearest_hint
from . import scaling

Real = Fraction | float  # a fraction, or an infinity or NaN as float
_FARTHEST = 5000  # decimal exponents beyond this only take time
INFINITE, NANS, FINITE = "infinity and NaN", "NaN", "neither"


@dataclass(frozen=True)
class FloatFormat:
    """1 sign bit, `exponent` and `mantissa` bits. `top` is what the highest exponent codes hold besides numbers."""

    name: str
    title: str
    exponent: int
    mantissa: int
    top: str = INFINITE

    @property
    def bits(self) -> int:
        """All of them."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken off the exponent field."""
        return (1 << self.exponent - 1) - 1

    @property
    def last(self) -> int:
        """The code of the largest finite number, sign 0."""
        codes = 1 << self.exponent + self.mantissa
        taken = {INFINITE: 1 << self.mantissa, NANS: 1, FINITE: 0}[self.top]
        return codes - taken - 1


@dataclass(frozen=True)
class IntegerFormat:
    """Whole numbers of `bits` bits times one scale (absmax)."""

    name: str
    title: str
    bits: int


Format = FloatFormat | IntegerFormat

_FORMATS: tuple[Format, ...] = (
    FloatFormat("fp64", "double precision (IEEE 754)", 11, 52),
    FloatFormat("fp32", "single precision (IEEE 754)", 8, 23),
    FloatFormat("tf32", "TensorFloat-32: what NVIDIA tensor cores round FP32 to", 8, 10),
    FloatFormat("fp16", "half precision (IEEE 754)", 5, 10),
    FloatFormat("bf16", "brain float: FP32 without its last 16 bits", 8, 7),
    FloatFormat("fp8_e4m3", "FP8 for weights (OCP E4M3, ml_dtypes float8_e4m3fn)", 4, 3, NANS),
    FloatFormat("fp8_e5m2", "FP8 for gradients (OCP E5M2)", 5, 2),
    FloatFormat("fp6_e2m3", "FP6 (OCP Microscaling E2M3)", 2, 3, FINITE),
    FloatFormat("fp6_e3m2", "FP6 (OCP Microscaling E3M2)", 3, 2, FINITE),
    FloatFormat("fp4_e2m1", "FP4, the numbers inside MXFP4 and NVFP4 blocks (OCP E2M1)", 2, 1, FINITE),
    IntegerFormat("int16", "16-bit whole numbers and a scale", 16),
    IntegerFormat("int8", "8-bit whole numbers and a scale, as in Q8_0", 8),
    IntegerFormat("int4", "4-bit whole numbers and a scale", 4),
    IntegerFormat("int2", "2-bit whole numbers and a scale", 2),
)
FORMATS = {row.name: row for row in _FORMATS}
_ALSO = {
    "float64": "fp64", "f64": "fp64", "double": "fp64", "float32": "fp32", "f32": "fp32", "single": "fp32",
    "float16": "fp16", "f16": "fp16", "half": "fp16", "bfloat16": "bf16", "brain": "bf16", "tf19": "tf32",
    "fp8": "fp8_e4m3", "e4m3": "fp8_e4m3", "e4m3fn": "fp8_e4m3", "float8_e4m3fn": "fp8_e4m3", "e5m2": "fp8_e5m2",
    "float8_e5m2": "fp8_e5m2", "e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "fp4": "fp4_e2m1", "e2m1": "fp4_e2m1",
    "i16": "int16", "i8": "int8", "i4": "int4", "i2": "int2",
}  # fmt: skip
USUAL = ("fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True)
class Range:
    """What a float format reaches. `epsilon` is the step at 1, `nans` how many codes are NaN."""

    largest: Fraction
    smallest_normal: Fraction
    smallest_subnormal: Fraction
    epsilon: Fraction
    infinities: bool
    nans: int


@dataclass(frozen=True)
class Held:
    """A number in a format. `value` is what the bits hold, `error` value − given (None where that has no meaning).

    `bits` is "sign exponent mantissa", or the code of a whole number in two's complement. `below` and `above` are the
    neighbours, `step` the distance to the one farther from zero. `kind`: zero, subnormal, normal, infinity, nan, code.
    `scale` is the step of whole numbers.
    """

    format: str
    title: str
    given: Real
    code: int
    bits: str
    kind: str
    value: Real
    formula: str
    error: Fraction | None
    relative_error: Fraction | None
    below: Real | None
    above: Real | None
    step: Fraction | None
    range: Range | None
    scale: Fraction | None = None
    remark: str | None = None

    @property
    def hex(self) -> str:
        """The bits as a hexadecimal number."""
        digits = self.bits.replace(" ", "")
        return f"0x{int(digits, 2):0{-(-len(digits) // 4)}x}"


def format_named(name: str) -> Format:
    """The format of that name, by any of its usual names. Raises Unsupported with the nearest."""
    word = name.strip().lower()
    if found := FORMATS.get(_ALSO.get(word, word)):
        return found
    raise Unsupported(f"unknown number format '{name}'", nearest_hint(word, [*FORMATS, *_ALSO]))


def parse(text: str) -> Real:
    """'0.1', '1e-3', '1/3', '0x1.8p-3', 'inf', 'nan' → that number exactly. Raises LlmkitError."""
    word = text.strip().lower()
    if re.fullmatch(r"[+-]?(inf(inity)?|nan)", word):
        return float(word)
    try:
        if "0x" in word:
            return Fraction(float.fromhex(word))
        if "/" not in word and abs(Decimal(word).adjusted()) > _FARTHEST:
            raise LlmkitError(f"'{text[:40]}' is farther from 1 than any format reaches", "Try 1e400.")
        if len(word) > _FARTHEST:
            raise LlmkitError(f"'{text[:20]}…' has {len(word)} digits", f"Give at most {_FARTHEST}.")
        return Fraction(word)
    except (ValueError, InvalidOperation, ZeroDivisionError, OverflowError):
        raise LlmkitError(f"'{text[:40]}' is not a number", "Numbers look like 0.1, -2.5e-3, 1/3, inf.") from None


def hold(number: Real, kind: Format, absmax: Fraction | None = None) -> Held:
    """`number` in a format. Whole numbers are scaled by `absmax`, without which the number itself is the largest."""
    if isinstance(kind, IntegerFormat):
        return _hold_whole(number, kind, absmax)
    code = encode(number, kind)
    value = decode(code, kind)
    error = relative = None
    if isinstance(number, Fraction) and isinstance(value, Fraction):
        error = value - number
        relative = error / abs(number) if number else None
    magnitude = code & ~(1 << kind.bits - 1)
    below, above = _neighbours(code, kind)
    return Held(
        format=kind.name,
        title=kind.title,
        given=number,
        code=code,
        bits=" ".join(_fields(code, kind)),
        kind=_kind(magnitude, kind),
        value=value,
        formula=formula(code, kind),
        error=error,
        relative_error=relative,
        below=below,
        above=above,
        step=_step(magnitude, kind) if isinstance(value, Fraction) else None,
        range=range_of(kind),
        remark=_remark(number, value, kind),
    )


def range_of(kind: FloatFormat) -> Range:
    """Largest and smallest numbers."""
    quantum = _power(1 - kind.bias - kind.mantissa)
    nans = {INFINITE: 2 * (2**kind.mantissa - 1), NANS: 2, FINITE: 0}[kind.top]
    return Range(
        largest=_magnitude(kind.last, kind),
        smallest_normal=_power(1 - kind.bias),
        smallest_subnormal=quantum,
        epsilon=_power(-kind.mantissa),
        infinities=kind.top == INFINITE,
        nans=nans,
    )


def encode(number: Real, kind: FloatFormat) -> int:
    """The bits of the nearest number of the format. Raises Unsupported for NaN where there is none."""
    sign = 1 << kind.bits - 1 if math.copysign(1, _sign_of(number)) < 0 else 0
    infinity = kind.last + 1  # where there are infinities
    if not isinstance(number, Fraction):
        if math.isnan(number):
            if kind.top == FINITE:
                raise Unsupported(f"{kind.name} has no NaN")
            return sign | (infinity + (1 << kind.mantissa - 1) if kind.top == INFINITE else infinity)
        return sign | (kind.last if kind.top == FINITE else infinity)
    size = abs(number)
    if not size:
        return sign
    exponent = max(_exponent(size), 1 - kind.bias)
    code = (exponent + kind.bias - 1 << kind.mantissa) + round(size / _power(exponent - kind.mantissa))
    if code > kind.last:  # no room: infinity, NaN, or as far as it goes
        code = kind.last if kind.top == FINITE else infinity
    return sign | code


def decode(code: int, kind: FloatFormat) -> Real:
    """What the bits hold, exactly; an infinity or NaN as float. Minus zero is 0 here, its sign is in the bits."""
    negative, magnitude = code >> kind.bits - 1, code & ~(1 << kind.bits - 1)
    if magnitude > kind.last:
        infinite = kind.top == INFINITE and magnitude == kind.last + 1
        return (-math.inf if negative else math.inf) if infinite else math.nan
    value = _magnitude(magnitude, kind)
    return -value if negative else value


def formula(code: int, kind: FloatFormat) -> str:
    """The value as the formula that makes it of its fields."""
    sign, exponent, mantissa = (int(field or "0", 2) for field in _fields(code, kind))
    magnitude = code & ~(1 << kind.bits - 1)
    what = _kind(magnitude, kind)
    if what == "nan":
        return "no number: all bits of the exponent are 1, and the mantissa says NaN"
    if what == "infinity":
        return f"(−1)^{sign} · ∞: all bits of the exponent are 1, the mantissa is 0"
    fraction = Fraction(mantissa, 2**kind.mantissa)
    if exponent:
        return f"(−1)^{sign} · 2^({exponent} − {kind.bias}) · {decimal(1 + fraction)}"
    return f"(−1)^{sign} · 2^(1 − {kind.bias}) · {decimal(fraction)}"


def decimal(value: Real) -> str:
    """All digits of a number whose denominator is a power of 2, 5 or both; 17 and an ellipsis of others."""
    if not isinstance(value, Fraction):
        return f"{value:g}".replace("inf", "∞").replace("-", "−")
    whole, rest = value.denominator, 0
    for prime in (2, 5):
        power = 0
        while whole % prime == 0:
            whole, power = whole // prime, power + 1
        rest = max(rest, power)
    if whole != 1:
        return f"{float(value):.17g}…".replace("-", "−", 1)
    digits = str(abs(value.numerator) * 10**rest // value.denominator).rjust(rest + 1, "0")
    text = f"{digits[:-rest]}.{digits[-rest:]}" if rest else digits
    return f"−{text}" if value < 0 else text


def _hold_whole(number: Real, kind: IntegerFormat, largest: Fraction | None) -> Held:
    if not isinstance(number, Fraction):
        raise Unsupported(f"{kind.name} has no {decimal(number)}", "Whole numbers hold neither infinity nor NaN.")
    scaled = scaling.absmax([number], kind.bits, largest)
    one, top = scaled.codes[0], abs(number) if largest is None else abs(largest)
    code = one.code
    asked = f"round({decimal(number)} · {scaled.highest} / {decimal(top)}) = {code}"
    return Held(
        format=kind.name,
        title=kind.title,
        given=number,
        code=code,
        bits=f"{code & (1 << kind.bits) - 1:0{kind.bits}b}",
        kind="code",
        value=one.back,
        formula=f"{asked};  {code} · {decimal(top)} / {scaled.highest}",
        error=one.error,
        relative_error=one.error / abs(number) if number else None,
        below=(code - 1) * scaled.scale if code > scaled.lowest else None,
        above=(code + 1) * scaled.scale if code < scaled.highest else None,
        step=scaled.scale,
        range=None,
        scale=scaled.scale,
        remark=f"beyond the scale's {decimal(top)}: cut" if abs(number) > top else None,
    )


def _sign_of(number: Real) -> float:
    if isinstance(number, Fraction):
        return -1.0 if number < 0 else 1.0
    return number


def _exponent(size: Fraction) -> int:
    """floor(log2(size)), exactly."""
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if size >= _power(guess) else guess - 1


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def _magnitude(code: int, kind: FloatFormat) -> Fraction:
    exponent, mantissa = code >> kind.mantissa, code & (1 << kind.mantissa) - 1
    if exponent:
        return (mantissa + (1 << kind.mantissa)) * _power(exponent - kind.bias - kind.mantissa)
    return mantissa * _power(1 - kind.bias - kind.mantissa)


def _fields(code: int, kind: FloatFormat) -> tuple[str, str, str]:
    bits = f"{code:0{kind.bits}b}"
    return bits[0], bits[1 : 1 + kind.exponent], bits[1 + kind.exponent :]


def _kind(magnitude: int, kind: FloatFormat) -> str:
    if magnitude > kind.last:
        return "infinity" if kind.top == INFINITE and magnitude == kind.last + 1 else "nan"
    if magnitude == 0:
        return "zero"
    return "normal" if magnitude >> kind.mantissa else "subnormal"


def _step(magnitude: int, kind: FloatFormat) -> Fraction:
    """From here to the next number away from zero, were there one."""
    return _power(max(magnitude >> kind.mantissa, 1) - kind.bias - kind.mantissa)


def _neighbours(code: int, kind: FloatFormat) -> tuple[Real | None, Real | None]:
    top = 1 << kind.bits - 1
    magnitude = code & ~top
    if magnitude > kind.last:
        return None, None
    outward = decode(magnitude + 1, kind) if magnitude < kind.last else (math.inf if kind.top == INFINITE else None)
    inward = decode(magnitude - 1, kind) if magnitude else -_magnitude(1, kind)
    if code & top:
        return (None if outward is None else -outward), -inward
    return inward, outward


def _remark(number: Real, value: Real, kind: FloatFormat) -> str | None:
    if not isinstance(number, Fraction):
        return None
    largest = f"{float(_magnitude(kind.last, kind)):g}"
    if kind.top == NANS and not isinstance(value, Fraction):
        return f"too large: NaN, as in ml_dtypes; PyTorch and most engines cut to the largest, {largest}"
    if not isinstance(value, Fraction):
        return f"too large: the largest number is {largest}"
    if kind.top == FINITE and abs(number) > _magnitude(kind.last, kind):
        return f"too large: cut to {largest}; a format without infinity saturates"
    if number and not value:
        return "too small: lost in 0"
    return None


def all_held(given: Sequence[Real], kinds: Sequence[Format], absmax: Fraction | None = None) -> list[list[Held]]:
    """Each number in each format. Without `absmax` the largest of the finite numbers is the scale of whole numbers."""
    finite = [abs(number) for number in given if isinstance(number, Fraction)]
    top = absmax if absmax is not None else max(finite, default=None)
    return [[hold(number, kind, top) for kind in kinds] for number in given]
