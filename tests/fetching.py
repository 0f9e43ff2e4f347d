"""A client of the stand-in Hub for tests of downloads: in this process, and as a child that can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import standin_hub
from conftest import cli_environment
from llmkit import hub, model
from llmkit.errors import AccessDenied
from llmkit.hub import Cache, DownloadPlan, FileDone, client
from llmkit.progress import Progress
from standin_faults import Drop, Status

REPO = "org/tiny"
WEIGHTS = "model.safetensors"
NBYTES = 3_000_000
STOP = 1_000_000
LEFT_OPEN = re.compile(r"\.(partial|partial\.json|partial\.lock|new|incomplete)$")


def content(nbytes: int = NBYTES, seed: int = 0) -> bytes:
    """Bytes that no two places share."""
    return random.Random(seed).randbytes(nbytes)


def checkpoint(nbytes: int = NBYTES, seed: int = 0) -> dict[str, bytes]:
    """The files of a repository that looks like a checkpoint."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b'{"version": "1.0"}',
        WEIGHTS: content(nbytes, seed),
    }


@dataclass
class Outcome:
    """What a fetch said and left."""

    plan: DownloadPlan
    path: Path | None = None
    done: dict[str, FileDone] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)


@dataclass(frozen=True)
class Client:
    """llmkit in this process, with a cache of its own."""

    hub: standin_hub.Hub
    cache: Cache

    def plan(self, text: str = REPO, **options: Any) -> DownloadPlan:
        return hub.plan(model.parse(text), cache=self.cache, **options)

    def fetch(self, text: str = REPO, *, workers: int = 4, **options: Any) -> Outcome:
        outcome = Outcome(self.plan(text, **options))
        self.carry_out(outcome, workers)
        return outcome

    def carry_out(self, outcome: Outcome, workers: int = 4) -> None:
        """Fetch what was planned; `outcome` is filled even when it fails."""

        def note(done: FileDone) -> None:
            outcome.done[done.path] = done

        outcome.path = hub.fetch(
            outcome.plan,
            workers=workers,
            on_progress=outcome.progress.append,
            on_file=note,
            on_remark=outcome.remarks.append,
        )

    def break_off(self, text: str = REPO, path: str = WEIGHTS, after: int = STOP, **options: Any) -> None:
        """Fetch until `after` bytes of `path` are here, then fail; the partial stays."""
        self.hub.fail(REPO, path, Drop(after))
        self.hub.fail(REPO, path, Status(403))
        with pytest.raises(AccessDenied):
            self.fetch(text, **options)
        self.hub.heal()
        self.hub.clear()

    def ranges(self, suffix: str = WEIGHTS) -> list[str | None]:
        """What was asked for of a file, in order."""
        return [request.range for request in self.hub.requests("GET", suffix=suffix)]


def assert_holds(folder: Path, files: Mapping[str, bytes]) -> None:
    """The folder has exactly these files, byte for byte; nothing unfinished lies about."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts[len(folder.parts) :]
    }
    assert sorted(found) == sorted(files)
    for name, expected in files.items():
        assert hashlib.sha256(found[name].read_bytes()).digest() == hashlib.sha256(expected).digest(), name


FILES = checkpoint()


def whole(here: Client, text: str = REPO) -> Outcome:
    """Fetch FILES; everything is right at the end, and what the server sent is told truly."""
    outcome = here.fetch(text)
    assert outcome.path is not None
    assert_holds(outcome.path, FILES)
    assert unfinished(here.cache.root) == []
    last = outcome.progress[-1]
    assert last.done == last.total == sum(map(len, FILES.values()))
    return outcome


def unfinished(folder: Path) -> list[str]:
    """Names of what is not final below `folder`."""
    return sorted(path.name for path in folder.rglob("*") if LEFT_OPEN.search(path.name))


@contextmanager
def in_process(monkeypatch: pytest.MonkeyPatch, root: Path, cache: Path) -> Iterator[Client]:
    """A stand-in, and a client whose process believes to have been started for it.

    huggingface_hub reads its settings when it is imported, so they are set in its module too.
    """
    package = client.library()
    with standin_hub.serve(root) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(package.constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)
        try:
            yield Client(server, Cache(cache))
        finally:
            package.close_session()


# ── children ──

DRIVER = """
import json, sys
from pathlib import Path
from llmkit import errors, hub, model
from llmkit.hub import Cache
text, options = sys.argv[1], json.loads(sys.argv[2])
workers = options.pop("workers", 4)
if "to" in options:
    options["to"] = Path(options["to"])
def say(**facts):
    print(json.dumps(facts), flush=True)
try:
    ref = model.parse(text)
    if options.pop("find", False):
        found = hub.find(ref)
        say(path=found and str(found))
        sys.exit(0)
    plan = hub.plan(ref, **options)
    say(states={each.file.path: each.state for each in plan.files}, remarks=plan.remarks)
    path = hub.fetch(plan, workers=workers, on_file=lambda done: say(file=done.path, how=done.how, nbytes=done.nbytes),
                     on_remark=lambda remark: say(remark=remark))
    say(path=str(path))
except errors.LlmkitError as error:
    say(error=error.message, kind=type(error).__name__, hint=error.hint)
    sys.exit(1)
"""


def environment(server: standin_hub.Hub | str, home: Path, **changes: str | None) -> dict[str, str]:
    """The environment of a child that talks to the stand-in and keeps everything in `home`."""
    address = server if isinstance(server, str) else server.address
    found = cli_environment() | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home / "hf"),
        "LLMKIT_HOME": str(home / "llmkit"),
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        found.pop(name, None)
    for name, value in changes.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found


@dataclass
class Child:
    """A process that fetches."""

    process: subprocess.Popen[str]

    def finish(self, timeout: float = 60) -> Report:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=timeout)
        return Report(self.process.returncode, [json.loads(line) for line in out.splitlines()], err)


@dataclass(frozen=True)
class Report:
    """What a child said, line by line."""

    code: int
    lines: list[dict[str, Any]]
    stderr: str

    def said(self, key: str) -> list[Any]:
        return [line[key] for line in self.lines if key in line]

    @property
    def path(self) -> Path:
        assert self.code == 0, (self.lines, self.stderr)
        return Path(self.said("path")[-1])

    @property
    def hows(self) -> dict[str, str]:
        return {line["file"]: line["how"] for line in self.lines if "file" in line}


def start(text: str, environ: Mapping[str, str], *, driver: str = DRIVER, **options: Any) -> Child:
    """Start fetching in a child process."""
    command = [sys.executable, "-c", driver, text, json.dumps(options, default=str)]
    return Child(
        subprocess.Popen(
            command, env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", text=True
        )
    )


def run_code(code: str, environ: Mapping[str, str], timeout: float = 120) -> str:
    """Run a few lines of Python in a child that must succeed; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(environ), capture_output=True, encoding="utf-8", timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(f"waited {seconds} s for {what}")


def size(path: Path) -> int:
    """Bytes of a file; 0 where none is."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
