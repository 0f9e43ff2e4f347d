"""Layers over GPUs: buffer sizes that real GPUs printed, arithmetic by hand, and sums that lose no byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import sparse_models
from llmkit import gguf, gguf_writer
from llmkit.convert import GgufDraft, from_gguf
from llmkit.errors import LlmkitError
from llmkit.memory import estimate as memory
from llmkit.memory.parts import MemoryEstimate
from llmkit.memory.setting import Setting
from llmkit.memory.split import CUDA_CONTEXT, Place, Split, split
from llmkit.quants import F16, TENSOR_TYPES, TensorType
from sparse_models import Model

MIB, GIB = 1 << 20, 1 << 30
# a Llama whose tensors one can add up: 4 blocks, width 64, feed-forward 128, 4 heads of 16, 2 of keys, 256 tokens
TINY = Model("tiny", "llama", 4, sparse_models.attention(embd=64, ff=128, heads=4, heads_kv=2, vocab=256), {})
# q and o, k and v, feed-forward in 16 bits, two norms in 32; all multiples of 128
BLOCK = 2 * 64 * 64 * 2 + 2 * 32 * 64 * 2 + 3 * 128 * 64 * 2 + 2 * 64 * 4
TABLE, NORM = 256 * 64 * 2, 64 * 4
KV = 512 * (32 + 32) * 2  # of one layer at 512 tokens
ROOMY = [("a GPU", 80 * GIB)]


def draft_of(model: Model, folder: Path, types: dict[str, TensorType] | None = None) -> GgufDraft:
    """`model` with the types named, and F16 for other matrices."""
    chosen = types or {}
    rows = [(name, shape, chosen.get(name, kind)) for name, shape, kind in model.tensors(F16)]
    path = folder / f"{model.name}.gguf"
    gguf_writer.write_sparse(path, model.metadata(), rows)
    return from_gguf(gguf.read(path))


def estimate_of(draft: GgufDraft, setting: Setting | None = None, label: str = "COPY") -> MemoryEstimate:
    asked = setting or Setting(512, output_rows=1)
    found = memory.estimate(draft, memory.variants(draft, [label]), [asked])[0][0]
    assert found.error is None
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufDraft, MemoryEstimate]:
    draft = draft_of(TINY, tmp_path_factory.mktemp("tiny"))
    return draft, estimate_of(draft)


# ── what real GPUs printed ──


def test_a_v100_with_all_of_llama_7b(tmp_path: Path) -> None:
    """ggml-org's CI, build 2459, OpenLLaMA 7B Q4_0 (output in Q6_K): CPU 70.31, CUDA0 3577.56, KV 256.00, host 9.00."""
    model = sparse_models.PUBLISHED["llama2-7b"]
    types = {name: TENSOR_TYPES["Q4_0"] for name, _, kind in model.tensors(F16) if kind is F16}
    draft = draft_of(model, tmp_path, types | {"output.weight": TENSOR_TYPES["Q6_K"]})
    found = split(draft, estimate_of(draft, Setting(512, flash_attention=False, output_rows=1)), [("V100", 15 * GIB)])
    gpu = found.devices[0]
    assert (found.gpu_layers, len(gpu.layers), gpu.output) == (33, 32, True)
    assert round(gpu.part("weights") / MIB, 2) == 3577.56
    assert round(gpu.part("KV cache") / MIB, 2) == 256.00
    assert round(found.host.part("weights") / MIB, 2) == 70.31
    assert round(found.host.part("compute buffer") / MIB, 2) == 9.00


def test_two_cards_with_all_of_command_r(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp #6122: Command-R 35B Q4_K_S at 4096 tokens, tied, on a 4070 Ti and a 3090 Ti, 12 and 28 layers.

    CPU 1640.62, CUDA0 5434.38, CUDA1 13989.53 with the output's copy of the embeddings; KV 1536 and 3584 MiB.
    """
    tensors = (*sparse_models.ATTENTION, *sparse_models.FEED_FORWARD[1:])
    monkeypatch.setitem(sparse_models.BLOCKS, "command-r", tensors)
    sizes = sparse_models.attention(embd=8192, ff=22528, heads=64, heads_kv=64, vocab=256000)
    keys = {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.0625}
    draft = draft_of(Model("command-r", "command-r", 40, sizes, keys, tied=True), tmp_path)
    estimate = estimate_of(draft, Setting(4096, batch=2048, output_rows=1, flash_attention=False), "Q4_K_S")
    # how much was free is not in the log; this ratio gives the layers that were printed
    found = split(draft, estimate, [("4070 Ti", 12 * GIB), ("3090 Ti", 29 * GIB)], gpu_layers=41)
    first, second = found.devices
    assert (len(first.layers), len(second.layers)) == (12, 28)
    assert (first.output, second.output) == (False, True)
    assert first.part("weights") / MIB == pytest.approx(5434.38, abs=0.006)
    assert second.part("weights") / MIB == pytest.approx(13989.53, abs=0.006)
    assert found.host.part("weights") / MIB == pytest.approx(1640.62, abs=0.006)
    assert [place.part("KV cache") / MIB for place in found.devices] == [1536.0, 3584.0]


# ── by hand ──


def test_all_layers_on_one_device(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    found = split(*tiny, ROOMY)
    gpu = found.devices[0]
    assert (found.gpu_layers, found.n_layer, gpu.layers, gpu.output) == (5, 4, (0, 1, 2, 3), True)
    assert gpu.part("weights") == 4 * BLOCK + NORM + TABLE  # output_norm and output.weight
    assert gpu.part("KV cache") == 4 * KV
    assert found.host.part("weights") == TABLE
    assert found.host.part("KV cache") == 0
    # pinned: embeddings of a batch in 32 bits, its mask in 16
    assert found.host.part("compute buffer") == 4 * 64 * 512 + 2 * 512 * 512
    assert gpu.unaccounted == CUDA_CONTEXT and found.host.unaccounted == (0, 0)


def test_the_output_goes_first_then_the_last_layers(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    one, two = (split(*tiny, ROOMY, gpu_layers=count).devices[0] for count in (1, 2))
    assert (one.layers, one.output, one.part("weights"), one.part("KV cache")) == ((), True, NORM + TABLE, 0)
    assert (two.layers, two.part("weights"), two.part("KV cache")) == ((3,), BLOCK + NORM + TABLE, KV)
    # a large prompt's work is done on the GPU, with a copy of the weights that lie on the CPU
    assert two.part("weights staged for prompts") == 128 * 64 * 2


def test_free_memory_decides_who_gets_what(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    """Of five layers those below 3/4 go to the first of two devices with 3 and 1 parts of the memory."""
    found = split(*tiny, [("large", 30 * GIB), ("small", 10 * GIB)])
    large, small = found.devices
    assert (large.layers, large.output) == ((0, 1, 2, 3), False)
    assert (small.layers, small.output) == ((), True)
    # two devices at work at the same time keep their inputs four times
    assert large.part("copies of inputs") == 3 * (4 * 64 * 512 + 2 * 512 * 512)
    assert split(*tiny, ROOMY).devices[0].part("copies of inputs") == 0


def test_equal_devices_share_at_exactly_half(tmp_path: Path) -> None:
    """Three blocks and the output: the third of four lies on the border, and the border belongs to the second."""
    draft = draft_of(replace(TINY, n_layer=3), tmp_path)
    first, second = split(draft, estimate_of(draft), [("a", 7 * GIB), ("b", 7 * GIB)]).devices
    assert (first.layers, second.layers) == ((0, 1), (2,))


def test_tied_embeddings_are_there_twice(tmp_path: Path) -> None:
    draft = draft_of(replace(TINY, tied=True), tmp_path)
    estimate = estimate_of(draft)
    on_gpu, on_cpu = (split(draft, estimate, ROOMY, gpu_layers=count) for count in (5, 0))
    assert on_gpu.devices[0].part("weights") == 4 * BLOCK + NORM + TABLE
    assert on_gpu.host.part("weights") == TABLE
    assert on_cpu.host.part("weights") == 4 * BLOCK + NORM + TABLE


def test_quantized_rows_are_padded(tmp_path: Path) -> None:
    """A row of 64 in Q8_0 is two blocks of 34 bytes; the last one is padded by 448 weights, the tensor to 128 bytes."""
    draft = draft_of(TINY, tmp_path, {"blk.3.attn_q.weight": TENSOR_TYPES["Q8_0"]})
    found = split(draft, estimate_of(draft), ROOMY)
    padded = 64 * 2 * 34 + 448 // 32 * 34
    assert padded == 4828
    assert found.devices[0].part("weights") == 4 * BLOCK - 64 * 64 * 2 + 4864 + NORM + TABLE


def test_experts_stay_on_the_cpu(tmp_path: Path) -> None:
    sizes = sparse_models.attention(embd=64, ff=128, heads=4, heads_kv=2, vocab=256, experts=8, used=2, ff_exp=32)
    draft = draft_of(Model("moe", "qwen3moe", 4, sizes, {}), tmp_path)
    estimate = estimate_of(draft)
    plain, kept = (split(draft, estimate, ROOMY, cpu_experts=each) for each in (False, True))
    experts = 3 * 8 * 32 * 64 * 2  # gate, up and down of one block; the router is none of them
    assert plain.devices[0].part("weights") - kept.devices[0].part("weights") == 4 * experts
    assert kept.host.part("weights") - plain.host.part("weights") == 4 * experts
    assert kept.devices[0].part("KV cache") == plain.devices[0].part("KV cache") > 0
    assert kept.devices[0].part("weights staged for prompts") == experts // 3
    assert not plain.devices[0].part("weights staged for prompts")


# ── sums ──


@pytest.mark.parametrize("name", ["tiny", "gemma3-270m", "mamba-2.8b"])
def test_sums_lose_no_byte(name: str, tmp_path: Path) -> None:
    model = {**sparse_models.PUBLISHED, "tiny": TINY}[name]
    draft = draft_of(model, tmp_path)
    estimate = estimate_of(draft, Setting(2048, output_rows=1, repack=False))
    tied = TABLE if name == "tiny" else model.sizes["vocab"] * model.sizes["embd"] * 2
    for count in range(model.n_layer + 2):
        found = split(draft, estimate, [("a", 5 * GIB), ("b", 3 * GIB)], gpu_layers=count)
        places = [*found.devices, found.host]
        for part in ("KV cache", "recurrent state"):
            assert sum(place.part(part) for place in places) == estimate.part(part)
        twin = tied if model.tied and count else 0
        more = sum(place.part("weights") for place in places) - estimate.part("weights") - twin
        assert 0 <= more <= 128 * len(draft.tensors)  # what CUDA pads
        assert all(place.nbytes == sum(part.nbytes for part in place.parts) for place in places)
        assert _layers(places) == list(range(model.n_layer))
        assert sum(place.output for place in places) == 1
    none = split(draft, estimate, [("a", GIB)], gpu_layers=0)
    assert none.host.nbytes == estimate.needed_nbytes and not none.devices[0].parts


def _layers(places: list[Place]) -> list[int]:
    return sorted(layer for place in places for layer in place.layers)


# ── as many as fit ──


def test_auto_takes_the_most_that_fit(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    needs = [split(*tiny, ROOMY, gpu_layers=count).devices[0].nbytes + CUDA_CONTEXT[1] for count in range(1, 6)]

    def auto(free: int) -> Split:
        return split(*tiny, [("a GPU", free)])

    assert auto(needs[2]).gpu_layers == 3
    assert auto(needs[2] - 1).gpu_layers == 2
    assert auto(needs[0] - 1).gpu_layers == 0
    assert auto(needs[2]).fits
    assert not split(*tiny, [("a GPU", needs[2] - 1)], gpu_layers=3).fits


def test_without_a_device_all_stays_on_the_cpu(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    draft, estimate = tiny
    found = split(draft, estimate, [], gpu_layers=3)
    assert (found.gpu_layers, found.devices) == (0, ())
    assert found.host.nbytes == estimate.needed_nbytes


def test_more_layers_than_there_are(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    assert split(*tiny, ROOMY, gpu_layers=99).gpu_layers == 5


def test_every_figure_says_it_is_derived(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    found = split(*tiny, ROOMY, gpu_layers=2)
    assert {part.how for place in (*found.devices, found.host) for part in place.parts} == {"derived"}
    assert "not measured" in found.remarks[0]


def test_a_refused_setting_is_an_error(tiny: tuple[GgufDraft, MemoryEstimate]) -> None:
    draft, estimate = tiny
    with pytest.raises(LlmkitError, match="refuses"):
        split(draft, replace(estimate, error="no", parts=()), ROOMY)
