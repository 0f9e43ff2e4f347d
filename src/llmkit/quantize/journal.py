"""The journal beside a partial file: which tensors are in it, so that a killed run goes on from there.

JSON lines: the plan's fingerprint, then names of finished tensors. With it the sizes and times of those source files
that the fingerprint only samples. A name is written only after its data is on the disk. While a run lives it holds a
lock on the journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import LlmkitError
from ..store import partial_path
from .plan import FilePlan, OutputPlan, is_made


class Journal:
    """The journal of one output; made by `open_journal`. `done` names the tensors an earlier run finished."""

    def __init__(self, path: Path, file: Any, done: set[str]) -> None:
        self.path = path
        self.done = done
        self._file = file

    def add(self, names: Iterable[str]) -> None:
        """Record finished tensors; their data must be on the disk already."""
        text = "".join(json.dumps(name) + "\n" for name in names)
        if text:
            self._file.write(text.encode())
            self._sync()

    def restart(self, header: bytes) -> None:
        """Forget everything and begin with `header`."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(header)
        self._sync()
        self.done = set()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, *, finished: bool) -> None:
        """Give the lock back; the journal of a finished output is removed first."""
        if finished:
            self.path.unlink(missing_ok=True)
        self._file.close()


def open_journal(output: OutputPlan) -> Journal:
    """Open or begin the output's journal. Raises LlmkitError when another run is writing the same output."""
    path = output.journal_path
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    file = os.fdopen(descriptor, "r+b")
    if not _lock(descriptor):
        file.close()
        raise LlmkitError(f"{output.path}: another run is writing it", "Wait for it, or choose another --out.")
    header = _header(output)
    first, *rest = file.read().split(b"\n")
    journal = Journal(path, file, set())
    if first + b"\n" != header or not all(_is_kept(part) for part in output.files):
        journal.restart(header)
        return journal
    complete = rest[:-1]  # after the last newline stands nothing, or a line cut short
    journal.done = {name for name in map(_name, complete) if name in output.types}
    file.seek(len(header) + sum(len(line) + 1 for line in complete))
    file.truncate()
    return journal


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: no lock, as before there was one
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _header(output: OutputPlan) -> bytes:
    sources = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in output.draft.sampled]
    return json.dumps({"plan": output.fingerprint, "sources": sources}).encode() + b"\n"


def _is_kept(part: FilePlan) -> bool:
    """Whether the part's data is there; a run killed between two renames left some parts under their final names."""
    partial = partial_path(part.path)
    try:
        if not partial.exists() and is_made(part):
            os.replace(part.path, partial)
        return partial.stat().st_size == part.nbytes
    except OSError:
        return False


def _name(line: bytes) -> str | None:
    try:
        name = json.loads(line)
    except ValueError:
        return None
    return name if isinstance(name, str) else None
