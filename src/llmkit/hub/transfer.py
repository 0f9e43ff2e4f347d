"""One file from the Hub to the disk: it goes on where a killed process stopped, and is hashed while it comes.

Plain HTTP Range requests by urllib: huggingface_hub cannot go on after its process died (its issue #4196), and its HTTP
library takes several times the CPU for a byte. Beside the unfinished file stands a note: hash and size of what is
fetched, and how much of it is surely on the disk, which counts after a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import store
from ..errors import InvalidModel, LlmkitError, NotEnoughRoom
from .cache import size_of
from .repository import RemoteFile
from .wire import (
    KEPT,
    Again,
    DiskError,
    Remote,
    Restart,
    Stopped,
    Watch,
    check_answer,
    connection,
    open_at,
    range_start,
    wait,
)

_PIECE = 1 << 18  # bytes taken from the connection at once: what a kill can lose is less
_BLOCK = 1 << 20  # bytes handed to the hashing thread at once: handing over costs about as much as hashing a piece
_AHEAD = 4  # blocks that may wait there
_TELL_SECONDS = 0.05
_SYNC_NBYTES = 32 << 20


@dataclass(frozen=True)
class Fetched:
    """What it took: `start` is where an earlier run had stopped, `nbytes` came over the wire now."""

    start: int
    nbytes: int


def fetch(remote: Remote, path: Path, watch: Watch | None = None) -> Fetched:
    """Bring the file to `path`, whole and verified, or leave `path` as it was. The caller holds the claim on it.

    Raises InvalidModel (other size or content than listed), AccessDenied, ModelNotFound, NotEnoughRoom, LlmkitError
    (gave up; what came is kept), Stopped.
    """
    watch = watch or Watch()
    with writing(path):  # errors of the connection are dealt with below
        path.parent.mkdir(parents=True, exist_ok=True)
        with _Partial(remote, path, watch) as partial:
            while True:
                _receive_all(partial)
                if partial.verified():
                    return partial.finish()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk can raise while `path`, or a file beside it, is written into LlmkitErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughRoom(f"{path.parent}: the disk is full", f"Free some room. {KEPT}") from error
        raise LlmkitError(f"{path}: cannot be written: {error.strerror}", KEPT) from error


def _receive_all(partial: _Partial) -> None:
    """Ask, and ask again where the connection fails, until all bytes are here or it makes no sense any more."""
    tries, furthest = 0, partial.position
    while not partial.complete:
        try:
            partial.receive()
        except (Again, Restart) as error:
            if partial.position > furthest:  # coming again to where we were is no progress
                tries, furthest = 0, partial.position
            if isinstance(error, Restart):
                partial.restart(str(error))
                error = Again(str(error))
            tries = wait(partial.remote, error, tries, partial.watch)


class _Partial:
    """The unfinished file: its bytes, the hash of them, the note beside it."""

    def __init__(self, remote: Remote, path: Path, watch: Watch) -> None:
        self.remote, self.path, self.watch = remote, path, watch
        self.partial = store.partial_path(path)
        self.note = note_path(path)
        self.digest = _new_digest(remote.file)
        self.position = self.synced = self.fetched = self.resumed = 0
        self._block: list[bytes] = []
        self._block_start, self._tell_at = 0, 0.0
        self._hashing: deque[Future[None]] = deque()

    def __enter__(self) -> _Partial:
        self.descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._resume()
        except BaseException:
            os.close(self.descriptor)
            raise
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._syncer.shutdown()
        os.close(self.descriptor)

    @property
    def complete(self) -> bool:
        """Whether all bytes are here (not yet whether they are right)."""
        return self.position == self.remote.file.nbytes

    def _resume(self) -> None:
        """Take over what an earlier run left, if it is of the same content."""
        size = os.fstat(self.descriptor).st_size
        kept = kept_nbytes(self.path, self.remote.file)
        if size and not kept:
            another = _noted(self.path).get("hash") not in (None, self.remote.file.hash)
            why = "is of another version" if another else "cannot be relied on"
            self.watch.on_remark(f"what an earlier run had left {why}: starting this file again")
        os.ftruncate(self.descriptor, kept)
        while self.position < kept:
            if self.watch.stopped.is_set():
                raise Stopped
            piece = os.pread(self.descriptor, 1 << 20, self.position)
            self.digest.update(piece)
            self.position += len(piece)
        self.watch.on_position(kept)
        self.resumed = self.synced = kept
        self._write_note()

    def restart(self, why: str) -> None:
        """Forget what is here."""
        self.watch.on_remark(f"{why}: starting this file again")
        self.watch.on_position(0)
        os.ftruncate(self.descriptor, 0)
        self.digest = _new_digest(self.remote.file)
        self.position = self.synced = self.resumed = 0
        self._write_note()

    def receive(self) -> None:
        """Ask for what is missing and write it as it comes. Raises Again and Restart."""
        with connection():
            try:
                with contextlib.closing(open_at(self.remote, self.position)) as response:
                    self._check(response)
                    self._block_start = self.position
                    self._take(response)
            finally:
                self._settle()

    def _check(self, response: Any) -> None:
        check_answer(self.remote, response)
        if self.position and response.status != 206:
            self.restart(f"the server does not go on at byte {self.position:,}")
        elif response.status == 206 and range_start(response) != self.position:
            raise Restart(f"the server sent another part than asked for at byte {self.position:,}")

    def _take(self, response: Any) -> None:
        while not self.complete:
            if self.watch.stopped.is_set():
                raise Stopped
            piece = response.read1(min(_PIECE, self.remote.file.nbytes - self.position))
            if not piece:
                raise Again(f"the connection was closed at byte {self.position:,}")
            self._write(piece)
            self._block.append(piece)
            if self.position - self._block_start >= _BLOCK:
                self._hash_behind()
            self._sync_behind()

    def _hash_behind(self) -> None:
        """Let what came be hashed while more comes."""
        self._hashing.append(self._hasher.submit(self._hash, self._block))
        self._block, self._block_start = [], self.position
        if len(self._hashing) > _AHEAD:
            self._hashing.popleft().result()

    def _hash(self, block: list[bytes]) -> None:
        for piece in block:
            self.digest.update(piece)

    def _sync_behind(self) -> None:
        """Now and then let what is written be brought to the disk while more comes, so that the end need not wait."""
        if self.position - self.synced < _SYNC_NBYTES or (self._syncing is not None and not self._syncing.done()):
            return
        self._end_sync()
        self._syncing = self._syncer.submit(self._sync, self.position)

    def _end_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _settle(self) -> None:
        """Wait until all that came is hashed and no sync is under way."""
        self._hash_behind()
        while self._hashing:
            self._hashing.popleft().result()
        self._end_sync()
        self.watch.on_position(self.position)

    def _write(self, piece: bytes) -> None:
        view = memoryview(piece)
        try:
            while view:
                done = os.pwrite(self.descriptor, view, self.position)
                view, self.position = view[done:], self.position + done
        except OSError as error:
            raise DiskError(error) from error
        self.fetched += len(piece)
        if (now := time.monotonic()) >= self._tell_at:
            self.watch.on_position(self.position)
            self._tell_at = now + _TELL_SECONDS

    def _sync(self, position: int) -> None:
        """In a thread of its own: see that what was written up to `position` is on the disk, and note it."""
        try:
            os.fsync(self.descriptor)
            self.synced = position
            self._write_note()
        except OSError as error:
            raise DiskError(error) from error

    def _write_note(self) -> None:
        facts = {
            "hash": self.remote.file.hash,
            "nbytes": self.remote.file.nbytes,
            "synced": self.synced,
            "boot": _boot(),
        }
        beside = self.note.with_name(f"{self.note.name}.new")
        beside.write_text(json.dumps(facts))
        os.replace(beside, self.note)

    def verified(self) -> bool:
        """Whether the content is right; what an earlier run had left and is wrong is forgotten, to come again.

        Raises InvalidModel, and keeps nothing, when it came wrong over the wire.
        """
        found = self.digest.hexdigest()
        if found == self.remote.file.hash:
            return True
        if self.resumed:
            self.restart("what an earlier run had left was damaged")
            return False
        self.partial.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        raise InvalidModel(
            f"{self.remote.name}: its content is damaged: expected the hash {self.remote.file.hash}, found {found}",
            "Nothing of it was kept: run the same command again, or try another network.",
        )

    def finish(self) -> Fetched:
        """Give the file its name."""
        store.finish(self.partial, self.path)
        self.note.unlink(missing_ok=True)
        return Fetched(self.resumed, self.fetched)


def note_path(path: Path) -> Path:
    """The note beside the unfinished version of `path`."""
    return path.with_name(path.name + ".partial.json")


def kept_nbytes(path: Path, file: RemoteFile) -> int:
    """Bytes that an earlier run left of `file` at `path` and that can be gone on with.

    After a restart of the machine only what was surely on the disk counts.
    """
    size, noted = size_of(store.partial_path(path)), _noted(path)
    if size is None or noted.get("hash") != file.hash or noted.get("nbytes") != file.nbytes or size > file.nbytes:
        return 0
    if noted.get("boot") == _boot():
        return size
    synced = noted.get("synced")
    return max(0, min(size, synced)) if isinstance(synced, int) else 0


def _noted(path: Path) -> dict[str, Any]:
    """What the note beside the unfinished `path` says; nothing where none is, or one that cannot be read."""
    try:
        found = json.loads(note_path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _boot() -> str:
    """Names this run of the operating system, where it says so."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def hash_of(file: RemoteFile, data: bytes) -> str:
    """The hash of `data` in the kind that `file` is listed with."""
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


def digest_of(path: Path, file: RemoteFile) -> str:
    """The hash of the content of `path`, in the kind that `file` is listed with."""
    digest = _new_digest(file)
    with open(path, "rb", buffering=0) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return str(digest.hexdigest())


def _new_digest(file: RemoteFile) -> Any:
    """sha256 of the content, or git's blob hash: sha1 over 'blob', the length, a NUL, the content."""
    return hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
