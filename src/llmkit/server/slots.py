"""Slots: the sequences of one session, what each of them holds, and who may have how many of the cells.

An idle slot goes on holding its last conversation, to be gone on with or to lend its beginning to another; it gives it
up, the longest unused first, when cells are needed. A running slot has cells reserved up to its end, so that it never
fails for room: cells in use and cells promised are never more than there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backends import Backend, Session
from ..backends.cells import Cells

if TYPE_CHECKING:
    from .writing import Writing

_FIRST = 16  # tokens compared first


class Slot:
    """One sequence. `tokens`: what it holds; `end`: how many it may come to hold; `writing`: for whom, None if idle."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.end = 0
        self.writing: Writing | None = None
        self.lent = 0  # so many of its first tokens another running slot held when it began
        self.exact = 0  # so many of its first tokens were evaluated as a fresh session would have evaluated them
        self.used_at = 0  # the larger, the later

    @property
    def owed(self) -> int:
        """Cells promised to it that it does not hold yet."""
        return self.end - len(self.tokens) if self.writing is not None else 0


class Slots:
    """`count` slots on a session of `context` cells. Used by the engine thread alone.

    `chunk`: tokens of a prompt that are evaluated at once where there is nothing else to do. Raises EngineError when
    the session does not fit into memory.
    """

    def __init__(self, backend: Backend, *, context: int, count: int, chunk: int) -> None:
        self.context, self.chunk = context, chunk
        self.all = [Slot(index) for index in range(count)]
        self.evictions = 0
        self.session: Session = backend.session(context, sequences=count)
        self._cells = Cells(count)  # counted here as well: not every session tells
        self._clock = 0

    @property
    def idle(self) -> list[Slot]:
        """Those that work for nobody, empty ones and then the longest unused first."""
        idle = [slot for slot in self.all if slot.writing is None]
        return sorted(idle, key=lambda slot: (bool(slot.tokens), slot.used_at))

    @property
    def running(self) -> list[Slot]:
        """Those that work."""
        return [slot for slot in self.all if slot.writing is not None]

    @property
    def used(self) -> int:
        """Cells that hold something."""
        return self._cells.used

    @property
    def reserved(self) -> int:
        """Cells that running slots hold or may still take; what several of them share counts for each."""
        return sum(slot.end for slot in self.running)

    @property
    def _free(self) -> int:
        """Cells neither used nor promised."""
        return self.context - self._cells.used - sum(slot.owed for slot in self.all)

    def comes_soon(self, prompt: list[int], least: int) -> bool:
        """Whether another prompt that is being evaluated begins with `least` tokens more of this one than is held."""
        held = max(shared(slot.tokens, prompt) for slot in self.all)
        coming = (
            shared(slot.writing.history, prompt) for slot in self.running if slot.writing and slot.writing.reading
        )
        return max(coming, default=0) >= held + least

    def take(self, writing: Writing, end: int) -> int | None:
        """Give an idle slot to `writing`, holding as much of its prompt as is held anywhere, but the last token.

        `end`: cells it may come to hold. Returns how many tokens it holds already; None when there is no idle slot or
        no room now. Raises EngineError.
        """
        prompt, alone = writing.history, writing.seeded and not self.running
        source, held = self._alone(prompt) if alone else self._best(prompt)
        held, idle = held if writing.reuses else 0, self.idle
        lent = held if source.writing is not None else 0
        if not idle or sum(slot.end - slot.lent for slot in self.running) + end - lent > self.context:
            return None
        goes_on = held and source.writing is None and (source is idle[0] or 2 * held >= len(source.tokens))
        target = source if goes_on or alone else idle[0]
        if target is not source or not held:
            self._forget(target)
        if target is not source and held:
            self._share(source, target)
        self._cut(target, held)
        if not self._make_room(end - len(target.tokens), keep=target):
            return None
        target.writing, target.end, target.lent = writing, end, min(lent, len(target.tokens))
        self._touch(target)
        return len(target.tokens)

    def _best(self, prompt: list[int]) -> tuple[Slot, int]:
        """The slot that holds most of the prompt, and how much, without the last token."""
        source = max(self.all, key=lambda slot: (shared(slot.tokens, prompt), slot.writing is None, slot.used_at))
        return source, min(shared(source.tokens, prompt), len(prompt) - 1)

    def _alone(self, prompt: list[int]) -> tuple[Slot, int]:
        """The same, with everything forgotten that would make the engine round in another way than from empty cells.

        It rounds by how many tokens come at once, where their cells lie, and what lies beside them.
        """
        first = self.all[0]
        held = min(shared(first.tokens, prompt), first.exact, len(prompt) - 1) // self.chunk * self.chunk
        for slot in self.all[1:]:
            self._forget(slot)
        self._cut(first, held)
        return first, len(first.tokens)

    def _share(self, source: Slot, target: Slot) -> None:
        self.session.share(source.index, target.index)
        self._cells.share(source.index, target.index)
        target.tokens = source.tokens[:]
        self._touch(source)

    def _make_room(self, needed: int, *, keep: Slot) -> bool:
        """Let idle slots forget until `needed` cells are free, if that can be."""
        for slot in self.idle:
            if self._free >= needed:
                break
            if slot is not keep:
                self._forget(slot)
        return self._free >= needed

    def _forget(self, slot: Slot) -> None:
        if slot.tokens:
            self.evictions += 1
            self._cut(slot, 0)

    def _cut(self, slot: Slot, n: int) -> None:
        """Forget all but `n` tokens; all of them where the model cannot do that."""
        if not self.session.rewind(n, slot.index):
            self.session.rewind(n := 0, slot.index)
        self._cells.rewind(slot.index, n)
        del slot.tokens[n:]
        slot.exact = min(slot.exact, n)

    def grow(self, slot: Slot, more: int) -> bool:
        """Promise a running slot up to `more` cells beyond its end; False when there is none."""
        self._make_room(more, keep=slot)
        granted = min(more, self._free)
        slot.end += max(0, granted)
        return granted > 0

    def hold(self, slot: Slot, tokens: Sequence[int], *, alone: bool) -> None:
        """The session has evaluated `tokens` for it, and nothing beside them."""
        if alone and slot.exact == len(slot.tokens) and len(tokens) == self.chunk and slot.writing:
            slot.exact += self.chunk if slot.writing.seeded else 0
        slot.tokens += tokens
        self._cells.append(slot.index, len(tokens))

    def give_back(self, slot: Slot) -> None:
        """Its answer is over; what it holds stays until cells are needed."""
        slot.writing = None
        self._touch(slot)

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used_at = self._clock

    def close(self) -> None:
        """Free the session."""
        self.session.close()


def shared(one: list[int], other: list[int]) -> int:
    """Length of the longest common beginning. Slices are compared, ever longer ones: tokens by thousands are usual."""
    same, most, step = 0, min(len(one), len(other)), _FIRST
    while same < most and one[same : same + step] == other[same : same + step]:
        same, step = same + step, 2 * step
    if same >= most:
        return most
    while step > 1:  # they differ within the next `step`
        step = (step + 1) // 2
        if one[same : same + step] == other[same : same + step]:
            same += step
    return min(same, most)
