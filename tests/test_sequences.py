"""Several sequences in one context: branches share their beginning, and say what they would have said alone.

Of the same kernels the logits are equal to the bit; batches of several rows may take others, which round otherwise.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import make_tiny_model
from conftest import GgufOf, TinyCheckpoint
from llmkit.backends import Backend, Part, Rows, llamacpp
from llmkit.backends.cells import Cells
from llmkit.backends.llamacpp import LlamaCpp
from llmkit.backends.llamacpp.session import LlamaCppSession
from llmkit.backends.scripted import Scripted
from llmkit.errors import EngineError, Unsupported

FloatArray = npt.NDArray[np.float32]
FRANCE = [504, 3575, 282, 4649, 314]
FIRST = [7042, 260, 4528, 1315, 5145, 100, 200, 300]  # where eight branches part
STEPS = 4


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[LlamaCpp]:
    backend = llamacpp.load(smollm2_gguf, n_threads=1)
    yield backend
    backend.close()


def alone(backend: Backend, prefix: Sequence[int], first: int) -> tuple[list[int], list[FloatArray]]:
    """One branch in a context of its own: its tokens (greedy after the first) and their logits."""
    session = backend.session(len(prefix) + STEPS)
    session.eval(prefix)
    tokens, rows = [first], []
    for _ in range(STEPS):
        rows.append(session.eval([tokens[-1]]).logits[0])
        tokens.append(int(rows[-1].argmax()))
    session.close()
    return tokens, rows


def branched(backend: Backend, prefix: Sequence[int], context: int) -> Any:
    session = backend.session(context, sequences=8)
    session.eval(prefix, logits="none")
    for sequence in range(1, 8):
        session.share(0, sequence)
    return session


# ── eight branches ──


def test_eight_branches_equal_eight_runs(smol: LlamaCpp) -> None:
    """Step by step to the bit; eight rows in one batch within rounding, with the same first choice."""
    prefix = FRANCE * 6
    expected = [alone(smol, prefix, first) for first in FIRST]
    session = branched(smol, prefix, len(prefix) + 8 * STEPS)
    for step in range(STEPS):
        for sequence, (tokens, rows) in enumerate(expected):
            (found,) = session.eval_parts([Part(sequence, tokens[step : step + 1])])
            np.testing.assert_array_equal(found[0], rows[step])
    session.close()
    session = branched(smol, prefix, len(prefix) + 8 * STEPS)
    for step in range(STEPS):
        parts = [Part(sequence, tokens[step : step + 1]) for sequence, (tokens, _) in enumerate(expected)]
        for found, (_, rows) in zip(session.eval_parts(parts), expected, strict=True):
            assert found.shape == (1, 49152)
            assert np.abs(found[0] - rows[step]).max() < 0.03 * np.ptp(rows[step])
            assert rows[step].max() - rows[step][found[0].argmax()] < 0.01 * np.ptp(rows[step])
    session.close()


@pytest.mark.parametrize("family", sorted(make_tiny_model.FAMILIES))
def test_branches_of_every_family(family: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    """Beyond Gemma's window of 16, in 32-bit weights: within 0.5 % of the range (keys and values have 16 bits)."""
    backend = llamacpp.load(gguf_of(tiny_checkpoint(family, dtype="f32", layers=7), "f32"), n_threads=1)
    prefix = np.random.default_rng(2).integers(3, 500, 40).tolist()
    firsts = [first % 500 for first in FIRST]
    session = branched(backend, prefix, len(prefix) + 8 * STEPS)
    expected = [alone(backend, prefix, first) for first in firsts]
    for step in range(STEPS):
        parts = [Part(sequence, tokens[step : step + 1]) for sequence, (tokens, _) in enumerate(expected)]
        for found, (_, rows) in zip(session.eval_parts(parts), expected, strict=True):
            assert np.abs(found[0] - rows[step]).max() < 5e-3 * np.ptp(rows[step])
    backend.close()


def test_the_cells_of_the_prefix_count_once(smol: LlamaCpp) -> None:
    """256 cells, which the engine has no more of: 192 shared and 8 × 8. Unshared it would be 1600."""
    prefix = (FRANCE * 40)[:192]
    session = branched(smol, prefix, 256)
    assert isinstance(session, LlamaCppSession)
    assert session.used == 192 and [session.length(sequence) for sequence in range(8)] == [192] * 8
    for step in range(8):
        session.eval_parts([Part(sequence, [FIRST[sequence] + step]) for sequence in range(8)])
    assert session.used == session.context == 256
    with pytest.raises(EngineError, match="256 of 256 tokens, 1 more"):
        session.eval_parts([Part(3, [1])])
    # the engine says the same: no cell is left
    session.context += 8
    with pytest.raises(EngineError, match="llama_decode: 1"):
        session.eval_parts([Part(3, [1])])
    assert [session.length(sequence) for sequence in range(8)] == [200] * 8
    session.close()
    with pytest.raises(EngineError, match="255 tokens, 8 more|248 of 255"):
        session = branched(smol, prefix, 255)
        for step in range(8):
            session.eval_parts([Part(sequence, [FIRST[sequence] + step]) for sequence in range(8)])


# ── parts ──


def test_prompts_and_single_tokens_in_one_call(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    """900 tokens of three sequences in several calls of the engine; rows come back in the order of the parts."""
    backend = llamacpp.load(gguf_of(tiny_checkpoint("llama", dtype="f32"), "f32"), n_threads=1)
    long, short, other = (np.random.default_rng(seed).integers(3, 500, 700).tolist() for seed in (1, 2, 3))
    short, other = short[:6], other[:200]
    session, one = backend.session(2048, sequences=3), backend.session(1024)
    session.eval_parts([Part(1, short[:5], "none")])
    rows = session.eval_parts([Part(0, long, "last"), Part(1, short[5:]), Part(2, other, "all")])
    assert [session.length(sequence) for sequence in range(3)] == [700, 6, 200] and session.n == 700
    wanted: list[tuple[list[int], Rows]] = [(long, "last"), (short, "last"), (other, "all")]
    for found, (tokens, which) in zip(rows, wanted, strict=True):
        one.rewind(0)
        expected = one.eval(tokens, logits=which).logits
        assert found.shape == expected.shape and np.abs(found - expected).max() < 5e-3 * np.ptp(expected)
    assert session.eval_parts([Part(2, [5, 6], "none")])[0].shape == (0, backend.info.n_vocab)
    backend.close()


def test_a_sequence_may_come_twice(smol: LlamaCpp) -> None:
    session, plain = smol.session(64, sequences=2), smol.session(64)
    first, second = session.eval_parts([Part(1, FRANCE[:3], "all"), Part(1, FRANCE[3:], "all")])
    expected = plain.eval(FRANCE, logits="all").logits
    np.testing.assert_allclose(np.concatenate([first, second]), expected, atol=0.03 * float(np.ptp(expected)))
    assert session.length(1) == 5 and session.n == 0
    session.close()
    plain.close()


@pytest.mark.parametrize(
    "parts", [[], [Part(0, [])], [Part(2, [1])], [Part(-1, [1])], [Part(0, [49152])], [Part(0, [1]), Part(1, [-1])]]
)
def test_mistakes_of_programmers_are_value_errors(smol: LlamaCpp, parts: list[Part]) -> None:
    session = smol.session(64, sequences=2)
    with pytest.raises(ValueError):
        session.eval_parts(parts)
    assert session.length(0) == session.length(1) == 0
    session.close()


@pytest.mark.parametrize("sequences", [0, -1, 257])
def test_numbers_of_sequences_the_engine_has_not(smol: LlamaCpp, sequences: int) -> None:
    with pytest.raises(Unsupported, match=f"{sequences} sequences"):
        smol.session(64, sequences=sequences)


def test_as_many_sequences_as_there_can_be(smol: LlamaCpp) -> None:
    session = smol.session(600, sequences=256)
    session.eval(FRANCE)
    for sequence in range(1, 256):
        session.share(0, sequence)
    rows = session.eval_parts([Part(sequence, [260]) for sequence in range(256)])
    assert len({int(row[0].argmax()) for row in rows}) == 1
    session.close()


# ── sharing and rewinding ──


def test_rewinding_one_sequence_leaves_the_others(smol: LlamaCpp) -> None:
    session, fresh = smol.session(128, sequences=3), smol.session(128)
    session.eval([*FRANCE, 7042])
    session.share(0, 1)
    session.eval_parts([Part(1, [30, 198])])
    assert session.rewind(5, 1) and [session.length(s) for s in range(3)] == [6, 5, 0]
    assert session.used == 6  # the sixth cell is still that of sequence 0
    assert session.rewind(0) and session.used == 5
    fresh.eval(FRANCE)
    np.testing.assert_array_equal(session.eval_parts([Part(1, [260])])[0], fresh.eval([260]).logits)
    session.share(1, 2)
    session.share(2, 0)
    assert session.n == 6 and session.used == 6
    session.share(0, 0)
    assert session.n == 6
    assert session.rewind(0, 1) and session.rewind(0, 2) and session.used == 6
    assert session.rewind(0, 0) and session.used == 0
    session.close()
    fresh.close()


def test_a_target_forgets_what_it_held(smol: LlamaCpp) -> None:
    session, fresh = smol.session(128, sequences=2), smol.session(128)
    session.eval_parts([Part(0, FRANCE), Part(1, [1, 2, 3, 4, 5, 6, 7, 8])])
    session.share(0, 1)
    assert session.length(1) == session.used == 5
    fresh.eval(FRANCE)
    np.testing.assert_array_equal(session.eval_parts([Part(1, [260])])[0], fresh.eval([260]).logits)
    session.close()
    fresh.close()


def test_windows_are_shared_whole(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    """Of cells that two sequences hold the engine uses none again: windows of several sequences do not slide."""
    backend = llamacpp.load(gguf_of(tiny_checkpoint("gemma3"), "f32"), n_threads=1)
    tokens = [2 + i * 7 % 90 for i in range(1300)]
    session, fresh = backend.session(2048, sequences=2), backend.session(2048)
    session.eval(tokens)
    session.share(0, 1)
    session.eval_parts([Part(1, [5, 6, 7]), Part(0, tokens[:700])])
    assert session.rewind(100, 1) and session.length(1) == 100 and session.used == 2000
    expected = fresh.eval([*tokens[:100], 9]).logits
    (found,) = session.eval_parts([Part(1, [9])])
    assert np.abs(found - expected).max() < 5e-3 * np.ptp(expected)
    backend.close()


def test_after_close_only_the_length_can_be_read(smol: LlamaCpp) -> None:
    for session in (smol.session(64, sequences=2), Scripted(["x"]).session(64, sequences=2)):
        session.eval([65, 66])
        session.close()
        session.close()
        assert session.n == 2
        for name, arguments in (
            ("eval", ([65],)), ("eval_parts", ([Part(1, [65])],)), ("rewind", (0,)), ("length", (1,)),
            ("share", (0, 1)),
        ):  # fmt: skip
            with pytest.raises(EngineError, match="closed"):
                getattr(session, name)(*arguments)


# ── Ctrl-C ──


def test_ctrl_c_leaves_true_lengths(smol: LlamaCpp) -> None:
    session = smol.session(4096, sequences=2)
    session.eval(FRANCE)
    session.share(0, 1)
    thread = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        session.eval_parts([Part(1, [260]), Part(0, (FRANCE * 500)[:1500])])
    thread.join()
    held = [session.length(0), session.length(1)]
    assert held in ([5, 5], [516, 6], [1028, 6])
    assert session.used == sum(held) - 5
    assert session.rewind(5) and session.rewind(5, 1) and session.used == 5
    fresh = smol.session(64)
    fresh.eval(FRANCE)
    np.testing.assert_array_equal(session.eval([260]).logits, fresh.eval([260]).logits)
    session.close()
    fresh.close()


@pytest.mark.parametrize("before", [True, False])
def test_ctrl_c_beside_a_single_token_leaves_the_true_length(
    smol: LlamaCpp, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Python raises it between two of its steps: before the engine's work, or after it and before it is counted."""
    session, fresh = smol.session(64), smol.session(64)
    session.eval(FRANCE)
    decode = session._single.decode

    def interrupted(*arguments: Any) -> int:
        if not before:
            assert decode(*arguments) == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(session._single, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.eval([260])
    monkeypatch.undo()
    assert session.n == session.length() == session.used == (5 if before else 6)
    fresh.eval(FRANCE)
    fresh.eval([260])
    if before:
        session.eval([260])
    np.testing.assert_array_equal(session.eval([4649]).logits, fresh.eval([4649]).logits)
    session.close()
    fresh.close()


def test_ctrl_c_after_freeing_frees_nothing_twice(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python raises it between the engine's freeing and our next step."""
    backend = llamacpp.load(smollm2_gguf, vocabulary_only=True)
    llama, grammar, freed = backend.engine.llama, backend.grammar('root ::= "a"'), list[str]()
    for closing, name in ((grammar, "llama_sampler_free"), (backend, "llama_model_free")):
        free = getattr(llama, name)

        def interrupted(pointer: Any, free: Any = free, name: str = name) -> None:
            freed.append(name)
            free(pointer)
            raise KeyboardInterrupt

        monkeypatch.setattr(llama, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            closing.close()
        closing.close()
    assert freed == ["llama_sampler_free", "llama_model_free"]


def test_a_single_token_is_evaluated_as_in_a_batch(smol: LlamaCpp) -> None:
    """The short way and the long way, bit for bit; and what is wrong with a token is told as ever."""
    session, other = smol.session(7), smol.session(7)
    session.eval(FRANCE)
    other.eval(FRANCE)
    np.testing.assert_array_equal(session.eval([260]).logits, other.eval_parts([Part(0, [260])])[0])
    assert session.eval([1], logits="none").logits.shape == (0, 49152)
    for wrong in ([49152], [-1]):
        with pytest.raises(ValueError):
            other.eval(wrong)
    with pytest.raises(EngineError, match="7 of 7 tokens, 1 more"):
        session.eval([1])
    session.context += 256  # the engine itself has 256 cells
    for token in range(249):
        session.eval([token])
    with pytest.raises(EngineError, match="llama_decode: 1") as refused:
        session.eval([1])
    assert "failed to find a memory slot" in refused.value.message
    assert session.n == 256 and session.rewind(6)
    np.testing.assert_array_equal(session.eval([1]).logits, other.eval([1]).logits)
    session.close()
    other.close()


# ── counting cells ──

STEP = st.tuples(st.sampled_from(["append", "share", "rewind"]), st.integers(0, 3), st.integers(0, 12))


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_cells_are_counted_as_sets_of_cells(steps: list[tuple[str, int, int]]) -> None:
    """Against a model in which every cell is an object."""
    cells, held, fresh = Cells(4), [list[object]() for _ in range(4)], iter(range(10**6))
    for what, sequence, number in steps:
        if what == "append" and number:
            cells.append(sequence, number)
            held[sequence] += [next(fresh) for _ in range(number)]
        elif what == "share":
            cells.share(number % 4, sequence)
            held[sequence] = list(held[number % 4])
        elif what == "rewind":
            cells.rewind(sequence, min(number, len(held[sequence])))
            del held[sequence][number:]
        assert cells.lengths == [len(each) for each in held]
        assert cells.used == len(set().union(*map(set, held)))


# ── the stand-in ──


def test_the_scripted_sequences_keep_the_seam() -> None:
    backend = Scripted(["ab", "cd"])
    session = backend.session(40, sequences=3)
    prompt = backend.encode("Hi<end><assistant>")
    session.eval(prompt)
    session.share(0, 2)
    first, second = session.eval_parts([Part(0, b"a"), Part(2, b"abX", "all")])
    assert first[0].argmax() == ord("b") and second.shape == (3, backend.info.n_vocab)
    assert [session.length(s) for s in range(3)] == [5, 0, 7]
    with pytest.raises(EngineError, match="8 of 40|full"):
        session.eval_parts([Part(1, [65] * 33)])
    found = backend.session(40).eval(prompt, layers=(-1, 1), attention=(0,), logits="all")
    np.testing.assert_array_equal(found.hidden[-1], backend.embed(prompt))
    np.testing.assert_array_equal(backend.unembed(found.hidden[1]), found.logits)
    assert found.attention[0].shape == (2, 4, 4) and found.attention[0][0].sum() == pytest.approx(4)
    with pytest.raises(Unsupported):
        backend.grammar("root ::= [a-z]")
