"""inspection/tokens: pieces, spans and counts, against the package tokenizers and the text itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends import Backend
from llmkit.backends.scripted import BOS, Scripted
from llmkit.errors import LlmkitError, Unsupported
from llmkit.inspection import tokens

TEXTS = ("The capital of France is", "naïve 東京 🙂🏽\n\tend ", " leading", "a\0b\u200d\ufe0f", "<|im_start|>user\nHi")


# ── pieces ──


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (b" the", "␣the"),
        (b"\r\n\t", "␍↵⇥"),
        ("東".encode(), "東"),
        ("東".encode()[:2], "‹e6 9d›"),
        (b" \xe6\x9d", "␣‹e6 9d›"),
        (b"\xb1!", "‹b1›!"),
        (b"\xff\xc0\x80", "‹ff c0 80›"),
        (b"\xed\xa0\x80", "‹ed a0 80›"),  # a surrogate is no character
        (b"\xf4\x90\x80\x80", "‹f4 90 80 80›"),  # beyond Unicode
        ("\u200b\x1b[2J".encode(), "‹U+200B›‹U+001B›[2J"),
        (b"\xc2\xa0", "‹U+00A0›"),
        (b"", ""),
    ],
)
def test_nothing_hides_in_a_piece(piece: bytes, expected: str) -> None:
    assert tokens.visible(piece) == expected


@given(st.text(max_size=12).filter(lambda text: text.encode("utf-8", "replace").decode() == text))
def test_what_is_shown_prints_and_plain_words_stay_as_they_are(text: str) -> None:
    shown = tokens.visible(text.encode())
    assert shown.isprintable() and "\n" not in shown
    spelled = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    if all(char.isprintable() or char in spelled for char in text):
        assert shown == "".join(spelled.get(char, char) for char in text)


# ── spans ──


def test_the_golden_text(smol: Backend) -> None:
    cut = tokens.tokenize(smol, TEXTS[0])
    assert cut.ids == (504, 3575, 282, 4649, 314)
    assert [token.piece for token in cut.tokens] == ["The", "␣capital", "␣of", "␣France", "␣is"]
    assert [(token.start, token.end) for token in cut.tokens] == [(0, 3), (3, 11), (11, 14), (14, 21), (21, 24)]
    assert (cut.characters_per_token, cut.bytes_per_token, cut.faithful) == (24 / 5, 24 / 5, True)


@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_those_of_the_package_tokenizers(smol: Backend, smollm2_folder: Path, text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    oracle = tokenizers.Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    expected = oracle.encode(text, add_special_tokens=False)
    cut = tokens.tokenize(smol, text, special=True)
    assert list(cut.ids) == expected.ids
    ours = [(token.start, token.end) for token in cut.tokens]
    # that package leaves the leading space out of a token's offsets
    trimmed = [
        (start + (len(text[start:end]) - len(text[start:end].lstrip(" "))), end) if start is not None else None
        for start, end in ours
    ]
    assert [tuple(span) for span in expected.offsets] in (ours, trimmed)
    assert cut.faithful


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "llama3", "qwen3", "smollm"])
def test_every_kind_of_vocabulary_covers_the_text(
    tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, family: str
) -> None:
    backend = backends.load(gguf_of(tiny_checkpoint(family), "f32"), n_threads=1)
    try:
        for text in TEXTS[:3]:
            raw = text.encode()
            cut = tokens.tokenize(backend, text, bos=True)
            for token in cut.tokens:
                if token.first is None or token.last is None:
                    continue
                assert token.start is not None and token.end is not None
                assert token.bytes in (raw[token.first : token.last], b" " + raw[token.first : token.last])
                characters = text[token.start : token.end].encode()
                assert len(characters) >= token.last - token.first
                assert raw[token.first : token.last] in characters
            if cut.faithful:
                spans = [(token.first, token.last) for token in cut.tokens if token.first is not None]
                assert b"".join(raw[first:last] for first, last in spans) == raw
            if family != "llama3":  # its tiny vocabulary may lack bytes
                assert cut.faithful or any(token.kind == "unknown" for token in cut.tokens)
    finally:
        backend.close()


def test_a_beginning_mark_is_not_in_the_text() -> None:
    cut = tokens.tokenize(Scripted([], add_bos=True), "hé", bos=True)
    assert cut.ids == (BOS, ord("h"), 0xC3, 0xA9)
    assert [(token.start, token.end, token.kind) for token in cut.tokens] == [
        (None, None, "control"), (0, 1, "normal"), (1, 2, "byte"), (1, 2, "byte"),
    ]  # fmt: skip
    assert cut.faithful and cut.nbytes == 3 and cut.characters == 2


class Changing(Scripted):
    """A tokenizer that drops what it does not know and lower-cases, as some do."""

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """One token a letter; a star for what is unknown."""
        return [ord(char.lower()) if char.isascii() else ord("*") for char in text]


def test_a_tokenizer_that_changes_the_text_is_told(smol: Backend) -> None:
    cut = tokens.tokenize(Changing([]), "abĀcD")
    assert not cut.faithful
    assert cut.tokens[0].start == 0 and cut.tokens[2].start is None


# ── side by side ──


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30).filter(lambda text: text.isprintable() and text))
def test_side_by_side_loses_nothing(text: str) -> None:
    pairs = Pairs([])
    cut = [tokens.tokenize(Scripted([]), text), tokens.tokenize(pairs, text)]
    stretches = tokens.side_by_side(cut)
    assert b"".join(piece for stretch in stretches for id in stretch.ids[0] for piece in [bytes([id])]) == text.encode()
    for number, each in enumerate(cut):
        assert tuple(id for stretch in stretches for id in stretch.ids[number]) == each.ids


class Pairs(Scripted):
    """Two bytes a token."""

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Ids above the bytes name pairs."""
        raw = text.encode()
        self.pairs = [raw[place : place + 2] for place in range(0, len(raw), 2)]
        return list(range(len(self.pairs)))

    def piece(self, token: int) -> bytes:
        """The pair."""
        return self.pairs[token]


def test_only_the_same_text_can_be_compared(smol: Backend) -> None:
    with pytest.raises(LlmkitError, match="same text"):
        tokens.side_by_side([tokens.tokenize(smol, "a"), tokens.tokenize(smol, "b")])


# ── words ──


def test_a_word_is_taken_as_in_running_text(smol: Backend) -> None:
    assert tokens.find(smol, "Paris") == tokens.find(smol, " Paris") == tokens.find(smol, "#7042") == 7042
    assert tokens.find(smol, "<|im_start|>") == 1
    assert smol.piece(tokens.find(smol, "\n")) == b"\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [("Donaudampfschiff", "no single token"), ("", "empty"), ("#49152", "not in a vocabulary"), ("#-1", "no single")],
)
def test_words_that_are_no_token_are_explained(smol: Backend, word: str, message: str) -> None:
    with pytest.raises(LlmkitError, match=message):
        tokens.find(smol, word)


def test_an_empty_text_and_a_model_without_vocabulary(smol: Backend, tmp_path: Path) -> None:
    from test_vetting import tiny_llama

    with pytest.raises(LlmkitError, match="empty"):
        tokens.tokenize(smol, "")
    backend = backends.load(tiny_llama(tmp_path / "none.gguf"), n_threads=1)
    with pytest.raises(Unsupported, match="no vocabulary"):
        tokens.tokenize(backend, "x")
    backend.close()
