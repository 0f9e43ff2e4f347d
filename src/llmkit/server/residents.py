"""The models of a server by name: loaded when asked for, at most so many at once, unloaded when idle for long.

    models = Models({"small": lambda: backends.load("small.gguf")}, most=1, idle=600)
    with models.get("small") as scheduler:              # held, so not unloaded, until the block is left
        job = scheduler.submit(request)

Loading takes the caller's time, so event loops call from a thread. Any thread may call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ..backends import Backend, ModelInfo
from ..errors import LlmkitError, ModelNotFound, nearest_hint
from .jobs import Busy, Closed
from .metrics import Stats
from .scheduler import Scheduler

Opener = Callable[[], Backend]
State = Literal["unloaded", "loading", "loaded", "unloading"]


@dataclass(frozen=True)
class Resident:
    """A model as it is now. `leases`: how many use it; `idle`: seconds since the last did; facts only when loaded."""

    name: str
    state: State
    leases: int
    idle: float
    info: ModelInfo | None = None
    stats: Stats | None = None
    context: int | None = None


class _Place:
    """A name, what opens it, and what is loaded of it. Guarded by the lock of Models."""

    def __init__(self, name: str, opener: Opener) -> None:
        self.name, self.opener = name, opener
        self.state: State = "unloaded"
        self.leases = 0
        self.used_at = time.monotonic()
        self.scheduler: Scheduler | None = None


class Lease:
    """Keeps a model loaded until `release`, which may be called twice."""

    def __init__(self, scheduler: Scheduler, release: Callable[[], None]) -> None:
        self.scheduler = scheduler
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """The model may be unloaded again."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Models:
    """`most`: models in memory at once. `idle`: seconds after which an unused one is unloaded; None: never.

    `patience`: seconds to wait for room while all that are loaded are in use. `context`, `slots` and `queue` are
    each Scheduler's; a `context` of None: as many tokens for each slot as usual, of what the model was trained on.
    """

    def __init__(
        self,
        openers: Mapping[str, Opener],
        *,
        most: int = 1,
        idle: float | None = None,
        patience: float = 30.0,
        context: int | None = None,
        slots: int = 4,
        queue: int = 64,
    ) -> None:
        self.most, self.idle, self.patience = max(1, most), idle, patience
        self.context, self.slots, self.queue = context, slots, queue
        self._places = {name: _Place(name, opener) for name, opener in openers.items()}
        self._changed = threading.Condition()
        self._closed = False
        if idle is not None:
            threading.Thread(target=self._watch, name="llmkit idle models", daemon=True).start()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order given."""
        with self._changed:
            return tuple(self._places)

    @property
    def default(self) -> str:
        """The first one. Raises ModelNotFound when there is none."""
        for name in self.names:
            return name
        raise ModelNotFound("the server has no model")

    def add(self, name: str, opener: Opener) -> None:
        """One more name. Raises LlmkitError when it is taken."""
        with self._changed:
            if name in self._places:
                raise LlmkitError(f"there is a model '{name}' already")
            self._places[name] = _Place(name, opener)

    @contextmanager
    def get(self, name: str = "") -> Iterator[Scheduler]:
        """The scheduler of a model (the default for no name), loaded as long as the block lasts. Errors as `lease`."""
        lease = self.lease(name)
        try:
            yield lease.scheduler
        finally:
            lease.release()

    def lease(self, name: str = "") -> Lease:
        """The model, loaded if need be, in place of the one that is unused for longest; kept until released.

        Raises ModelNotFound, Busy when all places stay in use, Closed, and what loading raises.
        """
        wanted = name or self.default
        until = time.monotonic() + self.patience
        with self._changed:
            place = self._known(wanted)
            place.leases += 1
            try:
                while True:
                    if self._closed:
                        raise Closed("the server is closing")
                    if place.state == "loaded" and place.scheduler is not None:
                        return Lease(place.scheduler, lambda: self._release(place))
                    if place.state == "unloaded" and self._has_room():
                        if place.state == "unloaded":  # the lock was let go meanwhile
                            self._load(place)
                        continue
                    if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                        raise self._no_room(wanted)
            except BaseException:
                place.leases -= 1
                raise

    def load(self, name: str = "") -> None:
        """Load a model now, so that the first request need not wait. Errors as `lease`."""
        self.lease(name).release()

    def unload(self, name: str) -> bool:
        """Unload a model; False when it was not loaded. Raises Busy while it is in use, ModelNotFound."""
        with self._changed:
            place = self._known(name)
            if place.state == "unloaded":
                return False
            if place.leases or place.state != "loaded":
                raise Busy(f"{name}: is in use by {place.leases} requests", "Try again when they have ended.")
            self._unload(place)
            return True

    def list(self) -> tuple[Resident, ...]:
        """All models as they are now."""
        with self._changed:
            return tuple(map(_resident, self._places.values()))

    def close(self) -> None:
        """Unload all; answers under way fail with Closed. A second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while any(place.state in ("loading", "unloading") for place in self._places.values()):
                self._changed.wait()
            for place in self._places.values():
                if place.state == "loaded":
                    self._unload(place)

    # ── the lock is held ──

    def _known(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            raise ModelNotFound(f"the server has no model '{name}'", nearest_hint(name, self._places))
        return place

    def _has_room(self) -> bool:
        """Whether one more may be in memory; an unused one leaves for it."""
        present = [place for place in self._places.values() if place.state != "unloaded"]
        if len(present) < self.most:
            return True
        unused = [place for place in present if place.state == "loaded" and not place.leases]
        if not unused:
            return False
        self._unload(min(unused, key=lambda place: place.used_at))
        # the lock was let go meanwhile
        return sum(place.state != "unloaded" for place in self._places.values()) < self.most

    def _load(self, place: _Place) -> None:
        """The lock is let go while it loads."""
        place.state = "loading"
        self._changed.release()
        scheduler: Scheduler | None = None
        try:
            scheduler = self._open(place.opener)
        finally:
            self._changed.acquire()
            place.scheduler = scheduler
            place.state = "loaded" if scheduler else "unloaded"
            place.used_at = time.monotonic()
            self._changed.notify_all()

    def _open(self, opener: Opener) -> Scheduler:
        from ..chat.context import usual_context

        backend = opener()
        try:
            context = self.context or self.slots * usual_context(backend)
            return Scheduler(backend, context=context, slots=self.slots, queue=self.queue)
        except BaseException:
            backend.close()
            raise

    def _unload(self, place: _Place) -> None:
        """The lock is let go meanwhile."""
        scheduler, place.scheduler = place.scheduler, None
        place.state = "unloading"
        self._changed.release()
        try:
            if scheduler is not None:
                scheduler.close()
                scheduler.backend.close()
        finally:
            self._changed.acquire()
            place.state = "unloaded"
            self._changed.notify_all()

    def _release(self, place: _Place) -> None:
        with self._changed:
            place.leases -= 1
            place.used_at = time.monotonic()
            self._changed.notify_all()

    def _no_room(self, name: str) -> Busy:
        held = ", ".join(place.name for place in self._places.values() if place.state != "unloaded")
        return Busy(
            f"{name}: cannot be loaded, {held} is in use, and the server holds at most {self.most} at once",
            "Try again later, or start the server with a larger --max-models.",
            retry_after=self.patience,
        )

    # ── the thread that unloads ──

    def _watch(self) -> None:
        idle = self.idle or 0.0
        with self._changed:
            while not self._closed:
                unused = [place for place in self._places.values() if place.state == "loaded" and not place.leases]
                oldest = min(unused, key=lambda place: place.used_at, default=None)
                left = idle if oldest is None else oldest.used_at + idle - time.monotonic()
                if oldest is not None and left <= 0:
                    self._unload(oldest)
                else:
                    self._changed.wait(max(left, 0.1))


def _resident(place: _Place) -> Resident:
    scheduler = place.scheduler
    idle = 0.0 if place.leases else time.monotonic() - place.used_at
    if scheduler is None:
        return Resident(place.name, place.state, place.leases, idle)
    info, stats = scheduler.backend.info, scheduler.stats()
    return Resident(place.name, place.state, place.leases, idle, info, stats, scheduler.context)
