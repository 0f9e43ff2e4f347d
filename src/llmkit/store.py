"""Files on disk: a final name is always a whole file, and room is looked for before the first byte.

with whole(path) as partial: write to partial      → renamed to path at the end, deleted when something fails
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import settings
from .errors import AccessDenied, LlmkitError, NotEnoughRoom

# what verbs that write to --out can do about a folder; others have words of their own
ANOTHER_FOLDER = "Choose another folder with --out."
MORE_ROOM = "Free some room, choose another folder with --out, or a smaller quant."
_LAST_MODEL = "last-model"


def partial_path(path: Path) -> Path:
    """Where the unfinished version of `path` is kept."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a partial file's path; at the end it becomes `path`, or vanishes when the block raised."""
    partial = partial_path(path)
    try:
        yield partial
        finish(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def finish(partial: Path, path: Path) -> None:
    """Make a fully written partial file final: synced to disk, renamed, the rename synced."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot sync folders
    finally:
        os.close(descriptor)


def make_folder(folder: Path, hint: str = ANOTHER_FOLDER) -> None:
    """Make `folder` and check that files can be written there. Raises AccessDenied, LlmkitError, with this hint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".llmkit-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except PermissionError:
        raise AccessDenied(f"{folder}: may not be written", hint) from None
    except (FileExistsError, NotADirectoryError):
        raise LlmkitError(f"{folder}: a folder is needed, and a file is in its place", hint) from None
    except OSError as error:
        raise AccessDenied(f"{folder}: cannot be written: {error.strerror}", hint) from error


def free_nbytes(folder: Path) -> int:
    """Bytes free for this user where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(folder: Path, nbytes: int, hint: str = MORE_ROOM) -> None:
    """Raise NotEnoughRoom, with this hint, unless `nbytes` fit."""
    free = free_nbytes(folder)
    if nbytes > free:
        raise NotEnoughRoom(
            f"{folder}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            hint,
        )


def require_rooms(needs: Iterable[tuple[Path, int]], hint: str = MORE_ROOM) -> None:
    """Raise NotEnoughRoom unless all (folder, bytes) fit, summed where folders share a disk."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, nbytes in needs:
        device = next(each for each in (folder, *folder.absolute().parents) if each.exists()).stat().st_dev
        first, together = disks.get(device, (folder, 0))
        disks[device] = (first, together + nbytes)
    for folder, nbytes in disks.values():
        require_room(folder, nbytes, hint)


def remember_model(path: Path) -> None:
    """Keep `path` as the model that was used last. Where nothing can be kept, nothing is: it is a comfort."""
    with contextlib.suppress(OSError, ValueError):
        settings.home().mkdir(parents=True, exist_ok=True)
        with whole(settings.home() / _LAST_MODEL) as partial:
            partial.write_text(str(path.absolute()), encoding="utf-8", errors="surrogateescape")


def last_model() -> Path | None:
    """The model that was used last, if it is still there."""
    try:
        text = (settings.home() / _LAST_MODEL).read_text(encoding="utf-8", errors="surrogateescape")
        path = Path(text)
        return path if text and path.exists() else None
    except (OSError, ValueError):  # none yet, or a file that holds no path
        return None
