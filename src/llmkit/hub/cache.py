"""The Hugging Face cache as huggingface_hub lays it out, so that each finds what the other fetched.

    <root>/models--org--name/blobs/<hash>                content, named by its sha256 (LFS) or git blob sha1
                             snapshots/<commit>/<path>   a link to ../../blobs/<hash>
                             refs/<revision>             the commit a branch or tag was at
                             trees/<commit>.json         the repository's listing at that commit

Layout: huggingface_hub docs "Understand caching", and its _tree_cache.py. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import store
from .repository import COMMIT, RemoteFile, Repository

_TREE_VERSION = 1


@dataclass(frozen=True)
class Cache:
    """A cache under `root`: the user's own, or one of the same shape."""

    root: Path

    def folder(self, name: str) -> Path:
        """Where the repository `org/name` is kept."""
        return self.root / f"models--{name.replace('/', '--')}"

    def blob(self, name: str, file: RemoteFile) -> Path:
        """Where the content of `file` lies."""
        return self.folder(name) / "blobs" / file.hash

    def snapshot(self, name: str, commit: str) -> Path:
        """The folder that looks like the repository at `commit`."""
        return self.folder(name) / "snapshots" / commit

    def commit(self, name: str, revision: str | None) -> str | None:
        """The commit `revision` (default main) was at when it was last asked for, or None."""
        if revision and COMMIT.fullmatch(revision):
            return revision if self.snapshot(name, revision).is_dir() else None
        try:
            found = (self.folder(name) / "refs" / (revision or "main")).read_text().strip()
        except (OSError, ValueError):
            return None
        return found if COMMIT.fullmatch(found) else None

    def set_commit(self, name: str, revision: str, commit: str) -> None:
        """Remember that `revision` is at `commit`."""
        if COMMIT.fullmatch(revision) or self.commit(name, revision) == commit:
            return
        path = self.folder(name) / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, commit)

    def listing(self, name: str, commit: str) -> tuple[RemoteFile, ...] | None:
        """The repository's files at `commit` as they were listed, or None when nobody kept the list."""
        try:
            tree = json.loads((self.folder(name) / "trees" / f"{commit}.json").read_bytes())
            if tree["format_version"] != _TREE_VERSION:
                return None
            return tuple(
                RemoteFile(path, int(row["size"]), row["blob_id"], row.get("lfs_sha256"), row.get("xet_hash"))
                for path, row in tree["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep_listing(self, repository: Repository) -> None:
        """Write down the repository's files, so that a whole snapshot can be told from a part without the network."""
        path = self.folder(repository.name) / "trees" / f"{repository.commit}.json"
        if path.exists():
            return
        rows: dict[str, dict[str, object]] = {}
        for file in sorted(repository.files, key=lambda file: file.path):
            rows[file.path] = {"size": file.nbytes, "blob_id": file.git_sha1}
            if file.sha256:
                rows[file.path] |= {"lfs_sha256": file.sha256, "lfs_size": file.nbytes}
            if file.xet_hash:
                rows[file.path]["xet_hash"] = file.xet_hash
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps({"format_version": _TREE_VERSION, "files": rows}, indent=1))

    def holds(self, name: str, commit: str, file: RemoteFile) -> bool:
        """Whether the snapshot has `file`, of the right size. Contents were checked when they were fetched."""
        return size_of(self.snapshot(name, commit) / file.path) == file.nbytes

    def files_here(self, name: str, commit: str) -> tuple[RemoteFile, ...]:
        """The files a snapshot holds now, described by what is on the disk."""
        return tuple(_found(self.snapshot(name, commit)))

    def link(self, name: str, commit: str, file: RemoteFile) -> Path:
        """Let the snapshot's `file` point to its blob; returns the snapshot's path."""
        path = self.snapshot(name, commit) / file.path
        place(self.blob(name, file), path, relative=True)
        return path


def write(path: Path, text: str) -> None:
    """Give `path` this content, whole at any moment; other processes may be doing the same."""
    beside = path.with_name(f".{os.getpid()}-{threading.get_ident():x}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        store.finish(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def size_of(path: Path) -> int | None:
    """Bytes of the file `path` leads to, or None."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def place(source: Path, target: Path, *, relative: bool = False) -> None:
    """Make `target` lead to `source` without copying: a relative symlink (in the cache), else a hard link.

    Where neither can be made (another file system, Windows without the right), a symlink, at last a copy. What stood at
    `target` is replaced at once, never half.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with suppress(OSError):
        beside.unlink()
    real = source if relative else source.resolve()
    link_text = os.path.relpath(source, target.parent) if relative else str(real)
    try:
        if relative:
            os.symlink(link_text, beside)
        else:
            os.link(real, beside)
    except OSError:
        try:
            os.symlink(link_text, beside)
        except OSError:
            shutil.copyfile(real, beside)
    os.replace(beside, target)
    with suppress(OSError):
        beside.unlink()  # os.replace leaves it when both are links to one file


def _found(folder: Path) -> Iterator[RemoteFile]:
    for path in sorted(folder.rglob("*")):
        size = size_of(path)
        if size is None:
            continue
        name = path.resolve().name
        known = len(name) in (40, 64) and all(char in "0123456789abcdef" for char in name)
        sha256 = name if known and len(name) == 64 else None
        yield RemoteFile(path.relative_to(folder).as_posix(), size, name if known and not sha256 else "0" * 40, sha256)
