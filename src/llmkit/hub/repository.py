"""A repository on the Hub at one commit: its files, as the Hub lists them. Nothing of it is believed yet.

Knows nothing of HTTP and of where files are kept.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import InvalidModel

# names that are devices on Windows, whatever their suffix; such a repository could not be fetched there
_DEVICES = {"con", "prn", "aux", "nul", *(f"{word}{digit}" for word in ("com", "lpt") for digit in "123456789")}
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
COMMIT = _SHA1
_LONGEST_NAME = 230  # bytes; file systems allow 255, and our notes beside a file have longer names


@dataclass(frozen=True)
class RemoteFile:
    """A file as listed. `sha256` of its content for large ones (LFS); `git_sha1` (git's blob hash) otherwise."""

    path: str
    nbytes: int
    git_sha1: str
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def hash(self) -> str:
        """What the content must hash to; also the file's ETag, and its name in the cache."""
        return self.sha256 or self.git_sha1

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Repository:
    """A repository at `commit`, which `revision` named. `gated`: its terms must be accepted first.

    `licence` is what the model card says.
    """

    name: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    gated: bool = False
    private: bool = False
    licence: str | None = None


def checked(repository: Repository) -> Repository:
    """The same, after a look at every name, size and hash.

    Raises InvalidModel for paths that leave the folder, absolute or reserved names, two files that are one on a file
    system that ignores case, files that are folders too, hashes and sizes that are none.
    """
    if not COMMIT.fullmatch(repository.commit):
        raise InvalidModel(
            f"{repository.name}: the Hub names the commit {repository.commit[:60]!r}, expected 40 hex digits"
        )
    seen: dict[str, str] = {}
    for file in repository.files:
        if why := _unsafe(file.path):
            raise InvalidModel(
                f"{repository.name}: the file name {file.path[:200]!r} is refused: it {why}",
                "The repository is broken or hostile: fetch nothing from it.",
            )
        if file.nbytes < 0 or not (_SHA256 if file.sha256 else _SHA1).fullmatch(file.hash):
            raise InvalidModel(
                f"{repository.name}: '{file.path}' is listed with size {file.nbytes}, hash {file.hash[:80]!r}"
            )
        if other := seen.get(_plain(file.path)):
            raise InvalidModel(
                f"{repository.name}: '{other}' and '{file.path}' would be one file where case is ignored"
            )
        seen[_plain(file.path)] = file.path
    for path in seen.values():
        folders = (seen.get(_plain(str(folder))) for folder in PurePosixPath(path).parents)
        if folder := next(filter(None, folders), None):
            raise InvalidModel(f"{repository.name}: '{folder}' is listed as a file, and as the folder of '{path}'")
    return repository


def _plain(path: str) -> str:
    """What file systems that ignore case and the way accents are written take `path` for."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _unsafe(path: str) -> str | None:
    """Why a file of this name may not be written, or None."""
    parts = path.split("/")
    if path.startswith("/") or PurePosixPath(path).is_absolute() or re.match(r"[A-Za-z]:", path):
        return "is absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "leaves its folder or has an empty part"
    if "\\" in path or any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        return "has a backslash or a control character"
    if any(part.split(".")[0].strip().lower() in _DEVICES or part[-1] in ". " for part in parts):
        return "is reserved on some systems"
    if any(len(part.encode()) > _LONGEST_NAME for part in parts):
        return "is too long"
    if parts[0].lower() == ".git" or path.endswith((".partial", ".partial.json", ".partial.lock")):
        return "is one that llmkit or git keeps for itself"
    return None
