"""Why a token of an answer was said: its raw probability, what each sampler did to it, and with what odds it was drawn.

    why = explain(backend, answer, position)

The tokens before it are evaluated again in a context of their own, as far as that is quick in the same steps. What an
engine computes in other steps it rounds otherwise, so both raw probabilities are told, then and now. Raw is the model's
own distribution, sampled is what the samplers left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isnan, nan
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend
from ..chat.answer import Answer
from ..chat.sampling import Sampler, Stage, describe
from ..chat.start import is_of
from ..errors import LlmkitError
from .tokens import visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ONE_BY_ONE = 64  # tokens evaluated one after another before the one that is explained; more would take long
_BEFORE = 12  # tokens shown of what came before


@dataclass(frozen=True)
class Effect:
    """A stage: how many tokens it left, and the probability of the token after it, 0 from where it was removed."""

    name: str
    label: str
    left: int
    probability: float
    removed: bool


@dataclass(frozen=True)
class Rival:
    """A token that was as possible: its raw probability, and its sampled one, 0 where `removed_by` took it out."""

    id: int
    piece: str
    raw: float
    sampled: float
    removed_by: str | None


@dataclass(frozen=True)
class Why:
    """Token `position` (from 0) of an answer. Probabilities are 0 to 1, `entropy` in bits, of the raw distribution.

    `raw` and `sampled` were measured when it was said (nan where that was not noted, or nobody drew it), `raw_again`
    and all of `stages` and `rivals` now. `given`: it was set, or taken over from another answer, not drawn by this one.
    """

    position: int
    count: int
    id: int
    piece: str
    before: str
    raw: float
    raw_again: float
    sampled: float
    rank: int
    entropy: float
    vocabulary: int
    given: bool
    stages: tuple[Effect, ...]
    rivals: tuple[Rival, ...]

    @property
    def likely_choices(self) -> float:
        """2 to the entropy: as uncertain as a choice among so many equally likely tokens."""
        return float(2**self.entropy)


def explain(backend: Backend, answer: Answer, position: int, *, count: int = 6) -> Why:
    """Explain the step at `position`, with its `count` most likely rivals.

    Raises LlmkitError for a position outside the answer, EngineError when its context does not fit into memory.
    """
    if not 0 <= position < len(answer.steps):
        raise LlmkitError(f"there is no token {position + 1}: the answer has 1 to {len(answer.steps)}")
    if not is_of(backend, answer):
        raise LlmkitError(
            f"the answer was given by {answer.model}, and {backend.info.name} is loaded",
            "Only an answer of the loaded model can be explained: /model changes it.",
        )
    step = answer.steps[position]
    history = [*answer.prompt, *answer.tokens[:position]]
    logits = _logits(backend, answer, position)
    stages = _trace(backend, answer, position, logits, history)
    details = describe(logits, step.id, count + 1)
    given = position < answer.given or isnan(step.sampled_probability)
    rivals = [
        _rival(backend, int(id), float(logprob), stages)
        for id, logprob in zip(details.ids, details.logprobs, strict=True)
        if int(id) != step.id
    ]
    return Why(
        position=position,
        count=len(answer.steps),
        id=step.id,
        piece=visible(step.piece),
        before="".join(visible(backend.piece(token)) for token in history[-_BEFORE:]),
        raw=nan if isnan(step.logprob) else exp(step.logprob),
        raw_again=exp(details.logprob),
        sampled=step.sampled_probability,
        rank=step.rank or details.rank,
        entropy=details.entropy if isnan(step.entropy) else step.entropy,
        vocabulary=len(logits),
        given=given,
        stages=tuple(_effects(stages, step.id)),
        rivals=tuple(rivals[:count]),
    )


def _logits(backend: Backend, answer: Answer, position: int) -> NDArray[np.float32]:
    """As the answer came about: its prompt at once, then token after token, at least the last ones."""
    said = answer.tokens[:position]
    at_once = max(0, len(said) - _ONE_BY_ONE)
    session = backend.session(len(answer.prompt) + len(said) + 1)
    try:
        row = session.eval([*answer.prompt, *said[:at_once]]).logits[-1]
        for token in said[at_once:]:
            row = session.eval([token]).logits[-1]
        copied: NDArray[np.float32] = np.array(row)
        return copied
    finally:
        session.close()


def _trace(
    backend: Backend, answer: Answer, position: int, logits: NDArray[np.float32], history: list[int]
) -> list[Stage]:
    """What the answer's own sampler did at that position: it goes through the steps before as it went then."""
    seed = answer.sampling.seed
    if seed is None:
        raise LlmkitError("the answer does not say its seed", "Only answers of this program can be explained.")
    sampler = Sampler(answer.sampling, backend=backend, seed=seed, turn=answer.variation)
    try:
        for number, step in enumerate(answer.steps[:position]):
            drawn = number >= answer.given and not isnan(step.sampled_probability)
            sampler.accept(step.id, step.sampled_probability if drawn else None)
        return sampler.trace(logits, history)
    finally:
        sampler.close()


def _effects(stages: list[Stage], token: int) -> list[Effect]:
    found, was_there = [], True
    for stage in stages:
        chance = _probability(stage, token)
        found.append(
            Effect(stage.name, stage.label, len(stage.candidates.ids), chance or 0.0, was_there and chance is None)
        )
        was_there = chance is not None
    return found


def _probability(stage: Stage, token: int) -> float | None:
    """Of a token among what a stage left; None where it is not there."""
    at = np.flatnonzero(stage.candidates.ids == token)
    return float(stage.candidates.probabilities[at[0]]) if len(at) else None


def _rival(backend: Backend, token: int, logprob: float, stages: list[Stage]) -> Rival:
    chance = _probability(stages[-1], token)
    gone = next((stage.label for stage in stages if _probability(stage, token) is None), None)
    return Rival(token, visible(backend.piece(token)), exp(logprob), chance or 0.0, gone)
