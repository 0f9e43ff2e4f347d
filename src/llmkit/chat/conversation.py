"""A conversation: messages in, an answer out as an iterator of Steps, one for each token.

    chat = Chat(backend, system="Be brief.")
    for step in chat.say("Where is Paris?"):
        print(step.text, end="")

What the context already holds is not evaluated again (`chat.turn.reused` tokens of `chat.turn.prompt`). Nothing is
ever cut silently: a conversation that does not fit is refused, an answer that fills the context ends with "context".
Closing the iterator keeps the partial answer. One thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..backends import Backend, Session
from ..errors import EngineError, LlmkitError
from . import sampling as samplers
from .sampling import Sampling
from .streams import TextStream
from .templates import ChatTemplate, Message

if TYPE_CHECKING:
    from numpy.typing import NDArray

# end: the model ended · stop: a stop string came · length: max_tokens · context: the context is full
Finish = Literal["end", "stop", "length", "context"]
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Alternative:
    """A token the model might have said, with the natural logarithm of its raw probability."""

    id: int
    piece: bytes
    logprob: float


@dataclass(frozen=True)
class Step:
    """One generated token.

    `text` is what may be shown now (see streams.py); `logprob` (natural), `alternatives` (most likely first, the chosen
    one among them if it is likely enough) and `entropy` (bits) are of the model's own distribution, before any sampler;
    `ms` is the time since the step before. `finish` is set on the last step.
    """

    id: int
    piece: bytes
    text: str
    logprob: float
    alternatives: tuple[Alternative, ...]
    entropy: float
    ms: float
    finish: Finish | None = None


@dataclass(frozen=True)
class Turn:
    """What one answer took: tokens of its prompt, how many of them the context already held, and times."""

    seed: int
    prompt: int
    reused: int
    merged_system: bool
    prompt_ms: float = 0.0
    generated: int = 0
    generated_ms: float = 0.0
    finish: Finish | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the generated tokens, measured; 0 before the second."""
        return 1000 * (self.generated - 1) / self.generated_ms if self.generated > 1 and self.generated_ms > 0 else 0.0


@dataclass
class _Answer:
    """An answer on its way. `tokens`: the prompt and what has been generated; `logits` are of the last of them."""

    turn: Turn
    logits: NDArray[np.float32]
    tokens: list[int]
    stream: TextStream
    random: np.random.Generator
    began: float = field(default_factory=time.perf_counter)


class Chat:
    """Messages, the model they are for, and its context. `turn` tells of the last answer, None before the first.

    Raises InvalidModel for a broken chat template, EngineError when the context does not fit into memory.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        context: int | None = None,
        stop: Sequence[str] = (),
        n_alternatives: int = 5,
    ) -> None:
        info = backend.info
        self.backend = backend
        self.system = system
        self.sampling = sampling or Sampling()
        self.n_alternatives = n_alternatives
        self.messages: list[Message] = []
        self.turn: Turn | None = None
        self._bos = backend.piece(info.bos).decode("utf-8", "replace") if info.bos is not None else ""
        eos = backend.piece(info.eos_token).decode("utf-8", "replace") if info.eos_token is not None else ""
        self.template = ChatTemplate(info.chat_template, bos=self._bos, eos=eos)
        self.stop = (*self.template.stop, *stop)
        self._held: list[int] = []  # the tokens in the session
        self._session: Session = backend.session(context or min(info.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT))

    @property
    def used(self) -> int:
        """Tokens of the conversation in the context now: what is left of a forgotten one does not count."""
        return self._session.n if self.messages else 0

    @property
    def total(self) -> int:
        """Tokens that fit into the context."""
        return self._session.context

    def clear(self) -> None:
        """Forget all messages; the system prompt stays."""
        self.messages.clear()

    def close(self) -> None:
        """Free the context (the backend stays)."""
        self._session.close()

    def encode_prompt(self, messages: Sequence[Message]) -> tuple[list[int], bool]:
        """The tokens of a conversation up to where the model answers; whether the system prompt had to be merged.

        A beginning-of-text token that the template writes is not added a second time.
        """
        system = [Message("system", self.system)] if self.system else []
        prompt = self.template.render([*system, *messages])
        written = bool(self._bos) and prompt.text.startswith(self._bos)
        return self.backend.encode(prompt.text, special=True, bos=not written), prompt.merged_system

    def say(self, text: str) -> Generator[Step, None, None]:
        """Ask, and iterate over the answer. The question is kept when an answer has begun, with what came of it.

        Raises LlmkitError when the conversation does not fit (nothing is changed then), EngineError from the engine.
        """
        question = Message("user", text)
        tokens, merged = self.encode_prompt([*self.messages, question])
        if len(tokens) >= self.total:
            raise LlmkitError(
                f"the conversation is {len(tokens)} tokens long, the context holds {self.total}",
                "Begin anew (/clear), or use a larger --context.",
            )
        seed = self.sampling.seed if self.sampling.seed is not None else samplers.fresh_seed()
        began = time.perf_counter()
        reused = self._reuse(tokens)
        logits = self._eval(tokens[reused:])
        turn = Turn(seed, len(tokens), reused, merged, 1000 * (time.perf_counter() - began))
        answer = _Answer(turn, logits, tokens, TextStream(self.stop), samplers.generator(seed, len(self.messages)))
        self.messages += [question, Message("assistant", "")]
        try:
            for step in self._answer(answer):
                self.turn = answer.turn
                yield step
        finally:
            self.messages[-1] = Message("assistant", answer.stream.text)

    def _reuse(self, tokens: list[int]) -> int:
        """Rewind the session to what it shares with `tokens`, of which at least the last must be evaluated."""
        shared = 0
        for held, wanted in zip(self._held, tokens[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        if not self._session.rewind(shared):
            self._session.rewind(0)
        del self._held[self._session.n :]
        return self._session.n

    def _eval(self, tokens: list[int]) -> NDArray[np.float32]:
        """Evaluate and return the last row of logits. Raises EngineError when they are no numbers."""
        try:
            row: NDArray[np.float32] = self._session.eval(tokens).logits[-1]
        finally:  # after an error or Ctrl-C the session knows how far it came
            self._held = (self._held + tokens)[: self._session.n]
        if not np.isfinite(row.max()):
            raise EngineError("the model's output is not a number", "The file may be damaged.")
        return row

    def _answer(self, answer: _Answer) -> Iterator[Step]:
        step: Step | None = None
        while step is None or step.finish is None:
            if step is not None:
                answer.began = time.perf_counter()  # the reader's time is not the model's
                answer.logits = self._eval([step.id])
            step = self._step(answer)
            first, turn = answer.turn.generated == 0, answer.turn
            answer.turn = replace(
                turn,
                generated=turn.generated + 1,
                generated_ms=turn.generated_ms + (0.0 if first else step.ms),  # the first came with the prompt
                finish=step.finish,
            )
            yield step

    def _step(self, answer: _Answer) -> Step:
        """Choose the next token from the logits and describe it."""
        logprobs = samplers.log_softmax(answer.logits)
        token = samplers.draw(samplers.survivors(answer.logits, answer.tokens, self.sampling), answer.random)
        answer.tokens.append(token)
        piece = self.backend.piece(token)
        ended = token in self.backend.info.eos
        text = "" if ended else answer.stream.feed(piece)
        finish = "end" if ended else self._finish(answer)
        return Step(
            id=token,
            piece=piece,
            text=text + answer.stream.finish() if finish else text,
            logprob=float(logprobs[token]),
            alternatives=self._alternatives(logprobs),
            entropy=samplers.entropy(logprobs),
            ms=1000 * (time.perf_counter() - answer.began),
            finish=finish,
        )

    def _finish(self, answer: _Answer) -> Finish | None:
        """Why the answer ends with the token just chosen, if it does."""
        if answer.stream.stopped:
            return "stop"
        if answer.turn.generated + 1 == self.sampling.max_tokens:
            return "length"
        return "context" if self._session.n >= self.total else None

    def _alternatives(self, logprobs: NDArray[np.float64]) -> tuple[Alternative, ...]:
        count = min(self.n_alternatives, len(logprobs))
        best = samplers.top_k(samplers.Candidates(np.arange(len(logprobs)), logprobs), count) if count else None
        ids = [] if best is None else best.ids.tolist()
        return tuple(Alternative(id, self.backend.piece(id), float(logprobs[id])) for id in ids)
