"""inspection/receipt.py: what a receipt holds is what was, it reads back as it was, its page stands alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmkit import __version__, settings
from llmkit.backends import Backend
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.errors import LlmkitError
from llmkit.inspection import hashes, receipt, receipt_html
from llmkit.inspection.receipt import Receipt

EVIL = "</script><script>alert(1)</script><img src=http://x/y onerror=alert(2)> & \"quotes\" 'too' \u202e\x1b[31m"


@pytest.fixture(scope="module")
def chat(smol: Backend) -> Iterator[Chat]:
    chat = Chat(smol, system="Be brief.", sampling=Sampling(seed=3, max_tokens=8, temperature=0.9), context=512)
    list(chat.say("What is the capital of France?"))
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def kept(chat: Chat) -> Receipt:
    return receipt.of(chat)


def test_it_holds_what_was(kept: Receipt, chat: Chat, smollm2_gguf: Path) -> None:
    assert kept.llmkit == __version__ and kept.engine == chat.backend.info.engine and kept.engine
    assert kept.files[0].sha256 == hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest()
    assert kept.files[0].nbytes == smollm2_gguf.stat().st_size and kept.files[0].name == smollm2_gguf.name
    assert kept.answer == chat.answers[chat.tree.head or 0]
    assert [(each.role, each.text) for each in kept.messages] == [("user", "What is the capital of France?")]
    assert (kept.system, kept.context, kept.threads) == ("Be brief.", 512, 1)
    assert kept.prompt.encode() == b"".join(chat.backend.piece(token) for token in kept.answer.prompt)
    assert "Be brief." in kept.prompt and "capital of France" in kept.prompt
    assert kept.source is None and str(smollm2_gguf.parent) not in kept.json()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and kept.machine.features:
        assert all(re.search(rf"\b{feature}\b", cpuinfo.read_text()) for feature in kept.machine.features)


def test_json_and_page_read_back_as_they_were(kept: Receipt) -> None:
    for text in (kept.json(), kept.html(), "\ufeff" + kept.json(), "\ufeff\r\n" + kept.html()):
        again = receipt.from_text(text)
        assert again.to_json() == kept.to_json()
        facts = receipt.facts_in(text)
        assert receipt.seal(facts) == facts["seal"]


def test_the_seal_shows_any_change(kept: Receipt) -> None:
    facts = json.loads(kept.json())
    facts["answer"]["sampling"]["temperature"] = 0.8
    assert receipt.seal(facts) != facts["seal"]


class Found(HTMLParser):
    """All tags with their attributes, and the text that shows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def test_the_page_stands_alone_and_runs_nothing() -> None:
    """Whatever a model, a user, or a file's name says."""
    chat = Chat(Scripted([EVIL]), system=EVIL, sampling=Sampling(seed=1, max_tokens=500))
    list(chat.say(EVIL))
    made = receipt.of(chat)
    page = Found()
    page.feed(made.html())
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": receipt_html.ELEMENT}]
    assert not {tag for tag, _ in page.tags} & {"img", "link", "iframe", "a", "form", "object", "base"}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "action"} & attrs.keys()]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    policy = [attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert receipt.from_text(made.html()).to_json() == made.to_json()
    titles = [attrs.get("title") or "" for tag, attrs in page.tags if tag == "span"]
    assert sum("raw probability" in title for title in titles) == len(made.answer.steps)


def test_tokens_show_their_alternatives(kept: Receipt) -> None:
    page = Found()
    page.feed(kept.html())
    titles = [attrs["title"] or "" for tag, attrs in page.tags if tag == "span" and attrs.get("style")]
    assert len(titles) == len(kept.answer.steps)
    assert all(len(title.splitlines()) == 6 for title in titles)  # the token, and five alternatives


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no receipt"),
        ("{", "no receipt"),
        ("[1, 2]", "no receipt of llmkit"),
        ('{"form": "llmkit conversation"}', "no receipt of llmkit"),
        ('{"form": "llmkit receipt", "version": 99}', "version 99"),
        ('{"form": "llmkit receipt", "version": 1}', "damaged"),
        ("<html><body>nothing</body></html>", "holds no receipt"),
        ("[" * 100_000, "no receipt"),
    ],
)
def test_what_is_no_receipt(text: str, words: str) -> None:
    with pytest.raises(LlmkitError, match=words):
        receipt.from_text(text)


def test_every_fact_is_needed(kept: Receipt) -> None:
    whole = json.loads(kept.json())
    for key in whole.keys() - {"seal"}:
        with pytest.raises(LlmkitError):
            receipt.from_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        if key not in ("source", "threads", "system"):
            with pytest.raises(LlmkitError):
                receipt.from_text(json.dumps(whole | {key: None}))


@pytest.mark.parametrize("setting", ["mirostat_tau", "mirostat_eta", "dry_base", "temperature", "order"])
def test_settings_need_values(kept: Receipt, setting: str) -> None:
    facts = json.loads(kept.json())
    facts["answer"]["sampling"][setting] = None
    with pytest.raises(LlmkitError):
        receipt.from_json(facts)


def test_a_variation_below_zero_is_damage(kept: Receipt) -> None:
    facts = json.loads(kept.json())
    facts["answer"]["variation"] = -1
    with pytest.raises(LlmkitError, match="damaged: ValueError: variation -1"):
        receipt.from_json(facts)


def test_only_answers_have_receipts() -> None:
    chat = Chat(Scripted(["yes"]), sampling=Sampling(seed=1))
    with pytest.raises(LlmkitError, match="no answer yet"):
        receipt.of(chat)
    list(chat.say("well?"))
    assert receipt.of(chat, chat.tree.head).answer.steps
    with pytest.raises(LlmkitError, match="no answer"):
        receipt.of(chat, chat.tree.path()[0].id)
    with pytest.raises(LlmkitError):
        receipt.of(chat, 99)


def test_a_system_prompt_that_came_later_is_not_in_it(chat: Chat) -> None:
    before, chat.system = chat.system, "Speak like a pirate."
    assert receipt.of(chat).system is None
    chat.system = before
    assert receipt.of(chat).system == "Be brief."


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "home"))
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = hashes.of([file])[0]
    assert (first.sha256, first.remembered) == (hashlib.sha256(b"one").hexdigest(), False)
    assert hashes.of([file])[0].remembered
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert hashes.of([file])[0] == hashes.Hash(hashlib.sha256(b"two").hexdigest(), 3, False)
    (settings.home() / "hashes.json").write_text("{damaged")
    assert not hashes.of([file])[0].remembered
    with pytest.raises(LlmkitError, match="cannot be hashed"):
        hashes.of([tmp_path / "none"])
