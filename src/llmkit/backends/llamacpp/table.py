"""A matrix in a GGUF file, row by row as float32: read, not mapped, since mapped pages would count as ours.

Dequantized by the engine's reference code, bit for bit what it does itself with single rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ... import gguf
from ...engine import Engine
from ...errors import InvalidModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_CHUNK = 1 << 20  # weights


class Table:
    """The tensor `info` [rows, width]; one of a single dimension is one row."""

    def __init__(self, info: gguf.TensorInfo, loaded: Engine) -> None:
        self.info = info
        self.rows, self.width = (1, *info.shape)[-2:]
        self._row_nbytes = info.nbytes // self.rows
        self._engine = loaded

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> Floats:
        """These rows [n, width]. Raises ValueError for rows it does not have."""
        if isinstance(rows, range) and rows.step == 1 and 0 <= rows.start <= rows.stop <= self.rows:
            return self.span(rows.start, len(rows))
        numbers = np.asarray(rows, np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.rows:
            raise ValueError(f"a row is not in a table of {self.rows}")
        values = np.empty((len(numbers), self.width), np.float32)
        with open(self.info.path, "rb", buffering=0) as file:
            for index, number in enumerate(numbers.tolist()):
                self._read(file.fileno(), number, values[index : index + 1])
        return values

    def span(self, start: int, count: int) -> Floats:
        """`count` rows from row `start`."""
        values = np.empty((count, self.width), np.float32)
        with open(self.info.path, "rb", buffering=0) as file:
            self._read(file.fileno(), start, values)
        return values

    def chunks(self) -> Iterator[tuple[int, Floats]]:
        """All rows, some at a time: (number of the first, rows). The same array is used for all."""
        count = max(1, _CHUNK // self.width)
        values = np.empty((min(count, self.rows), self.width), np.float32)
        with open(self.info.path, "rb", buffering=0) as file:
            for start in range(0, self.rows, count):
                part = values[: min(count, self.rows - start)]
                self._read(file.fileno(), start, part)
                yield start, part

    def _read(self, file: int, start: int, values: Floats) -> None:
        """Fill `values` with rows from `start` on. Raises InvalidModel when the file ends."""
        wanted = len(values) * self._row_nbytes
        raw = os.pread(file, wanted, self.info.offset + start * self._row_nbytes)
        if len(raw) != wanted:
            raise InvalidModel(f"{self.info.path}: ends within tensor {self.info.name}")
        source = np.frombuffer(raw, np.uint8)
        if values.size:
            self._engine.to_float(self.info.type.ggml_id, source.ctypes.data, values.ctypes.data, values.size)
