"""From logits to a token: penalties, top-k, top-p, min-p, temperature, in llama.cpp's order, then a seeded draw.

Each stage is a function from candidates to candidates, so that what it cut can be shown (`trace`). Written in numpy
for every backend; the engine's own samplers (llama.cpp: src/llama-sampler.cpp) are the reference it is tested against.
Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. A stage is off at: top_k 0, top_p 1, min_p 0, repeat_penalty 1.

    `temperature` 0 takes the most likely token. `seed` None draws a fresh one. `max_tokens` None: until the model ends
    or the context is full. Raises Unsupported for values that mean nothing.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value, right, what in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1 (off)"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repeat-penalty", self.repeat_penalty, 0 < self.repeat_penalty < float("inf"), "more than 0, 1 is off"),
            ("repeat-last-n", self.repeat_last_n, self.repeat_last_n >= 0, "0 or more tokens"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
            ("max-tokens", self.max_tokens, self.max_tokens is None or self.max_tokens > 0, "1 or more"),
        ):
            if not right:
                raise Unsupported(f"{name} {value}: expected {what}")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens still in the running, most likely first once `top_k` has sorted them; `logits` belong to `ids`."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float64]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Softmax over these candidates alone."""
        return softmax(self.logits)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of `logits`, in double precision."""
    powers = np.exp(logits - logits.max())
    result: NDArray[np.float64] = powers / powers.sum()
    return result


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities of one row of logits [V]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def entropy(logprobs: NDArray[np.float64]) -> float:
    """Entropy of a distribution in bits: 0 certain, log2(V) all equal."""
    probabilities = np.exp(logprobs)
    return float(-(probabilities * np.where(probabilities > 0, logprobs, 0.0)).sum() / np.log(2)) + 0.0


def penalize(candidates: Candidates, history: Sequence[int], sampling: Sampling) -> Candidates:
    """Make tokens among the last `repeat_last_n` of `history` less likely: divide logits above 0, multiply others."""
    recent = np.unique(np.asarray(history[-sampling.repeat_last_n :] if sampling.repeat_last_n else [], np.int64))
    if sampling.repeat_penalty == 1 or not len(recent):
        return candidates
    logits = candidates.logits.copy()
    seen = np.isin(candidates.ids, recent)
    logits[seen] = np.where(
        logits[seen] > 0, logits[seen] / sampling.repeat_penalty, logits[seen] * sampling.repeat_penalty
    )
    return Candidates(candidates.ids, logits)


def top_k(candidates: Candidates, k: int) -> Candidates:
    """The `k` most likely, sorted; all of them, sorted, at 0. Of equals, the lower id first."""
    logits = candidates.logits
    kept = np.arange(len(logits))
    if 0 < k < len(logits):
        smallest = np.partition(logits, len(logits) - k)[len(logits) - k]
        above, equal = np.flatnonzero(logits > smallest), np.flatnonzero(logits == smallest)
        kept = np.concatenate([above, equal[: k - len(above)]])
    order = kept[np.lexsort((candidates.ids[kept], -logits[kept]))]
    return Candidates(candidates.ids[order], logits[order])


def top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest most likely tokens whose probabilities reach `p` together. Takes sorted candidates."""
    if p >= 1:
        return candidates
    count = int(np.searchsorted(np.cumsum(candidates.probabilities), p)) + 1
    return Candidates(candidates.ids[:count], candidates.logits[:count])


def min_p(candidates: Candidates, p: float) -> Candidates:
    """Tokens at least `p` times as likely as the most likely one."""
    if p <= 0:
        return candidates
    kept = candidates.logits >= candidates.logits.max() + np.log(p)
    return Candidates(candidates.ids[kept], candidates.logits[kept])


def temper(candidates: Candidates, temperature: float) -> Candidates:
    """Logits divided by `temperature`; at 0 only the most likely token is left."""
    if temperature > 0:
        cooled = (candidates.logits - candidates.logits.max()) / max(temperature, 1e-6)  # no overflow near 0
        return Candidates(candidates.ids, cooled)
    best = int(candidates.logits.argmax())
    return Candidates(candidates.ids[best : best + 1], candidates.logits[best : best + 1])


def trace(logits: NDArray[np.float32], history: Sequence[int], sampling: Sampling) -> Iterator[tuple[str, Candidates]]:
    """The candidates after each stage, in order; the last ones are those the draw is made from."""
    candidates = Candidates(np.arange(len(logits), dtype=np.int64), logits.astype(np.float64))
    yield "raw", candidates
    candidates = penalize(candidates, history, sampling)
    yield "repeat_penalty", candidates
    candidates = top_k(candidates, 1 if sampling.temperature == 0 else sampling.top_k)
    yield "top_k", candidates
    candidates = top_p(candidates, sampling.top_p)
    yield "top_p", candidates
    candidates = min_p(candidates, sampling.min_p)
    yield "min_p", candidates
    yield "temperature", temper(candidates, sampling.temperature)


def survivors(logits: NDArray[np.float32], history: Sequence[int], sampling: Sampling) -> Candidates:
    """The candidates after all stages."""
    *_, (_, candidates) = trace(logits, history, sampling)
    return candidates


def generator(seed: int, turn: int) -> np.random.Generator:
    """The random numbers of one answer: the same for the same seed and turn, on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, turn])))


def fresh_seed() -> int:
    """A seed nobody chose, to be told so that the answer can be had again."""
    import secrets

    return secrets.randbits(32)


def draw(candidates: Candidates, random: np.random.Generator) -> int:
    """One token id, by the candidates' probabilities."""
    cumulative = np.cumsum(candidates.probabilities)
    index = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return int(candidates.ids[min(index, len(cumulative) - 1)])
