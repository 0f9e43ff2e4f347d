"""cli/chat/export.py: Markdown, JSON there and back, HTML in which nothing of the model's is markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.chat.record import Conversation
from llmkit.cli.chat import export
from llmkit.cli.chat.keeper import exported

NASTY = "<script>alert(1)</script> & \"quotes\" 'n' ]]> <img src=x onerror=y>"


def spoken(*said: str, questions: tuple[str, ...] = ("Hi",), system: str | None = None) -> Chat:
    chat = Chat(Scripted(said), system=system, sampling=Sampling(temperature=0, seed=5), context=4000)
    for question in questions:
        list(chat.say(question))
    return chat


class Reader(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_a_page_holds_what_was_said_and_nothing_can_run() -> None:
    chat = spoken(NASTY, f"<think>{NASTY}</think>Tschüß 👋", questions=(NASTY, "And?"), system=NASTY)
    page = read(export.page(chat))
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "span", "details", "summary",
    }  # fmt: skip
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.text.count(NASTY) == 6  # title, heading, system, question, answer, reasoning
    assert "Tschüß 👋" in page.text and "temperature 0 · seed 5" in page.text
    assert "http" not in export.page(chat).replace('http-equiv="Content-Security-Policy"', "")


def test_tokens_tell_their_probabilities_on_hovering() -> None:
    chat = spoken("Hé")
    titles = [value or "" for name, value in read(export.page(chat)).attributes if name == "title"]
    probability = 2.718281828459045 ** chat.answers[1].steps[0].logprob
    assert titles[0].startswith(f"H {probability:.1%}, raw\n")
    assert "‹c3›" in titles[1] and "‹a9›" in titles[1]  # one character of two tokens: one span


def test_markdown_reads_as_a_dialogue() -> None:
    text = export.markdown(spoken("Paris.", "Rome.", questions=("France?", "Italy?"), system="Be brief."))
    headings = re.findall(r"^#+ .*$", text, re.MULTILINE)
    assert headings == ["# France?", "## System", "## You", "## Model", "## You", "## Model"]
    assert text.index("Be brief.") < text.index("Paris.") < text.index("Italy?") < text.index("Rome.")


def test_json_there_and_back(tmp_path: Path) -> None:
    chat = spoken("Paris.", "Rome.", questions=("France? \ud83d", "Italy?"))
    list(chat.retry())
    path = tmp_path / "chat.json"
    path.write_text(export.as_json(chat), encoding="utf-8")
    again = exported(path)
    assert again.tree == chat.tree and again.answers == chat.answers and again.sampling == chat.sampling
    assert json.loads(export.as_json(chat)) == json.loads(path.read_text(encoding="utf-8"))
    other = Chat(Scripted(["Paris.", "Rome.", "Madrid."]), conversation=again, context=4000)
    assert "".join(step.text for step in other.say("Spain?")) == "Madrid."
    assert isinstance(again, Conversation) and again.id is None


@pytest.mark.parametrize("form", export.FORMS)
def test_every_form_of_every_conversation(form: str) -> None:
    off = Chat(Scripted(["x"]), n_alternatives=0, context=100)  # no probabilities noted
    list(off.say("Hi"))
    broken = spoken(b"\xe9\xff".decode("latin-1"), "", questions=("a", "b"))  # an empty answer
    for chat in (off, broken):
        assert export.FORMS[form](chat)
