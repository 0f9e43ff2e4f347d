"""Importance matrices as others make them: GGUF files and the older .dat files of llama-imatrix.

GGUF: tensors NAME.in_sum2 (sums of squared activations, one row per expert) and NAME.counts; the importance is sum over
count, and 1 where the count is 0. Legacy: values over calls. Formats: llama.cpp common/imatrix-loader.cpp.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import engine, gguf
from ..convert.tensors import LazyTensor, from_info
from ..errors import InvalidModel, LlmkitError, ModelNotFound
from ..gguf import Value
from ..quants import TensorType

Importance = np.ndarray[Any, np.dtype[np.float32]]
HOW_TO_GET_ONE = (
    "Get one that was published with the model (imatrix.gguf or imatrix.dat), or make one with llama.cpp's"
    " llama-imatrix, and give it with --imatrix FILE. Or choose a quant that needs none, such as Q2_K."
)
_SUMS, _COUNTS = ".in_sum2", ".counts"
# Types the engine refuses to make without importance, and the tensors it exempts from that (src/llama-quant.cpp).
_DEMANDING = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
_EXEMPT = {"token_embd.weight", "output.weight"}


@dataclass(frozen=True)
class Imatrix:
    """Importance per column of each tensor: float32 of (matrices, width), or flat when read from a .dat file."""

    path: Path
    entries: dict[str, Importance]
    datasets: tuple[str, ...]
    chunk_count: int

    def metadata(self) -> dict[str, Value]:
        """What llama-quantize writes about it (names cut at 127 bytes, as there)."""
        found = {"quantize.imatrix.file": Value.string(_cut(str(self.path)))}
        if self.datasets:
            found["quantize.imatrix.dataset"] = Value.string(_cut(self.datasets[0]))
        found["quantize.imatrix.entries_count"] = Value.uint32(len(self.entries))
        if self.chunk_count > 0:
            found["quantize.imatrix.chunks_count"] = Value.uint32(self.chunk_count)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the values."""
        digest = hashlib.sha256()
        for name, values in sorted(self.entries.items()):
            digest.update(name.encode("utf-8", "surrogateescape") + values.tobytes())
        return digest.hexdigest()

    def of(self, tensor: LazyTensor) -> Importance | None:
        """The tensor's importance as (matrices, width), or None. Raises InvalidModel when the size is wrong."""
        found = self.entries.get(tensor.name)
        if found is None:
            return None
        matrices = int(np.prod(tensor.shape[:-2], dtype=np.int64))
        if found.size != matrices * tensor.width:
            if tensor.name == "token_embd.weight":
                return None  # as llama-quantize: old files hold one that cannot be used
            raise InvalidModel(
                f"{self.path}: {found.size} values for '{tensor.name}', expected {matrices} x {tensor.width}",
                "The importance matrix was made for another model.",
            )
        return found.reshape(matrices, tensor.width)


def require(imatrix: Imatrix | None, tensors: Sequence[LazyTensor], types: dict[str, TensorType]) -> None:
    """Raise LlmkitError unless every tensor whose type demands importance has it, of the right size."""
    for tensor in tensors:
        kind = types[tensor.name]
        if (imatrix.of(tensor) if imatrix else None) is not None or not _demands(kind, tensor.name):
            continue
        if imatrix is None:
            raise LlmkitError(f"'{tensor.name}' in {kind.name} needs an importance matrix", HOW_TO_GET_ONE)
        raise InvalidModel(
            f"{imatrix.path}: holds nothing for '{tensor.name}', which {kind.name} cannot do without",
            "Make the importance matrix from this model, or choose a larger type for this tensor.",
        )


def _demands(kind: TensorType, name: str) -> bool:
    """Some kernels abort without importance, whatever the tensor; for more types the engine's quantizer insists."""
    if kind.quantized and engine.load().requires_imatrix(kind.ggml_id):
        return True
    return kind.name in _DEMANDING and name not in _EXEMPT


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:127].decode("utf-8", "ignore")


def read(path: Path) -> Imatrix:
    """Read either format. Raises ModelNotFound, InvalidModel (broken file, value that is not finite)."""
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == gguf.MAGIC
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such importance matrix") from None
    except OSError as error:
        raise InvalidModel(f"{path}: cannot be read: {error.strerror}") from error
    found = _read_gguf(path) if is_gguf else _read_legacy(path)
    if not found.entries:
        raise InvalidModel(f"{path}: holds no importance values")
    for name, values in found.entries.items():
        if not np.isfinite(values).all():
            raise InvalidModel(f"{path}: the importance of '{name}' has values that are not finite")
        if (values < 0).any():
            raise InvalidModel(f"{path}: the importance of '{name}' has negative values; it is a sum of squares")
    return found


def _read_gguf(path: Path) -> Imatrix:
    file = gguf.read(path)
    entries = {}
    for name, info in file.tensors.items():
        if not name.endswith(_SUMS):
            continue
        counts_info = file.tensors.get(name[: -len(_SUMS)] + _COUNTS)
        if counts_info is None:
            raise InvalidModel(f"{path}: '{name}' has no counts beside it")
        sums, counts = (_values(path, each) for each in (from_info(info), from_info(counts_info)))
        matrices = counts.size
        if matrices == 0 or sums.size % matrices:
            raise InvalidModel(f"{path}: '{name}' has {sums.size} sums for {matrices} counts")
        sums, counts = sums.reshape(matrices, -1), counts.reshape(matrices, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            entries[name[: -len(_SUMS)]] = np.where(counts > 0, sums / counts, np.float32(1)).astype(np.float32)
    datasets = file.get("imatrix.datasets")
    chunks = file.get("imatrix.chunk_count", 0)
    named = tuple(str(item) for item in datasets) if isinstance(datasets, gguf.Array) else ()
    return Imatrix(path, entries, named, chunks if isinstance(chunks, int) and chunks < 1 << 32 else 0)


def _values(path: Path, tensor: LazyTensor) -> Importance:
    if tensor.type.name != "F32":
        raise InvalidModel(f"{path}: '{tensor.name}' is stored as {tensor.type.name}, expected F32")
    return tensor.float32(0, tensor.n_rows).reshape(-1)


def _read_legacy(path: Path) -> Imatrix:
    data = path.read_bytes()
    reader = _legacy_fields(path, data)
    entries: dict[str, Importance] = {}
    (count,) = next(reader)
    for _ in range(count):
        name = next(reader).decode("utf-8", "replace")
        (calls,) = next(reader)
        values = np.frombuffer(next(reader), "<f4").astype(np.float32)
        entries[name] = values / np.float32(calls) if calls > 0 else values
    chunks = next(reader, None)
    dataset = next(reader, b"") if chunks else b""
    return Imatrix(path, entries, (dataset.decode("utf-8", "replace"),) if dataset else (), chunks[0] if chunks else 0)


def _legacy_fields(path: Path, data: bytes) -> Iterator[Any]:
    """Count; per entry name, (calls,), values; then optionally (chunks,) and dataset. Every length is checked."""
    position = 0

    def take(nbytes: int) -> bytes:
        nonlocal position
        if nbytes < 0 or position + nbytes > len(data):
            raise InvalidModel(
                f"{path}: is neither a GGUF nor a legacy importance matrix, or is cut short at byte {position}"
            )
        position += nbytes
        return data[position - nbytes : position]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    count = number()
    if not 1 <= count <= len(data) // 12:
        raise InvalidModel(f"{path}: is neither a GGUF nor a legacy importance matrix")
    yield (count,)
    for _ in range(count):
        yield take(number())
        yield (number(),)
        yield take(4 * number())
    if position < len(data):
        yield (number(),)
        if position < len(data):
            yield take(number())
