"""chat/samplers.py and chat/repetition.py against the engine's own samplers and plain definitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine_samplers
from engine_samplers import as_map, assert_same
from llmkit import backends, engine
from llmkit.backends import Backend
from llmkit.chat import repetition, samplers
from llmkit.chat.sampling import ORDER, Candidates, Sampler, Sampling, Stage, everything, softmax

FRANCE = [504, 3575, 282, 4649, 314]
OFF = Sampling(temperature=1, top_k=0, top_p=1, min_p=0)
SHUFFLED = [  # orders that are not llama.cpp's
    ("temperature", "top_k", "typical_p", "top_p", "min_p"),
    ("top_k", "penalties", "temperature", "min_p", "top_p", "top_n_sigma", "logit_bias"),
    ("min_p", "typical_p", "dry", "temperature", "penalties", "top_p", "top_k"),
    ("top_n_sigma", "min_p", "xtc", "logit_bias", "temperature", "dry", "typical_p"),
    tuple(reversed(ORDER)),
]


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[Any]:
    backend = backends.load(smollm2_gguf, n_threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def rows(smol: Backend) -> list[np.ndarray]:
    """Real logits: one certain distribution, some flat ones."""
    return list(smol.session(64, inspect=True).eval(FRANCE, logits="all").logits)


@pytest.fixture(scope="module")
def vocab(smol: Any) -> Any:
    return engine.load().llama.llama_model_get_vocab(smol.model)


def random_rows(count: int, n_vocab: int) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [(random.standard_normal(n_vocab) * random.uniform(0.5, 5)).astype(np.float32) for _ in range(count)]


def ours(row: np.ndarray, wanted: Sampling, history: list[int], backend: Any) -> dict[int, float]:
    """What is left after all stages, by choose()'s own way and by the trace, which must agree."""
    sampler = Sampler(wanted, backend=backend, seed=1)
    traced = sampler.trace(row, history)[-1].candidates
    quick = sampler.survivors(row, history)
    sampler.close()
    np.testing.assert_array_equal(quick.ids, traced.ids)
    np.testing.assert_array_equal(quick.logits, traced.logits)
    return as_map(traced)


ALONE: dict[str, list[dict[str, Any]]] = {
    "top_k": [dict(top_k=k) for k in (1, 2, 40, 300, 5000, 100_000)],
    "top_p": [dict(top_k=200, top_p=p) for p in (0.01, 0.5, 0.9, 0.95, 0.999)],
    "min_p": [dict(min_p=p) for p in (0.001, 0.05, 0.3, 1.0)],
    "typical_p": [dict(top_k=300, typical_p=p) for p in (0.05, 0.2, 0.5, 0.9, 0.95)],
    "top_n_sigma": [dict(top_k=200, top_n_sigma=n) for n in (0.1, 1.0, 2.0, 5.0)],
    "temperature": [dict(temperature=t) for t in (0.0, 0.1, 0.7, 1.5, 10.0)],
    "xtc": [dict(xtc_probability=1.0, xtc_threshold=t) for t in (0.001, 0.01, 0.1, 0.3, 0.5, 0.6)],
    "repeat": [dict(repeat_penalty=r, repeat_last_n=n) for r in (0.5, 1.1, 2.0) for n in (0, 3, 64, -1)],
    "frequency": [dict(frequency_penalty=f, presence_penalty=p) for f, p in ((0.5, 0), (0, 1.5), (-1, 0.3))],
    "logit_bias": [
        dict(logit_bias=((7042, -5.0), (260, 3.5), (0, 0.25))),
        dict(logit_bias=((7042, float("-inf")),)),
        dict(logit_bias=((7042, 1.0), (7042, 1.0))),
        dict(top_k=10, logit_bias=((7042, -5.0), (11, 2.0)), order=("top_k", "logit_bias")),
    ],
}


@pytest.mark.parametrize(
    "setting", [pytest.param(values, id=f"{name}-{i}") for name, all in ALONE.items() for i, values in enumerate(all)]
)
def test_each_stage_alone_on_real_logits(rows: list[np.ndarray], smol: Any, setting: dict[str, Any]) -> None:
    wanted, history = replace(OFF, **setting), [7042, 260, 7042, *FRANCE, 12, 7042]
    for row in rows:
        expected = engine_samplers.apply(row, engine_samplers.chain(wanted, len(row), history))
        assert_same(ours(row, wanted, history, smol), expected)


@pytest.mark.parametrize(
    "setting",
    [dict(top_p=p) for p in (0.5, 0.9, 0.95, 0.999)]
    + [dict(top_n_sigma=n) for n in (1.0, 5.0)]
    + [dict(mirostat=2, mirostat_tau=8.0)],
    ids=str,
)
def test_sums_over_the_whole_vocabulary(rows: list[np.ndarray], smol: Any, setting: dict[str, Any]) -> None:
    wanted = replace(OFF, **setting)
    for row in rows:
        chain = engine_samplers.chain(wanted, len(row), [])
        if wanted.mirostat:
            chain = [engine.load().llama.llama_sampler_init_mirostat_v2(1, 8.0, 0.1)]
        assert_nearly(ours(row, wanted, [], smol), engine_samplers.apply(row, chain))


def assert_nearly(found: dict[int, float], expected: dict[int, float]) -> None:
    """The engine adds up 49152 numbers in single precision: the border may lie off by a thousandth."""
    odd = found.keys() ^ expected.keys()
    assert sum(found.get(token, 0.0) + expected.get(token, 0.0) for token in odd) < 1e-3
    assert odd < found.keys() or odd < expected.keys() or not odd
    for each in (found, expected):
        rest = sum(p for token, p in each.items() if token not in odd)
        each.update({token: p / rest for token, p in each.items()})
    assert_same({token: found[token] for token in found.keys() - odd}, {t: expected[t] for t in expected.keys() - odd})


CHAINS = [
    dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.1),
    dict(temperature=1.5, top_k=100, top_p=0.9, min_p=0.02, typical_p=0.9, frequency_penalty=0.2),
    dict(temperature=0.3, top_k=7, top_p=0.99, min_p=0.001, top_n_sigma=1.5, presence_penalty=0.5),
    dict(temperature=1.2, top_k=0, top_p=0.7, min_p=0.1, xtc_probability=1.0, xtc_threshold=0.1),
    dict(temperature=2.0, top_k=20, typical_p=0.5, logit_bias=((5, 4.0), (9, -3.0)), dry_multiplier=0.8),
    dict(temperature=0.0, top_k=40, repeat_penalty=1.3),
]


@pytest.mark.parametrize("order", [ORDER, *SHUFFLED], ids=range(1 + len(SHUFFLED)))
@pytest.mark.parametrize("values", CHAINS, ids=range(len(CHAINS)))
def test_whole_chains_in_several_orders(
    rows: list[np.ndarray], smol: Any, vocab: Any, values: dict[str, Any], order: tuple[str, ...]
) -> None:
    wanted, history = Sampling(**{**values, "order": order}), [5, 9, 5, 9, 260, 5, 9, *FRANCE, 260, 5, 9]
    for row in [*rows, *random_rows(3, 49152)]:
        found = ours(row, wanted, history, smol)
        expected = engine_samplers.apply(row, engine_samplers.chain(wanted, len(row), history, vocab))
        added_up = sums(Sampler(wanted, backend=smol, seed=1).trace(row, history))
        if added_up.get("typical_p", 0) > 300:
            continue  # in single precision the entropy is off by too much: see test_typical_p_by_definition
        (assert_nearly if max(added_up.values(), default=0) > 300 else assert_same)(found, expected)


def sums(stages: list[Stage]) -> dict[str, int]:
    """How many candidates the stages that add up probabilities got."""
    pairs = zip(stages, stages[1:], strict=False)
    adding = ("top_p", "typical_p", "top_n_sigma", "xtc")
    return {after.name: len(before.candidates.ids) for before, after in pairs if after.name in adding}


def test_the_golden_chain(rows: list[np.ndarray], smol: Any) -> None:
    """Measured with the engine: sizes and the probability of ' Paris' after each stage."""
    wanted = Sampling(temperature=1.5, top_k=40, typical_p=0.9, top_p=0.95, min_p=0.05, repeat_penalty=1.1)
    stages = Sampler(wanted, backend=smol, seed=7).trace(rows[-1], FRANCE)
    assert [each.name for each in stages] == [
        "raw", "penalties", "top_k", "typical_p", "top_p", "min_p", "temperature",
    ]  # fmt: skip
    assert [len(each.candidates.ids) for each in stages] == [49152, 49152, 40, 4, 2, 2, 2]
    paris = [float(c.probabilities[c.ids == 7042][0]) for c in (each.candidates for each in stages)]
    assert paris == pytest.approx([0.7677, 0.7712, 0.8142, 0.9010, 0.9269, 0.9269, 0.8447], abs=1e-3)
    last = stages[-1].candidates
    assert float(last.probabilities[last.ids == 260][0]) == pytest.approx(0.1553, abs=1e-3)


# ── grammar, mirostat ──

JSON = 'root ::= "{" ws "\\"" [a-z]+ "\\":" ws ("true" | "false" | [0-9]+) "}"\nws ::= [ \\n]*'


@pytest.mark.parametrize(
    "values",
    [
        dict(),
        dict(top_k=3),
        dict(top_k=0, min_p=0.01, top_p=1.0),
        dict(temperature=0.0),
        dict(repeat_penalty=1.3, top_k=5),
        dict(temperature=0.0, repeat_penalty=1.3, order=("grammar", "penalties", "top_k", "temperature")),
        dict(temperature=0.0, repeat_penalty=9.0, order=("grammar", "top_k", "penalties", "temperature")),
        dict(order=("top_k", "temperature", "grammar"), top_k=49152),
    ],
    ids=range(8),
)
def test_a_grammar_cuts_like_the_engines(smol: Any, vocab: Any, rows: list[np.ndarray], values: dict[str, Any]) -> None:
    wanted = replace(Sampling(grammar=JSON), **values)
    history = [*FRANCE, *smol.encode('{"{" {')]
    for row in rows:
        expected = engine_samplers.apply(row, engine_samplers.chain(wanted, len(row), history, vocab))
        assert_same(ours(row, wanted, history, smol), expected)


@pytest.mark.parametrize("tau", [0.5, 2.0, 4.0])
def test_mirostat_leaves_what_the_engine_draws_from(rows: list[np.ndarray], smol: Any, tau: float) -> None:
    """Its first draw is from tokens of a surprise of at most 2·tau; the engine selects among the same ones."""
    llama, wanted = engine.load().llama, Sampling(temperature=0.9, mirostat=2, mirostat_tau=tau)
    for row in rows:
        pair = [llama.llama_sampler_init_temp(0.9), llama.llama_sampler_init_mirostat_v2(5, tau, 0.1)]
        expected, selected = engine_samplers.applied(row, pair)
        assert_same(ours(row, wanted, [], smol), expected)
        assert selected in expected


def test_mirostat_learns_as_the_engine_does(smol: Any, rows: list[np.ndarray]) -> None:
    """mu moves by eta · (surprise - tau) with each draw; what is then left is what the engine leaves."""
    llama = engine.load().llama
    theirs = llama.llama_sampler_init_mirostat_v2(5, 2.0, 0.8)
    sampler = Sampler(Sampling(temperature=1, mirostat=2, mirostat_tau=2, mirostat_eta=0.8), backend=smol, seed=5)
    for row in rows * 3:
        expected, selected = engine_samplers.applied(row, [llama.llama_sampler_clone(theirs)])
        current = sampler.trace(row, [])[-1].candidates
        assert_same(as_map(current), expected)
        assert selected is not None
        llama_draw(theirs, row)
        sampler.accept(selected, expected[selected])
    llama.llama_sampler_free(theirs)


def llama_draw(sampler: Any, row: np.ndarray) -> None:
    """Apply without freeing, so that the engine's mirostat learns."""
    import ctypes as C

    llama = engine.load().llama
    data = (llama.llama_token_data * len(row))()
    view = np.frombuffer(data, engine_samplers._TOKEN_DATA)
    view["id"], view["logit"] = np.arange(len(row)), row
    array = llama.llama_token_data_array(data=data, size=len(row), selected=-1, sorted=False)
    llama.llama_sampler_apply(sampler, C.byref(array))


# ── DRY ──

TEXTS = [
    "the cat sat on the mat and the cat sat on the",
    "a: b\na: b\na: b\na:",
    "one two three four. one two three four. one two three",
    '"yes" "yes" "yes" "yes" "yes" "yes" "yes" "yes" "yes"',
    "x x x x x x x x x x x x x x x x",
    "nothing is said twice here",
]


@pytest.mark.parametrize("breakers", [("\n", ":", '"', "*"), (), (" sat",), ("t on", " two three four", "s\nx")])
@pytest.mark.parametrize(
    "values",
    [
        dict(dry_multiplier=0.8),
        dict(dry_multiplier=2.0, dry_base=1.1, dry_allowed_length=1, dry_last_n=8),
        dict(dry_multiplier=1.0, dry_base=1.0, dry_allowed_length=0),
        dict(dry_multiplier=0.5, dry_base=4.0, dry_allowed_length=4, dry_last_n=0),
    ],
    ids=range(4),
)
def test_dry(smol: Any, vocab: Any, rows: list[np.ndarray], values: dict[str, Any], breakers: tuple[str, ...]) -> None:
    wanted, changed = replace(OFF, **values, dry_breakers=breakers), 0
    for text in TEXTS:
        history = smol.encode(text)
        expected = engine_samplers.apply(rows[-1], engine_samplers.chain(wanted, len(rows[-1]), history, vocab))
        found = ours(rows[-1], wanted, history, smol)
        assert_same(found, expected, 1e-6)
        changed += found != ours(rows[-1], OFF, history, smol)
    assert changed or values.get("dry_last_n") == 0  # else nothing was tested


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 4), st.integers(-1, 40), st.integers(0, 5))
def test_the_lengths_of_repetitions(history: list[int], allowed: int, last_n: int, breaker: int) -> None:
    """Against counting token by token."""
    broken = repetition.Breakers({breaker: ((),)}, np.array([breaker]))
    row = everything(np.zeros(6, np.float32))
    found = repetition.dry(row, history, broken, last_n=last_n, multiplier=1.0, base=1.5, allowed_length=allowed)
    window = history if last_n < 0 else history[len(history) - last_n :] if last_n < len(history) else history
    limit = window[::-1].index(breaker) if breaker in window else len(window)
    longest: dict[int, int] = {}
    for end in range(len(window) - 1):
        length = 0
        while length <= end and window[end - length] == window[-1 - length] and length < limit:
            length += 1
        if length >= allowed and window[end + 1] != breaker:
            longest[window[end + 1]] = max(longest.get(window[end + 1], 0), length)
    if len(window) <= allowed or limit < allowed:
        longest = {}
    expected = np.array([-(1.5 ** (longest[t] - allowed)) if t in longest else 0.0 for t in range(6)])
    np.testing.assert_allclose(found.logits, expected, rtol=1e-6)


# ── shortcuts give what the definitions give ──


def adversarial() -> dict[str, np.ndarray]:
    random = np.random.default_rng(8)
    n = 5000
    spiky = np.full(n, -np.inf, np.float32)
    spiky[[4000, 17, 18]] = 1.0, 0.5, 0.5
    few = random.standard_normal(n).astype(np.float32)
    few[[3, 4999]] = 60, 45
    return {
        "equal": np.zeros(n, np.float32),
        "ties": random.integers(-3, 3, n).astype(np.float32),
        "masked": spiky,
        "huge": (random.standard_normal(n) * 1e30).astype(np.float32),
        "two": few,
        "flat": (random.standard_normal(n) * 1e-3).astype(np.float32),
        "wide": np.linspace(-300, 300, n, dtype=np.float32)[::-1].copy(),
        "small": np.array([1, 3, 2], np.float32),
        "one": np.array([-7], np.float32),
    }


@pytest.mark.parametrize("name", adversarial())
def test_top_k_and_top_p_by_definition(name: str) -> None:
    row = adversarial()[name]
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    possible = [i for i in order if row[i] > -np.inf]
    for k in (1, 2, 40, 300, 4999, 5000, 9000):
        assert samplers.top_k(everything(row), k).ids.tolist() == possible[:k]
        if k < 300:
            assert samplers.largest(row, k).tolist() == possible[:k]
    probabilities = softmax(row.astype(np.float64))[order]
    for p in (0.001, 0.3, 0.5, 0.95, 0.9999):
        left = samplers.top_p(everything(row), p).ids.tolist()
        assert left == order[: len(left)]
        together = probabilities[: len(left)].sum()
        assert together >= p - 1e-6 and together - probabilities[len(left) - 1] < p + 1e-6


@pytest.mark.parametrize("name", ["ties", "two", "flat", "wide", "small", "one"])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_typical_p_by_definition(name: str, p: float) -> None:
    row = adversarial()[name]
    probabilities = softmax(row.astype(np.float64))
    surprise = -np.log(np.maximum(probabilities, 1e-300))
    distance = np.abs(surprise - (probabilities * surprise).sum())
    kept = samplers.typical_p(everything(row), p).ids
    dropped = np.setdiff1d(np.arange(len(row)), kept)
    assert probabilities[kept].sum() > p - 1e-9
    assert probabilities[kept].sum() - probabilities[kept[-1]] <= p + 1e-9
    if len(dropped):
        assert distance[kept].max() <= distance[dropped].min() + 1e-6


@pytest.mark.parametrize("name", adversarial())
def test_every_stage_survives_every_row(name: str, smol: Any) -> None:
    row = adversarial()[name]
    for stage in (
        dict(top_k=40), dict(top_p=0.9), dict(min_p=0.1), dict(typical_p=0.5), dict(top_n_sigma=1.0),
        dict(xtc_probability=1.0, xtc_threshold=0.2), dict(temperature=1e-9), dict(temperature=0),
        dict(mirostat=2, mirostat_tau=0.1), dict(repeat_penalty=2.0), dict(logit_bias=((0, 3.0),)),
    ):  # fmt: skip
        wanted = replace(OFF, **stage)
        sampler = Sampler(wanted, backend=smol, seed=1)
        choice = sampler.choose(row, [0, 0])
        assert row[choice.token] > -np.inf and 0 < choice.probability <= 1


def test_equal_logits_keep_the_lower_ids() -> None:
    row = np.array([1.0, 2.0, 2.0, 2.0, 0.0, 2.0], np.float32)
    left = samplers.top_k(everything(row), 3)
    assert left.ids.tolist() == [1, 2, 3]
    mixed = Candidates(np.array([9, 4, 7]), np.array([1.0, 1.0, 2.0], np.float32))
    assert samplers.top_k(mixed, 2).ids.tolist() == [7, 4]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=60),
    st.fixed_dictionaries(
        dict(
            temperature=st.floats(0, 3), top_k=st.integers(0, 70), top_p=st.floats(0.001, 1), min_p=st.floats(0, 1),
            typical_p=st.floats(0.001, 1), top_n_sigma=st.floats(0, 4), xtc_probability=st.floats(0, 1),
            xtc_threshold=st.floats(0, 1), repeat_penalty=st.floats(0.5, 2), frequency_penalty=st.floats(-2, 2),
            presence_penalty=st.floats(-2, 2), repeat_last_n=st.integers(-1, 20), mirostat=st.sampled_from([0, 2]),
            order=st.permutations(ORDER).map(tuple), seed=st.integers(0, 2**32),
        )
    ),
)  # fmt: skip
def test_something_is_always_left_to_draw(smol: Any, logits: list[float], values: dict[str, Any]) -> None:
    row, history = np.array(logits, np.float32), list(range(0, len(logits), 2))
    sampler = Sampler(Sampling(**values), backend=smol, seed=values["seed"])
    left = sampler.trace(row, history)[-1].candidates
    assert len(left.ids) == len(set(left.ids.tolist())) >= 1
    choice = sampler.choose(row, history)
    place = left.ids.tolist().index(choice.token)
    assert choice.probability == pytest.approx(float(left.probabilities[place])) and choice.probability > 0
