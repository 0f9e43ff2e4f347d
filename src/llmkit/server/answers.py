"""The answers of one request, under way: their events as they come, signs of life where none come, and their end.

Whatever happens to the request (read to its end, broken off, out of time), its jobs end and its model is released.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LlmkitError
from .errors import Refused, refusal
from .jobs import Event, Failed, Job, Request
from .service import Call, Receive, Service, gone

if TYPE_CHECKING:
    from .residents import Lease

Numbered = tuple[int, Event]
_PATIENCE = 1.0  # seconds for an error to show before a stream has begun


class Answers:
    """Jobs that run. `events` gives what happens to each, by its number; it can be read once."""

    def __init__(self, jobs: Sequence[Job], lease: Lease, service: Service) -> None:
        self.jobs = jobs
        self._lease = lease
        self._limits = service.limits
        self._running = service.running
        self._events: asyncio.Queue[Numbered] = asyncio.Queue()
        self._kept: Numbered | None = None
        self._work: asyncio.Task[None] | None = None

    def begin(self, receive: Receive) -> None:
        """Collect events from now on, and watch the client."""
        self._running.add(self)
        self._work = asyncio.ensure_future(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        left = asyncio.ensure_future(gone(receive))
        pumps = asyncio.gather(*(self._pump(number, job) for number, job in enumerate(self.jobs)))
        try:
            seconds = self._limits.answer_seconds
            both: set[asyncio.Future[Any]] = {left, pumps}
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not pumps.done() and not left.done():
                self.end(_late(seconds))
            if not pumps.done():
                self.cancel()
                await pumps
        finally:
            self.cancel()
            left.cancel()
            pumps.cancel()
            self._lease.release()
            self._running.discard(self)

    async def _pump(self, number: int, job: Job) -> None:
        async for event in job.events:
            self._events.put_nowait((number, event))

    def cancel(self) -> None:
        """End all that still run."""
        for job in self.jobs:
            job.cancel()

    def end(self, error: Refused) -> None:
        """End all, and say why."""
        self._events.put_nowait((0, Failed(error)))
        self.cancel()

    async def started(self) -> None:
        """Wait a while for the first event. Raises Refused if it is a failure: an answer can still be an error."""
        try:
            self._kept = await asyncio.wait_for(self._events.get(), min(_PATIENCE, self._limits.keep_alive_seconds))
        except asyncio.TimeoutError:
            return
        if isinstance(self._kept[1], Failed):
            self.cancel()
            raise refusal(self._kept[1].error)

    async def events(self) -> AsyncIterator[Numbered | None]:
        """Until every job has ended or one has failed; None where nothing came for a while."""
        from .jobs import Ended

        left = len(self.jobs)
        try:
            while left:
                event = self._kept or await self._next()
                self._kept = None
                yield event
                if event and isinstance(event[1], Failed):
                    return
                left -= bool(event and isinstance(event[1], Ended))
        finally:
            self.cancel()

    async def _next(self) -> Numbered | None:
        if not self._events.empty():
            return self._events.get_nowait()
        try:
            return await asyncio.wait_for(self._events.get(), self._limits.keep_alive_seconds)
        except asyncio.TimeoutError:
            return None


def _late(seconds: float) -> Refused:
    return Refused(f"the answer took longer than {seconds:g} seconds", status=504, code="timeout")


async def submit(call: Call, lease: Lease, requests: Sequence[Request]) -> Answers:
    """The requests' answers, under way on a leased model, which they release. Raises Refused, LlmkitError."""
    jobs: list[Job] = []
    try:
        for request in requests:
            jobs.append(await asyncio.to_thread(lease.scheduler.submit, request))
    except (LlmkitError, asyncio.CancelledError):
        for job in jobs:
            job.cancel()
        raise
    except ValueError as error:
        for job in jobs:
            job.cancel()
        raise Refused(str(error), param="prompt", code="invalid_value") from error
    answers = Answers(jobs, lease, call.service)
    answers.begin(call.receive)
    return answers
