"""A user at the command line with the stand-in Hub: the fixtures root, serving, desk and silence, to be taken over."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

import standin_hub
from conftest import TinyCheckpoint, cli_environment, in_session
from llmkit import quantize
from shards_material import plan_of
from standin_hub import Hub, Request

TINY, BIG, QUANTIZED, ODD = "org/tiny", "org/big", "org/tiny-GGUF", "org/odd"
WEIGHTS = (".safetensors", ".gguf")
PATIENCE = 60.0


@pytest.fixture(scope="module")
def root(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of 5 and 7 shards, one of an unknown architecture, and GGUFs of the first, one of them split."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_checkpoint("llama", width=512, layers=4, shards=5), root / TINY)
    shutil.copytree(tiny_checkpoint("llama", width=768, layers=4, shards=7), root / BIG)
    shutil.copytree(tiny_checkpoint("llama", width=512, layers=4, shards=5), root / ODD)
    config = (root / ODD / "config.json").read_text().replace("LlamaForCausalLM", "OddForCausalLM")
    (root / ODD / "config.json").write_text(config)
    (root / QUANTIZED).mkdir()
    quantize.run(plan_of(root / TINY, root / QUANTIZED, "Q8_0", "Q4_K_M"), threads=2)
    quantize.run(plan_of(root / TINY, root / QUANTIZED, "F16", split=6_000_000), threads=2)
    (root / TINY / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return root


@pytest.fixture(scope="module")
def serving(root: Path) -> Iterator[Hub]:
    with standin_hub.serve(root) as hub:
        yield hub


@dataclass(frozen=True)
class Desk:
    """A user: a home, a Hugging Face cache, a working folder, and the Hub."""

    hub: Hub
    place: Path

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def cache(self) -> Path:
        return self.place / "hf"

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def snapshots(self) -> Path:
        """Of org/tiny in the cache."""
        return self.cache / "hub" / "models--org--tiny" / "snapshots"

    def environment(self, **more: str) -> dict[str, str]:
        found = cli_environment() | {"HF_ENDPOINT": self.hub.address, "HF_HUB_DISABLE_XET": "1", "COLUMNS": "160"}
        found |= {"HF_HOME": str(self.cache), "LLMKIT_HOME": str(self.home)}
        del found["HF_HUB_OFFLINE"], found["TRANSFORMERS_OFFLINE"]
        return found | more

    def run(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmkit", *map(str, words)]
        environment = self.environment(**more)
        return subprocess.run(
            command, env=environment, cwd=self.out, capture_output=True, text=True, timeout=120, input=""
        )

    def ok(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """A run that must succeed."""
        done = self.run(*words, **more)
        assert done.returncode == 0, done.stderr
        return done

    def refused(self, *words: object, **more: str) -> str:
        """A run that must end with an error for the user: what it says."""
        done = self.run(*words, **more)
        assert (done.returncode, done.stdout) == (1, ""), done.stdout + done.stderr
        assert done.stderr.count("llmkit: error:") == 1 and "Please report" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr or more.get("LLMKIT_DEBUG")
        return done.stderr

    def running(
        self, *words: object, program: tuple[str, ...] = ("-m", "llmkit")
    ) -> AbstractContextManager[subprocess.Popen[str]]:
        """A run that can be hit."""
        command = (sys.executable, *program, *map(str, words))
        return in_session(*command, env=self.environment(), cwd=self.out, stdin=subprocess.DEVNULL)


@pytest.fixture
def desk(serving: Hub, tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "out").mkdir()
    serving.clear()
    yield Desk(serving, tmp_path)
    serving.heal()
    serving.guards.clear()
    serving.facts.clear()


@dataclass(frozen=True)
class Silence:
    """A server that takes connections and never answers; `address` is its HF_ENDPOINT."""

    listener: socket.socket

    @property
    def address(self) -> str:
        host, port = self.listener.getsockname()
        return f"http://{host}:{port}"

    def was_called(self) -> bool:
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def silence() -> Iterator[Silence]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield Silence(listener)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(hub: Hub) -> list[Request]:
    """The requests for weights and their headers."""
    return [request for request in hub.requests("GET") if request.path.endswith(WEIGHTS)]


def size(folder: Path, *globs: str) -> int:
    return sum(path.stat().st_size for glob in globs or ("*",) for path in folder.glob(glob))


def leftovers(home: Path) -> list[Path]:
    """What streams have left."""
    return list((home / "streams").glob("*"))


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def shards_of(requests: list[Request]) -> list[str]:
    """The shards whose weights were fetched from their first byte on."""
    return [request.path.rpartition("/")[2] for request in requests if request.range is None]
