"""The shadow of a checkpoint: a folder that looks like it, with true headers, whose weights are not there.

A cache of its own, laid out as the Hugging Face cache: small files are links, weights are holes until `fetch` makes one
real and `release` makes it a hole again. A file beside a blob, <hash>.hole, says that it is one; it is written before
the blob becomes one and removed after it has become real: a kill between the two costs a fetch and nothing else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .. import store
from ..errors import InvalidModel, LlmkitError, Unsupported
from ..progress import OnProgress, Progress, ignore
from . import crew, headers, inventory, transfer
from .cache import Cache, place, size_of
from .claim import claim
from .crew import OnFile, OnRemark
from .download import DownloadPlan, FileDone, PlannedFile, remote_file
from .repository import RemoteFile
from .wire import Watch, read_range

_WEIGHTS = (".safetensors", ".gguf")
# bytes asked for at first, of one file and of each of many shards, whose headers are short
_MOST_GUESS, _LEAST_GUESS = 1 << 18, 1 << 13
_AT_ONCE = 8


@dataclass(frozen=True)
class Shadow:
    """`folder` looks like the repository. `fetched_nbytes` came over the wire for headers and small files.

    Its `fetch` and `release` are those of quantize.streaming.ShardSource; `on_file` and `on_remark` are told of them.
    """

    plan: DownloadPlan
    cache: Cache
    folder: Path
    fetched_nbytes: int
    on_file: OnFile = lambda done: None
    on_remark: OnRemark = lambda remark: None

    @property
    def path(self) -> Path:
        """What to open: the folder, or the first GGUF."""
        return self.folder / self.plan.choice.first.path if self.plan.choice.first else self.folder

    def fetch(self, path: Path, on_progress: OnProgress = ignore) -> None:
        """Make the weights at `path` real and verified, if they are not. Raises what a download raises."""
        file = self._file(path)
        blob = self.cache.blob(self.plan.repository.name, file)
        if not _hole(blob).exists():
            return

        def count(position: int) -> None:
            on_progress(Progress("fetch", position, file.nbytes, detail=file.path))

        watch = Watch(count, lambda remark: self.on_remark(f"{file.path}: {remark}"))
        fetched = transfer.fetch(remote_file(self.plan.repository, file), blob, watch)
        _hole(blob).unlink()
        self.on_file(FileDone(file.path, file.nbytes, "resumed" if fetched.start else "fetched", fetched.nbytes))

    def fill(self, path: Path, start: int, stop: int) -> int:
        """Make these bytes of the weights at `path` real, and no others; returns how many came over the wire.

        For a look at one tensor: what has not come whole cannot be verified, so such a file stays a hole by its mark.
        """
        file = self._file(path)
        blob = self.cache.blob(self.plan.repository.name, file)
        if not _hole(blob).exists():
            return 0
        watch = Watch(on_remark=lambda remark: self.on_remark(f"{file.path}: {remark}"))
        came = read_range(remote_file(self.plan.repository, file), start, stop, watch)
        with open(blob, "r+b") as stream:
            stream.seek(start)
            stream.write(came)
        return len(came)

    def release(self, path: Path) -> None:
        """Let go of the weights at `path`; those that belong to the user's own cache stay."""
        file = self._file(path)
        blob = self.cache.blob(self.plan.repository.name, file)
        if _hole(blob).exists() or blob.is_symlink() or blob.stat().st_nlink > 1:
            return
        _hole(blob).touch()
        with open(blob, "rb") as stream:
            _writer(file)(lambda start, stop: os.pread(stream.fileno(), stop - start, start), file.nbytes, blob)

    def _file(self, path: Path) -> RemoteFile:
        name = path.relative_to(self.folder).as_posix()
        for planned in self.plan.files:
            if planned.file.path == name:
                return planned.file
        raise LlmkitError(f"{path}: is no file of {self.plan.repository.name}")


@contextmanager
def cast(
    plan: DownloadPlan,
    *,
    kept: bool = False,
    on_progress: OnProgress = ignore,
    on_remark: OnRemark = lambda remark: None,
) -> Iterator[Shadow]:
    """The shadow of what a plan would fetch: kilobytes for headers, and the small files, which land in the cache.

    A `kept` one is for fetching weights into it: they stay for the next run to go on with if they were not released,
    and one process at a time has those of a repository. Others leave nothing behind. Raises what a download raises,
    Unsupported where there are other weights than safetensors and GGUF.
    """
    name = plan.repository.name
    weights, small = _divided(plan)
    with _kept(plan, weights, on_remark) if kept else _temporary() as cache:
        came: list[FileDone] = []
        if any(each.state != "here" for each in small):
            small_plan = replace(plan, files=small)
            crew.fetch(small_plan, on_progress=on_progress, on_file=came.append, on_remark=on_remark)
        fetched = sum(done.nbytes for done in came)
        for each in small:
            _link(plan, each, cache)
        fetched += _headers(plan, weights, cache, on_remark)
        yield Shadow(plan, cache, cache.snapshot(name, plan.repository.commit), fetched + plan.read_nbytes)


@contextmanager
def outline(plan: DownloadPlan, names: Sequence[str], *, on_remark: OnRemark = lambda remark: None) -> Iterator[Shadow]:
    """A shadow of headers and of the small files called `names` alone, to be measured: it leaves nothing behind."""
    weights, small = _divided(plan)
    with _temporary() as cache:
        fetched = sum(_copy(plan, each, cache, on_remark) for each in small if each.file.path in names)
        fetched += _headers(plan, weights, cache, on_remark)
        folder = cache.snapshot(plan.repository.name, plan.repository.commit)
        yield Shadow(plan, cache, folder, fetched + plan.read_nbytes)


def _divided(plan: DownloadPlan) -> tuple[tuple[PlannedFile, ...], tuple[PlannedFile, ...]]:
    """Weights, and the other files."""
    weights = tuple(each for each in plan.files if each.file.name.endswith(_WEIGHTS))
    if not weights:
        raise Unsupported(f"{plan.ref}: has no weights llmkit reads")
    return weights, tuple(each for each in plan.files if each not in weights)


@contextmanager
def _temporary() -> Iterator[Cache]:
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        yield Cache(Path(folder))


@contextmanager
def _kept(plan: DownloadPlan, weights: Sequence[PlannedFile], on_remark: OnRemark) -> Iterator[Cache]:
    """The cache of streams, ours alone as far as this repository goes; tidied at the end."""
    name, cache = plan.repository.name, Cache(inventory.streams_folder())
    store.make_folder(cache.root, inventory.ANOTHER_HOME)

    def tell(pid: int) -> None:
        on_remark(f"{name} is being worked on by process {pid or 'of another kind'}: waiting for it")

    with claim(cache.folder(name), tell):  # not of the commit: two of them share blobs
        try:
            yield cache
        finally:
            _tidy(plan, weights, cache)


def _copy(plan: DownloadPlan, planned: PlannedFile, cache: Cache, on_remark: OnRemark) -> int:
    """A small file for the shadow alone; bytes that came."""
    if not planned.fetch_nbytes:
        _link(plan, planned, cache)
        return 0
    name, file = plan.repository.name, planned.file
    watch = Watch(on_remark=lambda remark: on_remark(f"{file.path}: {remark}"))
    came = transfer.fetch(remote_file(plan.repository, file), cache.blob(name, file), watch).nbytes
    cache.link(name, plan.repository.commit, file)
    return came


def _tidy(plan: DownloadPlan, weights: Sequence[PlannedFile], cache: Cache) -> None:
    """Remove the shadow, unless fetched weights are in it; those of other commits stay too."""
    name = plan.repository.name
    if not all(_is_idle(cache.blob(name, each.file)) for each in weights):
        return
    shutil.rmtree(cache.snapshot(name, plan.repository.commit), ignore_errors=True)
    for blob in (cache.blob(name, each.file) for each in plan.files):
        blob.unlink(missing_ok=True)
        _hole(blob).unlink(missing_ok=True)
    blobs = cache.folder(name) / "blobs"
    if not blobs.is_dir() or not any(blobs.iterdir()):
        shutil.rmtree(cache.folder(name), ignore_errors=True)


def _is_idle(blob: Path) -> bool:
    """Whether no fetched weights would be lost with it."""
    if transfer.note_path(blob).exists():
        return False
    return _hole(blob).exists() or blob.is_symlink() or not blob.exists() or blob.stat().st_nlink > 1


def _link(plan: DownloadPlan, planned: PlannedFile, cache: Cache) -> None:
    """Let the shadow have a file of the user's cache."""
    name, blob = plan.repository.name, cache.blob(plan.repository.name, planned.file)
    if size_of(blob) != planned.file.nbytes:
        place(planned.blob, blob)
    cache.link(name, plan.repository.commit, planned.file)


def _headers(plan: DownloadPlan, weights: Sequence[PlannedFile], cache: Cache, on_remark: OnRemark) -> int:
    """The headers of all weights, several at once; bytes that came for them."""
    guess, stopped = max(_MOST_GUESS // len(weights), _LEAST_GUESS), threading.Event()

    def header(planned: PlannedFile) -> int:
        watch = Watch(on_remark=lambda remark: on_remark(f"{planned.file.path}: {remark}"), stopped=stopped)
        return _header(plan, planned, cache, guess, watch)

    return sum(crew.side_by_side(header, weights, _AT_ONCE, stopped))


def _header(plan: DownloadPlan, planned: PlannedFile, cache: Cache, guess: int, watch: Watch) -> int:
    """The header of weights, or the weights themselves where the user's cache has them; bytes that came for it."""
    name, file = plan.repository.name, planned.file
    blob = cache.blob(name, file)
    fetched = 0
    if planned.fetch_nbytes == 0:
        if _hole(blob).exists():
            blob.unlink(missing_ok=True)
        _link(plan, planned, cache)
        _hole(blob).unlink(missing_ok=True)
    elif size_of(blob) != file.nbytes:
        blob.parent.mkdir(parents=True, exist_ok=True)
        _hole(blob).touch()
        remote = remote_file(plan.repository, file)
        try:
            fetched = _writer(file, guess)(
                lambda start, stop: read_range(remote, start, stop, watch), file.nbytes, blob
            )
        except InvalidModel as error:  # it names the blob
            message = error.message.replace(str(blob), f"{plan.repository.name}: {file.path}")
            raise InvalidModel(message, error.hint) from error
    cache.link(name, plan.repository.commit, file)
    return fetched


def _writer(file: RemoteFile, guess: int = _MOST_GUESS) -> Callable[[headers.ReadRange, int, Path], int]:
    return headers.gguf_header if file.name.endswith(".gguf") else partial(headers.safetensors_header, guess=guess)


def _hole(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.hole")
