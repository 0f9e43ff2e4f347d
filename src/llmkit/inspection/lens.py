"""The logit lens: what a model would say if it ended after each of its layers.

The final norm and the output matrix are applied to what an earlier layer leaves (nostalgebraist 2020, "interpreting
GPT: the logit lens"). Approximate by nature, and noisy in the first half of a model; the last row is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend, Rows
from ..chat import details
from ..errors import EngineError, LlmkitError
from .layers import inspecting, pieces, require
from .tokens import Odds, visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

MOST_TOKENS = 128
_LOGITS_NBYTES = 64 << 20  # of logits held at a time


@dataclass(frozen=True)
class LensRow:
    """After one layer, at each position: the likeliest tokens, the watched ones' probabilities, entropy in bits; raw.

    `layer` is None in the last row: the model's own logits, nothing approximated.
    """

    layer: int | None
    top: tuple[tuple[Odds, ...], ...]
    watched: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]


@dataclass(frozen=True)
class Lens:
    """What the model would say if it ended after each layer. `positions` count tokens from 0.

    `agreement`: share of positions where the lens after the last layer puts the model's own first token first.
    """

    model: str
    engine: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    positions: tuple[int, ...]
    watch: tuple[int, ...]
    watch_pieces: tuple[str, ...]
    rows: tuple[LensRow, ...]
    agreement: float


def lens(
    backend: Backend,
    tokens: Sequence[int],
    *,
    positions: Sequence[int] | None = None,
    top: int = 5,
    watch: Sequence[int] = (),
) -> Lens:
    """The lens at `positions` (default: the last), `top` tokens each; `watch`: tokens to follow, else the final first.

    Raises LlmkitError for too many tokens or positions that are none, Unsupported where the model's end is not known.
    """
    require(backend, tokens, MOST_TOKENS, "the lens")
    places = [len(tokens) - 1] if positions is None else [int(place) for place in positions]
    if not places or any(not 0 <= place < len(tokens) for place in places):
        raise LlmkitError(f"positions {places}: the text has {len(tokens)} tokens, 0 to {len(tokens) - 1}")
    wanted = range(backend.info.n_layer)
    with inspecting(backend, len(tokens)) as session:
        rows_wanted: Rows = "last" if places == [len(tokens) - 1] else "all"
        found = session.eval(tokens, logits=rows_wanted, layers=wanted)
    real = found.logits[[place - len(tokens) for place in places]]
    followed = tuple(dict.fromkeys(watch)) or (int(real[-1].argmax()),)
    seen = list(_seen(backend, np.concatenate([found.hidden[layer][places] for layer in wanted]), top, followed))
    count = len(places)
    rows = [_row(layer, seen[layer * count : (layer + 1) * count]) for layer in wanted]
    own = _row(None, [_described(backend, row, top, followed) for row in real])
    same = [last[0].id == first[0].id for last, first in zip(rows[-1].top, own.top, strict=True)]
    return Lens(
        model=backend.info.name,
        engine=backend.info.engine,
        ids=tuple(tokens),
        pieces=pieces(backend, tokens),
        positions=tuple(places),
        watch=followed,
        watch_pieces=pieces(backend, followed),
        rows=(*rows, own),
        agreement=sum(same) / count,
    )


_Seen = tuple[tuple[Odds, ...], tuple[float, ...], float]  # the top, the watched, bits of entropy


def _seen(backend: Backend, hidden: Floats, top: int, watch: Sequence[int]) -> Iterator[_Seen]:
    """Each row of the residual stream through the model's end, as many at a time as memory may hold."""
    step = max(1, _LOGITS_NBYTES // (4 * backend.info.n_vocab))
    for start in range(0, len(hidden), step):
        for row in np.ascontiguousarray(backend.unembed(hidden[start : start + step])):
            yield _described(backend, row, top, watch)


def _described(backend: Backend, row: Floats, top: int, watch: Sequence[int]) -> _Seen:
    if not np.isfinite(row.max()):
        raise EngineError("the model's output is not a number", "The file may be damaged.")
    found = details.describe(row, watch[0], max(1, min(top, len(row))))
    norm = float(row[found.ids[0]]) - float(found.logprobs[0])
    first = tuple(
        Odds(id, visible(backend.piece(id)), float(np.exp(logprob)))
        for id, logprob in zip(found.ids.tolist(), found.logprobs, strict=True)
    )
    return first, tuple(float(np.exp(float(row[id]) - norm)) for id in watch), found.entropy


def _row(layer: int | None, seen: Sequence[_Seen]) -> LensRow:
    top, watched, entropy = zip(*seen, strict=True)
    return LensRow(layer, top, watched, entropy)
