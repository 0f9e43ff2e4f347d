"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}, with the right status.

Nothing that is told names a path of this machine.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import EngineError, LlmkitError, MissingDependency, ModelNotFound, NotEnoughRoom
from .jobs import Busy, Closed, ContextTooLong

# an absolute path of two parts or more; not what follows a word, a scheme or a JSON pointer's #
_PATH = re.compile(r"(?<![\w#:/.~])~?/(?:[^\s/:;,'\"()]+/)+([^\s/:;,'\"()]*)")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(LlmkitError):
    """A request that is answered with an error: its HTTP status, the field it is about, a code for programs."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


def without_paths(text: str) -> str:
    """`text` with the last part alone of each absolute path."""
    return _PATH.sub(lambda match: match[1] or "(a folder)", text)


def refusal(error: LlmkitError) -> Refused:
    """Any error of the library as the answer to the request that met it."""
    if isinstance(error, Refused):
        return error
    message = without_paths(error.message)
    if isinstance(error, Busy):
        return Refused(message, status=503, code="overloaded", retry_after=error.retry_after)
    if isinstance(error, Closed):
        return Refused(message, status=503, code="unloading", retry_after=1)
    if isinstance(error, ContextTooLong):
        return Refused(message, param="messages", code="context_length_exceeded")
    if isinstance(error, ModelNotFound):
        return Refused(
            f"{message} ({error.hint})" if error.hint else message, status=404, param="model", code="model_not_found"
        )
    if isinstance(error, (EngineError, MissingDependency)):
        return Refused(message.partition("\n")[0], status=500, code="engine_error")
    if isinstance(error, NotEnoughRoom):
        return Refused(message, status=503, code="not_enough_memory", retry_after=30)
    return Refused(message, code="unsupported")


def shaped(error: Refused) -> dict[str, Any]:
    """The body of the answer."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": told}


def headers(error: Refused) -> dict[str, str]:
    """Those that go with it."""
    found = {}
    if error.retry_after is not None:
        found["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.status == 401:
        found["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # what still comes of the request is not read
        found["Connection"] = "close"
    return found
