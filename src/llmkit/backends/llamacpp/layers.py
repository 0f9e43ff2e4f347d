"""What can be seen of a model's layers through llama.cpp: tried once, with a few tokens, in a small context.

Architectures differ in what their graphs name, and in what there is: recurrent layers have no attention weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EngineError, LlmkitError, Unsupported
from .tap import ATTENTION, ENTRIES, HIDDEN

if TYPE_CHECKING:
    from . import LlamaCpp

_TOKENS = 4
# The lens may be off by this much of the spread of the logits: the engine rounds activations to 8 bits
_TOLERANCE = 0.04


@dataclass(frozen=True)
class Shown:
    """Layers whose residual stream and whose attention weights can be seen, and why there is no logit lens, if so.

    `entry`: the node of what enters the first layer, empty where it is not known.
    """

    hidden: tuple[int, ...]
    attention: tuple[int, ...]
    entry: str = ""
    why_no_lens: str = ""
    lens_error: float = 0.0  # measured: the largest difference of a logit from the engine's, as a share of their spread

    def require(self, layers: Sequence[int], attention: Sequence[int]) -> None:
        """Raise Unsupported naming the layers that cannot be seen."""
        for what, wanted, there in (
            ("hidden states are", layers, (*((-1,) if self.entry else ()), *self.hidden)),
            ("attention weights are", attention, self.attention),
        ):
            missing = [str(layer) for layer in wanted if layer not in there]
            if missing:
                places = f"layer{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
                raise Unsupported(
                    f"{what} not available for this kind of layer ({places})",
                    f"Layers of this model that show theirs: {_ranges(there)}.",
                )


def _ranges(layers: Sequence[int]) -> str:
    """0-3, 5."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" if a >= 0 else f"{a} to {b}" for a, b in runs) or "none"


def probe(backend: LlamaCpp) -> Shown:
    """Evaluate a few tokens and see which nodes come. Raises Unsupported for models that generate no text."""
    info = backend.info
    tokens = [info.n_vocab * (2 * i + 1) // (2 * _TOKENS) for i in range(_TOKENS)]
    names = [*ENTRIES, *(kind % layer for layer in range(info.n_layer) for kind in (HIDDEN, ATTENTION))]
    session = backend.session(_TOKENS, inspect=True)
    try:
        logits, parts = session.observe(tokens, names, "all")
    except EngineError as error:  # a node of another shape: then none is trusted
        return Shown((), (), why_no_lens=error.message)
    finally:
        session.close()
    right = {HIDDEN: (_TOKENS, info.n_embd), ATTENTION: (_TOKENS, _TOKENS)}
    hidden, attention = (
        tuple(i for i in range(info.n_layer) if [part.shape[-2:] for part in parts[kind % i]] == [right[kind]])
        for kind in (HIDDEN, ATTENTION)
    )
    shapes = {name: [part.shape for part in parts[name]] for name in ENTRIES}
    entry = next((name for name in ENTRIES if shapes[name] == [right[HIDDEN]]), "")
    if info.n_layer - 1 not in hidden:
        return Shown(hidden, attention, entry, "no lens: the last layer does not show its hidden states")
    return Shown(hidden, attention, entry, *_lens(backend, parts[HIDDEN % (info.n_layer - 1)][0], logits))


def _lens(
    backend: LlamaCpp, hidden: np.typing.NDArray[np.float32], logits: np.typing.NDArray[np.float32]
) -> tuple[str, float]:
    """Why the lens does not give the engine's logits, empty if it does; and by how much it is off."""
    try:
        ours = backend.head.logits(hidden)
    except LlmkitError as error:
        return error.message, 0.0
    spread = logits.max(axis=1) - logits.min(axis=1)
    off = float((np.abs(ours - logits).max(axis=1) / np.maximum(spread, 1e-9)).max())
    if not off <= _TOLERANCE:  # also where it is no number
        return f"the lens disagrees with the model: its logits differ by {off:.0%} of their spread", off
    return "", off
