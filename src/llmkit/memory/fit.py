"""How memory grows with the context, and the longest context for a budget.

How memory grows with the context is asked of the engine at a few contexts, once: it does not depend on the quant.
Between them it is drawn straight (the KV cache is; the compute buffer nearly), so a context found this way is asked
once more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..convert.draft import GgufDraft
from ..errors import LlmkitError
from . import estimate as memory
from .parts import MemoryEstimate, Variant
from .setting import Setting

_STEP = 256  # the engine rounds contexts up to it
_POINTS = (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)


@dataclass(frozen=True)
class Growth:
    """Bytes beyond the weights at some contexts, in rising order, as the engine lays them out.

    They are those of one quant; of another they differ by what is the same at every context.
    """

    contexts: tuple[int, ...]
    nbytes: tuple[int, ...]

    def at(self, context: int) -> float:
        """Bytes beyond the weights at `context`, drawn straight between the contexts asked."""
        index = min(max(bisect_right(self.contexts, context), 1), len(self.contexts) - 1)
        x0, x1 = self.contexts[index - 1], self.contexts[index]
        y0, y1 = self.nbytes[index - 1], self.nbytes[index]
        return y0 + (y1 - y0) * (context - x0) / (x1 - x0)

    def longest(self, budget: float) -> int | None:
        """The longest context whose bytes stay within `budget`; None when not even the shortest does."""
        low, high = self.contexts[0] // _STEP, self.contexts[-1] // _STEP
        if self.at(low * _STEP) > budget:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle * _STEP) <= budget else (low, middle - 1)
        return low * _STEP


def context_points(trained: int, *wanted: int) -> list[int]:
    """Contexts worth asking: the usual ones up to what the model was trained for, that one, and the wanted."""
    limit = max(trained, *wanted, 1024)
    return sorted({*(point for point in _POINTS if point < limit), limit, *wanted})


def growth(draft: GgufDraft, variant: Variant, setting: Setting, contexts: Sequence[int]) -> Growth:
    """Ask the engine at every context. Raises LlmkitError when it refuses them all."""
    settings = [replace(setting, context=context) for context in contexts]
    return growth_of(memory.estimate(draft, [variant], settings)[0])


def growth_of(row: Sequence[MemoryEstimate]) -> Growth:
    """The same from estimates of one variant."""
    points = {each.context: each.needed_nbytes - each.part("weights") for each in row if each.error is None}
    if len(points) < 2:
        refused = next((each.error for each in row if each.error), "one context only")
        raise LlmkitError(f"the engine refuses these contexts: {refused}")
    contexts = sorted(points)
    return Growth(tuple(contexts), tuple(points[context] for context in contexts))
