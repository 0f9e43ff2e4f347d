"""Between the layers of a running model: what can be seen of it, and the residual stream. On any backend.

Everything is read in a session of its own on the same weights, so a conversation is not touched. What a kind of layer
does not have is told in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend, Eval, Session
from ..errors import EngineError, LlmkitError, Unsupported
from .tokens import visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

MOST_TOKENS = 512
_CONTEXT = 256  # the least a session is made for
_PROBE = 4  # tokens


# ── what a model can show ──


@dataclass(frozen=True)
class LayerCapability:
    """Whether a layer's output and its attention can be read; `why` not, in words."""

    layer: int
    hidden: bool
    attention: bool
    why: str = ""


@dataclass(frozen=True)
class Capabilities:
    """What can be seen of a model on this backend, found out by trying on a few tokens.

    `lens`: the output matrix after the last layer gives the model's own logits, up to rounding; `lens_why` not.
    """

    model: str
    engine: str
    layers: tuple[LayerCapability, ...]
    lens: bool
    lens_why: str = ""


def capabilities(backend: Backend) -> Capabilities:
    """Try everything once. Raises EngineError when not even an inspecting session can be made."""
    tokens = _probe_tokens(backend)
    everything = range(backend.info.n_layer)
    with inspecting(backend, len(tokens)) as session:
        whole, _ = _tried(session, tokens, everything, everything)
        found = [LayerCapability(layer, True, True) for layer in everything] if whole else []
        for layer in everything if not whole else ():
            hidden, why = _tried(session, tokens, [layer], [])
            attention, other = _tried(session, tokens, [], [layer])
            found.append(LayerCapability(layer, hidden is not None, attention is not None, why or other))
    lens, why = _lens_works(backend, tokens)
    return Capabilities(backend.info.name, backend.info.engine, tuple(found), lens, why)


def _probe_tokens(backend: Backend) -> list[int]:
    step = max(1, backend.info.n_vocab // (_PROBE + 1))
    return [step * (index + 1) for index in range(min(_PROBE, backend.info.n_vocab - 1))] or [0]


def _tried(
    session: Session, tokens: Sequence[int], layers: Sequence[int], attention: Sequence[int]
) -> tuple[Eval | None, str]:
    try:
        session.rewind(0)
        return session.eval(tokens, layers=layers, attention=attention), ""
    except (Unsupported, EngineError) as error:
        return None, error.message


def _lens_works(backend: Backend, tokens: Sequence[int]) -> tuple[bool, str]:
    last = backend.info.n_layer - 1
    try:
        with inspecting(backend, len(tokens)) as session:
            found = session.eval(tokens, layers=[last])
            own = backend.unembed(found.hidden[last][-1:])[0]
    except (Unsupported, EngineError) as error:
        return False, error.message
    if not np.isfinite(own).all():
        return False, "the last layer's output gives no numbers"
    return (
        (True, "") if _agree(own, found.logits[-1]) else (False, "the last layer does not give the model's own logits")
    )


def _agree(lens: Floats, real: Floats) -> bool:
    """Whether both put the same token first, or one that the other puts within rounding of its first."""
    spread = float(real.max() - np.median(real))
    return float(real.max() - real[lens.argmax()]) <= 0.05 * spread


# ── the residual stream ──


@dataclass(frozen=True)
class ResidualLayer:
    """After one layer (-1: what enters the first): `norms`, the length of each position's vector.

    The others are means over the positions after the first, whose vector grows out of all proportion in most models:
    many heads rest there. `cosine_before` is to the layer before, `cosine_last` to the last one, `update` the length of
    what the layer added as a share of what came in.
    """

    layer: int
    norms: tuple[float, ...]
    mean_norm: float
    cosine_before: float
    cosine_last: float
    update: float


@dataclass(frozen=True)
class Residual:
    """The residual stream of a text, from what enters the first layer to what leaves the last."""

    model: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    layers: tuple[ResidualLayer, ...]


def residual(backend: Backend, tokens: Sequence[int]) -> Residual:
    """Norms and directions of the residual stream, at every layer and position.

    Raises LlmkitError for too many tokens, Unsupported where the layers do not show their outputs.
    """
    require(backend, tokens, MOST_TOKENS, "norms")
    wanted = range(-1, backend.info.n_layer)
    with inspecting(backend, len(tokens)) as session:
        hidden = session.eval(tokens, layers=wanted).hidden
    made = []
    later = slice(1 if len(tokens) > 1 else 0, None)
    for layer in wanted:
        here, before, last = (hidden[each][later] for each in (layer, max(-1, layer - 1), wanted[-1]))
        came = np.maximum(np.linalg.norm(before, axis=1), np.float32(1e-12))
        made.append(
            ResidualLayer(
                layer=layer,
                norms=tuple(np.linalg.norm(hidden[layer], axis=1).tolist()),
                mean_norm=float(np.linalg.norm(here, axis=1).mean()),
                cosine_before=_mean_cosine(here, before),
                cosine_last=_mean_cosine(here, last),
                update=float((np.linalg.norm(here - before, axis=1) / came).mean()),
            )
        )
    return Residual(backend.info.name, tuple(tokens), pieces(backend, tokens), tuple(made))


def _mean_cosine(one: Floats, other: Floats) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float((np.einsum("ij,ij->i", one, other) / np.maximum(lengths, np.float32(1e-12))).mean())


# ── a session of one's own ──


@contextmanager
def inspecting(backend: Backend, n_tokens: int) -> Iterator[Session]:
    """A session that shows layers and attention, for at least `n_tokens`; closed at the end."""
    session = backend.session(max(_CONTEXT, n_tokens), inspect=True)
    try:
        yield session
    finally:
        session.close()


def require(backend: Backend, tokens: Sequence[int], most: int, what: str) -> None:
    """Raise LlmkitError unless there are 1 to `most` tokens for `what`."""
    if not tokens:
        raise LlmkitError("the text is empty, so nothing can be seen of it", "Give a text of one word or more.")
    if len(tokens) > most:
        raise LlmkitError(
            f"{len(tokens)} tokens are too many for {what} of {backend.info.name}: at most {most}",
            "Take a shorter text.",
        )


def pieces(backend: Backend, tokens: Sequence[int]) -> tuple[str, ...]:
    """How the tokens are written, for people."""
    return tuple(visible(backend.piece(token)) for token in tokens)
