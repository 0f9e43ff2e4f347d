"""SentencePiece vocabularies that survive only as tokenizer.json: BPE over raw text, "▁" for spaces, byte tokens.

The engine's SentencePiece tokenizer knows no merges: of all neighbours whose union is a token it joins those with the
highest score first, leftmost first (llama.cpp src/llama-vocab.cpp, llm_tokenizer_spm_session). tokenizer.json was made
from such scores: all ways to build a token stand together in model.merges, tokens in order of score. So the rank of the
first merge that builds a token orders the tokens as the lost scores did; tests compare the ids.
"""

from __future__ import annotations

from typing import Any

from .. import pretokenizers
from .tokenizer_json import TokenizerJson
from .tokens import ADDED_SCORE, BLANK, BYTE_TOKEN, Token, TokenType, added, is_blanks


def is_sentencepiece(source: TokenizerJson) -> bool:
    """Whether `source` writes spaces as "▁" and unknown characters as byte tokens."""
    return source.byte_fallback and BLANK in repr(source.document.get("decoder"))


def tokens(source: TokenizerJson) -> dict[int, Token]:
    """Rows by id, with scores 0, -1, -2 … in the order of model.merges."""
    scores = _scores(source)
    lowest = ADDED_SCORE - len(scores)
    rows = {number: Token(text, _type(text), scores.get(text, lowest)) for text, number in source.vocab.items()}
    if (number := source.vocab.get(source.unk_token or "")) is not None:
        rows[number] = Token(source.unk_token or "", TokenType.UNKNOWN, rows[number].score)
    for token in source.added:
        if token.content not in scores or token.special or not is_blanks(token.content):
            rows[token.id] = added(token.content, token.special, scores.get(token.content, lowest))
    return rows


def _type(text: str) -> TokenType:
    return TokenType.BYTE if BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL


def _scores(source: TokenizerJson) -> dict[str, float]:
    built: dict[str, float] = {}
    for left, right in source.merges:
        built.setdefault(left + right, -float(len(built)))
    return built


def warnings(source: TokenizerJson) -> list[str]:
    """What the engine does differently."""
    built = {left + right for left, right in source.merges}
    matched = {token.content for token in source.added}
    lone = [
        text for text in source.vocab
        if len(text) > 1 and text not in built and text not in matched and not BYTE_TOKEN.fullmatch(text)
    ]  # fmt: skip
    found = [*pretokenizers.normalizer_warnings(source.document, ("Prepend", "Replace"))]
    if lone:
        some = f"{len(lone)} tokens (such as {lone[0]!r})"
        found.append(f"{source.path.name}: no merge builds {some}, the engine may use them")
    for step in _all_steps(source):
        if step.get("type") == "Metaspace" and (scheme := step.get("prepend_scheme", "always")) != "never":
            where = "the first" if scheme == "first" else "those that begin without one"
            found.append(f"the engine puts a space before every stretch of text, the tokenizer only before {where}")
    return found


def adds_space_prefix(source: TokenizerJson) -> bool:
    """Whether a space is put before the text: the normalizer's Prepend, or Metaspace's prepend_scheme."""
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
            and step.get("add_prefix_space", True))
        for step in _all_steps(source)
    )  # fmt: skip


def _all_steps(source: TokenizerJson) -> list[dict[str, Any]]:
    return _steps([source.document.get("normalizer"), source.document.get("pre_tokenizer")])


def _steps(value: Any) -> list[dict[str, Any]]:
    """Normalizers and pre-tokenizers, with those inside sequences."""
    if isinstance(value, list):
        return [step for item in value for step in _steps(item)]
    if not isinstance(value, dict):
        return []
    return [value, *_steps(value.get("normalizers")), *_steps(value.get("pretokenizers"))]
