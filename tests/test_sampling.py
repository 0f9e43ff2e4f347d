"""chat/sampling.py and sampler_settings.py: the Sampler's draws, its state and seeds, and what can be set."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.backends import Backend
from llmkit.backends.scripted import Scripted
from llmkit.chat import sampling
from llmkit.chat.sampling import ORDER, SETTINGS, Candidates, Sampler, Sampling
from llmkit.errors import EngineError, LlmkitError, Unsupported

BACKEND = Scripted([])
ROW = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005], np.float32))
PLAIN = Sampling(temperature=1, top_k=0, top_p=1, min_p=0)


def sampler(wanted: Sampling = PLAIN, seed: int = 11, turn: int = 0) -> Sampler:
    return Sampler(wanted, backend=BACKEND, seed=seed, turn=turn)


def chi_square(drawn: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * drawn.sum()
    return float(((drawn - expected) ** 2 / expected).sum())


# ── draws ──


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws: 7 degrees of freedom, 24.3 is passed by chance once in 1,000."""
    drawing = sampler()
    choices = [drawing.choose(ROW, []) for _ in range(20_000)]
    drawn = np.bincount([each.token for each in choices], minlength=8)
    assert chi_square(drawn, np.exp(ROW)) < 24.3
    for each in choices[:50]:
        assert each.probability == pytest.approx(float(np.exp(ROW[each.token])), abs=1e-6)


def test_xtc_applies_as_often_as_it_says() -> None:
    """With probability 0.3 the three tokens of 0.15 and more lose the first two: a mixture of two distributions."""
    drawing = sampler(replace(PLAIN, xtc_probability=0.3, xtc_threshold=0.12))
    drawn = np.bincount([drawing.choose(ROW, []).token for _ in range(20_000)], minlength=8)
    rest = np.exp(ROW) * (np.arange(8) >= 2)
    assert chi_square(drawn, 0.7 * np.exp(ROW) + 0.3 * rest / rest.sum()) < 24.3


def test_mirostat_brings_the_surprise_to_tau() -> None:
    row = np.random.default_rng(2).standard_normal(5000).astype(np.float32) * 3
    for tau in (2.0, 5.0):
        drawing = sampler(replace(PLAIN, mirostat=2, mirostat_tau=tau))
        surprises = [-np.log2(drawing.choose(row, []).probability) for _ in range(2000)]
        assert np.mean(surprises[200:]) == pytest.approx(tau, abs=0.15)


def test_the_same_seed_and_turn_give_the_same_tokens() -> None:
    def tokens(seed: int, turn: int) -> list[int]:
        drawing = sampler(seed=seed, turn=turn)
        return [drawing.choose(ROW, []).token for _ in range(40)]

    assert tokens(5, 0) == tokens(5, 0)
    assert tokens(5, 0) != tokens(5, 1)
    assert tokens(5, 0) != tokens(6, 0)


def test_the_random_numbers_are_the_same_everywhere() -> None:
    """Written down, so that a seed means the same on every machine and with every numpy."""
    numbers = [float(value) for value in sampling.generator(7, 0).random(4)]
    assert numbers == pytest.approx(NUMBERS_OF_SEED_7, abs=1e-12)
    assert float(sampling.generator(7, 0, 1).random()) != numbers[0]


NUMBERS_OF_SEED_7 = [0.625095466604667, 0.8972138009695755, 0.7756856902451935, 0.22520718999059186]


@pytest.mark.parametrize(
    "wanted",
    [
        replace(PLAIN, xtc_probability=0.5, xtc_threshold=0.12),
        replace(PLAIN, mirostat=2, mirostat_tau=1.5),
        replace(PLAIN, temperature=0.8, repeat_penalty=1.2),
    ],
    ids=["xtc", "mirostat", "penalties"],
)
def test_going_on_with_given_tokens_is_as_if_they_had_been_drawn(wanted: Sampling) -> None:
    whole, history = sampler(wanted), [0]
    choices = []
    for _ in range(20):
        choices.append(whole.choose(ROW, history))
        history.append(choices[-1].token)
    resumed = sampler(wanted)
    for each in choices[:12]:
        resumed.accept(each.token, each.probability)
    history = history[:13]
    for each in choices[12:]:
        assert resumed.choose(ROW, history) == each
        history.append(each.token)


def test_the_trace_changes_nothing_and_ends_where_the_draw_begins() -> None:
    wanted = replace(PLAIN, xtc_probability=0.5, xtc_threshold=0.12, top_k=6, mirostat=0)
    one, other = sampler(wanted), sampler(wanted)
    for _ in range(30):
        left = one.trace(ROW, [])[-1].candidates
        one.trace(ROW, [])
        choice = one.choose(ROW, [])
        assert choice == other.choose(ROW, [])
        place = left.ids.tolist().index(choice.token)
        assert choice.probability == pytest.approx(float(left.probabilities[place]))


def test_the_trace_names_the_stages_that_are_on() -> None:
    wanted = Sampling(temperature=0.5, top_k=3, order=("temperature", "top_k", "min_p"))
    stages = sampler(wanted).trace(ROW, [])
    assert [(each.name, each.label) for each in stages] == [
        ("raw", "raw"), ("temperature", "temperature 0.5"), ("top_k", "top-k 3"), ("min_p", "min-p 0.05"),
    ]  # fmt: skip
    assert [len(each.candidates.ids) for each in stages] == [8, 8, 3, 3]
    assert sampler(replace(wanted, mirostat=2)).trace(ROW, [])[-1].name == "mirostat"
    assert replace(wanted, mirostat=2).stages == ("temperature", "mirostat")


def test_temperature_zero_takes_the_most_likely() -> None:
    for _ in range(5):
        assert sampler(Sampling(temperature=0)).choose(ROW, []) == sampling.Choice(0, 1.0)


def test_rows_that_are_no_numbers_are_refused() -> None:
    for broken in (np.full(8, np.nan, np.float32), np.full(8, -np.inf, np.float32)):
        for wanted in (PLAIN, Sampling(), Sampling(temperature=0)):
            with pytest.raises(EngineError, match="not a number"):
                sampler(wanted).choose(broken, [])


def test_a_masked_row_gives_what_is_not_masked() -> None:
    row = np.full(60_000, -np.inf, np.float32)
    row[[5, 50_000]] = 0.0, 1.0
    drawing = sampler(Sampling(top_k=40, top_p=1, min_p=0))
    assert {drawing.choose(row, []).token for _ in range(60)} == {5, 50_000}


# ── grammars ──

COLOUR = 'root ::= "red" | "green" | "blue"'
SCHEMA = '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'


def answer(backend: Backend, wanted: Sampling, prompt: str, seed: int = 1, most: int = 40) -> bytes:
    session, history = backend.session(256), backend.encode(prompt)
    drawing, said = Sampler(wanted, backend=backend, seed=seed), b""
    logits = session.eval(history).logits[-1]
    while len(said) < most:
        trace = drawing.trace(logits, history)[-1].candidates
        choice = drawing.choose(logits, history)
        assert choice.probability == pytest.approx(float(trace.probabilities[trace.ids == choice.token][0]))
        if choice.token in backend.info.eos:
            break
        said += backend.piece(choice.token)
        history.append(choice.token)
        logits = session.eval([choice.token]).logits[-1]
    drawing.close()
    session.close()
    return said


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_an_answer_keeps_to_its_grammar(smol: Backend, temperature: float) -> None:
    wanted = Sampling(temperature=temperature, grammar=COLOUR)
    assert answer(smol, wanted, "My favourite colour is") in (b"red", b"green", b"blue")


def test_an_answer_keeps_to_its_json_schema(smol: Backend) -> None:
    said = answer(smol, Sampling(temperature=0.3, json_schema=SCHEMA), "How old is Bob, 30? As JSON:", most=80)
    assert isinstance(json.loads(said)["age"], int)


def test_a_grammar_behind_the_cuts_may_leave_nothing(smol: Backend) -> None:
    row = smol.session(16).eval([504, 3575]).logits[-1]
    drawing = Sampler(Sampling(top_k=2, grammar='root ::= "zz"', order=("top_k", "grammar")), backend=smol, seed=1)
    with pytest.raises(LlmkitError, match="no token is left") as error:
        drawing.choose(row, [])
    assert "order" in (error.value.hint or "")


def test_a_wrong_grammar_a_wrong_schema_and_none_at_all(smol: Backend) -> None:
    with pytest.raises(LlmkitError, match="grammar"):
        Sampler(Sampling(grammar="root ::= nothing"), backend=smol, seed=1)
    with pytest.raises(LlmkitError):
        Sampler(Sampling(json_schema='{"type": "colour"}'), backend=smol, seed=1)
    with pytest.raises(Unsupported, match="grammar"):
        sampler(Sampling(grammar=COLOUR))


# ── settings ──


def test_every_field_is_a_setting_and_has_a_default_that_means_something() -> None:
    assert list(SETTINGS) == [field.name for field in fields(Sampling)]
    for setting in SETTINGS.values():
        assert setting.what and setting.right and "_" not in setting.option
        if setting.off is not None:
            assert getattr(Sampling().set(setting.option, "off"), setting.name) == setting.off


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e39),
        ("repeat_penalty", 1e39),
        ("logit_bias", ((5, -1e39),)),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("typical_p", 0.0),
        ("top_n_sigma", -1.0),
        ("xtc_probability", 2.0),
        ("xtc_threshold", -0.1),
        ("dry_multiplier", -1.0),
        ("dry_base", 0.5),
        ("dry_allowed_length", -1),
        ("dry_last_n", -2),
        ("dry_breakers", ("",)),
        ("dry_breakers", "\n"),
        ("repeat_penalty", 0.0),
        ("frequency_penalty", float("nan")),
        ("repeat_last_n", -2),
        ("mirostat", 1),
        ("mirostat", 3),
        ("mirostat_tau", 0.0),
        ("mirostat_eta", -1.0),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", (5,)),
        ("order", "top_k"),
        ("order", ("top_k", "top_k")),
        ("grammar", 5),
        ("json_schema", "{"),
        ("seed", -1),
        ("max_tokens", 0),
    ],
)
def test_values_that_mean_nothing_are_named(name: str, value: Any) -> None:
    with pytest.raises(Unsupported, match=name.replace("_", "-")):
        replace(Sampling(), **{name: value})


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(Unsupported, match="unknown sampler 'top_kk'") as error:
        Sampling(order=("top_kk",))
    assert "top_k" in (error.value.hint or "")
    with pytest.raises(Unsupported, match="unknown setting 'temprature'") as error:
        Sampling().set("temprature", "1")
    assert "temperature" in (error.value.hint or "")
    with pytest.raises(Unsupported, match="unknown setting 'tempo'"):
        Sampling.from_json({"tempo": 1})
    with pytest.raises(Unsupported, match="expected one of them"):
        Sampling(grammar=COLOUR, json_schema=SCHEMA)
    with pytest.raises(Unsupported, match="tokens 0 to 258"):
        sampler(Sampling(logit_bias=((259, 1.0),)))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.25", 0.25),
        ("top-k", "12", 12),
        ("--min-p", "off", 0.0),
        ("order", "top-k, temperature", ("top_k", "temperature")),
        ("order", "temperature top_k", ("temperature", "top_k")),
        ("dry-breakers", "\\n,:", ("\n", ":")),
        ("dry-breakers", '[",", "\\t"]', (",", "\t")),
        ("logit-bias", "7042:-5,12:-inf", ((7042, -5.0), (12, float("-inf")))),
        ("grammar", COLOUR, COLOUR),
        ("grammar", "off", None),
        ("seed", "5", 5),
    ],
)
def test_settings_are_read_from_words(name: str, text: str, value: object) -> None:
    assert getattr(Sampling().set(name, text), name.lstrip("-").replace("-", "_")) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [("temperature", "hot"), ("top-k", "4.5"), ("logit-bias", "7042"), ("dry-breakers", "[5"), ("seed", "off")],
)
def test_words_that_are_no_values(name: str, text: str) -> None:
    with pytest.raises(Unsupported, match=f"{name} .*expected"):
        Sampling().set(name, text)


def test_a_grammar_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "colour.gbnf").write_text(COLOUR)
    assert Sampling().set("grammar", f"@{tmp_path / 'colour.gbnf'}").grammar == COLOUR
    with pytest.raises(Unsupported, match=r"none\.gbnf.*cannot be read"):
        Sampling().set("grammar", f"@{tmp_path / 'none.gbnf'}")


def test_settings_go_through_json() -> None:
    wanted = Sampling(
        temperature=0, logit_bias=((3, -1.5), (4, float("-inf"))), order=("top_k", "grammar"), json_schema=SCHEMA,
        dry_breakers=("\n", "é"), seed=9,
    )  # fmt: skip
    text = json.dumps(wanted.to_json(), allow_nan=False)
    assert Sampling.from_json(json.loads(text)) == wanted
    assert Sampling.from_json({"top_k": 3}) == Sampling(top_k=3)
    for broken in ({"order": "top_k"}, {"logit_bias": [5]}, {"top_k": "5"}, {"dry_breakers": 4}):
        with pytest.raises(Unsupported):
            Sampling.from_json(broken)


def test_labels_tell_values_and_what_is_off() -> None:
    wanted = Sampling(repeat_penalty=1.1, top_p=1.0, order=ORDER[:-1])
    assert wanted.label("penalties") == "penalties repeat 1.1, frequency 0, presence 0, last 64"
    assert wanted.label("top_p") == "top-p off"
    assert wanted.label("temperature") == "temperature off"  # it is not in the order
    assert wanted.stages == ("penalties", "top_k", "min_p")
    assert all(Sampling().label(stage) for stage in (*ORDER, "mirostat"))


def test_drawing_from_candidates_is_by_their_order() -> None:
    from llmkit.chat import samplers

    candidates = Candidates(np.array([30, 10]), np.log(np.array([0.25, 0.75], np.float32)))
    assert samplers.draw(candidates, 0.2)[0] == 30
    assert samplers.draw(candidates, 0.26)[0] == 10
    assert samplers.draw(candidates, 0.26)[1] == pytest.approx(0.75)
    assert samplers.draw(candidates, np.nextafter(1, 0))[0] == 10


@pytest.mark.parametrize("row", ["ties", "steep", "flat", "masked"])
def test_temperature_0_takes_what_all_stages_would_leave(row: str) -> None:
    logits = {
        "ties": np.array([1, 3, 3, 2], np.float32),
        "steep": np.linspace(-1e30, 1e30, 999, dtype=np.float32),
        "flat": np.zeros(77, np.float32),
        "masked": np.array([-np.inf, -np.inf, -5, -np.inf], np.float32),
    }[row]
    sampler = Sampler(Sampling(temperature=0, top_n_sigma=1.0), backend=Scripted([]), seed=1)
    left = sampler.trace(logits, [])[-1].candidates
    choice = sampler.choose(logits, [])
    assert left.ids.tolist() == [choice.token] and choice.probability == 1


def test_temperature_0_refuses_what_is_no_number() -> None:
    sampler = Sampler(Sampling(temperature=0), backend=Scripted([]), seed=1)
    with pytest.raises(EngineError, match="not a number"):
        sampler.choose(np.array([1, np.nan, 2], np.float32), [])
