"""How each quantized type packs its weights: the fields of a block, and what their bits say, one row a type.

Written from the definitions in llama.cpp: ggml/src/ggml-common.h (struct block_…). Of the types that look up a grid of
points (IQ1, IQ2, IQ3) the scales are unpacked, the grid is the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .unpacking import FP4_POINTS, IQ4_POINTS, Array

FAMILIES = {
    "type-0": "one scale, no offset: codes lie symmetrically around 0 (absmax)",
    "type-1": "a scale and a minimum: codes begin at the smallest weight (as with a zero-point)",
    "super-block": "256 weights in sub-blocks, whose scales (and minima) are themselves small codes times d (and dmin)",
    "table": "codes are places in a table of points that are not evenly spaced",
    "grid": "several weights at once are one entry of a grid of points, their signs are kept apart",
    "ternary": "each weight is −1, 0 or 1 times one scale",
    "binary": "each weight is −1 or 1 times one scale",
    "micro-scaled": "4-bit floats times a small scale of its own for each sub-block",
}


@dataclass(frozen=True)
class Field:
    """A run of bytes in a block."""

    name: str
    nbytes: int
    meaning: str


@dataclass(frozen=True)
class Layout:
    """One type. `level` says how a code becomes a level, `scaling` what a step is, where it is not d itself.

    `points` is the table that codes are places in. The unpacking itself is unpacking.UNPACK's.
    """

    family: str
    fields: tuple[Field, ...]
    formula: str
    level: str = "q"
    scaling: str | None = None
    points: tuple[int, ...] = ()


def split(data: Array, fields: tuple[Field, ...]) -> dict[str, Array]:
    """The bytes of each field."""
    ends = np.cumsum([field.nbytes for field in fields])
    return {field.name: data[end - field.nbytes : end] for field, end in zip(fields, ends, strict=True)}


# ── the table ──

_D = Field("d", 2, "scale, FP16")
_DMIN = Field("dmin", 2, "scale of the minima, FP16")
_QS4 = Field("qs", 16, "32 codes of 4 bits: 0–15 in the low halves, 16–31 in the high ones")
_QH5 = Field("qh", 4, "fifth bits of the 32 codes")
_SIX = Field("scales", 12, "8 scales and 8 minima of 6 bits")
_PLAIN = "w = d · (q − {})"
_SUPER = "w = d · scale · q − dmin · min"

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout("type-0", (_D, _QS4), _PLAIN.format(8), "q − 8"),
    "Q5_0": Layout("type-0", (_D, _QH5, _QS4), _PLAIN.format(16), "q − 16"),
    "Q8_0": Layout("type-0", (_D, Field("qs", 32, "32 codes of 8 bits, signed")), "w = d · q"),
    "Q4_1": Layout(
        "type-1", (_D, Field("m", 2, "minimum, FP16"), _QS4), "w = d · q + m",
    ),
    "Q5_1": Layout(
        "type-1", (_D, Field("m", 2, "minimum, FP16"), _QH5, _QS4), "w = d · q + m",
    ),
    "Q2_K": Layout(
        "super-block",
        (Field("scales", 16, "16 scales (low 4 bits) and 16 minima (high 4 bits)"),
         Field("qs", 64, "256 codes of 2 bits"), _D, _DMIN),
        _SUPER, scaling="d · scale",
    ),
    "Q3_K": Layout(
        "super-block",
        (Field("hmask", 32, "third bits of the 256 codes"), Field("qs", 64, "256 codes, low 2 bits"),
         Field("scales", 12, "16 scales of 6 bits"), _D),
        "w = d · (scale − 32) · (q − 4)", "q − 4", "d · (scale − 32)",
    ),
    "Q4_K": Layout(
        "super-block", (_D, _DMIN, _SIX, Field("qs", 128, "256 codes of 4 bits")),
        _SUPER, scaling="d · scale",
    ),
    "Q5_K": Layout(
        "super-block",
        (_D, _DMIN, _SIX, Field("qh", 32, "fifth bits of the 256 codes"), Field("qs", 128, "256 codes, low 4 bits")),
        _SUPER, scaling="d · scale",
    ),
    "Q6_K": Layout(
        "super-block",
        (Field("ql", 128, "256 codes, low 4 bits"), Field("qh", 64, "256 codes, top 2 bits"),
         Field("scales", 16, "16 scales of 8 bits, signed"), _D),
        "w = d · scale · (q − 32)", "q − 32", "d · scale",
    ),
    "IQ4_NL": Layout("table", (_D, _QS4), "w = d · point[q]", "point[q]", points=IQ4_POINTS),
    "IQ4_XS": Layout(
        "table",
        (_D, Field("scales_h", 2, "8 scales, top 2 bits"), Field("scales_l", 4, "8 scales, low 4 bits"),
         Field("qs", 128, "256 codes of 4 bits")),
        "w = d · (scale − 32) · point[q]", "point[q]", "d · (scale − 32)", IQ4_POINTS,
    ),
    "MXFP4": Layout(
        "micro-scaled", (Field("e", 1, "scale 2^(e − 127), E8M0"), _QS4), "w = 2^(e − 128) · point[q]",
        "point[q]", "2^(e − 128)", FP4_POINTS,
    ),
    "NVFP4": Layout(
        "micro-scaled", (Field("d", 4, "4 scales, FP8 E4M3 without sign"), Field("qs", 32, "64 codes of 4 bits")),
        "w = scale / 2 · point[q]", "point[q]", "scale / 2", FP4_POINTS,
    ),
    "TQ1_0": Layout(
        "ternary", (Field("qs", 48, "240 codes, five a byte, base 3"), Field("qh", 4, "16 codes, four a byte"), _D),
        _PLAIN.format(1), "q − 1",
    ),
    "TQ2_0": Layout(
        "ternary", (Field("qs", 64, "256 codes of 2 bits"), _D), _PLAIN.format(1), "q − 1",
    ),
    "Q1_0": Layout("binary", (_D, Field("qs", 16, "128 codes of 1 bit")), "w = d · (2q − 1)", "2q − 1"),
    "Q2_0": Layout("type-0", (_D, Field("qs", 16, "64 codes of 2 bits")), _PLAIN.format(1), "q − 1"),
    "IQ2_XXS": Layout(
        "grid", (_D, Field("qs", 64, "8 times: 4 places in a grid of 256 (8 weights each), 4 × 7 signs, scale")),
        "w = d · (½ + scale) / 4 · ±point", scaling="d · (½ + scale) / 4",
    ),
    "IQ2_XS": Layout(
        "grid", (_D, Field("qs", 64, "32 times: place in a grid of 512 (8 weights), 7 signs"),
                 Field("scales", 8, "16 scales of 4 bits")),
        "w = d · (½ + scale) / 4 · ±point", scaling="d · (½ + scale) / 4",
    ),
    "IQ2_S": Layout(
        "grid", (_D, Field("qs", 64, "32 places in a grid of 1024, low 8 bits; then 256 signs"),
                 Field("qh", 8, "the places' top 2 bits"), Field("scales", 8, "16 scales of 4 bits")),
        "w = d · (½ + scale) / 4 · ±point", scaling="d · (½ + scale) / 4",
    ),
    "IQ3_XXS": Layout(
        "grid", (_D, Field("qs", 64, "64 places in a grid of 256 (4 weights each)"),
                 Field("signs", 32, "8 times: 4 × 7 signs, scale")),
        "w = d · (½ + scale) / 2 · ±point", scaling="d · (½ + scale) / 2",
    ),
    "IQ3_S": Layout(
        "grid", (_D, Field("qs", 64, "64 places in a grid of 512 (4 weights each), low 8 bits"),
                 Field("qh", 8, "the places' ninth bits"), Field("signs", 32, "256 signs"),
                 Field("scales", 4, "8 scales of 4 bits")),
        "w = d · (1 + 2 · scale) · ±point", scaling="d · (1 + 2 · scale)",
    ),
    "IQ1_S": Layout(
        "grid", (_D, Field("qs", 32, "32 places in a grid of 2048 (8 weights each), low 8 bits"),
                 Field("qh", 16, "8 times: the places' top bits, scale of 3 bits, sign of the shift")),
        "w = d · (2 · scale + 1) · (point ± ⅛)", scaling="d · (2 · scale + 1)",
    ),
    "IQ1_M": Layout(
        "grid", (Field("qs", 32, "32 places in a grid of 2048 (8 weights each), low 8 bits"),
                 Field("qh", 16, "the places' top bits, signs of the shifts"),
                 Field("scales", 8, "16 scales of 3 bits; d, FP16, in the top bits of its four words")),
        "w = d · (2 · scale + 1) · (point ± ⅛)", scaling="d · (2 · scale + 1)",
    ),
}  # fmt: skip
