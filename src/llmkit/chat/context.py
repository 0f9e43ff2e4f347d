"""What the engine holds of a conversation: one session, the tokens in it, and what of a prompt is there already.

A session that failed is closed and made anew when it is next needed; what it held is evaluated again then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend, Session
from ..errors import EngineError, Unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


DEFAULT_CONTEXT = 4096
_ONE = (1, 1)


class Context:
    """`size` tokens of a backend's memory. Raises EngineError when it does not fit there."""

    def __init__(self, backend: Backend, size: int) -> None:
        self.backend = backend
        self.size = size
        self.fills = 0  # so often has `fill` been called: what it holds may be another conversation
        self._held: list[int] = []  # the tokens in the session
        self._calls: list[tuple[int, int]] = []  # tokens of each evaluation, and how many of them are still held
        self._session: Session | None = backend.session(size)

    @property
    def n(self) -> int:
        """Tokens held."""
        return 0 if self._session is None else self._session.n

    @property
    def held(self) -> tuple[int, ...]:
        """The tokens held."""
        return tuple(self._held)

    @property
    def calls(self) -> tuple[tuple[int, int], ...]:
        """How they came: tokens evaluated at once (engines round by that), and how many of those are still held."""
        return tuple(self._calls)

    def fill(self, tokens: list[int]) -> tuple[int, Floats]:
        """Make it hold exactly `tokens`; how many of them it held already, and the logits [V] after the last.

        The last one is always evaluated. Raises EngineError, also for logits that are no numbers.
        """
        self.fills += 1
        session = self._session = self._session or self.backend.session(self.size)
        try:
            reused = min(_shared(self._held, tokens), len(tokens) - 1)
            if not session.rewind(reused):
                session.rewind(reused := 0)
        except EngineError:
            self._fail()
            raise
        self._cut(reused)
        return reused, self._eval(session, tokens[reused:])

    def next(self, token: int) -> Floats:
        """The logits [V] after one token more. Raises EngineError."""
        if self._session is None:
            raise EngineError("the session has been closed")
        return self._eval(self._session, [token])

    def _eval(self, session: Session, tokens: list[int]) -> Floats:
        try:
            row: Floats = session.eval(tokens).logits[-1]
            if len(tokens) > 1 and not np.isfinite(row.max()):  # of single ones the sampler asks
                raise EngineError("the model's output is not a number", "The file may be damaged.")
        except EngineError:
            self._fail()
            raise
        except BaseException:  # Ctrl-C: the session knows how far it came
            came = tokens[: session.n - len(self._held)]
            if came:
                self._calls.append((len(tokens), len(came)))
            self._held += came
            raise
        self._held += tokens
        self._calls.append(_ONE if len(tokens) == 1 else (len(tokens), len(tokens)))
        return row

    def _cut(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        gone = len(self._held) - count
        del self._held[count:]
        while gone > 0:
            size, kept = self._calls.pop()
            if kept > gone:
                self._calls.append((size, kept - gone))
            gone -= kept

    def _fail(self) -> None:
        self.close()
        self._session = None

    def close(self) -> None:
        """Free the session. A later `fill` makes another."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self._held.clear()
        self._calls.clear()


def _shared(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for index, (one, other) in enumerate(zip(held, wanted, strict=False)):
        if one != other:
            return index
    return min(len(held), len(wanted))


def usual_context(backend: Backend, most: int = DEFAULT_CONTEXT) -> int:
    """`most` tokens, or as many as the model was trained on."""
    return min(backend.info.n_ctx_train or most, most)


def check_writes(backend: Backend) -> None:
    """Raise Unsupported for a model that only reads."""
    info = backend.info
    if not info.generates:
        raise Unsupported(
            f"{info.name}: makes vectors of texts ({info.architecture}), it cannot write an answer",
            "Its vectors: llmkit inspect embeddings",
        )
