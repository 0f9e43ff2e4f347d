"""Byte-level BPE (GPT-2, Llama 3, Qwen): tokenizer.ggml.model = "gpt2". Facts: llama.cpp conversion/base.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import pretokenizers
from .tokenizer_json import AddedToken, TokenizerJson
from .tokens import Token, added

_SPACE = chr(ord(" ") + 256)  # how byte-level BPE writes a space


def is_byte_level(source: TokenizerJson) -> bool:
    """Whether the decoder turns tokens back into bytes, GPT-2's way."""
    return "ByteLevel" in _kinds(source.document.get("decoder")) and not source.byte_fallback


def tokens(source: TokenizerJson) -> dict[int, Token]:
    """Rows by id."""
    rows = {number: Token(text) for text, number in source.vocab.items()}
    tokenizer = pretokenizers.load(source.path) if any(not token.normalized for token in source.added) else None
    for token in source.added:
        text = token.content if token.normalized else _as_written(tokenizer, token, source.path)
        rows[token.id] = added(text, token.special)
    return rows


def merges(source: TokenizerJson) -> Iterable[str]:
    """Merges as the engine reads them: two parts and a space between; a space in a part takes its byte-level form."""
    return (f"{left.replace(' ', _SPACE)} {right.replace(' ', _SPACE)}" for left, right in source.merges)


def _as_written(tokenizer: Any, token: AddedToken, path: Path) -> str:
    """How an added token that skips the normalizer looks in a text: what it decodes to, if that encodes back."""
    if tokenizer.token_to_id(token.content) != token.id:
        return token.content
    text = str(tokenizer.decode([token.id], skip_special_tokens=False))
    return text if text and pretokenizers.encode(tokenizer, text, path) == [token.id] else token.content


def _kinds(step: Any) -> list[str]:
    """Types of a decoder and of those inside it."""
    if not isinstance(step, dict):
        return []
    inner = step.get("decoders")
    children = inner if isinstance(inner, list) else []
    return [str(step.get("type")), *(kind for child in children for kind in _kinds(child))]
