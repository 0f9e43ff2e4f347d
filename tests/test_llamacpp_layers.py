"""Models whose ends and layers differ, tiny and random: what shows of them; the lens against the engine's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import gguf, gguf_writer
from llmkit.backends import Part, llamacpp
from llmkit.backends.llamacpp import LlamaCpp
from llmkit.errors import Unsupported
from llmkit.gguf import Value
from llmkit.quants import TENSOR_TYPES

FloatArray = npt.NDArray[np.float32]
F32 = TENSOR_TYPES["F32"]
V, D, FF, LAYERS, CONTEXT = 96, 64, 128, 3, 64
TOKENS = [5, 17, 3, 80, 41, 2, 9]

Shapes = dict[str, tuple[int, ...]]


def llama_like(*, ffn_norm: bool = True) -> Shapes:
    layer: Shapes = {f"attn_{x}.weight": (D, D) for x in ("q", "k", "v", "output")}
    layer |= {
        "attn_norm.weight": (D,),
        "ffn_gate.weight": (FF, D),
        "ffn_up.weight": (FF, D),
        "ffn_down.weight": (D, FF),
    }
    return layer | ({"ffn_norm.weight": (D,)} if ffn_norm else {})


def gpt2() -> Shapes:
    matrices = {"attn_qkv": (3 * D, D), "attn_output": (D, D), "ffn_up": (FF, D), "ffn_down": (D, FF)}
    layer: Shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    return layer | {f"{name}.{part}": (D,) for name in ("attn_norm", "ffn_norm") for part in ("weight", "bias")}


def mamba() -> Shapes:
    inner, state, rank = 2 * D, 16, 4
    return {
        "attn_norm.weight": (D,), "ssm_in.weight": (2 * inner, D), "ssm_conv1d.weight": (inner, 4),
        "ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * state, inner), "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,), "ssm_a": (inner, state), "ssm_d": (inner,), "ssm_out.weight": (D, inner),
    }  # fmt: skip


RMS, LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
GRANITE = {"attention.scale": 0.2, "residual_scale": 0.4, "embedding_scale": 6.0, "logit_scale": 4.0, RMS: 1e-5}
OUTSIDE: Shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
# architecture → its layer's tensors, those outside layers, its settings
KINDS: dict[str, tuple[Shapes, Shapes, dict[str, float]]] = {
    "llama": (llama_like(), OUTSIDE | {"output.weight": (V, D)}, {RMS: 1e-5}),
    "granite": (llama_like(), OUTSIDE, GRANITE),
    "command-r": (llama_like(ffn_norm=False), OUTSIDE, {LAYER_NORM: 1e-5, "logit_scale": 0.0625}),
    "gpt2": (
        gpt2(),
        OUTSIDE | {"output_norm.bias": (D,), "position_embd.weight": (CONTEXT, D), "output.weight": (V, D)},
        {LAYER_NORM: 1e-5},
    ),
    "mamba": (mamba(), OUTSIDE, {RMS: 1e-5}),
}


def write(path: Path, architecture: str, **more: float) -> Path:
    """A model of this architecture with pseudo-random weights and no vocabulary."""
    layer, outside, settings = KINDS[architecture]
    recurrent = architecture == "mamba"
    numbers = {
        "vocab_size": V, "context_length": CONTEXT, "embedding_length": D, "block_count": LAYERS,
        "feed_forward_length": 0 if recurrent else FF, "attention.head_count": 0 if recurrent else 4,
    }  # fmt: skip
    if recurrent:
        numbers |= {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * D, "ssm.state_size": 16, "ssm.time_step_rank": 4}
    elif architecture != "gpt2":
        numbers |= {"attention.head_count_kv": 4, "rope.dimension_count": 16}
    metadata = {
        "general.architecture": Value.string(architecture),
        "tokenizer.ggml.model": Value.string("no_vocab"),
        **{f"{architecture}.{key}": Value.uint32(number) for key, number in numbers.items()},
        **{f"{architecture}.{key}": Value.float32(number) for key, number in (settings | more).items()},
    }
    random = np.random.default_rng(7)
    shapes = outside | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    rows = []
    for name, shape in shapes.items():
        values = random.normal(0, 1.5 * shape[-1] ** -0.5 if len(shape) > 1 else 0.3, shape)
        if name.endswith("norm.weight"):
            values += 1
        elif name.endswith("ssm_a"):
            values = -np.exp(values)
        rows.append((name, shape, F32, values.astype(np.float32).tobytes()))
    gguf_writer.write(path, metadata, rows)
    return path


@pytest.fixture(params=sorted(KINDS))
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> LlamaCpp:
    loaded = llamacpp.load(write(tmp_path / "model.gguf", request.param), n_threads=1)
    request.addfinalizer(loaded.close)
    return loaded


def off_by(found: FloatArray, expected: FloatArray) -> float:
    return float(np.abs(found - expected).max() / np.ptp(expected))


def test_the_lens_of_every_kind_of_end(backend: LlamaCpp) -> None:
    session = backend.session(CONTEXT, inspect=True)
    found = session.eval(TOKENS, logits="all", layers=(-1, 0, LAYERS - 1))
    assert len(set(found.logits.argmax(axis=1).tolist())) > 3, "these logits could not show a difference"
    assert off_by(backend.unembed(found.hidden[LAYERS - 1]), found.logits) < 1e-4
    assert off_by(backend.unembed(found.hidden[0]), found.logits) > 0.05
    assert backend.shown.hidden == tuple(range(LAYERS)) and backend.shown.why_no_lens == ""
    scale = {"granite": 6.0}.get(backend.info.architecture, 1.0)
    expected = backend.embed(TOKENS) * np.float32(scale)
    if backend.info.architecture == "gpt2":  # position embeddings are added
        table = backend.file.tensors["position_embd.weight"]
        expected = expected + np.memmap(table.path, np.float32, "r", table.offset, table.shape)[: len(TOKENS)]
    np.testing.assert_allclose(found.hidden[-1], expected, rtol=1e-5, atol=1e-6)


def test_attention_or_why_there_is_none(backend: LlamaCpp) -> None:
    session = backend.session(CONTEXT, inspect=True)
    if backend.info.architecture != "mamba":
        weights = session.eval(TOKENS, attention=(1,)).attention[1]
        assert weights.shape == (4, 7, 7) and backend.info.n_head == 4
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        return
    assert backend.shown.attention == () and backend.info.n_head == 0
    with pytest.raises(
        Unsupported, match=r"attention weights are not available for this kind of layer \(layers 0, 2\)"
    ):
        session.eval(TOKENS, layers=(1,), attention=(0, 2))
    assert session.n == 0
    assert session.eval(TOKENS, layers=(1,)).hidden[1].shape == (7, D)


def test_what_a_state_cannot_do(backend: LlamaCpp) -> None:
    """A recurrent state cannot go back, but it can be shared: the branches say what they would say alone."""
    session, fresh = backend.session(CONTEXT, sequences=3), backend.session(CONTEXT)
    session.eval(TOKENS)
    recurrent = backend.info.architecture == "mamba"
    assert session.rewind(4) is not recurrent and session.n == (7 if recurrent else 4)
    assert session.rewind(0) and session.n == session.used == 0
    session.eval(TOKENS)
    session.share(0, 1)
    session.share(1, 2)
    rows = session.eval_parts([Part(0, [1]), Part(1, [2, 3], "all"), Part(2, [4])])
    for found, tail in zip(rows, ([1], [2, 3], [4]), strict=True):
        fresh.rewind(0)
        expected = fresh.eval([*TOKENS, *tail], logits="all").logits[7:]
        assert found.shape == expected.shape and off_by(found, expected) < 2e-3
    assert [session.length(sequence) for sequence in range(3)] == [8, 9, 8] and session.used == 11


def test_a_lens_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    """A cap on logits in the header of a llama, of which the engine knows nothing: our logits would be others."""
    backend = llamacpp.load(write(tmp_path / "capped.gguf", "llama", final_logit_softcapping=1.5), n_threads=1)
    with pytest.raises(Unsupported, match=r"the lens disagrees with the model: .* differ by \d+% of their spread"):
        backend.unembed(np.zeros((1, D), np.float32))
    assert "disagrees" in backend.shown.why_no_lens and backend.shown.hidden == (0, 1, 2)
    session = backend.session(CONTEXT, inspect=True)
    assert session.eval(TOKENS, layers=(2,)).hidden[2].shape == (7, D)  # all else goes on
    backend.close()


def test_a_cap_on_logits(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    """Of Gemma the engine knows it."""
    plain = gguf.read(gguf_of(tiny_checkpoint("gemma3", dtype="f32"), "f32"))
    metadata = plain.metadata | {"gemma3.final_logit_softcapping": Value.float32(3.0)}
    rows = []
    for info in plain.tensors.values():
        with info.path.open("rb") as file:
            file.seek(info.offset)
            rows.append((info.name, info.shape, info.type, file.read(info.nbytes)))
    path = tmp_path / "capped.gguf"
    gguf_writer.write(path, metadata, rows)
    backend = llamacpp.load(path, n_threads=1)
    session = backend.session(64, inspect=True)
    found = session.eval(TOKENS, logits="all", layers=(1,))
    assert 2 < np.abs(found.logits).max() <= 3
    assert off_by(backend.unembed(found.hidden[1]), found.logits) < 1e-3
    backend.close()
