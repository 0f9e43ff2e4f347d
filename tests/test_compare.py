"""inspection/compare.py and `llmkit compare`: against numpy on the engines' own logits, and against itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from conftest import Cli, GgufOf, TinyCheckpoint
from llmkit import backends, convert, quantize
from llmkit.backends import Backend
from llmkit.errors import LlmkitError, Unsupported
from llmkit.inspection import compare, compare_html
from llmkit.inspection.compare import Comparison, Opener
from llmkit.quants import quant

PROMPT = "The quick brown fox jumps over the lazy dog, and"


def opener(path: Path, backend: str = "llamacpp", opened: list[Path] | None = None) -> Opener:
    @contextmanager
    def open_it() -> Iterator[Backend]:
        loaded = backends.load(path, backend=backend, n_threads=1, gpu_layers=0)
        if opened is not None:
            opened.append(path)
        try:
            yield loaded
        finally:
            loaded.close()

    return open_it


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", dtype="f32", layers=4, width=256)


@pytest.fixture(scope="module")
def full(tiny: Path, gguf_of: GgufOf) -> Path:
    return gguf_of(tiny, "f32")


@pytest.fixture(scope="module")
def rough(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quants")
    plan = quantize.plan(convert.open_draft(tiny), [quantize.Recipe(quant("Q2_K"))], folder)
    quantize.run(plan, threads=1)
    return plan.outputs[0].path


@pytest.fixture(scope="module")
def compared(full: Path, rough: Path) -> Comparison:
    return compare.compare(opener(full), opener(rough), PROMPT, count=6, names=("full", "rough"))


def logprobs(path: Path, tokens: list[int]) -> npt.NDArray[np.float64]:
    """Rows after each token, the first `len(PROMPT)` of them from one batch."""
    backend = backends.load(path, n_threads=1, gpu_layers=0)
    n_prompt = len(backend.encode(PROMPT, bos=True))
    session = backend.session(64, inspect=True)
    rows = [session.eval(tokens[:n_prompt], logits="all").logits]
    rows += [session.eval([token]).logits for token in tokens[n_prompt:]]
    backend.close()
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    found: npt.NDArray[np.float64] = logits
    return found


def test_a_model_against_itself_differs_by_nothing(full: Path) -> None:
    found = compare.compare(opener(full), opener(full), PROMPT, count=6)
    assert found.parts_at is None and found.a.ids == found.b.ids and len(found.a.ids) == 6
    for passage in found.passages:
        assert passage.mean_kl_nats == 0 and passage.agreement == 1 and passage.first_flip is None
        assert passage.perplexity_a == passage.perplexity_b
    assert [each.layer for each in found.layers] == [-1, 0, 1, 2, 3]
    assert all(each.relative_error == 0 and each.cosine == pytest.approx(1) for each in found.layers)


def test_kl_is_what_numpy_computes_from_both_engines(compared: Comparison, full: Path, rough: Path) -> None:
    prompt = list(compared.prompt_ids)
    for name, ids in (("prompt", []), ("a", list(compared.a.ids)), ("b", list(compared.b.ids))):
        tokens = prompt + ids
        a, b = logprobs(full, tokens), logprobs(rough, tokens)
        kl = (np.exp(a) * (a - b)).sum(1)
        passage = compared.passage(name)
        assert len(passage.tokens) == (len(prompt) - 1 if name == "prompt" else len(ids))
        for each in passage.tokens:
            row = each.position - 1
            assert each.id == tokens[each.position]
            assert each.kl_nats == pytest.approx(kl[row], abs=1e-4)
            assert each.kl_bits == pytest.approx(each.kl_nats / np.log(2))
            assert (each.best_a.id, each.best_b.id) == (a[row].argmax(), b[row].argmax())
            assert each.probability_a == pytest.approx(np.exp(a[row, each.id]), abs=1e-5)
            assert each.best_b.probability == pytest.approx(np.exp(b[row].max()), abs=1e-5)
        rows = [each.position - 1 for each in passage.tokens]
        assert passage.mean_kl_nats == pytest.approx(kl[rows].mean(), abs=1e-4)
        assert passage.agreement == pytest.approx((a[rows].argmax(1) == b[rows].argmax(1)).mean())
        flips = [row + 1 for row in rows if a[row].argmax() != b[row].argmax()]
        assert passage.first_flip == (flips[0] if flips else None)
        taken = [a[each.position - 1, each.id] for each in passage.tokens]
        assert passage.perplexity_a == pytest.approx(np.exp(-np.mean(taken)), rel=1e-3)
    assert (compared.passage("prompt").mean_kl_nats or 0) > 0.001, "these two could not show a difference"


def test_continuations_are_greedy_and_part_where_they_part(compared: Comparison, full: Path) -> None:
    tokens = [*compared.prompt_ids, *compared.a.ids]
    greedy = logprobs(full, tokens).argmax(1)[len(compared.prompt_ids) - 1 :]
    assert list(compared.a.ids) == greedy[: len(compared.a.ids)].tolist()
    same = [x == y for x, y in zip(compared.a.ids, compared.b.ids, strict=False)]
    assert compared.parts_at == (same.index(False) if False in same else None)
    assert (compared.a.name, compared.b.name) == ("full", "rough")


def test_layers_drift_as_numpy_says(compared: Comparison, full: Path, rough: Path) -> None:
    hidden = []
    for path in (full, rough):
        backend = backends.load(path, n_threads=1, gpu_layers=0)
        tokens = list(compared.prompt_ids)
        hidden.append(backend.session(64, inspect=True).eval(tokens, layers=range(-1, 4)).hidden)
        backend.close()
    assert compared.hidden_tokens == len(compared.prompt_ids)
    before = 0.0
    for each in compared.layers:
        a, b = (one[each.layer].astype(np.float64) for one in hidden)
        error = (np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)).mean()
        assert each.relative_error == pytest.approx(error, rel=1e-3)
        assert each.added == pytest.approx(error - before, rel=1e-2, abs=1e-5)
        before = error
    assert compared.layers[-1].relative_error > 0.01


def test_one_after_the_other_gives_the_same(compared: Comparison, full: Path, rough: Path) -> None:
    opened: list[Path] = []
    a, b = opener(full, opened=opened), opener(rough, opened=opened)
    found = compare.compare(a, b, PROMPT, count=6, together=False, names=("full", "rough"))
    assert found == compared
    assert opened == [full, rough, full]


def test_the_checkpoint_is_the_reference_of_its_quants(tiny: Path, full: Path, rough: Path) -> None:
    pytest.importorskip("torch")
    exact = compare.compare(opener(tiny, "transformers"), opener(full), PROMPT, count=4)
    coarse = compare.compare(opener(tiny, "transformers"), opener(rough), PROMPT, count=4)
    assert exact.a.engine.startswith("transformers") and exact.b.engine.startswith("llama.cpp")
    assert (exact.passage("prompt").mean_kl_nats or 0) < 1e-3 < (coarse.passage("prompt").mean_kl_nats or 0)
    assert exact.layers[-1].relative_error < 1e-2 < coarse.layers[-1].relative_error


def test_different_vocabularies_are_told(full: Path, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    other = gguf_of(tiny_checkpoint("qwen2", dtype="f32", layers=7), "f32")
    with pytest.raises(LlmkitError, match="different vocabularies"):
        compare.compare(opener(full), opener(other), PROMPT, count=2)


def test_prompts_that_cannot_be(full: Path) -> None:
    with pytest.raises(LlmkitError, match="empty"):
        compare.compare(opener(full), opener(full), "")
    with pytest.raises(LlmkitError, match="trained for"):
        compare.compare(opener(full), opener(full), "word " * 5000)


def test_the_page_stands_alone_and_escapes(compared: Comparison) -> None:
    page = compare_html.page(compared)
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert page.count("<span") == sum(len(passage.tokens) for passage in compared.passages)


@pytest.mark.slow
def test_command_line(cli: Cli, full: Path, rough: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = cli("compare", full, rough, "--prompt", PROMPT, "--tokens", 4, "--threads", 1, "--html", page, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [passage["name"] for passage in found["passages"]] == ["prompt", "a", "b"]
    assert found["a"]["name"] == full.name and page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    done = cli("compare", full, rough, "--prompt", PROMPT, "--tokens", 4, "--threads", 1)
    assert done.returncode == 0, done.stderr
    for word in ("KL(A‖B) nats", "bits", "same top-1", "drifts most in", "the prompt"):
        assert word in done.stdout
    done = cli("compare", full, tmp_path / "none.gguf", "--prompt", PROMPT)
    assert done.returncode == 1 and "none.gguf" in done.stderr


def test_embedding_models_are_refused(full: Path) -> None:
    backend = backends.load(full, n_threads=1, gpu_layers=0)
    from dataclasses import replace

    backend.info = replace(backend.info, generates=False)  # type: ignore[misc]

    @contextmanager
    def encoder() -> Iterator[Backend]:
        yield backend

    with pytest.raises(Unsupported, match="embedding model"):
        compare.compare(encoder, encoder, PROMPT)
    backend.close()
