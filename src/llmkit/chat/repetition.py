"""DRY ("don't repeat yourself"): the longer a repetition that a token would go on with, the less likely it becomes.

After p-e-w's sampler as llama.cpp has it (src/llama-sampler.cpp, llama_sampler_dry). A repetition does not reach over
a breaker: a text such as a newline, found in the vocabulary's tokens once for each model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from ..backends import Backend
from .samplers import Candidates

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BREAKER_BYTES, _TAIL_TOKENS = 40, 20  # llama_sampler_init_dry: MAX_CHAR_LEN, MAX_SEQ_LEN
_LOG_OF_LARGEST = 88.7228391  # of a float32


@dataclass(frozen=True, eq=False)
class Breakers:
    """Tokens that begin a breaker, each with the tokens that then complete it: () where the token holds it whole."""

    tails: dict[int, tuple[tuple[int, ...], ...]]
    heads: NDArray[np.int64]

    def whole(self, token: int) -> bool:
        """Whether the token alone is a breaker."""
        return () in self.tails.get(token, ())


_found: WeakKeyDictionary[Backend, dict[tuple[str, ...], Breakers]] = WeakKeyDictionary()


def breakers(backend: Backend, texts: tuple[str, ...]) -> Breakers:
    """The breakers of a model's vocabulary, looked for once."""
    known = _found.setdefault(backend, {})
    if texts not in known:
        breaking = [text.encode()[:_BREAKER_BYTES] for text in texts]
        tails: dict[int, tuple[tuple[int, ...], ...]] = {}
        for token in range(backend.info.n_vocab):
            piece = backend.piece(token)
            for text in breaking:
                if text in piece:
                    tails[token] = (*tails.get(token, ()), ())
                elif len(text) > 1:
                    tails[token] = (*tails.get(token, ()), *_tails(backend, piece, text))
        tails = {token: ends for token, ends in tails.items() if ends}
        known[texts] = Breakers(tails, np.array(sorted(tails), np.int64))
    return known[texts]


def _tails(backend: Backend, piece: bytes, breaker: bytes) -> list[tuple[int, ...]]:
    """What must follow `piece`, which ends with the beginning of `breaker`, so that it is whole."""
    ends = (length for length in range(1, min(len(breaker), len(piece) + 1)) if piece.endswith(breaker[:length]))
    rests = (breaker[length:].decode("utf-8", "replace") for length in ends)
    return [tuple(backend.encode(rest, special=False)[:_TAIL_TOKENS]) for rest in rests]


def dry(
    candidates: Candidates,
    history: Sequence[int],
    broken: Breakers,
    *,
    last_n: int,
    multiplier: float,
    base: float,
    allowed_length: int,
) -> Candidates:
    """Take multiplier · base^(n - allowed_length) off tokens that would go on with a repetition of n tokens."""
    recent = np.asarray(history if last_n < 0 else history[-last_n:] if last_n else (), np.int64)
    if len(recent) <= allowed_length:
        return candidates
    limit = _back_to_breaker(recent, broken)
    most = int(_LOG_OF_LARGEST / log(base)) if base > 1.000001 else 0
    lengths = (
        _lengths(recent, min(limit, allowed_length + most) if most else limit) if limit >= allowed_length else None
    )
    if lengths is None:
        return candidates
    longest: dict[int, int] = {}
    for place in np.flatnonzero(lengths >= allowed_length).tolist():
        token = int(recent[place + 1])
        longest[token] = max(longest.get(token, 0), int(lengths[place]))
    tokens = np.array([token for token in longest if not broken.whole(token)], np.int64)
    powers = np.array([longest[token] - allowed_length for token in tokens.tolist()], np.float64)
    spots, which = candidates.places(tokens)
    logits = candidates.logits.copy()
    with np.errstate(over="ignore"):  # infinite: never
        logits[spots] -= (np.float32(multiplier) * np.float64(np.float32(base)) ** powers[which]).astype(np.float32)
    return Candidates(candidates.ids, logits, whole=candidates.whole)


def _back_to_breaker(recent: NDArray[np.int64], broken: Breakers) -> int:
    """How many tokens at the end of `recent` hold no breaker: the longest repetition that counts."""
    count = len(recent)
    places: list[int] = np.flatnonzero(np.isin(recent, broken.heads))[::-1].tolist()
    for place in places:
        after = tuple(recent[place + 1 : place + 1 + _TAIL_TOKENS].tolist())
        fitting = [len(tail) for tail in broken.tails[int(recent[place])] if after[: len(tail)] == tail]
        if fitting:
            return count - 1 - place - max(fitting)
    return count


def _lengths(recent: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """For each place but the last: how many tokens up to it equal those at the end, at most `limit`."""
    last = len(recent) - 1
    lengths = np.zeros(last, np.int64)
    alike = np.arange(last)
    for length in range(limit):
        alike = alike[alike >= length]
        alike = alike[recent[alike - length] == recent[last - length]]
        if not len(alike):
            break
        lengths[alike] = length + 1
    return lengths
