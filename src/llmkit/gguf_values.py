"""GGUF metadata values: their types, how they stand in a file, and a cursor that reads them without trusting it.

Layout (llama.cpp: ggml/include/gguf.h): little endian; strings are u64 length and UTF-8; arrays are u32 element type,
u64 count, items. Knows nothing of tensors or models.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, overload

from .errors import InvalidModel

_MAX_DEPTH = 4  # of arrays in arrays; the engine itself reads none


class Truncated(InvalidModel):
    """The beginning of a file ended too soon: the file's first `needed` bytes are wanted, at least."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


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
        self._n = count
        self.payload = payload

    @cached_property
    def items(self) -> tuple[Any, ...]:
        """All items as Python values; strings that are not UTF-8 keep their bytes as surrogate escapes."""
        if self.element is ValueType.STRING:
            return tuple(self._strings())
        if self.element is ValueType.ARRAY:
            cursor = Cursor(self.payload, "array")
            return tuple(cursor.array(1) for _ in range(self._n))
        return struct.unpack(f"<{self._n}{_FORMATS[self.element]}", self.payload)

    def _strings(self) -> Iterator[str]:
        payload, position, unpack = self.payload, 0, _U64.unpack_from
        for _ in range(self._n):
            start = position + 8
            position = start + unpack(payload, position)[0]
            yield payload[start:position].decode("utf-8", "surrogateescape")

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.items[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.element, self._n, self.payload) == (other.element, other._n, other.payload)

    def __hash__(self) -> int:
        return hash((self.element, self._n, self.payload))

    def __repr__(self) -> str:
        return f"Array({self.element.name}, {self._n} items)"


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


class Cursor:
    """Reads forward through `buffer`, never past its end; `what` names the file in errors.

    `size` is the whole file's, where `buffer` is only its beginning.
    """

    def __init__(self, buffer: mmap.mmap | bytes, what: str, position: int = 0, size: int | None = None) -> None:
        self.buffer, self.what, self.position, self.end = buffer, what, position, len(buffer)
        self.size = self.end if size is None else size

    def require(self, count: int, each: int, what: str) -> None:
        """Raise unless `count` things of at least `each` bytes can still follow."""
        needed = self.position + count * each
        if needed > self.end:
            raise self._short(f"announces {count} {what} at byte {self.position}, but ends at byte {self.size}", needed)

    def _short(self, message: str, needed: int) -> InvalidModel:
        """The error for bytes up to `needed` that the buffer lacks: the whole file may have them or not."""
        if needed > self.size:
            return InvalidModel(f"{self.what}: {message}")
        return Truncated(f"{self.what}: only its first {self.end} bytes are known", needed)

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
                position += 8  # of the next string's length
                break
            position += 8 + unpack(buffer, position)[0]
        if position > self.end:
            raise self._short(f"the strings of '{key}' run past the end of the file", position)
        self.position = position
