"""Fields that several routes share: how tokens are chosen, what ends an answer, what is told of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import engine
from ..backends import Backend
from ..chat.sampler_settings import SETTINGS, Sampling, Setting
from ..errors import LlmkitError, Unsupported
from .checking import Schema
from .errors import Refused

MOST_ALTERNATIVES = 100
_LARGEST = 2**53

MODEL: Schema = {
    "type": "string",
    "maxLength": 512,
    "description": "A name from /v1/models; the first one if left out.",
}
BOOLEAN: Schema = {"type": "boolean"}
STOP: Schema = {
    "description": "Texts that end the answer; they are no part of it.",
    "anyOf": [
        {"type": "string", "maxLength": 1000},
        {"type": "array", "items": {"type": "string", "maxLength": 1000}, "maxItems": 16},
    ],
}
IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
STREAM_OPTIONS: Schema = {
    "type": "object",
    "properties": {
        "include_usage": {"type": "boolean", "description": "A last chunk with the usage, without choices."}
    },
}
N: Schema = {
    "type": "integer",
    "minimum": 1,
    "maximum": 128,
    "default": 1,
    "description": "Answers to the same prompt.",
}
MAX_TOKENS: Schema = {
    "type": "integer", "minimum": 0, "maximum": _LARGEST,
    "description": "The answer's longest; else until the model ends or the context is full.",
}  # fmt: skip


def _documented(setting: Setting) -> Schema:
    told = {"description": f"{setting.what[:1].upper()}{setting.what[1:]} ({setting.right})."}
    if setting.kind in ("number", "count"):
        bounds = {"minimum": max(setting.least, -_LARGEST), "maximum": min(setting.most, _LARGEST)}
        default = getattr(Sampling(), setting.name)
        known = {} if default is None else {"default": default}
        return {"type": "integer" if setting.kind == "count" else "number", **bounds, **known, **told}
    if setting.kind == "text":
        return {"type": "string", "maxLength": 1 << 16, **told}
    if setting.kind == "biases":
        return {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -1e6, "maximum": 1e6},
            "description": "Added to the logits of tokens, by id: -100 forbids one.",
        }
    return {"type": "array", "items": {"type": "string", "maxLength": 100}, "maxItems": 64, **told}


_OTHERS = ("seed", "max_tokens", "json_schema")
SAMPLING: dict[str, Schema] = {name: _documented(row) for name, row in SETTINGS.items() if name not in _OTHERS} | {
    "seed": {
        "type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1,
        "description": "The same seed, prompt and settings give the same tokens.",
    },
}  # fmt: skip
RESPONSE_FORMAT: Schema = {
    "type": "object",
    "description": "json_object and json_schema are enforced by a grammar, token by token.",
    "required": ["type"],
    "properties": {
        "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 200},
                "schema": {"type": "object"},
                "strict": {"type": "boolean", "description": "Refuse a schema with words that cannot be enforced."},
            },
        },
    },
}


def sampling(body: Mapping[str, Any], backend: Backend, *, max_tokens: int | None, grammar: str | None) -> Sampling:
    """What the body says of sampling. `grammar`: one that its other fields ask for. Raises Refused."""
    given: dict[str, Any] = {}
    for name in SAMPLING:
        if name in body:
            value = body[name]
            given[name] = tuple(value) if isinstance(value, list) else value
    if "seed" in given:
        given["seed"] %= 2**64
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"], backend.info.n_vocab)
    if grammar is not None:
        if "grammar" in given:
            raise Refused(
                "a grammar and response_format or tool_choice are given, expected one of them", param="grammar"
            )
        given["grammar"] = grammar
    try:
        return Sampling(**given, max_tokens=max_tokens)
    except Unsupported as error:
        raise Refused(error.message, code="invalid_value") from error


def _biases(given: Mapping[str, float], n_vocab: int) -> tuple[tuple[int, float], ...]:
    found = []
    for id, bias in given.items():
        if not (id.isascii() and id.isdigit() and len(id) < 10 and int(id) < n_vocab):
            raise Refused(f"logit_bias: {id[:20]!r} is no token, expected 0 to {n_vocab - 1}", param="logit_bias")
        found.append((int(id), float("-inf") if bias <= -100 else float(bias)))
    return tuple(found)


def stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the body, none of them empty."""
    given = body.get("stop", ())
    return tuple(filter(None, (given,) if isinstance(given, str) else given))


def asked_grammar(body: Mapping[str, Any]) -> str | None:
    """The grammar that `response_format` asks for. Raises Refused, naming what of a strict schema has no grammar."""
    wanted = body.get("response_format") or {}
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    told = wanted.get("json_schema") or {}
    schema = told.get("schema") if kind == "json_schema" else {"type": "object"}
    if schema is None:
        raise Refused("response_format.json_schema.schema is missing", param="response_format.json_schema.schema")
    return gbnf(schema, "response_format.json_schema.schema", strict=bool(told.get("strict")))


def gbnf(schema: Any, param: str, *, strict: bool = False) -> str:
    """A JSON Schema as a grammar. Raises Refused."""
    text = json.dumps(schema)
    try:
        ignored = engine.unenforced(text) if strict else []
        grammar = engine.json_schema_to_gbnf(text)
    except LlmkitError as error:
        raise Refused(error.message, param=param, code="invalid_schema") from error
    if ignored:
        raise Refused(
            f"{param}: strict, but {', '.join(ignored)} cannot be enforced", param=param, code="invalid_schema"
        )
    return grammar
