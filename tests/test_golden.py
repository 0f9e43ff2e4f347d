"""What can be seen inside a model: golden values of SmolLM2, identities between its nodes, transformers' layers.

The values are of the packaged Q4_1 file, flash attention off, on a CPU; other CPUs pick other kernels, hence the
tolerances. Identities hold to the bit where the engine only copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf as gguf_oracle
import numpy as np
import numpy.typing as npt
import pytest

import gemma3_material
import make_tiny_model
from conftest import GgufOf, TinyCheckpoint
from llmkit.backends import Part, llamacpp
from llmkit.backends.llamacpp import LlamaCpp
from llmkit.backends.llamacpp import session as sessions

FloatArray = npt.NDArray[np.float32]
FRANCE = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PARIS = 7042
TOP = {7042: 0.7677, 260: 0.0605, 4528: 0.0123, 1315: 0.0116, 5145: 0.0112}
LENS = {24: 0.0000, 26: 0.0003, 27: 0.012, 28: 0.073, 29: 0.760}  # P(" Paris") after each layer
BRANCHES = [" Paris.\n\nThe", " the capital of the French", " London.\n\nThe", " New York City.\n"]
TOLERANCE = 3e-3
FAMILIES = sorted(make_tiny_model.FAMILIES)


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[LlamaCpp]:
    backend = llamacpp.load(smollm2_gguf, n_threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def tensors(smollm2_gguf: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf_oracle.GGUFReader(smollm2_gguf).tensors}


def dequantized(tensor: Any) -> FloatArray:
    values: FloatArray = gguf_oracle.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return values


def probabilities(logits: FloatArray) -> npt.NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares: npt.NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def off_by(found: FloatArray, expected: FloatArray) -> float:
    """The largest difference, as a share of the expected values' range."""
    return float(np.abs(found - expected).max() / np.ptp(expected))


# ── golden values ──


def test_the_capital_of_france(smol: LlamaCpp) -> None:
    assert smol.encode("The capital of France is") == FRANCE
    session = smol.session(512, inspect=True)
    row = probabilities(session.eval(FRANCE).logits[0])
    assert [int(token) for token in np.argsort(-row)[:5]] == list(TOP)
    for token, expected in TOP.items():
        assert row[token] == pytest.approx(expected, abs=TOLERANCE)
    session.close()


def test_paris_shows_in_the_last_layers(smol: LlamaCpp) -> None:
    session = smol.session(64, inspect=True)
    found = session.eval(FRANCE, layers=range(30))
    lens = smol.unembed(np.stack([found.hidden[layer][-1] for layer in range(30)]))
    assert lens.shape == (30, 49152)
    for layer, expected in LENS.items():
        assert probabilities(lens)[layer, PARIS] == pytest.approx(expected, abs=0.01), layer
    assert lens[29].argmax() == found.logits[0].argmax() == PARIS
    assert off_by(lens[29], found.logits[0]) < 0.04  # the engine rounds activations to 8 bits
    session.close()


def test_four_greedy_branches_from_the_top_four(smol: LlamaCpp) -> None:
    session = smol.session(len(FRANCE) + 4 * 5, inspect=True, sequences=4)
    best = [int(token) for token in np.argsort(-session.eval(FRANCE).logits[0])[:4]]
    for sequence in (1, 2, 3):
        session.share(0, sequence)
    said = [[token] for token in best]
    for _ in range(4):
        rows = session.eval_parts([Part(i, [tokens[-1]]) for i, tokens in enumerate(said)])
        for tokens, row in zip(said, rows, strict=True):
            tokens.append(int(row[0].argmax()))
    assert [b"".join(map(smol.piece, tokens)).decode() for tokens in said] == BRANCHES
    session.close()


# ── identities ──


def test_nodes_are_what_the_engine_hands_out(smol: LlamaCpp, tensors: dict[str, Any]) -> None:
    session = smol.session(64, inspect=True)
    logits, parts = session.observe(FRANCE, ["embd", "l_out-29", "result_norm", "result_output"], "all")
    (embedded,), (last,), (normed,), (output,) = (
        parts[name] for name in ("embd", "l_out-29", "result_norm", "result_output")
    )
    np.testing.assert_array_equal(output, logits)
    np.testing.assert_array_equal(embedded, dequantized(tensors["token_embd.weight"])[FRANCE])
    np.testing.assert_allclose(smol.head.norm(last), normed, atol=1e-5)
    session.close()


def test_the_lens_multiplies_with_the_files_matrix(smol: LlamaCpp, tensors: dict[str, Any]) -> None:
    hidden = np.random.default_rng(5).normal(size=(3, 576)).astype(np.float32)
    normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5) * dequantized(tensors["output_norm.weight"])
    np.testing.assert_allclose(
        smol.unembed(hidden), normed @ dequantized(tensors["token_embd.weight"]).T, rtol=1e-4, atol=1e-3
    )
    with pytest.raises(ValueError, match="576"):
        smol.unembed(hidden[:, :500])


def test_attention_is_a_distribution_over_what_came_before(smol: LlamaCpp) -> None:
    session = smol.session(256, inspect=True)
    found = session.eval(FRANCE, attention=(0, 17, 29), logits="none")
    assert sorted(found.attention) == [0, 17, 29] and found.logits.shape == (0, 49152)
    for weights in found.attention.values():
        assert weights.shape == (9, 5, 5)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        assert not np.triu(weights, 1).any()
    session.close()


def test_cells_not_in_use_get_no_attention(smol: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off as padding is exactly 0."""
    session = smol.session(256, inspect=True)
    monkeypatch.setattr(session._tap, "limit", lambda keys: setattr(session._tap, "_keys", None))
    _, parts = session.observe(FRANCE, ["kq_soft_max-3"], "none")
    (weights,) = parts["kq_soft_max-3"]
    assert weights.shape == (9, 5, 256) and not weights[:, :, 5:].any()
    session.close()


@pytest.mark.slow
def test_layers_do_not_depend_on_how_a_prompt_is_cut(smol: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 100 tokens, over the border of 256 cells where the engine's attention grows wider."""
    tokens = (FRANCE * 60)[:270]
    whole = smol.session(512, inspect=True)
    expected = whole.eval(tokens, layers=(0, 15), attention=(0, 15))
    whole.close()
    monkeypatch.setattr(sessions, "_BATCH", 100)
    pieces = smol.session(512, inspect=True)
    found = pieces.eval(tokens, layers=(0, 15), attention=(0, 15))
    for layer in (0, 15):
        assert found.hidden[layer].shape == (270, 576) and found.attention[layer].shape == (9, 270, 270)
        assert off_by(found.hidden[layer], expected.hidden[layer]) < 0.03
        np.testing.assert_allclose(found.attention[layer].sum(axis=-1), 1, atol=1e-5)
        assert not np.triu(found.attention[layer], 1).any()
        assert np.abs(found.attention[layer] - expected.attention[layer]).max() < 0.1
    pieces.close()


def test_twenty_tokens_in_batches_of_eight(smol: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_BATCH", 8)
    session = smol.session(64, inspect=True)
    logits, parts = session.observe(FRANCE * 4, ["l_out-3", "l_out-29", "result_norm"], "all")
    assert logits.shape == (20, 49152)
    assert {name: [len(part) for part in found] for name, found in parts.items()} == {
        name: [8, 8, 4] for name in ("l_out-3", "l_out-29", "result_norm")
    }
    session.close()


def test_seeing_layers_changes_no_logits(smol: LlamaCpp) -> None:
    plain, seen = smol.session(64, inspect=True), smol.session(64, inspect=True)
    expected = plain.eval(FRANCE, logits="all").logits
    found = seen.eval(FRANCE, logits="all", layers=range(-1, 30), attention=range(30)).logits
    np.testing.assert_array_equal(found, expected)
    plain.close()
    seen.close()


@pytest.mark.parametrize("inspect", [False, True])
def test_rewinding_and_another_token_equal_a_fresh_run(smol: LlamaCpp, inspect: bool) -> None:
    session, fresh = smol.session(64, inspect=inspect), smol.session(64, inspect=inspect)
    session.eval([*FRANCE, PARIS, 30, 2])
    assert session.rewind(4)
    fresh.eval(FRANCE[:4])
    np.testing.assert_array_equal(session.eval([260]).logits, fresh.eval([260]).logits)
    session.close()
    fresh.close()


def test_what_shows_is_tried_once(smol: LlamaCpp) -> None:
    assert smol.shown.hidden == smol.shown.attention == tuple(range(30))
    assert smol.shown.entry == "embd" and smol.shown.why_no_lens == "" and 0 < smol.shown.lens_error < 0.04
    assert smol.shown is smol.shown


# ── every family ──


@cache
def transformers_layers(folder: Path, tokens: tuple[int, ...]) -> tuple[list[FloatArray], list[FloatArray]]:
    """Hidden states (entering the first layer, after each; the last is normed) and attention of each layer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        given = model(torch.tensor([tokens]), output_hidden_states=True, output_attentions=True)
    return [rows[0].numpy() for rows in given.hidden_states], [weights[0].numpy() for weights in given.attentions]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_equal_transformers(family: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    """The engine keeps keys and values as 16-bit floats: that is what the tolerance is for."""
    folder = tiny_checkpoint(family, dtype="f32", layers=7)
    backend = llamacpp.load(gguf_of(folder, "f32"), n_threads=1)
    tokens = np.random.default_rng(3).integers(3, 500, 40).tolist()
    hidden, attention = transformers_layers(folder, tuple(tokens))
    session = backend.session(64, inspect=True)
    found = session.eval(tokens, logits="all", layers=range(-1, 7), attention=range(7))
    for layer in range(-1, 6):
        assert off_by(found.hidden[layer], hidden[layer + 1]) < 5e-3, layer
    assert off_by(backend.head.norm(found.hidden[6]), hidden[7]) < 5e-3
    for layer in range(7):
        assert np.abs(found.attention[layer] - attention[layer]).max() < 0.02, layer
        assert (found.attention[layer].max(axis=-1) < 0.9999).any(), "these weights could not show a difference"
    assert off_by(backend.unembed(found.hidden[6]), found.logits) < 1e-3
    assert backend.shown.why_no_lens == "" and backend.info.n_head == len(found.attention[0])
    backend.close()


# ── Gemma 3 270M ──


@pytest.mark.slow
def test_lens_and_attention_of_gemma() -> None:
    """Windows of 512 tokens in all but three layers, scaled embeddings, 262,144 tokens, no template."""
    backend = llamacpp.load(gemma3_material.gguf(), n_threads=1)
    tokens = backend.encode("The capital of France is", bos=True)
    session = backend.session(1024, inspect=True)
    found = session.eval(tokens, layers=range(-1, 18), attention=(0, 5, 17))
    np.testing.assert_allclose(found.hidden[-1], backend.embed(tokens) * np.float32(640**0.5), rtol=1e-5)
    lens = backend.unembed(np.stack([found.hidden[layer][-1] for layer in (5, 17)]))
    assert lens[1].argmax() == found.logits[0].argmax()
    assert backend.piece(int(lens[1].argmax())) == b" the"
    assert off_by(lens[1], found.logits[0]) < 0.04
    for weights in found.attention.values():
        assert weights.shape == (4, 6, 6)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        assert not np.triu(weights, 1).any()
    session.rewind(0)
    long = session.eval((tokens * 100)[:600], attention=(0, 5), logits="none").attention
    for weights in long.values():
        assert weights.shape == (4, 600, 600)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    outside = np.tril(np.ones((600, 600), bool), -512)
    assert not long[0][:, outside].any() and long[5][:, outside].any()  # layer 0 has a window, layer 5 sees all
    backend.close()
