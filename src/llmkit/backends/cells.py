"""How many cells of a KV cache the sequences of a session take together: a shared beginning counts once.

A sequence is a list of runs. A run is the first `length` cells of a block; a block grows with the one sequence it was
made for, as long as nobody else relies on its end. So a run is always the beginning of its block, and a block takes as
many cells as its longest run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count


@dataclass
class _Run:
    block: int
    length: int


class Cells:
    """The cells of `sequences` sequences, numbered from 0. `used` is kept up to date by every change."""

    def __init__(self, sequences: int) -> None:
        self.used = 0
        self.lengths = [0] * sequences
        self._runs: list[list[_Run]] = [[] for _ in range(sequences)]
        self._growing: list[bool] = [False] * sequences  # whether the last run's block may grow
        self._blocks = count()

    def append(self, sequence: int, n: int) -> None:
        """`n` more cells, of this sequence alone."""
        runs = self._runs[sequence]
        if self._growing[sequence]:
            runs[-1].length += n
        else:
            runs.append(_Run(next(self._blocks), n))
            self._growing[sequence] = True
        self.lengths[sequence] += n
        self.used += n

    def share(self, source: int, target: int) -> None:
        """`target` gives up its cells and holds those of `source`."""
        if source == target:
            return
        self._runs[target] = [_Run(run.block, run.length) for run in self._runs[source]]
        self._growing[source] = self._growing[target] = False
        self.lengths[target] = self.lengths[source]
        self._count()

    def rewind(self, sequence: int, n: int) -> None:
        """Only the first `n` cells of the sequence stay with it."""
        if n == self.lengths[sequence]:
            return
        kept, left = [], n
        for run in self._runs[sequence]:
            if left <= 0:
                break
            kept.append(_Run(run.block, min(run.length, left)))
            left -= run.length
        self._runs[sequence] = kept
        self._growing[sequence] = False
        self.lengths[sequence] = n
        self._count()

    def _count(self) -> None:
        longest: dict[int, int] = {}
        for run in (run for runs in self._runs for run in runs):
            longest[run.block] = max(run.length, longest.get(run.block, 0))
        self.used = sum(longest.values())
