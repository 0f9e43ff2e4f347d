"""Two models of one vocabulary on one prompt: a quant against another, or against the original checkpoint.

Each reads the prompt, then writes its own greedy continuation and reads the other's, token by token, so that a model
against itself differs by nothing at all. All probabilities are raw: the models' own, before any sampler. The first
model is the reference: KL(a‖b) = Σ p_a · ln(p_a / p_b) (Kullback and Leibler 1951), in nats; llama.cpp measures the
same in tools/perplexity, `--kl-divergence`. What is kept of a run is rows of log-probabilities, in a temporary file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend
from ..errors import EngineError, LlmkitError, Unsupported
from .reading import Reading
from .tokens import Odds, visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

Opener = Callable[[], AbstractContextManager[Backend]]

MOST_NBYTES = 2 << 30  # of rows in the temporary file, for one model
_LN2 = log(2)


@dataclass(frozen=True)
class Side:
    """One of the two models: what computes, bytes of its weights, and how it goes on by itself."""

    name: str
    engine: str
    weight_nbytes: int
    n_vocab: int
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Predicted:
    """How both predict one token of a passage. Probabilities are raw; `probability_a`, `_b` those of this token."""

    position: int
    id: int
    piece: str
    kl_nats: float
    kl_bits: float
    best_a: Odds
    best_b: Odds
    probability_a: float
    probability_b: float
    agree: bool


@dataclass(frozen=True)
class Passage:
    """A text that both have read: the "prompt", or the continuation of "a" or "b". Derived from its `tokens`.

    `agreement`: share of tokens where both find the same one most likely; `first_flip`: where they first do not.
    Perplexities are of this text, exp of the mean of -ln p. All None for a passage without tokens.
    """

    name: str
    tokens: tuple[Predicted, ...]
    mean_kl_nats: float | None
    mean_kl_bits: float | None
    max_kl_nats: float | None
    agreement: float | None
    first_flip: int | None
    perplexity_a: float | None
    perplexity_b: float | None


@dataclass(frozen=True)
class Drift:
    """How far apart both are after a layer (-1: what enters the first); means over the positions of the prompt.

    `relative_error` is |a - b| / |a|; `added` what this layer brought to it; `cosine` between both.
    """

    layer: int
    relative_error: float
    added: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """All of it. `parts_at`: the first token where the continuations differ, None where they are the same."""

    prompt: str
    prompt_ids: tuple[int, ...]
    a: Side
    b: Side
    passages: tuple[Passage, ...]
    parts_at: int | None
    layers: tuple[Drift, ...]
    hidden_tokens: int
    notes: tuple[str, ...]

    def passage(self, name: str) -> Passage:
        """The passage of that name."""
        return next(each for each in self.passages if each.name == name)


def compare(
    a: Opener, b: Opener, prompt: str, *, count: int = 32, together: bool = True, names: Sequence[str] = ("", "")
) -> Comparison:
    """Load `a`, then `b`, and compare them on `prompt` and `count` tokens of each one's own; `names` for both.

    Unless `together` only one is in memory at a time; `a` is loaded once more then, where the continuations part.
    Raises LlmkitError for different vocabularies, an empty prompt or one that is too long, and what backends raise.
    """
    if not prompt:
        raise LlmkitError("the prompt is empty", "Give one with --prompt.")
    with ExitStack() as files:
        first, second = files.enter_context(Reading()), files.enter_context(Reading())
        with ExitStack() as models:
            with ExitStack() as alone:
                backend = (models if together else alone).enter_context(a())
                tokens = backend.encode(prompt, bos=True)
                _require_room(backend, len(tokens) + 2 * count)
                pieces = _pieces(backend)
                a_side = _side(backend, names[0], first.begin(backend, tokens, count))
            with b() as other:
                notes = _same_vocabulary(pieces, other, prompt, tokens)
                _require_room(other, len(tokens) + 2 * count)
                b_side = _side(other, names[1], second.begin(other, tokens, count))
                second.follow(other, a_side.ids)
            if together:
                first.follow(backend, b_side.ids)
        if not together and not first.knows(b_side.ids):
            with a() as backend:
                first.follow(backend, b_side.ids)
        n_vocab = min(a_side.n_vocab, b_side.n_vocab)
        judge = _Judge(first, second, pieces, n_vocab)
        passages = (
            judge.passage("prompt", tokens[1:], 0, first.prompt_rows, second.prompt_rows),
            *(
                judge.passage(name, side.ids, len(tokens), first.rows_for(side.ids), second.rows_for(side.ids))
                for name, side in (("a", a_side), ("b", b_side))
            ),
        )
        layers = _drift(first.hidden, second.hidden)
    notes += _notes_on(a_side, b_side, first, second, layers)
    hidden_tokens = min(len(tokens), first.hidden_tokens, second.hidden_tokens)
    parts_at = _parting(a_side.ids, b_side.ids)
    return Comparison(prompt, tuple(tokens), a_side, b_side, passages, parts_at, layers, hidden_tokens, notes)


def _require_room(backend: Backend, rows: int) -> None:
    if not backend.info.generates:
        raise Unsupported(f"{backend.info.name}: is an embedding model; models that generate text can be compared")
    if (nbytes := 4 * rows * backend.info.n_vocab) > MOST_NBYTES:
        most = MOST_NBYTES // (4 * backend.info.n_vocab)
        what = f"{rows} positions of {backend.info.n_vocab:,} probabilities are {nbytes / 1e9:.1f} GB"
        raise LlmkitError(what, f"A shorter prompt, or fewer --tokens: {most} positions are the most.")
    trained = backend.info.n_ctx_train
    if 0 < trained < rows:
        raise LlmkitError(f"{rows} tokens: {backend.info.name} was trained for {trained}", "Use a shorter prompt.")


def _side(backend: Backend, name: str, ids: Sequence[int]) -> Side:
    info = backend.info
    text = b"".join(backend.piece(token) for token in ids).decode("utf-8", "replace")
    return Side(name or info.name, info.engine, info.weight_nbytes, info.n_vocab, tuple(ids), text)


def _parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    same = next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None if same == len(a) == len(b) else same


# ── vocabularies ──


def _pieces(backend: Backend) -> list[bytes | None]:
    """The bytes of every token; None for those that no text has."""
    return [None if backend.kind(token) == "unused" else backend.piece(token) for token in range(backend.info.n_vocab)]


def _same_vocabulary(pieces: Sequence[bytes | None], other: Backend, prompt: str, tokens: list[int]) -> tuple[str, ...]:
    """Notes on harmless differences. Raises LlmkitError where an id means another thing to the other model."""
    theirs = _pieces(other)
    for token, (one, two) in enumerate(zip(pieces, theirs, strict=False)):
        if one is not None and two is not None and one != two:
            raise LlmkitError(
                f"different vocabularies: token {token} is {visible(one)!r} in the first model and {visible(two)!r} in"
                f" {other.info.name}",
                "Probabilities can be compared only where ids mean the same: quants of one model.",
            )
    short, long = sorted((list(pieces), theirs), key=len)
    if extra := [piece for piece in long[len(short) :] if piece is not None]:
        raise LlmkitError(
            f"different vocabularies: {len(pieces):,} and {len(theirs):,} tokens; only one has {visible(extra[0])!r}",
            "Probabilities can be compared only where ids mean the same: quants of one model.",
        )
    if (found := other.encode(prompt, bos=True)) != tokens:
        raise LlmkitError(
            f"the models cut this prompt differently: into {len(tokens)} and {len(found)} tokens, or others",
            "Their tokenizers differ (rules, not vocabulary), so positions cannot be compared.",
        )
    if len(short) == len(long):
        return ()
    return (f"{len(long) - len(short)} rows of one model's output stand for no token and are left out",)


# ── positions ──


class _Judge:
    """Compares rows of both readings over the first `n_vocab` tokens."""

    def __init__(self, a: Reading, b: Reading, pieces: Sequence[bytes | None], n_vocab: int) -> None:
        self._a, self._b, self._pieces, self._n_vocab = a, b, pieces, n_vocab

    def passage(
        self, name: str, ids: Sequence[int], start: int, rows_a: Sequence[int], rows_b: Sequence[int]
    ) -> Passage:
        """`rows_a[k]`, `rows_b[k]` predict `ids[k]`, which stands at `start` + k in its text (prompts begin at 1)."""
        made = tuple(
            self._predicted(start + k + (name == "prompt"), token, self._row(self._a, i), self._row(self._b, j))
            for k, (token, i, j) in enumerate(zip(ids, rows_a, rows_b, strict=False))
        )
        if not made:
            return Passage(name, (), None, None, None, None, None, None, None)
        mean = sum(each.kl_nats for each in made) / len(made)
        flips = [each.position for each in made if not each.agree]
        losses = [
            -sum(log(max(value, 1e-300)) for value in values) / len(made)
            for values in ([each.probability_a for each in made], [each.probability_b for each in made])
        ]
        return Passage(
            name=name,
            tokens=made,
            mean_kl_nats=mean,
            mean_kl_bits=mean / _LN2,
            max_kl_nats=max(each.kl_nats for each in made),
            agreement=1 - len(flips) / len(made),
            first_flip=flips[0] if flips else None,
            perplexity_a=exp(min(losses[0], 700)),
            perplexity_b=exp(min(losses[1], 700)),
        )

    def _row(self, reading: Reading, index: int) -> Doubles:
        """Log-probabilities over the common vocabulary."""
        row = reading.row(index)[: self._n_vocab].astype(np.float64)
        if not np.isfinite(row.max()):
            raise EngineError("a model's output is not a number", "The file may be damaged.")
        row -= row.max()
        row -= np.log(np.exp(row).sum())
        common: Doubles = row
        return common

    def _predicted(self, position: int, token: int, a: Doubles, b: Doubles) -> Predicted:
        kl = divergence(a, b)
        best_a, best_b = (self._best(row) for row in (a, b))
        probabilities = float(np.exp(a[token])), float(np.exp(b[token]))
        piece = self._piece(token)
        agree = best_a.id == best_b.id
        return Predicted(position, token, piece, kl, kl / _LN2, best_a, best_b, *probabilities, agree)

    def _best(self, row: Doubles) -> Odds:
        token = int(row.argmax())
        return Odds(token, self._piece(token), float(np.exp(row[token])))

    def _piece(self, token: int) -> str:
        return visible(self._pieces[token] or b"")


def divergence(a: Doubles, b: Doubles) -> float:
    """KL(a‖b) in nats of two rows of natural log-probabilities [V]; never below 0, which only rounding would give."""
    shares = np.exp(a)
    return max(0.0, float((shares * np.where(shares > 0, a - b, 0.0)).sum()))


# ── layers ──


def _drift(a: dict[int, Floats], b: dict[int, Floats]) -> tuple[Drift, ...]:
    """By layer, where both showed it in the same shape."""
    found: list[Drift] = []
    for layer in sorted(a.keys() & b.keys()):
        one, two = (each[layer].astype(np.float64) for each in (a, b))
        count = min(len(one), len(two))
        if one.shape[1] != two.shape[1] or not count:
            return ()
        one, two = one[:count], two[:count]
        norms, others = np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1)
        error = float((np.linalg.norm(one - two, axis=1) / np.maximum(norms, 1e-30)).mean())
        cosine = float(((one * two).sum(1) / np.maximum(norms * others, 1e-30)).mean())
        found.append(Drift(layer, error, error - (found[-1].relative_error if found else 0.0), cosine))
    return tuple(found)


def _notes_on(a: Side, b: Side, first: Reading, second: Reading, layers: tuple[Drift, ...]) -> tuple[str, ...]:
    notes = [f"{side.name}: its layers cannot be read: {reading.why_no_hidden}"
             for side, reading in ((a, first), (b, second)) if reading.why_no_hidden]  # fmt: skip
    if not layers and not notes:
        notes.append("the models have layers of different widths or numbers, so these are not compared")
    return tuple(notes)
