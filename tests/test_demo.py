"""The demo from end to end, with and without a Hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import standin_hub
from conftest import Cli, cli_environment
from llmkit import gguf

pytestmark = pytest.mark.slow


def check(text: str, folder: Path, stem: str) -> None:
    """The four acts were played, and the two files are what they say."""
    for quant, ftype in (("Q8_0", 7), ("Q4_K_M", 15)):
        file = gguf.read(folder / f"{stem}-{quant}.gguf")
        assert file.get("general.file_type") == ftype
        assert f"{file.path.stat().st_size / 1e6:.1f} MB" in text, "the table shows the file's size"
    assert "Paris" in text.partition("4. One question")[2], "it answers the question"
    assert "most uncertain" in text and text.count(" bits ") == 3
    assert text.rstrip().count("\nllmkit ") == 3, "three commands to try next"


def test_without_a_hub(cli: Cli, smollm2_gguf: Path, tmp_path: Path) -> None:
    done = cli("demo", "--out", tmp_path, "--threads", 1, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "The Hub cannot be reached" in done.stderr and "as lossy as that" in done.stderr
    check(done.stdout, tmp_path, "SmolLM2-135M-Instruct-rebuilt")
    again = cli("demo", "--out", tmp_path, "--threads", 1, timeout=240)
    assert again.returncode == 0 and again.stderr.count("made already") == 2


def test_with_a_hub(smollm2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(smollm2_folder, tmp_path / "hub" / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    with standin_hub.serve(tmp_path / "hub") as hub:
        environment = cli_environment() | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "home")}
        del environment["HF_HUB_OFFLINE"], environment["TRANSFORMERS_OFFLINE"]
        command = [sys.executable, "-m", "llmkit", "demo", "--out", str(tmp_path / "out"), "--threads", "1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors  269.1 MB  fetched, verified" in done.stderr and "rebuilt" not in done.stderr
        check(done.stdout, tmp_path / "out", "SmolLM2-135M-Instruct")
        hub.clear()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert again.returncode == 0 and again.stderr.count("made already") == 2 and hub.log == []
    assert (tmp_path / "home" / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct").is_dir()
