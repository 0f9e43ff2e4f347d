"""tokenizer.model: a SentencePiece model, read without the package sentencepiece, whose interface hides two things we
need: which pieces are user-defined, and what the normalizer does.

Format: protocol buffers, message ModelProto (github.com/google/sentencepiece, src/sentencepiece_model.proto):
  1 pieces {1 piece, 2 score (float), 3 type} · 2 trainer_spec {3 model_type} · 3 normalizer_spec {1 name,
  2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces}
Every length is checked against the message it lies in.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import InvalidModel, Unsupported
from .tokens import ADDED_SCORE, Token, TokenType, added, is_blanks

_MAX_BYTES = 256_000_000
_MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
_TYPES = {int(kind): kind for kind in TokenType}  # sentencepiece numbers its types as the engine does


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in order of id; what happens to a text before it is cut."""

    path: Path
    pieces: tuple[Token, ...]
    adds_space_prefix: bool
    warnings: tuple[str, ...]


def is_sentencepiece_model(path: Path) -> bool:
    """Whether `path` is one: Llama 3 calls a list of base64 words tokenizer.model, too."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(1) == b"\n"  # field 1, length-delimited: the first piece


def read(path: Path) -> SentencePieceModel:
    """Read and check `path`. Raises InvalidModel; Unsupported for unigram models."""
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidModel(f"{path}: is {path.stat().st_size} bytes, too much for a SentencePiece model")
    pieces: list[Token] = []
    model_type: int | bytes = 1
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(path, path.read_bytes(), "the model"):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(path, len(pieces), dict(_fields(path, value, f"piece {len(pieces)}"))))
        elif number == 2 and isinstance(value, bytes):
            model_type = dict(_fields(path, value, "trainer_spec")).get(3, 1)
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(path, value, "normalizer_spec"))
    if not pieces:
        raise InvalidModel(f"{path}: holds no pieces")
    if model_type != 2:
        kind = _MODEL_TYPES.get(model_type, "unknown") if isinstance(model_type, int) else "unknown"
        raise Unsupported(f"{path}: is a SentencePiece model of type {kind}; llmkit converts BPE")
    return SentencePieceModel(path, tuple(pieces), bool(normalizer.get(3, 1)), tuple(_warnings(path, normalizer)))


def tokens(model: SentencePieceModel, added_tokens: Iterable[tuple[int, str, bool]]) -> dict[int, Token]:
    """Rows by id: the pieces, then (id, text, special) tokens that other files of the folder add or redefine."""
    rows = {}
    for number, piece in enumerate(model.pieces):
        whole = piece.type is TokenType.USER_DEFINED
        kept = replace(piece, type=TokenType.NORMAL) if whole and is_blanks(piece.text) else piece
        rows[number] = added(piece.text, False, piece.score) if whole and kept is piece else kept
    for number, text, special in added_tokens:
        if special or not is_blanks(text) or number >= len(model.pieces) or model.pieces[number].text != text:
            rows[number] = added(text, special, ADDED_SCORE)
    return rows


def _warnings(path: Path, normalizer: dict[int, int | bytes]) -> Iterator[str]:
    name = normalizer.get(1, b"")
    if normalizer.get(2):
        rule = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        yield f"{path.name} first normalizes text ({rule}); the engine does not"
    if normalizer.get(4, 1):
        yield f"{path.name} squeezes runs of spaces; the engine does not"


def _piece(path: Path, number: int, fields: dict[int, int | bytes]) -> Token:
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or kind not in _TYPES:
        raise InvalidModel(f"{path}: piece {number} is not a SentencePiece piece")
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise InvalidModel(f"{path}: piece {number} is not UTF-8: {text[:40]!r}") from None
    return Token(decoded, _TYPES[int(kind)], struct.unpack("<f", score)[0])


def _fields(path: Path, message: bytes, what: str) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs: varints as numbers, the rest as bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(path, message, position, what)
        wire = key & 7
        if wire == 0:
            value, position = _varint(path, message, position, what)
            yield key >> 3, value
            continue
        if wire == 2:
            size, position = _varint(path, message, position, what)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise InvalidModel(f"{path}: {what} holds a field of the unknown wire type {wire} at byte {position}")
        if size > len(message) - position:
            raise InvalidModel(f"{path}: {what} is cut short: {size} bytes expected at byte {position}")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(path: Path, message: bytes, position: int, what: str) -> tuple[int, int]:
    value = shift = 0
    for byte in message[position : position + 10]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidModel(f"{path}: {what} holds a broken number at byte {position}")
