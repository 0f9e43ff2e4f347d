"""A second model beside the first: its file's bytes, or an estimate of its own; and no other file in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit import gguf_writer
from llmkit.convert import GgufDraft, open_draft
from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound, Unsupported
from llmkit.gguf import Value
from llmkit.memory import estimate as memory
from llmkit.memory.companions import DRAFT, PROJECTOR, add_model
from llmkit.memory.parts import MemoryEstimate
from llmkit.memory.setting import Setting
from llmkit.quants import F16, F32


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> GgufDraft:
    return open_draft(smollm2_gguf)


@pytest.fixture(scope="module")
def alone(smollm2: GgufDraft) -> MemoryEstimate:
    return memory.estimate(smollm2, memory.variants(smollm2, ["COPY"]), [Setting(2048, kv_k="q8_0")])[0][0]


@pytest.fixture
def projector(tmp_path: Path) -> Path:
    path = tmp_path / "mmproj.gguf"
    metadata = {"general.architecture": Value.string("clip"), "general.type": Value.string("mmproj")}
    tensors = [("v.patch_embd.weight", (64, 3, 14, 14), F16), ("mm.0.weight", (128, 64), F16), ("mm.0.bias", (9,), F32)]
    gguf_writer.write_sparse(path, metadata, tensors)
    return path


def test_a_projector_adds_its_tensors(alone: MemoryEstimate, projector: Path) -> None:
    both, remarks = add_model(alone, projector, PROJECTOR)
    nbytes = 64 * 3 * 14 * 14 * 2 + 128 * 64 * 2 + 64  # nine floats in 32-byte steps
    assert both.needed_nbytes - alone.needed_nbytes == nbytes == both.part("projector: weights")
    assert both.parts[: len(alone.parts)] == alone.parts
    assert "not estimated" in remarks[0]


def test_a_draft_model_is_estimated_with_the_same_context(
    alone: MemoryEstimate, smollm2: GgufDraft, smollm2_gguf: Path
) -> None:
    """Its cache is in 16 bits whatever the first model's is in."""
    both, remarks = add_model(alone, smollm2_gguf, DRAFT)
    itself = memory.estimate(smollm2, memory.variants(smollm2, ["COPY"]), [Setting(2048)])[0][0]
    assert both.needed_nbytes == alone.needed_nbytes + itself.needed_nbytes
    assert both.resident_nbytes + both.untouched == sum(
        each.resident_nbytes + each.untouched for each in (alone, itself)
    )
    part = both.parts[len(alone.parts)]
    assert part.name == "draft model" and sum(each.nbytes for each in part.parts) == part.nbytes
    assert "2,048 tokens" in remarks[0]


def test_the_wrong_file_is_refused(alone: MemoryEstimate, projector: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="is a language model, expected a projector"):
        add_model(alone, smollm2_gguf, PROJECTOR)
    with pytest.raises(InvalidModel, match="is a projector, expected a language model"):
        add_model(alone, projector, DRAFT)
    with pytest.raises(Unsupported, match="role 'adapter'"):
        add_model(alone, projector, "adapter")
    with pytest.raises(ModelNotFound):
        add_model(alone, tmp_path / "none.gguf", DRAFT)


def test_a_draft_the_engine_refuses(alone: MemoryEstimate, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    gguf_writer.write_sparse(path, {"general.architecture": Value.string("nobody")}, [("x.weight", (32, 32), F16)])
    with pytest.raises(LlmkitError, match="engine"):
        add_model(alone, path, DRAFT)
