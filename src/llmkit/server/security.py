"""The gate before every route: whose pages may ask (Host, Origin), who may ask (keys), and what goes with each answer.

A page of the web that a user opens can send requests to a server on the same machine. It cannot choose the Host header
(DNS rebinding shows there) or leave out Origin; so both are checked, also on loopback. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .errors import Refused, headers, shaped
from .routes import OPEN_PATHS, ROUTES
from .service import Receive, Service

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY = "llmkit.key"  # in the scope: a digest of the key a request came with
_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_V1 = {"/models", "/chat/completions", "/completions", "/embeddings"}
_PATHS = {route.path for route in ROUTES}


@dataclass(frozen=True)
class Policy:
    """Who may ask. `keys`: SHA-256 digests, none where no key is needed; `origins`: of pages that may, besides ours.

    `hosts`: names the server may be called by, besides IP addresses and localhost, which no foreign name stands for.
    """

    keys: tuple[bytes, ...] = ()
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, keys: Iterable[str] = (), origins: Iterable[str] = (), hosts: Iterable[str] = ()) -> Policy:
        """From keys in clear, which are not kept."""
        return cls(
            tuple(digest(key) for key in keys),
            frozenset(origin.rstrip("/").lower() for origin in origins),
            frozenset(host.lower().rstrip(".") for host in hosts),
        )

    def key_of(self, authorization: str) -> str | None:
        """What stands for the key in a header, None if it is none of ours. Takes the same time for every wrong key."""
        if not self.keys:
            return ""
        scheme, _, given = authorization.partition(" ")
        found = digest(given.strip())
        right = [hmac.compare_digest(found, key) for key in self.keys]
        return found.hex()[:16] if scheme.lower() == "bearer" and any(right) else None

    def knows_host(self, header: str) -> bool:
        """Whether the server may be called by that name."""
        name = _host(header)
        if name is None:
            return False
        if name in self.hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def lets_page(self, origin: str, host: str) -> bool:
        """Whether a page from `origin` may ask a server that is called `host`."""
        return origin.lower() in self.origins or urlsplit(origin).netloc.lower() == host.lower() != ""


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(header: str) -> str | None:
    try:
        found = urlsplit(f"//{header}").hostname
    except ValueError:
        return None
    return found.rstrip(".") if found else None


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: App, *, policy: Policy, service: Service) -> None:
        self._app = app
        self._policy = policy
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        given = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"] = _path(scope["path"])
        answer = self._dressing(path, given, send)
        try:
            if self._preflight(scope, given):
                await answer({"type": "http.response.start", "status": 204, "headers": []})
                await answer({"type": "http.response.body", "body": b""})
                return
            scope[KEY] = self._let_in(scope, given)
        except Refused as refused:
            await _answer(answer, refused)
            return
        await self._app(scope, receive, answer)

    def _let_in(self, scope: Scope, given: dict[bytes, str]) -> str:
        """A digest of the request's key. Raises Refused."""
        host, origin = given.get(b"host", ""), given.get(b"origin")
        if not self._policy.knows_host(host):
            raise Refused(
                "this server is not called by that name (Host); it may be told: --host-name",
                status=403,
                code="host_not_allowed",
            )
        if origin is not None and not self._policy.lets_page(origin, host):
            raise Refused("pages from there may not ask this server (Origin)", status=403, code="origin_not_allowed")
        if origin is None and given.get(b"sec-fetch-site") in ("cross-site", "same-site"):
            if given.get(b"sec-fetch-mode") != "navigate":
                raise Refused("pages of other sites may not ask this server", status=403, code="origin_not_allowed")
        key = self._policy.key_of(given.get(b"authorization", ""))
        if key is None and scope["path"] not in OPEN_PATHS:
            said = "wrong key" if given.get(b"authorization") else "a key is needed: Authorization: Bearer KEY"
            raise Refused(said, status=401, code="invalid_api_key")
        return key or ""

    def _preflight(self, scope: Scope, given: dict[bytes, str]) -> bool:
        """Whether a browser asks if a page may ask, and it may."""
        asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in given
        return asks and given.get(b"origin", "").lower() in self._policy.origins

    def _dressing(self, path: str, given: dict[bytes, str], send: Send) -> Send:
        """`send`, with our headers, and the answer counted."""
        origin = given.get(b"origin", "")
        more = list(_ALWAYS)
        if self._policy.origins:
            more.append((b"vary", b"Origin"))
        if origin.lower() in self._policy.origins:
            more += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-allow-headers", b"authorization, content-type"),
                (b"access-control-allow-methods", b"GET, POST"),
            ]
        route = path if path in _PATHS else "/v1/models/{name:path}" if path.startswith("/v1/models/") else "other"

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *more]}
                at = route, message["status"]
                self._service.requests[at] = self._service.requests.get(at, 0) + 1
            await send(message)

        return answer


def _path(path: str) -> str:
    """Without slashes at its end, and with the /v1 that some clients leave out."""
    path = path.rstrip("/") or "/"
    return f"/v1{path}" if path in _V1 else path


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps(shaped(refused)).encode()
    told = {"content-type": "application/json", "content-length": str(len(body)), **headers(refused)}
    encoded = [(name.lower().encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
