"""The residual stream, the lens and attention, against transformers on the same weights; golden values of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends import Backend, Eval, Rows
from llmkit.backends.scripted import Scripted, ScriptedSession
from llmkit.errors import EngineError, LlmkitError, Unsupported
from llmkit.inspection import attention, layers, lens

Floats = npt.NDArray[np.float32]
FRANCE = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PARIS = 7042
N_TOKENS = 40  # more than twice Gemma's window in these checkpoints
# inspection.md §5: P(' Paris') after these layers
PARIS_BY_LAYER = {24: 0.0000, 26: 0.0003, 27: 0.012, 28: 0.073, 29: 0.760}


# ── the oracle ──


@dataclass(frozen=True)
class Oracle:
    """What transformers computes in float32: the residual stream, attention, and the lens of every layer."""

    hidden: dict[int, Floats]
    attention: dict[int, Floats]
    lens: dict[int, Floats]
    logits: Floats


def oracle(folder: Path, ids: Sequence[int]) -> Oracle:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    kept: dict[int, Any] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: object, _given: object, output: Any) -> None:
            kept[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    for layer, block in enumerate(model.model.layers):  # hidden_states has the last one only after the norm
        block.register_forward_hook(keep(layer))
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
        kept[-1] = found.hidden_states[0][0]
        end = {layer: model.lm_head(model.model.norm(rows)).numpy() for layer, rows in kept.items() if layer >= 0}
    return Oracle(
        hidden={layer: rows.numpy() for layer, rows in kept.items()},
        attention={layer: rows[0].numpy() for layer, rows in enumerate(found.attentions)},
        lens=end,
        logits=found.logits[0].numpy(),
    )


def close(found: Floats, expected: Floats, share: float = 1e-3) -> None:
    """Equal but for `share` of the expected values' range (float16 keys and values in the engine)."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < share * (expected.max() - expected.min())


FAMILIES = ["llama", "llama3", "mistral", "smollm", "qwen2", "qwen3", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_is_as_in_transformers(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, family: str) -> None:
    folder = tiny_checkpoint(family)
    ids = [5 + 7 * place % 80 for place in range(N_TOKENS)]
    expected = oracle(folder, ids)
    backend = backends.load(gguf_of(folder, "f32"), n_threads=1)
    try:
        last = backend.info.n_layer - 1
        with layers.inspecting(backend, len(ids)) as session:
            found = session.eval(ids, logits="all", layers=range(-1, last + 1), attention=range(last + 1))
        for layer, rows in expected.hidden.items():
            close(found.hidden[layer], rows, 3e-3)
            lengths = layers.residual(backend, ids).layers[layer + 1].norms
            np.testing.assert_allclose(lengths, np.linalg.norm(rows, axis=1), rtol=5e-3)
        for layer in range(last + 1):
            np.testing.assert_allclose(found.attention[layer], expected.attention[layer], atol=3e-3)
        seen = lens.lens(backend, ids, positions=range(len(ids)), top=3, watch=[7])
        for row in seen.rows:
            logits = expected.logits if row.layer is None else expected.lens[row.layer]
            real = probabilities(logits)
            np.testing.assert_allclose([each[0] for each in row.watched], real[:, 7], atol=5e-3)
            for place, top in enumerate(row.top):
                assert top[0].probability == pytest.approx(real[place].max(), abs=5e-3)
        assert seen.agreement > 0.95
    finally:
        backend.close()


@pytest.mark.parametrize("name", ["mlx", "transformers"])
def test_other_backends_show_the_same(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, name: str) -> None:
    for package in {"mlx": ("mlx", "mlx_lm"), "transformers": ("torch", "transformers")}[name]:
        pytest.importorskip(package)
    folder = tiny_checkpoint("qwen3")
    path = gguf_of(folder, "f32")
    ids = [5 + 7 * place % 80 for place in range(12)]
    one, other = backends.load(path, n_threads=1), backends.load(path if name == "mlx" else folder, backend=name)
    try:
        seen = [lens.lens(each, ids, positions=range(12), watch=[7]) for each in (one, other)]
        for ours, theirs in zip(seen[0].rows, seen[1].rows, strict=True):
            np.testing.assert_allclose(ours.watched, theirs.watched, atol=2e-3)
            np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=2e-2)
        weights, theirs_too = (attention.attention(each, ids, 1).weights for each in (one, other))
        np.testing.assert_allclose(weights, theirs_too, atol=2e-3)
        for row, its in zip(layers.residual(one, ids).layers, layers.residual(other, ids).layers, strict=True):
            np.testing.assert_allclose(row.norms, its.norms, rtol=2e-3)
        assert layers.capabilities(other).lens and all(each.attention for each in layers.capabilities(other).layers)
    finally:
        one.close()
        other.close()


def probabilities(logits: Floats) -> npt.NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


# ── golden values ──


def test_paris_comes_up_in_the_last_layers(smol: Backend) -> None:
    seen = lens.lens(smol, FRANCE, watch=[PARIS])
    by_layer = {row.layer: row.watched[0][0] for row in seen.rows}
    for layer, expected in PARIS_BY_LAYER.items():
        assert by_layer[layer] == pytest.approx(expected, abs=max(3e-3, 0.05 * expected))
    assert max(by_layer[layer] for layer in range(25)) < 5e-4
    assert by_layer[None] == pytest.approx(0.7677, abs=3e-3)
    own = seen.rows[-1].top[0]
    assert [each.id for each in own] == [7042, 260, 4528, 1315, 5145]
    assert [each.probability for each in own] == pytest.approx([0.7677, 0.0605, 0.0123, 0.0116, 0.0112], abs=3e-3)
    assert seen.agreement == 1.0 and len(seen.rows) == 31 and seen.positions == (4,)


def test_without_a_word_to_watch_the_models_own_is_followed(smol: Backend) -> None:
    seen = lens.lens(smol, FRANCE, top=1)
    assert seen.watch == (PARIS,) and seen.watch_pieces == ("␣Paris",)
    assert all(len(row.top[0]) == 1 for row in seen.rows)


def test_the_lens_at_other_positions_is_the_model_on_a_shorter_text(smol: Backend) -> None:
    seen = lens.lens(smol, FRANCE, positions=[1, 3])
    for column, length in enumerate((2, 4)):
        shorter = lens.lens(smol, FRANCE[:length]).rows[-1].top[0]
        same = seen.rows[-1].top[column]
        assert same[0].id == shorter[0].id
        assert same[0].probability == pytest.approx(shorter[0].probability, abs=0.02)


def test_attention_rows_are_distributions_over_what_came_before(smol: Backend) -> None:
    seen = attention.attention(smol, FRANCE, -1)
    weights = seen.weights
    assert weights.shape == (9, 5, 5) and seen.layer == 29
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert np.triu(weights, 1).max() == 0
    assert seen.pieces == ("The", "␣capital", "␣of", "␣France", "␣is")


def test_what_is_said_of_heads() -> None:
    """The scripted backend looks at all tokens so far alike."""
    head = attention.attention(Scripted([]), [1, 2, 3, 4], 0).heads[1]
    even = [1 / 2, 1 / 3, 1 / 4]
    assert (head.first, head.before, head.own) == pytest.approx((np.mean(even),) * 3)
    assert head.entropy == pytest.approx(np.mean(np.log2([2, 3, 4])), abs=1e-6)
    alone = attention.attention(Scripted([]), [1], 0).heads[0]
    assert (alone.first, alone.own, alone.entropy) == (1.0, 1.0, 0.0)


def test_the_residual_streams_figures() -> None:
    """The scripted stream goes in equal steps from a token's code to the next one's, each of 9 times ±1."""
    seen = layers.residual(Scripted([], n_layer=4), [1, 2, 3])
    assert [row.layer for row in seen.layers] == [-1, 0, 1, 2, 3]
    assert seen.layers[0].mean_norm == seen.layers[-1].mean_norm == pytest.approx(3.0)
    assert seen.layers[0].cosine_before == pytest.approx(1.0) and seen.layers[0].update == 0.0
    assert seen.layers[-1].cosine_last == pytest.approx(1.0)
    assert seen.layers[2].mean_norm < 3.0 and seen.layers[1].update > 0


# ── what a model can show ──


class NoAttention(ScriptedSession):
    """Layer 1 is of a kind that has no attention."""

    def eval(
        self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> Eval:
        """As the scripted session."""
        if 1 in attention:
            raise Unsupported("attention is not available for this kind of layer (layer 1)")
        return super().eval(tokens, logits=logits, layers=layers, attention=attention)


class Hybrid(Scripted):
    """A backend of that, with an end that is not known."""

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> ScriptedSession:
        """A session of its own kind."""
        return NoAttention(self, context, sequences)

    def unembed(self, hidden: Floats) -> Floats:
        """Not known."""
        raise Unsupported("the end of this architecture is not known")


def test_capabilities_are_found_out_layer_by_layer() -> None:
    found = layers.capabilities(Hybrid([], n_layer=3))
    assert [(each.hidden, each.attention) for each in found.layers] == [(True, True), (True, False), (True, True)]
    assert "not available for this kind of layer" in found.layers[1].why and found.layers[0].why == ""
    assert not found.lens and "not known" in found.lens_why
    with pytest.raises(Unsupported, match="this kind of layer"):
        attention.attention(Hybrid([]), [1, 2], 1)
    with pytest.raises(Unsupported, match="not known"):
        lens.lens(Hybrid([]), [1, 2])


def test_capabilities_of_real_models(smol: Backend, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    found = layers.capabilities(smol)
    assert len(found.layers) == 30 and all(each.hidden and each.attention and not each.why for each in found.layers)
    assert found.lens and "llama.cpp" in found.engine
    gemma = backends.load(gguf_of(tiny_checkpoint("gemma3"), "f32"), n_threads=1)
    assert all(each.hidden and each.attention for each in layers.capabilities(gemma).layers)
    gemma.close()


# ── bad input ──


@pytest.mark.parametrize(
    ("look", "most"),
    [(lambda b, t: lens.lens(b, t), 128), (lambda b, t: attention.attention(b, t, 0), 256), (layers.residual, 512)],
)
def test_caps_are_told_with_their_numbers(look: Callable[[Backend, list[int]], object], most: int) -> None:
    backend = Scripted([])
    look(backend, [1] * most)
    with pytest.raises(LlmkitError, match=rf"{most + 1} tokens are too many .* at most {most}"):
        look(backend, [1] * (most + 1))
    with pytest.raises(LlmkitError, match="empty"):
        look(backend, [])


@pytest.mark.parametrize("layer", [2, -3, 99])
def test_a_layer_that_does_not_exist(layer: int) -> None:
    with pytest.raises(LlmkitError, match=f"layer {layer}: the model has 2 layers, 0 to 1"):
        attention.attention(Scripted([]), [1, 2], layer)


@pytest.mark.parametrize("positions", [[], [3], [-1], [0, 9]])
def test_a_position_that_does_not_exist(positions: list[int]) -> None:
    with pytest.raises(LlmkitError, match="the text has 3 tokens, 0 to 2"):
        lens.lens(Scripted([]), [1, 2, 3], positions=positions)


def test_a_model_whose_output_is_no_number() -> None:
    class Broken(Scripted):
        def unembed(self, hidden: Floats) -> Floats:
            return np.full((len(hidden), 259), np.nan, np.float32)

    with pytest.raises(EngineError, match="not a number"):
        lens.lens(Broken([]), [1, 2])
    assert not layers.capabilities(Broken([])).lens
