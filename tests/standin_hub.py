"""A stand-in for the Hugging Face Hub over real HTTP: the repositories <root>/<org>/<name>/, with a log and faults.

    with standin_hub.serve(root) as hub:
        hub.fail("org/name", "model.safetensors", Drop(after=100_000))
        ... a client with HF_ENDPOINT=hub.address ...
        assert [request.range for request in hub.requests("GET", suffix="model.safetensors")] == [None, "bytes=100000-"]

As a program, for benches: python standin_hub.py ROOT [--port N] [--log FILE] [--rate BYTES] [--unread-above BYTES]
prints its address on the first line and serves until it is terminated; the log is whole then. At full speed a killed
client leaves megabytes in the sockets' buffers that count as sent: benches that count bytes give a --rate.

standin_faults says what can go wrong, standin_files what there is to serve, standin_uploads how files come in.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from standin_faults import Fault, Faults, ListingFault, Trickle
from standin_files import Refusal, Repositories, Snapshot
from standin_http import Record
from standin_routes import Handler
from standin_uploads import Uploads

# an answer may reach its client before its thread has noted it: so long the log waits for that
_SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Request:
    """One request as it was answered, with the bytes of the answer's body given to the socket, and of its own body."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    status: int
    sent: int
    host: str | None
    query: str
    received: int


@dataclass(frozen=True)
class Guard:
    """Who may read a repository: those with the token. Gated: all may see it, and these may fetch its files."""

    token: str
    gated: Literal[False, "auto", "manual"]


class Hub:
    """A running stand-in; `address` is its HF_ENDPOINT."""

    def __init__(
        self, root: Path, *, port: int = 0, log: TextIO | None = None, unread_above: int | None = None
    ) -> None:
        self.repositories = Repositories(root, unread_above)
        self.uploads = Uploads(self.repositories)
        self.faults = Faults()
        self.guards: dict[str, Guard] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.links_to: str | None = None  # the host that links to a next page name, where it is not the one asked
        self._records: list[Record] = []
        self._settled = threading.Condition()
        self._log_file = log
        self._port = port
        self._server: _Server | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen; after stop(), at the same address again."""
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close every connection; from now on nobody listens."""
        if self._server is not None:
            self._server.stop()
            self._server = None
            self._settle()

    # what it holds

    def add_synthetic(self, repo: str, files: Mapping[str, bytes]) -> None:
        """A repository in memory: path → content. Ten thousand small files are cheap, and names are not checked."""
        self.repositories.add_in_memory(repo, files)

    def add_revision(self, repo: str, revision: str, folder: Path) -> None:
        """A branch or tag of a repository, with a folder's content."""
        self.repositories.add_revision(repo, revision, folder)

    def describe(self, repo: str, **facts: Any) -> None:
        """What the files do not tell: downloads=…, likes=…, pipeline_tag=…, lastModified=…"""
        self.facts.setdefault(repo, {}).update(facts)

    def require_token(self, repo: str, token: str, *, gated: Literal[False, "auto", "manual"] = False) -> None:
        """Make a repository private (others do not learn that it exists) or gated (its files are closed to others)."""
        self.guards[repo] = Guard(token, gated)
        self.describe(repo, private=not gated, gated=gated)

    def snapshot(self, repo: str, revision: str = "main") -> Snapshot:
        """A revision as it is listed: main, a name given to add_revision, or the commit of one of them."""
        if (found := self.repositories.snapshot(repo, revision)) is not None:
            return self.faults.listed(found)
        for name in ("main", *self.repositories.revisions(repo)):
            other = self.snapshot(repo, name)
            if other.commit == revision:
                return other
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # what goes wrong

    def fail(
        self, repo: str, path: str, fault: Fault | ListingFault, *, times: int | None = 1, method: str | None = None
    ) -> None:
        """Let a fault strike the file `path` (a name or a glob pattern) of a repository, `times` times (None: always).

        Faults of a body strike GET only; those of headers and statuses HEAD too, unless `method` names one.
        """
        self.faults.plan(repo, path, fault, method, times)

    def fail_route(self, path: str, fault: Fault, *, times: int | None = 1, method: str | None = None) -> None:
        """Let Status, Stall or Redirect strike routes that are not files: "api/models/org/name", "api/models/*"."""
        self.faults.plan(None, path.strip("/"), fault, method, times)

    def unmet(self) -> list[Fault]:
        """The faults that no request has met yet: a test that expects one to strike asserts that there are none."""
        return self.faults.unmet()

    def heal(self) -> None:
        """No faults any more."""
        self.faults.clear()

    # what was asked of it

    @property
    def log(self) -> list[Request]:
        """All requests since the last clear(), in the order in which they came; those under way as far as they are."""
        self._settle()
        with self._settled:
            return [_request(record) for record in self._records]

    def requests(self, method: str | None = None, *, suffix: str = "", contains: str = "") -> list[Request]:
        """The requests with this method whose path ends with and contains these words."""
        return [
            request
            for request in self.log
            if method in (None, request.method) and request.path.endswith(suffix) and contains in request.path
        ]

    def sent(self) -> int:
        """Bytes of bodies given to sockets since the last clear(), this moment."""
        with self._settled:
            return sum(record.sent for record in self._records)

    def clear(self) -> None:
        """Forget the requests so far."""
        self._settle()
        with self._settled:
            self._records.clear()

    def _settle(self) -> None:
        with self._settled:
            self._settled.wait_for(lambda: all(record.done for record in self._records), _SETTLE_SECONDS)

    @contextmanager
    def noting(self, record: Record) -> Iterator[None]:
        """Keep a request in the log while it is answered and afterwards."""
        with self._settled:
            self._records.append(record)
        try:
            yield
        finally:
            with self._settled:
                record.done = True
                self._settled.notify_all()
                if self._log_file is not None:
                    line = asdict(_request(record)) | {
                        "started": record.started,
                        "seconds": time.time() - record.started,
                    }
                    print(json.dumps(line), file=self._log_file, flush=True)


def _request(record: Record) -> Request:
    return Request(
        record.method, record.path, record.range, record.authorization,
        record.status, record.sent, record.host, record.query, record.received,
    )  # fmt: skip


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: Hub) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # clients that go away are what this server is for; anything else is a mistake in it, and shown
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A running stand-in over `root`."""
    hub = Hub(root)
    try:
        yield hub
    finally:
        hub.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for the Hugging Face Hub, for tests and benches.")
    parser.add_argument("root", type=Path, help="holds the repositories <org>/<name>/")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path, help="write each request as a line of JSON")
    parser.add_argument("--rate", type=float, help="bytes per second of every file's body")
    parser.add_argument(
        "--unread-above", type=int, metavar="BYTES",
        help="hash larger files by their name and size: a hundred gigabytes of holes, whose headers alone are fetched",
    )  # fmt: skip
    options = parser.parse_args()
    log = options.log.open("a") if options.log else None
    hub = Hub(options.root, port=options.port, log=log, unread_above=options.unread_above)
    if options.rate:
        hub.fail("*", "*", Trickle(options.rate), times=None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(hub.address, flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    hub.stop()


if __name__ == "__main__":
    main()
