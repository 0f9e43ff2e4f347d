"""Fetch a model: first a plan (files, bytes, room, terms), then several files at once, each one resumed and verified.

plan(parse("org/name:Q4_K_M")) → DownloadPlan; fetch(plan) → the folder or file to open
find(parse("org/name:Q4_K_M")) → the same when it is whole on this machine already, without a request
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import settings, store
from ..errors import InvalidModel, LlmkitError, NotEnoughRoom, OutputExists, Unreachable
from ..model import ModelRef
from . import client, local_dir, transfer
from .cache import Cache, size_of
from .choice import Choice, choose
from .repository import RemoteFile, Repository, checked
from .wire import Remote, Watch, read_range

_LARGEST_INDEX = 256_000_000


@dataclass(frozen=True)
class PlannedFile:
    """A file and where it goes: its bytes to `blob`, and `path` leads there (the same, with --to).

    `state`: "here", "cached" (only to be linked), "unchecked" (a file of that size is there), "partial", "missing".
    """

    file: RemoteFile
    path: Path
    blob: Path
    state: str
    kept_nbytes: int = 0

    @property
    def fetch_nbytes(self) -> int:
        """Bytes still to come."""
        return self.file.nbytes - self.kept_nbytes if self.state in ("partial", "missing") else 0


@dataclass(frozen=True)
class DownloadPlan:
    """What will be fetched where. `folder` is the snapshot in the cache, or the folder that was named."""

    ref: ModelRef
    repository: Repository
    choice: Choice
    files: tuple[PlannedFile, ...]
    folder: Path
    cache: Cache
    to: Path | None = None
    remarks: tuple[str, ...] = field(default=())
    read_nbytes: int = 0  # came over the wire for the plan itself: the index of the shards

    @property
    def nbytes(self) -> int:
        """Size of all the files."""
        return sum(planned.file.nbytes for planned in self.files)

    @property
    def fetch_nbytes(self) -> int:
        """Bytes still to come over the wire; content that stands under two names comes once."""
        return sum({planned.blob: planned.fetch_nbytes for planned in self.files}.values())

    @property
    def path(self) -> Path:
        """What to open: the GGUF (its first part), or the folder."""
        return self.folder / self.choice.first.path if self.choice.first else self.folder

    @property
    def free_nbytes(self) -> int:
        """Room on the disk where it goes."""
        return store.free_nbytes(self.to or self.cache.root)


@dataclass(frozen=True)
class FileDone:
    """A file that is whole now. `how`: "fetched", "resumed", "linked", "here"; `nbytes` came over the wire."""

    path: str
    size: int
    how: str
    nbytes: int = 0


def user_cache() -> Cache:
    """The user's own Hugging Face cache."""
    return Cache(client.cache_folder())


def remote_file(repository: Repository, file: RemoteFile) -> Remote:
    """Where `file` is fetched from, pinned to the repository's commit."""
    from urllib.parse import quote

    url = f"{client.address()}/{quote(repository.name)}/resolve/{repository.commit}/{quote(file.path)}"
    return Remote(f"{repository.name}: {file.path}", url, file, client.token(), client.read_timeout())


def plan(
    ref: ModelRef,
    *,
    to: Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_wait: Callable[[str], None] = lambda remark: None,
    cache: Cache | None = None,
) -> DownloadPlan:
    """Ask the Hub what there is and compare with what is here. Where it cannot be asked, what is whole here will do.

    Raises ModelNotFound, AccessDenied, InvalidModel (unsafe names, missing shards), Unsupported (pickle), OutputExists
    (another file stands in `to`), Unreachable (and not here either).
    """
    if ref.repo is None:
        raise LlmkitError(f"{ref}: is on this machine already", "Name a model of the Hub: org/name.")
    cache = cache or user_cache()
    remarks: tuple[str, ...] = ()
    try:
        repository = client.repository(ref.repo, ref.revision, on_wait)
    except Unreachable as error:
        known = _known(ref, cache)
        if known is None or (_taken(known, cache, ref, include, exclude)) is None:
            raise
        repository = known
        remarks = (f"{error.message}; using the whole copy of commit {known.commit[:8]} that is here",)
    came: list[int] = []
    read = _reader(repository, cache, on_wait, came.append)
    choice = choose(repository, quant=ref.quant, include=include, exclude=exclude, read=read)
    folder = to or cache.snapshot(repository.name, repository.commit)
    files = tuple(_planned(repository, file, folder, cache, to) for file in choice.files)
    if remarks:  # what only people read may be missing, and cannot be fetched now
        files = tuple(planned for planned in files if planned.fetch_nbytes == 0 or planned.file in choice.needed)
    return DownloadPlan(ref, repository, choice, files, folder, cache, to, remarks, sum(came))


def _reader(
    repository: Repository, cache: Cache, on_wait: Callable[[str], None], on_bytes: Callable[[int], None]
) -> Callable[[RemoteFile], bytes]:
    """Reads a small file of the repository: from the cache, else over the wire, verified; `on_bytes` counts those."""

    def read(file: RemoteFile) -> bytes:
        blob = cache.blob(repository.name, file)
        if size_of(blob) == file.nbytes:
            return blob.read_bytes()
        if file.nbytes > _LARGEST_INDEX:
            raise InvalidModel(f"{repository.name}: {file.path} has {file.nbytes:,} bytes, too many for an index")
        data = read_range(remote_file(repository, file), 0, file.nbytes, Watch(on_remark=on_wait))
        on_bytes(len(data))
        if transfer.hash_of(file, data) != file.hash:
            raise InvalidModel(f"{repository.name}: {file.path} is damaged on its way")
        return data

    return read


def _planned(repository: Repository, file: RemoteFile, folder: Path, cache: Cache, to: Path | None) -> PlannedFile:
    path, blob = folder / file.path, cache.blob(repository.name, file)
    cached = size_of(blob) == file.nbytes
    if to is None:
        here = size_of(path) == file.nbytes  # not of necessity a link: some file systems have none
        state = "here" if here else "cached" if cached else "missing"
    else:
        state = local_dir.state(to, file)
        if state == "other":
            raise OutputExists(
                f"{path}: is another file than that of {repository.name}", "Move it away, or choose another --to."
            )
        state = "cached" if state == "missing" and cached else state
        blob = blob if state == "cached" else path
    kept = transfer.kept_nbytes(blob, file) if state == "missing" else 0
    return PlannedFile(file, path, blob, "partial" if kept else state, kept)


def require_room(planned: DownloadPlan) -> None:
    """Raise NotEnoughRoom unless what is still to come fits."""
    if planned.fetch_nbytes > planned.free_nbytes:
        raise NotEnoughRoom(
            f"{planned.to or planned.cache.root}: {planned.fetch_nbytes / 1e9:.2f} GB are to come,"
            f" {planned.free_nbytes / 1e9:.2f} GB are free",
            "Free some room (`llmkit list`, `llmkit rm`), choose another --to, or a smaller quant.",
        )


def find(ref: ModelRef, cache: Cache | None = None) -> Path | None:
    """The folder or GGUF to open when all of the model is on this machine, else None. Asks nobody."""
    if ref.path is not None:
        return ref.path
    cache = cache or user_cache()
    known = _known(ref, cache)
    return None if known is None else _taken(known, cache, ref)


def _known(ref: ModelRef, cache: Cache) -> Repository | None:
    """The repository as it was last seen: from its kept listing, else from the files that are here."""
    name = str(ref.repo)
    commit = cache.commit(name, ref.revision)
    if commit is None:
        return None
    files = cache.listing(name, commit) or cache.files_here(name, commit)
    try:
        return checked(Repository(name, ref.revision or "main", commit, files))
    except InvalidModel:
        return None


def _taken(
    repository: Repository, cache: Cache, ref: ModelRef, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Path | None:
    """What to open of a known repository if every file that is needed is here."""

    def read(file: RemoteFile) -> bytes:
        return (cache.snapshot(repository.name, repository.commit) / file.path).read_bytes()

    try:
        choice = choose(repository, quant=ref.quant, include=include, exclude=exclude, read=read)
    except (LlmkitError, OSError):
        return None
    if not all(cache.holds(repository.name, repository.commit, file) for file in choice.needed):
        return None
    if choice.kind == "checkpoint" and not any(file.path == "config.json" for file in choice.files):
        return None
    folder = cache.snapshot(repository.name, repository.commit)
    return folder / choice.first.path if choice.first else folder


def reachable(seconds: float = 3.0) -> bool:
    """Whether the Hub (HF_ENDPOINT, else the public one) accepts connections within `seconds`."""
    import socket
    from urllib.parse import urlsplit

    endpoint = settings.hub_address()
    if endpoint is None:
        return False
    try:
        address = urlsplit(endpoint)
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), seconds):
            return True
    except (OSError, ValueError):  # nobody there, or no address at all
        return False
