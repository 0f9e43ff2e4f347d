"""inspection/temperature.py on real logits of SmolLM2, against the sampler, plain definitions and known values."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llmkit.backends import Backend
from llmkit.chat.sampling import Sampler, Sampling
from llmkit.cli import output
from llmkit.errors import LlmkitError, Unsupported
from llmkit.inspection import chance, temperature
from llmkit.inspection.temperature import Place

FRANCE = [504, 3575, 282, 4649, 314]
PARIS, THE = 7042, 260
GOLDEN = Sampling(temperature=1.5, top_k=40, typical_p=0.9, top_p=0.95, min_p=0.05, repeat_penalty=1.1)


@pytest.fixture(scope="module")
def france(smol: Backend) -> Place:
    return temperature.at(smol, FRANCE)


@pytest.fixture(scope="module")
def open_end(smol: Backend) -> Place:
    """A flat distribution: anything may follow."""
    return temperature.at(smol, smol.encode("Once upon a time, there was a"))


def test_the_logits_are_those_after_the_position(smol: Backend) -> None:
    session = smol.session(64)
    rows = session.eval(FRANCE, logits="all").logits
    for position in (0, 2, 4, -1, -3):
        place = temperature.at(smol, FRANCE, position)
        assert place.position == position % 5 and place.history == tuple(FRANCE[: place.position + 1])
        assert int(place.logits.argmax()) == int(rows[place.position].argmax())
    session.close()


@pytest.mark.parametrize("position", [5, -6, 99])
def test_positions_outside_the_text_are_named(smol: Backend, position: int) -> None:
    with pytest.raises(LlmkitError, match=f"position {position} is outside the text, which has 5 tokens"):
        temperature.at(smol, FRANCE, position)
    with pytest.raises(LlmkitError, match="0 tokens"):
        temperature.at(smol, [], None)


def test_the_trace_shows_what_each_stage_left_and_removed(france: Place) -> None:
    found = temperature.trace(france, GOLDEN, tokens=[PARIS, THE, 4528, 11], top=3)
    assert [stage.name for stage in found.stages] == [
        "raw", "penalties", "top_k", "typical_p", "top_p", "min_p", "temperature",
    ]  # fmt: skip
    for before, after in zip(found.stages, found.stages[1:], strict=False):
        assert after.removed_count == before.survivors - after.survivors
        assert (after.removed_mass > 0) == (after.removed_count > 0) == bool(after.removed)
        assert sum(each.probability for each in after.removed) <= after.removed_mass + 1e-9
        assert [each.probability for each in after.top] == sorted((e.probability for e in after.top), reverse=True)
    assert found.stages[0].top[0].id == PARIS and found.stages[0].top[0].piece == "␣Paris"
    paris, the, london, comma = found.fates
    assert paris.rank == 1 and paris.removed_by is None and paris.sampled_probability == paris.path[-1] > 0.8
    assert the.removed_by is None and paris.sampled_probability + the.sampled_probability == pytest.approx(1)
    assert london.removed_by == "top_p" and london.path[3] > 0 == london.path[4] == london.sampled_probability
    assert comma.removed_by == "top_k" and comma.path[1] > 0 == comma.path[2]
    assert found.sampled_entropy < found.raw_entropy
    with pytest.raises(Unsupported, match="token 49152"):
        temperature.trace(france, GOLDEN, tokens=[49152])


def test_the_trace_is_json(france: Place) -> None:
    plain = output.plain(temperature.trace(france, GOLDEN, tokens=[PARIS]))
    assert plain["stages"][2]["name"] == "top_k" and plain["fates"][0]["removed_by"] is None
    assert isinstance(plain["stages"][0]["top"][0]["piece"], str)


def test_the_grid_cools_and_heats(open_end: Place) -> None:
    uncut = replace(GOLDEN, top_k=0, typical_p=1, top_p=1, min_p=0, repeat_penalty=1)
    grid = temperature.grid(open_end, uncut, (0, 0.5, 1, 2), top=4)
    assert [row.temperature for row in grid.rows] == [0, 0.5, 1, 2]
    assert grid.rows[0].sampled == (1, 0, 0, 0) and grid.rows[0].entropy == 0
    entropies = [row.entropy for row in grid.rows]
    assert entropies == sorted(entropies)
    raw = [each.probability for each in grid.tokens]
    assert grid.rows[2].sampled == pytest.approx(raw) == grid.rows[2].uncut
    cold = np.array(raw) ** 2  # softmax(x / 0.5) goes with the square
    assert np.array(grid.rows[1].sampled) / grid.rows[1].sampled[0] == pytest.approx(cold / cold[0], rel=1e-5)


def test_stages_before_temperature_hide_it(open_end: Place) -> None:
    """llama.cpp cuts first: which tokens are left does not depend on the temperature, unless it comes first."""
    late = temperature.grid(open_end, Sampling(), (0.5, 1, 2))
    assert len({row.survivors[-1][1] for row in late.rows}) == 1
    early = Sampling(order=("temperature", "top_k", "top_p", "min_p"))
    counts = [row.survivors[-1][1] for row in temperature.grid(open_end, early, (0.5, 1, 2)).rows]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_softmax_with_its_numbers(france: Place) -> None:
    shown = temperature.numbers(france, 0.7, top=3)
    x = france.logits.astype(np.float64) / 0.7
    assert shown.count == 49152 and shown.maximum == pytest.approx(x.max())
    assert shown.total == pytest.approx(np.exp(x - x.max()).sum())
    assert shown.naive_total == pytest.approx(math.exp(shown.maximum) * shown.total, rel=1e-3)
    first, second, _ = shown.rows
    assert first.id == PARIS and first.shifted == 0 and first.power == 1
    assert second.power == pytest.approx(math.exp(second.divided - shown.maximum))
    assert second.probability == pytest.approx(second.power / shown.total)
    assert temperature.numbers(france, 0.1).naive_total == math.inf  # why the maximum is taken off
    with pytest.raises(Unsupported, match="softmax divides by it"):
        temperature.numbers(france, 0)


# ── draws against the probabilities shown ──


@pytest.mark.parametrize("warmth", [0.7, 1.3])
@pytest.mark.parametrize("cut", [True, False], ids=["default stages", "uncut"])
def test_ten_thousand_sampled_tokens_match_the_probabilities_shown(
    open_end: Place, smol: Backend, warmth: float, cut: bool
) -> None:
    """The sampler of a chat, 10,000 times at one position, against what the trace shows."""
    wanted = Sampling(temperature=warmth) if cut else Sampling(temperature=warmth, top_k=0, top_p=1, min_p=0)
    sampler = Sampler(wanted, backend=smol, seed=2026)
    history = list(open_end.history)
    counted = np.zeros(49152, np.int64)
    shown = temperature.sampled(open_end, wanted)
    for _ in range(10_000 if cut else 2_000):
        choice = sampler.choose(open_end.logits, history)
        counted[choice.token] += 1
        assert choice.probability == pytest.approx(shown[choice.token], rel=1e-9)
    statistic, degrees = temperature.chi_square(counted, shown)
    assert degrees > 5
    assert chance.chi_square_p(statistic, degrees) > 0.01
    # and the test would notice: other temperatures do not fit
    wrong = temperature.sampled(open_end, replace(wanted, temperature=warmth * 1.3))
    assert chance.chi_square_p(*temperature.chi_square(counted, wrong)) < 1e-4


def test_sampling_many_times(open_end: Place, smol: Backend) -> None:
    for wanted in (Sampling(), Sampling(temperature=1.3), Sampling(xtc_probability=0.4, xtc_threshold=0.05)):
        draws = temperature.sample_many(open_end, wanted, 20_000, seed=5)
        assert draws == temperature.sample_many(open_end, wanted, 20_000, seed=5)
        assert draws.p_value > 0.01 and draws.degrees > 3
        assert sum(row.counted for row in draws.rows) <= 20_000
        assert all(row.expected == pytest.approx(20_000 * row.sampled_probability) for row in draws.rows)
    single = temperature.sample_many(open_end, Sampling(temperature=0), 50)
    assert (single.rows[0].counted, single.degrees, single.p_value) == (50, 0, 1.0)
    # one draw is the sampler's own first draw
    choice = Sampler(Sampling(), backend=smol, seed=5).choose(open_end.logits, open_end.history)
    assert [row.id for row in temperature.sample_many(open_end, Sampling(), 1, seed=5, top=40).rows if row.counted] == [
        choice.token
    ]
    with pytest.raises(Unsupported, match="0 draws"):
        temperature.sample_many(open_end, Sampling(), 0)


def test_a_token_that_cannot_come_does_not_fit() -> None:
    assert temperature.chi_square(np.array([5, 1]), np.array([1.0, 0.0])) == (math.inf, 0)
    assert chance.chi_square_p(math.inf, 0) == 0


def test_rare_tokens_are_one_cell() -> None:
    counted, probabilities = np.array([50, 48, 1, 1]), np.array([0.5, 0.46, 0.02, 0.02])
    statistic, degrees = temperature.chi_square(counted, probabilities)
    assert degrees == 2
    assert statistic == pytest.approx(0 + 4 / 46 + 4 / 4)


# ── chance ──


@pytest.mark.parametrize(
    ("statistic", "degrees", "p"),
    [
        (3.841458820694124, 1, 0.05),
        (6.634896601021213, 1, 0.01),
        (18.307038053275146, 10, 0.05),
        (24.32188634855, 7, 0.001),
        (124.3421134004, 100, 0.05),
        (2 * math.log(2), 2, 0.5),
        (1e-8, 3, 1.0),
        (0.0, 5, 1.0),
    ],
)
def test_chi_square_by_published_critical_values(statistic: float, degrees: int, p: float) -> None:
    assert chance.chi_square_p(statistic, degrees) == pytest.approx(p, rel=1e-6)


def test_upper_gamma_by_closed_forms() -> None:
    for x in (0.01, 0.5, 1.0, 3.0, 10.0, 50.0, 300.0):
        assert chance.upper_gamma(1, x) == pytest.approx(math.exp(-x), rel=1e-10, abs=1e-15)
        assert chance.upper_gamma(0.5, x) == pytest.approx(math.erfc(math.sqrt(x)), rel=1e-9, abs=1e-15)
        poisson = sum(math.exp(-x + k * math.log(x) - math.lgamma(k + 1)) for k in range(40))
        assert chance.upper_gamma(40, x) == pytest.approx(poisson, rel=1e-9, abs=1e-15)
