"""How many layers to put on GPUs, from the estimator: what `--gpu-layers auto` means. Derived, see split.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import convert
from . import estimate, split
from .setting import RUNTIMES

USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class Offload:
    """`gpu_layers` of `total` (the output counts as one) go to the `gpus`, for `context` tokens; bytes of each GPU.

    `needed` are bytes by GPU, with the most its driver may take; `free` are those it has.
    """

    gpu_layers: int
    total: int
    context: int
    gpus: tuple[str, ...]
    needed: tuple[int, ...]
    free: tuple[int, ...]

    @property
    def words(self) -> str:
        """The choice and why, in one sentence."""
        if not self.gpus:
            return "no layer goes to a GPU: the engine finds none"
        have = " + ".join(
            f"{name} ({free / 2**30:.1f} GiB free)" for name, free in zip(self.gpus, self.free, strict=True)
        )
        if not self.gpu_layers:
            return f"no layer goes to a GPU: not even one fits beside its buffers on {have}, {self.context:,} tokens"
        taken = f"{sum(self.needed) / 2**30:.1f} GiB at most with {self.context:,} tokens of context"
        how_many = "all" if self.gpu_layers == self.total else "as many as fit"
        return f"{self.gpu_layers} of {self.total} layers go to {have}: {how_many}, {taken} (derived, not measured)"


def of_gpus(path: Path, gpus: Sequence[tuple[str, int]], *, context: int | None = None, metal: bool = False) -> Offload:
    """The most layers of the GGUF `path` that fit on `gpus`, (name, free bytes) each, with their share of the cache.

    `context` as a chat has it: by default 4096 tokens or what the model was trained for. Raises what reading and
    estimating raise.
    """
    draft = convert.open_draft(path)
    tokens = context or min(estimate.trained_context(draft) or USUAL_CONTEXT, USUAL_CONTEXT)
    setting = RUNTIMES["llmkit"].with_context(tokens)
    measured = estimate.estimate(draft, estimate.variants(draft, [estimate.COPY]), [setting])[0][0]
    beside = (0, 0) if metal else split.CUDA_CONTEXT
    found = split.split(draft, measured, gpus, context_nbytes=beside)
    needed = tuple(place.nbytes + place.unaccounted[1] if place.parts else 0 for place in found.devices)
    names, free = tuple(name for name, _ in gpus), tuple(nbytes for _, nbytes in gpus)
    return Offload(found.gpu_layers, found.n_layer + 1, tokens, names, needed, free)
