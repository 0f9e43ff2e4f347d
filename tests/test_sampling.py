"""chat/sampling.py against the engine's own samplers, on real logits."""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import backends, engine
from llmkit.chat import sampling
from llmkit.chat.sampling import Candidates, Sampling
from llmkit.errors import Unsupported

FRANCE = [504, 3575, 282, 4649, 314]
OFF = Sampling(temperature=1, top_k=0, top_p=1, min_p=0, repeat_penalty=1)
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


@pytest.fixture(scope="module")
def rows(smollm2_gguf: Path) -> Iterator[list[np.ndarray]]:
    """Real logits: one certain distribution, some flat ones."""
    backend = backends.load(smollm2_gguf, n_threads=1)
    session = backend.session(64, inspect=True)
    yield list(session.eval(FRANCE, logits="all").logits)
    backend.close()


def engines_answer(row: np.ndarray, samplers: list[Any]) -> dict[int, float]:
    """Token → probability after the engine's samplers have been applied in turn."""
    llama = engine.load().llama
    data = np.zeros(len(row), _TOKEN_DATA)
    data["id"], data["logit"] = np.arange(len(row)), row
    current = llama.llama_token_data_array(
        data=data.ctypes.data_as(llama.llama_token_data_p), size=len(data), selected=-1, sorted=False
    )
    for sampler in samplers:
        llama.llama_sampler_apply(sampler, C.byref(current))
        llama.llama_sampler_free(sampler)
    address = C.addressof(current.data.contents)
    view = np.frombuffer((C.c_char * (_TOKEN_DATA.itemsize * current.size)).from_address(address), _TOKEN_DATA)
    powers = np.exp(view["logit"].astype(np.float64) - view["logit"].max())
    return dict(zip(view["id"].tolist(), (powers / powers.sum()).tolist(), strict=True))


def penalties(row: np.ndarray, history: list[int], last_n: int, repeat: float) -> Any:
    llama = engine.load().llama
    sampler = llama.llama_sampler_init_penalties(len(row), last_n, repeat, 0.0, 0.0)
    for token in history:
        llama.llama_sampler_accept(sampler, token)
    return sampler


def ours(row: np.ndarray, wanted: Sampling, history: list[int] | None = None) -> dict[int, float]:
    left = sampling.survivors(row, history or [], wanted)
    return dict(zip(left.ids.tolist(), left.probabilities.tolist(), strict=True))


def assert_same(found: dict[int, float], expected: dict[int, float]) -> None:
    assert set(found) == set(expected)
    assert max(abs(found[token] - expected[token]) for token in expected) < 1e-5


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("k", [1, 2, 40, 5000, 100_000])
def test_top_k(rows: list[np.ndarray], position: int, k: int) -> None:
    row = rows[position]
    llama = engine.load().llama
    assert_same(ours(row, replace(OFF, top_k=k)), engines_answer(row, [llama.llama_sampler_init_top_k(k)]))


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.95, 0.999])
def test_top_p(rows: list[np.ndarray], position: int, p: float) -> None:
    row = rows[position]
    llama = engine.load().llama
    chain = [llama.llama_sampler_init_top_k(200), llama.llama_sampler_init_top_p(p, 1)]
    assert_same(ours(row, replace(OFF, top_k=200, top_p=p)), engines_answer(row, chain))


@pytest.mark.parametrize("p", [0.5, 0.95, 0.999])
def test_top_p_of_the_whole_vocabulary(rows: list[np.ndarray], p: float) -> None:
    """The engine adds up 49152 probabilities in single precision: the border may lie a ten-thousandth off."""
    llama = engine.load().llama
    for row in rows:
        found = ours(row, replace(OFF, top_p=p))
        expected = engines_answer(row, [llama.llama_sampler_init_top_p(p, 1)])
        mine, theirs = set(found), set(expected)
        assert mine <= theirs or theirs <= mine
        assert sum(found.get(token, 0.0) + expected.get(token, 0.0) for token in mine ^ theirs) < 1e-3
        raw = sampling.softmax(row.astype(np.float64))
        assert raw[list(mine)].sum() >= p > raw[list(mine)].sum() - raw[list(mine)].min()


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("p", [0.001, 0.05, 0.3, 1.0])
def test_min_p(rows: list[np.ndarray], position: int, p: float) -> None:
    row = rows[position]
    llama = engine.load().llama
    assert_same(ours(row, replace(OFF, min_p=p)), engines_answer(row, [llama.llama_sampler_init_min_p(p, 1)]))


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.5, 10.0])
def test_temperature(rows: list[np.ndarray], position: int, temperature: float) -> None:
    row = rows[position]
    expected = engines_answer(row, [engine.load().llama.llama_sampler_init_temp(temperature)])
    assert_same(ours(row, replace(OFF, temperature=temperature)), expected)


@pytest.mark.parametrize("last_n", [0, 3, 64])
@pytest.mark.parametrize("repeat", [0.5, 1.0, 1.1, 2.0])
def test_repeat_penalty(rows: list[np.ndarray], last_n: int, repeat: float) -> None:
    history = [7042, 260, 7042, *FRANCE, 12]
    for row in rows:
        expected = engines_answer(row, [penalties(row, history, last_n, repeat)])
        found = ours(row, replace(OFF, repeat_penalty=repeat, repeat_last_n=last_n), history)
        assert_same(found, expected)


@pytest.mark.parametrize("temperature", [0.2, 0.8, 1.5])
def test_all_stages_in_the_engines_order(rows: list[np.ndarray], temperature: float) -> None:
    llama = engine.load().llama
    wanted = Sampling(temperature, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.1, repeat_last_n=64)
    for row in rows:
        chain = [
            penalties(row, FRANCE, 64, 1.1),
            llama.llama_sampler_init_top_k(40),
            llama.llama_sampler_init_top_p(0.95, 1),
            llama.llama_sampler_init_min_p(0.05, 1),
            llama.llama_sampler_init_temp(temperature),
        ]
        assert_same(ours(row, wanted, FRANCE), engines_answer(row, chain))


def test_the_trace_of_the_capital_of_france(rows: list[np.ndarray]) -> None:
    """The golden chain (without typical, which we do not have): sizes and the probability of ' Paris' after each."""
    wanted = Sampling(1.5, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.1)
    stages = list(sampling.trace(rows[-1], FRANCE, wanted))
    assert [name for name, _ in stages] == ["raw", "repeat_penalty", "top_k", "top_p", "min_p", "temperature"]
    sizes = [len(left.ids) for _, left in stages]
    assert sizes[:3] == [49152, 49152, 40] and sizes[-2:] == [2, 2]
    chances = [float(left.probabilities[left.ids == 7042][0]) for _, left in stages]
    assert chances[:3] == pytest.approx([0.7677, 0.7712, 0.8142], abs=1e-3)
    assert chances[-2:] == pytest.approx([0.9269, 0.8447], abs=1e-3)


def test_temperature_zero_takes_the_most_likely(rows: list[np.ndarray]) -> None:
    for row in rows:
        assert ours(row, Sampling(temperature=0)) == {int(row.argmax()): 1.0}


def test_equal_logits_keep_the_lower_ids() -> None:
    left = sampling.top_k(Candidates(np.arange(6), np.array([1.0, 2.0, 2.0, 2.0, 0.0, 2.0])), 3)
    assert left.ids.tolist() == [1, 2, 3]
    assert sampling.top_k(left, 0).ids.tolist() == [1, 2, 3]


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws: 7 degrees of freedom, 24.3 is passed by chance once in 1,000."""
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    candidates = Candidates(np.arange(100, 108), np.log(probabilities))
    random, count = sampling.generator(11, 0), 20_000
    drawn = np.bincount([sampling.draw(candidates, random) - 100 for _ in range(count)], minlength=8)
    expected = probabilities * count
    assert ((drawn - expected) ** 2 / expected).sum() < 24.3


def test_the_same_seed_and_turn_give_the_same_numbers() -> None:
    def numbers(seed: int, turn: int) -> list[float]:
        return [float(value) for value in sampling.generator(seed, turn).random(4)]

    assert numbers(5, 0) == numbers(5, 0)
    assert numbers(5, 0) != numbers(5, 1)
    assert numbers(5, 0) != numbers(6, 0)
    # written down, so that a seed means the same on every machine and with every numpy
    assert numbers(7, 0) == pytest.approx(NUMBERS_OF_SEED_7, abs=1e-12)


NUMBERS_OF_SEED_7 = [0.625095466604667, 0.8972138009695755, 0.7756856902451935, 0.22520718999059186]


def test_entropy_in_bits() -> None:
    assert sampling.entropy(sampling.log_softmax(np.zeros(8, np.float32))) == pytest.approx(3)
    certain = np.full(8, -np.inf, np.float32)
    certain[2] = 0
    assert sampling.entropy(sampling.log_softmax(certain)) == 0


def test_log_softmax_equals_torch(rows: list[np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.log_softmax(torch.tensor(rows[-1]).double(), 0).numpy()
    np.testing.assert_allclose(sampling.log_softmax(rows[-1]), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -1),
        ("seed", -1),
        ("max_tokens", 0),
    ],
)
def test_values_that_mean_nothing_are_named(field: str, value: Any) -> None:
    with pytest.raises(Unsupported, match=field.replace("_", "-")):
        replace(Sampling(), **{field: value})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=60),
    st.floats(0, 3),
    st.integers(0, 70),
    st.floats(0.001, 1),
    st.floats(0, 1),
    st.floats(0.5, 2),
    st.integers(0, 2**32),
)
def test_something_is_always_left_to_draw(
    logits: list[float], temperature: float, k: int, p: float, least: float, repeat: float, seed: int
) -> None:
    row = np.array(logits, np.float32)
    wanted = Sampling(temperature, k, p, least, repeat)
    left = sampling.survivors(row, list(range(0, len(row), 2)), wanted)
    assert len(left.ids) == len(set(left.ids.tolist())) >= 1
    assert sampling.draw(left, sampling.generator(seed, 0)) in left.ids
