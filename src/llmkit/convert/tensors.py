"""Lazy tensors: rows are read from disk when they are asked for, rearranged in memory, never kept.

A tensor of shape (…, width) is seen as a list of rows. Rows are read with pread into fresh memory rather than through a
memory map: a file that is cut short while we read is then an error and not a signal, and resident memory stays a few
chunks. The operations below are all that the families need; each takes a tensor and returns one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidModel, Unsupported
from ..quants import BF16, F16, F32, TensorType

if TYPE_CHECKING:
    from ..checkpoint import StoredTensor
    from ..gguf import TensorInfo

Rows = np.ndarray[Any, np.dtype[Any]]

# safetensors dtype → (numpy dtype as stored, type in GGUF). Integers are no weights: they are packed ones, or indices.
_STORED: dict[str, tuple[np.dtype[Any], TensorType]] = {
    "F32": (np.dtype("<f4"), F32),
    "F16": (np.dtype("<f2"), F16),
    "BF16": (np.dtype("<u2"), BF16),
    "F64": (np.dtype("<f8"), F32),
}
_IN_MEMORY: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of `shape` (numpy order) whose rows come as `type` stores them.

    `read(start, stop)` gives those rows: float32, float16, uint16 (the bits of bfloat16), or for quantized types uint8
    of (rows, bytes of a row). `span` is (file, offset) when all rows lie there in this order, ready to be copied.
    `paths` are the files that `read` reads.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    read: Callable[[int, int], Rows]
    span: tuple[Path, int] | None = None
    paths: tuple[Path, ...] = ()

    @property
    def width(self) -> int:
        """Weights in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows, all leading dimensions together."""
        return prod(self.shape[:-1])

    @property
    def n_weights(self) -> int:
        """Weights in the tensor."""
        return prod(self.shape)

    def float32(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` as float32 of (rows, width). Quantized types are decoded by the engine."""
        return self.widen(self.read(start, stop))

    def widen(self, rows: Rows) -> Rows:
        """Rows as `read` gives them → float32 of (rows, width)."""
        if self.type is F32:
            return rows
        if self.type is BF16:
            wide = rows.astype(np.uint32)
            return np.left_shift(wide, 16, out=wide).view(np.float32)
        if self.type is F16:
            return rows.astype(np.float32)
        return _decode(rows, self.type, self.width)


def all_finite(rows: Rows, kind: TensorType) -> bool:
    """Whether rows of a plain type hold no NaN and no infinity. Quantized rows are not looked into."""
    if kind is BF16:
        return not ((rows & 0x7F80) == 0x7F80).any()
    return kind.quantized or bool(np.isfinite(rows).all())


def _decode(rows: Rows, kind: TensorType, width: int) -> Rows:
    from .. import engine

    rows = np.ascontiguousarray(rows)
    out = np.empty((len(rows), width), np.float32)
    engine.load().to_float(kind.ggml_id, rows.ctypes.data, out.ctypes.data, out.size)
    return out


def read_span(path: Path, offset: int, nbytes: int) -> Rows:
    """`nbytes` of `path` from `offset` as uint8. Raises InvalidModel when the file has become shorter."""
    buffer = np.empty(nbytes, np.uint8)
    try:
        _fill(buffer, path, offset)
    except OSError as error:
        raise InvalidModel(f"{path}: cannot be read any more: {error.strerror}") from error
    return buffer


def _fill(buffer: Rows, path: Path, offset: int) -> None:
    view, nbytes = buffer.data, buffer.nbytes
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < nbytes:
            count = os.preadv(file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise InvalidModel(
                    f"{path}: ended at byte {offset + done} while being read: it has changed since it was opened"
                )
            done += count


def from_stored(stored: StoredTensor) -> LazyTensor:
    """A safetensors tensor. Raises Unsupported for dtypes that are not plain numbers."""
    if stored.dtype not in _STORED:
        raise Unsupported(
            f"{stored.path}: tensor '{stored.name}' is stored as {stored.dtype}",
            "llmkit converts checkpoints in BF16, F16 or F32; look for one that is not quantized.",
        )
    dtype, kind = _STORED[stored.dtype]
    width = stored.shape[-1] if stored.shape else 1
    row_nbytes = width * dtype.itemsize

    def read(start: int, stop: int) -> Rows:
        raw = read_span(stored.path, stored.offset + start * row_nbytes, (stop - start) * row_nbytes)
        return raw.view(dtype).reshape(stop - start, width).astype(_IN_MEMORY[kind.name], copy=False)

    span = (stored.path, stored.offset) if dtype == _IN_MEMORY[kind.name] else None
    return LazyTensor(stored.name, stored.shape, kind, read, span, (stored.path,))


def from_info(info: TensorInfo) -> LazyTensor:
    """A tensor of a GGUF file."""
    width = info.shape[-1] if info.shape else 1
    row_nbytes = info.type.row_nbytes(width)
    dtype = _IN_MEMORY.get(info.type.name, np.dtype(np.uint8))

    def read(start: int, stop: int) -> Rows:
        raw = read_span(info.path, info.offset + start * row_nbytes, (stop - start) * row_nbytes)
        return raw.view(dtype).reshape(stop - start, -1)

    return LazyTensor(info.name, info.shape, info.type, read, (info.path, info.offset), (info.path,))


def from_array(name: str, values: Rows) -> LazyTensor:
    """A small tensor computed here, as float32."""
    values = np.ascontiguousarray(values, np.float32)
    rows = values.reshape(-1, values.shape[-1])
    return LazyTensor(name, values.shape, F32, lambda start, stop: rows[start:stop])


def interleave_rope_halves(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Reorder the rows of each head from Hugging Face's two halves to llama.cpp's pairs.

    HF rotates element i of a head with element i + d/2, llama.cpp's llama family 2i with 2i + 1: row h·d + 2j + k of
    the result is row h·d + k·d/2 + j of the source. Biases (one dimension) are reordered by element.
    """
    return _permute_heads(tensor, heads, (2, -1))


def split_rope_pairs(tensor: LazyTensor, heads: int) -> LazyTensor:
    """The inverse of interleave_rope_halves: from llama.cpp's pairs to Hugging Face's halves."""
    return _permute_heads(tensor, heads, (-1, 2))


def _permute_heads(tensor: LazyTensor, heads: int, view: tuple[int, int]) -> LazyTensor:
    """Swap the two axes of `view` inside each head's rows."""
    total = tensor.shape[0]
    if heads < 1 or total % (2 * heads):
        raise InvalidModel(f"tensor '{tensor.name}': {total} rows do not divide into {heads} heads of an even size")
    size = total // heads
    if len(tensor.shape) == 1:

        def read_elements(start: int, stop: int) -> Rows:
            values = tensor.read(start, stop)
            return values.reshape(heads, *view).swapaxes(1, 2).reshape(values.shape)

        return replace(tensor, read=read_elements, span=None)

    def read(start: int, stop: int) -> Rows:
        first, last = start // size, -(-stop // size)
        rows = tensor.read(first * size, last * size)
        rows = rows.reshape(last - first, *view, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
        return rows[start - first * size : stop - first * size]

    return replace(tensor, read=read, span=None)


def as_float32(tensor: LazyTensor) -> LazyTensor:
    """The same weights in float32."""
    if tensor.type is F32:
        return tensor
    return replace(tensor, type=F32, read=tensor.float32, span=None)


def add_one(tensor: LazyTensor) -> LazyTensor:
    """Add 1 to every weight, in float32: Gemma's norms multiply by 1 + w, the engine by w."""
    return replace(tensor, type=F32, read=lambda start, stop: tensor.float32(start, stop) + np.float32(1), span=None)


def first_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """Keep the first `count` rows of a matrix."""
    return replace(tensor, shape=(count, *tensor.shape[1:])) if count < tensor.shape[0] else tensor
