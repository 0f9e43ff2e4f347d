"""Ctrl-C while C code runs that calls back into Python.

Python would raise KeyboardInterrupt inside the callback, where ctypes prints and drops it: the interrupt is lost, and a
callback that was to say something (go on? is this the tensor?) has said no. So the interrupt is held until C returns.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[list[int]]:
    """Hold Ctrl-C inside the block and deliver it at its end; the list is not empty once one is held.

    Does nothing in other threads than the main one: only there Python runs signal handlers.
    """
    held: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield held
        return

    def hold(number: int, _: FrameType | None) -> None:
        held.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, usual)
    if held:
        usual(held[0], None)
