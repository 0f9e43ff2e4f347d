"""The stages between logits and a token, each a pure function from candidates to candidates.

Logits are float32 and are changed as llama.cpp changes them (src/llama-sampler.cpp), so that its own samplers can be
the reference in tests; sums of probabilities are in double precision. Whole vocabularies are never sorted where a
threshold below the highest logit leaves enough of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ids = NDArray[np.int64]

_SMALL = 1024  # so many are sorted at once
_MARGINS = 4, 7, 10, 14, 20  # below the highest logit: e^-20 is nothing
_COLDEST = 1e-6  # as good as 0, and no logit divided by it overflows


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens still in the running; `logits` belong to `ids`. Tokens of probability 0 may be among them or not.

    `sorted`: most likely first. `whole`: the ids are 0 … V-1 in this order.
    """

    ids: Ids
    logits: Floats
    sorted: bool = False
    whole: bool = False

    @property
    def probabilities(self) -> Doubles:
        """Softmax over these candidates alone."""
        return softmax(self.logits)

    def at(self, places: Ids | slice, *, sorted: bool) -> Candidates:
        """Those at `places` of these."""
        return Candidates(self.ids[places], self.logits[places], sorted)

    def places(self, tokens: Ids) -> tuple[Ids, Ids]:
        """Where those of `tokens` (each once) that are candidates stand, and which of `tokens` they are."""
        if self.whole:
            found = np.flatnonzero((tokens >= 0) & (tokens < len(self.ids)))
            return tokens[found], found
        by_id = np.argsort(self.ids)
        spots = np.searchsorted(self.ids, tokens, sorter=by_id)
        near = by_id[np.minimum(spots, len(by_id) - 1)]
        found = np.flatnonzero(self.ids[near] == tokens)
        return near[found], found


def everything(logits: Floats) -> Candidates:
    """All tokens of a row of logits [V]."""
    return Candidates(_numbers(len(logits)), np.asarray(logits, np.float32), whole=True)


@lru_cache(maxsize=4)
def _numbers(count: int) -> Ids:
    numbers = np.arange(count)
    numbers.flags.writeable = False
    return numbers


def softmax(logits: Floats | Doubles) -> Doubles:
    """Probabilities of `logits`, in double precision."""
    powers = np.exp(np.subtract(logits, logits.max(), dtype=np.float64))
    powers /= powers.sum()
    result: Doubles = powers
    return result


def largest(logits: Floats | Doubles, k: int) -> Ids:
    """Places of the `k` highest logits, highest first, of equals the first; fewer where others are -inf."""
    kept = _high(logits, k)
    values = logits if kept is None else logits[kept]
    if 0 < k < len(values):
        smallest = np.partition(values, len(values) - k)[len(values) - k]
        above = np.flatnonzero(values > smallest)
        chosen = np.concatenate([above, np.flatnonzero(values == smallest)[: k - len(above)]])
        kept, values = (chosen if kept is None else kept[chosen]), values[chosen]
    order = np.lexsort((np.arange(len(values)) if kept is None else kept, -values))
    return order if kept is None else kept[order]


def _high(logits: Floats | Doubles, k: int) -> Ids | None:
    """Places of at least `k` logits (of all above -inf, if fewer), among them the `k` highest; None for all."""
    if k < len(logits):
        top = logits.max()
        for margin in _MARGINS if len(logits) > _SMALL else ():
            above = logits >= top - np.float32(margin)
            if np.count_nonzero(above) >= k:
                places: Ids = above.nonzero()[0]
                return places
    possible = logits > -np.inf
    return None if possible.all() else possible.nonzero()[0]


def logit_bias(candidates: Candidates, biases: Sequence[tuple[int, float]]) -> Candidates:
    """Add to the logits of some tokens; -inf takes a token out."""
    tokens, places = np.unique([token for token, _ in biases], return_inverse=True)
    sums = np.zeros(len(tokens), np.float32)
    np.add.at(sums, places, np.array([bias for _, bias in biases], np.float32))
    spots, which = candidates.places(tokens)
    logits = candidates.logits.copy()
    logits[spots] += sums[which]
    return _without_impossible(Candidates(candidates.ids, logits, whole=candidates.whole), spots)


def _without_impossible(candidates: Candidates, changed: Ids) -> Candidates:
    """Without those of logit -inf, if one of the `changed` is among them."""
    if np.all(candidates.logits[changed] > -np.inf):
        return candidates
    return candidates.at(np.flatnonzero(candidates.logits > -np.inf), sorted=False)


def penalties(
    candidates: Candidates, history: Sequence[int], last_n: int, *, repeat: float, frequency: float, presence: float
) -> Candidates:
    """Make tokens among the last `last_n` (-1: all) of `history` less likely.

    Logits above 0 are divided by `repeat`, others multiplied; then `frequency` for each time the token came and
    `presence` once are taken off.
    """
    recent = np.asarray(history if last_n < 0 else history[-last_n:] if last_n else (), np.int64)
    tokens, counts = np.unique(recent, return_counts=True)
    if not len(tokens):
        return candidates
    spots, which = candidates.places(tokens)
    logits = candidates.logits.copy()
    old = logits[spots]
    once = np.where(old <= 0, old * np.float32(repeat), old / np.float32(repeat))
    logits[spots] = once - (counts[which].astype(np.float32) * np.float32(frequency) + np.float32(presence))
    return Candidates(candidates.ids, logits, whole=candidates.whole)


def top_n_sigma(candidates: Candidates, n: float) -> Candidates:
    """Keep logits at most `n` standard deviations (of all candidates' logits) below the highest."""
    logits = candidates.logits
    if len(logits) <= 1:
        return candidates
    finite = logits if logits.min() > -np.inf else logits[logits > -np.inf]
    least = float(logits.max()) - n * float(finite.std(dtype=np.float64))
    return candidates.at(np.flatnonzero(logits >= np.float32(least)), sorted=candidates.sorted)


def top_k(candidates: Candidates, k: int) -> Candidates:
    """The `k` most likely, sorted; all of them, sorted, at 0. Of equals, the lower id first."""
    if candidates.sorted:
        return candidates.at(slice(k), sorted=True) if 0 < k < len(candidates.ids) else candidates
    if candidates.whole or len(candidates.ids) > _SMALL:
        return candidates.at(largest(candidates.logits, k or len(candidates.ids)), sorted=True)
    order = np.lexsort((candidates.ids, -candidates.logits))
    return candidates.at(order[:k] if k else order, sorted=True)


def typical_p(candidates: Candidates, p: float) -> Candidates:
    """The tokens whose surprise is nearest to the entropy of all, as few as are more likely than `p` together.

    Meister et al., Locally Typical Sampling, 2022.
    """
    probabilities = candidates.probabilities
    logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    nearness = -np.abs(-logs + (probabilities * logs).sum())
    k = 256
    while True:
        near = largest(nearness, k)
        count = int(np.cumsum(probabilities[near]).searchsorted(p, side="right")) + 1
        if count <= len(near) or k >= len(nearness):
            return candidates.at(near[:count], sorted=False)
        k *= 16


def top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest most likely tokens whose probabilities reach `p` together, sorted."""
    if candidates.sorted or len(candidates.ids) <= _SMALL:
        candidates = top_k(candidates, 0)
        count = int(np.searchsorted(np.cumsum(candidates.probabilities), p)) + 1
        return candidates.at(slice(count), sorted=True)
    logits = candidates.logits
    top = logits.max()
    total = float(np.exp(logits - top).sum(dtype=np.float64))
    k = 256
    while True:
        high = top_k(candidates, k)
        powers = np.exp(np.subtract(high.logits, top, dtype=np.float64))
        count = int(np.searchsorted(np.cumsum(powers), p * total)) + 1
        if count <= len(high.ids) or len(high.ids) < k:
            return high.at(slice(count), sorted=True)
        k *= 16


def min_p(candidates: Candidates, p: float) -> Candidates:
    """Tokens at least `p` times as likely as the most likely one."""
    logits = candidates.logits
    top = logits[0] if candidates.sorted else logits.max()
    kept = logits >= top + np.float32(log(p))
    if candidates.sorted:
        return candidates.at(slice(int(np.count_nonzero(kept))), sorted=True)
    return candidates.at(np.flatnonzero(kept), sorted=False)


def xtc(candidates: Candidates, threshold: float) -> Candidates:
    """Without the tokens of probability `threshold` or more, but the least likely of them: exclude top choices."""
    candidates = top_k(candidates, 0)
    likely = int(np.count_nonzero(candidates.probabilities >= threshold))
    return candidates.at(slice(likely - 1, None), sorted=True) if likely > 1 else candidates


def temper(candidates: Candidates, temperature: float) -> Candidates:
    """Logits divided by `temperature`; at 0 only the most likely token is left."""
    if temperature > 0:
        logits = candidates.logits / np.float32(max(temperature, _COLDEST))
        return Candidates(candidates.ids, logits, candidates.sorted, candidates.whole)
    best = int(candidates.logits.argmax())
    return candidates.at(slice(best, best + 1), sorted=True)


def mirostat(candidates: Candidates, mu: float) -> Candidates:
    """Tokens of a surprise of at most `mu` bits, sorted; the most likely one at least.

    Basu et al., Mirostat, 2021; version 2 as llama.cpp has it.
    """
    logits = candidates.logits.astype(np.float64)
    top = logits.max()
    least = top + log(float(np.exp(logits - top).sum())) - mu * log(2)
    return top_k(candidates.at(np.flatnonzero(logits >= min(least, top)), sorted=candidates.sorted), 0)


def allowed(candidates: Candidates, allows: Callable[[Ids], NDArray[np.bool_]]) -> Candidates:
    """Those that a grammar allows."""
    return candidates.at(np.flatnonzero(allows(candidates.ids)), sorted=candidates.sorted)


def allowed_top_k(candidates: Candidates, k: int, allows: Callable[[Ids], NDArray[np.bool_]]) -> Candidates:
    """The same as `allowed`, then `top_k`; the grammar is asked of all only where too few likely tokens pass."""
    for count in (4 * k, 64 * k):
        if count < len(candidates.ids):
            left = allowed(top_k(candidates, count), allows)
            if len(left.ids) >= k:
                return left.at(slice(k), sorted=True)
    return top_k(allowed(candidates, allows), k)


def draw(candidates: Candidates, number: float) -> tuple[int, float]:
    """One token by the candidates' probabilities, and its probability; `number` is random, from 0 to below 1."""
    probabilities = candidates.probabilities
    cumulative = probabilities.cumsum()
    place = min(int(cumulative.searchsorted(number * cumulative[-1], side="right")), len(cumulative) - 1)
    return int(candidates.ids[place]), float(probabilities[place])


def draw_many(candidates: Candidates, numbers: Doubles) -> Ids:
    """The tokens that `draw` gives for many random numbers."""
    cumulative = candidates.probabilities.cumsum()
    places = cumulative.searchsorted(numbers * cumulative[-1], side="right")
    tokens: Ids = candidates.ids[np.minimum(places, len(cumulative) - 1)]
    return tokens
