"""`llmkit inspect temperature`, `llmkit inspect branches`, and the options for sampling that verbs share."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmkit.chat.sampling import SETTINGS, Sampling
from llmkit.cli import sampling_arguments
from llmkit.cli.main import main

FRANCE = "The capital of France is"


class Shown:
    """What a command printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def inspect(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(topic: str, *words: str) -> Shown:
        code = main(["inspect", topic, *words, "--model", str(smollm2_gguf), "--threads", "1"])
        return Shown(code, *capsys.readouterr())

    return run


# ── temperature ──


def test_temperature_shows_stages_grid_softmax_and_draws(inspect: Any) -> None:
    shown = inspect("temperature", FRANCE, "--sample", "500", "--token", "London", "--token", "#11", "--seed", "4")
    assert shown.code == 0
    assert "After token 4: The␣capital␣of␣France␣is" in shown.out
    assert re.search(r"^top-k 40 +40 +49,112 tokens, .*␣Paris \d\d %", shown.out, re.MULTILINE)
    assert "raw probability, entropy" in shown.out and "sampled probability, entropy" in shown.out
    assert re.search(r"␣London \(#4528\): raw 1\.\d %, rank \d; removed by min-p 0\.05, where it came", shown.out)
    assert re.search(r"\(#11\): .*; removed by top-k 40", shown.out)
    rows = re.findall(r"^ *(\d(?:\.\d+)?) +[\d,]+ +\d\.\d\d ", shown.out, re.MULTILINE)
    assert rows == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "1.75", "2"]
    assert "The same tokens are left at every temperature" in shown.out
    assert "The maximum is taken off first" in shown.out and "exp / sum" in shown.out
    assert "500 draws, seed 4" in shown.out and "chi-square" in shown.out


def test_temperature_first_changes_what_is_left(inspect: Any) -> None:
    words = ("--order", "temperature,top-k,min-p", "--temperatures", "0.2,1,2", "--top", "2")
    shown = inspect("temperature", "Once upon a time, there was a", *words)
    assert "The same tokens are left" not in shown.out
    assert shown.out.index("temperature 0.7") < shown.out.index("top-k 40")
    assert "next: llmkit inspect temperature 'Once upon a time, there was a'" in shown.err


def test_temperature_as_json(inspect: Any) -> None:
    found = json.loads(inspect("temperature", FRANCE, "--json", "--temperatures", "1", "--sample", "10").out)
    assert set(found) == {"sampling", "trace", "grid", "softmax", "draws"}
    assert [stage["name"] for stage in found["trace"]["stages"]][0] == "raw"
    assert found["trace"]["stages"][0]["top"][0]["id"] == 7042
    assert found["grid"]["rows"][0]["temperature"] == 1 and found["draws"]["number"] == 10
    assert Sampling.from_json(found["sampling"]) == Sampling()


def test_temperature_in_a_chat_and_at_a_position(inspect: Any) -> None:
    assert "<|im_start|>assistant↵" in inspect("temperature", "Hi", "--chat").out
    assert "After token 1: The␣capital\n" in inspect("temperature", FRANCE, "--at", "1").out
    assert "After token 3: The␣capital␣of␣France\n" in inspect("temperature", FRANCE, "--at", "-2").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--at", "9"), "position 9 is outside the text, which has 5 tokens"),
        (("--token", "Parisian dreams"), "is no single token"),
        (("--token", "#49152"), "is not in a vocabulary"),
        (("--order", "top_q"), "unknown sampler 'top_q'"),
        (("--top-p", "1.5"), "top-p 1.5: expected more than 0, at most 1"),
        (("--top-k", "many"), "top-k many: expected 0 (off) or more"),
        (("--mirostat", "1"), "expected 0 (off) or 2"),
        (("--grammar", "root ::= nothing"), "grammar"),
        (("--json-schema", "{"), "JSON schema is not JSON"),
        (("--logit-bias", "60000:1"), "the model has tokens 0 to 49151"),
        (("--grammar", 'root ::= "zz"', "--order", "top_k,grammar"), "leaves no token"),
    ],
)
def test_what_cannot_be_is_said_in_words(inspect: Any, words: tuple[str, ...], said: str) -> None:
    shown = inspect("temperature", FRANCE, *words)
    assert shown.code == 1
    assert said in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("words", [("--temperatures", "warm"), ("--temperatures", "-1"), ("--sample", "0")])
def test_usage(inspect: Any, words: tuple[str, ...]) -> None:
    assert inspect("temperature", FRANCE, *words).code == 2


# ── branches ──


def test_branches_draws_a_tree(inspect: Any) -> None:
    shown = inspect("branches", FRANCE, "--tokens", "5")
    lines = shown.out.splitlines()
    assert lines[0] == "The␣capital␣of␣France␣is"
    assert re.match(r"├─ +\d\d % ␣Paris\.↵↵The …  \(.*\)$", lines[1])
    assert [line[0] for line in lines[1:5]] == ["├", "├", "├", "└"]
    assert "21 tokens evaluated" in shown.out and "it would have been 36" in shown.out


def test_branches_of_given_tokens_drawn_and_as_json(inspect: Any) -> None:
    words = ("--token", "Rome", "--token", "#7042", "--draw", "--seed", "3", "--tokens", "4", "--json")
    found = json.loads(inspect("branches", FRANCE, *words).out)
    assert [fork["steps"][0]["piece"] for fork in found["forks"]] == ["␣Rome", "␣Paris"]
    assert found["seed"] == 3 and all(len(leaf["ids"]) <= 4 for leaf in found["leaves"])
    assert found == json.loads(inspect("branches", FRANCE, *words).out)


def test_branches_in_branches(inspect: Any) -> None:
    out = inspect("branches", FRANCE, "--width", "2", "--depth", "2", "--tokens", "4", "--at", "2").out
    assert out.startswith("The␣capital␣of\n├─") and "\n│  ├─" in out and "\n   └─" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--width", "9", "--depth", "3"), "at most 64"),
        (("--at", "12"), "position 12 is outside"),
        (("--token", "Rome", "--token", "Rome"), "twice"),
        (("--tokens", "2", "--depth", "3", "--width", "1"), "only 2 tokens to fork at"),
    ],
)
def test_trees_that_cannot_be(inspect: Any, words: tuple[str, ...], said: str) -> None:
    shown = inspect("branches", FRANCE, *words)
    assert shown.code == 1 and said in shown.err


# ── the options ──


def test_what_a_schema_asks_in_vain_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    sampling_arguments.add_arguments(parser)
    schema = '{"type": "object", "properties": {"age": {"type": "number", "multipleOf": 3}}}'
    assert sampling_arguments.sampling(parser.parse_args(["--json-schema", schema])).json_schema == schema
    assert "does not enforce multipleOf" in capsys.readouterr().err


def test_there_is_an_option_for_every_setting() -> None:
    parser = argparse.ArgumentParser()
    sampling_arguments.add_arguments(parser, without=frozenset({"max_tokens"}))
    text = parser.format_help()
    assert [name for name in SETTINGS if f"--{SETTINGS[name].option}" not in text] == ["max_tokens"]
    words = ["--temperature", "0", "--logit-bias", "7:-1", "--frequency-penalty", "-0.5", "--order", "top-k"]
    found = sampling_arguments.sampling(parser.parse_args(words), Sampling(top_p=0.5))
    assert found == Sampling(
        temperature=0, top_p=0.5, logit_bias=((7, -1.0),), frequency_penalty=-0.5, order=("top_k",)
    )
