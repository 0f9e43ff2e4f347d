"""Calls of functions in the text of a model, told apart whatever the pieces it comes in."""

from __future__ import annotations

import json

import pytest

from llmkit.chat.templates import ChatTemplate, Message
from llmkit.server import tools
from llmkit.server.tools import HERMES, LLAMA, MISTRAL, CallReader, Syntax

NAMES = frozenset({"weather", "add"})


def read(syntax: Syntax, text: str, size: int, inside: bool = False) -> tuple[str, list[tuple[str, object]]]:
    """The text and the calls, of a text that comes `size` characters at a time."""
    reader = CallReader(syntax, NAMES, inside=inside)
    said, calls = "", dict[int, tuple[str, str]]()
    ids = set()
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    for given, deltas in [*map(reader.feed, parts), reader.finish()]:
        said += given
        for delta in deltas:
            assert (delta.id is None) == (delta.name is None) == (delta.index in calls)
            ids.add(delta.id)
            name, arguments = calls.get(delta.index, (delta.name or "", ""))
            calls[delta.index] = name, arguments + delta.arguments
    assert len(ids - {None}) == len(calls) and list(calls) == list(range(len(calls)))
    return said, [(name, json.loads(arguments)) for name, arguments in calls.values()]


PARIS = '{"name": "weather", "arguments": {"city": "Pa}ris \\"x\\"", "days": [1, {"a": 2}]}}'
ARGUMENTS = {"city": 'Pa}ris "x"', "days": [1, {"a": 2}]}
ADD = '{"name": "add", "arguments": {}}'
LLAMA_PARIS = PARIS.replace("arguments", "parameters")

CASES = [
    (HERMES, "Just text, 1 < 2 <tool", ("Just text, 1 < 2 <tool", [])),
    (HERMES, f"<tool_call>\n{PARIS}\n</tool_call>", ("", [("weather", ARGUMENTS)])),
    (
        HERMES,
        f"Let me see.\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>{ADD}</tool_call>",
        ("Let me see.", [("weather", ARGUMENTS), ("add", {})]),
    ),
    (HERMES, f"<tool_call>{PARIS}", ("", [("weather", ARGUMENTS)])),  # the mark at its end is a stop token of some
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', ("", [("add", {"a": 1})])),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("add", {"a": 1})])),
    (HERMES, "<tool_call>no JSON</tool_call> more", ("<tool_call>no JSON</tool_call> more", [])),
    (LLAMA, LLAMA_PARIS, ("", [("weather", ARGUMENTS)])),
    (LLAMA, f"<|python_tag|>{LLAMA_PARIS}; {ADD}", ("", [("weather", ARGUMENTS), ("add", {})])),
    (LLAMA, '{"type": "function", "name": "add", "parameters": {"a": 1}}', ("", [("add", {"a": 1})])),
    (LLAMA, '{"name": "Ada", "parameters": {}}', ('{"name": "Ada", "parameters": {}}', [])),  # an answer in JSON
    (LLAMA, 'The JSON is {"a": 1}.', ('The JSON is {"a": 1}.', [])),
    (MISTRAL, f"[TOOL_CALLS] [{PARIS}, {ADD}]", ("", [("weather", ARGUMENTS), ("add", {})])),
    (
        MISTRAL,
        '[TOOL_CALLS]add[ARGS]{"a": [1]}[TOOL_CALLS]weather[ARGS]{}',
        ("", [("add", {"a": [1]}), ("weather", {})]),
    ),
    (MISTRAL, "A [list] of [TOOL", ("A [list] of [TOOL", [])),
]


@pytest.mark.parametrize("syntax, text, expected", CASES)
def test_calls_are_told_from_text_however_the_pieces_fall(
    syntax: Syntax, text: str, expected: tuple[str, list[tuple[str, object]]]
) -> None:
    for size in (1, 2, 3, 5, 7, 16, 1000):
        assert read(syntax, text, size) == expected, size


@pytest.mark.parametrize("syntax", [HERMES, LLAMA, MISTRAL])
def test_a_call_that_the_prompt_has_opened(syntax: Syntax) -> None:
    text = f"[{PARIS}]" if syntax is MISTRAL else LLAMA_PARIS if syntax is LLAMA else PARIS
    for size in (1, 4, 1000):
        assert read(syntax, text, size, inside=True) == ("", [("weather", ARGUMENTS)])


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(HERMES, NAMES)
    reader.feed('<tool_call>{"name": "weather", "arguments": ')
    _, begun = reader.feed('{"city": "Par')
    assert [(delta.name, delta.arguments) for delta in begun] == [("weather", ""), (None, '{"city": "Par')]
    _, more = reader.feed('is"}')
    assert [delta.arguments for delta in more] == ['is"}']


QWEN = "{% if tools %}<tools>{{ tools | tojson }}</tools> in <tool_call>{% endif %}"


def test_families_by_their_templates() -> None:
    assert tools.syntax_of(None) is HERMES
    assert tools.syntax_of("{{ messages }}") is HERMES
    assert tools.syntax_of(QWEN) is HERMES
    assert tools.syntax_of("{{ tools }}[TOOL_CALLS]") is MISTRAL
    assert tools.syntax_of('{{ tools }}<|python_tag|>{"name", "parameters"}') is LLAMA


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_a_template_that_knows_no_tools_is_given_them_in_words() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        Message("system", "Be brief."), Message("user", "1 + 1?"),
        Message("assistant", "", others={"tool_calls": [call]}), Message("tool", "2"),
    ]  # fmt: skip
    text = template.render(tools.spelled_out(messages, [TOOL])).text
    assert text.startswith("[system]Be brief.\n\nYou may call") and json.dumps(TOOL) in text
    assert '[assistant]<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert text.endswith("[user]<tool_response>\n2\n</tool_response>")


def test_a_template_that_knows_tools_is_given_them() -> None:
    text = ChatTemplate(QWEN + "{% for m in messages %}{{ m.tool_calls }}{{ m.tool_call_id }}{% endfor %}").render(
        [Message("tool", "2", others={"tool_call_id": "abc"})], tools=[TOOL]
    )
    assert json.dumps(TOOL) in text.text and "abc" in text.text
