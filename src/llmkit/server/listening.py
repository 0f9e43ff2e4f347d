"""Listening: uvicorn on a socket of ours, with patience that ends for requests that never become whole."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING, Any

from ..errors import LlmkitError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

HEADER_SECONDS = 15.0  # for the first line and the headers of a request
IDLE_SECONDS = 30  # between two requests of one connection
MOST_CONNECTIONS = 1000
ANSWERS_SECONDS = 3.0  # for answers under way to end when the server ends; then they are broken off
LEAVE_SECONDS = 5  # for connections


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises LlmkitError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(256)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LlmkitError(f"{host}:{port}: cannot be listened on: {why}", "Choose another --port.") from error
    return made


def address_of(listening: socket.socket) -> str:
    """Its address for people and browsers."""
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def serve(app: FastAPI, listening: socket.socket, *, access_log: bool = False) -> None:
    """Answer until SIGINT or SIGTERM; answers under way then have a few seconds to end. For the main thread."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when it has ended
    try:
        server(app, access_log=access_log).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)


def server(app: FastAPI, *, access_log: bool = False) -> uvicorn.Server:
    """uvicorn, set up: `run(sockets=[…])` answers until `should_exit` is set."""
    import uvicorn

    config = uvicorn.Config(
        app, http=_patient(), ws="none", lifespan="off", log_config=None, access_log=access_log, server_header=False,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=LEAVE_SECONDS, limit_concurrency=MOST_CONNECTIONS,
        proxy_headers=False,
    )  # fmt: skip
    service = app.state.service

    class Server(uvicorn.Server):
        """Tells the service that the end has come, so that nothing new is begun."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            service.ready = False
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, ANSWERS_SECONDS, service.end_answers)
            super().handle_exit(sig, frame)

    return Server(config)


def _patient() -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes connections that bring no whole request for too long (slowloris)."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        """Until the headers are there, each connection has a deadline."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Begin to wait."""
            super().connection_made(transport)
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

        def data_received(self, data: bytes) -> None:
            """A request that has begun must be whole in time; a whole one ends the wait."""
            waits = self._deadline is None and (self.cycle is None or self.cycle.response_complete)
            if waits:
                self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._end_wait()

        def connection_lost(self, exc: Exception | None) -> None:
            """Nothing to wait for any more."""
            self._end_wait()
            super().connection_lost(exc)

        def _end_wait(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

    return Patient
