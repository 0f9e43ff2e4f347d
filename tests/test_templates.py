"""chat/templates.py against transformers' own rendering."""

from __future__ import annotations

from datetime import datetime
from itertools import product
from pathlib import Path

import pytest

from llmkit import gguf
from llmkit.chat.templates import ChatTemplate, Message
from llmkit.errors import InvalidModel, LlmkitError

LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA_3_1 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + \
'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

# what the sandbox offers beyond plain Jinja: loop controls, {% generation %}, namespaces, macros, tojson
EVERYTHING = """
{%- macro show(message) %}{{ message | tojson }}{% endmacro %}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {%- set ns.count = ns.count + 1 %}
    {% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}
    {% else %}
{{ show(message) }}, {{ dict(a=1, b='<é>') | tojson }}, {{ messages[0].content[:3] | upper }}
    {% endif %}
    {% if ns.count > 9 %}{% break %}{% endif %}
{% endfor %}
{{ messages[0].content if messages[0].role == 'system' }}{{ unknown_token }}"""

TEMPLATES = {"llama-3": LLAMA_3, "llama-3.1": LLAMA_3_1, "mistral": MISTRAL, "gemma": GEMMA, "everything": EVERYTHING}

USER = Message("user", '  What\'s 2 < 3 & "é"? 🙂\n')
ANSWER = Message("assistant", "True.\n")
SYSTEM = Message("system", "Be brief.")


def transformers_says(source: str, messages: list[Message], add_generation_prompt: bool) -> str:
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = rendering.render_jinja_template(
        conversations=[[{"role": message.role, "content": message.text} for message in messages]],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    return str(rendered[0])


@pytest.fixture(scope="module")
def sources(smollm2_gguf: Path) -> dict[str, str]:
    return {**TEMPLATES, "smollm2": gguf.read(smollm2_gguf).get("tokenizer.chat_template")}


@pytest.mark.parametrize(
    ("name", "system", "prompt"),
    [
        row
        for row in product([*TEMPLATES, "smollm2"], [True, False], [True, False])
        if not (row[1] and row[0] in ("mistral", "gemma"))  # these know no system role: see the test of merging
    ],
)
def test_rendered_as_transformers_renders(sources: dict[str, str], name: str, system: bool, prompt: bool) -> None:
    messages = [SYSTEM] * system + [USER, ANSWER, USER]
    template = ChatTemplate(sources[name], bos="<s>", eos="</s>")
    found = template.render(messages, add_generation_prompt=prompt)
    assert found.text == transformers_says(sources[name], messages, prompt)
    assert not found.merged_system and template.name == "model" and template.stop == ()


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_template_without_system_role_gets_it_in_the_first_question(name: str) -> None:
    found = ChatTemplate(TEMPLATES[name], bos="<s>", eos="</s>").render([SYSTEM, USER, ANSWER, USER])
    assert found.merged_system
    merged = [Message("user", f"Be brief.\n\n{USER.text}"), ANSWER, USER]
    assert found.text == transformers_says(TEMPLATES[name], merged, True)


def test_a_template_that_drops_the_system_message_silently_is_noticed() -> None:
    drops = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    found = ChatTemplate(drops).render([SYSTEM, USER])
    assert found.merged_system and found.text == f"user: Be brief.\n\n{USER.text}\n"


def test_without_a_template_a_plain_dialogue_is_written_and_told() -> None:
    template = ChatTemplate(None)
    found = template.render([SYSTEM, Message("user", "Hi"), Message("assistant", " Hello"), Message("user", "Bye")])
    assert found.text == "Be brief.\n\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"
    assert template.name == "plain" and template.stop == ("\nUser:",)


def test_the_date_can_be_given() -> None:
    found = ChatTemplate(LLAMA_3_1).render([USER], now=datetime(2024, 7, 26))
    assert "Today Date: 26 Jul 2024" in found.text


def test_a_template_that_refuses_says_why_and_where() -> None:
    template = ChatTemplate("line one\n{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LlmkitError, match="line 2.*roles must alternate"):
        template.render([USER])


@pytest.mark.parametrize("merged", [True, False])
def test_the_engines_refusal_stands_when_merging_does_not_help(merged: bool) -> None:
    with pytest.raises(LlmkitError, match="must alternate"):
        ChatTemplate(MISTRAL).render([SYSTEM] * merged + [USER, USER])


@pytest.mark.parametrize("source", ["\n{% for %}", "\n{{ a b }}", "\n{% endif %}", "\n{{ x | no_such_filter }}"])
def test_a_broken_template_names_its_line(source: str) -> None:
    with pytest.raises(InvalidModel, match="line 2"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    ["\n{{ messages.nothing.more }}", "\n{{ 1 // 0 }}", "\n{{ messages + 1 }}", "\n{{ none() }}", "\n{{ [][0].x }}"],
)
def test_a_failing_template_names_its_line(source: str) -> None:
    with pytest.raises(LlmkitError, match="line 2"):
        ChatTemplate(source).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{{ '%s' | attr('__class__') }}{{ ('a' | attr('format')).__self__ }}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_a_hostile_template_gets_nothing(source: str) -> None:
    try:
        text = ChatTemplate(source).render([USER]).text
    except LlmkitError:
        return
    assert "class" not in text and "uid=" not in text and "module" not in text


def test_a_template_that_never_ends_its_recursion_is_refused() -> None:
    with pytest.raises(LlmkitError):
        ChatTemplate("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}").render([USER])


# --- templates that are hostile, or leave the system prompt out ------------------------------------------------------


@pytest.mark.parametrize("source", [
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "{% if a %}" * 120 + "{% endif %}" * 120,
    "{{ " + "9" * 5000 + " }}",
])  # fmt: skip
def test_templates_python_cannot_compile(source: str) -> None:
    with pytest.raises(InvalidModel, match="chat template"):
        ChatTemplate(source, bos="", eos="").render([Message("user", "hi")])


def test_a_generator_that_is_empty() -> None:
    with pytest.raises(LlmkitError, match="chat template"):
        ChatTemplate("{{ cycler().next() }}", bos="", eos="").render([Message("user", "hi")])


def test_a_system_prompt_is_not_taken_for_shown_because_the_question_contains_it() -> None:
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    prompt = ChatTemplate(only_users, bos="", eos="").render([Message("system", "a"), Message("user", "hallo")])
    assert prompt.merged_system and prompt.text == "a\n\nhallo"
