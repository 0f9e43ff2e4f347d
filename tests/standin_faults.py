"""What can go wrong between a client and the Hub, as values that the stand-in Hub plays out.

Two kinds. A fault of an *answer* strikes requests for a file (some of them any other route too) as often as its hit
count says; one request meets one fault, the oldest that fits it. A fault of the *listing* changes what the repository
says it holds, in tree, model info and answers alike, until all faults are taken back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from standin_files import Entry, Snapshot

# a slow sender sends this often
BEAT_SECONDS = 0.005


@dataclass(frozen=True)
class Send:
    """Send these bytes of the file, as they are or with every bit turned over."""

    start: int
    stop: int
    flipped: bool = False


@dataclass(frozen=True)
class Wait:
    seconds: float


@dataclass(frozen=True)
class Close:
    """Close the connection: with FIN, or with RST."""

    reset: bool = False


Step = Send | Wait | Close


@dataclass(frozen=True)
class Fault:
    """A fault of an answer. Offsets and lengths are bytes."""

    methods: ClassVar[frozenset[str]] = frozenset({"GET"})
    needs_range: ClassVar[bool] = False
    everywhere: ClassVar[bool] = False

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """How the body [start, stop) of the file goes out."""
        yield Send(start, stop)


@dataclass(frozen=True)
class Drop(Fault):
    """The connection ends after so many bytes of the body."""

    after: int
    reset: bool = False

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        yield Send(start, min(stop, start + self.after))
        yield Close(self.reset)


@dataclass(frozen=True)
class ShortBody(Fault):
    """The body ends `by` bytes before its Content-Length, and the connection with it."""

    by: int = 1

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        yield Send(start, max(start, stop - self.by))
        yield Close()


@dataclass(frozen=True)
class FlipBytes(Fault):
    """`count` bytes at offset `at` of the file arrive wrong; all lengths are right."""

    at: int = 0
    count: int = 1

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        first = min(max(self.at, start), stop)
        last = min(max(self.at + self.count, start), stop)
        yield Send(start, first)
        yield Send(first, last, flipped=True)
        yield Send(last, stop)


@dataclass(frozen=True)
class Stall(Fault):
    """Headers, `after` bytes of the body, then silence, then the rest. On other routes the silence comes first."""

    after: int = 0
    seconds: float = 60
    everywhere = True

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        turn = min(stop, start + self.after)
        yield Send(start, turn)
        yield Wait(self.seconds)
        yield Send(turn, stop)


@dataclass(frozen=True)
class Trickle(Fault):
    """The body comes slowly."""

    bytes_per_second: float

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        size = max(1, int(self.bytes_per_second * BEAT_SECONDS))
        for first in range(start, stop, size):
            last = min(first + size, stop)
            yield Send(first, last)
            yield Wait((last - first) / self.bytes_per_second)


@dataclass(frozen=True)
class IgnoreRange(Fault):
    """A request for a range gets 200 and the whole file."""

    needs_range = True


@dataclass(frozen=True)
class Refuse416(Fault):
    """A request for a range gets 416, wherever it starts."""

    needs_range = True


@dataclass(frozen=True)
class WrongETag(Fault):
    """The content is right, its ETag is not."""

    etag: str = "0" * 64
    methods = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class Status(Fault):
    """The server answers with an error, e.g. 429 with `Retry-After`, or 503."""

    code: int
    retry_after: str | int | None = None
    error_code: str | None = None
    methods = frozenset({"GET", "HEAD", "POST", "PUT"})
    everywhere = True


@dataclass(frozen=True)
class Redirect(Fault):
    """302 to the same path at another origin (`http://host:port`), or to any address that has a path of its own."""

    to: str
    methods = frozenset({"GET", "HEAD"})
    everywhere = True

    def location(self, path: str) -> str:
        """The address to send a request for `path` to."""
        bare_origin = self.to.startswith("http") and self.to.count("/") == 2
        return self.to + path if bare_origin else self.to


@dataclass(frozen=True)
class ListingFault:
    """A fault of the listing: `change` gives what takes the file's place there."""

    def change(self, entry: Entry) -> list[Entry]:
        """The entries listed where the true listing has this one."""
        return [entry]


@dataclass(frozen=True)
class MissingFile(ListingFault):
    """The file is neither listed nor served, whatever an index says."""

    def change(self, entry: Entry) -> list[Entry]:
        return []


@dataclass(frozen=True)
class ChangeContent(ListingFault):
    """The file has other content now: size, hashes and the commit change with it."""

    content: bytes

    def change(self, entry: Entry) -> list[Entry]:
        return [Entry.in_memory(entry.name, self.content)]


@dataclass(frozen=True)
class LyingTree(ListingFault):
    """Tree and model info give a size that is not the file's."""

    size: int

    def change(self, entry: Entry) -> list[Entry]:
        return [replace(entry, listed_size=self.size)]


@dataclass(frozen=True)
class UnsafeName(ListingFault):
    """The file is listed, and served, under a second name such as `../x`."""

    name: str

    def change(self, entry: Entry) -> list[Entry]:
        return [entry, replace(entry, name=self.name)]


@dataclass(frozen=True)
class XetHeaders(ListingFault):
    """The file is announced as held in xet storage. The stand-in has none: only plain HTTP gets it."""

    def change(self, entry: Entry) -> list[Entry]:
        return [replace(entry, in_xet=True)]


@dataclass
class _Planned:
    """A fault, what it strikes, and how often it still will (None: always)."""

    repo: str | None
    path: str
    fault: Fault
    method: str | None
    left: int | None
    met: int = 0


class Faults:
    """The faults planned for one stand-in; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[_Planned] = []
        self._listing: list[tuple[str, str, ListingFault]] = []

    def plan(
        self, repo: str | None, path: str, fault: Fault | ListingFault, method: str | None, times: int | None
    ) -> None:
        """Add a fault; `repo` None means routes that are not files. `path` may be a glob pattern."""
        if repo is None and not (isinstance(fault, Fault) and fault.everywhere):
            raise TypeError(f"{fault} is a fault of files")
        with self._lock:
            if isinstance(fault, Fault):
                self._planned.append(_Planned(repo, path, fault, method, times))
            elif repo is not None:
                self._listing.append((repo, path, fault))

    def clear(self) -> None:
        """Take all faults back."""
        with self._lock:
            self._planned.clear()
            self._listing.clear()

    def meet(self, repo: str | None, path: str, method: str, has_range: bool = False) -> Fault | None:
        """The fault that a request meets, counted as met."""
        with self._lock:
            for planned in self._planned:
                fault = planned.fault
                if (
                    planned.left != 0
                    and (planned.repo == repo or (planned.repo == "*" and repo is not None))
                    and fnmatchcase(path, planned.path)
                    and (method == planned.method if planned.method else repo is None or method in fault.methods)
                    and (has_range or not fault.needs_range)
                ):
                    planned.met += 1
                    if planned.left is not None:
                        planned.left -= 1
                    return fault
        return None

    def unmet(self) -> list[Fault]:
        """Faults of answers that no request has met."""
        with self._lock:
            return [planned.fault for planned in self._planned if not planned.met]

    def listed(self, snapshot: Snapshot) -> Snapshot:
        """What the repository says it holds."""
        with self._lock:
            faults = [(path, fault) for repo, path, fault in self._listing if repo == snapshot.repo]
        for pattern, fault in faults:
            entries: list[Entry] = []
            for entry in snapshot.entries.values():
                entries += fault.change(entry) if fnmatchcase(entry.name, pattern) else [entry]
            snapshot = Snapshot.of(snapshot.repo, entries)
        return snapshot
