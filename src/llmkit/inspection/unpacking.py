"""The bits of quantized blocks, unpacked: codes, scales and minima of each type, from the bytes of its fields.

Checked against llama.cpp: ggml/src/ggml-quants.c (dequantize_row_…): the same operations in the same order, so that
values agree to the bit where the compiler fuses no products with sums (x86-64). Of the types that look up a grid of
points (IQ1, IQ2, IQ3) only the scales are unpacked here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Bytes = Mapping[str, Array]  # field → its bytes

# the sixteen points of IQ4_NL, closer together near 0 where most weights are; MXFP4's and NVFP4's, doubled
IQ4_POINTS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_POINTS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Unpacked:
    """The numbers in a block: value = step · level − minimum, step and minimum being those of the weight's sub-block.

    `codes` as stored and `levels` (integers) have one entry a weight, None where a grid is looked up; the rest one a
    sub-block. `scale_codes` and `min_codes` are the small integers that d and dmin are multiplied with.
    """

    codes: Array | None
    levels: Array | None
    steps: Array
    minima: Array | None = None
    scale_codes: Array | None = None
    min_codes: Array | None = None
    d: float | None = None
    dmin: float | None = None


# ── bits ──


def _half(data: Array) -> np.float32:
    """Two bytes as FP16, widened."""
    return np.float32(data.view("<f2")[0])


def _nibbles(data: Array, chunk: int) -> Array:
    """Of each `chunk` bytes first the low halves, then the high ones."""
    rows = data.reshape(-1, chunk)
    return np.stack([rows & 15, rows >> 4], axis=1).reshape(-1).astype(np.int32)


def _twos(data: Array) -> Array:
    """Of each 32 bytes first the lowest two bits, then the next …"""
    rows = data.reshape(-1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (rows & 3).reshape(-1).astype(np.int32)


def _ones(data: Array) -> Array:
    """Of 32 bytes first the lowest bits, then the next …"""
    return (data[None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(-1).astype(np.int32)


def _row_of_bits(data: Array) -> Array:
    bits: Array = np.unpackbits(data, bitorder="little").astype(np.int32)
    return bits


def _words(data: Array, kind: str) -> Array:
    return data.view(kind).astype(np.int64)


def _times(scale: np.float32, codes: Array) -> Array:
    """float32 products, as the engine's."""
    return (scale * codes.astype(np.float32)).astype(np.float32)


# ── types of 32 weights ──


def _simple(codes: Array, offset: int, d: np.float32) -> Unpacked:
    return Unpacked(codes, codes - offset, np.array([d]), d=float(d))


def _affine(codes: Array, d: np.float32, m: np.float32) -> Unpacked:
    return Unpacked(codes, codes, np.array([d]), minima=np.array([-m]), d=float(d), dmin=float(m))


def _fives(each: Bytes) -> Array:
    codes: Array = _nibbles(each["qs"], 16) | _row_of_bits(each["qh"]) << 4
    return codes


def _q8_0(each: Bytes) -> Unpacked:
    return _simple(each["qs"].view(np.int8).astype(np.int32), 0, _half(each["d"]))


def _iq4_nl(each: Bytes) -> Unpacked:
    codes, d = _nibbles(each["qs"], 16), _half(each["d"])
    return Unpacked(codes, np.array(IQ4_POINTS)[codes], np.array([d]), d=float(d))


def _mxfp4(each: Bytes) -> Unpacked:
    codes, exponent = _nibbles(each["qs"], 16), int(each["e"][0])
    d = np.ldexp(np.float32(1), exponent - 128).astype(np.float32)  # half of 2^(e − 127): the points are doubled
    return Unpacked(codes, np.array(FP4_POINTS)[codes], np.array([d]), scale_codes=np.array([exponent]))


def _nvfp4(each: Bytes) -> Unpacked:
    stored = each["d"].astype(np.int32)
    exponent, mantissa = stored >> 3 & 15, (stored & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 8)
    steps = np.where(exponent > 0, normal, np.ldexp(mantissa, -10))
    steps = np.where((stored == 0) | (stored == 0x7F), 0, steps).astype(np.float32)
    codes = _nibbles(each["qs"], 8)
    return Unpacked(codes, np.array(FP4_POINTS)[codes], steps, scale_codes=stored)


# ── super-blocks ──


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """8 scales and 8 minima of 6 bits in 12 bytes (get_scale_min_k4): the last four have their top bits elsewhere."""
    low, middle, high = packed[:4], packed[4:8], packed[8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4])
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4])
    return scales.astype(np.int32), minima.astype(np.int32)


def _packed_k4(packed: Array, number: int) -> tuple[str, ...]:
    scales, minima = _six_bits(packed)
    if number < 4:
        return (
            f"scale {number} = byte {number} & 63 = 0x{packed[number]:02x} & 63 = {scales[number]}",
            f"min   {number} = byte {number + 4} & 63 = 0x{packed[number + 4]:02x} & 63 = {minima[number]}",
        )
    both, low, middle = number + 4, number - 4, number
    return (
        f"scale {number} = byte {both} & 15 | byte {low} >> 6 << 4"
        f" = 0x{packed[both]:02x} & 15 | 0x{packed[low]:02x} >> 6 << 4 = {scales[number]}",
        f"min   {number} = byte {both} >> 4 | byte {middle} >> 6 << 4"
        f" = 0x{packed[both]:02x} >> 4 | 0x{packed[middle]:02x} >> 6 << 4 = {minima[number]}",
    )


def _with_minima(each: Bytes, codes: Array, scales: Array, minima: Array) -> Unpacked:
    d, dmin = _half(each["d"]), _half(each["dmin"])
    return Unpacked(codes, codes, _times(d, scales), _times(dmin, minima), scales, minima, float(d), float(dmin))


def _q2_k(each: Bytes) -> Unpacked:
    packed = each["scales"].astype(np.int32)
    return _with_minima(each, _twos(each["qs"]), packed & 15, packed >> 4)


def _q4_k(each: Bytes) -> Unpacked:
    return _with_minima(each, _nibbles(each["qs"], 32), *_six_bits(each["scales"]))


def _q5_k(each: Bytes) -> Unpacked:
    return _with_minima(each, _nibbles(each["qs"], 32) | _ones(each["qh"]) << 4, *_six_bits(each["scales"]))


def _q3_scales(packed: Array) -> Array:
    number = np.arange(16)
    low = packed[number % 8] >> 4 * (number // 8) & 15
    return (low | (packed[8 + number % 4] >> 2 * (number // 4) & 3) << 4).astype(np.int32)


def _packed_q3(packed: Array, number: int) -> tuple[str, ...]:
    low, high, shift = number % 8, 8 + number % 4, 2 * (number // 4)
    half = "& 15" if number < 8 else ">> 4"
    return (
        f"scale {number} = (byte {low} {half} | (byte {high} >> {shift} & 3) << 4)"
        f" = 0x{packed[low]:02x} {half} | (0x{packed[high]:02x} >> {shift} & 3) << 4 = {_q3_scales(packed)[number]}",
    )


def _without_minima(codes: Array, levels: Array, scales: Array, offset: int, d: np.float32) -> Unpacked:
    return Unpacked(codes, levels, _times(d, scales - offset), scale_codes=scales, d=float(d))


def _q3_k(each: Bytes) -> Unpacked:
    codes = _twos(each["qs"]) | _ones(each["hmask"]) << 2
    return _without_minima(codes, codes - 4, _q3_scales(each["scales"]), 32, _half(each["d"]))


def _q6_k(each: Bytes) -> Unpacked:
    codes = _nibbles(each["ql"], 64) | _twos(each["qh"]) << 4
    return _without_minima(codes, codes - 32, each["scales"].view(np.int8).astype(np.int32), 0, _half(each["d"]))


def _iq4_xs(each: Bytes) -> Unpacked:
    number = np.arange(8)
    high = int(_words(each["scales_h"], "<u2")[0]) >> 2 * number & 3
    scales = each["scales_l"][number // 2] >> 4 * (number % 2) & 15 | high << 4
    codes = _nibbles(each["qs"], 16)
    return _without_minima(codes, np.array(IQ4_POINTS)[codes], scales, 32, _half(each["d"]))


# ── ternary, binary ──


def _tq1_0(each: Bytes) -> Unpacked:
    """Five weights a byte as a fraction in base 3: each multiplication by 3 brings the next digit to the top."""
    digits = []
    for rows, powers in ((each["qs"][:32], 5), (each["qs"][32:], 5), (each["qh"], 4)):
        spread = rows[None, :] * np.array([3**power for power in range(powers)], np.uint8)[:, None]
        digits.append((spread.astype(np.uint16) * 3 >> 8).reshape(-1))
    return _simple(np.concatenate(digits).astype(np.int32), 1, _half(each["d"]))


def _q1_0(each: Bytes) -> Unpacked:
    codes, d = _row_of_bits(each["qs"]), _half(each["d"])
    return Unpacked(codes, 2 * codes - 1, np.array([d]), d=float(d))


def _q2_0(each: Bytes) -> Unpacked:
    codes = (each["qs"][:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1).astype(np.int32)
    return _simple(codes, 1, _half(each["d"]))


# ── grids: scales only ──


def _grid(d: np.float32, scales: Array, factors: Array) -> Unpacked:
    return Unpacked(None, None, _times(d, factors), scale_codes=scales.astype(np.int32), d=float(d))


def _iq3_xxs(each: Bytes) -> Unpacked:
    """Sub-blocks of 32: a scale in the top four bits of 32-bit words whose other bits are signs."""
    scales = _words(each["signs"], "<u4") >> 28
    return _grid(_half(each["d"]), scales, (0.5 + scales) * 0.5)


def _iq2_xxs(each: Bytes) -> Unpacked:
    pairs = _words(each["qs"], "<u4").reshape(8, 2)  # four places in the grid, then signs and scale
    scales = pairs[:, 1] >> 28
    return _grid(_half(each["d"]), scales, (0.5 + scales) * 0.25)


def _halves(each: Bytes) -> Unpacked:
    """Sub-blocks of 16: a scale in each half of a byte."""
    scales = np.stack([each["scales"] & 15, each["scales"] >> 4], axis=1).reshape(-1)
    return _grid(_half(each["d"]), scales, (0.5 + scales) * 0.25)


def _iq3_s(each: Bytes) -> Unpacked:
    scales = np.stack([each["scales"] & 15, each["scales"] >> 4], axis=1).reshape(-1)
    return _grid(_half(each["d"]), scales, 1 + 2 * scales.astype(np.int32))


def _iq1_s(each: Bytes) -> Unpacked:
    scales = _words(each["qh"], "<u2") >> 12 & 7
    return _grid(_half(each["d"]), scales, 2 * scales + 1)


def _iq1_m(each: Bytes) -> Unpacked:
    words = _words(each["scales"], "<u2")
    d = np.float32(
        np.array([sum(int(word) >> 12 << 4 * place for place, word in enumerate(words))], "<u2").view("<f2")[0]
    )
    scales = (words[:, None] >> np.array([0, 3, 6, 9]) & 7).reshape(-1)
    return _grid(d, scales, 2 * scales + 1)


UNPACK: dict[str, Callable[[Bytes], Unpacked]] = {
    "Q4_0": lambda each: _simple(_nibbles(each["qs"], 16), 8, _half(each["d"])),
    "Q5_0": lambda each: _simple(_fives(each), 16, _half(each["d"])),
    "Q8_0": _q8_0,
    "Q4_1": lambda each: _affine(_nibbles(each["qs"], 16), _half(each["d"]), _half(each["m"])),
    "Q5_1": lambda each: _affine(_fives(each), _half(each["d"]), _half(each["m"])),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "TQ1_0": _tq1_0,
    "TQ2_0": lambda each: _simple(_twos(each["qs"]), 1, _half(each["d"])),
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _halves,
    "IQ2_S": _halves,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
# type → (bytes of its scales, number of a sub-block) → how that one's scale and minimum are gathered
PACKING: dict[str, Callable[[Array, int], tuple[str, ...]]] = {
    "Q3_K": _packed_q3, "Q4_K": _packed_k4, "Q5_K": _packed_k4,
}  # fmt: skip
