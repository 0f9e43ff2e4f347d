"""The engine's compute buffer: tensors of one pass over a batch, placed one after another into one span of memory.

ggml's graph allocator gives each tensor the smallest hole it fits into, or grows the span; a tensor's place is free
again after its last use; some operations write over their input (ggml/src/ggml-alloc.c). So the buffer is not the sum
of the tensors that live at once: holes that nothing fits into count too. Which tensors a block has is in
llama.cpp src/llama-graph.cpp and src/models/*.cpp.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

_ALIGNMENT = 32  # ggml/src/ggml-backend.cpp, buffers on the CPU
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Peak:
    """Bytes the buffer needs at least, and at which tensor it last grew."""

    nbytes: int
    at: str


@dataclass
class Tape:
    """Tensors in the order they are computed. Inputs are placed before all others."""

    _sizes: list[int] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _sources: list[tuple[int, ...]] = field(default_factory=list)
    _over: list[bool] = field(default_factory=list)
    _inputs: list[int] = field(default_factory=list)

    def input(self, name: str, nbytes: int) -> int:
        """A tensor that is filled from outside."""
        made = self.tensor(name, nbytes)
        self._inputs.append(made)
        return made

    def tensor(self, name: str, nbytes: int, *sources: int, over: bool = False) -> int:
        """A tensor of `nbytes` computed from `sources`; `over`: written over a source of its size, if nobody else
        wants that. Zero bytes: a write into the cache."""
        self._sizes.append(-(-nbytes // _ALIGNMENT) * _ALIGNMENT)
        self._names.append(name)
        self._sources.append(sources)
        self._over.append(over)
        return len(self._sizes) - 1

    def peak(self) -> Peak:
        """Place everything."""
        wanted = [0] * len(self._sizes)
        for sources in self._sources:
            for source in sources:
                wanted[source] += 1
        span, places = _Span(), [-1] * len(self._sizes)
        for each in self._inputs:
            places[each] = span.take(self._sizes[each], self._names[each])
        inputs = set(self._inputs)
        for each, sources in enumerate(self._sources):
            if each in inputs or not (self._sizes[each] or sources):
                continue
            places[each] = self._place(each, places, wanted, span)
            for source in sources:
                wanted[source] -= 1
                if not wanted[source] and places[source] >= 0:
                    span.give(places[source], self._sizes[source])
                    places[source] = -1
        return Peak(span.top, span.at)

    def _place(self, each: int, places: list[int], wanted: list[int], span: _Span) -> int:
        if self._over[each]:
            for source in self._sources[each]:
                if wanted[source] == 1 and self._sizes[source] == self._sizes[each] and places[source] >= 0:
                    place, places[source] = places[source], -1
                    return place
        return span.take(self._sizes[each], self._names[each]) if self._sizes[each] else -1


class _Span:
    """Holes in a span of memory, by address; the last one never ends."""

    def __init__(self) -> None:
        self.starts = [0]
        self.sizes = [_ENDLESS]
        self.top = 0
        self.at = ""

    def take(self, nbytes: int, name: str) -> int:
        """The address of the smallest hole that fits, of equal ones the last; else of the endless one."""
        best = len(self.starts) - 1
        for index in range(len(self.starts) - 1):
            if nbytes <= self.sizes[index] <= self.sizes[best]:
                best = index
        start = self.starts[best]
        self.starts[best] += nbytes
        self.sizes[best] -= nbytes
        if not self.sizes[best]:
            del self.starts[best], self.sizes[best]
        if start + nbytes > self.top:
            self.top, self.at = start + nbytes, name
        return start

    def give(self, start: int, nbytes: int) -> None:
        """A hole again, one with its neighbours."""
        index = bisect.bisect(self.starts, start)
        if index and self.starts[index - 1] + self.sizes[index - 1] == start:
            index -= 1
            self.sizes[index] += nbytes
        else:
            self.starts.insert(index, start)
            self.sizes.insert(index, nbytes)
        if index + 1 < len(self.starts) and self.starts[index] + self.sizes[index] == self.starts[index + 1]:
            self.sizes[index] += self.sizes[index + 1]
            del self.starts[index + 1], self.sizes[index + 1]
