"""What is asked of the engine thread, and what it tells of it: a Request becomes a Job, whose events are read once.

    job = scheduler.submit(Request(prompt=tokens, sampling=Sampling()))
    with job:                                   # leaving the block ends it, if it still runs
        for event in job.events: …              # blocking; `async for` in an event loop
    Begun, Echo* (of the prompt, if asked), Step*, then one of Ended and Failed

Knows nothing of engines and of HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import count

from ..chat.answer import Finish, Step, Turn
from ..chat.reasoning import Form
from ..chat.sampler_settings import Sampling
from ..errors import LlmkitError


class Busy(LlmkitError):
    """No room to wait, or none to load a model. `retry_after`: seconds after which it may be worth trying again."""

    def __init__(self, message: str, hint: str | None = None, *, retry_after: float = 1.0) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class ContextTooLong(LlmkitError):
    """A prompt of `prompt` tokens, which leaves no room for an answer in `context`."""

    def __init__(self, prompt: int, context: int) -> None:
        super().__init__(
            f"the prompt has {prompt:,} tokens, the context has room for {context:,}, one of them for the answer",
            "Send a shorter prompt, or start the server with a larger context.",
        )
        self.prompt, self.context = prompt, context


class Closed(LlmkitError):
    """The scheduler has been closed: the model was unloaded, or the server ends."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    `prompt`: all of it, with BOS and template. `sampling.max_tokens` None: until the model ends or there is no room
    left. `sampling.seed` None draws one (Ended tells it). `variation`: which of that seed's random numbers, for several
    answers of one request. `stop`: texts that end the answer. `details`: logprob, rank and entropy in each Step;
    `n_alternatives` of them with it. `echo`: Steps of the prompt's tokens too, in Echo events; nothing is reused then.
    `form`: the thinking block that the prompt has opened (chat.reasoning.opened). `reads`: tell thinking and answer
    apart; False for raw completions, where all is text. `key`: whose it is: no one waits longer because another has
    sent many.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    variation: int = 0
    stop: tuple[str, ...] = ()
    details: bool = False
    n_alternatives: int = 0
    echo: bool = False
    form: Form | None = None
    reads: bool = True
    key: str = ""


@dataclass(frozen=True, slots=True)
class Begun:
    """The prompt is being evaluated: its tokens, how many of them the cache held, how long it waited for a slot."""

    prompt: int
    reused: int
    waited_ms: float


@dataclass(frozen=True, slots=True)
class Echo:
    """Some tokens of the prompt, in order, with their details; the first of all has none (logprob nan)."""

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is over. `finish` None: cancelled. `turn`: its figures, with the seed that was used."""

    finish: Finish | None
    turn: Turn


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine failed, or the scheduler was closed. Nothing follows."""

    error: LlmkitError


Event = Begun | Echo | Step | Ended | Failed
_LAST = (Ended, Failed)


class Events:
    """A stream of events from the engine thread to one reader, which blocks or waits in an event loop."""

    def __init__(self) -> None:
        self._items: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._over = False  # the reader has had the last one

    def put(self, event: Event) -> None:
        """Add one; called by the engine thread."""
        with self._changed:
            self._items.append(event)
            waiting, self._waiting = self._waiting, None
            self._changed.notify()
        if waiting is not None:
            loop, future = waiting
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the reader's loop has been closed
                pass

    def _take(self) -> Event | None:
        """The next one that is there; the lock is held."""
        if not self._items:
            return None
        event = self._items.popleft()
        self._over = isinstance(event, _LAST)
        return event

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._changed:
            while not self._over:
                if (event := self._take()) is not None:
                    return event
                self._changed.wait()
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._over:
            with self._changed:
                if (event := self._take()) is not None:
                    return event
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiting = loop, future
            await future
        raise StopAsyncIteration


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_numbers = count(1)


class Job:
    """A request under way. `events`: what happens to it. Leaving a `with job:` block cancels it if it still runs."""

    def __init__(self, request: Request, on_cancel: Callable[[], None] = lambda: None) -> None:
        self.id = next(_numbers)
        self.request = request
        self.events = Events()
        self.cancelled = False
        self.done = False  # its last event has been told
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        """End it, from any thread: at most one more of its tokens is decoded. Its last event is Ended(None, …)."""
        if not self.done and not self.cancelled:
            self.cancelled = True
            self._on_cancel()

    def tell(self, event: Event) -> None:
        """Add an event; called by the engine thread."""
        if isinstance(event, _LAST):
            self.done = True
        self.events.put(event)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


def collect(job: Job) -> tuple[tuple[Step, ...], Ended]:
    """All Steps of a job and its end, waited for. Raises the error of one that failed."""
    steps: list[Step] = []
    for event in job.events:
        if isinstance(event, Step):
            steps.append(event)
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Ended):
            return tuple(steps), event
    raise ValueError("the events of this job have been read already")
