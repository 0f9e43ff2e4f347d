"""What quantizing loses, type by type: rows go through the engine's kernels and back, and are compared.

    RMSE      root of the mean squared difference              weighted  the same, each square times its weight
    relative  RMSE over the root mean square of the weights    SNR       −20 · log10(relative), in dB

Weighted by an importance matrix (mean squared activation of each column), where there is one, it is the error that the
layer's output gets; without one the weights' own squares stand in, as in llama.cpp's kernels (ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import log10
from typing import Any

import numpy as np

from ..errors import InvalidModel, Unsupported
from ..quants import TensorType

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# what a user would compare, and is quick to make
COMPARED = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "MXFP4", "Q3_K", "Q2_K")
SAMPLED_WEIGHTS = 1 << 18  # more do not change the figures, and the slow kernels take a second for a million


@dataclass(frozen=True)
class Sample:
    """Rows of a tensor: float32 of (rows, width), with an importance of the same shape or None."""

    rows: Floats
    importance: Floats | None = None


@dataclass(frozen=True)
class Loss:
    """How one type did. Errors are in the weights' own unit; `nbytes` is what a row takes.

    `missing` says why there are no figures: the type does not fit the rows, or needs an importance matrix.
    """

    type: str
    bits_per_weight: Fraction
    row_nbytes: int | None
    rmse: float | None = None
    relative: float | None = None
    snr_db: float | None = None
    largest: float | None = None
    weighted: float | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins between `low` and `high`, before and after.

    `cut`: the first and the last bin also hold what lies farther out.
    """

    low: float
    high: float
    before: tuple[int, ...]
    after: tuple[int, ...]
    distinct_before: int
    distinct_after: int
    cut: bool


def sampled_rows(n_rows: int, width: int, weights: int = SAMPLED_WEIGHTS) -> list[int]:
    """Numbers of evenly spaced rows that hold about `weights` weights; all rows when they are fewer."""
    count = min(n_rows, max(1, weights // max(width, 1)))
    return [index * n_rows // count for index in range(count)]


def misfit(kind: TensorType, width: int, *, importance: bool) -> str | None:
    """Why rows of this width cannot be written in this type, or None."""
    if not kind.makeable:
        return "the engine only reads it"
    if width % kind.block:
        return f"rows of {width} do not divide into blocks of {kind.block}"
    from .. import engine

    if not importance and kind.quantized and engine.load().requires_imatrix(kind.ggml_id):
        return "needs an importance matrix"
    return None


def quantized(sample: Sample, kind: TensorType) -> Bytes:
    """The rows as the engine's kernel packs them: uint8 of (rows, bytes of a row). Raises Unsupported, InvalidModel."""
    from .. import engine

    rows = np.ascontiguousarray(sample.rows, np.float32)
    if why := misfit(kind, rows.shape[1], importance=sample.importance is not None):
        raise Unsupported(f"{kind.name}: {why}")
    if not np.isfinite(rows).all():
        raise InvalidModel("the rows hold NaN or infinities: they cannot be quantized")
    packed = np.empty((len(rows), kind.row_nbytes(rows.shape[1])), np.uint8)
    for start, stop, columns in _runs(sample):
        address = None if columns is None else columns.ctypes.data
        engine.load().quantize_chunk(
            kind.ggml_id, rows[start:].ctypes.data, packed[start:].ctypes.data, 0, stop - start, rows.shape[1], address
        )
    return packed


def dequantized(packed: Bytes, kind: TensorType, width: int) -> Floats:
    """Packed rows as float32 of (rows, width)."""
    from .. import engine

    packed = np.ascontiguousarray(packed)
    rows = np.empty((len(packed), width), np.float32)
    engine.load().to_float(kind.ggml_id, packed.ctypes.data, rows.ctypes.data, rows.size)
    return rows


def losses(sample: Sample, kinds: Sequence[TensorType]) -> list[Loss]:
    """How each type does on the rows."""
    return [_loss(sample, kind) for kind in kinds]


def histogram(before: Floats, after: Floats, bins: int = 21) -> Histogram:
    """Where the values lie, before and after; bins span four root mean squares, or the largest magnitude if less."""
    largest = float(max(np.abs(before).max(), np.abs(after).max()))
    top = min(largest, 4 * float(np.sqrt(np.mean(np.square(before, dtype=np.float64))))) or largest or 1.0
    edges = np.linspace(-top, top, bins + 1)
    counts = [np.histogram(np.clip(values.astype(np.float64), -top, top), edges)[0] for values in (before, after)]
    first, second = (tuple(int(count) for count in each) for each in counts)
    return Histogram(-top, top, first, second, len(np.unique(before)), len(np.unique(after)), largest > top)


def _runs(sample: Sample) -> list[tuple[int, int, Floats | None]]:
    """Rows that share their importance: the kernel takes one vector for all rows of a call."""
    if sample.importance is None:
        return [(0, len(sample.rows), None)]
    given = np.ascontiguousarray(sample.importance, np.float32)
    changes = [row for row in range(1, len(given)) if not np.array_equal(given[row], given[row - 1])]
    starts = [0, *changes]
    return [(start, stop, given[start]) for start, stop in zip(starts, [*changes, len(given)], strict=True)]


def _loss(sample: Sample, kind: TensorType) -> Loss:
    width = sample.rows.shape[1]
    why = misfit(kind, width, importance=sample.importance is not None)
    if why:
        return Loss(kind.name, kind.bits_per_weight, None, missing=why)
    rows = sample.rows.astype(np.float64)
    difference = dequantized(quantized(sample, kind), kind, width) - rows
    squares = difference**2
    rmse = float(np.sqrt(squares.mean()))
    size = float(np.sqrt((rows**2).mean()))
    relative = rmse / size if size else None
    weights = rows**2 if sample.importance is None else sample.importance.astype(np.float64)
    total = float(weights.sum())
    return Loss(
        type=kind.name,
        bits_per_weight=kind.bits_per_weight,
        row_nbytes=kind.row_nbytes(width),
        rmse=rmse,
        relative=relative,
        snr_db=-20 * log10(relative) if relative else None,
        largest=float(np.abs(difference).max()),
        weighted=float(np.sqrt((squares * weights).sum() / total)) if total else None,
    )
