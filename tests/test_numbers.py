"""Numbers in formats, against struct, numpy and PyTorch; whole numbers, against the engine's own codes."""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Cli
from llmkit import engine
from llmkit.errors import LlmkitError, Unsupported
from llmkit.inspection import numbers, scaling
from llmkit.inspection.numbers import FloatFormat

FP32, FP16, BF16 = (numbers.FORMATS[name] for name in ("fp32", "fp16", "bf16"))
E4M3, E5M2 = numbers.FORMATS["fp8_e4m3"], numbers.FORMATS["fp8_e5m2"]
FLOATS = [row for row in numbers.FORMATS.values() if isinstance(row, FloatFormat)]
finite = st.floats(allow_nan=False, allow_infinity=False)


def bits_of(value: float, kind: FloatFormat) -> int:
    return numbers.encode(Fraction(value), kind)


def same(ours: numbers.Real, theirs: float) -> bool:
    if isinstance(ours, float) and math.isnan(ours):
        return math.isnan(theirs)
    return float(ours) == theirs


# ── against other implementations ──


@given(finite)
def test_fp64_is_struct(value: float) -> None:
    code = struct.unpack("<Q", struct.pack("<d", value))[0] & ~(int(value == 0) << 63)  # a fraction has no −0
    assert bits_of(value, numbers.FORMATS["fp64"]) == code  # type: ignore[arg-type]


@given(finite)
def test_fp32_and_fp16_are_numpy(value: float) -> None:
    with np.errstate(over="ignore"):
        for kind, dtype, word in ((FP32, np.float32, np.uint32), (FP16, np.float16, np.uint16)):
            expected = int(np.array(value + 0.0, dtype).view(word)) if value else 0
            assert bits_of(value, kind) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", "bfloat16"), ("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")]
)
def test_bf16_and_fp8_are_pytorch(name: str, dtype: str) -> None:
    """Random floats of every size, each format's own numbers, and what lies half way between them."""
    torch = pytest.importorskip("torch")
    kind = numbers.FORMATS[name]
    assert isinstance(kind, FloatFormat)
    random = np.random.default_rng(0)
    values = list((random.normal(size=1500) * 2.0 ** random.integers(-30, 18, 1500)).astype(np.float32))
    grid = [value for code in range(0, 1 << kind.bits - 1, 1 if kind.bits == 8 else 97)
            if isinstance(value := numbers.decode(code, kind), Fraction)]  # fmt: skip
    middles = [(low + high) / 2 for low, high in zip(grid, grid[1:], strict=False)] if kind.bits == 8 else []
    values += [np.float32(float(value)) for value in (*grid, *middles, Fraction(61440))]
    if name == "fp8_e4m3":  # PyTorch cuts what is larger to 448, see the next test
        values = [value for value in values if abs(value) <= 464]
    given = torch.tensor(np.array(values, np.float32))
    word = torch.uint8 if kind.bits == 8 else torch.int16
    theirs = given.to(getattr(torch, dtype)).view(word).tolist()
    for value, code in zip(values, theirs, strict=True):
        if value:
            assert bits_of(float(value), kind) == code & (1 << kind.bits) - 1, value


def test_overflow_is_ml_dtypes_s() -> None:
    """Golden values of ml_dtypes 0.6.0: E4M3 has no infinity, so it is NaN; 464 is half way to what would be 480."""
    assert [bits_of(value, E4M3) for value in (448, 464, 464.1, 480, 1e6, -500)] == [126, 126, 127, 127, 127, 255]  # type: ignore[arg-type]
    assert [bits_of(value, E5M2) for value in (57344, 61439, 61440, 70000)] == [123, 123, 124, 124]  # type: ignore[arg-type]
    for name, code in (("fp8_e4m3", 127), ("fp8_e5m2", 124), ("fp4_e2m1", 7), ("fp6_e2m3", 31), ("fp6_e3m2", 31)):
        assert numbers.encode(math.inf, numbers.FORMATS[name]) == code  # type: ignore[arg-type]


def test_every_fp16_code_holds_what_numpy_says() -> None:
    theirs = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    for code in range(0, 1 << 16, 7):
        assert same(numbers.decode(code, FP16), float(theirs[code]))  # type: ignore[arg-type]


def test_every_fp8_code_holds_what_pytorch_says() -> None:
    torch = pytest.importorskip("torch")
    for kind, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        theirs = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float64).tolist()
        assert all(same(numbers.decode(code, kind), theirs[code]) for code in range(256))  # type: ignore[arg-type]


def test_fp4_is_the_engine_s_table() -> None:
    from llmkit.inspection.unpacking import FP4_POINTS

    fp4 = numbers.FORMATS["fp4_e2m1"]
    assert isinstance(fp4, FloatFormat)
    assert [2 * numbers.decode(code, fp4) for code in range(16)] == list(FP4_POINTS)


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: str(kind.name))
def test_what_a_format_holds_it_keeps(kind: FloatFormat) -> None:
    step = max(1, (1 << kind.bits) // 999)
    for code in range(0, 1 << kind.bits, step):
        value = numbers.decode(code, kind)
        if isinstance(value, Fraction) and value:
            assert numbers.encode(value, kind) == code


def test_ranges_are_numpy_s() -> None:
    for kind, dtype in ((FP32, np.float32), (FP16, np.float16)):
        found, theirs = numbers.range_of(kind), np.finfo(dtype)  # type: ignore[arg-type]
        assert float(found.largest) == float(theirs.max)
        assert float(found.smallest_normal) == float(theirs.smallest_normal)
        assert float(found.smallest_subnormal) == float(theirs.smallest_subnormal)
        assert float(found.epsilon) == float(theirs.eps)
    assert numbers.range_of(E4M3).largest == 448 and not numbers.range_of(E4M3).infinities  # type: ignore[arg-type]
    assert numbers.range_of(E5M2).largest == 57344 and numbers.range_of(E5M2).infinities  # type: ignore[arg-type]


# ── what is shown ──


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_formula_gives_the_value(value: float) -> None:
    for kind in (FP16, BF16, E5M2):
        held = numbers.hold(Fraction(value), kind)
        if not isinstance(held.value, Fraction):
            continue
        sign, power, digits = held.formula.replace("−", "-").split(" · ")
        base, bias = power.removeprefix("2^(").removesuffix(")").split(" - ")
        worked = (-1) ** int(sign[-1]) * Fraction(2) ** (int(base) - int(bias)) * Fraction(digits)
        assert worked == held.value == held.error + Fraction(value)  # type: ignore[operator]


@given(st.floats(min_value=-60000, max_value=60000))
def test_no_neighbour_is_nearer(value: float) -> None:
    held = numbers.hold(Fraction(value), FP16)
    assert isinstance(held.below, Fraction) and isinstance(held.above, Fraction) and held.error is not None
    assert held.below < held.value < held.above
    assert all(abs(held.error) <= abs(side - Fraction(value)) for side in (held.above, held.below))
    theirs = np.nextafter(np.float16(value), np.float16(np.inf))
    assert float(held.above) == float(theirs) or not held.value


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [("70000", FP16, "infinity"), ("1e-7", FP16, "subnormal"), ("1e-9", FP16, "zero"), ("1", FP16, "normal"),
     ("500", E4M3, "nan"), ("nan", FP32, "nan"), ("-inf", BF16, "infinity")],
)  # fmt: skip
def test_kinds(text: str, kind: FloatFormat, expected: str) -> None:
    assert numbers.hold(numbers.parse(text), kind).kind == expected


def test_fp4_saturates_and_has_no_nan() -> None:
    fp4 = numbers.format_named("e2m1")
    assert numbers.hold(Fraction(-100), fp4).value == -6 == numbers.hold(-math.inf, fp4).value
    with pytest.raises(Unsupported, match="no NaN"):
        numbers.hold(math.nan, fp4)


@given(st.fractions(max_denominator=10**9).filter(lambda value: value.denominator > 1))
def test_decimals_are_exact(value: Fraction) -> None:
    text = numbers.decimal(value).replace("−", "-")
    if text.endswith("…"):
        assert float(text[:-1]) == pytest.approx(float(value))
    else:
        assert Fraction(text) == value


@pytest.mark.parametrize("text", ["", "x", "1e999999999", "1/0", "0.1.2", "1" * 9000, "--1", "0x"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(LlmkitError):
        numbers.parse(text)


# ── whole numbers ──


def test_the_textbook_s_case() -> None:
    found = scaling.absmax(scaling.TEXTBOOK).codes[0]
    assert (found.code, f"{float(found.back):.4f}") == (4, "0.1008")
    held = numbers.hold(Fraction("0.1"), numbers.FORMATS["int8"], Fraction("3.2"))
    assert (held.code, held.value) == (4, Fraction("3.2") * 4 / 127)
    assert held.formula.startswith("round(0.1 · 127 / 3.2) = 4;")


def test_absmax_is_the_codes_of_q8_0() -> None:
    """The engine scales in float32, where a code near a half may come out one away: none does here."""
    weights = (np.random.default_rng(1).normal(size=(40, 32)) * 0.05).astype(np.float32)
    packed = np.empty((40, 34), np.uint8)
    engine.load().quantize_chunk(8, weights.ctypes.data, packed.ctypes.data, 0, 40, 32)
    for row, block in zip(weights, packed, strict=True):
        ours = scaling.absmax(Fraction(float(value)) for value in row)
        assert [each.code for each in ours.codes] == block[2:].view(np.int8).tolist()
        assert abs(float(ours.scale) - float(block[:2].view(np.float16)[0])) <= float(ours.scale) * 2**-11


@given(st.lists(st.fractions(-100, 100, max_denominator=1000), min_size=1, max_size=20), st.sampled_from([2, 4, 8]))
def test_scaling_errs_by_half_a_step(values: list[Fraction], bits: int) -> None:
    even, spread = scaling.absmax(values, bits), scaling.zero_point(values, bits)
    assert even.largest_error <= even.scale / 2
    assert spread.largest_error <= spread.scale  # half of it by rounding, half by the rounded zero-point
    for found in (even, spread):
        assert all(found.lowest <= each.code <= found.highest for each in found.codes)
        assert all(each.back == (each.code - found.zero) * found.scale for each in found.codes)
    assert scaling.zero_point([Fraction(), *values], bits).codes[0].error == 0


def test_nothing_cannot_be_scaled() -> None:
    with pytest.raises(LlmkitError):
        scaling.absmax([])


# ── the command ──


def test_the_command(cli: Cli) -> None:
    shown = cli("inspect", "numbers", "0.1", "--as", "fp32,fp16,bf16")
    assert shown.returncode == 0, shown.stderr
    assert "0 01111011 10011001100110011001101  0x3dcccccd" in shown.stdout
    assert "(−1)^0 · 2^(11 − 15) · 1.599609375" in shown.stdout and "0.10009765625" in shown.stdout
    rows = json.loads(cli("inspect", "numbers", "0.1", "-2.5", "--as", "int8,e4m3", "--absmax", "3.2", "--json").stdout)
    assert [(row["format"], row["code"]) for row in rows[:2]] == [("int8", 4), ("fp8_e4m3", 0x1D)]
    assert Fraction(rows[1]["value"]["exact"]) == Fraction("0.1015625") == Fraction(rows[1]["value"]["float"])
    ranges = cli("inspect", "numbers", "1", "--as", "fp16,fp64", "--ranges").stdout
    assert "65504" in ranges and "1.7976931e+308" in ranges


@pytest.mark.parametrize(
    ("words", "said"),
    [(("x",), "is not a number"), (("1", "--as", "fp7"), "Nearest"), (("1", "--absmax", "0"), "is no scale"),
     (("inf", "--as", "int8"), "int8 has no ∞"), (("1e9999999",), "farther from 1")],
)  # fmt: skip
def test_bad_words(cli: Cli, words: tuple[str, ...], said: str) -> None:
    done = cli("inspect", "numbers", *words)
    assert (done.returncode, done.stdout) == (1, "") and said in done.stderr
