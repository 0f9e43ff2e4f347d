"""The end of a model, from the residual stream to logits, from the weights in its file: final norm and output matrix.

Norms by the file's metadata; the output matrix is the table of embeddings where a model ties the two. The matrix is
read and multiplied a few rows at a time (table.py), so it is never whole in memory.
Architectures differ here in details: what this gives is compared with the engine's logits before it is used
(layers.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ... import gguf
from ...engine import Engine
from ...errors import Unsupported
from .table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Products of fewer multiplications numpy's BLAS does on one thread. More threads are no gain here, and while another
# program keeps a core busy they wait for each other: measured ten times slower
_ALONE, _LEAST_ROWS = 1 << 19, 8
_DIVIDES = ("granite", "minicpm")  # architectures whose logit_scale divides; of the others it multiplies


class Head:
    """Made of the file alone. Raises Unsupported where the end of the model is of another kind."""

    def __init__(self, file: gguf.GgufFile, loaded: Engine) -> None:
        self._file, self._engine = file, loaded
        tensors = file.tensors
        matrix = tensors.get("output.weight") or tensors.get("token_embd.weight")
        self._rms = self._number("attention.layer_norm_rms_epsilon")
        self._layer_norm = self._number("attention.layer_norm_epsilon")
        if matrix is None or len(matrix.shape) != 2:
            raise Unsupported(f"{file.path}: no output matrix that we know")
        if self._rms is None and self._layer_norm is None:
            raise Unsupported(f"{file.path}: its final norm is not one that we know")
        self._matrix = Table(matrix, loaded)
        self._gain, self._shift, self._bias = (
            self._small(name) for name in ("output_norm.weight", "output_norm.bias", "output.bias")
        )
        self._cap = self._number("final_logit_softcapping")
        scale = self._number("logit_scale") or 1.0
        self._scale = 1 / scale if self._architecture.startswith(_DIVIDES) else scale

    @property
    def _architecture(self) -> str:
        return str(self._file.get("general.architecture", ""))

    def _number(self, key: str) -> float | None:
        value = self._file.get(f"{self._architecture}.{key}")
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def _small(self, name: str) -> Floats | None:
        """A tensor of one dimension."""
        info = self._file.tensors.get(name)
        return None if info is None else Table(info, self._engine).span(0, 1)[0]

    def norm(self, hidden: Floats) -> Floats:
        """The final norm of rows [n, d]."""
        if self._rms is not None:
            normed = hidden / np.sqrt(np.mean(hidden * hidden, axis=-1, keepdims=True) + np.float32(self._rms))
        else:
            centred = hidden - hidden.mean(axis=-1, keepdims=True)
            variance = np.mean(centred * centred, axis=-1, keepdims=True)
            normed = centred / np.sqrt(variance + np.float32(self._layer_norm or 0.0))
        scaled = normed if self._gain is None else normed * self._gain
        shifted: Floats = (scaled if self._shift is None else scaled + self._shift).astype(np.float32, copy=False)
        return shifted

    def logits(self, hidden: Floats) -> Floats:
        """[n, d] → [n, V]."""
        rows, width = self._matrix.rows, self._matrix.width
        hidden = np.asarray(hidden, np.float32)
        if hidden.ndim != 2 or hidden.shape[1] != width:
            raise ValueError(f"expected rows of {width} numbers, found an array {hidden.shape}")
        normed = np.ascontiguousarray(self.norm(hidden))
        logits = np.empty((len(hidden), rows), np.float32)
        height = max(1, _ALONE // (width * _LEAST_ROWS))
        blocks = [slice(start, start + height) for start in range(0, len(hidden), height)]
        for first, weights in self._matrix.chunks():
            for block in blocks:
                step = max(_LEAST_ROWS, _ALONE // (width * len(normed[block])))
                for start in range(0, len(weights), step):
                    part = weights[start : start + step]
                    place = slice(first + start, first + start + len(part))
                    np.matmul(normed[block], part.T, out=logits[block, place])
        if self._bias is not None:
            logits += self._bias
        if self._scale != 1:
            logits *= np.float32(self._scale)
        if self._cap:
            logits = np.tanh(logits / np.float32(self._cap)) * np.float32(self._cap)
        return logits
