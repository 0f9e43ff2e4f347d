"""A backend without a model, for tests and examples: its vocabulary is the 256 bytes, its answers are given.

What it says depends only on the tokens of the sequence, as with a real model: after the n-th `<assistant>` it spells
the n-th answer and ends. So rewinding, sharing, reusing a prefix or asking twice gives what they should. Hidden states
go in equal steps from the code of the token that is read to the code of the token that follows, attention is the same
to all that came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..errors import EngineError, Unsupported
from . import Eval, ModelInfo, Part, Pooling, Rows, TokenKind
from .cells import Cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

BOS, END, ASSISTANT = 256, 257, 258
SPECIAL = {"<s>": BOS, "<end>": END, "<assistant>": ASSISTANT}
_PIECES = [bytes([byte]) for byte in range(256)] + [text.encode() for text in SPECIAL]
_LOGIT = 12.0  # of the token that comes next; all others 0
_WIDTH, _HEADS = 9, 2  # bits of a token's number

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{% endif %}"
    "{{ message.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _codes(tokens: Sequence[int]) -> Floats:
    """Each token's number in bits, -1 and 1 [n, 9]; two tokens' codes multiply to 9 when equal, else to 7 at most."""
    codes: Floats = (2.0 * (np.asarray(tokens, np.int64)[:, None] >> np.arange(_WIDTH) & 1) - 1).astype(np.float32)
    return codes


class Scripted:
    """A Backend that answers `answers` in turn, and ends at once when they are used up."""

    def __init__(
        self,
        answers: Sequence[str | bytes],
        *,
        template: str | None = TEMPLATE,
        add_bos: bool = False,
        can_rewind: bool = True,
        n_layer: int = 2,
    ) -> None:
        self.answers = [answer.encode() if isinstance(answer, str) else answer for answer in answers]
        self.can_rewind = can_rewind
        self.info = ModelInfo(
            architecture="scripted",
            name="scripted",
            n_layer=n_layer,
            n_embd=_WIDTH,
            n_vocab=len(_PIECES),
            n_ctx_train=4096,
            n_params=0,
            weight_nbytes=0,
            chat_template=template,
            bos=BOS,
            eos=frozenset({END}),
            eos_token=END,
            add_bos=add_bos,
            n_head=_HEADS,
            engine="scripted",
        )

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Bytes, and the special tokens where they are spelled out."""
        found = [BOS] if bos and self.info.add_bos else []
        position, raw = 0, text.encode()
        while position < len(raw):
            token = next(
                (id for name, id in SPECIAL.items() if special and raw.startswith(name.encode(), position)), None
            )
            found.append(raw[position] if token is None else token)
            position += 1 if token is None else len(_PIECES[token])
        return found

    def piece(self, token: int) -> bytes:
        """The byte, or the special token's name."""
        return _PIECES[token]

    def kind(self, token: int) -> TokenKind:
        """The special tokens are control tokens, bytes above 127 are halves of characters."""
        return "control" if token >= BOS else "byte" if token >= 128 else "normal"

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> ScriptedSession:
        """A new, empty context."""
        return ScriptedSession(self, context, sequences)

    def embed(self, tokens: Sequence[int]) -> Floats:
        """The tokens' codes: their numbers in bits, -1 and 1 [n, 9]."""
        return _codes(tokens)

    def unembed(self, hidden: Floats) -> Floats:
        """Of the last layer exactly the logits; of those before what their place on the way says."""
        near = np.asarray(hidden, np.float32) @ _codes(range(len(_PIECES))).T
        logits: Floats = (_LOGIT * np.maximum(0, near - (_WIDTH - 2)) / 2).astype(np.float32)
        return logits

    def pool(self, tokens: Sequence[int], how: Pooling | None = None) -> Floats:
        """The mean of the last layer's rows, or the first or the last of them."""
        last = self.info.n_layer - 1
        rows = self.session(len(tokens)).eval(tokens, layers=(last,)).hidden[last]
        return np.asarray({"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[how or "mean"], np.float32)

    def grammar(self, text: str) -> NoReturn:
        """There is none."""
        raise Unsupported("the scripted backend has no grammars")

    def next_token(self, tokens: Sequence[int]) -> int:
        """What follows `tokens`: the next byte of the answer that has begun, else the end."""
        turn = list(tokens).count(ASSISTANT)
        if not 1 <= turn <= len(self.answers):
            return END
        said = len(tokens) - 1 - max(index for index, token in enumerate(tokens) if token == ASSISTANT)
        answer = self.answers[turn - 1]
        return answer[said] if said < len(answer) else END

    def close(self) -> None:
        """Nothing is held."""


class ScriptedSession:
    """A Session that keeps its tokens in lists. `evaluated` counts the tokens given to it so far."""

    def __init__(self, backend: Scripted, context: int, sequences: int = 1) -> None:
        self.backend = backend
        self.context = context
        self.sequences = sequences
        self.held: list[list[int]] = [[] for _ in range(sequences)]
        self.evaluated = 0
        self._cells = Cells(sequences)
        self._closed = False

    @property
    def n(self) -> int:
        """Tokens held in sequence 0."""
        return len(self.held[0])

    @property
    def tokens(self) -> list[int]:
        """Those of sequence 0."""
        return self.held[0]

    def length(self, sequence: int = 0) -> int:
        """See Session."""
        return len(self._open(sequence))

    def _open(self, sequence: int) -> list[int]:
        """The sequence's tokens. Raises EngineError after `close`."""
        if self._closed:
            raise EngineError("the session has been closed")
        return self.held[sequence]

    def eval(
        self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> Eval:
        """See Session; layers and attention can be asked of any session."""
        if attention and self.n:
            raise ValueError("attention can be asked for only in an empty session")
        following = self._append(0, tokens)
        codes, steps, n = _codes(tokens), self.backend.info.n_layer, len(tokens)
        hidden = {
            layer: (codes + (_codes(following) - codes) * np.float32((layer + 1) / steps)).astype(np.float32)
            for layer in layers
        }
        even = (np.tri(n) / np.arange(1, n + 1)[:, None]).astype(np.float32)
        return Eval(self._logits(following, logits), hidden, {layer: np.stack([even] * _HEADS) for layer in attention})

    def eval_parts(self, parts: Sequence[Part]) -> list[Floats]:
        """See Session."""
        return [self._logits(self._append(part.sequence, part.tokens), part.logits) for part in parts]

    def _append(self, sequence: int, tokens: Sequence[int]) -> list[int]:
        """Hold `tokens`; what follows each of them."""
        used = self._cells.used
        if used + len(tokens) > self.context:
            raise EngineError(f"the context is full: {used} of {self.context}, {len(tokens)} more were to follow")
        held, following = self._open(sequence), list[int]()
        for token in tokens:
            held.append(token)
            following.append(self.backend.next_token(held))
        self._cells.append(sequence, len(tokens))
        self.evaluated += len(tokens)
        return following

    def _logits(self, following: list[int], rows: Rows) -> Floats:
        first = {"all": 0, "last": len(following) - 1, "none": len(following)}[rows]
        logits = np.zeros((len(following) - first, self.backend.info.n_vocab), np.float32)
        logits[np.arange(len(logits)), following[first:]] = _LOGIT
        return logits

    def share(self, source: int, target: int) -> None:
        """See Session."""
        if self._open(source) is not self._open(target):
            self.held[target] = list(self.held[source])
            self._cells.share(source, target)

    def rewind(self, n: int, sequence: int = 0) -> bool:
        """See Session; only 0 works when the backend cannot rewind."""
        if n not in (0, self.length(sequence)) and not self.backend.can_rewind:
            return False
        del self.held[sequence][n:]
        self._cells.rewind(sequence, n)
        return True

    def close(self) -> None:
        """Nothing can be asked of it any more but `n`."""
        self._closed = True
