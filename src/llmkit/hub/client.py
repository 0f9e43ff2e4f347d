"""The Hub's interface, through huggingface_hub, and its errors in our words. Owner of huggingface_hub.

Bytes of models do not come this way: see transfer.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from .. import settings
from ..errors import AccessDenied, LlmkitError, MissingDependency, ModelNotFound, Unreachable
from .repository import RemoteFile, Repository, checked

_TIMEOUT = 10.0  # seconds for an answer that is not a file
_TRIES = 4
FIRST_WAIT_SECONDS = 1.0  # then twice as long each time
_LONGEST_WAIT = 300.0  # the Hub counts requests in windows of five minutes
_RATE_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")  # none left, for so many seconds
OFFLINE_HINT = "Check the network, or use what is here: `llmkit list`."
T = TypeVar("T")


def library() -> Any:
    """The package huggingface_hub, quiet. Raises MissingDependency."""
    try:
        package = importlib.import_module("huggingface_hub")
        importlib.import_module("huggingface_hub.errors")
        importlib.import_module("huggingface_hub.utils").disable_progress_bars()
    except ImportError as error:
        raise MissingDependency(
            f"huggingface_hub cannot be imported: {error}", "pip install huggingface_hub"
        ) from error
    return package


def api() -> Any:
    """An HfApi for the Hub that HF_ENDPOINT names. Raises Unreachable when the user wants to be offline."""
    return library().HfApi(endpoint=address(), library_name="llmkit")


def address() -> str:
    """The Hub's address without a slash at the end. Raises Unreachable when the user wants to be offline."""
    found = settings.hub_address()
    if found is None:
        raise Unreachable(
            "the Hub is not asked: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
            "Unset it, or use what is here: `llmkit list`.",
        )
    return found.rstrip("/")


def token() -> str | None:
    """The user's token (HF_TOKEN, or the one `hf auth login` keeps), if there is one."""
    found: str | None = library().get_token()
    return found


def cache_folder() -> Path:
    """The Hugging Face cache (HF_HUB_CACHE, or below HF_HOME)."""
    return Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)


@functools.cache
def ssl_context() -> Any:
    """The certificates huggingface_hub trusts: what urllib finds by itself is nothing on some systems."""
    return importlib.import_module("huggingface_hub.utils").httpx.create_ssl_context()


def read_timeout() -> float:
    """Seconds of silence to bear while a file comes (HF_HUB_DOWNLOAD_TIMEOUT, as huggingface_hub reads it)."""
    return float(importlib.import_module("huggingface_hub.constants").HF_HUB_DOWNLOAD_TIMEOUT)


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn huggingface_hub's errors about `what` into LlmkitErrors with a next step."""
    package = library()
    errors = package.errors
    transport = importlib.import_module("huggingface_hub.utils").httpx  # httpx or httpx2, whichever it uses
    try:
        yield
    except errors.GatedRepoError as error:
        raise gated(what, has_token=token() is not None) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{what}: the repository has no such revision", "Branches, tags and commits are revisions."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise not_there(what, has_token=token() is not None) from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFound(f"{what}: the repository has no such file") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable(
            f"{what}: the Hub is not asked: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", "Unset it."
        ) from error
    except errors.HFValidationError as error:
        raise LlmkitError(f"{what}: is no name the Hub knows: {error}", "Names are like org/name.") from error
    except errors.HfHubHTTPError as error:
        raise _refused(what, error) from error
    except (transport.TimeoutException, TimeoutError) as error:
        raise Unreachable(f"{what}: the Hub at {address()} does not answer", OFFLINE_HINT) from error
    except (transport.HTTPError, transport.InvalidURL, ConnectionError) as error:
        raise Unreachable(f"{what}: the Hub at {address()} cannot be reached: {error}", OFFLINE_HINT) from error
    except OSError as error:  # the library's own files: the token
        raise LlmkitError(f"{what}: {error.filename}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:  # an answer that is none
        raise LlmkitError(f"{what}: the Hub's answer makes no sense: {error}") from error


def not_there(what: str, *, has_token: bool) -> ModelNotFound:
    """No repository of that name that this user may see."""
    hint = "Check the spelling: `llmkit search WORDS`. If it is private, "
    if has_token:
        hint += "your token must be allowed to read it: `hf auth whoami`."
    else:
        hint += "log in first: `hf auth login`, or set HF_TOKEN."
    return ModelNotFound(f"{what}: there is no such repository on the Hub, or it is private", hint)


def gated(what: str, *, has_token: bool) -> AccessDenied:
    """A repository whose terms were not accepted, or not by a user we can name."""
    page = f"{settings.hub_address() or ''}/{what.partition('@')[0].partition(':')[0]}"
    if has_token:
        return AccessDenied(f"{what}: is gated, and your account may not read it yet", f"Accept its terms on {page} .")
    return AccessDenied(
        f"{what}: is gated, and nobody is logged in",
        f"Accept its terms on {page} , then `hf auth login` or set HF_TOKEN.",
    )


def unknown_user(what: str, *, has_token: bool) -> AccessDenied:
    """Nobody is logged in, or with a token that is no good (any more)."""
    if has_token:
        return AccessDenied(
            f"{what}: the Hub does not accept your token (401)", "Get a new one: `hf auth login`, or set HF_TOKEN."
        )
    return AccessDenied(f"{what}: the Hub wants to know who asks (401)", "Log in: `hf auth login`, or set HF_TOKEN.")


def _refused(what: str, error: Any) -> LlmkitError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return unknown_user(what, has_token=token() is not None)
    if status == 403:
        return AccessDenied(f"{what}: your token may not do this (403)", "Use a token with the right permission.")
    if status == 429:
        return LlmkitError(f"{what}: the Hub asks for fewer requests (429)", "Wait a few minutes and run it again.")
    if status is not None and status >= 500:
        return Unreachable(f"{what}: the Hub is out of order ({status})", "Run it again later.")
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return LlmkitError(f"{what}: the Hub refused ({status}): {first}")


def patiently(call: Callable[[], T], on_wait: Callable[[str], None] = lambda _: None) -> T:
    """`call()`, again after a while when the Hub answers 429 or 5xx; `on_wait` is told why we wait."""
    errors = library().errors
    attempt = 1
    while True:
        try:
            return call()
        except errors.HfHubHTTPError as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", 0)
            if attempt == _TRIES or not (status == 429 or status >= 500):
                raise
            seconds = wait_seconds(asked_wait(getattr(response, "headers", {})), attempt)
        on_wait(f"the Hub answered {status}: trying again in {seconds:.0f} s")
        time.sleep(seconds)
        attempt += 1


def asked_wait(headers: Any) -> str | None:
    """How long a server that refuses asks to wait, in its words: Retry-After, else RateLimit ('"api";r=0;t=55')."""
    limit = _RATE_LIMIT.search(headers.get("RateLimit") or "")
    return headers.get("Retry-After") or (str(limit[1]) if limit else None)


def wait_seconds(asked_wait: str | None, attempt: int) -> float:
    """Seconds to wait before try `attempt` + 1: as many as were asked for, else 1, 2, 4 …; five minutes at most."""
    words = (asked_wait or "").strip()
    asked = float(words) if words.isascii() and words.isdigit() else FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
    return min(asked, _LONGEST_WAIT)


def repository(name: str, revision: str | None = None, on_wait: Callable[[str], None] = lambda _: None) -> Repository:
    """What the Hub says of `name` at `revision` (default: its main branch), names and sizes checked.

    Raises ModelNotFound, AccessDenied, InvalidModel (unsafe names), LlmkitError (offline, out of order).
    """
    what = f"{name}@{revision}" if revision else name
    hub = api()
    with asking(what):
        info = patiently(lambda: hub.model_info(name, revision=revision, timeout=_TIMEOUT), on_wait)
        rows = pages(f"api/models/{quote(name)}/tree/{quote(info.sha, safe='')}", {"recursive": "true"}, on_wait)
        files = tuple(_file(row) for row in rows if row["type"] == "file")
        card = getattr(info, "card_data", None)
        return checked(
            Repository(
                name=name,
                revision=revision or "main",
                commit=info.sha,
                files=files,
                gated=bool(getattr(info, "gated", False)),
                private=bool(getattr(info, "private", False)),
                licence=_text(card.get("license")) if card else None,
            )
        )


def pages(
    route: str, parameters: Mapping[str, Any], on_wait: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """The rows of a listing, page by page (Link: rel="next").

    Asked here, since huggingface_hub's own paging waits for ever for a silent server and follows a link to any host
    with the token: here only the link's query is taken. Call it within `asking`.
    """
    utils = library().utils
    headers = utils.build_hf_headers(library_name="llmkit")
    wanted: Any = parameters

    def page() -> Any:
        answer = utils.get_session().get(f"{address()}/{route}", params=wanted, headers=headers, timeout=_TIMEOUT)
        utils.hf_raise_for_status(answer)
        return answer

    while wanted:
        answer = patiently(page, on_wait)
        rows = answer.json()
        if not isinstance(rows, list):
            raise LlmkitError(f"the Hub at {address()} answered with no list: {route}")
        yield from rows
        wanted = parse_qsl(urlsplit(answer.links.get("next", {}).get("url", "")).query)


def _file(row: dict[str, Any]) -> RemoteFile:
    lfs = row.get("lfs")
    return RemoteFile(
        path=str(row["path"]),
        nbytes=int(lfs["size"] if lfs else row["size"]),
        git_sha1=str(row["oid"]),
        sha256=str(lfs["oid"]) if lfs else None,
        xet_hash=row.get("xetHash"),
    )


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return str(value) if value else None
