"""Files fetched into a folder of the user's (--to), with the notes huggingface_hub keeps beside them.

<folder>/.cache/huggingface/download/<path>.metadata holds three lines: commit, hash, time (huggingface_hub:
_local_folder.py). So each tool knows what the other has fetched, and a file changed by hand is noticed.
"""

from __future__ import annotations

import time
from pathlib import Path

from .cache import size_of, write
from .repository import RemoteFile
from .transfer import digest_of

_SLACK_SECONDS = 1.0  # clocks of file systems are coarse; huggingface_hub allows as much


def note_path(folder: Path, file: RemoteFile) -> Path:
    """Where the note about `file` lies."""
    return folder / ".cache" / "huggingface" / "download" / f"{file.path}.metadata"


def state(folder: Path, file: RemoteFile) -> str:
    """Whether `folder` has `file`: "here", "missing", "unchecked" or "other".

    Files nobody noted are "unchecked" (of the right size) or "other": not ours to replace. What was fetched of another
    version counts as missing.
    """
    path = folder / file.path
    if path.is_dir():
        return "other"
    size = size_of(path)
    if size is None:
        return "missing"
    noted = _noted_hash(folder, file, path)
    if noted == file.hash and size == file.nbytes:
        return "here"
    if noted is not None:
        return "missing"
    return "unchecked" if size == file.nbytes else "other"


def _noted_hash(folder: Path, file: RemoteFile, path: Path) -> str | None:
    """The hash in the note, if the file was not changed since."""
    try:
        _, found, when = note_path(folder, file).read_text().split()[:3]
        unchanged = path.stat().st_mtime - _SLACK_SECONDS <= float(when)
    except (OSError, ValueError):
        return None
    return found if unchanged else None


def keep_note(folder: Path, file: RemoteFile, commit: str) -> None:
    """Note what was fetched."""
    path = note_path(folder, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    ignored = folder / ".cache" / "huggingface" / ".gitignore"
    if not ignored.exists():
        ignored.write_text("*")
    write(path, f"{commit}\n{file.hash}\n{time.time()}\n")


def is_same(path: Path, file: RemoteFile) -> bool:
    """Whether the content of `path` is that of `file`: reads all of it."""
    return digest_of(path, file) == file.hash
