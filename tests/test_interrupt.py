"""Ctrl-C and kill -9 while files are written: never a broken file under a final name, and the rerun succeeds."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from conftest import Cli, TinyCheckpoint, cli_environment, in_session

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
QUANTS = ("IQ4_XS",)  # a slow kernel: seconds of work from a small model
PATIENCE = 60.0


def running(*arguments: object) -> AbstractContextManager[subprocess.Popen[str]]:
    """A command line that can be hit."""
    return in_session(sys.executable, "-m", "llmkit", *map(str, arguments), env=cli_environment())


def hit(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Sends a signal to the whole group (if it still runs); exit code and stderr."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until `path` is there or the process has ended."""
    end = time.monotonic() + PATIENCE
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.005)


def journal_lines(folder: Path) -> int:
    """Tensors that the journals in `folder` call finished."""
    return sum(len(path.read_bytes().splitlines()) - 1 for path in folder.glob("*.journal"))


def finals(folder: Path) -> dict[str, bytes]:
    """Every file under a final name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.gguf")}


def leftovers(folder: Path) -> list[str]:
    """Everything that is no finished model."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".gguf")


@pytest.fixture(scope="module")
def source(tiny_checkpoint: TinyCheckpoint) -> Path:
    """20 million weights: seconds of quantizing."""
    return tiny_checkpoint("llama", width=1024, layers=2)


@pytest.fixture(scope="module")
def undisturbed(source: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What an undisturbed run writes, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start = time.monotonic()
    done = cli("quantize", source, *QUANTS, "--out", folder, "--threads", 1, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(finals(folder)) == len(QUANTS) and not leftovers(folder)
    return finals(folder), time.monotonic() - start


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_writing(
    source: Path, undisturbed: tuple[dict[str, bytes], float], cli: Cli, tmp_path: Path
) -> None:
    whole, _ = undisturbed
    command = ("quantize", source, *QUANTS, "--out", tmp_path, "--threads", 1)
    with running(*command) as process:
        wait_for(tmp_path / f"{next(iter(whole))}.partial", process)
        time.sleep(2)
        code, errors = hit(process, signal.SIGINT)
    assert code == 130
    assert "Interrupted" in errors and "same command again" in errors and "Traceback" not in errors
    assert not finals(tmp_path) and journal_lines(tmp_path) > 0
    again = cli(*command, timeout=300)
    assert again.returncode == 0, again.stderr
    assert re.search(r"resumed, [1-9]\d* tensors were done before", again.stderr)
    assert finals(tmp_path) == whole and not leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.1, 0.3, 0.6, 1.0, 1.5, 2.5])
def test_ctrl_c_at_any_moment(
    delay: float, source: Path, undisturbed: tuple[dict[str, bytes], float], cli: Cli, tmp_path: Path
) -> None:
    whole, _ = undisturbed
    command = ("quantize", source, *QUANTS, "--out", tmp_path, "--threads", 2)
    with running(*command) as process:
        time.sleep(delay)
        code, errors = hit(process, signal.SIGINT)
    # until Python has reached our first line the signal simply ends it, in Python's own words
    assert code == 130 and "Interrupted" in errors and "Traceback" not in errors or delay < 0.5 and code != 0, errors
    assert not finals(tmp_path)
    assert cli(*command, timeout=300).returncode == 0
    assert finals(tmp_path) == whole and not leftovers(tmp_path)


@pytest.mark.slow
def test_ctrl_c_while_converting(smollm2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "whole" / "model.gguf"
    assert cli("convert", smollm2_folder, "--type", "f32", "--out", out).returncode == 0
    with running("convert", smollm2_folder, "--type", "f32", "--out", tmp_path / "model.gguf") as process:
        wait_for(tmp_path / "model.gguf.partial", process)
        code, errors = hit(process, signal.SIGINT)
    assert code == 130 and "Interrupted" in errors and not finals(tmp_path)
    assert cli("convert", smollm2_folder, "--type", "f32", "--out", tmp_path / "model.gguf").returncode == 0
    assert (tmp_path / "model.gguf").read_bytes() == out.read_bytes() and leftovers(tmp_path) == ["whole"]


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_again_and_again(
    source: Path, undisturbed: tuple[dict[str, bytes], float], cli: Cli, tmp_path: Path
) -> None:
    """Kills at random moments of one job; each rerun goes on, none leaves a broken file under a final name."""
    whole, seconds = undisturbed
    chance = random.Random(3)
    command = ("quantize", source, *QUANTS, "--out", tmp_path, "--threads", 1)
    for _ in range(8):
        with running(*command) as process:
            time.sleep(chance.uniform(0.05, 0.6 * seconds))
            hit(process, signal.SIGKILL)
        for name, content in finals(tmp_path).items():
            assert content == whole[name], f"{name} is broken"
    assert cli(*command, timeout=300).returncode == 0
    assert finals(tmp_path) == whole and not leftovers(tmp_path)


@pytest.mark.slow
def test_kill_after_a_journal_entry_is_resumed(
    source: Path, undisturbed: tuple[dict[str, bytes], float], cli: Cli, tmp_path: Path
) -> None:
    whole, _ = undisturbed
    command = ("quantize", source, "IQ4_XS", "IQ4_NL", "IQ3_S", "--out", tmp_path, "--threads", 1)
    with running(*command) as process:
        end = time.monotonic() + PATIENCE
        while not journal_lines(tmp_path) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        hit(process, signal.SIGKILL)
    assert not finals(tmp_path) and journal_lines(tmp_path) > 0
    again = cli(*command, "--json", timeout=300)
    assert again.returncode == 0 and "resumed" in again.stderr
    assert any(row["resumed_tensors"] > 0 for row in json.loads(again.stdout))
    assert len(finals(tmp_path)) == 3 and not leftovers(tmp_path)
    assert whole.items() <= finals(tmp_path).items()


@pytest.mark.slow
def test_kill_while_converting(smollm2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    command = ("convert", smollm2_folder, "--type", "f32", "--out")
    start = time.monotonic()
    assert cli(*command, tmp_path / "whole" / "model.gguf").returncode == 0
    seconds, whole = time.monotonic() - start, (tmp_path / "whole" / "model.gguf").read_bytes()
    chance = random.Random(4)
    for _ in range(10):
        with running(*command, tmp_path / "model.gguf") as process:
            time.sleep(chance.uniform(0.2, 1.0) * seconds)
            hit(process, signal.SIGKILL)
        assert all(content == whole for content in finals(tmp_path).values())
    done = cli(*command, tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr
    assert finals(tmp_path) == {"model.gguf": whole} and leftovers(tmp_path) == ["whole"]


# --- what a rerun may trust ------------------------------------------------------------------------------------------


def interrupted(source: Path, folder: Path, *options: object) -> None:
    """A run stopped with Ctrl-C after some tensors were finished."""
    with running("quantize", source, "IQ4_XS", "--out", folder, "--threads", 1, *options) as process:
        wait_for(folder / f"{source.name}-IQ4_XS.gguf.partial", process)
        time.sleep(2)
        assert hit(process, signal.SIGINT)[0] == 130
    assert journal_lines(folder) > 0


@pytest.mark.slow
def test_a_changed_source_starts_anew(
    source: Path, undisturbed: tuple[dict[str, bytes], float], cli: Cli, tmp_path: Path
) -> None:
    """Other weights of the same shape: what the interrupted run wrote must not get into the file."""
    whole, _ = undisturbed
    folder, out = shutil.copytree(source, tmp_path / source.name), tmp_path / "out"
    out.mkdir()
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    # the header stays as it was; zeros lie where the tensors are that are done first
    weights.write_bytes(content[:200_000] + bytes(1_500_000) + content[1_700_000:])
    interrupted(folder, out)
    weights.write_bytes(content)
    again = cli("quantize", folder, "IQ4_XS", "--out", out, "--threads", 1, timeout=300)
    assert again.returncode == 0 and "resumed" not in again.stderr
    name = f"{source.name}-IQ4_XS.gguf"
    assert (out / name).read_bytes() == whole[name]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["partial gone", "partial cut", "journal cut in a line", "journal garbage"])
def test_damaged_leftovers(
    damage: str, source: Path, undisturbed: tuple[dict[str, bytes], float], cli: Cli, tmp_path: Path
) -> None:
    whole, _ = undisturbed
    interrupted(source, tmp_path)
    name = f"{source.name}-IQ4_XS.gguf"
    partial, journal = tmp_path / f"{name}.partial", tmp_path / f"{name}.journal"
    if damage == "partial gone":
        partial.unlink()
    elif damage == "partial cut":
        partial.write_bytes(partial.read_bytes()[:-1000])
    elif damage == "journal cut in a line":
        journal.write_bytes(journal.read_bytes()[:-3])
    else:
        journal.write_bytes(b"\x00\xff garbage\n" + journal.read_bytes())
    done = cli("quantize", source, "IQ4_XS", "--out", tmp_path, "--threads", 1, timeout=300)
    assert done.returncode == 0, done.stderr
    assert finals(tmp_path) == {name: whole[name]} and not leftovers(tmp_path)


@pytest.mark.slow
def test_two_runs_at_once(source: Path, cli: Cli, tmp_path: Path) -> None:
    with running("quantize", source, "IQ4_XS", "--out", tmp_path, "--threads", 1) as process:
        wait_for(tmp_path / f"{source.name}-IQ4_XS.gguf.partial", process)
        second = cli("quantize", source, "IQ4_XS", "--out", tmp_path, "--threads", 1)
        assert second.returncode == 1 and "another run is writing it" in second.stderr
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    assert list(finals(tmp_path)) == [f"{source.name}-IQ4_XS.gguf"] and not leftovers(tmp_path)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_killed_between_two_renames(split: bool, tiny_checkpoint: TinyCheckpoint, cli: Cli, tmp_path: Path) -> None:
    """The moment when some files have their final names and others not yet, put together by hand."""
    source = tiny_checkpoint("llama", width=256)
    journals: dict[Path, bytes] = {}
    quants = ("Q8_0",) if split else ("Q4_0", "Q8_0")
    command = ("quantize", source, *quants, "--out", tmp_path, *(["--split-size", "500K"] if split else []))
    with running(*command) as process:
        while process.poll() is None:
            for path in tmp_path.glob("*.journal"):
                try:
                    journals[path] = max(journals.get(path, b""), path.read_bytes(), key=len)
                except FileNotFoundError:  # finished in between
                    continue
        assert process.returncode == 0
    whole = finals(tmp_path)
    assert len(whole) > 1 and journals
    for path, content in journals.items():
        path.write_bytes(content)
    last = tmp_path / sorted(whole)[-1]
    last.rename(last.with_name(f"{last.name}.partial"))
    again = cli(*command)
    assert again.returncode == 0, again.stderr
    assert finals(tmp_path) == whole and not leftovers(tmp_path)
