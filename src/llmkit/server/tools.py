"""Calls of functions in what a model writes, told from its text while the tokens come.

    Hermes, Qwen    <tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>, also where the template knows no tools
    Llama 3         {"name": "f", "parameters": {…}} as the whole answer, perhaps after <|python_tag|>
    Mistral         [TOOL_CALLS][{"name": "f", "arguments": {…}}] or [TOOL_CALLS]f[ARGS]{…}

Arguments are handed on as the model writes them, piece by piece.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chat.streams import held_back
from ..chat.templates import Message

Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Syntax:
    """How a family writes calls. `bare`: an answer that begins with a brace is one; `key` names the arguments."""

    name: str
    opens: str
    closes: str = ""
    key: str = "arguments"
    bare: bool = False


HERMES = Syntax("hermes", "<tool_call>", "</tool_call>")
LLAMA = Syntax("llama", "<|python_tag|>", key="parameters", bare=True)
MISTRAL = Syntax("mistral", "[TOOL_CALLS]")

_HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"([^"\\]*)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED = re.compile(r"([\w.:-]+)(?:\[CALL_ID\][^\[{]*)?\[ARGS\]\s*(?=\{)")
_BETWEEN = re.compile(r"[\s\[\],;]+")
_HEAD_LENGTH = 4096  # longer beginnings are no calls
_OURS = (
    "You may call functions. Here are their signatures:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and its arguments as JSON between these marks, and nothing else:\n"
    '<tool_call>\n{{"name": "…", "arguments": {{…}}}}\n</tool_call>'
)


def knows_tools(template: str | None) -> bool:
    """Whether a chat template does anything with tools."""
    return template is not None and re.search(r"\btools\b", template) is not None


def syntax_of(template: str | None) -> Syntax:
    """The family a chat template belongs to."""
    if template is None or not knows_tools(template):
        return HERMES
    if MISTRAL.opens in template:
        return MISTRAL
    if HERMES.opens in template or not ("python_tag" in template or '"parameters"' in template):
        return HERMES
    return LLAMA


def spelled_out(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """For templates that know no tools: the functions in the system message, calls and results as texts."""
    made = [_plain(message) for message in messages]
    if not tools:
        return made
    told = _OURS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if made and made[0].role == "system":
        return [Message("system", f"{made[0].text}\n\n{told}"), *made[1:]]
    return [Message("system", told), *made]


def _plain(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.text}\n</tool_response>")
    calls = message.others.get("tool_calls") or ()
    written = [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls]
    return Message(message.role, "\n".join(filter(None, [message.text, *written])), message.thinking)


# ── calls that must come ──


def opening(syntax: Syntax) -> str:
    """What the prompt is to end with so that a call follows."""
    return {"hermes": "<tool_call>\n", "mistral": "[TOOL_CALLS]"}.get(syntax.name, "")


def schema(syntax: Syntax, tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON Schema of one call of one of `tools`, in the form that follows `opening`."""
    choices = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, syntax.key: _parameters(tool)},
            "required": ["name", syntax.key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    one = choices[0] if len(choices) == 1 else {"anyOf": choices}
    if syntax is MISTRAL:
        return {"type": "array", "items": one, "minItems": 1, "maxItems": 1}
    return one


def _parameters(tool: Tool) -> Any:
    given = tool["function"].get("parameters")
    return given if given else {"type": "object"}


# ── calls that come ──


@dataclass(frozen=True)
class Delta:
    """Some of call number `index`: its first has an id and the name, all have a piece of the arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class _Value:
    """How far into a JSON object the text is."""

    depth: int = 0
    quoted: bool = False
    escaped: bool = False

    def take(self, text: str) -> tuple[int, bool]:
        """How many characters of `text` belong to it, and whether it is whole."""
        for index, char in enumerate(text):
            if self.quoted:
                if self.escaped or char == "\\":
                    self.escaped = not self.escaped
                elif char == '"':
                    self.quoted = False
            elif char == '"':
                self.quoted = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return index + 1, True
        return len(text), False


@dataclass
class CallReader:
    """Takes the text of an answer; gives what is text of it, and the calls. `inside`: the prompt has opened one.

    What looks like a call and is none is given as text. `names`: the functions there are.
    """

    syntax: Syntax
    names: frozenset[str]
    inside: bool = False
    count: int = 0
    _buffer: str = ""
    _value: _Value | None = None
    _tail: bool = False  # the object around the arguments is still open
    _begun: bool = False  # text has come, so a bare call cannot begin
    _texts: list[str] = field(default_factory=list)
    _deltas: list[Delta] = field(default_factory=list)

    def feed(self, text: str) -> tuple[str, list[Delta]]:
        """What `text` sets free."""
        self._buffer += text
        return self._given(final=False)

    def finish(self) -> tuple[str, list[Delta]]:
        """What was held back."""
        return self._given(final=True)

    def _given(self, final: bool) -> tuple[str, list[Delta]]:
        while self._advance(final):
            pass
        text, deltas = "".join(self._texts), self._deltas
        self._texts, self._deltas = [], []
        return text, deltas

    def _advance(self, final: bool) -> bool:
        """Take from the buffer what is decided; False when nothing more can be."""
        if not self._buffer:
            return False
        if self._value is not None:
            count, whole = self._value.take(self._buffer)
            self._deltas.append(Delta(self.count - 1, self._cut(count)))
            if whole:
                self._value = None
            return whole
        if self._tail:
            end = self._buffer.find("}")
            self._cut(end + 1 if end >= 0 else len(self._buffer))
            self._tail = end < 0
            return True
        return self._call(final) if self.inside else self._text(final)

    def _cut(self, count: int) -> str:
        cut, self._buffer = self._buffer[:count], self._buffer[count:]
        return cut

    def _text(self, final: bool) -> bool:
        """Outside of calls."""
        begun = self._buffer.lstrip()
        if self.syntax.bare and not self._begun and begun[:1] == "{":
            self.inside = True
            return True
        at = self._buffer.find(self.syntax.opens)
        if at >= 0:
            self._say(self._cut(at).rstrip())
            self._cut(len(self.syntax.opens))
            self.inside = True
            return True
        if final:
            self._say(self._cut(len(self._buffer)) if begun or not self.count else "")
            return False
        count = len(self._buffer) - held_back(self._buffer, [self.syntax.opens])
        self._say(self._cut(len(self._buffer[:count].rstrip())))  # white space before a call is none of the answer
        return False

    def _say(self, text: str) -> None:
        if text:
            self._begun = True
            self._texts.append(text)

    def _call(self, final: bool) -> bool:
        """Where a call may begin, or another one, or the mark that ends them."""
        closes, begun = self.syntax.closes, self._buffer.lstrip()
        for mark in filter(None, (closes, self.syntax.opens)):
            if begun.startswith(mark):
                self._buffer = begun[len(mark) :]
                self.inside = mark != closes
                return True
            if not final and mark.startswith(begun):
                return False
        between = _BETWEEN.match(self._buffer)
        if between and (self.syntax is not HERMES or not between[0].strip()):
            self._cut(between.end())
            return True
        found = _HEAD.match(self._buffer)
        named = _NAMED.match(self._buffer) if self.syntax is MISTRAL else None
        if found and self._is_call(found[1]):
            self._open(found[1], found.end(), tail=True)
            return True
        if named:
            self._open(named[1], named.end(), tail=False)
            return True
        return self._whole(final)

    def _is_call(self, name: str) -> bool:
        return name in self.names or not self.syntax.bare

    def _open(self, name: str, count: int, tail: bool) -> None:
        self._cut(count)
        self._begin(name, "")
        self._value, self._tail = _Value(), tail

    def _begin(self, name: str, arguments: str) -> None:
        id = secrets.token_hex(5)[:9] if self.syntax is MISTRAL else f"call_{secrets.token_hex(12)}"
        self._deltas.append(Delta(self.count, arguments, id, name))
        self.count += 1

    def _whole(self, final: bool) -> bool:
        """A call in another order of its parts, once it is whole; or something else, which becomes text."""
        end = self._buffer.find(self.syntax.closes) if self.syntax.closes else -1
        try:
            value, count = json.JSONDecoder().raw_decode(self._buffer)
        except (ValueError, RecursionError):
            value, count = None, 0
        call = _parsed(value)
        if call and self._is_call(call[0]):
            self._cut(count)
            self._begin(*call)
            return True
        if not (final or count or end >= 0 or len(self._buffer) > _HEAD_LENGTH):
            return False
        if final and self.syntax.closes.startswith(self._buffer.strip()) and self.count:
            return bool(self._cut(len(self._buffer)))
        if end >= 0:
            count = end + len(self.syntax.closes)
        self._say((self.syntax.opens if self.syntax is HERMES else "") + self._cut(count or len(self._buffer)))
        self.inside = False
        return True


def _parsed(value: Any) -> tuple[str, str] | None:
    """Name and arguments of a call, if it is one."""
    if not isinstance(value, dict):
        return None
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters", {}))
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
