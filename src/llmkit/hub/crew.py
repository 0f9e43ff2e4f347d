"""A crew of a few threads, each with one thing at a time: `fetch` brings a plan's files, `side_by_side` does any work.

Threads are left to themselves when an error or Ctrl-C ends the work: one may wait for a silent server for a minute.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .. import store
from ..errors import OutputExists
from ..progress import OnProgress, Progress, ignore
from . import cache as cache_layout
from . import local_dir, transfer
from .claim import claim
from .download import DownloadPlan, FileDone, PlannedFile, remote_file, require_room
from .wire import Stopped, Watch

OnFile = Callable[[FileDone], None]
OnRemark = Callable[[str], None]
T = TypeVar("T")
R = TypeVar("R")
_JOIN_SECONDS = 0.5  # for all of them together


@dataclass(frozen=True)
class _Came:
    """How many bytes of `path` are here now; or a remark about it."""

    path: str
    position: int = 0
    remark: str | None = None


def fetch(
    plan: DownloadPlan,
    *,
    workers: int = 4,
    on_progress: OnProgress = ignore,
    on_file: OnFile = lambda done: None,
    on_remark: OnRemark = lambda remark: None,
) -> Path:
    """Bring every file of the plan and return what to open. The branch's note is moved to the new commit at the end.

    Progress counts bytes that are here; it begins with those of earlier runs. Raises what transfer.fetch raises; what
    came is kept.
    """
    require_room(plan)
    folder = plan.cache.folder(plan.repository.name)
    if plan.to or any(planned.state != "here" for planned in plan.files):  # else the cache may well be read-only
        if plan.to:
            store.make_folder(plan.to, "Choose another folder with --to.")
        else:
            store.make_folder(folder, "HF_HUB_CACHE names another folder for the cache; --to one beside it.")
        if plan.to is None:
            with transfer.writing(folder / "trees"):
                plan.cache.keep_listing(plan.repository)
    _Crew(plan, on_progress, on_file, on_remark).run(workers)
    if plan.to is None and not plan.remarks:
        with transfer.writing(folder / "refs"):
            plan.cache.set_commit(plan.repository.name, plan.repository.revision, plan.repository.commit)
    return plan.path


def side_by_side(work: Callable[[T], R], items: Sequence[T], at_once: int, stopped: threading.Event) -> list[R]:
    """`work` of every item, in order. The first error is raised; `stopped` is set at the end, for who still works."""
    left, lock = iter(enumerate(items)), threading.Lock()
    events: queue.SimpleQueue[tuple[int, R] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    number, item = next(left, (None, None))
                if number is None or item is None:
                    return
                events.put((number, work(item)))
        except BaseException as error:  # handed to the thread that waits, which raises it
            events.put(error)

    done: dict[int, R] = {}
    with _threads(run, min(at_once, len(items)), stopped):
        while len(done) < len(items):
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            done[event[0]] = event[1]
    return [done[number] for number in range(len(items))]


@contextmanager
def _threads(run: Callable[[], None], count: int, stopped: threading.Event) -> Iterator[None]:
    """Threads that run while the block does; at its end they are told to stop, and soon left to themselves."""
    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        end = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


class _Crew:
    def __init__(self, plan: DownloadPlan, on_progress: OnProgress, on_file: OnFile, on_remark: OnRemark) -> None:
        self.plan = plan
        self.on_progress, self.on_file, self.on_remark = on_progress, on_file, on_remark
        self.events: queue.SimpleQueue[_Came | FileDone | BaseException | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        # small files first: a config that is there early helps whoever looks
        self._next: Iterator[PlannedFile] = iter(sorted(plan.files, key=lambda planned: planned.file.nbytes))
        self._lock = threading.Lock()
        self.here = {planned.file.path: planned.file.nbytes - planned.fetch_nbytes for planned in plan.files}
        self.done, self.total = sum(self.here.values()), sum(planned.file.nbytes for planned in plan.files)

    def run(self, workers: int) -> None:
        """Work through the files; on any error or interrupt let all stop, and raise it."""
        count = max(1, min(workers, len(self.plan.files)))
        with _threads(self._work, count, self.stopped):
            self._collect(count)

    def _collect(self, alive: int) -> None:
        self.on_progress(Progress("fetch", self.done, self.total))
        while alive:
            event = self.events.get()
            if event is None:
                alive -= 1
            elif isinstance(event, BaseException):
                raise event
            elif isinstance(event, FileDone):
                self.on_file(event)
            elif event.remark is not None:
                self.on_remark(f"{event.path}: {event.remark}")
            else:
                self.done += event.position - self.here[event.path]
                self.here[event.path] = event.position
                self.on_progress(Progress("fetch", self.done, self.total, detail=event.path))

    def _work(self) -> None:
        try:
            while not self.stopped.is_set():
                with self._lock:
                    planned = next(self._next, None)
                if planned is None:
                    break
                with transfer.writing(planned.path):
                    self.events.put(self._bring(planned))
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that waits, which raises it
            self.events.put(error)
        self.events.put(None)

    def _bring(self, planned: PlannedFile) -> FileDone:
        """Make one file whole at its place."""
        path, file = planned.file.path, planned.file
        watch = Watch(
            on_position=lambda position: self.events.put(_Came(path, position)),
            on_remark=lambda remark: self.events.put(_Came(path, remark=remark)),
            stopped=self.stopped,
        )
        how, nbytes = planned.state, 0
        if planned.state == "unchecked":
            if not local_dir.is_same(planned.path, file):
                raise OutputExists(
                    f"{planned.path}: has the size of {path} and another content",
                    "Move it away, or choose another --to.",
                )
            how = "here"
        elif planned.state in ("partial", "missing"):
            how, nbytes = self._fetch(planned, watch)
        if how in ("here", "cached"):
            watch.on_position(file.nbytes)
        self._put_in_place(planned, how)
        return FileDone(path, file.nbytes, "linked" if how == "cached" else how, nbytes)

    def _fetch(self, planned: PlannedFile, watch: Watch) -> tuple[str, int]:
        def tell(pid: int) -> None:
            if pid != os.getpid():  # else the same content under another name
                watch.on_remark(f"is being fetched by {f'process {pid}' if pid else 'another process'}: waiting for it")

        with claim(planned.blob, tell, self.stopped.is_set) as ours:
            if not ours:
                raise Stopped
            if self._came_meanwhile(planned):
                return "here" if planned.path == planned.blob else "cached", 0
            remote = remote_file(self.plan.repository, planned.file)
            fetched = transfer.fetch(remote, planned.blob, watch)
            if self.plan.to is not None:
                local_dir.keep_note(self.plan.to, planned.file, self.plan.repository.commit)
        return "resumed" if fetched.start else "fetched", fetched.nbytes

    def _came_meanwhile(self, planned: PlannedFile) -> bool:
        """Whether another process has brought it while we planned or waited."""
        if self.plan.to is not None:
            return local_dir.state(self.plan.to, planned.file) == "here"
        return cache_layout.size_of(planned.blob) == planned.file.nbytes

    def _put_in_place(self, planned: PlannedFile, how: str) -> None:
        if self.plan.to is None:
            if cache_layout.size_of(planned.path) != planned.file.nbytes or how != "here":
                self.plan.cache.link(self.plan.repository.name, self.plan.repository.commit, planned.file)
        elif how == "cached":
            cache_layout.place(planned.blob, planned.path)
            local_dir.keep_note(self.plan.to, planned.file, self.plan.repository.commit)
        elif planned.state == "unchecked":
            local_dir.keep_note(self.plan.to, planned.file, self.plan.repository.commit)
