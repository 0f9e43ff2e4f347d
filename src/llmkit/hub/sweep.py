"""What killed downloads leave behind, ours and huggingface_hub's, and its removal.

Ours: <file>.partial with its note, and what conversions with --low-disk had fetched: the same command goes on with
them. huggingface_hub's: <blob>.<8 hex>.incomplete, which nobody will ever go on with (its issue #4196).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import AccessDenied
from . import claim, inventory, transfer
from .download import user_cache

_OURS = re.compile(r"(?P<name>.+)\.partial$")
_NOTES = (".partial.json", ".partial.json.new")
_THEIRS = re.compile(r".+\.incomplete$")
_THEIR_FOLDER = "/.cache/huggingface/download/"  # below one that was fetched into; other programs have such names too
_FRESH_SECONDS = 60.0  # an orphan without a lock, written to this lately, may not be one


@dataclass(frozen=True)
class Leftover:
    """Unfinished files: `path` is one, or a folder of them. `busy`: somebody works on it now.

    `nbytes` are those on the disk.
    """

    path: Path
    nbytes: int
    what: str
    age_seconds: float
    busy: bool


def find(folders: Iterable[Path] = ()) -> list[Leftover]:
    """Leftovers in the Hugging Face cache, in llmkit's own folder, and in `folders` that were fetched into (--to)."""
    roots = [user_cache().root, *folders]
    found = {each.path: each for root in roots for each in _under(root.resolve())}
    found |= {each.path: each for each in _streams(inventory.streams_folder())}
    return [found[path] for path in sorted(found)]


def _under(root: Path) -> Iterator[Leftover]:
    for path in root.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError):  # gone meanwhile
            match = _OURS.match(path.name)
            # what has no note of a download is not one: `llmkit quantize` calls its unfinished files the same
            if match and transfer.note_path(final := path.with_name(match["name"])).is_file():
                yield _leftover(path, [path], "llmkit (can be gone on with)", claim.owner(final) is not None)
            elif _THEIRS.match(path.name) and (path.parent.name == "blobs" or _THEIR_FOLDER in path.as_posix()):
                yield _leftover(path, [path], "huggingface_hub (orphan)", _is_written(path))


def _streams(root: Path) -> Iterator[Leftover]:
    """What conversions with --low-disk have left, of a repository each; files of the user's cache are linked there."""
    for folder in root.glob("models--*"):
        files = [path for path in folder.glob("blobs/*") if path.is_file() and not path.is_symlink()]
        with suppress(OSError):  # gone meanwhile
            own = [path for path in files if path.stat().st_nlink == 1]
            busy = claim.owner(folder) is not None
            yield _leftover(folder, own, "llmkit --low-disk (can be gone on with)", busy)


def _leftover(path: Path, files: Sequence[Path], what: str, busy: bool) -> Leftover:
    facts = [file.stat() for file in files]
    written = max((each.st_mtime for each in facts), default=path.stat().st_mtime)
    nbytes = sum(getattr(each, "st_blocks", each.st_size // 512) * 512 for each in facts)
    return Leftover(path, nbytes, what, max(0.0, time.time() - written), busy)


def _is_written(path: Path) -> bool:
    """Whether huggingface_hub writes `path` now: the file's lock is held, or it has none and is fresh."""
    locks = [lock for lock in _their_locks(path) if lock.is_file()]
    if not locks:
        return time.time() - path.stat().st_mtime < _FRESH_SECONDS
    return any(_is_held(lock) for lock in locks)


def _their_locks(path: Path) -> list[Path]:
    """Locks of an unfinished file of huggingface_hub (file_download.py; _local_folder.py: one beside it)."""
    if path.parent.name == "blobs":
        repository = path.parents[1]
        return [repository.parent / ".locks" / repository.name / f"{path.name.partition('.')[0]}.lock"]
    return list(path.parent.glob("*.lock"))


def _is_held(lock: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return time.time() - lock.stat().st_mtime < _FRESH_SECONDS
    descriptor = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def delete(leftovers: Sequence[Leftover]) -> list[Leftover]:
    """Remove them with their notes; what has become busy meanwhile stays. Returns what went. Raises AccessDenied."""
    gone = []
    for each in leftovers:
        match = _OURS.match(each.path.name)
        final = each.path.with_name(match["name"]) if match else each.path
        try:
            with claim.claim(final, stopped=lambda: True) as ours:
                if ours:
                    _delete(each.path, final)
                    gone.append(each)
        except OSError as error:
            raise AccessDenied(f"{each.path}: cannot be deleted: {error.strerror}", "Are you its owner?") from error
    return gone


def _delete(path: Path, final: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    for note in _NOTES:
        final.with_name(final.name + note).unlink(missing_ok=True)
