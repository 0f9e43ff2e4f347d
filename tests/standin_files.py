"""What the stand-in Hub holds: repositories of files, on the disk or in memory, with the hashes the Hub gives them."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any

# files kept outside git, by their suffix: one rule for tree, resolve and upload
LFS_SUFFIXES = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".model"})
_CHUNK = 1 << 20
# one thread at a time hashes: two requests for a large file would read it twice
_hashing = threading.Lock()


class Refusal(Exception):
    """An answer that is an error, with the code the Hub gives it."""

    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **(headers or {})}


@dataclass(frozen=True)
class Entry:
    """One file of a repository: its content lies on the disk or in memory."""

    name: str
    source: Path | bytes = field(repr=False)
    size: int
    mtime_ns: int = 0
    listed_size: int | None = None
    in_xet: bool = False
    unread: bool = False

    @classmethod
    def on_disk(cls, name: str, path: Path, unread_above: int | None = None) -> Entry:
        status = path.stat()
        unread = unread_above is not None and status.st_size > unread_above
        return cls(name, path, status.st_size, status.st_mtime_ns, unread=unread)

    @classmethod
    def in_memory(cls, name: str, content: bytes) -> Entry:
        return cls(name, content, len(content))

    @property
    def lfs(self) -> bool:
        return PurePosixPath(self.name).suffix in LFS_SUFFIXES

    @cached_property
    def etag(self) -> str:
        """sha256 of LFS files, git's blob sha1 of the rest; of unread files of their name and size."""
        kind = "sha256" if self.lfs else "sha1"
        if self.unread:
            return _hash_of(f"{self.name} {self.size}".encode(), kind)
        if isinstance(self.source, bytes):
            return _hash_of(self.source, kind)
        with _hashing:
            return _hash_on_disk(self.source, self.size, self.mtime_ns, kind)

    @property
    def xet_hash(self) -> str:
        """A hash of xet's form; the stand-in does not compute the real one."""
        return hashlib.sha256(self.etag.encode()).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The small text that stands in git for an LFS file."""
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (self.etag.encode(), self.size)

    @property
    def git_sha1(self) -> str:
        return _hash_of(self.pointer, "sha1") if self.lfs else self.etag

    def row(self) -> dict[str, Any]:
        """The file in a tree."""
        size = self.size if self.listed_size is None else self.listed_size
        row: dict[str, Any] = {"type": "file", "oid": self.git_sha1, "size": size, "path": self.name}
        if self.lfs:
            row["lfs"] = {"oid": self.etag, "size": size, "pointerSize": len(self.pointer)}
        if self.in_xet:
            row["xetHash"] = self.xet_hash
        return row

    def sibling(self, blobs: bool) -> dict[str, Any]:
        """The file in a model info, with or without size and hashes."""
        if not blobs:
            return {"rfilename": self.name}
        row = self.row()
        sibling = {"rfilename": self.name, "size": row["size"], "blobId": row["oid"]}
        if self.lfs:
            lfs = row["lfs"]
            sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        return sibling

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Snapshot:
    """One revision of a repository."""

    repo: str
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, repo: str, entries: Iterable[Entry]) -> Snapshot:
        return cls(repo, {entry.name: entry for entry in entries})

    @cached_property
    def commit(self) -> str:
        """From names, sizes and mtimes: touching a file makes a new revision."""
        facts = [self.repo]
        for entry in sorted(self.entries.values(), key=lambda entry: entry.name):
            facts.append(f"{entry.name} {entry.size} {entry.mtime_ns or entry.etag}")
        return hashlib.sha1("\n".join(facts).encode()).hexdigest()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The whole tree: folders and files, by name."""
        folders = {str(parent) for name in self.entries for parent in PurePosixPath(name).parents} - {".", "/"}
        rows: list[dict[str, Any]] = [
            {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder}
            for folder in folders
        ]
        rows += [entry.row() for entry in self.entries.values()]
        return sorted(rows, key=lambda row: str(row["path"]))

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The rows under a folder ("" is the top)."""
        prefix = f"{folder}/" if folder else ""
        below = [row for row in self.rows if row["path"].startswith(prefix)]
        return below if recursive else [row for row in below if "/" not in row["path"][len(prefix) :]]


class Repositories:
    """Repositories <root>/<org>/<name>/, those made of bytes, and further revisions of either."""

    def __init__(self, root: Path, unread_above: int | None = None) -> None:
        self.root = root
        self._unread_above = unread_above
        self._in_memory: dict[str, Snapshot] = {}
        self._revisions: dict[str, dict[str, Path]] = {}

    def names(self) -> list[str]:
        """All repositories, as org/name."""
        folders = (path for path in self.root.glob("[!.]*/[!.]*") if path.is_dir())
        return sorted({path.relative_to(self.root).as_posix() for path in folders} | set(self._in_memory))

    def add_in_memory(self, repo: str, files: Mapping[str, bytes]) -> None:
        self._in_memory[repo] = Snapshot.of(repo, (Entry.in_memory(name, content) for name, content in files.items()))

    def add_revision(self, repo: str, revision: str, folder: Path) -> None:
        self._revisions.setdefault(repo, {})[revision] = folder

    def revisions(self, repo: str) -> list[str]:
        """Branches and tags beside main."""
        return list(self._revisions.get(repo, {}))

    def folder(self, repo: str) -> Path:
        """Where a repository on the disk lies; its name may not lead elsewhere."""
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*", repo):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.root / repo

    def snapshot(self, repo: str, revision: str = "main") -> Snapshot | None:
        """A repository's revision by name; None if there is none of that name. Refusal: no such repository."""
        others = self._revisions.get(repo, {})
        if repo in self._in_memory:
            main = self._in_memory[repo]
        elif self.folder(repo).is_dir():
            main = _read(repo, self.folder(repo), self._unread_above)
        else:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if revision == "main":
            return main
        return _read(repo, others[revision], self._unread_above) if revision in others else None


def _read(repo: str, folder: Path, unread_above: int | None) -> Snapshot:
    entries = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.endswith(".incoming"):
                continue
            path = Path(parent, name)
            entries.append(Entry.on_disk(path.relative_to(folder).as_posix(), path, unread_above))
    return Snapshot.of(repo, sorted(entries, key=lambda entry: entry.name))


def _hash_of(content: bytes, kind: str) -> str:
    digest = _digest(kind, len(content))
    digest.update(content)
    return str(digest.hexdigest())


@cache
def _hash_on_disk(path: Path, size: int, mtime_ns: int, kind: str) -> str:
    digest = _digest(kind, size)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())


def _digest(kind: str, size: int) -> Any:
    """sha256, or sha1 as git counts it: over a header and the content."""
    return hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
