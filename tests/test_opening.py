"""`--backend` for models of the Hub, against the stand-in: what is fetched for whom, what is refused unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import desks
from desks import QUANTIZED, TINY, Desk, Silence, weights

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-in's signals are POSIX's")
root, serving, desk, silence = desks.root, desks.serving, desks.desk, desks.silence
ANSWER = ("--prompt", "hi", "--threads", "1", "--max-tokens", "3", "--temperature", "0")


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_runs_as_it_is_when_asked(desk: Desk, silence: Silence) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    said = desk.refused("chat", TINY, *ANSWER)
    assert f"For instance {TINY}:Q4_K_M" in said and "--backend transformers" in said
    assert weights(desk.hub) == []
    first = desk.ok("chat", TINY, "--backend", "transformers", *ANSWER)
    assert len({request.path for request in weights(desk.hub)}) == 5
    again = desk.ok("chat", TINY, "--backend", "transformers", *ANSWER, HF_ENDPOINT=silence.address)
    assert again.stdout == first.stdout and not silence.was_called()
    found = json.loads(
        desk.ok("compare", TINY, f"{QUANTIZED}:Q8_0", "--backend", "transformers", "--prompt", "hi there", "--tokens",
                "2", "--threads", "1", "--json").stdout
    )  # fmt: skip
    assert found["a"]["engine"].startswith("transformers") and found["b"]["engine"].startswith("llama.cpp")
    assert 0 <= found["passages"][0]["mean_kl_nats"] < 0.1


def test_impossible_wishes_ask_nobody(desk: Desk, root: Path) -> None:
    assert "names a quant" in desk.refused("chat", f"{TINY}:Q4_K_M", "--backend", "transformers", *ANSWER)
    file = next(iter(sorted((root / QUANTIZED).glob("*Q8_0.gguf"))))
    assert "is a file" in desk.refused("chat", file, "--backend", "transformers", *ANSWER)
    said = desk.refused("chat", root / TINY, "--backend", "llamacpp", *ANSWER)
    assert "llmkit quantize" in said and "--backend transformers" not in said
    assert desk.hub.log == []
