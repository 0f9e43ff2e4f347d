"""How fast this machine reads its memory: measured in about a second, and remembered.

What is measured: threads sum float32 numbers of one buffer, reading every byte once and writing nothing (numpy lets
go of the GIL meanwhile). The best pass counts, over several numbers of threads: other programs only make it slower.
That is reading alone, as decoding does; copying would count each byte twice. The buffer should be twice the last-level
cache, so that it comes from memory; where the time does not suffice to touch so much, `remark` says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ... import settings, store
from . import machine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Slabs = list[NDArray[np.float32]]

_SLAB = 16 << 20
_SMALLEST, _LARGEST = 128 << 20, 1 << 30
_TOUCHING, _READING = 0.4, 0.5  # seconds; the first touch of memory can be slower than all else


@dataclass(frozen=True)
class Bandwidth:
    """`nbytes_per_second` read by `threads` threads from a buffer of `buffer_nbytes`, on the CPU and day named.

    `load`: programs that ran or waited in the minute before, on `cpus` CPUs; 0 where nobody says.
    """

    nbytes_per_second: float
    threads: int
    buffer_nbytes: int
    cache_nbytes: int
    passes: int
    load: float
    cpus: int
    cpu: str
    date: str

    @property
    def remark(self) -> str:
        """How it was measured, in words."""
        readers = "one thread" if self.threads == 1 else f"{self.threads} threads"
        text = f"best of {self.passes} passes over {self.buffer_nbytes >> 20} MiB, read by {readers}"
        if self.buffer_nbytes < 2 * self.cache_nbytes:
            text += f"; not twice the last-level cache of {self.cache_nbytes >> 20} MiB, so it may flatter"
        if self.load > self.cpus / 4:
            text += f"; the machine was busy (load {self.load:.1f} on {self.cpus} CPUs): idle it may be faster"
        return text


def of_this_machine(*, again: bool = False) -> Bandwidth:
    """What was measured on this CPU before, or a new measurement (`again`: always a new one)."""
    path = _path()
    found = None if again else _remembered(path)
    if found is None:
        found = measure()
        _remember(path, found)
    return found


def measure() -> Bandwidth:
    """Measure now; takes about a second and at most a quarter of the free memory."""
    cache, most = machine.last_level_cache(), settings.threads()
    free = machine.ram().available
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    wanted = min(max(2 * cache, _SMALLEST), _LARGEST, *([] if free is None else [free // 4]))
    with ThreadPoolExecutor(most) as pool:
        slabs = _touched(pool, most, wanted)
        best, threads, passes = 0.0, 1, 0
        end = time.perf_counter() + _READING
        counts = sorted({most, max(1, most // 2), 1}, reverse=True)
        while passes < len(counts) or time.perf_counter() < end:
            count = counts[passes % len(counts)]
            rate = _rate(pool, slabs, count)
            passes += 1
            if rate > best:
                best, threads = rate, count
    size = sum(slab.nbytes for slab in slabs)
    return Bandwidth(best, threads, size, cache, passes, load, most, machine.cpu_name(), time.strftime("%Y-%m-%d"))


def _touched(pool: ThreadPoolExecutor, threads: int, wanted: int) -> Slabs:
    """Slabs of memory that is really there: written once, until `wanted` bytes or the time are used up."""
    import numpy as np

    def slab(_: int) -> NDArray[np.float32]:
        return np.ones(_SLAB // 4, np.float32)

    slabs: Slabs = []
    end = time.perf_counter() + _TOUCHING
    while not slabs or (len(slabs) * _SLAB < wanted and time.perf_counter() < end):
        slabs += pool.map(slab, range(threads))
    return slabs


def _rate(pool: ThreadPoolExecutor, slabs: Slabs, threads: int) -> float:
    """Bytes per second of one pass over all slabs by `threads` threads."""
    import numpy as np

    def read(number: int) -> None:
        for slab in slabs[number::threads]:
            np.add.reduce(slab)

    start = time.perf_counter()
    list(pool.map(read, range(threads)))
    return sum(slab.nbytes for slab in slabs) / (time.perf_counter() - start)


# ── memory of it ──


def _path() -> Path:
    key = f"{machine.cpu_name()}\n{settings.threads()}"
    return settings.home() / f"bandwidth-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def _remembered(path: Path) -> Bandwidth | None:
    """What `path` holds; None when there is nothing, or nothing one can understand (it is then written again)."""
    try:
        found = Bandwidth(**json.loads(path.read_bytes()))
        return found if found.nbytes_per_second > 0 and found.remark else None
    except (OSError, ValueError, TypeError):
        return None


def _remember(path: Path, found: Bandwidth) -> None:
    """Write it whole or not at all; a home that cannot be written costs a second each time, no more."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with store.whole(path) as partial:
            partial.write_text(json.dumps(asdict(found), indent=1))
