"""The messages and tools of a request, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat.templates import ChatTemplate, Message
from . import tools as calls
from .checking import Schema
from .errors import Refused

_TEXT: Schema = {"type": "string"}
_CONTENT: Schema = {
    "description": "A text, or parts of type text.",
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "maxItems": 1000,
            "items": {
                "type": "object", "required": ["type"], "properties": {"type": _TEXT, "text": _TEXT, "refusal": _TEXT},
            },
        },
        {"type": "null"},
    ],
}  # fmt: skip
_FUNCTION: Schema = {"type": "object", "required": ["name"], "properties": {"name": _TEXT, "arguments": _TEXT}}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _CONTENT,
        "name": _TEXT,
        "reasoning_content": {"type": "string", "description": "What the model thought, given back."},
        "tool_call_id": _TEXT,
        "tool_calls": {
            "type": "array",
            "maxItems": 128,
            "items": {"type": "object", "required": ["function"], "properties": {"id": _TEXT, "function": _FUNCTION}},
        },
    },
}
_TOOL: Schema = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 64},
                "description": _TEXT,
                "parameters": {"type": "object"},
            },
        },
    },
}
FIELDS: dict[str, Schema] = {
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 10_000},
    "tools": {"type": "array", "items": _TOOL, "maxItems": 128, "description": "Functions the model may call."},
    "tool_choice": {
        "description": "none, auto, required, or one function by its name; the last two are enforced by a grammar.",
        "anyOf": [
            {"type": "string", "enum": ["none", "auto", "required"]},
            {
                "type": "object",
                "required": ["type", "function"],
                "properties": {
                    "type": {"type": "string", "enum": ["function"]},
                    "function": {"type": "object", "required": ["name"], "properties": {"name": _TEXT}},
                },
            },
        ],
    },
    "parallel_tool_calls": {"type": "boolean", "description": "false: one call at most."},
    "reasoning_effort": {"type": "string", "description": "none: without thinking, where the template has a switch."},
    "chat_template_kwargs": {
        "type": "object",
        "properties": {"enable_thinking": {"type": "boolean"}},
        "description": "enable_thinking: whether a reasoning model may think first.",
    },
}


@dataclass(frozen=True)
class Asked:
    """What a prompt is made of. `tools`: those that may be called; `forced`: that one of them must be."""

    messages: tuple[Message, ...]
    tools: tuple[calls.Tool, ...] = ()
    forced: bool = False
    thinking: bool | None = None


def asked(body: Mapping[str, Any]) -> Asked:
    """What a checked body asks for. Raises Refused."""
    found = [_message(each, f"messages[{index}]") for index, each in enumerate(body["messages"])]
    tools, forced = _tools(body)
    thinking = (body.get("chat_template_kwargs") or {}).get("enable_thinking")
    if thinking is None and body.get("reasoning_effort") in ("none", "off"):
        thinking = False
    return Asked(tuple(_one_system(found)), tools, forced, thinking)


def rendered(template: ChatTemplate, source: str | None, asked: Asked, thinking: bool | None) -> str:
    """The prompt's text. `source`: the template's, as the model's file has it. Raises LlmkitError."""
    if calls.knows_tools(source):
        return template.render(asked.messages, tools=asked.tools, thinking=thinking).text
    return template.render(calls.spelled_out(asked.messages, asked.tools), thinking=thinking).text


def _message(given: Mapping[str, Any], at: str) -> Message:
    role = "system" if given["role"] == "developer" else given["role"]
    others: dict[str, Any] = {name: given[name] for name in ("name", "tool_call_id") if given.get(name)}
    if role == "assistant" and given.get("tool_calls"):
        others["tool_calls"] = [_call(each) for each in given["tool_calls"]]
    elif given.get("content") is None and role != "assistant":
        raise Refused(f"{at}.content is missing", param=f"{at}.content", code="missing_field")
    text = _text(given.get("content"), f"{at}.content")
    return Message(role, text, given.get("reasoning_content") or "", others)


def _text(content: Any, at: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part["type"] not in ("text", "input_text", "output_text", "refusal"):
            raise Refused(
                f"{at}[{index}]: parts of type {part['type'][:40]!r} are not supported, expected text",
                param=f"{at}[{index}].type",
                code="unsupported",
            )
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)


def _call(given: Mapping[str, Any]) -> dict[str, Any]:
    """As templates want it: the arguments as an object, where they are one."""
    function = given["function"]
    written = function.get("arguments") or "{}"
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):
        arguments = written
    told = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": given["id"], **told} if given.get("id") else told


def _one_system(messages: Sequence[Message]) -> list[Message]:
    """The system messages at the beginning as one: templates know one."""
    count = next((index for index, each in enumerate(messages) if each.role != "system"), len(messages))
    if count < 2:
        return list(messages)
    return [Message("system", "\n\n".join(each.text for each in messages[:count])), *messages[count:]]


def _tools(body: Mapping[str, Any]) -> tuple[tuple[calls.Tool, ...], bool]:
    tools, choice = tuple(body.get("tools") or ()), body.get("tool_choice", "auto")
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Refused(f"tools: {twice!r} is there twice", param="tools", code="invalid_value")
    if choice == "none":
        return (), False
    if choice == "auto":
        return tools, False
    if not tools:
        raise Refused("tool_choice asks for a call, and there are no tools", param="tool_choice", code="invalid_value")
    if choice == "required":
        return tools, True
    wanted = choice["function"]["name"]
    if wanted not in names:
        raise Refused(f"tool_choice: {wanted[:64]!r} is none of the tools", param="tool_choice", code="invalid_value")
    return tuple(tool for tool in tools if tool["function"]["name"] == wanted), True
