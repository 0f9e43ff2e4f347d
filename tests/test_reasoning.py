"""chat/reasoning.py: thinking is told from the answer, however the bytes come, in the marks of real templates."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Message, Sampling
from llmkit.chat.reasoning import FORMS, Reading, opened, prefilled
from llmkit.chat.templates import ChatTemplate

HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
WRITTEN = {
    "<think>\nHm.\n</think>\n\nYes.": ("Hm.", "Yes."),
    "<think>Hm. <think> again</think>Yes.": ("Hm. <think> again", "Yes."),
    "[THINK]Hm.[/THINK]Yes.": ("Hm.", "Yes."),
    "◁think▷Hm.◁/think▷Yes.": ("Hm.", "Yes."),
    "<seed:think>Hm.</seed:think>\nYes.": ("Hm.", "Yes."),
    "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.": ("Hm.", "Yes."),
    "<thinking>Hm.</thinking>Yes.": ("Hm.", "Yes."),
    "<mm:think>Hm.</mm:think>Yes.": ("Hm.", "Yes."),
    "<|channel>thought\nHm.<channel|>Yes.": ("Hm.", "Yes."),
    "<|think|>Hm.<|end|><|begin|>assistant<|content|>Yes.": ("Hm.", "Yes."),
    "<|content|>Yes.": ("", "Yes."),
    HARMONY: ("Hm.", "Yes."),
    "<|channel|>final<|message|>Yes.": ("", "Yes."),
    "\n <think>Hm.</think>\n<think>Ha.</think>\n\nYes.": ("Hm.Ha.", "Yes."),
    "<think>Hm.": ("Hm.", ""),
    "<think>Hm.</thi": ("Hm.</thi", ""),
    "<think></think>\n\nYes.": ("", "Yes."),
    "Yes, <think> is a mark.": ("", "Yes, <think> is a mark."),
    " Yes.\n\n": ("", " Yes.\n\n"),
    "<thin": ("", "<thin"),
    "": ("", ""),
}


def read(text: str, size: int, reading: Reading | None = None) -> tuple[Reading, list[tuple[str, bool]]]:
    reading, raw = reading or Reading(), text.encode()
    given = [reading.feed(raw[at : at + size]) for at in range(0, len(raw), size)]
    return reading, [*given, reading.finish()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("text", WRITTEN)
def test_thinking_and_answer(text: str, size: int) -> None:
    reading, given = read(text, size)
    assert (reading.thinking, reading.text) == WRITTEN[text]
    assert "".join(text for text, _ in given) == "".join(reading._thinking) + reading.text


@pytest.mark.parametrize("text", WRITTEN)
def test_a_token_has_text_of_one_kind(text: str) -> None:
    reading, given = read(text, 1)
    assert "".join(text for text, thought in given if thought).strip() == reading.thinking
    assert "".join(text for text, thought in given if not thought) == reading.text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab<>/thinkT[]\n ", max_size=30), st.integers(1, 9))
def test_however_the_bytes_come_it_is_the_same(text: str, size: int) -> None:
    one, _ = read(text, 1)
    other, given = read(text, size)
    assert (one.text, one.thinking) == (other.text, other.thinking)
    if not text.lstrip().startswith(tuple(form.opens for form in FORMS)):
        assert other.text == text == "".join(text for text, _ in given)


def test_a_block_the_prompt_opens() -> None:
    assert opened("…<|im_start|>assistant\n<think>\n") == FORMS[0]
    assert opened("…<think>\n\n</think>\n\n") is None and opened("") is None
    reading, given = read("Hm.</think>\n\nYes.", 2, Reading(form=opened("<think>\n")))
    assert (reading.thinking, reading.text) == ("Hm.", "Yes.")
    assert given[0] == ("Hm", True)


def test_a_stop_string_and_thinking() -> None:
    reading, _ = read("<think>Hm.</think>Yes.\nUser: no", 1, Reading(["\nUser:"]))
    assert reading.stopped and (reading.thinking, reading.text) == ("Hm.", "Yes.")


def test_what_has_been_shown_is_not_shown_again() -> None:
    reading = Reading()
    reading.skip("abc")
    assert [reading.feed(b"ab")[0], reading.feed(b"cde")[0]] == ["", "de"] and reading.text == "abcde"
    reading.skip("abc")
    assert reading.feed(b"abd")[0] == "abd"  # it turned out to be something else


@pytest.mark.parametrize(
    ("prompt", "thinking", "text", "expected"),
    [
        ("A:", "", "Yes", "A:Yes"),
        ("A:<think>\n", "Hm", "Yes", "A:<think>\nHm\n</think>\n\nYes"),
        ("A:<think>\n", "Hm", "", "A:<think>\nHm"),
        ("A:", "Hm", "Yes", "A:<think>\nHm\n</think>\n\nYes"),
        ("A:", "Hm", "", "A:<think>\nHm"),
    ],
)
def test_a_begun_answer_is_written_as_the_model_would(prompt: str, thinking: str, text: str, expected: str) -> None:
    assert prefilled(prompt, thinking, text) == expected


# ── in a conversation ──

# as Qwen3's: thinking of turns before the last question is left out
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{% endif %}"
    "{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)


def test_thinking_is_kept_beside_the_answer_and_left_out_of_the_next_prompt() -> None:
    backend = Scripted(["<think>\nHm.\n</think>\n\nYes.", "No."], template=TEMPLATE)
    chat = Chat(backend, sampling=Sampling(temperature=0), context=200)
    steps = list(chat.say("a"))
    assert "".join(step.text for step in steps if not step.thinking) == "Yes."
    assert "".join(step.text for step in steps if step.thinking).strip() == "Hm."
    assert chat.messages[-1] == Message("assistant", "Yes.", "Hm.")
    assert chat.used == chat._context.n > len("<think>Hm.</think>Yes.")  # in the engine it still is
    list(chat.say("b"))
    answer = chat.answers[3]
    assert bytes(id for id in answer.prompt if id < 256) == b"aYes.b"
    assert answer.reused == len("a") + 2  # all from the thinking on is new


def test_thinking_can_be_switched() -> None:
    chat = Chat(Scripted(["x"], template=TEMPLATE), context=200)
    assert chat.prompt([Message("user", "a")]).text == "a<end><assistant>"
    chat.thinking = False
    assert chat.prompt([Message("user", "a")]).text == "a<end><assistant><think></think>"


def test_a_block_opened_by_the_template_in_a_conversation() -> None:
    template = TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"

    class Thinker(Scripted):
        def next_token(self, tokens: object) -> int:
            text = bytes(token for token in tokens if token < 256).decode()  # type: ignore[attr-defined]
            said = text.rpartition("<think>\n")[2]
            answer = "Hm.\n</think>\n\nYes."
            return answer.encode()[len(said)] if len(said) < len(answer) else 257

    chat = Chat(Thinker([], template=template), sampling=Sampling(temperature=0, max_tokens=6), context=200)
    steps = list(chat.say("a"))
    assert all(step.thinking for step in steps)
    while chat.answers[1].finish == "length":
        steps += list(chat.go_on())
    assert chat.messages[-1] == Message("assistant", "Yes.", "Hm.")
    assert "".join(step.text for step in steps if not step.thinking) == "Yes."


def test_templates_see_reasoning_only_where_there_is_some() -> None:
    template = ChatTemplate("{% for m in messages %}{{ 'reasoning_content' in m }}{{ m.thinking }},{% endfor %}")
    assert template.render([Message("user", "a"), Message("assistant", "b", "c")]).text == "False,Truec,"
