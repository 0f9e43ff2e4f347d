"""The one pass: every weight is read once, quantized for every output by a pool of threads, written where it belongs.

Offsets are known beforehand, so chunks of rows are written in place in any order. Memory holds a few chunks a thread.
Kernels are ggml's (ggml_quantize_chunk): rows are independent, so the bytes do not depend on chunks or threads.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import engine, settings, store
from ..convert.tensors import LazyTensor, Rows, all_finite, read_span
from ..errors import InvalidModel, LlmkitError, NotEnoughRoom
from ..progress import OnProgress, Progress, ignore
from ..quants import F32, TensorType
from .journal import Journal, open_journal
from .plan import OutputPlan, Plan

_CHUNK_WEIGHTS = 1 << 20
_SLOW_CHUNK_WEIGHTS = 1 << 17  # for i-quants: their kernels take seconds for a million weights, and Ctrl-C waits
_SYNC_SECONDS = 5.0
_ENOSPC = 28
_FREE_SOME = "Free some room and run the same command again: it goes on where it stopped."
# Weights beyond this fit no block's half-precision scale; the i-quants' kernels abort on some of them.
_LARGEST = 1e6


@dataclass(frozen=True)
class Result:
    """One output as it was made. `seconds` is the whole pass; `cpu_seconds` this output's kernels and writing.

    Reading and widening a chunk counts for the first output that needs it.
    """

    output: OutputPlan
    seconds: float
    cpu_seconds: float
    resumed: int


@dataclass(frozen=True)
class Round:
    """Tensors that are made together: after `prepare`, before `release`, which may take away the files they read.

    When `release` is called the tensors are on the disk and in the journal.
    """

    tensors: tuple[LazyTensor, ...]
    prepare: Callable[[], None]
    release: Callable[[], None]


# The tensors that are left → the rounds that make them all. What a round prepares is there when the next one is asked.
Rounds = Callable[[tuple[LazyTensor, ...]], Iterable[Round]]


def all_at_once(tensors: tuple[LazyTensor, ...]) -> list[Round]:
    """One round, for files that are all there."""
    return [Round(tensors, lambda: None, lambda: None)]


@dataclass(frozen=True)
class _Chunk:
    """Rows `start` to `stop` of a tensor, inside matrix `matrix` of its stack, for the outputs that lack them."""

    tensor: LazyTensor
    start: int
    stop: int
    matrix: int
    targets: tuple[_Target, ...]


@dataclass
class _Target:
    """An output while it is written: one descriptor a file, and what is done."""

    output: OutputPlan
    journal: Journal
    descriptors: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    finished: list[str] = field(default_factory=list)
    whole: bool = False
    # The kernel lets one thread at a time write to a file. Those that wait for it there burn CPU, here they sleep.
    writing: threading.Lock = field(default_factory=threading.Lock)

    def place(self, name: str) -> tuple[int, int]:
        """Descriptor and offset of a tensor."""
        for file in self.output.files:
            if name in file.offsets:
                return self.descriptors[str(file.path)], file.offsets[name]
        raise KeyError(name)


def run(
    plan: Plan, *, threads: int | None = None, on_progress: OnProgress = ignore, rounds: Rounds = all_at_once
) -> list[Result]:
    """Write the plan's outputs. An interrupted or killed run leaves partial files that the next run goes on from.

    Progress counts source bytes; what `rounds` prepare, they report themselves.

    Raises NotEnoughRoom, InvalidModel (source changed, values not finite), LlmkitError.
    """
    if not plan.outputs:
        return []
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            targets = [_open(output, stack) for output in plan.outputs]
            resumed = {target.output.label: len(target.journal.done) for target in targets}
            _Pass(plan, targets, threads or settings.threads(), on_progress).run(rounds)
            _finish(targets, on_progress)
    except OSError as error:
        raise _writing_failed(error) from error
    seconds = time.monotonic() - began
    return [Result(each.output, seconds, each.cpu_seconds, resumed[each.output.label]) for each in targets]


def _open(output: OutputPlan, stack: ExitStack) -> _Target:
    journal = open_journal(output)
    target = _Target(output, journal)
    stack.callback(lambda: journal.close(finished=target.whole))
    fresh = not journal.done
    for file in output.files:
        partial = store.partial_path(file.path)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
        target.descriptors[str(file.path)] = descriptor
        stack.callback(_close, target, str(file.path))
        _reserve(descriptor, file.nbytes, partial)
        os.pwrite(descriptor, file.header, 0)
    return target


def _close(target: _Target, path: str) -> None:
    if (descriptor := target.descriptors.pop(path, None)) is not None:
        os.close(descriptor)


def _reserve(descriptor: int, nbytes: int, path: Path) -> None:
    """Take the room now rather than find the disk full at 90 %; where that cannot be, just set the size."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno == _ENOSPC:
            raise NotEnoughRoom(f"{path}: the disk has no room for {nbytes:,} bytes", _FREE_SOME) from None
    os.truncate(descriptor, nbytes)


def _finish(targets: Sequence[_Target], on_progress: OnProgress) -> None:
    """Sync everything, then rename: nothing gets its final name before all of its output is on the disk."""
    for target in targets:
        on_progress(Progress("finish", 0, 1, detail=target.output.path.name))
        for file in target.output.files:
            os.fsync(target.descriptors[str(file.path)])
    for target in targets:
        for file in target.output.files:
            _close(target, str(file.path))
            os.replace(store.partial_path(file.path), file.path)
        store.sync_folder(target.output.path.parent)
        target.whole = True


class _Pass:
    """The pool: threads take chunks in order, this thread counts, syncs, reports and notices Ctrl-C."""

    def __init__(self, plan: Plan, targets: Sequence[_Target], threads: int, on_progress: OnProgress) -> None:
        self.targets = targets
        self.n_threads = threads
        self.on_progress = on_progress
        self.engine = engine.load()
        self.left = tuple(tensor for tensor in plan.draft.tensors if _lacking(tensor, targets))
        self.total = sum(_source_nbytes(tensor, 0, tensor.n_rows) for tensor in plan.draft.tensors)
        self.done = self.total - sum(_source_nbytes(tensor, 0, tensor.n_rows) for tensor in self.left)
        self.chunks_left: Counter[str] = Counter()
        self.events: queue.SimpleQueue[tuple[_Chunk, list[float]] | BaseException | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self._next: Iterator[_Chunk] = iter(())
        self._lock = threading.Lock()
        self._synced = time.monotonic()

    def run(self, rounds: Rounds) -> None:
        """Work through all rounds. Raises what a round raises, after recording what is whole."""
        for kind in {
            kind.ggml_id for target in self.targets for kind in target.output.types.values() if kind.quantized
        }:
            self.engine.functions["ggml_quantize_init"](kind)  # else the first chunks would wait for each other
        for each in rounds(self.left):
            each.prepare()
            self._make_all(each.tensors)
            each.release()
        if self.done != self.total:  # a file with holes must not get its final name
            raise LlmkitError(f"{self.total - self.done:,} bytes of the source were in no round")

    def _make_all(self, tensors: Sequence[LazyTensor]) -> None:
        """Work through all chunks; on any error or interrupt stop the threads, record what is whole, and raise."""
        chunks = [chunk for tensor in tensors for chunk in _chunks(tensor, self.targets)]
        self.chunks_left = Counter(chunk.tensor.name for chunk in chunks)
        self._next = iter(chunks)
        self.stop.clear()
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(self.n_threads)]
        for worker in workers:
            worker.start()
        try:
            self._collect(len(workers))
        finally:
            self.stop.set()
            for worker in workers:
                worker.join()
            self._sync()

    def _collect(self, alive: int) -> None:
        self._report("")
        while alive:
            event = self.events.get()
            if event is None:
                alive -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                self._count(*event)

    def _count(self, chunk: _Chunk, seconds: list[float]) -> None:
        name = chunk.tensor.name
        self.done += _source_nbytes(chunk.tensor, chunk.start, chunk.stop)
        self.chunks_left[name] -= 1
        for target, spent in zip(chunk.targets, seconds, strict=True):
            target.cpu_seconds += spent
        if not self.chunks_left[name]:
            for target in chunk.targets:
                target.finished.append(name)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()
        self._report(name)

    def _report(self, detail: str) -> None:
        self.on_progress(Progress("quantize", self.done, self.total, detail=detail))

    def _sync(self) -> None:
        """Put finished tensors on the disk, then into the journal."""
        for target in self.targets:
            if target.finished:
                for descriptor in target.descriptors.values():
                    os.fsync(descriptor)
                target.journal.add(target.finished)
                target.finished = []
        self._synced = time.monotonic()

    def _take(self) -> _Chunk | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._next, None)

    def _work(self) -> None:
        try:
            while (chunk := self._take()) is not None:
                self.events.put((chunk, self._make(chunk)))
        except BaseException as error:  # handed to the thread that waits, which raises it
            self.events.put(error)
        self.events.put(None)

    def _make(self, chunk: _Chunk) -> list[float]:
        """Read the chunk once, write it for every target; CPU seconds each took."""
        tensor = chunk.tensor
        raw: Rows | None = None
        values: Rows | None = None
        seconds = []
        for target in chunk.targets:
            before = time.thread_time()
            kind = target.output.types[tensor.name]
            descriptor, offset = target.place(tensor.name)
            offset += chunk.start * kind.row_nbytes(tensor.width)
            if kind is tensor.type and tensor.span:
                with target.writing:
                    _copy(chunk, descriptor, offset)
            else:
                raw = _read(chunk) if raw is None else raw
                if kind is tensor.type:
                    block = np.ascontiguousarray(raw)
                else:
                    values = np.ascontiguousarray(tensor.widen(raw)) if values is None else values
                    block = self._quantize(chunk, values, kind, target)
                with target.writing:
                    _write(descriptor, block, offset)
            seconds.append(time.thread_time() - before)
        return seconds

    def _quantize(self, chunk: _Chunk, values: Rows, kind: TensorType, target: _Target) -> Rows:
        """float32 rows → rows of `kind`, by ggml's kernel."""
        if kind is F32:
            return values
        width, n_rows = chunk.tensor.width, chunk.stop - chunk.start
        if kind.name.startswith("IQ") and max(values.max(), -values.min()) > _LARGEST:
            raise _not_finite(chunk, kind)
        importance = target.output.imatrix.of(chunk.tensor) if target.output.imatrix else None
        address = None if importance is None else np.ascontiguousarray(importance[chunk.matrix]).ctypes.data
        block = np.empty((n_rows, kind.row_nbytes(width)), np.uint8)
        self.engine.quantize_chunk(kind.ggml_id, values.ctypes.data, block.ctypes.data, 0, n_rows, width, address)
        if not self.engine.validate_rows(kind.ggml_id, block.ctypes.data, block.nbytes):
            raise _not_finite(chunk, kind)
        return block


def _read(chunk: _Chunk) -> Rows:
    """The chunk's rows as the source has them. Raises InvalidModel when they hold NaN or infinity."""
    tensor = chunk.tensor
    rows = tensor.read(chunk.start, chunk.stop)
    if not all_finite(rows, tensor.type):
        raise InvalidModel(
            f"tensor '{tensor.name}', rows {chunk.start} to {chunk.stop}: the source holds values that are not finite",
            "Its training or download went wrong; no quant can be made from it.",
        )
    return rows


def _not_finite(chunk: _Chunk, kind: TensorType) -> InvalidModel:
    where = f"tensor '{chunk.tensor.name}', rows {chunk.start} to {chunk.stop}"
    return InvalidModel(
        f"{where}: holds numbers too large for {kind.name}, which would give values that are not finite"
    )


def _writing_failed(error: OSError) -> LlmkitError:
    if error.errno == _ENOSPC:
        return NotEnoughRoom("the disk is full", _FREE_SOME)
    return LlmkitError(f"{error.filename or 'the output'}: writing failed: {error.strerror}", _FREE_SOME)


def _copy(chunk: _Chunk, descriptor: int, offset: int) -> None:
    """Rows that lie in a file as they are wanted: copied inside the kernel, where it can."""
    path, begin = chunk.tensor.span or (Path(), 0)
    start, nbytes = (
        begin + _source_nbytes(chunk.tensor, 0, chunk.start),
        _source_nbytes(chunk.tensor, chunk.start, chunk.stop),
    )
    done = 0
    try:
        with open(path, "rb", buffering=0) as source:
            while done < nbytes and (
                count := os.copy_file_range(source.fileno(), descriptor, nbytes - done, start + done, offset + done)
            ):
                done += count
    except (AttributeError, OSError):
        pass  # not Linux, or two kinds of file systems: read and write the rest
    if done < nbytes:
        _write(descriptor, read_span(path, start + done, nbytes - done), offset + done)


def _write(descriptor: int, block: Rows, offset: int) -> None:
    view = block.data.cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _source_nbytes(tensor: LazyTensor, start: int, stop: int) -> int:
    return (stop - start) * tensor.type.row_nbytes(tensor.width)


def _lacking(tensor: LazyTensor, targets: Sequence[_Target]) -> tuple[_Target, ...]:
    """The outputs that do not have the tensor from an earlier run."""
    return tuple(target for target in targets if tensor.name not in target.journal.done)


def _chunks(tensor: LazyTensor, targets: Sequence[_Target]) -> Iterator[_Chunk]:
    """A tensor in chunks of about a million weights that never cross from one matrix of a stack to the next."""
    lacking = _lacking(tensor, targets)
    rows_each = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    slow = any(target.output.types[tensor.name].name.startswith("IQ") for target in lacking)
    step = max(1, (_SLOW_CHUNK_WEIGHTS if slow else _CHUNK_WEIGHTS) // max(1, tensor.width))
    for first in range(0, tensor.n_rows, max(1, rows_each)):
        for start in range(first, first + rows_each, step):
            yield _Chunk(tensor, start, min(start + step, first + rows_each), first // max(1, rows_each), lacking)
