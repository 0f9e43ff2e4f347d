"""backends/: the seam, kept by the real engine and by the scripted stand-in; what a model says of itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import gguf as gguf_oracle
import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends, engine, gguf
from llmkit.backends import Backend, llamacpp
from llmkit.backends.scripted import Scripted
from llmkit.errors import EngineError, Unsupported
from llmkit.progress import Progress

FRANCE = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PARIS = 7042
TOLERANCE = 3e-3  # other CPUs pick other kernels


def probabilities(row: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    powers: npt.NDArray[np.float64] = np.exp(row.astype(np.float64) - row.max())
    shares: npt.NDArray[np.float64] = powers / powers.sum()
    return shares


# ── golden values ──


def test_what_the_model_says_of_itself(smol: Backend, smollm2_gguf: Path) -> None:
    info = smol.info
    assert (info.architecture, info.n_layer, info.n_embd, info.n_vocab) == ("llama", 30, 576, 49152)
    assert (info.n_ctx_train, info.n_params, info.bos, info.eos_token, info.add_bos) == (8192, 134515008, 1, 2, False)
    assert info.eos_token in info.eos
    assert info.weight_nbytes == sum(tensor.nbytes for tensor in gguf.read(smollm2_gguf).tensors.values())
    assert info.chat_template and "<|im_start|>" in info.chat_template


def test_token_ids_and_pieces(smol: Backend) -> None:
    assert smol.encode("The capital of France is") == FRANCE
    assert [smol.piece(token) for token in FRANCE] == [b"The", b" capital", b" of", b" France", b" is"]
    assert smol.encode("<|im_start|>") == [1]
    assert len(smol.encode("<|im_start|>", special=False)) > 1
    assert smol.piece(1) == b"<|im_start|>"
    assert smol.encode("") == []


@pytest.mark.parametrize("text", ["naïve 東京 🙂🏽 عربى", "\t\n  x\r\n", "a\0b", "\u200d\ufe0f" * 50])
def test_pieces_put_together_are_the_text(smol: Backend, text: str) -> None:
    assert b"".join(map(smol.piece, smol.encode(text, special=False))) == text.encode()


def test_text_that_is_not_unicode_does_no_harm(smol: Backend) -> None:
    assert smol.encode("\udcff") == smol.encode("?")


KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}  # gguf.TokenType


def test_kinds_are_those_in_the_file(
    smol: Backend, smollm2_gguf: Path, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf
) -> None:
    assert (smol.kind(1), smol.kind(504)) == ("control", "normal")
    for path, kinds in (
        (smollm2_gguf, {"normal", "control"}),
        (gguf_of(tiny_checkpoint("gemma3"), "f32"), {"normal", "control", "byte"}),
    ):
        backend = llamacpp.load(path, vocabulary_only=True)
        found = [backend.kind(token) for token in range(backend.info.n_vocab)]
        assert found == [KINDS[number] for number in gguf.read(path).get("tokenizer.ggml.token_type")]
        assert set(found) == kinds
        backend.close()
    with pytest.raises(ValueError):
        smol.kind(49152)


def test_what_computes_and_from_which_files(smol: Backend, smollm2_gguf: Path) -> None:
    assert smol.info.engine == f"llama.cpp {engine.load().version} ({engine.load().build})"
    assert smol.info.files == (smollm2_gguf,)
    assert (smol.info.n_head, smol.info.pooling, smol.info.generates) == (9, None, True)


def test_a_vocabulary_alone(smol: Backend, smollm2_gguf: Path) -> None:
    alone = llamacpp.load(smollm2_gguf, vocabulary_only=True)
    assert alone.info == smol.info
    assert alone.encode("The capital of France is") == FRANCE and alone.piece(PARIS) == b" Paris"
    np.testing.assert_array_equal(alone.embed(FRANCE), smol.embed(FRANCE))
    for use in (lambda: alone.session(64), lambda: alone.pool(FRANCE), lambda: alone.unembed(alone.embed(FRANCE))):
        with pytest.raises(Unsupported, match="vocabulary alone"):
            use()
    alone.close()


# ── evaluation ──


def test_batches_change_nothing_but_rounding(smol: Backend) -> None:
    """600 tokens at once are split by the batch size; in pieces they are not."""
    tokens = (FRANCE * 120)[:600]
    whole, pieces = smol.session(1024), smol.session(1024)
    expected = whole.eval(tokens).logits
    for start in range(0, 600, 100):
        found = pieces.eval(tokens[start : start + 100]).logits
    assert whole.n == pieces.n == 600
    assert found.argmax() == expected.argmax()
    # flash attention's sums differ with the batch: near, not equal (inspection.md: KL up to 0.017)
    assert np.abs(probabilities(found[0]) - probabilities(expected[0])).max() < 0.05
    whole.close()
    pieces.close()


def test_rows_of_logits(smol: Backend) -> None:
    tokens = (FRANCE * 30)[:130]  # more than two calls of the engine
    session = smol.session(512)
    rows = session.eval(tokens, logits="all").logits
    assert rows.shape == (130, 49152) and rows.dtype == np.float32
    assert rows[4].argmax() == PARIS
    session.rewind(0)
    last = session.eval(tokens).logits
    assert last.shape == (1, 49152)
    np.testing.assert_allclose(probabilities(last[0]), probabilities(rows[-1]), atol=0.05)
    session.rewind(0)
    assert session.eval(tokens, logits="none").logits.shape == (0, 49152)
    assert session.n == 130
    session.close()


def test_logits_are_copies(smol: Backend) -> None:
    session = smol.session(256)
    first = session.eval(FRANCE).logits
    kept = first.copy()
    session.eval([PARIS])
    np.testing.assert_array_equal(first, kept)
    session.close()


def test_rewinding_equals_a_fresh_start(smol: Backend) -> None:
    session, fresh = smol.session(256), smol.session(256)
    session.eval(FRANCE)
    session.eval([PARIS, 30, 2])
    assert session.rewind(3) and session.n == 3
    fresh.eval(FRANCE[:3])
    np.testing.assert_array_equal(session.eval(FRANCE[3:]).logits, fresh.eval(FRANCE[3:]).logits)
    with pytest.raises(ValueError, match="cannot rewind 5 tokens to 6"):
        session.rewind(6)
    session.close()
    fresh.close()


def test_a_window_that_has_slid_on_cannot_slide_back(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    """Gemma's windowed layers keep only the last tokens: what the engine has dropped cannot be gone back to."""
    backend = backends.load(gguf_of(tiny_checkpoint("gemma3"), "f32"), n_threads=1)
    tokens = [2 + i * 7 % 90 for i in range(1300)]
    session, fresh = backend.session(2048), backend.session(2048)
    expected = fresh.eval(tokens).logits
    session.eval([*tokens, 5, 6, 7])
    assert session.rewind(1299)
    np.testing.assert_allclose(session.eval(tokens[1299:]).logits, expected, atol=0.02)  # logits reach 30
    assert not session.rewind(100) and session.n == 1300
    assert session.rewind(0) and session.n == 0
    fresh.rewind(0)
    np.testing.assert_array_equal(session.eval(tokens[:50]).logits, fresh.eval(tokens[:50]).logits)
    backend.close()


def test_a_full_context_is_refused_before_anything_is_evaluated(smol: Backend) -> None:
    session = smol.session(8)
    session.eval(FRANCE)
    with pytest.raises(EngineError, match="5 of 8 tokens, 4 more"):
        session.eval(FRANCE[:4])
    assert session.n == 5
    assert session.eval(FRANCE[:3]).logits.shape == (1, 49152)
    session.close()


@pytest.mark.parametrize("context", [-1, 0, 2**31, 2**32 + 128])
def test_a_context_that_is_no_int32_is_refused(smol: Backend, context: int) -> None:
    with pytest.raises(Unsupported, match=str(context)):
        smol.session(context)


@pytest.mark.parametrize(("tokens", "layers"), [([], ()), ([49152], ()), ([-1], ()), ([1], (0,))])
def test_mistakes_of_programmers_are_value_errors(smol: Backend, tokens: list[int], layers: tuple[int, ...]) -> None:
    session = smol.session(64)
    with pytest.raises(ValueError):
        session.eval(tokens, layers=layers)
    assert session.n == 0
    session.close()


def test_two_sessions_do_not_disturb_each_other(smol: Backend) -> None:
    one, two = smol.session(64), smol.session(64)
    alone = one.eval(FRANCE).logits
    one.rewind(0)
    one.eval(FRANCE[:2])
    two.eval([1, 2, 3, 4])
    one.eval(FRANCE[2:4])
    two.eval([5])
    assert one.eval(FRANCE[4:]).logits.argmax() == alone.argmax() == PARIS
    one.close()
    two.close()


# ── embeddings and hidden states ──


def test_embeddings_are_the_files_own_rows(smol: Backend, smollm2_gguf: Path) -> None:
    reader = gguf_oracle.GGUFReader(smollm2_gguf)
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    expected = gguf_oracle.quants.dequantize(table.data[FRANCE], table.tensor_type)
    np.testing.assert_array_equal(smol.embed(FRANCE), expected)
    assert smol.embed([]).shape == (0, 576)
    np.testing.assert_array_equal(smol.embed(range(300, 5000)), smol.embed(list(range(300, 5000))))
    with pytest.raises(ValueError):
        smol.embed([49152])


def test_hidden_states_of_every_token_and_layer(smol: Backend, smollm2_gguf: Path) -> None:
    session = smol.session(256, inspect=True)
    tokens = (FRANCE * 20)[:70]  # two calls of the engine
    found = session.eval(tokens, layers=(-1, 0, 29))
    assert {layer: rows.shape for layer, rows in found.hidden.items()} == {layer: (70, 576) for layer in (-1, 0, 29)}
    np.testing.assert_array_equal(found.hidden[-1], smol.embed(tokens))
    assert found.logits.shape == (1, 49152)
    # the last layer's output, normed and multiplied by the output matrix, is the logits (inspection.md §5)
    reader = gguf_oracle.GGUFReader(smollm2_gguf)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    gain = gguf_oracle.quants.dequantize(tensors["output_norm.weight"].data, tensors["output_norm.weight"].tensor_type)
    hidden = found.hidden[29][-1]
    normed = hidden / np.sqrt((hidden**2).mean() + 1e-5) * gain
    wanted = [int(token) for token in np.argsort(-found.logits[0])[:20]]
    assert np.abs(smol.embed(wanted) @ normed - found.logits[0][wanted]).max() < 0.5
    session.close()


def test_a_failure_inside_the_callback_is_raised(smol: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    session = smol.session(64, inspect=True)
    expected = session.eval(FRANCE, layers=(3,)).logits
    session.rewind(0)

    def fail(*_: object) -> None:
        raise MemoryError("no room for the copy")

    monkeypatch.setattr(session._tap, "_read", fail)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="no room for the copy"):
        session.eval(FRANCE, layers=(3,))
    monkeypatch.undo()
    session.rewind(0)
    np.testing.assert_array_equal(session.eval(FRANCE, layers=(3,)).logits, expected)
    session.close()


# ── loading ──


def test_progress_of_loading_ends_at_the_total(smollm2_gguf: Path) -> None:
    seen: list[Progress] = []
    backends.load(smollm2_gguf, n_threads=1, on_progress=seen.append).close()
    assert seen[-1].done == seen[-1].total > 0
    assert [report.done for report in seen] == sorted(report.done for report in seen)


def test_a_callback_that_raises_cancels_loading(smollm2_gguf: Path) -> None:
    class Enough(Exception):
        pass

    def stop(_: Progress) -> None:
        raise Enough

    with pytest.raises(Enough):
        backends.load(smollm2_gguf, n_threads=1, on_progress=stop)


def test_closing_twice_and_using_what_is_closed(smollm2_gguf: Path) -> None:
    backend = backends.load(smollm2_gguf, n_threads=1)
    session = backend.session(64)
    backend.close()
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        session.eval(FRANCE)
    with pytest.raises(EngineError, match="closed"):
        backend.session(64)


def test_memory_does_not_grow_from_load_to_load(smollm2_gguf: Path) -> None:
    import psutil

    def load_and_use() -> int:
        backend = backends.load(smollm2_gguf, n_threads=1)
        backend.session(512).eval(FRANCE)
        backend.close()
        return int(psutil.Process().memory_info().rss)

    load_and_use()
    first = load_and_use()
    assert load_and_use() - first < 60e6  # a leaked model would be 100 MB, a leaked context 100 MB


# ── Ctrl-C ──


def _interrupt_soon(after: float) -> threading.Thread:
    thread = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    thread.start()
    return thread


def test_ctrl_c_ends_a_long_batch_and_the_session_goes_on(smol: Backend) -> None:
    session = smol.session(2048)
    session.eval(FRANCE)
    thread = _interrupt_soon(0.3)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.eval((FRANCE * 400)[:2000])  # many seconds on one thread
    assert time.monotonic() - began < 3
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert session.n % 512 == 5
    session.rewind(4)
    assert session.eval(FRANCE[4:]).logits.argmax() == PARIS
    session.close()


def test_ctrl_c_with_the_tap_in_use_is_delivered_after_the_batch(smol: Backend) -> None:
    session = smol.session(2048, inspect=True)
    thread = _interrupt_soon(0.3)
    with pytest.raises(KeyboardInterrupt):
        session.eval((FRANCE * 200)[:1000], layers=(0, 15))
    thread.join()
    session.rewind(0)
    assert session.eval(FRANCE, layers=(0,)).logits.argmax() == PARIS
    session.close()


def test_interrupts_held_elsewhere_are_left_alone() -> None:
    seen: list[int] = []

    def in_thread() -> None:
        with engine.held_interrupts() as held:
            seen.extend(held)
            seen.append(0)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [0]


# ── the table, and the stand-in ──


def test_the_table_of_backends_names_modules_that_load() -> None:
    import importlib

    for name, module in backends.BACKENDS.items():
        assert callable(importlib.import_module(module).load), name


def test_the_scripted_backend_keeps_the_seam() -> None:
    backend: Backend = Scripted(["Yes.", "Nö"])
    session = backend.session(64)
    tokens = backend.encode("Is it?<end><assistant>")
    assert b"".join(map(backend.piece, tokens)) == b"Is it?<end><assistant>"
    rows = session.eval(tokens, logits="all", layers=(-1, 1))
    assert rows.logits.shape == (len(tokens), backend.info.n_vocab)
    assert rows.hidden[1].shape == (len(tokens), backend.info.n_embd)
    assert rows.logits[-1].argmax() == ord("Y")
    assert session.eval([ord("Y")]).logits[0].argmax() == ord("e")
    assert session.rewind(len(tokens)) and session.n == len(tokens)
    with pytest.raises(EngineError, match="full"):
        session.eval([0] * 60)


def test_llamacpp_keeps_the_seam_for_the_type_checker() -> None:
    loader: type[llamacpp.LlamaCpp] = llamacpp.LlamaCpp
    backend_like: type[Backend] = loader
    assert backend_like is loader
