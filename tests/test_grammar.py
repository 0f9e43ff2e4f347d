"""Grammars of the engine, and JSON schemas as grammars: what they allow, against texts that are right and wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmkit import engine
from llmkit.backends import Backend, llamacpp
from llmkit.backends.llamacpp import LlamaCpp
from llmkit.errors import EngineError, LlmkitError

PERSON = (
    '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]}'
)


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[LlamaCpp]:
    backend = llamacpp.load(smollm2_gguf, vocabulary_only=True)
    yield backend
    backend.close()


def accepts(backend: Backend, grammar: str, text: str) -> bool:
    """Whether the grammar lets the text's tokens come one after the other, and then the end."""
    found = backend.grammar(grammar)
    try:
        for token in backend.encode(text, special=False):
            if not found.allows([token])[0]:
                return False
            found.accept(token)
        assert backend.info.eos_token is not None
        return bool(found.allows([backend.info.eos_token])[0])
    finally:
        found.close()


def test_which_tokens_may_come_next(smol: LlamaCpp) -> None:
    grammar = smol.grammar('root ::= "yes" | "no" | "né" [0-9]+')
    words = ["yes", "y", "no", "n", "maybe", " yes"]
    tokens = [smol.encode(word)[0] for word in words]
    whole = [len(smol.encode(word)) == 1 for word in words]
    allowed = grammar.allows(tokens)
    assert allowed.dtype == np.bool_
    assert all(whole) and allowed.tolist() == [True, True, True, True, False, False]
    assert not grammar.allows([2])[0]  # the end may not come yet
    everything = grammar.allows(np.arange(smol.info.n_vocab))
    starts = [smol.piece(token) for token in np.flatnonzero(everything).tolist()]
    assert starts and all(
        piece and any(word.startswith(piece) for word in (b"yes", b"no", "né".encode())) for piece in starts
    )
    grammar.accept(tokens[0])
    assert grammar.allows([2])[0] and not grammar.allows(tokens).any()
    assert grammar.allows([]).shape == (0,)
    grammar.close()


def test_halves_of_characters_are_followed(smol: LlamaCpp) -> None:
    assert accepts(smol, 'root ::= "東京🙂" [0-9]+', "東京🙂42")
    assert not accepts(smol, 'root ::= "東京🙂" [0-9]+', "東京🙁42")


def test_what_the_grammar_does_not_allow_is_an_error_not_an_abort(smol: LlamaCpp) -> None:
    grammar = smol.grammar('root ::= "yes"')
    for token in (smol.encode("no")[0], 2, 1):
        with pytest.raises(EngineError, match=f"token {token} "):
            grammar.accept(token)
    grammar.accept(smol.encode("yes")[0])
    grammar.accept(2)
    with pytest.raises(ValueError, match="49152"):
        grammar.allows([49152])
    grammar.close()
    grammar.close()
    with pytest.raises(EngineError, match="closed"):
        grammar.allows([1])


def test_two_grammars_do_not_disturb_each_other(smol: LlamaCpp) -> None:
    one, other = smol.grammar('root ::= "yes"'), smol.grammar('root ::= "yes"')
    one.accept(smol.encode("yes")[0])
    assert other.allows([smol.encode("yes")[0]])[0] and not one.allows([smol.encode("yes")[0]])[0]
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the grammar is empty"),
        (" \n", "the grammar is empty"),
        ("root ::= \0", "NUL"),
        ("root ::= [a-z", "unexpected end of input"),
        ("root ::= other", "Undefined rule identifier 'other'"),
        ('start ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root "a" | "b"', "left recursion"),
        ("yes or no", "expecting ::="),
        ("root ::= <not-a-token-of-this-model>", "invalid token"),
        ("root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000, "does not survive this grammar"),
    ],
)
def test_text_that_is_no_grammar_is_told_in_the_engines_words(
    smol: LlamaCpp, capfd: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    with pytest.raises(LlmkitError, match=words) as raised:
        smol.grammar(text)
    assert "root ::=" in (raised.value.hint or "") and len(raised.value.message) < 600
    assert capfd.readouterr() == ("", "")  # nothing goes past us to the terminal


# ── JSON schemas ──


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"name": "Ann", "age": 41}', True),
        ('{"name": "東京"}', True),
        ('{"age": 41}', False),
        ('{"name": 41}', False),
        ('{"name": "Ann"', False),
        ("Ann", False),
    ],
)
def test_a_schema_allows_its_values_only(smol: LlamaCpp, text: str, right: bool) -> None:
    assert accepts(smol, engine.json_schema_to_gbnf(PERSON), text) is right


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "is not JSON"),
        ("5", "is 5, expected an object"),
        ('["a"]', "expected an object"),
        ('{"type": "frog"}', "Unrecognized schema"),
        ('{"$ref": "https://example.org/schema"}', "remote schemas is not allowed"),
        ('{"$ref": "#/$defs/missing"}', "Error resolving ref"),
        ('{"properties": 3}', "AttributeError"),
        ('{"type": "string", "pattern": "a+"}', "Pattern must start with"),
        ('{"items": ' * 3000 + "{}" + "}" * 3000, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_schema_is_told(schema: str, words: str) -> None:
    with pytest.raises(LlmkitError, match=words) as raised:
        engine.json_schema_to_gbnf(schema)
    assert raised.value.hint


def test_keywords_that_are_not_enforced_are_named(smol: LlamaCpp) -> None:
    inner = {"type": "integer", "minimum": 18, "multipleOf": 2}
    schema = {
        "type": "object", "required": ["age"], "additionalProperties": False,
        "properties": {"age": {"$ref": "#/$defs/age"}, "maximum": {"type": "string"}}, "$defs": {"age": inner},
    }  # fmt: skip
    text = json.dumps(schema)
    assert engine.unenforced(text) == ["minimum", "multipleOf"]
    assert engine.unenforced(PERSON) == []
    assert accepts(smol, engine.json_schema_to_gbnf(text), '{"age": 3}')  # which is why they are named
