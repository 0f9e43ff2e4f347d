"""Reaching and fetching, against a stand-in Hub over HTTP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stand_in_hub
from conftest import TinyCheckpoint, cli_environment
from llmkit import hub

FETCH = "import sys, pathlib; from llmkit import hub; hub.fetch_checkpoint(sys.argv[1], pathlib.Path(sys.argv[2]))"


def fetch(address: str, repo: str, folder: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """In a child, since huggingface_hub reads its settings when imported."""
    environment = cli_environment() | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    del environment["HF_HUB_OFFLINE"], environment["TRANSFORMERS_OFFLINE"]
    command = [sys.executable, "-c", FETCH, repo, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_offline_by_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.reachable()


def test_reachable_is_about_the_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with stand_in_hub.serve(tmp_path) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        assert hub.reachable()
    assert not hub.reachable(), "nobody listens any more"


def test_fetch_brings_what_a_checkpoint_needs(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    repo = shutil.copytree(source, tmp_path / "root" / "org" / "tiny")
    (repo / "pytorch_model.bin").write_bytes(b"pickle")
    with stand_in_hub.serve(tmp_path / "root") as server:
        done = fetch(server.address, "org/tiny", tmp_path / "out", tmp_path / "home")
        assert done.returncode == 0, done.stderr
        asked = {os.path.basename(path) for _, path in server.log}
    assert "pytorch_model.bin" not in asked
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    with stand_in_hub.serve(tmp_path) as server:
        done = fetch(server.address, "org/nothing", tmp_path / "out", tmp_path / "home")
    assert done.returncode != 0 and "LlmkitError: org/nothing: could not be fetched" in done.stderr
