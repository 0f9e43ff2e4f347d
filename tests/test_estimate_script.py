"""scripts/estimate_memory.py is `llmkit estimate`; a 70-B repository costs kilobytes to measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench_estimate
import standin_hub
from conftest import ROOT, Cli, cli_environment

SCRIPT = ROOT / "scripts" / "estimate_memory.py"


def script(*arguments: object, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd, check=False)


def without_path() -> dict[str, str]:
    """An environment in which only what is installed, or the script's own checkout, is found."""
    return {key: value for key, value in cli_environment().items() if key != "PYTHONPATH"}


def test_it_says_what_llmkit_estimate_says(smollm2_gguf: Path, cli: Cli, tmp_path: Path) -> None:
    words = (smollm2_gguf, "--context", 512, "--json")
    ours, theirs = script(*words, environment=without_path(), cwd=tmp_path), cli("estimate", *words)
    assert (ours.returncode, theirs.returncode) == (0, 0), ours.stderr + theirs.stderr
    assert json.loads(ours.stdout)["rows"] == json.loads(theirs.stdout)["rows"]
    assert json.loads(ours.stdout)["rows"][0]["tier"] == "exact"


def test_help_and_errors(tmp_path: Path) -> None:
    shown = script("--help", environment=without_path(), cwd=tmp_path)
    assert shown.returncode == 0 and "--context" in shown.stdout
    wrong = script(tmp_path / "absent.gguf", environment=without_path(), cwd=tmp_path)
    assert wrong.returncode == 1 and "absent.gguf" in wrong.stderr and "Traceback" not in wrong.stderr
    assert script(environment=without_path(), cwd=tmp_path).returncode == 2


def test_it_is_short() -> None:
    """One file for those who want only this: what it does is the library's work."""
    assert len(SCRIPT.read_text("utf-8").splitlines()) <= 40


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bench's repository under a root for the stand-in."""
    root = tmp_path_factory.mktemp("hub")
    bench_estimate.write_repository(root / bench_estimate.REPO, bench_estimate.SHARDS)
    return root


def test_a_remote_70_b_model_costs_less_than_a_megabyte(large: Path, tmp_path: Path) -> None:
    """Weights and cache of Llama 2 70B in Q4_K_M as found beforehand with the engine called by hand."""
    hub = standin_hub.Hub(large, unread_above=1_000_000_000)
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    environment = {key: value for key, value in cli_environment().items() if key not in offline}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    try:
        words = (bench_estimate.REPO, "Q4_K_M", "--context", "4096", "--no-mmap", "--json")
        done = script(*words, environment=environment, cwd=tmp_path)
        sent = hub.sent()
        asked = {request.path.rpartition("/")[2] for request in hub.requests("GET", suffix=".safetensors")}
    finally:
        hub.stop()
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    found = {part["name"]: part["nbytes"] for part in row["parts"]}
    assert found["weights"] == 32_841_400_320 + 8_580_743_168
    assert found["KV cache"] == 1280 << 20
    assert row["tier"] == "exact"
    assert len(asked) == bench_estimate.SHARDS
    assert 0 < sent <= bench_estimate.LIMITS["table_fetched"]
    assert not any(path.stat().st_size > 1 << 20 for path in Path(environment["HF_HOME"]).rglob("*") if path.is_file())


def test_the_bench_repository_is_whole(large: Path) -> None:
    """68.98 billion weights, each shard in the index, and next to nothing on the disk."""
    folder = large / bench_estimate.REPO
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    _, tensors = bench_estimate.llama_70b()
    assert set(index["weight_map"]) == set(tensors) and index["metadata"]["total_size"] == 2 * 68_976_648_192
    shards = sorted(folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in shards]
    assert max(path.stat().st_size for path in shards) < 1.3 * min(path.stat().st_size for path in shards)
    assert sum(path.stat().st_blocks for path in shards) * 512 < 1 << 21
    assert os.path.getsize(shards[0]) > 1 << 30
