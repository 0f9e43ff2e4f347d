"""The distribution after one position of a text, through every sampler: what each stage leaves, what temperature does.

    place = at(backend, tokens)                    the model's logits after a position
    trace(place, Sampling(), token=7042)           survivors, probabilities, what each stage removed, one token's fate
    grid(place, Sampling(), (0, 0.5, 1, 2))        the same for several temperatures
    numbers(place, temperature=0.7)                softmax, with every number in it
    sample_many(place, Sampling(), 1000)           counts beside the probabilities shown

Raw probabilities are the model's own, before any sampler; sampled probabilities are those after all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend
from ..chat import samplers
from ..chat.sampling import Candidates, Sampler, Sampling, Stage, describe, generator, softmax
from ..errors import LlmkitError, Unsupported
from .chance import chi_square_p
from .tokens import Odds, position_of, visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
MOST_DRAWS = 10_000_000
_LARGEST_EXPONENT = 88.72283  # exp of more is no float32
_LEAST_EXPECTED = 5.0  # of a cell in a chi-square test


@dataclass(frozen=True, eq=False)
class Place:
    """The logits [V] that follow `history`, the tokens of a text up to its token number `position`."""

    backend: Backend
    history: tuple[int, ...]
    position: int
    logits: NDArray[np.float32]

    def piece(self, token: int) -> str:
        """The token's text, nothing hidden."""
        return visible(self.backend.piece(token))


@dataclass(frozen=True)
class StageView:
    """What a stage left: how many tokens, the likeliest of them, and of those it removed the likeliest.

    `top` has probabilities after the stage, `removed` before it; `removed_mass` is what all removed had together.
    """

    name: str
    label: str
    survivors: int
    top: tuple[Odds, ...]
    removed_count: int
    removed_mass: float
    removed: tuple[Odds, ...]


@dataclass(frozen=True)
class Fate:
    """One token on its way through the stages: probabilities after each, 0 from where `removed_by` took it out."""

    id: int
    piece: str
    rank: int
    raw_probability: float
    path: tuple[float, ...]
    removed_by: str | None
    sampled_probability: float


@dataclass(frozen=True)
class Trace:
    """All stages that are on, "raw" first. `entropy` in bits: of the raw distribution, and of what is drawn from.

    `xtc`: with it on, this is the case where it applies, which happens with its probability.
    """

    position: int
    context: str
    stages: tuple[StageView, ...]
    fates: tuple[Fate, ...]
    raw_entropy: float
    sampled_entropy: float
    xtc: bool


@dataclass(frozen=True)
class Heat:
    """One temperature: probabilities of the grid's tokens, sampled ones, and raw ones at this temperature uncut.

    `survivors`: (stage, tokens left) in order. `entropy` in bits, of the sampled distribution.
    """

    temperature: float
    survivors: tuple[tuple[str, int], ...]
    sampled: tuple[float, ...]
    uncut: tuple[float, ...]
    entropy: float


@dataclass(frozen=True)
class Grid:
    """Temperatures against tokens: the likeliest raw ones, and their raw probabilities."""

    tokens: tuple[Odds, ...]
    rows: tuple[Heat, ...]


@dataclass(frozen=True)
class Power:
    """A token's way through softmax: logit / temperature, minus the maximum, its exponential, divided by the sum."""

    id: int
    piece: str
    logit: float
    divided: float
    shifted: float
    power: float
    probability: float


@dataclass(frozen=True)
class Softmax:
    """softmax(x / T): every power divided by `total`, the sum over all `count` tokens.

    `naive_total` is the sum in float32 without taking off the maximum: infinite from an exponent of 88.7 on.
    """

    temperature: float
    count: int
    maximum: float
    total: float
    naive_total: float
    rows: tuple[Power, ...]


@dataclass(frozen=True)
class Count:
    """A token drawn `counted` times; `expected` is its sampled probability times the number of draws."""

    id: int
    piece: str
    sampled_probability: float
    expected: float
    counted: int


@dataclass(frozen=True)
class Draws:
    """Draws from one distribution, and how well they fit it.

    `p_value`: how often fitting draws are at least this far off; tokens expected less than 5 times are one cell.
    """

    number: int
    seed: int
    rows: tuple[Count, ...]
    chi_square: float
    degrees: int
    p_value: float


def at(backend: Backend, tokens: Sequence[int], position: int | None = None) -> Place:
    """Evaluate `tokens` up to `position` (see `position_of`). Raises LlmkitError, EngineError."""
    place = position_of(len(tokens), position)
    history = tuple(tokens[: place + 1])
    session = backend.session(len(history) + 1)
    try:
        logits = session.eval(history).logits[-1].copy()
    finally:
        session.close()
    return Place(backend, history, place, logits)


def trace(place: Place, sampling: Sampling, *, tokens: Sequence[int] = (), top: int = 5) -> Trace:
    """Every stage; `tokens` are those whose fate is asked for. Raises as Sampler, Unsupported for ids that are none."""
    for token in tokens:
        if not 0 <= token < len(place.logits):
            raise Unsupported(f"token {token}: the model has tokens 0 to {len(place.logits) - 1}")
    stages = _stages(place, sampling)
    views, before = [], None
    for stage in stages:
        views.append(_view(place, stage, before, top))
        before = stage
    return Trace(
        position=place.position,
        context="".join(place.piece(token) for token in place.history[-12:]),
        stages=tuple(views),
        fates=tuple(_fate(place, stages, token) for token in tokens),
        raw_entropy=_entropy(stages[0].candidates),
        sampled_entropy=_entropy(stages[-1].candidates),
        xtc="xtc" in sampling.stages,
    )


def grid(place: Place, sampling: Sampling, temperatures: Sequence[float] = TEMPERATURES, *, top: int = 5) -> Grid:
    """`sampling` at each of `temperatures`, for the `top` likeliest tokens. Raises Unsupported for one below 0."""
    best = samplers.largest(place.logits, top)
    raw = softmax(place.logits)
    rows = tuple(_heat(place, replace(sampling, temperature=float(each)), best) for each in temperatures)
    return Grid(tuple(Odds(int(token), place.piece(int(token)), float(raw[token])) for token in best), rows)


def numbers(place: Place, temperature: float = 1.0, *, top: int = 5) -> Softmax:
    """Softmax at one temperature with its numbers, of the `top` likeliest tokens. Raises Unsupported at 0."""
    if not 0 < temperature < inf:
        raise Unsupported(f"temperature {temperature}: softmax divides by it, expected more than 0")
    divided = place.logits.astype(np.float64) / temperature
    maximum = float(divided.max())
    powers = np.exp(divided - maximum)
    total = float(powers.sum())
    with np.errstate(over="ignore"):
        naive = float(np.exp(divided.astype(np.float32)).sum())
    rows = tuple(
        Power(
            int(token), place.piece(int(token)), float(place.logits[token]), float(divided[token]),
            float(divided[token] - maximum), float(powers[token]), float(powers[token] / total),
        )
        for token in samplers.largest(place.logits, top)
    )  # fmt: skip
    return Softmax(temperature, len(divided), maximum, total, naive if maximum < _LARGEST_EXPONENT else inf, rows)


def sample_many(place: Place, sampling: Sampling, number: int = 1000, *, seed: int = 0, top: int = 10) -> Draws:
    """Draw `number` times from this position as the sampler does, and hold the counts against the probabilities.

    Raises Unsupported for a number below 1 or above ten millions.
    """
    if not 1 <= number <= MOST_DRAWS:
        raise Unsupported(f"{number} draws: expected 1 to {MOST_DRAWS:,}")
    probabilities = sampled(place, sampling)
    counted = np.zeros(len(probabilities), np.int64)
    draws = generator(seed, 0).random(number)
    applied = generator(seed, 0, 1).random(number) <= sampling.xtc_probability
    for chance, chosen in ((0.0, draws[applied]), (1.0, draws[~applied])):
        if len(chosen):
            left = _stages(place, sampling, chance)[-1].candidates
            counted += np.bincount(samplers.draw_many(left, chosen), minlength=len(counted))
    shown = np.lexsort((np.arange(len(counted)), -probabilities))[:top]
    statistic, degrees = chi_square(counted, probabilities)
    rows = tuple(
        Count(int(t), place.piece(int(t)), float(probabilities[t]), float(probabilities[t] * number), int(counted[t]))
        for t in shown
        if probabilities[t] > 0
    )
    return Draws(number, seed, rows, statistic, degrees, chi_square_p(statistic, degrees))


def sampled(place: Place, sampling: Sampling) -> NDArray[np.float64]:
    """The sampled probabilities of all tokens [V]; with xtc on, of both its cases together."""
    found = np.zeros(len(place.logits))
    share = sampling.xtc_probability if "xtc" in sampling.stages else 1.0
    for weight, chance in ((share, 0.0), (1 - share, 1.0)):
        if weight:
            left = _stages(place, sampling, chance)[-1].candidates
            found[left.ids] += weight * left.probabilities
    return found


def chi_square(counted: NDArray[np.int64], probabilities: NDArray[np.float64]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells expected less than 5 times are put together.

    Infinite where a token came that cannot.
    """
    if counted[probabilities <= 0].any():
        return inf, 0
    expected = probabilities * counted.sum()
    large = expected >= _LEAST_EXPECTED
    cells = [*zip(counted[large].tolist(), expected[large].tolist(), strict=True)]
    rest = (int(counted[~large].sum()), float(expected[~large].sum()))
    if rest[1] > 0:
        cells.append(rest)
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells), max(len(cells) - 1, 0)


def _stages(place: Place, sampling: Sampling, chance: float = 0.0) -> list[Stage]:
    sampler = Sampler(sampling, backend=place.backend, seed=0)
    try:
        stages = sampler.trace(place.logits, place.history, chance=chance)
    finally:
        sampler.close()
    if not len(stages[-1].candidates.ids):
        raise LlmkitError(f"{stages[-1].label} leaves no token here", "Put grammar before what cuts (--order).")
    return stages


def _odds(place: Place, candidates: Candidates, probabilities: NDArray[np.float64], top: int) -> tuple[Odds, ...]:
    best = np.lexsort((candidates.ids, -probabilities))[:top]
    return tuple(
        Odds(int(candidates.ids[spot]), place.piece(int(candidates.ids[spot])), float(probabilities[spot]))
        for spot in best
    )


def _view(place: Place, stage: Stage, before: Stage | None, top: int) -> StageView:
    left = stage.candidates
    shown = _odds(place, left, left.probabilities, top)
    if before is None or len(before.candidates.ids) == len(left.ids):
        return StageView(stage.name, stage.label, len(left.ids), shown, 0, 0.0, ())
    was = before.candidates
    gone = np.isin(was.ids, left.ids, invert=True)
    probabilities = was.probabilities[gone]
    removed = Candidates(was.ids[gone], was.logits[gone])
    mass = float(probabilities.sum())
    return StageView(
        stage.name, stage.label, len(left.ids), shown, int(gone.sum()), mass, _odds(place, removed, probabilities, top)
    )


def _fate(place: Place, stages: Sequence[Stage], token: int) -> Fate:
    path: list[float] = []
    removed_by = None
    for stage in stages:
        spot = np.flatnonzero(stage.candidates.ids == token)
        if not len(spot):
            removed_by = removed_by or stage.name
        path.append(float(stage.candidates.probabilities[spot[0]]) if len(spot) else 0.0)
    raw = describe(place.logits, token, 0)
    return Fate(token, place.piece(token), raw.rank, exp(raw.logprob), tuple(path), removed_by, path[-1])


def _heat(place: Place, sampling: Sampling, tokens: NDArray[np.int64]) -> Heat:
    stages = _stages(place, sampling)
    left = sampled(place, sampling)
    cooled = samplers.temper(samplers.everything(place.logits), sampling.temperature)
    uncut = np.zeros(len(place.logits))
    uncut[cooled.ids] = cooled.probabilities
    return Heat(
        sampling.temperature,
        tuple((stage.name, len(stage.candidates.ids)) for stage in stages),
        tuple(left[tokens].tolist()),
        tuple(uncut[tokens].tolist()),
        _bits(left),
    )


def _entropy(candidates: Candidates) -> float:
    return _bits(candidates.probabilities)


def _bits(probabilities: NDArray[np.float64]) -> float:
    possible = probabilities[probabilities > 0]
    return float(-(possible * np.log2(possible)).sum()) + 0.0
