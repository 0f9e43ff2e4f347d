"""chat/streams.py: bytes become text, never half a character, never part of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.chat.streams import TextStream, whole


@pytest.mark.parametrize("text", ["naïve", "東京 🙂🏽", "e\u0301\u200d", "plain"])
def test_half_characters_are_never_given(text: str) -> None:
    stream = TextStream()
    parts = [stream.feed(bytes([byte])) for byte in text.encode()]
    assert "".join(parts) == text == stream.text
    assert all(part in text and "\ufffd" not in part for part in parts)


def test_an_unfinished_character_is_dropped_at_the_end() -> None:
    stream = TextStream()
    assert stream.feed("a🙂".encode()[:3]) == "a"
    assert stream.finish() == "" and stream.text == "a"


def test_bytes_that_are_no_text_are_marked_once() -> None:
    stream = TextStream()
    assert stream.feed(b"a\xffb") == "a\ufffdb"


def test_a_possible_stop_string_is_held_back() -> None:
    stream = TextStream(["<end>", "\nUser:"])
    assert [stream.feed(piece) for piece in (b"a<", b"e", b"x<en")] == ["a", "", "<ex"]
    assert stream.feed(b"d>zzz") == "" and stream.stopped
    assert stream.feed(b"more") == "" == stream.finish()
    assert stream.text == "a<ex"


def test_what_was_held_back_comes_at_the_end() -> None:
    stream = TextStream(["\nUser:"])
    assert stream.feed(b"Hi\nUs") == "Hi"
    assert stream.finish() == "\nUs"


@settings(max_examples=300, deadline=None)
@given(st.text("ab<>é🙂", max_size=30), st.lists(st.text("ab<>é", min_size=1, max_size=3), max_size=3), st.data())
def test_streams_cut_at_the_first_stop_string_however_the_bytes_come(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    stream, given = TextStream(stop), ""
    for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        given += stream.feed(raw[begin:end])
    given += stream.finish()
    assert given == stream.text
    assert text.startswith(given)
    assert not any(word in given for word in stop)
    if not any(word in text for word in stop):
        assert given == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_whole_text_stays_and_halves_are_marked(text: str) -> None:
    assert whole(text) == text
    assert whole(f"{text}\udc80") == f"{text}\ufffd"
    assert whole(text.encode("utf-16-le").decode("utf-16-le", "surrogatepass")) == text
    assert whole("\ud83d\ude42") == "🙂"
