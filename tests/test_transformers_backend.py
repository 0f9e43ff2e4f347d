"""backends/transformers: a checkpoint as it is, against plain transformers and against our F32 GGUF in the engine."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint, cli_environment
from llmkit import backends
from llmkit.backends import Backend, Part, choice
from llmkit.cli import models
from llmkit.errors import (
    EngineError,
    InvalidModel,
    LlmkitError,
    MissingDependency,
    ModelNotFound,
    NotEnoughRoom,
    Unsupported,
)
from llmkit.memory.devices import machine
from test_logit_parity import engine_logits

pytest.importorskip("torch")
pytest.importorskip("transformers")

FAMILIES = ("llama", "llama3", "mistral", "smollm", "qwen2", "qwen3", "gemma3")
TOLERANCE = 1e-3  # of the logits' range
N_TOKENS = 40  # more than twice Gemma's window in these checkpoints

FloatArray = npt.NDArray[np.float32]


def ids(count: int = N_TOKENS, seed: int = 1) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, 500, count).tolist()
    return found


def span(values: FloatArray) -> float:
    return float(values.max() - values.min())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint(family, dtype="f32", layers=7)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Backend]:
    backend = backends.load(folder, backend="transformers", n_threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM
    return model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_logits_states_and_attention_are_those_of_plain_transformers(tiny: Backend, plain: Any) -> None:
    import torch

    tokens, layers = ids(), list(range(tiny.info.n_layer))
    with torch.inference_mode():
        expected = plain(torch.tensor([tokens]), output_hidden_states=True, output_attentions=True)
    session = tiny.session(64, inspect=True)
    found = session.eval(tokens, logits="all", layers=[-1, *layers], attention=layers)
    assert (found.logits == expected.logits[0].numpy()).all()
    for layer in (-1, *layers[:-1]):  # transformers' last one has passed the final norm
        assert (found.hidden[layer] == expected.hidden_states[layer + 1][0].numpy()).all(), layer
    for layer in layers:
        rows = found.attention[layer]
        assert (rows == expected.attentions[layer][0].numpy()).all(), layer
        assert np.allclose(rows.sum(-1), 1, atol=1e-5) and (np.triu(rows, 1) == 0).all()
    normed = plain.model.norm(torch.from_numpy(found.hidden[layers[-1]])).detach().numpy()
    assert np.allclose(normed, expected.hidden_states[-1][0].numpy(), atol=1e-5)


def test_the_lens_on_the_last_layer_is_the_model(tiny: Backend) -> None:
    last = tiny.info.n_layer - 1
    found = tiny.session(64, inspect=True).eval(ids(), logits="all", layers=[last])
    assert np.abs(tiny.unembed(found.hidden[last]) - found.logits).max() <= 1e-5 * span(found.logits)


def test_equals_our_f32_gguf_in_the_engine(tiny: Backend, folder: Path, gguf_of: GgufOf) -> None:
    path, tokens = gguf_of(folder, "f32"), ids()
    ours = tiny.session(64).eval(tokens, logits="all").logits
    theirs = engine_logits(path, tokens)
    width = theirs.shape[1]
    assert np.abs(ours[:, :width] - theirs).max() <= TOLERANCE * span(theirs)
    engine = backends.load(path, n_threads=1, gpu_layers=0)
    try:
        chat = engine.session(64).eval(tokens, logits="all").logits  # its keys and values are 16 bits
        assert np.abs(ours[:, :width] - chat).max() <= 4 * TOLERANCE * span(theirs)
        assert np.allclose(tiny.embed(tokens), engine.embed(tokens))
        for name in ("n_layer", "n_embd", "eos_token", "add_bos", "chat_template", "n_ctx_train"):
            assert getattr(tiny.info, name) == getattr(engine.info, name), name
        for text in ("The capital of France is", "Größe  \n 12"):
            assert tiny.encode(text, bos=True) == engine.encode(text, bos=True)
    finally:
        engine.close()


def test_rewinding_equals_a_fresh_session(tiny: Backend) -> None:
    tokens, other = ids(), ids(5, seed=2)
    session = tiny.session(64)
    session.eval(tokens, logits="none")
    assert session.rewind(20) and session.n == 20
    again = session.eval(other).logits
    assert again.shape == (1, tiny.info.n_vocab)
    fresh = tiny.session(64)
    fresh.eval(tokens[:20], logits="none")
    assert (again == fresh.eval(other).logits).all()
    assert session.rewind(0) and session.n == 0
    assert np.allclose(session.eval(tokens).logits, tiny.session(64).eval(tokens).logits)


def test_a_beginning_counts_once_whoever_has_it(tiny: Backend) -> None:
    session = tiny.session(32, sequences=3)
    session.eval(ids(20), logits="none")
    session.share(0, 1)
    session.share(0, 2)
    session.rewind(0)  # the lender forgets it, the two borrowers hold it together
    session.eval_parts([Part(1, ids(6)), Part(2, ids(6))])
    with pytest.raises(EngineError, match="holds 32 of 32"):
        session.eval(ids(1))


def test_sequences_that_share_a_beginning_equal_separate_runs(tiny: Backend) -> None:
    tokens = ids(20)
    session = tiny.session(32, sequences=4)
    session.eval(tokens, logits="none")
    for target in (1, 2, 3):
        session.share(0, target)
    assert [session.length(each) for each in range(4)] == [20] * 4
    rows = session.eval_parts([Part(index, [5 + index, 9], "all") for index in range(4)])  # 8 tokens beside the 20
    for index, row in enumerate(rows):
        fresh = tiny.session(32)
        fresh.eval(tokens, logits="none")
        assert (row == fresh.eval([5 + index, 9], logits="all").logits).all()
    with pytest.raises(EngineError, match="full"):
        session.eval_parts([Part(index, [1, 2]) for index in range(4)])
    assert session.rewind(4, 2) and session.length(2) == 4 and session.length(3) == 22


def test_long_prompts_in_batches_equal_one(tiny_checkpoint: TinyCheckpoint) -> None:
    backend = backends.load(tiny_checkpoint("gemma3", dtype="f32", layers=7), backend="transformers", n_threads=1)
    tokens = ids(600)
    whole = backend.session(600, inspect=True).eval(tokens, logits="last", attention=[0, 5])
    assert whole.attention[5].shape[1:] == (600, 600)
    assert np.allclose(whole.attention[5].sum(-1), 1, atol=1e-5)
    session = backend.session(600)
    for start in range(0, 600, 150):
        rows = session.eval(tokens[start : start + 150]).logits
    assert np.abs(rows - whole.logits).max() <= 1e-4 * span(rows)
    backend.close()


def test_vectors_of_texts(tiny: Backend, plain: Any) -> None:
    import torch

    tokens = ids(9)
    with torch.inference_mode():
        rows = plain.model(torch.tensor([tokens])).last_hidden_state[0].numpy()
    assert np.allclose(tiny.pool(tokens, "mean"), rows.mean(0), atol=1e-5)
    assert np.allclose(tiny.pool(tokens, "last"), rows[-1], atol=1e-5)
    assert np.allclose(tiny.pool(tokens), rows.mean(0), atol=1e-5)


def test_wishes_that_cannot_be(tiny: Backend) -> None:
    session = tiny.session(8)
    with pytest.raises(EngineError, match="holds 0 of 8"):
        session.eval(ids(9))
    with pytest.raises(ValueError, match="inspect"):
        session.eval([1], layers=[0])
    with pytest.raises(ValueError, match="vocabulary"):
        session.eval([10**6])
    with pytest.raises(Unsupported, match="grammar"):
        tiny.grammar('root ::= "a"')
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.eval([1])
    with pytest.raises(EngineError, match="closed"):
        session.rewind(0)


# ── folders that cannot be loaded ──


@pytest.fixture
def copied(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama", dtype="f32", layers=7), tmp_path / "model"))


def changed(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"model_type": "brandnew", "auto_map": {"AutoModel": "own.Model"}}, Unsupported, "code of its own"),
        ({"model_type": "brandnew"}, Unsupported, "brandnew"),
        ({"quantization": {"bits": 4, "group_size": 64}}, Unsupported, "MLX"),
        ({"num_hidden_layers": 8}, InvalidModel, "missing"),
        ({"hidden_size": 48}, InvalidModel, "transformers cannot load|another shape"),
    ],
)
def test_folders_that_cannot_be_run(copied: Path, values: dict[str, Any], error: type[LlmkitError], words: str) -> None:
    with pytest.raises(error, match=words):
        backends.load(changed(copied, **values), backend="transformers")


def test_code_in_a_folder_is_never_run(copied: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (copied / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Model: pass\n")
    folder = changed(copied, auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Model"})
    backend = backends.load(folder, backend="transformers", n_threads=1)
    assert "not its own code" in backend.info.engine and not trace.exists()
    backend.close()


def test_no_folder_and_no_tokenizer(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        backends.load(tmp_path / "none", backend="transformers")
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelNotFound, match="tokenizer"):
        backends.load(copied, backend="transformers")


def test_without_pytorch_it_says_what_to_install(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match="torch") as caught:
        backends.load(copied, backend="transformers")
    assert "llmkit[transformers]" in str(caught.value.hint)


# ── the automatic choice ──


def test_the_choice(copied: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert choice.choose(file) == "llamacpp"
    assert choice.choose(copied, "transformers") == "transformers"
    with pytest.raises(ModelNotFound) as caught:
        choice.choose(copied)
    assert "quantize" in str(caught.value.hint) and "--backend transformers" in str(caught.value.hint)
    with pytest.raises(Unsupported, match="is a file"):
        choice.choose(file, "transformers")
    with pytest.raises(ModelNotFound, match="no such folder"):
        choice.choose(tmp_path / "none", "transformers")
    with pytest.raises(Unsupported, match="unknown backend"):
        choice.choose(file, "cuda")
    assert not choice.is_mlx_folder(copied)
    assert choice.is_mlx_folder(changed(copied, quantization={"bits": 4, "group_size": 64}))


def test_what_does_not_fit_into_memory_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ram", lambda: machine.Ram(1 << 20, 1 << 16, None))
    args = argparse.Namespace(model=str(copied), backend="transformers")
    with pytest.raises(NotEnoughRoom, match="float32"), models.opened(args):
        pass


@pytest.mark.slow
def test_the_door_offers_it(copied: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "chat", str(copied), "--backend", "transformers", "--prompt", "Hi",
         "--max-tokens", "3", "--temperature", "0", "--threads", "1"],
        capture_output=True, text=True, timeout=120, env=cli_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
