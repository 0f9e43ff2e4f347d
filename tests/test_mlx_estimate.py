"""MLX without MLX: figures measured on mlx 0.32.4 and mlx-lm 0.32.2 (Linux, CPU), and arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparse_models
from llmkit import gguf
from llmkit.convert import GgufDraft, from_gguf, open_draft
from llmkit.errors import Unsupported
from llmkit.memory import mlx_estimate
from llmkit.memory.mlx_estimate import BITS, GROUPS, WARNS_ABOVE, estimate


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> GgufDraft:
    return open_draft(smollm2_gguf)


def published(name: str, folder: Path) -> GgufDraft:
    return from_gguf(gguf.read(sparse_models.PUBLISHED[name].write(folder / "model.gguf")))


@pytest.mark.parametrize(("bits", "group", "measured"), [(8, 64, 9.01), (4, 64, 5.01), (4, 32, 6.01), (3, 128, 26.4)])
def test_bits_per_weight_that_were_measured(bits: int, group: int, measured: float, smollm2: GgufDraft) -> None:
    """SmolLM2 in F32 with scales in F32; in groups of 128 the 576 columns of most matrices do not divide."""
    found = estimate(smollm2, 512, bits=bits, group=group, float_nbytes=4)
    assert found.bits_per_weight == pytest.approx(measured, abs=0.06)


def test_caches_that_were_measured(smollm2: GgufDraft) -> None:
    """30 layers, 3 heads of 64, ten tokens: one step of 256, in F32, and quantized with scales in F32."""
    found = [estimate(smollm2, 10, kv_bits=bits, float_nbytes=4).part("KV cache") for bits in (None, 8, 4)]
    assert found == [11_796_480, 3_317_760, 1_843_200]


def test_a_matrix_by_hand(smollm2: GgufDraft) -> None:
    """4 bits in groups of 64: half a byte a weight and 4 bytes for 64 of them, vectors in 2 bytes."""
    vectors = sum(tensor.n_weights for tensor in smollm2.tensors if len(tensor.shape) == 1)
    matrices = smollm2.n_weights - vectors
    assert vectors == 61 * 576
    assert estimate(smollm2, 512).part("weights") == matrices // 2 + matrices // 64 * 4 + vectors * 2
    assert estimate(smollm2, 512, bits=None).part("weights") == smollm2.n_weights * 2


def test_all_rows(smollm2: GgufDraft) -> None:
    found = mlx_estimate.rows(smollm2, 2048)
    assert [(each.bits, each.group) for each in found[1:]] == [(bits, group) for bits in BITS for group in GROUPS]
    assert found[0].bits is None
    for each in found:
        assert each.nbytes == sum(part.nbytes for part in each.parts)
        assert {part.how for part in each.parts} == {"derived"} and "not asked of MLX" in each.remarks[0]
        # 576 = 9 · 64 = 4.5 · 128: all matrices but those of the feed-forward's way down stay as they are
        skipped = each.bits is not None and each.group == 128
        assert each.skipped == (30 * 6 + 1 if skipped else 0)
        assert any("stay in 16 bits" in remark for remark in each.remarks) is skipped


def test_a_window_ends_the_cache(tmp_path: Path) -> None:
    """Gemma 3 270M: 15 of 18 layers keep 512 tokens, K and V of 256 numbers."""
    draft = published("gemma3-270m", tmp_path)
    assert estimate(draft, 8192).part("KV cache") == (15 * 512 + 3 * 8192) * 2 * 256 * 2
    assert estimate(draft, 300).part("KV cache") == 18 * 512 * 2 * 256 * 2


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    assert any("latent" in remark for remark in estimate(published("deepseek-v3", tmp_path), 512).remarks)
    assert any("recurrent" in remark for remark in estimate(published("mamba-2.8b", tmp_path), 512).remarks)


def test_the_share_of_the_wired_limit(smollm2: GgufDraft) -> None:
    found = estimate(smollm2, 512)
    assert found.share(found.nbytes) == 1.0 > WARNS_ABOVE
    assert found.share(16 << 30) < 0.01


@pytest.mark.parametrize("wrong", [{"bits": 7}, {"group": 16}, {"kv_bits": 16}])
def test_what_mlx_refuses(wrong: dict[str, int], smollm2: GgufDraft) -> None:
    with pytest.raises(Unsupported, match="MLX has no"):
        estimate(smollm2, 512, **wrong)
