"""Published shapes, laid out by the engine from headers alone: caches and buffers are those that were measured before.

The figures (MiB) are from llama.cpp 0c1e570 with headers that had no tensors at all; here they have all of them. A
cache was noted to a MiB or better, a compute buffer to a MiB or a hundredth.
"""

from __future__ import annotations

from typing import Any

import pytest

from compare_tiers import layouts
from llmkit.memory.closed_form import assumed, closed_form, shape
from llmkit.memory.setting import Setting
from sparse_models import PUBLISHED

MIB = 1 << 20
FLASH = Setting(32768, output_rows=1, flash_attention=True)
PLAIN = Setting(32768, output_rows=1, flash_attention=False)
WHOLE = Setting(32768, output_rows=1, flash_attention=True, swa_full=True)
LONG = Setting(131072, output_rows=1, flash_attention=True)
BROAD = Setting(131072, output_rows=1, flash_attention=True, batch=2048, ubatch=2048)

# model, setting, caches and states in MiB, compute buffer in MiB (None: not noted)
ANCHORS = [
    ("llama2-70b", Setting(4096, output_rows=1, flash_attention=True), 1280, 236.01),
    ("llama2-70b", FLASH, 10240, 264.01),
    ("llama2-70b", PLAIN, 10240, 4244.01),
    ("gemma3-27b", WHOLE, 15872, None),
    ("gemma3-27b", FLASH, 3184, 199),
    ("gemma3-27b", LONG, 10864, None),
    ("gemma3-27b", BROAD, 11488, 1186),
    ("gpt-oss-20b", FLASH, 786, 125),
    ("qwen3moe-30b", FLASH, 3072, 120),
    ("deepseek-v3", FLASH, 2196, 440),
    ("deepseek-v3", PLAIN, 2196, 8648),
    ("qwen3next-80b", FLASH, 843, 118),
    ("mamba-2.8b", FLASH, 23.75, 65),
]
# what a formula that knows grouped attention only would say of the same at 32768 tokens, in MiB
NAIVE = {"gemma3-27b": 15872, "gpt-oss-20b": 1536, "deepseek-v3": 4148, "qwen3next-80b": 3072}


@pytest.fixture(scope="module")
def asked() -> dict[tuple[str, Setting], dict[str, Any]]:
    """All anchors, each model loaded once."""
    names = list(dict.fromkeys(name for name, *_ in ANCHORS))
    settings = list(dict.fromkeys(setting for _, setting, *_ in ANCHORS))
    answers = layouts([PUBLISHED[name] for name in names], settings)
    return {
        (name, setting): answer
        for name, row in zip(names, answers, strict=True)
        for setting, answer in zip(settings, row, strict=True)
    }


def sums(answer: dict[str, Any]) -> tuple[int, int]:
    """Bytes of context and of compute, over all buffers."""
    return sum(row[1] for row in answer["buffers"].values()), sum(row[2] for row in answer["buffers"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting", "caches", "compute"), ANCHORS)
def test_the_engine_gives_the_noted_figures(
    name: str, setting: Setting, caches: float, compute: float | None, asked: dict[tuple[str, Setting], dict[str, Any]]
) -> None:
    context, worked = sums(asked[name, setting])
    assert abs(context / MIB - caches) < (0.5 if caches == 843 else 0.001)
    if compute is not None:
        assert abs(worked / MIB - compute) < (0.5 if compute == int(compute) else 0.006)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting", "caches", "compute"), ANCHORS)
def test_closed_forms_give_the_same_to_the_byte(
    name: str, setting: Setting, caches: float, compute: float | None, asked: dict[tuple[str, Setting], dict[str, Any]]
) -> None:
    model = PUBLISHED[name]
    found = closed_form(shape.of_metadata(model.metadata(), tied=model.tied), setting, 0)
    assert (sum(found.kv.values()) + found.recurrent, found.compute) == sums(asked[name, setting])


def test_closed_forms_alone_give_the_noted_caches() -> None:
    for name, setting, caches, _ in ANCHORS:
        model = PUBLISHED[name]
        found = closed_form(shape.of_metadata(model.metadata(), tied=model.tied), setting, 0)
        assert abs((sum(found.kv.values()) + found.recurrent) / MIB - caches) < (0.5 if caches == 843 else 0.001), name


def test_a_formula_for_grouped_attention_alone_would_be_wrong() -> None:
    """Windows, latent attention and recurrent layers make the difference, and we see it."""
    for name, naive in NAIVE.items():
        found = closed_form(shape.of_metadata(PUBLISHED[name].metadata(), tied=True), FLASH, 0)
        assert sum(found.kv.values()) / MIB < 0.6 * naive, name


@pytest.mark.slow
def test_the_engine_counts_the_parameters_of_the_names(asked: dict[tuple[str, Setting], dict[str, Any]]) -> None:
    counts = {"llama2-70b": 68.98e9, "gemma3-27b": 27.0e9, "deepseek-v3": 671.0e9, "qwen3next-80b": 79.7e9}
    for name, count in counts.items():
        model = PUBLISHED[name]
        assert abs(asked[name, FLASH]["n_params"] / count - 1) < 0.001
        ours = assumed.n_weights(shape.of_metadata(model.metadata(), tied=model.tied))
        assert abs(ours / asked[name, FLASH]["n_params"] - 1) < 0.001
