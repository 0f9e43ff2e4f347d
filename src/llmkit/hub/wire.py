"""The wire: one answer of the Hub to one question for (a part of) a file, by urllib.

The token goes to the Hub's own address and nowhere else; what fails on the way is told apart by whether asking
again may help. Knows nothing of files on the disk.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import AccessDenied, InvalidModel, LlmkitError, ModelNotFound
from . import client
from .repository import RemoteFile

TRIES = 5  # in a row without a byte of progress
KEPT = "What came is kept: run the same command again to go on."
_CHANGING = "The repository is changing or broken: try again later, or name another revision."


@dataclass(frozen=True)
class Remote:
    """Where a file is fetched: `url`, the user's `token` for that host alone, seconds of silence to bear."""

    name: str
    url: str
    file: RemoteFile
    token: str | None = None
    timeout: float = 10.0


@dataclass(frozen=True)
class Watch:
    """Whom to tell: how many bytes of the file are here now, remarks for people; and when to stop."""

    on_position: Callable[[int], None] = lambda position: None
    on_remark: Callable[[str], None] = lambda remark: None
    stopped: threading.Event = field(default_factory=threading.Event)


class Stopped(Exception):
    """The caller asked to stop; what is here is kept."""


class Again(Exception):
    """The connection failed in a way that may pass. `asked_wait` is how long the server asked to wait, in its words."""

    def __init__(self, why: str, asked_wait: str | None = None) -> None:
        super().__init__(why)
        self.asked_wait = asked_wait


class Restart(Exception):
    """What is on the disk cannot be gone on with."""


class DiskError(Exception):
    """An OSError of the disk, so that it is not taken for one of the connection."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def read_range(remote: Remote, start: int, stop: int, watch: Watch | None = None) -> bytes:
    """Bytes `start` to `stop` of a remote file, fewer only at its end. Raises what `fetch` raises."""
    watch = watch or Watch()
    stop = min(stop, remote.file.nbytes)
    tries = 0
    while start < stop:
        try:
            with connection():
                with contextlib.closing(open_at(remote, start, stop)) as response:
                    check_answer(remote, response)
                    if response.status != 206 and start:
                        raise LlmkitError(f"{remote.name}: the server does not send parts of files", "Fetch it whole.")
                    if response.status == 206 and range_start(response) != start:
                        raise Restart(f"the server sent another part than asked for at byte {start:,}")
                    data: bytes = response.read(stop - start)
            if watch.stopped.is_set():
                raise Stopped
            if len(data) == stop - start:
                return data
            raise Again("the connection was closed early")
        except Restart as error:
            raise LlmkitError(f"{remote.name}: {error}", _CHANGING) from error
        except Again as error:
            tries = wait(remote, error, tries, watch)
    return b""


@contextlib.contextmanager
def connection() -> Iterator[None]:
    """Turn what a connection can raise into Again, and let the disk's errors pass as what they are."""
    try:
        yield
    except DiskError as error:
        raise error.error from error
    except TimeoutError as error:
        raise Again("no answer, or no data for a while") from error
    except http.client.HTTPException as error:
        raise Again(f"the answer broke off ({type(error).__name__})") from error
    except OSError as error:
        raise Again(f"the connection failed ({error.strerror or error})") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects: the token stays with the Hub's own address, Range goes along, https never becomes http."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.etag: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.etag = self.etag or _etag(headers)
        following = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if following is not None:
            _authorize(following, self.remote)
        return following

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        to = headers.get("Location") or headers.get("URI") or ""
        if urlsplit(urljoin(req.full_url, to)).scheme not in ("https", urlsplit(self.remote.url).scheme):
            raise LlmkitError(
                f"{self.remote.name}: the server leads to an address that is not safe", "Nothing was fetched."
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _authorize(request: urllib.request.Request, remote: Remote) -> None:
    ours, theirs = urlsplit(remote.url), urlsplit(request.full_url)
    if remote.token and (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc):
        request.add_unredirected_header("Authorization", f"Bearer {remote.token}")


def open_at(remote: Remote, start: int, stop: int | None = None) -> Any:
    """Ask for the file from byte `start` (to `stop`). Raises Again, Restart, or an error for the user."""
    request = urllib.request.Request(remote.url, headers={"Accept-Encoding": "identity", "User-Agent": "llmkit"})
    if start or stop is not None:
        request.add_header("Range", f"bytes={start}-{'' if stop is None else stop - 1}")
    _authorize(request, remote)
    redirects = _Redirects(remote)
    try:
        secure = urllib.request.HTTPSHandler(context=client.ssl_context())
        response = urllib.request.build_opener(redirects, secure).open(request, timeout=remote.timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(remote, error) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise LlmkitError(f"{remote.name}: the server's certificate is not valid: {error.reason}") from error
        raise error.reason if isinstance(error.reason, OSError) else Again(str(error.reason)) from error
    response.listed_etag = redirects.etag or _etag(response.headers)
    return response


def _refused(remote: Remote, error: urllib.error.HTTPError) -> Exception:
    code = error.headers.get("X-Error-Code", "")
    at_home = urlsplit(error.url or remote.url).netloc == urlsplit(remote.url).netloc
    repository = remote.name.partition(":")[0]
    if error.code == 416:
        return Restart("the server has no byte where this file stopped")
    if error.code == 429 or error.code >= 500 or error.code == 408 or (error.code in (401, 403) and not at_home):
        # elsewhere than at the Hub an address is good for a while only: ask the Hub again
        return Again(f"the server answered {error.code}", client.asked_wait(error.headers))
    if code == "GatedRepo":
        return client.gated(repository, has_token=remote.token is not None)
    if code in ("EntryNotFound", "RevisionNotFound") or (error.code == 404 and not at_home):
        return ModelNotFound(f"{remote.name}: is listed, but not there", _CHANGING)
    if error.code == 404 or code == "RepoNotFound":
        return client.not_there(repository, has_token=remote.token is not None)
    if error.code == 401:
        return client.unknown_user(remote.name, has_token=remote.token is not None)
    if error.code == 403:
        return AccessDenied(
            f"{remote.name}: your token may not read it (403)", "Use a token with the right permission."
        )
    return LlmkitError(f"{remote.name}: the server refused ({error.code})")


def _etag(headers: Any) -> str | None:
    """The content's hash as the Hub says it (X-Linked-Etag where the bytes lie elsewhere)."""
    found = headers.get("X-Linked-Etag") or headers.get("ETag")
    return found.removeprefix("W/").strip('"') if found else None


def check_answer(remote: Remote, response: Any) -> None:
    """The answer must be about the file that was listed: same size, and same hash where one is named."""
    nbytes, file = _total_nbytes(response), remote.file
    if nbytes is not None and nbytes != file.nbytes:
        raise InvalidModel(
            f"{remote.name}: the Hub lists {file.nbytes:,} bytes, its server sends {nbytes:,}", _CHANGING
        )
    sent = response.listed_etag
    if sent and len(sent) == len(file.hash) and sent != file.hash:
        raise InvalidModel(
            f"{remote.name}: the Hub lists the content {file.hash}, its server announces {sent}", _CHANGING
        )


def _total_nbytes(response: Any) -> int | None:
    """The size of the whole file, as the answer says it."""
    if response.status == 206:
        total = (response.headers.get("Content-Range") or "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length") or ""
    return int(total) if total.isascii() and total.isdigit() else None


def range_start(response: Any) -> int | None:
    """The first byte of a partial answer."""
    first = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isascii() and first.isdigit() else None


def wait(remote: Remote, error: Again, tries: int, watch: Watch) -> int:
    """Wait before the next try, or give up; returns the count of tries."""
    tries += 1
    if tries >= TRIES:
        raise LlmkitError(f"{remote.name}: gave up after {tries} tries: {error}", KEPT) from error
    seconds = client.wait_seconds(error.asked_wait, tries)
    watch.on_remark(f"{error}: trying again in {seconds:.0f} s")
    if watch.stopped.wait(seconds):
        raise Stopped
    return tries
