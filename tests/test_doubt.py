"""inspection/doubt.py and `llmkit inspect doubt`: marks by their rules, samples against their own seeds."""

from __future__ import annotations

import json
from itertools import combinations
from math import exp, log, log2, nan
from pathlib import Path

import numpy as np
import pytest

from conftest import Cli
from llmkit.backends import Backend
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling, Step
from llmkit.errors import LlmkitError
from llmkit.inspection import doubt
from llmkit.inspection.doubt import HIGH, LOW


def step(piece: bytes, probability: float, entropy: float = 0.0, finish: str | None = None) -> Step:
    return Step(1, piece, piece.decode(), logprob=log(probability), entropy=entropy, finish=finish)  # type: ignore[arg-type]


def test_marks_follow_the_rules() -> None:
    steps = [
        step(b"It", 0.9), step(b" is", LOW - 0.01), step(b" a", 0.8), step(b" big", 0.5, HIGH), step(b" red", 0.9),
        step(b" old", 0.9), step(b" house", LOW, HIGH - 0.01), step(b" here", 0.1, 5.0),
        step(b"<end>", 0.01, finish="end"),
    ]  # fmt: skip
    found = doubt.mark(steps)
    assert [(span.start, span.end, span.text) for span in found.spans] == [(1, 4, " is a big"), (7, 8, " here")]
    assert found.spans[0].rules == ("low probability", "high entropy")
    assert found.spans[0].least_probability == pytest.approx(LOW - 0.01)
    assert found.spans[0].highest_entropy_bits == HIGH
    assert (found.tokens, found.doubtful, found.text) == (8, 3, "It is a big red old house here")
    assert found.perplexity == pytest.approx(exp(-sum(each.logprob for each in steps[:-1]) / 8))


def test_an_answer_without_doubt_and_one_without_numbers() -> None:
    assert doubt.mark([step(b"yes", 0.99)]).spans == ()
    assert doubt.mark([]).tokens == 0
    with pytest.raises(LlmkitError, match="without probabilities"):
        doubt.mark([Step(1, b"x", "x", logprob=nan)])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris.", " paris", True),
        ("The answer is 42!", "the Answer: is 42", True),
        ("An apple", "apple", True),
        ("3.5", "35", False),
        ("São Paulo", "Sao Paulo", False),
        ("ﬁve", "five", True),
        ("…", "?", False),
    ],
)
def test_texts_are_compared_without_case_punctuation_and_articles(one: str, other: str, same: bool) -> None:
    assert (doubt.normalised(one) == doubt.normalised(other)) is same


def test_groups_are_counted() -> None:
    backend = Scripted([])
    texts = ["Paris.", "paris", "London", "The Paris!"]
    samples = [doubt.Sample(text, doubt.normalised(text), 0, 0, 1.0) for text in texts]
    found = doubt.consistency(backend, samples, "PARIS", 0.7)
    assert [(group.text, group.count, group.share) for group in found.groups] == [
        ("Paris.", 3, 0.75),
        ("London", 1, 0.25),
    ]
    assert (found.agreement, found.with_answer) == (0.75, 0.75)
    assert found.entropy_bits == pytest.approx(0.75 * log2(4 / 3) + 0.25 * 2)
    assert doubt.consistency(backend, samples, "Rome", 0.7).with_answer == 0


@pytest.mark.slow
def test_samples_are_drawn_as_said_and_can_be_had_again(smol: Backend) -> None:
    sampling = Sampling(temperature=1.0, seed=11, max_tokens=12)
    found = doubt.doubt(smol, "What is the capital of France?", samples=3, sampling=sampling, context=256)
    again = doubt.doubt(smol, "What is the capital of France?", samples=3, sampling=sampling, context=256)
    assert found == again
    made = found.consistency
    assert made is not None and len(made.samples) == 3
    assert len({sample.variation for sample in made.samples}) == 3 and {sample.seed for sample in made.samples} == {11}
    assert sum(group.count for group in made.groups) == 3
    vectors = [smol.pool(smol.encode(sample.text, special=False, bos=True)) for sample in made.samples]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in combinations(vectors, 2)]
    assert made.similarity == pytest.approx(np.mean(cosines), abs=1e-4)
    chat = Chat(smol, sampling=Sampling(temperature=0, seed=11, max_tokens=12), context=256)
    greedy = "".join(each.text for each in chat.say("What is the capital of France?"))
    chat.close()
    assert found.answer.text.strip() == greedy.strip()


def test_the_text_says_what_it_cannot_tell() -> None:
    text = " ".join(doubt.LIMITS)
    for word in ("not falsehood", "Confident wrong answers", "not truth", "checked elsewhere"):
        assert word in text


@pytest.mark.slow
def test_command_line(cli: Cli, smollm2_gguf: Path) -> None:
    line = ("inspect", "doubt", "Who wrote Faust?", "--model", smollm2_gguf, "--samples", 2, "--tokens", 8,
            "--seed", 1, "--threads", 1)  # fmt: skip
    done = cli(*line)
    assert done.returncode == 0, done.stderr
    assert "tokens are doubtful" in done.stdout and "2 samples at temperature 0.7" in done.stdout
    assert all(limit in done.stdout for limit in doubt.LIMITS)
    found = json.loads(cli(*line, "--json").stdout)
    assert found["limits"] and found["consistency"]["samples"][0]["seed"] == 1
    assert f"{found['answer']['doubtful']} of {found['answer']['tokens']} tokens" in done.stdout
