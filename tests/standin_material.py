"""A small repository for the stand-in Hub, and a plain client for it."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from standin_hub import Hub

WEIGHTS = bytes(range(256)) * 2000
FILES = {
    "README.md": b"---\nlicense: apache-2.0\ntags:\n- tiny\nbase_model: org/parent\n---\n# Name\n",
    "greeting.txt": b"hello\n",
    "deep/er/notes.txt": b"notes",
    "model.bin": WEIGHTS,
}
# what git itself says: printf 'hello\n' | git hash-object --stdin
GREETING_SHA1 = "ce013625030ba8dba906f756967f9e9ca394464a"
MODEL = "/org/name/resolve/main/model.bin"


def fill(root: Path) -> Path:
    """Put the repository org/name under `root`."""
    for name, content in FILES.items():
        path = root / "org" / "name" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def connect(hub: Hub, timeout: float = 10) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(hub.address.removeprefix("http://"), timeout=timeout)


def ask(hub: Hub, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[Any, bytes]:
    """One request on a connection of its own: response and body; headers are given as Range="…", If_Range="…"."""
    connection = connect(hub)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def json_of(hub: Hub, path: str) -> Any:
    return json.loads(ask(hub, path)[1])
