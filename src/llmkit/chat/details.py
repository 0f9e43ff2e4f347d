"""What the model itself thought of a token, before any sampler: probability, rank, entropy, the best alternatives.

In single precision, vectorized: a row of a 49k vocabulary takes a tenth of a millisecond.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .samplers import largest

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOG2 = log(2)


class Details(NamedTuple):
    """Of one token in one row of logits, all raw. Logarithms are natural, `entropy` is in bits, the best rank is 1."""

    logprob: float
    rank: int
    entropy: float
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]


def describe(logits: NDArray[np.float32], token: int, count: int) -> Details:
    """`token` in a row of logits [V], with the `count` most likely tokens and their logprobs."""
    top = logits.max()
    shifted = logits - top
    powers = np.exp(shifted)
    total = float(powers.sum())
    with np.errstate(invalid="ignore"):
        weighted = float(powers @ shifted)
    if weighted != weighted:  # 0 · -inf
        seen = shifted > -np.inf
        weighted = float(powers[seen] @ shifted[seen])
    lognorm = float(top) + log(total)
    best = largest(logits, count) if count else np.empty(0, np.int64)
    return Details(
        float(logits[token]) - lognorm,
        int(np.count_nonzero(logits > logits[token])) + 1,
        max(0.0, (log(total) - weighted / total) / _LOG2),
        best,
        logits[best].astype(np.float64) - lognorm,
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities of one row of logits [V], in double precision."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def entropy(logprobs: NDArray[np.float64]) -> float:
    """Entropy of a distribution in bits: 0 certain, log2(V) all equal."""
    probabilities = np.exp(logprobs)
    return float(-(probabilities * np.where(probabilities > 0, logprobs, 0.0)).sum() / np.log(2)) + 0.0
