"""How many tokens the engine's caches hold: the asked context, padded and divided, and less in sliding windows.

llama.cpp src/llama-context.cpp (n_ctx, n_ctx_seq), src/llama-kv-cache-iswa.cpp (size_swa).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..setting import Setting
from .shape import Shape

_PADDING = 256


@dataclass(frozen=True)
class Cells:
    """`context` tokens in all; `full` and `window` are the cells of one of `streams` caches of each kind."""

    context: int
    full: int
    window: int
    streams: int


def of(shape: Shape, setting: Setting) -> Cells:
    """The cells for a setting. The batch, not the context, decides how much a window needs beyond itself."""
    sequences = max(1, setting.parallel)
    wanted = setting.context or shape.context_trained
    padded = _pad(wanted)
    streams = 1 if setting.unified else sequences
    full = padded if setting.unified else _pad(padded // sequences)
    ubatch = min(setting.ubatch, setting.batch, wanted)
    reach = shape.window * (sequences if setting.unified else 1) + ubatch
    window = full if setting.swa_full else _pad(min(full, reach))
    return Cells(full * streams, full, window, streams)


def _pad(tokens: int) -> int:
    return -(-tokens // _PADDING) * _PADDING
