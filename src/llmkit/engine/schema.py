"""JSON schemas as grammars (GBNF), by llama-cpp-python's own converter (llama_cpp/llama_grammar.py).

It follows no reference to the network. Keywords it knows nothing of it leaves out without a word; `unenforced` names
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import LlmkitError
from .library import schema_converter

_HINT = 'A schema is JSON like {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'
# keywords of JSON Schema that say what a value must be, and that the converter does not look at
_UNENFORCED = frozenset(
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf not uniqueItems contains minContains maxContains"
    " minProperties maxProperties patternProperties propertyNames dependentRequired dependentSchemas dependencies"
    " if then else unevaluatedItems unevaluatedProperties".split()
)
_ONE, _MANY, _NAMED = ("items", "additionalProperties"), ("oneOf", "anyOf", "allOf", "prefixItems", "items"), (
    "properties", "$defs", "definitions",
)  # fmt: skip


def json_schema_to_gbnf(schema_text: str) -> str:
    """A grammar whose texts are the JSON values of the schema. Raises LlmkitError for what is no schema."""
    schema, convert = _parsed(schema_text), schema_converter()
    try:
        grammar: str = convert(json.dumps(schema))
    except RecursionError:
        raise LlmkitError("the JSON schema is nested too deeply", _HINT) from None
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError, IndexError, re.error) as error:
        raise LlmkitError(f"the JSON schema cannot be made a grammar: {_words(error)}", _HINT) from error
    return grammar


def unenforced(schema_text: str) -> list[str]:
    """Keywords in the schema, sorted, that its grammar does not enforce ("minimum"). Raises as json_schema_to_gbnf."""
    return sorted(set(_ignored(_parsed(schema_text))))


def _parsed(schema_text: str) -> dict[str, Any]:
    try:
        schema = json.loads(schema_text)
    except json.JSONDecodeError as error:
        raise LlmkitError(f"the JSON schema is not JSON: {error}", _HINT) from None
    except RecursionError:
        raise LlmkitError("the JSON schema is nested too deeply", _HINT) from None
    if not isinstance(schema, dict):
        raise LlmkitError(f"the JSON schema is {schema_text.strip()[:60]}, expected an object", _HINT)
    return schema


def _ignored(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    yield from _UNENFORCED & schema.keys()
    for key in _ONE:
        yield from _ignored(schema.get(key))
    for key in _MANY:
        inner = schema.get(key)
        for each in inner if isinstance(inner, list) else ():
            yield from _ignored(each)
    for key in _NAMED:
        inner = schema.get(key)
        for each in inner.values() if isinstance(inner, dict) else ():
            yield from _ignored(each)


def _words(error: Exception) -> str:
    """What the converter says; of a KeyError the name alone says too little."""
    text = str(error).partition(" (use --")[0].strip()[:200]
    return f"{type(error).__name__} {text}" if isinstance(error, (KeyError, AttributeError, TypeError)) else text
