"""Requests are checked by the very JSON Schemas that the documentation shows; fields they do not name are let through.

Knows of JSON Schema what those schemas use: type, enum, minimum, maximum, minLength, maxLength, minItems, maxItems,
items, properties, required, additionalProperties, anyOf.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import Refused

Schema = Mapping[str, Any]
MOST_NESTED = 64

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip
_WORDS = {"integer": "a whole number", "object": "an object", "array": "a list", "null": "null"}


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object, no deeper than MOST_NESTED. Raises Refused."""
    try:
        value = json.loads(raw, parse_constant=_no_number)
        value = _sound(value, 0)
    except RecursionError:
        raise Refused(f"the JSON is nested more than {MOST_NESTED} deep", code="invalid_json") from None
    except ValueError as error:
        raise Refused(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused("the body is not a JSON object", code="invalid_json")
    return value


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _sound(value: Any, depth: int) -> Any:
    """`value` with halves of characters in its texts replaced. Raises RecursionError below MOST_NESTED."""
    if depth > MOST_NESTED:
        raise RecursionError
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_sound(each, depth + 1) for each in value]
    if isinstance(value, dict):
        return {_sound(key, depth): _sound(each, depth + 1) for key, each in value.items()}
    return value


def checked(body: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """`body` without the fields that are null, which count as not given. Raises Refused for what is not right."""
    given = {name: value for name, value in body.items() if value is not None}
    check(given, schema, "")
    return given


def check(value: Any, schema: Schema, at: str) -> None:
    """Raise Refused, naming the field `at`, unless `value` fits the schema."""
    if "anyOf" in schema:
        _any_of(value, schema["anyOf"], at)
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(at, f"expected one of {', '.join(map(json.dumps, schema['enum']))}", value)
    wanted = schema.get("type")
    if wanted is not None and not _is(value, wanted):
        raise _wrong(at, f"expected {_WORDS.get(wanted, f'a {wanted}')}", value)
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        _number(value, schema, at)
    elif isinstance(value, str):
        _sized(len(value), schema, "Length", at, "characters")
    elif isinstance(value, list):
        _sized(len(value), schema, "Items", at, "items")
        inner = schema.get("items")
        for index, each in enumerate(value if inner else ()):
            check(each, inner or {}, f"{at}[{index}]")
    elif isinstance(value, dict):
        _object(value, schema, at)


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool):
        return wanted == "boolean"
    if wanted == "integer" and isinstance(value, float):
        return False
    return isinstance(value, _TYPES[wanted])


def _number(value: float, schema: Schema, at: str) -> None:
    least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if (isinstance(value, float) and not math.isfinite(value)) or not least <= value <= most:
        words = [f"at least {least}"] * (least > -math.inf) + [f"at most {most}"] * (most < math.inf)
        raise _wrong(at, "expected a number " + " and ".join(words or ["that is finite"]), value)


def _sized(size: int, schema: Schema, what: str, at: str, unit: str) -> None:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}", size)
    if not least <= size <= most:
        bound = f"at least {least:,}" if size < least else f"at most {most:,}"
        raise Refused(f"{at or 'the body'}: has {size:,} {unit}, expected {bound}", param=at or None, code="size")


def _object(value: dict[str, Any], schema: Schema, at: str) -> None:
    dot = f"{at}." if at else ""
    for name in schema.get("required", ()):
        if name not in value:
            raise Refused(f"{dot}{name} is missing", param=f"{dot}{name}", code="missing_field")
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name, each in value.items():
        inner = known.get(name, others)
        if isinstance(inner, Mapping) and not (each is None and name not in schema.get("required", ())):
            check(each, inner, f"{dot}{name[:64]}")


def _any_of(value: Any, choices: list[Schema], at: str) -> None:
    """The fault of the choice that the value's type fits is the one worth telling."""
    faults: list[Refused] = []
    for choice in choices:
        try:
            check(value, choice, at)
            return
        except Refused as fault:
            if "type" in choice and _is(value, choice["type"]):
                faults.append(fault)
    if faults:
        raise max(faults, key=lambda fault: len(fault.param or ""))
    kinds = [choice.get("type", "") for choice in choices]
    raise _wrong(at, "expected " + " or ".join(dict.fromkeys(_WORDS.get(kind, f"a {kind}") for kind in kinds)), value)


def _wrong(at: str, expected: str, value: Any) -> Refused:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
    return Refused(f"{at or 'the body'}: {expected}, found {shown}", param=at or None, code="invalid_value")


def documented(schema: Schema) -> dict[str, Any]:
    """The schema as the documentation shows it: fields that need not be given may be null, at every depth."""
    made = dict(schema)
    if "properties" in schema:
        needed = schema.get("required", ())
        made["properties"] = {
            name: documented(inner) if name in needed else _or_null(documented(inner))
            for name, inner in schema["properties"].items()
        }
    if "anyOf" in schema:
        made["anyOf"] = [documented(choice) for choice in schema["anyOf"]]
    if isinstance(schema.get("items"), Mapping):
        made["items"] = documented(schema["items"])
    return made


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {name: schema.pop(name) for name in ("description", "default") if name in schema}
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}], **told}
