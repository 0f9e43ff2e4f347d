"""One answer being written in a slot: from rows of logits to the events of its job. Knows nothing of sessions."""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..backends import Backend
from ..chat.answer import Alternative, Finish, Step, Turn
from ..chat.details import describe
from ..chat.reasoning import Reading
from ..chat.sampling import Sampler, fresh_seed
from ..chat.streams import TextStream
from ..errors import EngineError, LlmkitError
from .jobs import Begun, Echo, Ended, Failed, Job, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


class Writing:
    """A job under way. `history`: the prompt and the tokens chosen; `done`: how many of them are evaluated.

    Raises the errors of Sampler.
    """

    def __init__(self, job: Job, backend: Backend) -> None:
        request = job.request
        self.job = job
        self.history = list(request.prompt)
        self.generated = 0
        self._backend = backend
        self._seed = fresh_seed() if request.sampling.seed is None else request.sampling.seed
        self._sampler = Sampler(request.sampling, backend=backend, seed=self._seed, turn=request.variation)
        self._text = Reading(request.stop, request.form) if request.reads else TextStream(request.stop)
        self._echo = _Echo(request, backend) if request.echo else None
        self._asked = perf_counter()
        self._began = self._read = self._first = self._last = self._asked
        self._reused = 0
        self._finish: Finish | None = None

    @property
    def request(self) -> Request:
        """What is wanted."""
        return self.job.request

    @property
    def reading(self) -> bool:
        """Whether its prompt is still being evaluated."""
        return self.generated == 0

    @property
    def reuses(self) -> bool:
        """Whether it may begin with what is held: not where every token's logits are to be shown."""
        return self._echo is None

    @property
    def seeded(self) -> bool:
        """Whether the same tokens are expected when it is asked again."""
        return self.request.sampling.seed is not None

    @property
    def wants_all_rows(self) -> bool:
        """Whether the logits of the whole prompt are to be shown."""
        return self._echo is not None and self.reading

    @property
    def first_ms(self) -> float:
        """From the request to the first token."""
        return 1000 * (self._first - self._asked)

    def begin(self, reused: int) -> float:
        """It has a slot, which holds `reused` tokens of its prompt; how long it waited for it [ms]."""
        self._began = self._read = self._first = self._last = perf_counter()
        self._reused = reused
        waited = 1000 * (self._began - self._asked)
        self.job.tell(Begun(len(self.request.prompt), reused, waited))
        return waited

    def show(self, rows: Floats, start: int) -> None:
        """The logits [T, V] of the prompt's tokens from `start` on, where they are asked for."""
        if self._echo is not None:
            self.job.tell(Echo(self._echo.steps(rows, start)))

    def write(self, logits: Floats, *, full: bool) -> bool:
        """Choose the next token after `history` by its row [V] and tell it; whether the answer goes on.

        `full`: there is no room for more. Raises EngineError, LlmkitError.
        """
        choice = self._sampler.choose(logits, self.history)
        now = perf_counter()
        if self.reading:
            self._read = self._first = self._last = now
        token, piece = choice.token, self._backend.piece(choice.token)
        self.history.append(token)
        self.generated += 1
        ended = token in self._backend.info.eos
        text, thinking = ("", False) if ended else self._feed(piece)
        finish = self._finish = "end" if ended else self._ends(full)
        if finish is not None:
            rest, kind = self._rest()
            text, thinking = text + rest, kind if rest else thinking
        details = _details(self.request, self._backend, logits, token)
        ms, self._last = 1000 * (now - self._last), now
        self.job.tell(
            Step(token, piece, text, ms=ms, finish=finish, sampled_probability=choice.probability, thinking=thinking,
                 **details)
        )  # fmt: skip
        if finish is not None:
            self.end()
        return finish is None

    def _feed(self, piece: bytes) -> tuple[str, bool]:
        if isinstance(self._text, Reading):
            return self._text.feed(piece)
        return self._text.feed(piece), False

    def _rest(self) -> tuple[str, bool]:
        if isinstance(self._text, Reading):
            return self._text.finish()
        return self._text.finish(), False

    def _ends(self, full: bool) -> Finish | None:
        if self._text.stopped:
            return "stop"
        if self.generated == self.request.sampling.max_tokens:
            return "length"
        return "context" if full else None

    def end(self) -> None:
        """It is over: by its last token, or because it was cancelled."""
        self._sampler.close()
        turn = Turn(
            self._seed, len(self.request.prompt), self._reused, merged_system=False,
            prompt_ms=1000 * (self._read - self._began), generated=self.generated,
            generated_ms=1000 * (self._last - self._first), finish=self._finish, first_ms=self.first_ms,
        )  # fmt: skip
        self.job.tell(Ended(self._finish, turn))

    def drop(self) -> None:
        """It was not taken: nothing is told."""
        self._sampler.close()

    def fail(self, error: LlmkitError) -> None:
        """It cannot go on."""
        self._sampler.close()
        self.job.tell(Failed(error))


class _Echo:
    """The prompt's tokens with what the model thought of each, chunk after chunk."""

    def __init__(self, request: Request, backend: Backend) -> None:
        self._request, self._backend = request, backend
        self._stream = TextStream()
        self._row: Floats | None = None  # the logits after the last token shown

    def steps(self, rows: Floats, start: int) -> tuple[Step, ...]:
        """Of as many tokens as there are rows, from `start` on."""
        found, prompt = [], self._request.prompt
        for offset, row in enumerate(rows):
            token = prompt[start + offset]
            piece = self._backend.piece(token)
            text = self._stream.feed(piece)
            if start + offset == len(prompt) - 1:
                text += self._stream.finish()
            details = {} if self._row is None else _details(self._request, self._backend, self._row, token)
            found.append(Step(token, piece, text, **details))
            self._row = row
        self._row = None if self._row is None else self._row.copy()  # not the whole chunk
        return tuple(found)


def _details(request: Request, backend: Backend, logits: Floats, token: int) -> dict[str, Any]:
    """A Step's fields that are asked for. Raises EngineError for logits that are no numbers."""
    if not (request.details or request.n_alternatives or request.echo):
        return {}
    found = describe(logits, token, min(request.n_alternatives, len(logits)))
    if math.isnan(found.logprob):
        raise EngineError("the model's output is not a number", "The file may be damaged.")
    others = [
        Alternative(id, backend.piece(id), logprob)
        for id, logprob in zip(found.ids.tolist(), found.logprobs.tolist(), strict=True)
    ]
    return {"logprob": found.logprob, "rank": found.rank, "entropy": found.entropy, "alternatives": tuple(others)}
