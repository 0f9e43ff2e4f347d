"""One answer on its way: from logits to Steps, token after token. The loop costs little beside the engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from .answer import Alternative, Finish, Step, Turn
from .context import Context
from .details import describe
from .reasoning import Reading
from .sampling import Sampler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


@dataclass
class Generation:
    """An answer being generated. `history` and `steps` grow; both begin with what is given already.

    `history`: the prompt's tokens and the steps'. `turn`: what is known of it before the first token.
    """

    context: Context
    sampler: Sampler
    reading: Reading
    turn: Turn
    history: list[int]
    steps: list[Step] = field(default_factory=list)
    n_alternatives: int = 0
    began: float = field(default_factory=perf_counter)
    _generated: int = 0
    _ms: float = 0.0
    _first_ms: float = 0.0
    _finish: Finish | None = None

    def now(self) -> Turn:
        """The Turn so far."""
        return replace(
            self.turn,
            generated=self._generated,
            generated_ms=self._ms,
            first_ms=self._first_ms,
            finish=self._finish,
        )

    def run(self, logits: Floats, first: int | None = None) -> Iterator[Step]:
        """Generate until the answer ends. `logits` [V] follow `history`; `first` is set as the first token, if given.

        Raises EngineError; what has come until then stays.
        """
        step = self._step(logits, perf_counter(), first)
        self._first_ms = 1000 * (perf_counter() - self.began)
        yield step
        next_logits = self.context.next
        while step.finish is None:
            began = perf_counter()  # the reader's time is not the model's
            step = self._step(next_logits(step.id), began)
            self._ms += step.ms
            yield step

    def _step(self, logits: Floats, began: float, given: int | None = None) -> Step:
        """Choose the next token (or take the given one) and describe it."""
        if given is None:
            choice = self.sampler.choose(logits, self.history)
            token, probability = choice.token, choice.probability
        else:
            self.sampler.accept(given)
            token, probability = given, math.nan
        backend = self.context.backend
        piece = backend.piece(token)
        self.history.append(token)
        self._generated += 1
        ended = token in backend.info.eos
        text, thinking = ("", False) if ended else self.reading.feed(piece)
        finish: Finish | None = "end" if ended else self._ends()
        if finish is not None:
            rest, kind = self.reading.finish()
            text, thinking, self._finish = text + rest, kind if rest else thinking, finish
        if self.n_alternatives:
            details = describe(logits, token, min(self.n_alternatives, len(logits)))
            logprob, rank, entropy = details.logprob, details.rank, details.entropy
            others = alternatives(details.ids, details.logprobs, self.context)
        else:
            logprob, rank, entropy, others = math.nan, 0, math.nan, ()
        ms = 1000 * (perf_counter() - began)
        step = Step(token, piece, text, logprob, others, entropy, ms, finish, rank, probability, thinking)
        self.steps.append(step)
        return step

    def _ends(self) -> Finish | None:
        """Why the answer ends with the token just chosen, if it does."""
        if self.reading.stopped:
            return "stop"
        if self._generated == self.sampler.sampling.max_tokens:
            return "length"
        return "context" if self.context.n >= self.context.size else None


def alternatives(ids: NDArray[np.int64], logprobs: NDArray[np.float64], context: Context) -> tuple[Alternative, ...]:
    """The tokens of a row of details, with their pieces."""
    piece = context.backend.piece
    return tuple([Alternative(id, piece(id), logprob) for id, logprob in zip(ids.tolist(), logprobs.tolist())])  # noqa: B905


def likeliest(logits: Floats, other_than: frozenset[int]) -> int:
    """The likeliest token that is none of those."""
    allowed = logits.copy()
    allowed[list(other_than)] = -np.inf
    return int(allowed.argmax())


def before_stop(steps: Sequence[Step], stop: Sequence[str]) -> int:
    """How many of the steps come before the stop string that ended them."""
    raw = b"".join(step.piece for step in steps)
    found = [at for word in stop if word and (at := raw.find(word.encode())) >= 0]
    end, position = min(found, default=len(raw)), 0
    for index, step in enumerate(steps):
        position += len(step.piece)
        if position > end:
            return index
    return len(steps)
