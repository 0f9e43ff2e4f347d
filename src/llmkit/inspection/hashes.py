"""sha256 of large files, remembered: a file of the same path, size and time of change is taken for the same.

That is what make, rsync and git go by; who changes a file and sets its time back is not noticed. They are kept in
LLMKIT_HOME/hashes.json; where that cannot be read or written, hashing again is all it costs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import settings, store
from ..errors import LlmkitError
from ..progress import OnProgress, Progress, ignore

_CHUNK = 1 << 20
_MOST = 500  # files remembered


@dataclass(frozen=True)
class Hash:
    """Of a file: `remembered` from before, or measured just now."""

    sha256: str
    nbytes: int
    remembered: bool


def of(paths: Sequence[Path], on_progress: OnProgress = ignore) -> tuple[Hash, ...]:
    """The hashes of files. Raises LlmkitError for one that cannot be read."""
    known = _known()
    found, total, done = [], 0, 0
    try:
        stamps = [(path, path.resolve(), path.stat()) for path in paths]
        total = sum(stat.st_size for _, _, stat in stamps)
        for _, real, stat in stamps:
            row = [stat.st_size, stat.st_mtime_ns]
            before = known.get(str(real))
            if before is not None and before[:2] == row:
                found.append(Hash(before[2], stat.st_size, True))
            else:
                digest = _measured(real, done, total, on_progress)
                known[str(real)] = [*row, digest]
                found.append(Hash(digest, stat.st_size, False))
            done += stat.st_size
    except OSError as error:
        raise LlmkitError(f"{error.filename}: cannot be hashed: {error.strerror}") from error
    if any(not each.remembered for each in found):
        _remember(known)
    return tuple(found)


def _measured(path: Path, done: int, total: int, on_progress: OnProgress) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            on_progress(Progress("hashing", done, total))
    return digest.hexdigest()


def _place() -> Path:
    return settings.home() / "hashes.json"


def _known() -> dict[str, list[Any]]:
    try:
        rows = json.loads(_place().read_bytes())
        return {path: row for path, row in rows.items() if len(row) == 3 and isinstance(row[2], str)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _remember(known: dict[str, list[Any]]) -> None:
    kept = dict(list(known.items())[-_MOST:])
    with suppress(OSError, LlmkitError):
        store.make_folder(_place().parent)
        with store.whole(_place()) as partial:
            partial.write_text(json.dumps(kept), encoding="utf-8")
