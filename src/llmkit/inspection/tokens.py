"""How a model cuts a text into tokens: ids, bytes, pieces, kinds, and which characters each one covers.

Pieces are written so that nothing hides: ␣ is a space, ↵ a new line, ⇥ a tab, ‹e6 9d› bytes that are no character yet.
A model sees the ids alone. Everything is counted from the model's own vocabulary; nothing is estimated.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..backends import Backend, TokenKind
from ..errors import LlmkitError, Unsupported

_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Token:
    """A token of a text. [start, end) are the characters it has bytes of, [first, last) those bytes in UTF-8.

    The spans are None for what the text does not hold: a beginning mark, or pieces where the tokenizer changed it.
    """

    index: int
    id: int
    bytes: bytes
    piece: str
    kind: TokenKind
    start: int | None = None
    end: int | None = None
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True)
class Tokenization:
    """A text as `model` sees it. `faithful`: the tokens' bytes put together are the text's."""

    model: str
    text: str
    characters: int
    nbytes: int
    tokens: tuple[Token, ...]
    faithful: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """What the model is given."""
        return tuple(token.id for token in self.tokens)

    @property
    def characters_per_token(self) -> float:
        """More means that the vocabulary knows this language better."""
        return self.characters / len(self.tokens) if self.tokens else 0.0

    @property
    def bytes_per_token(self) -> float:
        """As characters per token, comparable between scripts."""
        return self.nbytes / len(self.tokens) if self.tokens else 0.0


@dataclass(frozen=True)
class Odds:
    """A token and its probability: raw (the model's own, before any sampler) where its place does not say otherwise."""

    id: int
    piece: str
    probability: float


@dataclass(frozen=True)
class Stretch:
    """The shortest piece of the text at whose two ends all models cut: `ids` holds one tuple of ids for each model."""

    text: str
    pieces: tuple[tuple[str, ...], ...]
    ids: tuple[tuple[int, ...], ...]


def tokenize(backend: Backend, text: str, *, special: bool = False, bos: bool = False) -> Tokenization:
    """Cut `text`. `special`: marks such as <|im_start|> in it are single tokens; `bos`: begin as the model expects.

    Raises LlmkitError for an empty text, Unsupported for a model without a vocabulary.
    """
    if not text:
        raise LlmkitError("the text is empty, so it has no tokens", "Give a text, or - to read it from the input.")
    raw = text.encode("utf-8", "replace")
    tokens = rows(backend, backend.encode(text, special=special, bos=bos), text)
    return Tokenization(backend.info.name, text, len(text), len(raw), tokens, _faithful(tokens, len(raw)))


def _faithful(tokens: Sequence[Token], nbytes: int) -> bool:
    place = 0
    for token in tokens:
        if token.first is None and token.kind == "control":
            continue
        if token.first != place or token.last is None:
            return False
        place = token.last
    return place == nbytes


def rows(backend: Backend, ids: Sequence[int], text: str) -> tuple[Token, ...]:
    """The tokens `ids`, which were made of `text`, with their spans in it."""
    pieces = [backend.piece(id) for id in ids]
    raw = text.encode("utf-8", "replace")
    character = _characters(raw)
    made = []
    for index, (id, span) in enumerate(zip(ids, _spans(pieces, raw), strict=True)):
        first, last = span if span else (None, None)
        start = None if first is None else character[first]
        # a byte in the middle of a character belongs to it
        end = None if last is None or first is None else character[last - 1] + 1 if last > first else start
        made.append(Token(index, id, pieces[index], visible(pieces[index]), backend.kind(id), start, end, first, last))
    return tuple(made)


def _characters(raw: bytes) -> list[int]:
    """For each byte the number of its character, and one more for the end."""
    numbers, count = [], -1
    for byte in raw:
        count += byte & 0xC0 != 0x80
        numbers.append(count)
    return [*numbers, count + 1]


def _spans(pieces: Sequence[bytes], raw: bytes) -> Iterator[tuple[int, int] | None]:
    """Where each piece lies in `raw`, in order; None for pieces that are not there.

    A piece may bring a space that is not in the text (SentencePiece puts one before the first word). After a piece that
    was lost (an unknown character, a normalised one) the next that can be found goes on.
    """
    place, lost = 0, False
    for index, piece in enumerate(pieces):
        found = place if piece and raw.startswith(piece, place) else -1
        if found < 0 and index < 2 and piece[:1] == b" " and raw.startswith(piece[1:], place):
            found, piece = place, piece[1:]
        if found < 0 and lost and len(piece) > 1:
            found = raw.find(piece, place, place + 64)
        lost = lost or found < 0
        if found < 0:
            yield None
        else:
            place, lost = found + len(piece), False
            yield found, place


def visible(piece: bytes) -> str:
    """A piece in which whitespace, half characters and what does not print can be seen."""
    shown: list[str] = []
    place = 0
    while place < len(piece):
        size = _whole(piece, place)
        if size:
            shown.append(_character(piece[place : place + size].decode("utf-8")))
            place += size
            continue
        begin = place
        while place < len(piece) and not _whole(piece, place):
            place += 1
        shown.append(f"‹{piece[begin:place].hex(' ')}›")
    return "".join(shown)


def _whole(piece: bytes, place: int) -> int:
    """The length of the character at `place`, 0 where there is no whole one."""
    lead = piece[place]
    size = 1 if lead < 0x80 else 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if lead < 0xF5 else 0
    try:
        return size if len(piece[place : place + size].decode("utf-8")) == 1 else 0
    except UnicodeDecodeError:
        return 0


def _character(char: str) -> str:
    if char in _VISIBLE:
        return _VISIBLE[char]
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp")
    return f"‹U+{ord(char):04X}›" if hidden else char


def side_by_side(cut: Sequence[Tokenization]) -> tuple[Stretch, ...]:
    """The same text cut by several models, in the shortest stretches that end at the same place for all.

    Raises LlmkitError when the texts differ.
    """
    if len({each.text for each in cut}) != 1:
        raise LlmkitError("only the same text can be compared between models")
    raw = cut[0].text.encode("utf-8", "replace")
    boundaries = set.intersection(*(_boundaries(each, len(raw)) for each in cut))
    found, begin = [], 0
    for end in sorted(boundaries - {0}):
        inside = [[token for token in each.tokens if _within(token, begin, end)] for each in cut]
        found.append(
            Stretch(
                raw[begin:end].decode("utf-8", "backslashreplace"),
                tuple(tuple(token.piece for token in tokens) for tokens in inside),
                tuple(tuple(token.id for token in tokens) for tokens in inside),
            )
        )
        begin = end
    return tuple(found)


def _boundaries(cut: Tokenization, nbytes: int) -> set[int]:
    """Ends of tokens, without those that lie in a stretch the model does not spell."""
    ends = {0, nbytes}
    ends.update(token.last for token in cut.tokens if token.last is not None)
    return ends


def _within(token: Token, begin: int, end: int) -> bool:
    return token.first is not None and token.last is not None and begin <= token.first and token.last <= end


def position_of(count: int, position: int | None) -> int:
    """A position in a text of `count` tokens, counted from 0: default the last, negative from the end.

    Raises LlmkitError for one outside the text.
    """
    place = count - 1 if position is None else position + count * (position < 0)
    if not 0 <= place < count:
        raise LlmkitError(
            f"position {position} is outside the text, which has {count} token{'s' * (count != 1)}",
            f"Give one from 0 to {count - 1}, or from -1 to -{count} from its end." if count else "The text is empty.",
        )
    return place


def find(backend: Backend, word: str) -> int:
    """The one token that is `word`: as it stands in running text (with a space before), else as typed; #7042 is an id.

    Raises LlmkitError naming the tokens it is made of where there is no such one.
    """
    vocabulary = backend.info.n_vocab
    if word.startswith("#") and word[1:].isdecimal():
        if int(word[1:]) >= vocabulary:
            raise LlmkitError(f"token {word} is not in a vocabulary of {vocabulary:,}")
        return int(word[1:])
    if not word:
        raise LlmkitError("the word is empty: no token is", "Give a word, or an id such as #42.")
    spelled = [word] if word[:1].isspace() else [f" {word}", word]
    ways = [backend.encode(each, special=True) for each in spelled]
    for text, ids in zip(spelled, ways, strict=True):
        if len(ids) == 1 and backend.kind(ids[0]) != "unknown" and _is(backend.piece(ids[0]), text):
            return ids[0]
    cut = min(ways, key=len)
    if not cut:
        raise Unsupported(f"the vocabulary has nothing for {word!r}")
    parts = " + ".join(visible(backend.piece(id)) for id in cut)
    raise LlmkitError(
        f"{word!r} is no single token of this vocabulary: it is {len(cut)}, {parts}",
        "Take one of these by its id: " + ", ".join(f"#{id}" for id in cut[:8]),
    )


def _is(piece: bytes, text: str) -> bool:
    """Whether the piece spells the text; a space before it does not matter (some vocabularies add one themselves)."""
    return piece.strip(b" ") == text.strip(" ").encode("utf-8", "replace") or piece == text.encode("utf-8", "replace")
