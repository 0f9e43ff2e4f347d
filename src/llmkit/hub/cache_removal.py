"""Deleting from the Hugging Face cache: a repository, a revision, or single files, with what then nothing leads to.

huggingface_hub plans and does it (delete_revisions, delete_files): it also knows the blobs that repositories share. It
is given one repository at a time, since one commit can be in several, and what it plans outside of that is left out: a
link in a snapshot may lead anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LlmkitError
from . import claim, client, inventory
from .inventory import File, walk

_WAIT = "Wait until it is done, or end it first."
_CLAIM, _JOURNAL = ".partial.lock", ".journal"  # of a download (claim.py), of a conversion (quantize/journal.py)


@dataclass(frozen=True)
class Removal:
    """What deleting `what` means: `paths` go (folders with all in them), `files` are the files in that.

    `stays` tells what else one might expect to go. `shared_nbytes` are freed in blobs that repositories share. `act`
    does it.
    """

    what: str
    paths: tuple[Path, ...]
    files: dict[str, File]
    act: Callable[[], None]
    stays: tuple[str, ...] = ()
    shared_nbytes: int = 0


def repository(what: str, folder: Path) -> Removal:
    """All of the repository in `folder`. Raises LlmkitError while somebody downloads it."""
    refuse_claimed(what, folder)
    if folder.is_symlink():
        return link(what, folder)
    tree = walk(folder)
    info, found, _ = _scanned(folder)
    if found is None:  # damaged: huggingface_hub does not know it
        return Removal(what, (folder,), tree.files, lambda: delete([folder]))
    strategy = info.delete_revisions(*(revision.commit_hash for revision in found.revisions))
    every = dataclasses.replace(strategy, repos=frozenset({folder}))  # also when it holds no revision
    files = [file for revision in found.revisions for file in revision.files]
    return Removal(what, (folder,), tree.files, _act(every), (), _shared_nbytes(strategy, files))


def revision(what: str, folder: Path, commit: str) -> Removal:
    """One revision; all of the repository when there is no other. Raises LlmkitError (damaged, being downloaded)."""
    info, found = _required(folder)
    gone = [each for each in found.revisions if each.commit_hash == commit]
    if len(found.revisions) == len(gone):
        return repository(what, folder)
    refuse_claimed(what, folder)
    files = [file for each in gone for file in each.files]
    return _by(
        info.delete_revisions(commit), what, folder, files, [each for each in found.revisions if each not in gone]
    )


def files(what: str, folder: Path, chosen: Sequence[Path]) -> Removal:
    """Single files of snapshots, and their blobs when nothing else leads to them. Raises LlmkitError."""
    refuse_claimed(what, folder)
    info, found = _required(folder)
    if not hasattr(info, "delete_files"):
        raise LlmkitError(
            f"{what}: this huggingface_hub deletes whole revisions only", "pip install --upgrade huggingface_hub"
        )
    wanted = set(chosen)
    going = [file for each in found.revisions for file in each.files if file.file_path in wanted]
    return _by(info.delete_files(*going), what, folder, going, found.revisions)


def _by(strategy: Any, what: str, folder: Path, files: Sequence[Any], others: Iterable[Any]) -> Removal:
    """The removal that huggingface_hub plans for `files`, within `folder`; `others` are the revisions that stay."""
    tree = walk(folder)

    def inside(path: Path) -> bool:
        return str(path) in tree.files or str(path) in tree.links

    safe = dataclasses.replace(
        strategy, blobs=frozenset(filter(inside, strategy.blobs)), refs=frozenset(filter(inside, strategy.refs)),
        files=frozenset(filter(inside, strategy.files)),
        snapshots=frozenset(path for path in strategy.snapshots if str(path) in tree.folders),
    )  # fmt: skip
    going = {*map(str, safe.blobs | safe.refs | safe.files)}
    going.update(path for path in tree.files for snapshot in safe.snapshots if path.startswith(f"{snapshot}{os.sep}"))
    kept = {file.blob_path: file.size_on_disk for file in files if str(file.blob_path) not in going}
    return Removal(
        what,
        tuple(sorted(safe.snapshots | safe.files | safe.blobs | safe.refs)),
        {path: tree.files[path] for path in sorted(going) if path in tree.files},
        _act(safe),
        tuple(_stays(kept, inside, {file.file_path for file in files}, others)),
        _shared_nbytes(strategy, files),
    )


def _act(strategy: Any) -> Callable[[], None]:
    """Carries out huggingface_hub's plan without its log of what fails, tracebacks included: `remove` looks itself."""

    def act() -> None:
        log = logging.getLogger("huggingface_hub")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            strategy.execute()
        finally:
            log.setLevel(level)

    return act


def _stays(
    kept: dict[Path, int], inside: Callable[[Path], bool], going: set[Path], others: Iterable[Any]
) -> Iterable[str]:
    """Why the content of some files stays: somebody else leads to it, or it is not the cache's."""
    used = {path: nbytes for path, nbytes in kept.items() if inside(path)}
    users = sorted(
        each.commit_hash[:8]
        for each in others
        if any(file.blob_path in used and file.file_path not in going for file in each.files)
    )
    if used:
        yield f"{len(used)} file(s), {sum(used.values()):,} bytes: revision {', '.join(users)} has them too"
    if outside := sorted(str(path) for path in kept if path not in used):
        yield f"{len(outside)} file(s) outside of the cache that links lead to, such as {outside[0]}"


def _scanned(folder: Path) -> tuple[Any, Any, str]:
    """huggingface_hub's view of the cache with this repository alone; the repository, or None and why."""
    package = client.library()
    try:
        info = package.scan_cache_dir(folder.parent)
    except (OSError, ValueError, package.errors.CacheNotFound) as error:
        return None, None, str(error)
    for found in info.repos:
        if found.repo_path == folder:
            return dataclasses.replace(info, repos=frozenset({found})), found, ""
    return None, None, next((str(each) for each in info.warnings if str(folder) in str(each)), "it is damaged")


def _required(folder: Path) -> tuple[Any, Any]:
    info, found, why = _scanned(folder)
    if found is None:
        hint = f"`llmkit rm {inventory.repository_name(folder)}` deletes all of it."
        raise LlmkitError(f"{folder}: single revisions and files of it cannot be deleted: {why}", hint)
    return info, found


def _shared_nbytes(strategy: Any, files: Sequence[Any]) -> int:
    """Bytes freed in shared blobs: huggingface_hub's count without what lies in the repository itself."""
    blobs: dict[Path, int] = {file.blob_path: file.size_on_disk for file in files}
    if not any(path.is_symlink() for path in blobs):
        return 0
    going = {path for path in blobs if strategy.repos or path in strategy.blobs or path in strategy.files}
    going |= {path for path in blobs if strategy.snapshots & set(path.parents)}
    freed = int(strategy.expected_freed_size)
    return max(0, freed - sum(blobs[path] for path in going if not path.is_symlink()))


# ── what is being worked on ──


def refuse_claimed(what: str, path: Path) -> None:
    """Raise LlmkitError when a living process downloads or writes `path`, or something below it."""
    below = list(walk(path).files) if path.is_dir() and not path.is_symlink() else []
    finals = [str(path), *(name.removesuffix(_CLAIM) for name in below if name.endswith(_CLAIM))]
    for owner in (claim.owner(Path(name)) for name in finals):
        if owner is not None:
            raise LlmkitError(
                f"{what}: is being written by {f'process {owner}' if owner else 'another process'}", _WAIT
            )
    locks = [f"{path}{_JOURNAL}", *(name for name in below if name.endswith(_JOURNAL))]
    if path.name.startswith("models--"):  # huggingface_hub's: <cache>/.locks/<repository>/<hash>.lock
        locks += walk(path.parent / ".locks" / path.name).files
    if any(map(_is_locked, locks)):
        raise LlmkitError(f"{what}: is being written by another process", _WAIT)


def _is_locked(lock: str) -> bool:
    """Whether another process holds this lock."""
    try:
        import fcntl
    except ImportError:  # Windows itself refuses to delete open files
        return False
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


# ── by hand ──


def link(what: str, path: Path) -> Removal:
    """A link, and only that."""
    return Removal(what, (path,), {}, lambda: delete([path]), (f"what the link leads to: {os.path.realpath(path)}",))


def delete(paths: Iterable[Path]) -> None:
    """Delete files, links and folders with all in them; links are not followed. Raises OSError."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
