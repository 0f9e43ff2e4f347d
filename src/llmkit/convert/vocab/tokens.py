"""The list of tokens a GGUF carries: one row per id, whatever the tokenizer was."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ...errors import InvalidModel
from ...gguf import Value, ValueType

BLANK = "\u2581"  # how SentencePiece writes a space
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
PADDING_SCORE, ADDED_SCORE = -10000.0, -1000.0


class TokenType(IntEnum):
    """llama.cpp include/llama.h: llama_token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Token:
    """What the GGUF says about one id. `score` ranks merges of SentencePiece models (higher first)."""

    text: str
    type: TokenType = TokenType.NORMAL
    score: float = 0.0


def looks_special(text: str) -> bool:
    """Added tokens that files forget to mark as special (llama.cpp conversion/base.py: does_token_look_special)."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def added(text: str, special: bool, score: float = 0.0) -> Token:
    """An added token: control when special, else text that is matched whole, spelled as it stands in a text."""
    if special or looks_special(text):
        return Token(text, TokenType.CONTROL, score)
    return Token(text.replace(BLANK, " "), TokenType.USER_DEFINED, score)


def is_blanks(text: str) -> bool:
    """Whether `text` is nothing but "▁".

    Such pieces stay ordinary: matched whole, as spaces, they would not be found where a text holds "▁" itself.
    """
    return text.strip(BLANK) == ""


def fill(path: Path, tokens: dict[int, Token], size: int) -> list[Token]:
    """Rows 0 … size - 1; ids nobody has become unused padding. Raises InvalidModel when two ids share a text.

    The engine looks tokens up by text and aborts the process on a duplicate.
    """
    rows = [tokens.get(number) or Token(f"[PAD{number}]", TokenType.UNUSED, PADDING_SCORE) for number in range(size)]
    owner: dict[str, int] = {}
    for number, token in enumerate(rows):
        if (other := owner.setdefault(token.text, number)) != number:
            raise InvalidModel(f"{path}: ids {other} and {number} are both the token {token.text!r}")
    return rows


def columns(rows: Iterable[Token], *, scored: bool) -> dict[str, Value]:
    """tokenizer.ggml.tokens, .scores (SentencePiece only), .token_type."""
    rows = list(rows)
    found = {"tokenizer.ggml.tokens": Value.array(ValueType.STRING, (row.text for row in rows))}
    if scored:
        found["tokenizer.ggml.scores"] = Value.array(ValueType.FLOAT32, (row.score for row in rows))
    found["tokenizer.ggml.token_type"] = Value.array(ValueType.INT32, (row.type for row in rows))
    return found
