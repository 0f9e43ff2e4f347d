"""What every route is given: the models, the limits, and one request that has been let in and checked."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import time
from typing import TYPE_CHECKING, Any, TypeVar

from ..backends import Backend
from ..chat.templates import ChatTemplate
from .errors import Refused

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .answers import Answers
    from .residents import Lease, Models
    from .scheduler import Scheduler

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Seconds: for its body to arrive, for its answer, between signs of life."""

    body_nbytes: int = 8 << 20
    body_seconds: float = 30
    answer_seconds: float = 600
    keep_alive_seconds: float = 10
    answers: int = 32  # n, and prompts times n
    inputs: int = 2048  # of an embeddings request
    inspected_tokens: int = 1024  # in one go: other answers wait meanwhile


DEFAULTS = Limits()


@dataclass
class Service:
    """The models and what goes with them; one for each app. `ready` is False once the server begins to end."""

    models: Models
    limits: Limits = DEFAULTS
    ready: bool = True
    began: float = field(default_factory=time)
    requests: dict[tuple[str, int], int] = field(default_factory=dict)  # (route, status) → how many
    running: set[Answers] = field(default_factory=set)
    _loaders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16, "llmkit loading"))
    _templates: weakref.WeakKeyDictionary[Backend, ChatTemplate] = field(default_factory=weakref.WeakKeyDictionary)

    async def lease(self, name: str) -> Lease:
        """A model that stays until it is released; loaded if need be. Raises Refused when the server ends."""
        if not self.ready:
            raise _leaving()
        waits = all(each.state != "loaded" for each in self.models.list() if each.name == (name or self.models.default))
        pool = self._loaders if waits else None  # those who wait for a model must not stop those who need not
        asked = asyncio.get_running_loop().run_in_executor(pool, self.models.lease, name)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(_release)
            raise

    @asynccontextmanager
    async def leased(self, name: str) -> AsyncIterator[Scheduler]:
        """The scheduler of a model, for as long as the block lasts."""
        lease = await self.lease(name)
        try:
            yield lease.scheduler
        finally:
            lease.release()

    def end_answers(self) -> None:
        """Break off all answers under way; their clients are told why. For the event loop's thread."""
        for answers in list(self.running):
            answers.end(_leaving())

    def template(self, backend: Backend) -> ChatTemplate:
        """A model's own, compiled once. Raises InvalidModel."""
        found = self._templates.get(backend)
        if found is None:
            info = backend.info
            bos, eos = (
                "" if token is None else backend.piece(token).decode("utf-8", "replace")
                for token in (info.bos, info.eos_token)
            )
            found = self._templates[backend] = ChatTemplate(info.chat_template, bos=bos, eos=eos)
        return found


def _leaving() -> Refused:
    return Refused("the server is shutting down", status=503, code="shutting_down", retry_after=5)


def _release(asked: asyncio.Future[Lease]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().release()


@dataclass(frozen=True)
class Call:
    """One request: its checked body, what its path names, whose key it came with (a digest), how to hear of its end."""

    service: Service
    body: Mapping[str, Any]
    path: Mapping[str, str]
    key: str
    receive: Receive

    @property
    def model(self) -> str:
        """The model it names, "" for the default one."""
        return str(self.body.get("model") or "")


async def gone(receive: Receive) -> None:
    """Returns when the client has gone away. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def computed(call: Call, scheduler: Scheduler, function: Callable[[], T]) -> T:
    """What `function` gives in the engine's thread. Raises Refused where the client has gone, or time is up."""
    asked: Future[T] = scheduler.call(function)
    answer, left = asyncio.wrap_future(asked), asyncio.ensure_future(gone(call.receive))
    try:
        seconds = call.service.limits.answer_seconds
        both: set[asyncio.Future[Any]] = {answer, left}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        why = "the client has gone" if left.done() else f"no answer within {seconds:g} seconds"
        raise Refused(why, status=504, code="timeout")
    finally:
        left.cancel()
        if not answer.done():
            answer.cancel()
