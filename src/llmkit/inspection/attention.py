"""Attention: which tokens each head of a layer looks at. One layer at a time, in a session of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend
from ..errors import LlmkitError
from .layers import inspecting, pieces, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

MOST_TOKENS = 256


@dataclass(frozen=True)
class Head:
    """What one head does on average, over the positions after the first: shares of its attention.

    `first`: on the first token (a resting place of many heads), `before`: on the token before, `own`: on the token
    itself; `entropy` in bits: 0 looks at one token, 5 at 32 alike.
    """

    head: int
    first: float
    before: float
    own: float
    entropy: float


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention: `weights` [heads, queries, keys]; the row of a query sums to 1 over the keys up to it."""

    model: str
    layer: int
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    heads: tuple[Head, ...]
    weights: Floats


def attention(backend: Backend, tokens: Sequence[int], layer: int) -> Attention:
    """Who looks at whom, in one layer. A negative `layer` counts from the last.

    Raises LlmkitError for a layer that does not exist and too many tokens, Unsupported where a layer has no attention.
    """
    require(backend, tokens, MOST_TOKENS, "attention")
    count = backend.info.n_layer
    if not -count <= layer < count:
        raise LlmkitError(f"layer {layer}: the model has {count} layers, 0 to {count - 1}", "-1 is the last one.")
    layer %= count
    with inspecting(backend, len(tokens)) as session:
        weights = session.eval(tokens, attention=[layer]).attention[layer]
    return Attention(
        model=backend.info.name,
        layer=layer,
        ids=tuple(tokens),
        pieces=pieces(backend, tokens),
        heads=tuple(_head(number, rows) for number, rows in enumerate(weights)),
        weights=weights,
    )


def _head(number: int, rows: Floats) -> Head:
    """Averages over the rows after the first, which can only look at itself."""
    if len(rows) == 1:
        return Head(number, 1.0, 0.0, 1.0, 0.0)
    index = np.arange(1, len(rows))
    seen = rows[index]
    logs = np.log2(seen, out=np.zeros_like(seen), where=seen > 0)
    return Head(
        head=number,
        first=float(rows[index, 0].mean()),
        before=float(rows[index, index - 1].mean()),
        own=float(rows[index, index].mean()),
        entropy=max(0.0, float(-(seen * logs).sum(axis=1).mean())),
    )
