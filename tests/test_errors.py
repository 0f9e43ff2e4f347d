"""The errors: one tree, drawn as it is, and words near the one that was meant."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from llmkit import errors
from llmkit.errors import LlmkitError, nearest, nearest_hint
from llmkit.quants import QUANTS

CLASSES = {name for name, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, LlmkitError)}


def test_the_tree_is_drawn_as_it_is() -> None:
    assert errors.__doc__
    drawn = set(re.findall(r"^    (?:[├└]── )?(\w+) {2,}", errors.__doc__, re.MULTILINE))
    assert drawn == CLASSES


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_carries_message_and_hint(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("model.gguf: is broken", "Download it again.")
    assert (str(error), error.message, error.hint) == (
        "model.gguf: is broken",
        "model.gguf: is broken",
        "Download it again.",
    )
    assert kind("model.gguf: is broken").hint is None
    assert isinstance(error, LlmkitError) and kind.__doc__


def test_an_error_survives_the_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(errors.Unsupported("what", "why")))
    assert (type(error), error.message) == (errors.Unsupported, "what")


@pytest.mark.parametrize(
    ("word", "best"),
    [("q4km", "Q4_K_M"), ("Q4_K_L", "Q4_K_M"), ("q8", "Q8_0"), ("IQ2XXS", "IQ2_XXS"), ("bf_16", "BF16")],
)
def test_nearest_quants(word: str, best: str) -> None:
    assert best in nearest(word, QUANTS)


def test_nothing_near_shows_everything() -> None:
    assert nearest("zzzz", QUANTS) == []
    assert nearest_hint("zzzz", {"b", "a"}) == "Known: a, b."
    assert nearest_hint("Aa", {"aab", "zz"}) == "Nearest: aab."
