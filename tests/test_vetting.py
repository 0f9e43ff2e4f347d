"""Files a backend is asked to load: sound, broken, hostile. The process must survive all of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmkit import backends, engine, gguf_writer
from llmkit.errors import EngineError, InvalidModel, LlmkitError, ModelNotFound, Unsupported
from llmkit.gguf import Value
from llmkit.quants import F32

NOT_MODELS = {
    "html": (b"<!DOCTYPE html><html>Not Found</html>", "HTML"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LFS pointer"),
    "empty": (b"", "empty"),
    "text": (b"hello, world", "expected it to begin with"),
}


@pytest.mark.parametrize("kind", NOT_MODELS)
def test_files_that_are_no_models_are_named_as_what_they_are(tmp_path: Path, kind: str) -> None:
    content, word = NOT_MODELS[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=word):
        backends.load(path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        backends.load(tmp_path / "none.gguf")


def tiny_llama(path: Path, **changes: int) -> Path:
    """A sound one-layer model of 64 tokens without vocabulary, or with some numbers changed."""
    numbers = {
        "vocab_size": 64, "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 16,
    } | {name.replace("__", "."): number for name, number in changes.items()}  # fmt: skip
    metadata = {
        "general.architecture": Value.string("llama"),
        "tokenizer.ggml.model": Value.string("no_vocab"),
        "llama.attention.layer_norm_rms_epsilon": Value.float32(1e-5),
        **{f"llama.{key}": Value.uint32(number) for key, number in numbers.items()},
    }
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    rows: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (64, 32))]
    rows += [(f"blk.0.{name}.weight", (32, 32)) for name in names]
    rows += [(f"{name}.weight", (32,)) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")]
    random = np.random.default_rng(3)
    written = [(name, shape, F32, random.normal(0, 0.1, shape).astype(np.float32).tobytes()) for name, shape in rows]
    gguf_writer.write(path, metadata, written)
    return path


def test_a_model_without_vocabulary_evaluates_but_has_no_text(tmp_path: Path) -> None:
    backend = backends.load(tiny_llama(tmp_path / "tiny.gguf"), n_threads=1)
    session = backend.session(32)
    assert session.eval([1, 2, 3]).logits.shape == (1, 64)
    with pytest.raises(Unsupported, match="no vocabulary"):
        backend.encode("x")
    with pytest.raises(Unsupported, match="no vocabulary"):
        backend.piece(1)
    backend.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_length": 48},
        {"block_count": 2},
        {"attention__head_count": 0},
        {"attention__head_count": 7},
        {"attention__head_count_kv": 3},
        {"feed_forward_length": 0},
        {"context_length": 0},
        {"rope__dimension_count": 17},
        {"embedding_length": 0},
        {"block_count": 4_000_000_000},
        {"attention__head_count": 4_000_000_000},
    ],
    ids=str,
)
def test_contradictory_headers_raise_or_load_but_never_kill(tmp_path: Path, changes: dict[str, int]) -> None:
    path = tiny_llama(tmp_path / "odd.gguf", **changes)
    try:
        backend = backends.load(path, n_threads=1)
    except LlmkitError as error:
        assert str(path) in error.message
    else:
        backend.session(16).eval([1])
        backend.close()


def test_an_unknown_architecture_is_refused_in_the_engines_words(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    metadata = {"general.architecture": Value.string("nonesuch")}
    gguf_writer.write(path, metadata, [("token_embd.weight", (1, 32), F32, bytes(128))])
    with pytest.raises(EngineError, match="nonesuch"):
        backends.load(path)


def test_a_cut_file_is_refused(tmp_path: Path, smollm2_gguf: Path) -> None:
    path = tmp_path / "cut.gguf"
    with open(smollm2_gguf, "rb") as whole:
        path.write_bytes(whole.read(5_000_000))
    with pytest.raises(InvalidModel, match="cut short"):
        backends.load(path)


def test_a_file_is_vetted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tiny_llama(tmp_path / "tiny.gguf"), []
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "home"))
    real = engine.run_in_child

    def counted(**arguments: object) -> object:
        calls.append(arguments["function"])
        return real(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "run_in_child", counted)
    for _ in range(2):
        backends.load(path, n_threads=1).close()
    assert calls == ["llmkit.backends.llamacpp.vetting:load_without_weights"]
    os.utime(path, ns=(1, 1))
    backends.load(path, n_threads=1).close()
    assert len(calls) == 2


def abort_in_child(path: str, model_params: dict[str, bool]) -> None:
    """As a failed GGML_ASSERT."""
    os.abort()


def test_a_file_the_engine_dies_of_is_an_invalid_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(tmp_path / "killer.gguf")
    real = engine.run_in_child
    monkeypatch.setattr(
        engine,
        "run_in_child",
        lambda function, arguments, timeout: real(
            function=f"{__name__}:abort_in_child", arguments=arguments, timeout=timeout
        ),
    )
    with pytest.raises(InvalidModel, match="does not survive.*SIGABRT"):
        backends.load(path)
