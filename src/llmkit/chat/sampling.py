"""From logits to a token: the stages of `Sampling.order`, then a seeded draw.

    sampler = Sampler(Sampling(temperature=0.7), backend=backend, seed=7)
    choice = sampler.choose(logits, history)        its token, and its probability after all stages

Each stage is a function from candidates to candidates (samplers.py), so that what it cut can be shown (`trace`).
Written in numpy for every backend; the engine's own samplers are the reference it is tested against. Grammars are
the engine's. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from math import log2
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend, Grammar
from ..errors import EngineError, LlmkitError, Unsupported
from . import repetition, samplers
from .details import Details, describe, entropy, log_softmax
from .sampler_settings import ORDER, SETTINGS, Sampling, Setting
from .samplers import Candidates, everything, softmax, top_k

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = [
    "ORDER", "SETTINGS", "Candidates", "Choice", "Details", "Position", "Sampler", "Sampling", "Setting", "Stage",
    "describe", "entropy", "everything", "fresh_seed", "generator", "log_softmax", "softmax", "top_k",
]  # fmt: skip

_POINTWISE = {"logit_bias", "penalties", "dry"}  # a token's new logit does not depend on which others are there
_KEEP_THE_BEST = {"top_n_sigma", "top_k", "top_p", "min_p", "temperature"}


@dataclass(frozen=True)
class Choice:
    """The next token, and its probability among the candidates that all stages left (sampled, not raw)."""

    token: int
    probability: float


@dataclass(frozen=True, eq=False)
class Stage:
    """What was left after one stage; the first is "raw", the model's own distribution."""

    name: str
    label: str
    candidates: Candidates


@dataclass(frozen=True)
class Position:
    """What the stages look at: the tokens before; `chance`, which decides xtc; `mu`, the surprise mirostat allows."""

    history: Sequence[int]
    chance: float
    mu: float
    grammar: Grammar | None = None
    breakers: repetition.Breakers | None = None


_STAGES: dict[str, Callable[[Candidates, Sampling, Position], Candidates]] = {
    "logit_bias": lambda c, s, at: samplers.logit_bias(c, s.logit_bias),
    "grammar": lambda c, s, at: c if at.grammar is None else samplers.allowed(c, at.grammar.allows),
    "penalties": lambda c, s, at: samplers.penalties(
        c, at.history, s.repeat_last_n,
        repeat=s.repeat_penalty, frequency=s.frequency_penalty, presence=s.presence_penalty,
    ),
    "dry": lambda c, s, at: c if at.breakers is None else repetition.dry(
        c, at.history, at.breakers,
        last_n=s.dry_last_n, multiplier=s.dry_multiplier, base=s.dry_base, allowed_length=s.dry_allowed_length,
    ),
    "top_n_sigma": lambda c, s, at: samplers.top_n_sigma(c, s.top_n_sigma),
    "top_k": lambda c, s, at: samplers.top_k(c, s.top_k),
    "typical_p": lambda c, s, at: samplers.typical_p(c, s.typical_p),
    "top_p": lambda c, s, at: samplers.top_p(c, s.top_p),
    "min_p": lambda c, s, at: samplers.min_p(c, s.min_p),
    "xtc": lambda c, s, at: samplers.xtc(c, s.xtc_threshold) if at.chance <= s.xtc_probability else c,
    "temperature": lambda c, s, at: samplers.temper(c, s.temperature),
    "mirostat": lambda c, s, at: samplers.mirostat(c, at.mu),
}  # fmt: skip


class Sampler:
    """Chooses the tokens of one answer. The same seed, turn and logits give the same tokens.

    Raises LlmkitError for a wrong grammar, Unsupported for a token of `logit_bias` that is none, and for a grammar
    where the backend has none.
    """

    def __init__(self, sampling: Sampling, *, backend: Backend, seed: int, turn: int = 0) -> None:
        self.sampling = sampling
        self.stages = sampling.stages
        self._draws, self._chances = generator(seed, turn), generator(seed, turn, 1)
        self._number, self._chance = self._draws.random(), self._chances.random()
        self._mu = 2 * sampling.mirostat_tau
        for token, _ in sampling.logit_bias:
            if token >= backend.info.n_vocab:
                raise Unsupported(f"logit-bias {token}: the model has tokens 0 to {backend.info.n_vocab - 1}")
        self._breakers = repetition.breakers(backend, sampling.dry_breakers) if "dry" in self.stages else None
        self._grammar = _grammar(sampling, backend) if "grammar" in self.stages else None
        # then the most likely token is all that is left, and nothing else need be looked at
        self._takes_the_best = (
            sampling.temperature == 0 and "temperature" in self.stages and _KEEP_THE_BEST.issuperset(self.stages)
        )

    def choose(self, logits: Floats, history: Sequence[int]) -> Choice:
        """The next token after `history` (the prompt and what has been generated), and go on to the one after it.

        Raises EngineError where the logits are no numbers, LlmkitError where the stages leave no token.
        """
        if self._takes_the_best:
            best = int(logits.argmax())  # the first NaN, if there is one
            if not np.isfinite(logits[best]):
                raise _nothing_left(logits)
            self.accept(best, 1.0)
            return Choice(best, 1.0)
        left = self.survivors(logits, history)
        if not len(left.ids) or not np.isfinite(left.logits.max()):
            raise _nothing_left(logits)
        token, probability = samplers.draw(left, self._number)
        self.accept(token, probability)
        return Choice(token, probability)

    def accept(self, token: int, probability: float | None = None) -> None:
        """Go on after a token that is there already, as `choose` would have gone on.

        `probability`: the one it was chosen with, for mirostat; None or NaN where nobody drew it. Raises EngineError
        when the grammar does not allow the token.
        """
        if self._grammar is not None:
            self._grammar.accept(token)
        if probability is not None and probability > 0:  # not NaN
            self._mu -= self.sampling.mirostat_eta * (-log2(probability) - self.sampling.mirostat_tau)
        self._number, self._chance = self._draws.random(), self._chances.random()

    def trace(self, logits: Floats, history: Sequence[int], *, chance: float | None = None) -> list[Stage]:
        """What every stage leaves at this position; `choose` draws from the last. Nothing is changed.

        `chance`, 0 to 1, in place of the one drawn for this position: xtc applies up to its probability.
        """
        candidates, position = everything(logits), self._position(history)
        if chance is not None:
            position = replace(position, chance=chance)
        found = [Stage("raw", "raw", candidates)]
        for name in self.stages:
            candidates = _STAGES[name](candidates, self.sampling, position)
            found.append(Stage(name, self.sampling.label(name), candidates))
            if not len(candidates.ids):
                break
        return found

    def close(self) -> None:
        """Free the grammar."""
        if self._grammar is not None:
            self._grammar.close()
            self._grammar = None

    def _position(self, history: Sequence[int]) -> Position:
        return Position(history, self._chance, self._mu, self._grammar, self._breakers)

    def survivors(self, logits: Floats, history: Sequence[int]) -> Candidates:
        """The same as the trace's last, with a grammar asked about as few tokens as will do."""
        position, candidates = self._position(history), everything(logits)
        names = list(self.stages)
        while names and len(candidates.ids):
            name = names.pop(0)
            if name == "grammar" and self._grammar is not None:
                k = self._enough(names)
                if k:
                    while names and names[0] in _POINTWISE:
                        candidates = _STAGES[names.pop(0)](candidates, self.sampling, position)
                    candidates = samplers.allowed_top_k(candidates, k, self._grammar.allows)
                    continue
            candidates = _STAGES[name](candidates, self.sampling, position)
        return candidates

    def _enough(self, names: Sequence[str]) -> int:
        """How many of the most likely allowed tokens decide what the stages `names` leave; 0 for all."""
        rest = list(dropwhile(_POINTWISE.__contains__, names))
        if self.sampling.temperature == 0 and "temperature" in rest and _KEEP_THE_BEST.issuperset(rest):
            return 1
        return self.sampling.top_k if rest[:1] == ["top_k"] else 0


def _nothing_left(logits: Floats) -> LlmkitError:
    if np.isfinite(logits.max()):
        return LlmkitError("no token is left that the grammar allows", "Put grammar before what cuts (order).")
    return EngineError("the model's output is not a number", "The file may be damaged.")


def _grammar(sampling: Sampling, backend: Backend) -> Grammar:
    text = sampling.grammar
    if sampling.json_schema is not None:
        from .. import engine

        text = engine.json_schema_to_gbnf(sampling.json_schema)
    return backend.grammar(text or "")


def generator(seed: int, turn: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one answer: the same for the same seed, turn and stream, on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, turn, stream][: 3 if stream else 2])))


def fresh_seed() -> int:
    """A seed nobody chose, to be told so that the answer can be had again."""
    import secrets

    return secrets.randbits(32)
