"""GGUF headers: a file is read without loading weights and without believing a word of it.

Layout (llama.cpp: ggml/include/gguf.h): magic, u32 version, u64 tensor count, u64 key count, keys with typed values,
tensor descriptions, padding, data. Every length, count and offset is checked against the file's size before use.
Knows nothing of weights' meaning; writing is gguf_writer.py.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .errors import AccessDenied, InvalidModel, LlmkitError, ModelNotFound
from .gguf_values import Array, Cursor, Truncated, Value, ValueType
from .model import SPLIT_NAME
from .quants import TENSOR_TYPES_BY_ID, TensorType

__all__ = [
    "MAGIC", "SPLIT_NAME", "Array", "GgufFile", "TensorInfo", "Truncated", "Value", "ValueType", "read", "read_start",
]  # fmt: skip

MAGIC = b"GGUF"
_MAX_DIMS = 4  # GGML_MAX_DIMS
_NAMES = "Give the parts the names they were published under."


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is numpy order (rows …, width); `offset` counts from the start of `path`."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file, or of all the parts of a split one."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int
    paths: tuple[Path, ...] = field(default=())

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of `key`, or `default`."""
        value = self.metadata.get(key)
        return default if value is None else value.data


def read(path: str | Path) -> GgufFile:
    """Read the header of `path` (of all parts, when it is the first of a split file).

    Raises ModelNotFound, AccessDenied, or InvalidModel naming the file, what was expected and what was found.
    """
    path = Path(path)
    first = _read_part(path)
    count = first.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first
    match = SPLIT_NAME.match(path.name)
    if not match or int(match["count"]) != count:
        raise InvalidModel(
            f"{path}: says it is one of {count} parts, but is not named <name>-00001-of-{count:05d}.gguf",
            _NAMES,
        )
    if first.get("split.no") != 0:
        raise InvalidModel(
            f"{path}: is not the first part of its split file", f"Use {match['stem']}-00001-of-{match['count']}.gguf."
        )
    parts = [first]
    for number in range(2, count + 1):
        sibling = path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
        if not sibling.is_file():
            raise ModelNotFound(f"{path}: part {sibling.name} is missing", "Fetch all the parts into one folder.")
        part = _read_part(sibling)
        if part.get("split.no") != number - 1:
            raise InvalidModel(f"{sibling}: split.no is {part.get('split.no')}, expected {number - 1}", _NAMES)
        parts.append(part)
    return _join(parts)


def read_start(path: Path, start: bytes, nbytes: int) -> GgufFile:
    """The header of a file (or part) of `nbytes` bytes, of which only the beginning is at hand, with nothing opened.

    Raises Truncated when the header goes on after `start`, InvalidModel as `read` does.
    """
    _check_magic(path, start)
    return _parse(path, start, nbytes)


def _join(parts: list[GgufFile]) -> GgufFile:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise InvalidModel(f"{part.path}: tensor '{min(twice)}' is also in an earlier part")
        tensors.update(part.tensors)
    first = parts[0]
    expected = first.get("split.tensors.count")
    if expected is not None and expected != len(tensors):
        raise InvalidModel(f"{first.path}: split.tensors.count is {expected}, the parts hold {len(tensors)} tensors")
    paths = tuple(part.path for part in parts)
    return GgufFile(first.path, first.version, first.metadata, tensors, first.alignment, paths)


def _read_part(path: Path) -> GgufFile:
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            _check_magic(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _parse(path, view, len(view))
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InvalidModel(f"{path}: is a folder, expected a GGUF file") from None
    except PermissionError:
        raise AccessDenied(f"{path}: may not be read") from None
    except OSError as error:
        raise LlmkitError(f"{path}: cannot be read: {error.strerror}") from error


def _check_magic(path: Path, start: bytes) -> None:
    if start.startswith(MAGIC):
        return
    again = "Download the file again."
    if start.startswith(b"version https://git-lfs"):
        raise InvalidModel(
            f"{path}: is a Git LFS pointer, not the GGUF file itself", "Run `git lfs pull`, or download it."
        )
    if start.lstrip()[:1] == b"<":
        raise InvalidModel(f"{path}: is an HTML or XML page, not a GGUF file", again)
    if not start:
        raise InvalidModel(f"{path}: is empty", again)
    raise InvalidModel(f"{path}: is not a GGUF file: expected it to begin with {MAGIC!r}, found {start[:4]!r}")


def _parse(path: Path, view: mmap.mmap | bytes, size: int) -> GgufFile:
    cursor = Cursor(view, str(path), 4, size)
    version = cursor.u32("version")
    if version and version & 0xFFFF == 0:
        raise InvalidModel(
            f"{path}: is a big-endian GGUF file",
            "llmkit reads little-endian ones: convert it with gguf-convert-endian.",
        )
    if version not in (2, 3):
        raise InvalidModel(f"{path}: GGUF version {version}, expected 2 or 3")
    n_tensors, n_keys = cursor.u64("tensor count"), cursor.u64("key count")
    cursor.require(n_keys, 13, "keys")
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.name("key")
        if not key:
            raise InvalidModel(f"{path}: announces {n_keys} keys, but before byte {cursor.position} one has no name")
        if key in metadata:
            raise InvalidModel(f"{path}: key '{key}' occurs twice")
        metadata[key] = cursor.value(key)
    alignment = _alignment(path, metadata)
    cursor.require(n_tensors, 24, "tensors")
    rows = [_tensor_row(cursor) for _ in range(n_tensors)]
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(path, version, metadata, _place(path, rows, start, alignment, size), alignment, (path,))


def _alignment(path: Path, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return 32
    if value.type is not ValueType.UINT32 or value.data < 1 or value.data & (value.data - 1):
        raise InvalidModel(f"{path}: general.alignment is {value.data!r}, expected a power of two")
    return int(value.data)


_Row = tuple[str, tuple[int, ...], TensorType, int]


def _tensor_row(cursor: Cursor) -> _Row:
    name = cursor.name("tensor name")
    n_dims = cursor.u32(f"dimensions of {name}")
    if n_dims > _MAX_DIMS:
        raise InvalidModel(f"{cursor.what}: tensor '{name}' has {n_dims} dimensions, expected at most {_MAX_DIMS}")
    shape = tuple(cursor.u64(f"shape of {name}") for _ in range(n_dims))[::-1]
    type_id, offset = cursor.u32(f"type of {name}"), cursor.u64(f"offset of {name}")
    if prod(shape) > 1 << 62 or any(size > 1 << 62 for size in shape):
        raise InvalidModel(f"{cursor.what}: tensor '{name}' has the impossible shape {list(shape)}")
    kind = TENSOR_TYPES_BY_ID.get(type_id)
    if kind is None:
        raise InvalidModel(
            f"{cursor.what}: tensor '{name}' has the unknown type {type_id}", "A newer llmkit may know it."
        )
    width = shape[-1] if shape else 1
    if width % kind.block:
        raise InvalidModel(f"{cursor.what}: tensor '{name}': rows of {width} do not divide into {kind.name} blocks")
    return name, shape, kind, offset


def _place(path: Path, rows: list[_Row], start: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise InvalidModel(f"{path}: tensor '{name}' occurs twice")
        nbytes = prod(shape) // kind.block * kind.nbytes
        if offset % alignment:
            raise InvalidModel(f"{path}: tensor '{name}' begins at {offset}, expected a multiple of {alignment}")
        if start + offset + nbytes > size:
            raise InvalidModel(
                f"{path}: tensor '{name}' ends at byte {start + offset + nbytes}, but the file has {size}:"
                " it is cut short",
                "Download or make the file again.",
            )
        tensors[name] = TensorInfo(name, shape, kind, path, start + offset, nbytes)
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.nbytes and info.offset < end:
            raise InvalidModel(f"{path}: tensors '{before}' and '{info.name}' overlap")
        end, before = max(end, info.offset + info.nbytes), info.name
    return tensors
