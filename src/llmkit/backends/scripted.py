"""A backend without a model, for tests and examples: its vocabulary is the 256 bytes, its answers are given.

What it says depends only on the tokens in the context, as with a real model: after the n-th `<assistant>` it spells the
n-th answer and ends. So rewinding, reusing a prefix or asking twice gives what they should.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EngineError
from . import Eval, ModelInfo, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

BOS, END, ASSISTANT = 256, 257, 258
SPECIAL = {"<s>": BOS, "<end>": END, "<assistant>": ASSISTANT}
_PIECES = [bytes([byte]) for byte in range(256)] + [text.encode() for text in SPECIAL]
_LOGIT = 12.0  # of the token that comes next; all others 0

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{% endif %}"
    "{{ message.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
            "scripted", "scripted", n_layer, 8, len(_PIECES), 4096, 0, 0, template, BOS, frozenset({END}), END, add_bos
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

    def session(self, context: int, *, inspect: bool = False) -> ScriptedSession:
        """A new, empty context."""
        return ScriptedSession(self, context)

    def embed(self, tokens: Sequence[int]) -> Floats:
        """The token's id in bits, an array of 8 columns."""
        return (np.asarray(tokens, np.int64)[:, None] >> np.arange(8) & 1).astype(np.float32)

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
    """A Session that keeps its tokens in a list. `evaluated` counts the tokens given to `eval` so far."""

    def __init__(self, backend: Scripted, context: int) -> None:
        self.backend = backend
        self.context = context
        self.tokens: list[int] = []
        self.evaluated = 0

    @property
    def n(self) -> int:
        """Tokens held."""
        return len(self.tokens)

    def eval(self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = ()) -> Eval:
        """See Session. Hidden states are the embeddings plus the layer's number."""
        if self.n + len(tokens) > self.context:
            raise EngineError(f"the context is full: {self.n} of {self.context}, {len(tokens)} more were to follow")
        rows = []
        for token in tokens:
            self.tokens.append(token)
            row = np.zeros(self.backend.info.n_vocab, np.float32)
            row[self.backend.next_token(self.tokens)] = _LOGIT
            rows.append(row)
        self.evaluated += len(tokens)
        first = {"all": 0, "last": len(rows) - 1, "none": len(rows)}[logits]
        hidden = {layer: self.backend.embed(tokens) + np.float32(layer + 1) for layer in layers}
        return Eval(np.stack(rows)[first:], hidden)

    def rewind(self, n: int) -> bool:
        """See Session; only 0 works when the backend cannot rewind."""
        if n not in (0, self.n) and not self.backend.can_rewind:
            return False
        del self.tokens[n:]
        return True

    def close(self) -> None:
        """Forget everything."""
        self.tokens.clear()
