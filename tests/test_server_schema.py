"""schemathesis sends what our own OpenAPI description allows, and what it does not: no answer is a 5xx."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import GgufOf, TinyCheckpoint, cli_environment
from llmkit import backends
from serving import served

MOST_EXAMPLES = 30  # of each route, beside those that cover every part of its description
LEAST_CASES = 2000


def narrowed(value: Any, names: list[str], n_vocab: int) -> Any:
    """The description, with the models and tokens there are: most random ones would only be refused."""
    if isinstance(value, dict):
        value = {name: narrowed(inner, names, n_vocab) for name, inner in value.items()}
        if value.get("maximum") == 2**31 - 1:
            value["maximum"] = n_vocab - 1
        if isinstance(model := value.get("properties", {}).get("model"), dict):
            value["properties"]["model"] = {"enum": [*names, *([None] if "anyOf" in model else [])]}
        return value
    return [narrowed(inner, names, n_vocab) for inner in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_no_request_makes_the_server_fail(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    gguf = gguf_of(tiny_checkpoint("qwen3"), "f32")
    openers = {"tiny": lambda: backends.load(gguf, n_threads=1)}  # it is unloaded, too
    with served(openers=openers, context=128, slots=2) as server:
        n_vocab = server.scheduler.backend.info.n_vocab
        with server.http() as client:
            told = narrowed(client.get("/openapi.json").json(), list(server.models.names), n_vocab)
        path = tmp_path / "openapi.json"
        path.write_text(json.dumps(told), encoding="utf-8")
        command = (
            sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", server.address, "--no-color",
            "--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--continue-on-failure",
            "--max-examples", str(MOST_EXAMPLES), "--seed", "7", "--suppress-health-check", "all",
        )  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=1500, cwd=tmp_path, env=cli_environment()
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        count = re.search(r"([\d,]+) generated", done.stdout)
        assert count and int(count[1].replace(",", "")) >= LEAST_CASES, done.stdout[-2000:]
        answered = server.service.requests
        assert sum(answered.values()) >= LEAST_CASES and all(status < 500 for _, status in answered)
        assert {route for route, status in answered if status == 200} >= {"/v1/chat/completions", "/v1/completions"}
        assert server.post("/v1/completions", prompt="a", max_tokens=2).status_code == 200
