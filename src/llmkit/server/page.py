"""The documentation as one page: no script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; } code, pre { font: 0.9em ui-monospace, monospace; }
pre { padding: .8rem; overflow-x: auto; border: 1px solid #8886; border-radius: .4rem; }
details { border-top: 1px solid #8884; padding: .5rem 0; } summary { cursor: pointer; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .25rem .6rem
.25rem 0; border-top: 1px solid #8883; } .method { font-weight: 600; display: inline-block; min-width: 3.5em; }
"""


def html(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI description."""
    info = document["info"]
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            by_tag.setdefault(operation["tags"][0], []).append(_operation(method.upper(), path, operation))
    parts = "".join(f"<h2>{escape(tag)}</h2>{''.join(rows)}" for tag, rows in by_tag.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}"
        ' For programs: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"{parts}</main></body></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    head = f'<span class="method">{method}</span> <code>{escape(path)}</code> {escape(operation.get("summary", ""))}'
    if schema is None:
        return f"<details><summary>{head}</summary></details>"
    rows = "".join(_rows(schema))
    return (
        f"<details><summary>{head}</summary><table><thead><tr><th>field</th><th>type</th><th>meaning</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


def _rows(schema: Mapping[str, Any]) -> Iterator[str]:
    needed = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        must = " (required)" if name in needed else ""
        default = f" Default {json.dumps(field['default'])}." if "default" in field else ""
        words = escape(field.get("description", "") + default)
        yield f"<tr><td><code>{escape(name)}</code>{must}</td><td>{escape(_type(field))}</td><td>{words}</td></tr>"


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_type(each) for each in field["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))
