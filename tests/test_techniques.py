"""Techniques: their bytes are the engine's own differences, and models nobody has made are as large as those made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import sparse_models
from conftest import Cli, TinyCheckpoint
from llmkit import gguf
from llmkit.convert import GgufDraft, from_gguf, open_draft
from llmkit.errors import LlmkitError, Unsupported
from llmkit.memory import estimate as memory
from llmkit.memory import knobs, oracle
from llmkit.memory.parts import Variant
from llmkit.memory.setting import Setting, runtime
from llmkit.memory.surgery import with_tokens, without_blocks
from llmkit.memory.techniques import AVAILABLE, IN_USE, NOT_HERE, NOT_THIS_MODEL, Technique, techniques
from sparse_models import Model

ISSUE = (
    "weight quantization", "KV cache in 8 bits", "KV cache in 4 bits", "smaller context", "flash attention",
    "sliding windows kept small", "mapped instead of loaded", "offloading layers", "experts on CPU", "pruning blocks",
    "mixed (adaptive) bits", "smaller vocabulary",
)  # fmt: skip
GIB = 1 << 30


def table(draft: GgufDraft, setting: Setting, label: str = "COPY", **more: object) -> dict[str, Technique]:
    variant = memory.variants(draft, [label])[0]
    gpus: Sequence[tuple[str, int]] = more.get("gpus", ())  # type: ignore[assignment]
    return {row.name: row for row in techniques(draft, variant, setting, gpus=gpus)}


def needed(draft: GgufDraft, variant: Variant, setting: Setting) -> int:
    """Bytes of the engine's buffers, asked of the engine itself, with what no layout of it shows."""
    layout = oracle.ask(draft, [variant.types], [setting])[0][0]
    assert not isinstance(layout, str)
    hidden = memory.estimate(draft, [variant], [setting])[0][0].part("work buffer")
    return hidden + sum(sum(each.values()) for each in (layout.weights, layout.context, layout.compute))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> GgufDraft:
    return open_draft(smollm2_gguf)


@pytest.fixture(scope="module")
def ours(smollm2: GgufDraft) -> dict[str, Technique]:
    return table(smollm2, runtime("llmkit").with_context(4096))


# ── settings ──


def test_all_of_them_are_told(ours: dict[str, Technique]) -> None:
    assert set(ISSUE) <= set(ours)
    for row in ours.values():
        assert row.cost or row.state == NOT_THIS_MODEL, row.name
        assert bool(row.command) is row.available or row.state in (NOT_HERE, NOT_THIS_MODEL), row.name
        assert row.state in (AVAILABLE, IN_USE) or row.why, row.name
        assert row.state != AVAILABLE or (row.saved or 0) > 0, row.name


def test_the_cache_in_fewer_bits_by_hand(ours: dict[str, Technique]) -> None:
    """SmolLM2: 30 layers, K and V of 192 numbers: 2 bytes each in F16, 34 for 32 in Q8_0, 18 for 32 in Q4_0."""
    numbers = 4096 * 30 * 2 * 192
    for name, after in (("KV cache in 8 bits", 34), ("KV cache in 4 bits", 18)):
        saved = ours[name].saved
        # quantized caches are rotated, so compute and work buffers change a little too
        assert saved == pytest.approx(numbers * 2 - numbers * after // 32, abs=4 << 20)


@pytest.mark.slow
def test_settings_save_what_the_engine_says(smollm2: GgufDraft) -> None:
    setting = runtime("llama-cpp-python").with_context(2048)
    variant = memory.variants(smollm2, ["COPY"])[0]
    rows = {row.name: row for row in techniques(smollm2, variant, setting)}
    now = needed(smollm2, variant, setting)
    available = [knob for knob in (*knobs.KNOBS, knobs.half_context(setting)) if _is(rows, knob.name)]
    assert len(available) >= 4
    for knob in available:
        then = needed(smollm2, variant, replace(setting, **knob.changes))
        assert rows[knob.name].saved == now - then > 0, knob.name
    assert rows["smaller context"].saved == knob_saving(smollm2, variant, setting, "smaller context")


def _is(rows: dict[str, Technique], name: str) -> bool:
    return name in rows and rows[name].state == AVAILABLE


def knob_saving(draft: GgufDraft, variant: Variant, setting: Setting, name: str) -> int:
    return next(knob.saved for knob in knobs.of(draft, variant, setting) if knob.name == name)


def test_what_is_on_already_says_what_it_saves(smollm2: GgufDraft) -> None:
    setting = Setting(2048, kv_k="q8_0", kv_v="q8_0", flash_attention=True)
    rows = table(smollm2, setting)
    assert rows["KV cache in 8 bits"].state == IN_USE
    saved = rows["KV cache in 8 bits"].saved
    assert saved is not None and saved > 20 << 20
    assert rows["KV cache in 4 bits"].state == AVAILABLE
    flash = rows["flash attention"]  # a quantized V needs it: there is no figure without
    assert (flash.state, flash.saved) == (IN_USE, None) and flash.why


def test_windows_are_for_models_that_have_them(tmp_path: Path, ours: dict[str, Technique]) -> None:
    assert ours["sliding windows kept small"].state == NOT_THIS_MODEL
    draft = from_gguf(gguf.read(sparse_models.PUBLISHED["gemma3-270m"].write(tmp_path / "gemma.gguf")))
    small = table(draft, Setting(8192))["sliding windows kept small"]
    full = table(draft, Setting(8192, swa_full=True))["sliding windows kept small"]
    assert (small.state, full.state) == (IN_USE, AVAILABLE)
    # 15 of 18 layers see 512 tokens and keep 1024 of 8192; K and V of 256 numbers in 16 bits
    assert full.saved is not None and full.saved >= 15 * (8192 - 1024) * 2 * 256 * 2
    assert (small.before, small.after) == (full.before, full.after)


@pytest.mark.slow
def test_mapped_weights_may_be_dropped(smollm2: GgufDraft) -> None:
    """Without repacking all weights are pages of the file."""
    setting = Setting(1024, repack=False)
    variant = memory.variants(smollm2, ["COPY"])[0]
    weights = memory.estimate(smollm2, [variant], [setting])[0][0].part("weights")
    on, off = (table(smollm2, replace(setting, mmap=each))["mapped instead of loaded"] for each in (True, False))
    assert (on.state, on.saved) == (IN_USE, weights)
    assert off.state == AVAILABLE and off.saved == pytest.approx(weights, abs=64)


# ── other types ──


def test_the_quant_saves_its_file(smollm2: GgufDraft) -> None:
    """The difference in memory is that of the two files."""
    before, after = (memory.variants(smollm2, [label])[0] for label in ("BF16", "Q4_K_M"))
    setting = Setting(512, repack=False, mmap=False)
    row = table(smollm2, setting, "BF16")["weight quantization"]
    assert row.what == "BF16 → Q4_K_M" and "0.031 nats" in row.cost and "errors add up" in row.cost
    assert row.command == "llmkit quantize MODEL Q4_K_M --requantize"
    # the work buffer depends on the types as well
    assert row.saved == pytest.approx(before.file_nbytes - after.file_nbytes, abs=1 << 20)


@pytest.mark.slow
def test_the_mix_is_what_its_command_makes(smollm2_folder: Path, tmp_path: Path, cli: Cli) -> None:
    draft = open_draft(smollm2_folder)
    row = table(draft, Setting(512), "Q8_0")["mixed (adaptive) bits"]
    assert row.state == AVAILABLE and row.how == "measured"
    words = row.command.replace("'", "").split()
    assert words[:3] == ["llmkit", "quantize", "MODEL"]
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    for folder, options in ((plain, words[3:4]), (mixed, words[3:])):
        done = cli("quantize", smollm2_folder, *options, "--out", f"{folder}/", timeout=300)
        assert done.returncode == 0, done.stderr
    sizes = [
        sum(tensor.nbytes for tensor in gguf.read(next(folder.glob("*.gguf"))).tensors.values())
        for folder in (plain, mixed)
    ]
    assert row.saved == pytest.approx(sizes[0] - sizes[1], abs=1 << 20)


# ── models nobody has made ──


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_pruned_model_is_as_large_as_a_real_one(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    deep, shallow = (open_draft(tiny_checkpoint(family, layers=layers)) for layers in (6, 4))
    pruned = without_blocks(deep, 2)
    assert [tensor.name for tensor in pruned.tensors] == [tensor.name for tensor in shallow.tensors]
    for label in ("COPY", "Q8_0"):
        found, real = (
            memory.estimate(draft, memory.variants(draft, [label]), [Setting(1024)])[0][0]
            for draft in (pruned, shallow)
        )
        assert found.parts == real.parts


def test_patterns_of_layers_survive_pruning(tmp_path: Path) -> None:
    """qwen3next: every fourth layer attends, the rest are recurrent; the engine would refuse a model out of step."""
    model = sparse_models.PUBLISHED["qwen3next-80b"]
    draft = from_gguf(gguf.read(model.write(tmp_path / "next.gguf")))
    shallow = from_gguf(gguf.read(replace(model, n_layer=model.n_layer - 5).write(tmp_path / "shallow.gguf")))
    found, real = (
        memory.estimate(each, memory.variants(each, ["COPY"]), [Setting(1024)])[0][0]
        for each in (without_blocks(draft, 5), shallow)
    )
    assert found.parts == real.parts


def test_a_smaller_vocabulary_is_as_large_as_a_real_one(tmp_path: Path) -> None:
    sizes = sparse_models.attention(embd=64, ff=128, heads=4, heads_kv=2, vocab=1024)
    model = Model("tiny", "llama", 2, sizes, {})
    large = from_gguf(gguf.read(model.write(tmp_path / "large.gguf")))
    real = from_gguf(gguf.read(replace(model, sizes={**sizes, "vocab": 512}).write(tmp_path / "small.gguf")))
    cut = with_tokens(large, 512)
    assert [tensor.shape for tensor in cut.tensors] == [tensor.shape for tensor in real.tensors]
    setting = Setting(512)
    found, small = (
        memory.estimate(each, memory.variants(each, ["COPY"]), [setting])[0][0].parts for each in (cut, real)
    )
    assert found == small


def test_a_cut_vocabulary_counts_its_tokens(smollm2: GgufDraft) -> None:
    cut = with_tokens(smollm2, 1000)
    assert memory.n_vocab(smollm2) == 49152 and memory.n_vocab(cut) == 1000
    assert list(cut.metadata["tokenizer.ggml.tokens"].data)[-1] == smollm2.metadata["tokenizer.ggml.tokens"].data[999]


def test_what_cannot_be_cut_is_an_error(smollm2: GgufDraft) -> None:
    with pytest.raises(Unsupported, match="30 of 30 blocks"):
        without_blocks(smollm2, 30)
    with pytest.raises(Unsupported, match="no token embeddings"):
        with_tokens(smollm2, 0)


def test_what_llmkit_cannot_do_says_so_and_its_bytes(ours: dict[str, Technique]) -> None:
    for name in ("pruning blocks", "smaller vocabulary"):
        row = ours[name]
        assert (row.state, row.command, row.available) == (NOT_HERE, "", False)
        assert "yet" in row.why and (row.saved or 0) > 0


# ── other places ──


@pytest.mark.slow
def test_offloading_with_and_without_a_gpu(smollm2: GgufDraft, ours: dict[str, Technique]) -> None:
    there = table(smollm2, Setting(4096), gpus=[("RTX 4090", 20 * GIB)])["offloading layers"]
    assert (there.state, there.what, there.how) == (AVAILABLE, "31 of 31 layers to the GPU", "derived")
    assert there.command == "llmkit chat FILE --gpu-layers 31"
    small = table(smollm2, Setting(4096), gpus=[("a card", GIB // 4)])["offloading layers"]
    assert (small.state, small.saved) == (NOT_HERE, 0)
    assert ours["offloading layers"].state == NOT_HERE and (ours["offloading layers"].saved or 0) > 100 << 20


def test_experts_are_for_models_that_have_them(tmp_path: Path, ours: dict[str, Technique]) -> None:
    assert ours["experts on CPU"].state == NOT_THIS_MODEL
    sizes = sparse_models.attention(embd=64, ff=128, heads=4, heads_kv=2, vocab=256, experts=8, used=2, ff_exp=32)
    draft = from_gguf(gguf.read(Model("moe", "qwen3moe", 4, sizes, {}).write(tmp_path / "moe.gguf")))
    row = table(draft, Setting(512), gpus=[("a GPU", 20 * GIB)])["experts on CPU"]
    assert row.state == AVAILABLE and "--cpu-moe" in row.command
    # all experts leave the GPU; the largest of their matrices is staged there for prompts
    assert row.saved == (4 * 3 - 1) * 8 * 32 * 64 * 2


def test_a_refused_setting_is_an_error(smollm2: GgufDraft) -> None:
    with pytest.raises(LlmkitError, match="refuses"):
        table(smollm2, Setting(512, kv_v="q8_0", flash_attention=False))
