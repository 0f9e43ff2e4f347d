"""A claim on an unfinished file: one process at a time works on it, the others wait and know for whom.

The lock is the system's (flock), so it ends with its owner, even one that was killed; the owner's pid stands in the
file for people. Where the file system has no locks, the pid and whether it lives decide.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_SECONDS = 0.2


def lock_path(path: Path) -> Path:
    """The lock of the unfinished file that will become `path`."""
    return path.with_name(path.name + ".partial.lock")


def owner(path: Path) -> int | None:
    """The pid of the living process that works on `path`, or None."""
    lock = lock_path(path)
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(descriptor, lock) else _pid(lock) or 0
    finally:
        os.close(descriptor)


@contextmanager
def claim(
    path: Path, on_wait: Callable[[int], None] = lambda pid: None, stopped: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Hold the claim on `path`; yields whether we have it (False only when `stopped` said so while we waited).

    `on_wait` is told once the pid of the process we wait for (0 when it is not known).
    """
    lock = lock_path(path)
    told, polls = False, 0
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        free = _lock(descriptor, lock)
        if free and _is_at(descriptor, lock):
            break
        os.close(descriptor)
        if stopped():
            yield False
            return
        if free:  # its last owner has just removed it
            continue
        owner_pid = _pid(lock)
        if not told and (owner_pid is not None or polls):  # just taken, it does not name its owner yet
            on_wait(owner_pid or 0)
            told = True
        polls += 1
        time.sleep(_POLL_SECONDS)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield True
    finally:
        with suppress(OSError):
            lock.unlink()  # while we hold it: whoever opened it meanwhile sees that it is not at its path any more
        os.close(descriptor)


def _lock(descriptor: int, lock: Path) -> bool:
    """Take the lock if it is free."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _is_stale(lock)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return _is_stale(lock)
    return True


def _is_at(descriptor: int, lock: Path) -> bool:
    """Whether the file we locked is still the one under that name: its last owner may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except OSError:
        return False


def _pid(lock: Path) -> int | None:
    try:
        return int(lock.read_text())
    except (OSError, ValueError):
        return None


def _is_stale(lock: Path) -> bool:
    """Whether the process named in the lock is gone, or is this one, or none is named."""
    pid = _pid(lock)
    if pid is None or pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
