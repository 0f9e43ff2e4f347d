"""The roofline: what a token reads and computes, and the range of the speed that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit import gguf
from llmkit.errors import LlmkitError, Unsupported
from llmkit.memory import speed
from llmkit.memory.speed import (
    AttentionLayer,
    Share,
    Traffic,
    decode_over,
    decode_range,
    kv_nbytes,
    operations,
    traffic,
)
from llmkit.quants import TENSOR_TYPES

Row = tuple[str, int, int]


def rows(layers: int, tensors: dict[str, int], outside: dict[str, int], bits: int = 8) -> Iterator[Row]:
    for name, weights in outside.items():
        yield name, weights, weights * bits // 8
    for layer in range(layers):
        for name, weights in tensors.items():
            yield f"blk.{layer}.{name}", weights, weights * bits // 8


DENSE = {"attn_q.weight": 100, "attn_output.weight": 100, "ffn_up.weight": 400, "ffn_down.weight": 400}


def test_a_dense_model_reads_all_but_the_embedding() -> None:
    found = traffic(rows(3, DENSE, {"token_embd.weight": 5000, "output.weight": 5000, "output_norm.weight": 10}))
    assert found == Traffic(3 * 1000 + 5010, 3 * 1000 + 5010, 3 * 1000 + 10010)


def test_a_tied_embedding_is_read_as_the_output_matrix() -> None:
    assert traffic(rows(3, DENSE, {"token_embd.weight": 5000})).weight_nbytes == 3 * 1000 + 5000


def test_tables_that_are_looked_up_are_not_read() -> None:
    outside = {"token_embd.weight": 5000, "output.weight": 5000, "per_layer_token_embd.weight": 10**6}
    assert traffic(rows(1, DENSE, outside)).weight_nbytes == 1000 + 5000


EXPERTS = {
    "attn_q.weight": 100, "ffn_gate_inp.weight": 64, "ffn_up_exps.weight": 6400, "ffn_down_exps.weight": 6400,
    "ffn_up_shexp.weight": 50,
}  # fmt: skip


def test_a_mixture_reads_the_shared_tensors_and_its_share_of_the_experts() -> None:
    outside = {"token_embd.weight": 1000, "output.weight": 1000}
    found = traffic(rows(2, EXPERTS, outside, bits=16), n_expert=64, n_expert_used=8)
    active = 1000 + 2 * (100 + 64 + 50 + 12800 * 8 // 64)
    assert (found.active_weights, found.weight_nbytes) == (active, 2 * active)
    assert found.total_weights == 2000 + 2 * sum(EXPERTS.values())
    assert found.bits_per_weight == 16


@pytest.mark.parametrize(("n_expert", "used"), [(0, 0), (8, 0), (8, 9)])
def test_experts_without_sound_numbers_are_refused(n_expert: int, used: int) -> None:
    with pytest.raises(LlmkitError, match="ffn_up_exps"):
        traffic(rows(1, EXPERTS, {}), n_expert, used)


def test_layers_that_guess_further_tokens_are_left_out() -> None:
    predictor = [("blk.2.nextn.eh_proj.weight", 900, 900), ("blk.2.attn_q.weight", 100, 100)]
    plain = traffic([*rows(2, DENSE, {"output.weight": 10})])
    assert traffic([*rows(2, DENSE, {"output.weight": 10}), *predictor]).weight_nbytes == plain.weight_nbytes


def test_a_real_file_reads_all_its_tensors_as_they_lie_on_disk(smollm2_gguf: Path) -> None:
    """SmolLM2's output is tied, so every byte of the file's tensors is read."""
    file = gguf.read(smollm2_gguf)
    found = traffic((each.name, math.prod(each.shape), each.nbytes) for each in file.tensors.values())
    assert found.weight_nbytes == sum(each.nbytes for each in file.tensors.values())
    assert found.active_weights == found.total_weights == 134_515_008


def test_windows_cap_what_is_read_of_the_cache() -> None:
    layers = [AttentionLayer(1000, 8, 64), AttentionLayer(1000, 8, 64, window=512)]
    assert kv_nbytes(layers, 100) == 200_000
    assert kv_nbytes(layers, 2000) == 2_000_000 + 512_000


def test_llama_2_70b_by_hand() -> None:
    """80 layers of 8192, 64 heads of 128, 8 of them for K and V; 32768 tokens fill 10 GiB of cache at F16."""
    cell = 2 * 8 * 128 * TENSOR_TYPES["F16"].nbytes
    layers = [AttentionLayer(cell, n_head=64, head_dim=128)] * 80
    assert kv_nbytes(layers, 32768) == 10 << 30
    active = Traffic(40 * 10**9, 68_500_000_000, 68_976_648_192)
    assert operations(active) == 137_000_000_000
    assert operations(active, layers, 4096) == 137_000_000_000 + 4 * 4096 * 8192 * 80


def test_the_ceiling_is_bandwidth_over_bytes() -> None:
    """4 GB of weights and 1 GB of cache at 100 GB/s: 50 ms a token at least."""
    found = decode_range(Traffic(4 * 10**9, 7 * 10**9, 7 * 10**9), 10**9, bandwidth=100e9, processor="gpu")
    assert found.nbytes == 5 * 10**9
    assert found.ceiling == pytest.approx(20)
    assert found.low == pytest.approx(20 * 0.45) and found.high == pytest.approx(20 * 0.65)
    assert found.reasons


def test_devices_that_share_a_model_add_their_times() -> None:
    """3 GB at 300 GB/s take 10 ms, 1 GB at 50 GB/s takes 20: 33 tokens a second at most."""
    found = decode_over([Share(3e9, 300e9, "gpu"), Share(1e9, 50e9, "cpu")], 4.5)
    assert found.ceiling == pytest.approx(1 / 0.030)
    assert found.low == pytest.approx(1 / (0.010 / 0.45 + 0.020 / 0.50))
    assert found.high == pytest.approx(1 / (0.010 / 0.65 + 0.020 / 0.70))


@pytest.mark.parametrize("processor", ["gpu", "cpu"])
@pytest.mark.parametrize("bits", [1.75, 4.5, 8.5, 16, 32])
def test_it_is_always_a_range_below_the_ceiling(processor: str, bits: float) -> None:
    found = decode_over([Share(10**9, 50e9, processor)], bits)
    assert 0 < found.low < found.high < found.ceiling


def test_a_measured_bandwidth_is_reached_more_nearly() -> None:
    made, measured = (decode_over([Share(10**9, 50e9, "cpu", each)], 4.5) for each in (False, True))
    assert made.high < measured.high <= measured.ceiling == made.ceiling


def test_small_models_come_with_a_warning() -> None:
    small, large = (decode_over([Share(size, 1000e9, "gpu")], 4.5) for size in (10**8, 10**10))
    assert len(small.reasons) == len(large.reasons) + 1


# what others measured (memory.md names them): bytes as the model's file has them, bandwidth as the maker says
@pytest.mark.parametrize(
    ("nbytes", "bandwidth", "bits", "processor", "tokens"),
    [
        (4.92e9 - 0.29e9, 400e9, 4.9, "gpu", 46.2),  # M1 Max, 8B Q4_K_M (the embedding is not read)
        (3.79e9, 400e9, 4.5, "gpu", 61),  # M1 Max, 7B Q4_0
        (13.2e9, 400e9, 16, "gpu", 23),  # M1 Max, 7B F16
        (13.2e9, 546e9, 16, "gpu", 32),  # M4 Max, 7B F16
        (3.79e9, 102.4e9, 4.5, "cpu", 18.3),  # 13900K with DDR5-6400, 7B Q4_0
    ],
)
def test_published_speeds_lie_in_the_range(
    nbytes: float, bandwidth: float, bits: float, processor: str, tokens: float
) -> None:
    found = decode_over([Share(nbytes, bandwidth, processor)], bits)
    assert found.low <= tokens <= found.high


def test_nonsense_is_refused() -> None:
    with pytest.raises(LlmkitError):
        decode_over([], 4.5)
    with pytest.raises(LlmkitError):
        decode_over([Share(10, 0, "gpu")], 4.5)
    with pytest.raises(Unsupported, match="abacus"):
        speed.efficiency(Share(10, 10, "abacus"), 4.5)
