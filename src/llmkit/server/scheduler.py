"""The engine thread: it alone touches the session, and writes all answers at once, a token each a round.

A round is one call of `Session.eval_parts`: the next token of every answer under way, and beside them a chunk of the
prompts that are to be read, divided among them, so that neither a long prompt stops the answers nor answers a prompt.
With a KV cache shared by all slots a prompt begins with whatever beginning of it any slot holds. Between rounds the
thread runs functions handed to `call`: inspection and embeddings use the same weights.

A request with a seed that finds nobody else at work gives the same tokens every time: it begins in an empty cache,
or after what was evaluated in the very same way. Beside others the engine rounds in another way (one token and many
take other kernels, and cells lie in another order), so that where two tokens are nearly as likely, the other may come.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from ..backends import Backend, Part, Rows
from ..errors import EngineError, LlmkitError, Unsupported
from .jobs import Busy, Closed, ContextTooLong, Job, Request
from .metrics import Stats
from .slots import Slot, Slots
from .writing import Writing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_COUNTS = (
    "submitted", "refused", "ended", "cancelled", "failed", "prompt_tokens", "reused_tokens", "decoded_tokens",
    "rounds", "remade", "begun", "first",
)  # fmt: skip
_TIMES = ("engine", "busy", "waited", "first")

CHUNK = 256  # prompt tokens a round: after so many it can be cancelled, and others have their turn
ROUND_MS = 250.0  # how long a round with answers in it may take for the sake of prompts
_LEAST = 32  # prompt tokens a round, however long they take: fewer would not be much faster
_ECHO = 64  # of those whose logits are all kept for a moment
_GROWTH = 64  # cells more for an answer without an end of its own
_WORTH = 32  # tokens of a beginning that another prompt has first, for which it pays to wait
_MOST_RETRY = 60.0


class Scheduler:
    """Continuous batching on one backend. `context`: cells, of all `slots` together; `queue`: how many may wait.

    `chunk`: tokens of prompts a round, fewer beside answers where they would take longer than about `round_ms`. Raises
    EngineError when the session does not fit into memory. A model that only reads gets no session: `call` works.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        context: int,
        slots: int = 4,
        queue: int = 64,
        chunk: int = CHUNK,
        round_ms: float = ROUND_MS,
    ) -> None:
        self.backend, self.context, self.slots, self.queue = backend, context, slots, queue
        self._chunk, self._round_ms = chunk, round_ms
        self._pace = 0.0  # ms a token, in rounds with prompts
        self._lock = threading.Condition()  # guards the next three
        self._waiting: list[Writing] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closed = False
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._times = dict.fromkeys(_TIMES, 0.0)  # ms
        self._evicted = 0  # by sessions that are no more
        self._served: dict[str, int] = {}  # key → when an answer for it was begun last
        self._held: Slots | None = None
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(ready,), name="llmkit engine", daemon=True)
        self._thread.start()
        ready.result()

    # ── for every thread ──

    def submit(self, request: Request) -> Job:
        """Queue a request. A grammar never seen before is first tried, which may take a second.

        Raises Busy when too many wait, ContextTooLong, Closed, Unsupported for a model that only reads, and for
        settings it cannot follow, LlmkitError for a wrong grammar, ValueError for tokens that are none.
        """
        self._check(request)
        self._require_place()
        job = Job(request, self._wake)
        writing = Writing(job, self.backend)
        with self._lock:
            try:
                self._require_place()
            except LlmkitError:
                writing.drop()
                raise
            self._counts["submitted"] += 1
            self._waiting.append(writing)
            self._lock.notify()
        return job

    def _check(self, request: Request) -> None:
        info, prompt = self.backend.info, request.prompt
        if not info.generates:
            raise Unsupported(f"{info.name}: makes vectors of texts ({info.architecture}), it cannot write an answer")
        if len(prompt) >= self.context:
            raise ContextTooLong(len(prompt), self.context)
        if not prompt or not 0 <= min(prompt) <= max(prompt) < info.n_vocab:
            raise ValueError(f"expected one or more tokens of a vocabulary of {info.n_vocab}")

    def _require_place(self) -> None:
        with self._lock:
            if self._closed:
                raise Closed(f"{self.backend.info.name}: the model is being unloaded")
            if len(self._waiting) >= self.queue:
                self._counts["refused"] += 1
                seconds = self._retry_after()
                message = f"{len(self._waiting)} requests are waiting already, more are not taken"
                raise Busy(message, f"Try again in {seconds:.0f} s.", retry_after=seconds)

    def _retry_after(self) -> float:
        """About how long until one that waits gets a slot: what answers took so far, and how many slots there are."""
        ended = sum(self._counts[name] for name in ("ended", "cancelled", "failed"))
        each = self._times["busy"] / 1000 / ended if ended else 1.0
        return min(_MOST_RETRY, max(1.0, each))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the engine thread, between two rounds; the Future has what it gives or raises."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Closed(f"{self.backend.info.name}: the model is being unloaded")
            self._calls.append((function, future))
            self._lock.notify()
        return future

    def stats(self) -> Stats:
        """What it has done and does."""
        held = self._held
        numbers: dict[str, Any] = {**self._counts, **{f"{name}_ms": value for name, value in self._times.items()}}
        return Stats(
            slots=self.slots,
            running=len(held.running) if held else 0,
            waiting=len(self._waiting),
            context=self.context,
            cells_used=held.used if held else 0,
            cells_reserved=held.reserved if held else 0,
            evictions=self._evicted + (held.evictions if held else 0),
            **numbers,
        )

    def close(self) -> None:
        """End the thread and free the session; jobs under way fail with Closed. A second call does nothing."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    # ── the engine thread ──

    def _work(self, ready: Future[None]) -> None:
        try:
            self._held = self._make_slots()
        except BaseException as error:  # told where the scheduler is made
            ready.set_exception(error)
            return
        ready.set_result(None)
        while self._next():
            began = perf_counter()
            self._run_call()
            self._round()
            self._times["busy"] += 1000 * (perf_counter() - began)
        self._end()

    def _make_slots(self) -> Slots | None:
        if not self.backend.info.generates:
            return None
        return Slots(self.backend, context=self.context, count=self.slots, chunk=self._chunk)

    def _next(self) -> bool:
        """Wait until there is something to do; False when it is over."""
        with self._lock:
            while not (self._closed or self._calls or self._waiting or (self._held and self._held.running)):
                self._lock.wait()
            return not self._closed

    def _run_call(self) -> None:
        """One function a round: answers go on between two of them."""
        with self._lock:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:  # the caller's, whatever it is
            future.set_exception(error)

    def _round(self) -> None:
        """Whatever goes wrong in it ends the answers that were in it; the next round has a new session."""
        held = self._held
        try:
            self._drop_cancelled(held)
            if held is None:
                if not self._waiting:
                    return
                held = self._held = self._make_slots()
            if held is not None:
                self._admit(held)
                self._evaluate(held)
        except LlmkitError as error:
            self._fail(error)
        except Exception as error:
            _log.exception("a round of the engine thread failed")
            self._fail(EngineError(f"the engine thread failed: {type(error).__name__}: {error}"))

    def _evaluate(self, held: Slots) -> None:
        parts = self._parts(held)
        if not parts:
            return
        began = perf_counter()
        rows = held.session.eval_parts(parts)
        self._measure(1000 * (perf_counter() - began), sum(len(part.tokens) for part in parts))
        for part, logits in zip(parts, rows, strict=True):
            held.hold(held.all[part.sequence], part.tokens, alone=len(parts) == 1)
            self._advance(held, held.all[part.sequence], len(part.tokens), logits)

    def _measure(self, ms: float, tokens: int) -> None:
        self._times["engine"] += ms
        self._counts["rounds"] += 1
        if tokens >= _LEAST:
            self._pace = (self._pace + ms / tokens) / 2 if self._pace else ms / tokens

    def _beside(self) -> int:
        """How many tokens of prompts go beside answers without holding them up for long."""
        return self._chunk if not self._pace else min(self._chunk, max(_LEAST, int(self._round_ms / self._pace)))

    def _parts(self, held: Slots) -> list[Part]:
        """What is to be evaluated next: a token of each answer, and as much of the prompts as goes beside them."""
        parts, reading = list[Part](), list[tuple[int, Slot, Writing]]()
        for slot in held.running:
            writing = slot.writing
            if writing is None:
                continue
            if writing.reading:
                reading.append((len(writing.history) - len(slot.tokens), slot, writing))
            else:
                parts.append(Part(slot.index, writing.history[-1:]))
        budget = self._beside() if parts else self._chunk
        reading.sort(key=lambda each: each[0])  # what short ones leave goes to the longer ones
        shown = sum(writing.wants_all_rows for _, _, writing in reading)
        for position, (left, slot, writing) in enumerate(reading):
            size = min(left, max(1, budget // (len(reading) - position)))
            size = min(size, max(1, _ECHO // shown)) if writing.wants_all_rows else size
            start = len(slot.tokens)
            rows: Rows = "all" if writing.wants_all_rows else "last" if size == left else "none"
            parts.append(Part(slot.index, writing.history[start : start + size], rows))
            budget -= size
        return parts

    def _advance(self, held: Slots, slot: Slot, count: int, logits: Floats) -> None:
        """The session has evaluated the last `count` tokens that the slot holds, and given `logits`."""
        writing = slot.writing
        if writing is None or writing.job.cancelled:
            return
        first = writing.reading
        try:
            if first:
                self._counts["prompt_tokens"] += count
                writing.show(logits, len(slot.tokens) - count)
                if len(slot.tokens) < len(writing.history):
                    return
            self._counts["decoded_tokens"] += 1
            goes_on = writing.write(logits[-1], full=self._is_full(held, slot, writing))
        except LlmkitError as error:
            self._over(held, slot, "failed", error)
            return
        if first:
            self._counts["first"] += 1
            self._times["first"] += writing.first_ms
        if not goes_on:
            self._over(held, slot, "ended")

    def _is_full(self, held: Slots, slot: Slot, writing: Writing) -> bool:
        """Whether the slot has no room for another token. Answers without an end of their own get more if there is."""
        if len(slot.tokens) < slot.end:
            return False
        return writing.request.sampling.max_tokens is not None or not held.grow(slot, _GROWTH)

    # ── beginnings and ends ──

    def _admit(self, held: Slots) -> None:
        """Give idle slots to those that wait: whose key has the fewest at work, then whose was served longest ago."""
        with self._lock:
            waiting = list(self._waiting)
        at_work = Counter(slot.writing.request.key for slot in held.running if slot.writing)
        while waiting and held.idle:
            writing = min(waiting, key=lambda each: (at_work[each.request.key], self._served.get(each.request.key, 0)))
            waiting.remove(writing)
            if writing.reuses and held.comes_soon(writing.history, _WORTH):
                continue
            try:
                reused = held.take(writing, self._room(writing))
            except LlmkitError as error:
                self._remove(writing)
                writing.fail(error)
                self._counts["failed"] += 1
                raise
            if reused is None:
                return  # who needs much must not wait for ever behind those who need little
            self._remove(writing)
            self._counts["begun"] += 1
            self._serve(writing.request.key, waiting)
            at_work[writing.request.key] += 1
            self._counts["reused_tokens"] += reused
            self._times["waited"] += writing.begin(reused)

    def _serve(self, key: str, waiting: list[Writing]) -> None:
        """Note when this key was served; of keys for whom nobody waits nothing need be known."""
        self._served[key] = self._counts["begun"]
        if len(self._served) > self.queue + self.slots:
            known = {key, *(each.request.key for each in waiting)}
            self._served = {each: when for each, when in self._served.items() if each in known}

    def _remove(self, writing: Writing) -> None:
        with self._lock:
            self._waiting.remove(writing)

    def _room(self, writing: Writing) -> int:
        """Cells to reserve for it; for an answer without an end of its own a slot's share, which can grow."""
        prompt, asked = len(writing.request.prompt), writing.request.sampling.max_tokens
        wanted = max(prompt + _GROWTH, self.context // self.slots) if asked is None else prompt + asked
        return min(self.context, wanted)

    def _drop_cancelled(self, held: Slots | None) -> None:
        for slot in held.running if held else ():
            if slot.writing is not None and slot.writing.job.cancelled and held is not None:
                self._over(held, slot, "cancelled")
        with self._lock:
            dropped = [writing for writing in self._waiting if writing.job.cancelled]
            self._waiting = [writing for writing in self._waiting if not writing.job.cancelled]
        for writing in dropped:
            self._counts["cancelled"] += 1
            writing.end()

    def _over(self, held: Slots, slot: Slot, how: str, error: LlmkitError | None = None) -> None:
        """The slot's answer has "ended", which it has told itself, was "cancelled", or has "failed" with `error`."""
        writing = slot.writing
        held.give_back(slot)
        self._counts[how] += 1
        if writing is not None and error is not None:
            writing.fail(error)
        elif writing is not None and how == "cancelled":
            writing.end()

    def _fail(self, error: LlmkitError) -> None:
        """All that were in the round fail; where not even a session can be made, those that wait as well."""
        held, self._held = self._held, None
        if held is None:
            self._refuse_waiting(error)
            return
        for slot in held.running:
            self._over(held, slot, "failed", error)
        self._evicted += held.evictions
        held.close()
        self._counts["remade"] += 1

    def _refuse_waiting(self, error: LlmkitError) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for writing in waiting:
            self._counts["failed"] += 1
            writing.fail(error)

    def _end(self) -> None:
        error = Closed(f"{self.backend.info.name}: the model has been unloaded")
        if self._held is not None:
            for slot in self._held.running:
                self._over(self._held, slot, "failed", error)
            self._held.close()
        self._refuse_waiting(error)
        while self._calls:
            _, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
