"""inspection/embeddings: against brute force on the table as the package gguf reads it, and against transformers."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import gguf as gguf_oracle
import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends import Backend, Pooling, TokenKind
from llmkit.backends.scripted import Scripted
from llmkit.errors import LlmkitError, Unsupported
from llmkit.inspection import embeddings, pictures, tokens
from llmkit.inspection import page as html

Floats = npt.NDArray[np.float32]


def table_of(path: Path) -> Floats:
    """The whole table, dequantized by the package gguf."""
    tensor = next(each for each in gguf_oracle.GGUFReader(path).tensors if each.name == "token_embd.weight")
    found: Floats = gguf_oracle.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def table(smollm2_gguf: Path) -> Floats:
    return table_of(smollm2_gguf)


# ── neighbours ──


@pytest.mark.parametrize(
    ("word", "expected"),  # inspection.md §7
    [("king", ["␣King", "King", "␣kings", "␣queen"]), (" Paris", ["Paris", "␣London", "␣France", "␣Berlin"])],
)
def test_golden_neighbours(smol: Backend, word: str, expected: list[str]) -> None:
    found = embeddings.neighbours(smol, tokens.find(smol, word), 4)
    assert [row.piece for row in found.rows] == expected


@pytest.mark.parametrize("token", [7042, 1, 30000])
def test_neighbours_are_those_of_the_whole_table(smol: Backend, table: Floats, token: int) -> None:
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    expected = unit @ unit[token]
    order = [int(id) for id in np.argsort(-expected) if id != token][:20]
    found = embeddings.neighbours(smol, token, 20)
    if token != 1:  # its neighbours are marks that training never met: all alike
        assert [row.id for row in found.rows] == order
    np.testing.assert_allclose([row.cosine for row in found.rows], expected[order], atol=1e-5)
    theirs = table[[row.id for row in found.rows]]
    np.testing.assert_allclose([row.norm for row in found.rows], np.linalg.norm(theirs, axis=1), rtol=1e-5)


def test_the_table_is_read_in_parts(smol: Backend, table: Floats) -> None:
    """113 MB of floats are never held at once."""
    embeddings.neighbours(smol, 7042, 1)  # maps the file
    tracemalloc.start()
    embeddings.neighbours(smol, 7042)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6 < table.nbytes
    starts = [start for start, _ in embeddings.chunks(smol)]
    assert len(starts) > 5
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in embeddings.chunks(smol)]), table)


def test_an_analogy_by_the_formula(smol: Backend, table: Floats) -> None:
    ids = (tokens.find(smol, "man"), tokens.find(smol, "king"), tokens.find(smol, "woman"))
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    vector = unit[ids[1]] - unit[ids[0]] + unit[ids[2]]
    scores = unit @ (vector / np.linalg.norm(vector))
    order = [int(id) for id in np.argsort(-scores) if id not in ids]
    found = embeddings.analogy(smol, ids, 5)
    assert [row.id for row in found.rows] == order[:5]
    assert found.rows[0].piece == "␣queen" and found.words == ("␣man", "␣king", "␣woman")
    assert found.itself.id == int(scores.argmax())


class Odd(Scripted):
    """Some rows are zero, some tokens unused."""

    def embed(self, tokens: Sequence[int]) -> Floats:
        """Rows of the scripted backend, the third of them zero."""
        rows = super().embed(tokens)
        rows[np.asarray(tokens, np.int64) == 3] = 0
        return rows

    def kind(self, token: int) -> TokenKind:
        """Token 5 is unused."""
        return "unused" if token == 5 else super().kind(token)


def test_unused_tokens_and_rows_without_direction_are_nobodys_neighbours() -> None:
    found = embeddings.neighbours(Odd([]), 7, 300)
    assert {3, 5, 7}.isdisjoint(row.id for row in found.rows) and len(found.rows) == 256
    with pytest.raises(LlmkitError, match="zero"):
        embeddings.neighbours(Odd([]), 3)


def test_norms_are_those_of_the_whole_table(smol: Backend, table: Floats) -> None:
    lengths = np.linalg.norm(table, axis=1)
    found = embeddings.norms(smol, 3)
    assert (found.rows, found.width) == table.shape and sum(found.counts) == len(table)
    assert found.mean == pytest.approx(lengths.mean(), rel=1e-5)
    assert found.quantiles["50 %"] == pytest.approx(np.median(lengths), rel=1e-5)
    assert [row.id for row in found.longest] == [int(id) for id in np.argsort(-lengths, kind="stable")[:3]]
    assert found.shortest[0].norm == pytest.approx(lengths.min(), rel=1e-5)


# ── texts ──


def test_sentence_vectors_are_means_of_transformers_last_hidden_states(
    tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny_checkpoint("qwen3")
    backend = backends.load(gguf_of(folder, "f32"), n_threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["hello there", "goodbye", "something else entirely"]
    try:
        for how in ("mean", "last"):
            vectors = []
            for text in texts:
                ids = backend.encode(text, special=False, bos=True)
                with torch.no_grad():
                    rows = model.model(torch.tensor([ids])).last_hidden_state[0].numpy()
                vectors.append(rows.mean(axis=0) if how == "mean" else rows[-1])
            expected = np.stack([vector / np.linalg.norm(vector) for vector in vectors])
            found = embeddings.sentences(backend, texts, how)
            np.testing.assert_allclose(found.similarity, expected @ expected.T, atol=5e-3)
            assert found.how == how and found.warning and "chat model" in found.warning
    finally:
        backend.close()


def test_texts_that_have_no_vector() -> None:
    for texts in ([], ["a", " "], ["x"] * 65):
        for of in (embeddings.sentences, embeddings.by_layer):
            with pytest.raises(LlmkitError):
                of(Scripted([]), texts)
    with pytest.raises(LlmkitError, match="a text is empty"):
        embeddings.shift(Scripted([]), Scripted([]), [" "])


def test_texts_after_each_layer(smol: Backend) -> None:
    texts = ["A cat sleeps here.", "A dog naps here.", "Stocks"]
    found = embeddings.by_layer(smol, texts)
    assert [each.layer for each in found] == list(range(-1, smol.info.n_layer))
    cut = [smol.encode(text) for text in texts]
    rows = [smol.embed(ids[1:] or ids).mean(axis=0) for ids in cut]  # SmolLM2 does not scale what enters
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert found[0].similarity[i][j] == pytest.approx(expected, abs=1e-4)
    session = smol.session(64, inspect=True)
    last = smol.info.n_layer - 1
    means = [(session.rewind(0), session.eval(ids, layers=[last]).hidden[last][1:].mean(axis=0))[1] for ids in cut[:2]]
    session.close()
    expected = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert found[-1].similarity[0][1] == pytest.approx(expected, abs=1e-4)


# ── pictures ──


def test_the_picture_is_the_two_principal_components() -> None:
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(40, 12)) * np.linspace(3, 0.1, 12)).astype(np.float32)
    found = embeddings.scatter(vectors, [str(number) for number in range(40)])
    covariance = np.cov(vectors.T.astype(np.float64))
    values, axes = np.linalg.eigh(covariance)
    np.testing.assert_allclose(found.shares, values[::-1][:2] / values.sum(), rtol=1e-4)
    expected = (vectors - vectors.mean(axis=0)) @ axes[:, ::-1][:, :2]
    points = np.array([(point.x, point.y) for point in found.points])
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-3)


def test_too_few_points_and_points_in_one_place() -> None:
    with pytest.raises(LlmkitError, match="too few"):
        embeddings.scatter(np.ones((2, 3), np.float32), ["a", "b"])
    same = embeddings.scatter(np.ones((3, 3), np.float32), ["a", "b", "c"])
    ElementTree.fromstring(pictures.svg(same, "one place"))


def test_svg_and_html_escape_all_they_are_given() -> None:
    nasty = '</svg><script>alert(1)</script>"&\x1b[31m\ud800'
    points = tuple(pictures.Point(nasty, float(x), float(x * x), x) for x in range(4))
    document = pictures.svg(pictures.Scatter(points, (0.5, 0.25)), nasty)
    root = ElementTree.fromstring(document)
    assert not [each for each in root.iter() if each.tag.endswith("script")] and "\x1b" not in document
    heat = pictures.HeatMap(nasty, nasty, (nasty,), ((nasty, (pictures.Cell(nasty, 0.5, nasty),)),))
    page = html.page(nasty, [html.heat(heat)])
    page.encode()
    assert "<script" not in page and "\x1b" not in page and "://" not in page
    assert html.safe("a\u202eb\x00\ufffe\n👨\u200d👩 é") == "a‹U+202E›b‹U+0000›‹U+FFFE›\n👨\u200d👩 é"


def test_groups_keep_their_marks(smol: Backend) -> None:
    found = embeddings.vocabulary_map(smol, [[7042, 4528, 4649], [3261, 7042]])
    assert [(point.label, point.group) for point in found.points] == [
        ("␣Paris", 0), ("␣London", 0), ("␣France", 0), ("␣King", 1),
    ]  # fmt: skip


# ── the same model in another file ──


def test_what_quantization_moves(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    folder = tiny_checkpoint("qwen3")
    paths = [gguf_of(folder, kind) for kind in ("f32", "q8_0")]
    one, other = (backends.load(path, n_threads=1) for path in paths)
    try:
        before, after = map(table_of, paths)
        errors = np.linalg.norm(before - after, axis=1) / np.linalg.norm(before, axis=1)
        found = embeddings.shift(one, other, ["hello there"], count=4)
        assert found.rows == len(before)
        assert found.mean_error == pytest.approx(errors.mean(), rel=1e-4) and found.mean_error > 0
        assert [row.id for row in found.worst] == [int(id) for id in np.argsort(-errors, kind="stable")[:4]]
        assert found.quantiles["100 %"] == pytest.approx(errors.max(), rel=1e-4)
        assert 0.9 < found.texts[0].cosine < 1 and found.texts[0].error > found.mean_error / 10
        same = embeddings.shift(one, one)
        assert same.mean_error == 0 and same.mean_cosine == pytest.approx(1)
    finally:
        one.close()
        other.close()


def test_two_models_are_not_compared(smol: Backend, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    other = backends.load(gguf_of(tiny_checkpoint("qwen3"), "f32"), n_threads=1)
    with pytest.raises(Unsupported, match="49,152 × 576"):
        embeddings.shift(smol, other)
    other.close()

    class Renamed(Scripted):
        def piece(self, token: int) -> bytes:
            return b"!" if token == 64 else super().piece(token)

    with pytest.raises(Unsupported, match="token 64 is"):
        embeddings.shift(Scripted([]), Renamed([]))


def test_an_embedding_model_pools_as_it_says_and_without_a_warning() -> None:
    class Embedder(Scripted):
        def __init__(self) -> None:
            super().__init__([])
            self.info = replace(self.info, pooling="last")

        def pool(self, tokens: Sequence[int], how: Pooling | None = None) -> Floats:
            rows = self.embed(tokens)
            row: Floats = rows[0 if (how or self.info.pooling) == "cls" else -1]
            return row

    found = embeddings.sentences(Embedder(), ["a", "bca"])
    assert found.how == "last" and found.warning is None
    assert found.similarity[0][1] == pytest.approx(1)  # both end with an a
    assert embeddings.sentences(Embedder(), ["a", "bca"], "cls").similarity[0][1] < 0.99
