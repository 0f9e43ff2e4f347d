"""A real server for tests: uvicorn in a thread, on a free loopback port, with clients for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from llmkit.backends import Backend, Part
from llmkit.backends.scripted import Scripted, ScriptedSession
from llmkit.server import listening
from llmkit.server.app import app
from llmkit.server.residents import Models
from llmkit.server.scheduler import Scheduler
from llmkit.server.security import Policy
from llmkit.server.service import DEFAULTS, Limits, Service

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI, OpenAI


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    address: str
    models: Models
    service: Service
    key: str = ""

    @property
    def scheduler(self) -> Scheduler:
        """Of the first model."""
        lease = self.models.lease()
        lease.release()
        return lease.scheduler

    def openai(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.address}/v1", api_key=self.key or "none", max_retries=0)

    def async_openai(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=f"{self.address}/v1", api_key=self.key or "none", max_retries=0)

    def http(self) -> httpx.Client:
        import httpx

        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.address, headers=headers, timeout=60, trust_env=False)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body)


@contextmanager
def served(
    *backends: Backend,
    limits: Limits = DEFAULTS,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
    openers: Mapping[str, Callable[[], Backend]] | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serve backends by their names; `options` are those of Models."""
    given = openers or {backend.info.name: _given(backend) for backend in backends}
    models = Models(given, **({"context": 1024, "most": len(given)} | options))
    models.load()
    made = app(models, policy=Policy.of(keys, origins, hosts), limits=limits)
    socket = listening.bound("127.0.0.1", 0)
    server = listening.server(made)
    thread = Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Served(listening.address_of(socket), models, made.state.service, keys[0] if keys else "")
    finally:
        server.should_exit = True
        thread.join(20)
        socket.close()
        models.close()
        assert not thread.is_alive()


def _given(backend: Backend) -> Callable[[], Backend]:
    return lambda: backend


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


class Paced(Scripted):
    """A Scripted whose every round takes `seconds`, and waits for `go`."""

    def __init__(self, answers: Sequence[str | bytes], *, seconds: float = 0.02, **options: Any) -> None:
        super().__init__(answers, **options)
        self.seconds = seconds
        self.go = Event()
        self.go.set()

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> ScriptedSession:
        return _PacedSession(self, context, sequences)


class _PacedSession(ScriptedSession):
    def eval_parts(self, parts: Sequence[Part]) -> list[Any]:
        assert isinstance(self.backend, Paced)
        self.backend.go.wait(20)
        time.sleep(self.backend.seconds)
        return super().eval_parts(parts)
