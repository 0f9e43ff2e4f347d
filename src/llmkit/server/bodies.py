"""The body of a request, read with a limit on its size and on the time it may take."""

from __future__ import annotations

import asyncio
from typing import Any

from ..errors import LlmkitError
from .errors import Refused
from .service import Limits, Receive

_DRAINED_NBYTES, _DRAINED_SECONDS = 64 << 20, 5.0


class Gone(LlmkitError):
    """The client has gone away before its request was whole."""


async def read(receive: Receive, limits: Limits, declared: str | None) -> bytes:
    """All of it. `declared`: its Content-Length. Raises Refused, Gone."""
    try:
        return await asyncio.wait_for(_whole(receive, limits, declared), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise Refused(message, status=408, code="timeout") from None


async def _whole(receive: Receive, limits: Limits, declared: str | None) -> bytes:
    most, parts, size = limits.body_nbytes, list[bytes](), 0
    if declared and declared.isdigit() and int(declared[:20]) > most:
        raise await _too_large(receive, most, int(declared[:20]))
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone("the client has gone away")
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise await _too_large(receive, most, size)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def _too_large(receive: Receive, most: int, size: int) -> Refused:
    """The error, after what still comes has been thrown away if it is not endless: clients read when they have sent."""

    async def drain() -> None:
        left = _DRAINED_NBYTES
        while left > 0:
            message: Any = await receive()
            left -= len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return

    if size <= _DRAINED_NBYTES:
        try:
            await asyncio.wait_for(drain(), _DRAINED_SECONDS)
        except asyncio.TimeoutError:
            pass
    message = f"the body has more than {most:,} bytes, the most that is taken"
    return Refused(message, status=413, code="body_too_large")
