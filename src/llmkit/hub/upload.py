"""Files into a repository of the Hub: looked at first, sent one by one, made visible by one commit at the end.

look(name) → Destination; hashed(paths) → files; plan(destination, files, card) → UploadPlan; upload(plan) → Uploaded
What the Hub has of the same bytes is not sent again, so an interrupted upload goes on with the file it was at.
Knows nothing of what is in the files, or of what a card says.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AccessDenied, InvalidModel, LlmkitError, ModelNotFound
from ..progress import OnProgress, Progress, ignore
from . import client
from .repository import RemoteFile, Repository, checked

CARD = "README.md"
LOGIN_HINT = "Log in with a token that may write: `hf auth login`, or set HF_TOKEN."
_CHUNK = 1 << 20
_LARGEST_CARD = 4 << 20
_NO_ROOM = ("storage", "quota", "limit", "payment")  # words of a 403 that is not about permission
_UNREACHED = (ConnectionError, TimeoutError)


@dataclass(frozen=True)
class LocalFile:
    """A file to send; `mtime_ns` is when it was last changed before it was hashed."""

    path: Path
    nbytes: int
    sha256: str
    mtime_ns: int

    @property
    def name(self) -> str:
        """Its name in the repository: folders stay here."""
        return self.path.name


@dataclass(frozen=True)
class Destination:
    """The repository `name`: None as `repository` when it has to be made. `card` is its README.md, or empty."""

    name: str
    private: bool
    repository: Repository | None = None
    card: str = ""

    @property
    def hashes(self) -> dict[str, str]:
        """Path of each file there → its hash."""
        return {file.path: file.hash for file in self.repository.files} if self.repository else {}


@dataclass(frozen=True)
class UploadPlan:
    """What will be sent; `present` is in the repository already, with the same bytes."""

    destination: Destination
    files: tuple[LocalFile, ...]
    present: tuple[LocalFile, ...]
    card: str

    @property
    def is_new(self) -> bool:
        """Whether the repository will be made."""
        return self.destination.repository is None

    @property
    def card_changes(self) -> bool:
        """Whether README.md will be written."""
        return self.card != self.destination.card

    @property
    def nbytes(self) -> int:
        """Bytes to send, without the card."""
        return sum(file.nbytes for file in self.files)

    @property
    def nothing(self) -> bool:
        """Whether everything is there already."""
        return not (self.files or self.card_changes or self.is_new)


@dataclass(frozen=True)
class Uploaded:
    """What came of it: the commit, and where to look at it."""

    commit: str
    url: str


# ── before ──


def look(name: str, *, private: bool = False) -> Destination:
    """What is at `name` now, and its card. Only reads.

    Raises LlmkitError (offline, a public repository where a private one was asked for, a card that is no text).
    """
    client.api()  # says first that the Hub is not to be asked
    try:
        found = client.repository(name)
    except ModelNotFound:
        return Destination(name, private)
    if private and not found.private:
        raise LlmkitError(
            f"{name}: exists and is public, --private cannot change that",
            f"Make it private in its settings, {client.address()}/{name}/settings, or choose another name.",
        )
    return Destination(name, found.private, found, _card(found))


def _card(repository: Repository) -> str:
    listed = next((file for file in repository.files if file.path == CARD), None)
    if listed is None:
        return ""
    if listed.nbytes > _LARGEST_CARD:
        raise LlmkitError(f"{repository.name}: {CARD} has {listed.nbytes} bytes, expected at most {_LARGEST_CARD}")
    with tempfile.TemporaryDirectory() as folder, client.asking(f"{repository.name}/{CARD}"):
        path = client.api().hf_hub_download(repository.name, CARD, revision=repository.commit, local_dir=folder)
        data = Path(path).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise LlmkitError(f"{repository.name}: {CARD} is not UTF-8", "Save it as UTF-8, and run it again.") from None


def require_login() -> None:
    """Raise AccessDenied unless there is a token to write with."""
    if client.token() is None:
        raise AccessDenied("nobody is logged in, and the Hub takes files only from those it knows", LOGIN_HINT)


def hashed(paths: Sequence[Path], on_progress: OnProgress = ignore) -> tuple[LocalFile, ...]:
    """Read every file once for its sha256. Raises LlmkitError when one cannot be read."""
    found: list[LocalFile] = []
    try:
        total, done = sum(path.stat().st_size for path in paths), 0
        for path in paths:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                mtime_ns = path.stat().st_mtime_ns
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    on_progress(Progress("hash", done, total, "B", path.name))
                found.append(LocalFile(path, file.tell(), digest.hexdigest(), mtime_ns))
    except OSError as error:
        raise LlmkitError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return tuple(found)


def plan(destination: Destination, files: Sequence[LocalFile], card: str) -> UploadPlan:
    """What of `files` and the `card` has to be sent. Raises LlmkitError for names no repository can hold."""
    _check_names(destination, files)
    there = {file.path: file for file in destination.repository.files} if destination.repository else {}
    present = tuple(file for file in files if _same(file, there.get(file.name)))
    return UploadPlan(destination, tuple(file for file in files if file not in present), present, card)


def _check_names(destination: Destination, files: Sequence[LocalFile]) -> None:
    """Refuse what `llmkit download` would refuse to fetch again."""
    new = {file.name for file in files}
    if len(new) < len(files):
        twice = next(file for file in files if sum(other.name == file.name for other in files) > 1)
        raise LlmkitError(f"{twice.path}: another of the files has the same name", "Rename one of them.")
    old = destination.repository.files if destination.repository else ()
    rows = [RemoteFile(file.name, file.nbytes, "0" * 40, file.sha256) for file in files]
    rows += [file for file in old if file.path not in new]
    try:
        checked(Repository(destination.name, "main", "0" * 40, tuple(rows)))
    except InvalidModel as fault:
        raise LlmkitError(fault.message, "Rename the file.") from None


def _same(file: LocalFile, there: RemoteFile | None) -> bool:
    if there is None or there.nbytes != file.nbytes:
        return False
    return there.hash == (file.sha256 if there.sha256 else _git_sha1(file))


def _git_sha1(file: LocalFile) -> str:
    """Git's hash of a small file, which lies in the repository itself."""
    return hashlib.sha1(b"blob %d\0" % file.nbytes + file.path.read_bytes()).hexdigest()


# ── sending ──


def upload(
    planned: UploadPlan, *, message: str, on_progress: OnProgress = ignore, library_bars: bool = False
) -> Uploaded:
    """Make the repository if it is not there, send the files, then commit them and the card at once.

    `library_bars` lets huggingface_hub draw bars of its own while it sends by xet, of which it tells nobody else.
    Raises AccessDenied (no token, no right to write), LlmkitError (quota, offline, a file that changed meanwhile, a
    repository that did).
    """
    name, package = planned.destination.name, client.library()
    require_login()
    hub = client.api()
    with _writing(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about details of the card
        _require_valid_card(planned)
        if planned.is_new:
            hub.create_repo(name, private=planned.destination.private, exist_ok=True)
        operations, done = [], 0
        for file in planned.files:
            operations.append(addition := _addition(package, file, _report(on_progress, planned, file, done)))
            with _unchanged(file), _bars(package, library_bars):
                hub.preupload_lfs_files(name, additions=[addition], num_threads=1, free_memory=False)
            done += file.nbytes
            on_progress(Progress("upload", done, planned.nbytes, "B", file.name))
        if planned.card_changes:
            card = planned.card.encode()
            operations.append(package.CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card))
        before = planned.destination.repository
        info = hub.create_commit(
            name, operations, commit_message=message, parent_commit=before.commit if before else None
        )
    _verify(planned, info.oid)
    return Uploaded(info.oid, f"{client.address()}/{name}")


def _require_valid_card(planned: UploadPlan) -> None:
    """Let the Hub judge the card before gigabytes are sent: it would refuse the commit for it."""
    name = planned.destination.name
    try:
        card = client.library().ModelCard(planned.card, ignore_metadata_errors=True)
    except Exception as error:  # of a YAML parser that is not ours to import
        what = f"{name}: the YAML at the top of {CARD} cannot be read: {_first_line(error)}"
        raise LlmkitError(what, f"Mend it on {client.address()}/{name} .") from error
    try:
        card.validate()
    except ValueError as error:
        said = _first_line(error)
        raise LlmkitError(f"{name}: the Hub does not accept {CARD}: {said}", "See it with --dry-run.") from error


def _report(on_progress: OnProgress, planned: UploadPlan, file: LocalFile, before: int) -> Callable[[int], None]:
    def report(position: int) -> None:
        on_progress(Progress("upload", before + position, planned.nbytes, "B", file.name))

    report(0)
    return report


class _Counted(io.FileIO):
    """A file that tells how far it has been read; sent again, it tells that too."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._report = report

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        data = super().read(-1 if size is None else size) or b""
        self._report(self.tell())
        return data


def _addition(package: Any, file: LocalFile, report: Callable[[int], None]) -> Any:
    addition = package.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path))
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: not to be computed a second time
    addition.as_file = lambda with_tqdm=False: _Counted(file.path, report)
    return addition


@contextlib.contextmanager
def _unchanged(file: LocalFile) -> Iterator[None]:
    """Raise LlmkitError unless the file is the one that was hashed, before it is sent and after."""
    _refuse_changed(file, "before")
    yield
    _refuse_changed(file, "while")


def _refuse_changed(file: LocalFile, moment: str) -> None:
    try:
        state = file.path.stat()
    except OSError as error:
        raise LlmkitError(f"{file.path}: cannot be read: {error.strerror}") from error
    if (state.st_size, state.st_mtime_ns) != (file.nbytes, file.mtime_ns):
        raise LlmkitError(f"{file.path}: was changed {moment} it was sent", "Run it again when the file is whole.")


@contextlib.contextmanager
def _bars(package: Any, wanted: bool) -> Iterator[None]:
    if wanted:
        package.utils.enable_progress_bars()
    try:
        yield
    finally:
        package.utils.disable_progress_bars()


def _verify(planned: UploadPlan, commit: str) -> None:
    """Raise LlmkitError unless the commit holds every file as it is here."""
    listed = {file.path: file for file in client.repository(planned.destination.name, commit).files}
    if wrong := [file.name for file in (*planned.files, *planned.present) if not _same(file, listed.get(file.name))]:
        raise LlmkitError(
            f"{planned.destination.name}: {wrong[0]} was sent, but is not in the repository as it is here",
            "A .gitignore in the repository may leave it out. Run it again.",
        )


@contextlib.contextmanager
def _writing(name: str) -> Iterator[None]:
    """As client.asking, with what may go wrong when one writes."""
    errors = client.library().errors
    with client.asking(name):
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            # the library wraps what befell one file
            cause = (error.__cause__ if isinstance(error, RuntimeError) else None) or error
            if isinstance(cause, errors.HfHubHTTPError):
                if refusal := _refusal(name, cause):
                    raise refusal from error
            elif isinstance(cause, (RuntimeError, ValueError, OSError)) and not isinstance(cause, _UNREACHED):
                raise LlmkitError(
                    f"{name}: the upload failed: {_first_line(cause)}", "Run it again to go on."
                ) from error
            if cause is error:
                raise
            raise cause from error


def _refusal(name: str, error: Any) -> LlmkitError | None:
    """What the Hub's answer to one who writes means; None for what it means to readers too."""
    status = error.response.status_code
    said = _first_line(error.server_message or "")
    tail = f": {said}" if said else ""
    if status == 401:
        return AccessDenied(f"{name}: the Hub does not accept your token (401){tail}", LOGIN_HINT)
    if status in (402, 413, 507) or (status == 403 and any(word in said.lower() for word in _NO_ROOM)):
        return LlmkitError(
            f"{name}: the Hub has no room for this ({status}){tail}", "See the storage in your settings."
        )
    if status == 403:
        hint = f"Use a token that may write there, or a name of your own: --to YOU/{name.partition('/')[2]}"
        return AccessDenied(f"{name}: your token may not write there (403){tail}", hint)
    if status == 400:
        return LlmkitError(f"{name}: the Hub refuses what was sent (400){tail}")
    if status in (409, 412):
        return LlmkitError(f"{name}: was changed by somebody else meanwhile ({status})", "Run it again to go on.")
    return None


def _first_line(said: object) -> str:
    return next((line.strip()[:300] for line in str(said).splitlines() if line.strip()), "")
