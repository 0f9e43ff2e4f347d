"""HTTP as the stand-in Hub speaks it: requests noted, bodies in and out, pages, ranges, and the faults of bodies."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from standin_faults import Close, Fault, IgnoreRange, Refuse416, Send, Wait
from standin_files import Entry, Refusal

if TYPE_CHECKING:
    from standin_hub import Hub

PAGE_ROWS = 1000
_CHUNK = 1 << 20


@dataclass
class Record:
    """A request while it is answered."""

    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    host: str | None
    status: int = 0
    sent: int = 0
    received: int = 0
    done: bool = False
    started: float = field(default_factory=time.time)


class Wire(BaseHTTPRequestHandler):
    """One connection. A subclass says in `answer` what its requests mean."""

    protocol_version = "HTTP/1.1"
    # an answer is two writes, headers and body: the second must not wait for the first's acknowledgement
    disable_nagle_algorithm = True
    query: dict[str, list[str]]

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        header = self.headers.get
        self.record = Record(
            self.command, unquote(split.path), split.query, header("Range"), header("Authorization"), header("Host")
        )
        self.query = parse_qs(split.query, keep_blank_values=True)
        self.incoming = self._receive()
        with self.hub.noting(self.record):
            try:
                try:
                    self.answer(split.path)
                except Refusal as refusal:
                    # what was not read would be taken for the next request
                    for _ in self.incoming:
                        pass
                    self.send_json({"error": str(refusal)}, refusal.status, refusal.headers)
            except ConnectionError:
                # the client has gone, or stop() closed the connection under us
                self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, path: str) -> None:
        """Answer a request for `path`, which is still quoted, or raise the Refusal that is its answer."""
        raise NotImplementedError

    # in

    def _receive(self) -> Iterator[bytes]:
        """The body of the request, in pieces."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._read(size)
                self.rfile.readline()
            self.rfile.readline()
        rest = int(self.headers.get("Content-Length", 0))
        while rest:
            piece = self._read(min(rest, _CHUNK))
            rest -= len(piece)
            yield piece

    def _read(self, nbytes: int) -> bytes:
        data = self.rfile.read(nbytes)
        self.record.received += len(data)
        if len(data) < nbytes:
            raise ConnectionError("the client left in the middle of its request")
        return data

    # out

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_page(self, rows: list[dict[str, Any]]) -> None:
        """One page of rows, with a link to the next."""
        try:
            limit = max(1, int(self.query.get("limit", [PAGE_ROWS])[0]))
            first = int(base64.urlsafe_b64decode(self.query["cursor"][0])) if "cursor" in self.query else 0
        except ValueError:
            raise Refusal(400, None, "limit or cursor is not understood") from None
        headers = {}
        if first + limit < len(rows):
            cursor = base64.urlsafe_b64encode(str(first + limit).encode()).decode()
            query = urlencode({**self.query, "cursor": cursor}, doseq=True)
            host = self.hub.links_to or self.record.host
            headers["Link"] = f'<http://{host}{urlsplit(self.path).path}?{query}>; rel="next"'
        self.send_json(rows[first : first + limit], 200, headers)

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self._send_head(len(body), status, headers)
        if self.command != "HEAD":
            self._write(body)

    def _send_head(self, nbytes: int, status: int, headers: dict[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(nbytes)}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self, entry: Entry, headers: dict[str, str], fault: Fault | None) -> None:
        start, stop, status = 0, entry.size, 200
        asked = None if isinstance(fault, IgnoreRange) else _range(self.headers.get("Range"), entry.size)
        if asked is not None and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            start, stop = asked
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
            if start >= entry.size or isinstance(fault, Refuse416):
                headers["Content-Range"] = f"bytes */{entry.size}"
                raise Refusal(416, None, "Range Not Satisfiable", headers)
        self._send_head(stop - start, status, headers)
        if self.command == "HEAD":
            return
        file = None if isinstance(entry.source, bytes) else entry.source.open("rb", buffering=0)
        try:
            for step in (fault or Fault()).steps(start, stop):
                self._play(step, entry, file)
        finally:
            if file is not None:
                file.close()

    def _play(self, step: Send | Wait | Close, entry: Entry, file: Any) -> None:
        if isinstance(step, Wait):
            self.pause(step.seconds)
        elif isinstance(step, Close):
            self._hang_up(step.reset)
        elif isinstance(entry.source, bytes) or step.flipped or not hasattr(os, "sendfile"):
            for first in range(step.start, step.stop, _CHUNK):
                last = min(first + _CHUNK, step.stop)
                data = (
                    entry.source[first:last]
                    if isinstance(entry.source, bytes)
                    else os.pread(file.fileno(), last - first, first)
                )
                self._write(bytes(byte ^ 0xFF for byte in data) if step.flipped else data)
        else:
            offset = step.start
            while offset < step.stop:
                n = os.sendfile(self.connection.fileno(), file.fileno(), offset, step.stop - offset)
                if n == 0:
                    raise ConnectionError("the file became shorter")
                offset += n
                self.record.sent += n

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            n = self.connection.send(rest)
            self.record.sent += n
            rest = rest[n:]

    def pause(self, seconds: float) -> None:
        """Say nothing for a while, or until the client has gone."""
        said, _, _ = select.select([self.connection], [], [], seconds)
        if said and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client has gone")

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # closing with a linger time of nought sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) of a Range header; None where there is none, or none that is understood (as servers do)."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    stop = min(int(last) + 1, size) if last else size
    return (int(first), stop) if not last or int(last) >= int(first) else None
