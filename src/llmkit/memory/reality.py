"""The estimate beside reality: a GGUF is loaded for real in a child process, its context filled, and measured.

The engine's buffers must agree to the byte. Resident memory is what the system says the process has more than before
the model came: within 3 % or 8 MiB, whichever is more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import convert, engine, settings
from ..errors import EngineError
from . import estimate as memory
from .parts import REPACKED_PAGES, MemoryEstimate
from .resident import GRAPHS, OVERHEAD
from .setting import Setting

_SHARE, _LEAST = 0.03, 8 << 20
_LOADING = 600.0  # seconds; a large file from a slow disk


@dataclass(frozen=True)
class Difference:
    """A part in bytes, estimated and real; how far apart they may be."""

    part: str
    estimated: int
    real: int
    allowed: int

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return abs(self.real - self.estimated) <= self.allowed


def verify(path: Path, setting: Setting, *, seconds: float = 60.0) -> list[Difference]:
    """Load the GGUF `path` for real in `setting` and compare part by part; `seconds` are spent on filling the context.

    Raises EngineError where the engine refuses, in the estimate or in reality, or where the model cannot be laid out.
    """
    draft = convert.open_draft(path)
    (variant,) = memory.variants(draft, ["COPY"])
    guess = memory.estimate(draft, [variant], [setting])[0][0]
    if guess.error:
        raise EngineError(f"{path}: the engine refuses this setting: {guess.error}")
    real = engine.run_in_child(
        function="llmkit.engine.breakdown:reality",
        arguments={
            "path": str(path),
            "model_params": engine.safe_model_params() | setting.model_params(),
            "context_params": setting.context_params(),
            "rows": setting.rows,
            "seconds": seconds,
            "threads": settings.threads(),
        },
        timeout=_LOADING + 2 * seconds,
    )
    filled = guess
    if real["evaluated"] < setting.context:
        filled = memory.estimate(draft, [variant], [replace(setting, context=real["evaluated"])])[0][0]
    return differences(guess, real, filled)


def differences(guess: MemoryEstimate, real: Mapping[str, Any], filled: MemoryEstimate) -> list[Difference]:
    """An estimate beside what engine.breakdown.reality found.

    `filled` is the estimate for a context of as many tokens as were evaluated: of buffers for a full one, no more than
    that was touched.
    """
    buffers = real["buffers"].values()
    weights = guess.part("weights") + guess.part(REPACKED_PAGES)
    caches = guess.part("KV cache") + guess.part("recurrent state")
    working = sum(part.nbytes for own in guess.parts for part in own.parts if part.name == GRAPHS)
    loaded = weights + guess.part(OVERHEAD) - working
    beyond = sum(guess.part(name) - filled.part(name) for name in ("compute buffer", "work buffer"))
    after = [loaded, loaded + caches + working, guess.resident_nbytes - max(0, beyond)]
    steps = ("resident once loaded", "resident with its context", "resident after a full batch")
    return [
        _weights(guess, real),
        Difference(_name_of_caches(guess), caches, sum(row[1] for row in buffers), _rounding(real)),
        Difference("compute buffer", guess.part("compute buffer"), sum(row[2] for row in buffers), _rounding(real)),
        *(
            Difference(name, each, found, max(_LEAST, round(_SHARE * found)))
            for name, each, found in zip(steps, after, real["resident"], strict=True)
        ),
    ]


def _weights(guess: MemoryEstimate, real: Mapping[str, Any]) -> Difference:
    """The model's buffers, mapped pages included; the engine's log tells tensors alone."""
    if not real["exact"]:
        return Difference("weights", guess.part("weights"), real["weights"], _rounding(real))
    estimated = guess.part("weights") + guess.part(REPACKED_PAGES)
    return Difference("weights", estimated, sum(row[0] for row in real["buffers"].values()), 0)


def _rounding(real: Mapping[str, Any]) -> int:
    """Bytes to the byte, or to a hundredth of a MiB where only the engine's log tells."""
    return 0 if real["exact"] else (1 << 20) // 100


def _name_of_caches(guess: MemoryEstimate) -> str:
    names = [name for name in ("KV cache", "recurrent state") if guess.part(name)]
    return " and ".join(names) or "KV cache"
