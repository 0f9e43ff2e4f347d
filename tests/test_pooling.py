"""One vector of a text: of a chat model, and of a BERT (an encoder, tiny and random), against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import gguf_writer
from llmkit.backends import llamacpp
from llmkit.backends.llamacpp import LlamaCpp
from llmkit.backends.scripted import Scripted
from llmkit.errors import LlmkitError, Unsupported
from llmkit.gguf import Value, ValueType
from llmkit.quants import TENSOR_TYPES

FloatArray = npt.NDArray[np.float32]
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581w{i}" for i in range(59))]
LAYERS = 2


def bert(folder: Path, pooling: int) -> tuple[Path, Any]:
    """A random BERT as GGUF, and the same as transformers' model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=48, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    rows = [(ours, weights[theirs]) for ours, theirs in _names() if theirs in weights]
    assert len(rows) == len([name for name in weights if "position_ids" not in name])
    f32 = TENSOR_TYPES["F32"]
    path = folder / f"bert-{pooling}.gguf"
    tensors = [(name, values.shape, f32, values.astype(np.float32).tobytes()) for name, values in rows]
    gguf_writer.write(path, _metadata(pooling), tensors)
    return path, model


def _names() -> Iterator[tuple[str, str]]:
    yield "token_embd.weight", "embeddings.word_embeddings.weight"
    yield "token_types.weight", "embeddings.token_type_embeddings.weight"
    yield "position_embd.weight", "embeddings.position_embeddings.weight"
    pairs = [("token_embd_norm", "embeddings.LayerNorm")]
    for i in range(LAYERS):
        layer, blk = f"encoder.layer.{i}.", f"blk.{i}."
        pairs += [(f"{blk}attn_{which[0]}", f"{layer}attention.self.{which}") for which in ("query", "key", "value")]
        pairs += [
            (f"{blk}attn_output", f"{layer}attention.output.dense"),
            (f"{blk}attn_output_norm", f"{layer}attention.output.LayerNorm"),
            (f"{blk}ffn_up", f"{layer}intermediate.dense"),
            (f"{blk}ffn_down", f"{layer}output.dense"),
            (f"{blk}layer_output_norm", f"{layer}output.LayerNorm"),
        ]
    for ours, theirs in pairs:
        yield f"{ours}.weight", f"{theirs}.weight"
        yield f"{ours}.bias", f"{theirs}.bias"


def _metadata(pooling: int) -> dict[str, Value]:
    numbers = {
        "context_length": 48, "embedding_length": 32, "block_count": LAYERS, "feed_forward_length": 64,
        "attention.head_count": 4, "pooling_type": pooling,
    }  # fmt: skip
    ids = {"cls": CLS, "bos": CLS, "seperator": SEP, "eos": SEP, "unknown": UNK, "padding": PAD, "mask": MASK}
    types = [3 if word.startswith("[") else 1 for word in WORDS]
    return {
        "general.architecture": Value.string("bert"),
        **{f"bert.{key}": Value.uint32(number) for key, number in numbers.items()},
        "bert.attention.layer_norm_epsilon": Value.float32(1e-12),
        "bert.attention.causal": Value.boolean(False),
        "tokenizer.ggml.model": Value.string("bert"),
        "tokenizer.ggml.token_type_count": Value.uint32(2),
        "tokenizer.ggml.tokens": Value.array(ValueType.STRING, WORDS),
        "tokenizer.ggml.token_type": Value.array(ValueType.INT32, types),
        **{f"tokenizer.ggml.{name}_token_id": Value.uint32(id) for name, id in ids.items()},
    }


def encoded(model: Any, tokens: list[int]) -> FloatArray:
    import torch

    with torch.no_grad():
        rows: FloatArray = model(torch.tensor([tokens])).last_hidden_state[0].numpy()
    return rows


@pytest.mark.parametrize(("pooling", "name"), [(1, "mean"), (2, "cls"), (3, "last")])
def test_vectors_of_an_encoder_equal_transformers(tmp_path: Path, pooling: int, name: str) -> None:
    path, model = bert(tmp_path, pooling)
    backend = llamacpp.load(path, n_threads=1)
    info = backend.info
    assert (info.architecture, info.pooling, info.generates, info.n_head) == ("bert", name, False, 4)
    tokens = backend.encode("w7 w8 w3 w3 w40")
    assert [WORDS[token] for token in tokens] == ["\u2581w7", "\u2581w8", "\u2581w3", "\u2581w3", "\u2581w40"]
    rows = encoded(model, [CLS, *tokens, SEP])
    expected = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}
    found = backend.pool(tokens)  # the marks around the text are added
    np.testing.assert_allclose(found, expected[name], atol=0.01)
    np.testing.assert_array_equal(backend.pool([CLS, *tokens, SEP]), found)
    for how, vector in expected.items():
        np.testing.assert_allclose(backend.pool(tokens, how), vector, atol=0.01)  # type: ignore[arg-type]
    assert np.abs(rows[0] - rows[-1]).max() > 0.5, "these vectors could not show a difference"
    backend.close()


def test_an_encoder_does_not_chat_and_reads_no_more_than_it_can(tmp_path: Path) -> None:
    path, model = bert(tmp_path, 1)
    backend = llamacpp.load(path, n_threads=1)
    with pytest.raises(Unsupported, match="bert models do not generate text") as refused:
        backend.session(64)
    assert "inspect embeddings" in (refused.value.hint or "")
    with pytest.raises(Unsupported, match="do not generate"):
        backend.unembed(np.zeros((1, 32), np.float32))
    full = [10] * 46
    np.testing.assert_allclose(backend.pool(full), encoded(model, [CLS, *full, SEP]).mean(axis=0), atol=0.01)
    with pytest.raises(LlmkitError, match="49 tokens long, this model reads at most 48"):
        backend.pool([10] * 47)
    with pytest.raises(ValueError):
        backend.pool([len(WORDS)])
    backend.close()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_vectors_of_chat_models_equal_transformers(
    family: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf
) -> None:
    """100 tokens: two calls of the engine. transformers' last hidden state is the normed one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny_checkpoint(family, dtype="f32", layers=3)
    tokens = np.random.default_rng(4).integers(3, 500, 100).tolist()
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rows = encoded(model, tokens)
    backend = llamacpp.load(gguf_of(folder, "f32"), n_threads=1)
    assert backend.info.pooling is None and backend.info.generates
    np.testing.assert_allclose(backend.pool(tokens), rows.mean(axis=0), atol=5e-3 * float(np.ptp(rows)))
    np.testing.assert_allclose(backend.pool(tokens, "last"), rows[-1], atol=5e-3 * float(np.ptp(rows)))
    np.testing.assert_allclose(backend.pool(tokens, "cls"), rows[0], atol=5e-3 * float(np.ptp(rows)))
    with pytest.raises(ValueError):
        backend.pool([])
    backend.close()


def test_vectors_of_one_backend_do_not_depend_on_its_sessions(smollm2_gguf: Path) -> None:
    backend: LlamaCpp = llamacpp.load(smollm2_gguf, n_threads=1)
    tokens = backend.encode("The capital of France is")
    first = backend.pool(tokens)
    session = backend.session(64)
    session.eval(tokens)
    np.testing.assert_array_equal(backend.pool(tokens), first)
    assert first.shape == (576,) and session.n == 5
    backend.close()


def test_the_scripted_vectors() -> None:
    backend = Scripted(["a"])
    tokens = backend.encode("x<assistant>")
    last = backend.session(9).eval(tokens, layers=(1,)).hidden[1]
    np.testing.assert_array_equal(backend.pool(tokens), last.mean(axis=0))
    np.testing.assert_array_equal(backend.pool(tokens, "last"), backend.embed([ord("a")])[0])
