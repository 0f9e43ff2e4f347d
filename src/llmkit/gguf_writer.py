"""GGUF headers as bytes: offsets are known before the first weight is written.

A sparse file (header, then a hole where the data would be) is all the engine needs to be asked about a model that
does not exist yet. Layout as llama.cpp's gguf.cpp writes it: every tensor and the header padded to the alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from .gguf import MAGIC
from .gguf_values import Array, Value, encode_scalar, encode_string
from .quants import TensorType

ALIGNMENT = 32
TensorRow = tuple[str, tuple[int, ...], TensorType]


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // alignment) * alignment


def tensor_nbytes(shape: tuple[int, ...], kind: TensorType) -> int:
    """Bytes of a tensor of `shape` (numpy order) stored as `kind`. Raises Unsupported when rows do not fit blocks."""
    width = shape[-1] if shape else 1
    return kind.row_nbytes(width) * prod(shape[:-1])


def _encode_value(value: Value) -> bytes:
    if isinstance(value.data, Array):
        return struct.pack("<IIQ", value.type, value.data.element, len(value.data)) + value.data.payload
    return struct.pack("<I", value.type) + encode_scalar(value.type, value.data)


def header_bytes(
    metadata: Mapping[str, Value], tensors: Sequence[TensorRow], alignment: int = ALIGNMENT
) -> tuple[bytes, list[int]]:
    """The padded header, and each tensor's offset from the header's end."""
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [encode_string(key), _encode_value(value)]
    offsets, offset = [], 0
    for name, shape, kind in tensors:
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        parts += [encode_string(name), struct.pack("<I", len(shape)), dims, struct.pack("<IQ", kind.ggml_id, offset)]
        offsets.append(offset)
        offset += padded(tensor_nbytes(shape, kind), alignment)
    header = b"".join(parts)
    return header + bytes(padded(len(header), alignment) - len(header)), offsets


def write_sparse(path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorRow]) -> None:
    """Write the header only; the data section is a hole of the right size."""
    header, _ = header_bytes(metadata, tensors)
    size = len(header) + sum(padded(tensor_nbytes(shape, kind)) for _, shape, kind in tensors)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)


def write(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[tuple[str, tuple[int, ...], TensorType, bytes]]
) -> None:
    """Write a small whole file at once (probes, tests, imatrix files)."""
    header, _ = header_bytes(metadata, [row[:3] for row in tensors])
    with open(path, "wb") as file:
        file.write(header)
        for name, shape, kind, data in tensors:
            if len(data) != tensor_nbytes(shape, kind):
                raise ValueError(f"{name}: {len(data)} bytes, expected {tensor_nbytes(shape, kind)}")
            file.write(data + bytes(padded(len(data)) - len(data)))
