"""Bytes of tokens become text that may be shown: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Takes the bytes of one token after another; gives the text that is safe to show.

    `stopped` is true once a stop string has come; it and all after it is dropped. `text` is everything given so far.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(filter(None, stop))
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """The text that `piece` sets free: perhaps none yet, perhaps more than its own."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(piece)
        ends = [position for word in self._stop if (position := self._held.find(word)) >= 0]
        if ends:
            self.stopped = True
            return self._give(min(ends))
        return self._give(len(self._held) - held_back(self._held, self._stop))

    def finish(self) -> str:
        """What was held back, at the end of an answer. An unfinished character is dropped."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given


def whole(text: str) -> str:
    """`text` with halves of characters (lone surrogates, of a terminal or a browser) joined, or marked U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def held_back(text: str, words: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `words`."""
    for size in range(min(len(text), max(map(len, words), default=1) - 1), 0, -1):
        end = text[-size:]
        if any(word.startswith(end) for word in words):
            return size
    return 0
