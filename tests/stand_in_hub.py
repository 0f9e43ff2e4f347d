"""A local stand-in for the Hugging Face Hub, over HTTP: revisions, trees and files of folders under a root.

Enough for huggingface_hub's snapshot_download without xet. Logs (method, path) of every request.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = {".safetensors", ".gguf", ".bin", ".model"}


class Hub(ThreadingHTTPServer):
    """Serves <root>/<org>/<name>/** ; `address` is its HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.log: list[tuple[str, str]] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"] and len(words) >= 4:
            folder = self.server.root / words[2] / words[3]
            if folder.is_dir():
                return self._send(json.dumps(self._tree(folder) if "tree" in words else self._info(folder)).encode())
        elif len(words) > 4 and words[2] == "resolve":
            folder = self.server.root / words[0] / words[1]
            file = folder.joinpath(*words[4:])
            if file.is_file() and folder in file.parents:
                return self._file(folder, file)
        code = "EntryNotFound" if "resolve" in words else "RepoNotFound"
        self._send(b'{"error": "not found"}', 404, {"X-Error-Code": code})

    def _info(self, folder: Path) -> dict[str, Any]:
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
        return {"id": "/".join(folder.parts[-2:]), "sha": _commit(folder), "siblings": siblings}

    def _tree(self, folder: Path) -> list[dict[str, Any]]:
        rows = []
        for path in _files(folder):
            name, size, etag = path.relative_to(folder).as_posix(), path.stat().st_size, _etag(path)
            row: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": etag}
            if path.suffix in LFS_SUFFIXES:
                row["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
            rows.append(row)
        return rows

    def _file(self, folder: Path, file: Path) -> None:
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": _commit(folder), "Accept-Ranges": "bytes"}
        self._send(file.read_bytes(), 200, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _commit(folder: Path) -> str:
    facts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in _files(folder)]
    return hashlib.sha1("\n".join(facts).encode()).hexdigest()


def _etag(path: Path) -> str:
    """sha256 of LFS files, git's blob sha1 of the rest."""
    data = path.read_bytes()
    if path.suffix in LFS_SUFFIXES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A running stand-in over `root`."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
