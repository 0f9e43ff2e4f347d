"""GGUF headers: a file is read without loading weights and without believing a word of it.

Layout (llama.cpp: ggml/include/gguf.h): magic, u32 version, u64 tensor count, u64 key count, keys with typed values,
tensor descriptions, padding, data. Every length, count and offset is checked against the file's size before use.
Knows nothing of weights' meaning; writing is gguf_writer.py.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, overload

from .errors import AccessDenied, InvalidModel, LlmkitError, ModelNotFound
from .quants import TENSOR_TYPES_BY_ID, TensorType

MAGIC = b"GGUF"
SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_MAX_DEPTH = 4  # of arrays in arrays; the engine itself reads none
_MAX_DIMS = 4  # GGML_MAX_DIMS


class ValueType(IntEnum):
    """Types of metadata values (ggml/include/gguf.h: gguf_type)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS = {
    ValueType.UINT8: "B", ValueType.INT8: "b", ValueType.UINT16: "H", ValueType.INT16: "h", ValueType.UINT32: "I",
    ValueType.INT32: "i", ValueType.FLOAT32: "f", ValueType.BOOL: "?", ValueType.UINT64: "Q", ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}  # fmt: skip
_SIZES = {kind: struct.calcsize("<" + letter) for kind, letter in _FORMATS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def encode_string(text: str) -> bytes:
    """A GGUF string: u64 length, UTF-8 bytes."""
    raw = text.encode("utf-8", "surrogateescape")
    return _U64.pack(len(raw)) + raw


def encode_scalar(kind: ValueType, data: Any) -> bytes:
    """One value of a fixed-size type or a string, little endian."""
    if kind is ValueType.STRING:
        return encode_string(data)
    return struct.pack("<" + _FORMATS[kind], data)


class Array(Sequence[Any]):
    """An array value; its items are decoded when first asked for. `payload` holds them as they stand in the file."""

    def __init__(self, element: ValueType, count: int, payload: bytes) -> None:
        self.element = element
        self.count = count
        self.payload = payload

    @cached_property
    def items(self) -> tuple[Any, ...]:
        """All items as Python values; strings that are not UTF-8 keep their bytes as surrogate escapes."""
        if self.element is ValueType.STRING:
            return tuple(self._strings())
        if self.element is ValueType.ARRAY:
            cursor = _Cursor(self.payload, "array")
            return tuple(cursor.array(1) for _ in range(self.count))
        return struct.unpack(f"<{self.count}{_FORMATS[self.element]}", self.payload)

    def _strings(self) -> Iterator[str]:
        payload, position, unpack = self.payload, 0, _U64.unpack_from
        for _ in range(self.count):
            start = position + 8
            position = start + unpack(payload, position)[0]
            yield payload[start:position].decode("utf-8", "surrogateescape")

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.items[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.element, self.count, self.payload) == (other.element, other.count, other.payload)

    def __hash__(self) -> int:
        return hash((self.element, self.count, self.payload))

    def __repr__(self) -> str:
        return f"Array({self.element.name}, {self.count} items)"


@dataclass(frozen=True)
class Value:
    """A metadata value with its type in the file."""

    type: ValueType
    data: Any

    @classmethod
    def string(cls, text: str) -> Value:
        """A UTF-8 string."""
        return cls(ValueType.STRING, text)

    @classmethod
    def uint32(cls, number: int) -> Value:
        """An unsigned 32-bit integer, the type of most counts."""
        return cls(ValueType.UINT32, number)

    @classmethod
    def int32(cls, number: int) -> Value:
        """A signed 32-bit integer."""
        return cls(ValueType.INT32, number)

    @classmethod
    def float32(cls, number: float) -> Value:
        """A single-precision float; rounded now, so that it compares equal after a trip through a file."""
        return cls(ValueType.FLOAT32, struct.unpack("<f", struct.pack("<f", number))[0])

    @classmethod
    def boolean(cls, truth: bool) -> Value:
        """A truth value."""
        return cls(ValueType.BOOL, truth)

    @classmethod
    def array(cls, element: ValueType, items: Iterable[Any]) -> Value:
        """An array of strings or numbers of one type."""
        encoded = [encode_scalar(element, item) for item in items]
        return cls(ValueType.ARRAY, Array(element, len(encoded), b"".join(encoded)))


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
            "Give the parts the names they were published under.",
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
        parts.append(_read_part(sibling))
    return _join(parts)


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
                return _parse(path, view)
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
        raise InvalidModel(f"{path}: is a Git LFS pointer, not the GGUF file itself", "Run `git lfs pull`, or download it.")
    if start.lstrip()[:1] == b"<":
        raise InvalidModel(f"{path}: is an HTML or XML page, not a GGUF file", again)
    if not start:
        raise InvalidModel(f"{path}: is empty", again)
    raise InvalidModel(f"{path}: is not a GGUF file: expected it to begin with {MAGIC!r}, found {start[:4]!r}")


def _parse(path: Path, view: mmap.mmap) -> GgufFile:
    cursor = _Cursor(view, str(path), 4)
    version = cursor.u32("version")
    if version & 0xFFFF == 0:
        raise InvalidModel(f"{path}: is a big-endian GGUF file", "llmkit reads little-endian ones: convert it with gguf-convert-endian.")
    if version not in (2, 3):
        raise InvalidModel(f"{path}: GGUF version {version}, expected 2 or 3")
    n_tensors, n_keys = cursor.u64("tensor count"), cursor.u64("key count")
    cursor.require(n_keys, 13, "keys")
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.name("key")
        if key in metadata:
            raise InvalidModel(f"{path}: key '{key}' occurs twice")
        metadata[key] = cursor.value(key)
    alignment = _alignment(path, metadata)
    cursor.require(n_tensors, 24, "tensors")
    rows = [_tensor_row(cursor) for _ in range(n_tensors)]
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(path, version, metadata, _place(path, rows, start, alignment, len(view)), alignment, (path,))


def _alignment(path: Path, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return 32
    if value.type is not ValueType.UINT32 or value.data < 1 or value.data & (value.data - 1):
        raise InvalidModel(f"{path}: general.alignment is {value.data!r}, expected a power of two")
    return int(value.data)


_Row = tuple[str, tuple[int, ...], TensorType, int]


def _tensor_row(cursor: _Cursor) -> _Row:
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
    if (shape[-1] if shape else 1) % kind.block:
        raise InvalidModel(f"{cursor.what}: tensor '{name}': rows of {shape[-1]} do not divide into {kind.name} blocks")
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
                f"{path}: tensor '{name}' ends at byte {start + offset + nbytes}, but the file has {size}: it is cut short",
                "Download or make the file again.",
            )
        tensors[name] = TensorInfo(name, shape, kind, path, start + offset, nbytes)
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.nbytes and info.offset < end:
            raise InvalidModel(f"{path}: tensors '{before}' and '{info.name}' overlap")
        end, before = max(end, info.offset + info.nbytes), info.name
    return tensors


class _Cursor:
    """Reads forward through `buffer`, never past its end; `what` names the file in errors."""

    def __init__(self, buffer: mmap.mmap | bytes, what: str, position: int = 0) -> None:
        self.buffer, self.what, self.position, self.end = buffer, what, position, len(buffer)

    def require(self, count: int, each: int, what: str) -> None:
        """Raise unless `count` things of at least `each` bytes can still follow."""
        if count * each > self.end - self.position:
            raise InvalidModel(f"{self.what}: announces {count} {what} at byte {self.position}, but ends at byte {self.end}")

    def take(self, nbytes: int, what: str) -> bytes:
        """The next `nbytes`."""
        self.require(nbytes, 1, f"bytes of {what}")
        self.position += nbytes
        return self.buffer[self.position - nbytes : self.position]

    def u32(self, what: str) -> int:
        """An unsigned 32-bit number."""
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        """An unsigned 64-bit number."""
        return int(_U64.unpack(self.take(8, what))[0])

    def name(self, what: str) -> str:
        """A string that must be UTF-8."""
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidModel(f"{self.what}: {what} at byte {self.position} is not UTF-8: {raw[:40]!r}") from None

    def kind(self, key: str) -> ValueType:
        """A value type."""
        number = self.u32(f"type of {key}")
        try:
            return ValueType(number)
        except ValueError:
            raise InvalidModel(f"{self.what}: key '{key}' has the unknown value type {number}") from None

    def value(self, key: str) -> Value:
        """A typed value."""
        kind = self.kind(key)
        if kind is ValueType.ARRAY:
            return Value(kind, self.array(1, key))
        if kind is ValueType.STRING:
            return Value(kind, self.take(self.u64(key), key).decode("utf-8", "surrogateescape"))
        raw = self.take(_SIZES[kind], key)
        if kind is ValueType.BOOL:
            return Value(kind, raw != b"\0")
        return Value(kind, struct.unpack("<" + _FORMATS[kind], raw)[0])

    def array(self, depth: int, key: str = "array") -> Array:
        """An array: its extent is walked and checked, its items stay encoded."""
        if depth > _MAX_DEPTH:
            raise InvalidModel(f"{self.what}: key '{key}' nests arrays deeper than {_MAX_DEPTH}")
        element, count = self.kind(key), self.u64(key)
        self.require(count, _SIZES.get(element, 8), f"items of {key}")
        start = self.position
        if element is ValueType.STRING:
            self._skip_strings(count, key)
        elif element is ValueType.ARRAY:
            for _ in range(count):
                self.array(depth + 1, key)
        else:
            self.position += count * _SIZES[element]
        return Array(element, count, self.buffer[start : self.position])

    def _skip_strings(self, count: int, key: str) -> None:
        buffer, position, last, unpack = self.buffer, self.position, self.end - 8, _U64.unpack_from
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack(buffer, position)[0]
        else:
            if position <= self.end:
                self.position = position
                return
        raise InvalidModel(f"{self.what}: the strings of '{key}' run past the end of the file")
