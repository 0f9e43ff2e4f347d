"""Progress is a value: the library reports it, a door draws it.

Knows nothing of terminals. A callback may raise to cancel; the caller of the step cleans up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` in `unit` ("B" for bytes) of the step named `stage`; `detail` is what is at work now."""

    stage: str
    done: int
    total: int
    unit: str = "B"
    detail: str = ""


OnProgress = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """The callback of those who do not want to know."""
