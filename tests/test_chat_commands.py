"""cli/chat: every command over the scripted backend, what is kept, a full context, an engine that dies."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import cli_environment
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.chat.store import Store
from llmkit.cli.chat import answers, branches, commands, context, line, opening
from llmkit.cli.chat.commands import COMMANDS, MORE
from llmkit.cli.chat.keeper import Keeper
from llmkit.cli.chat.talk import Talk
from llmkit.errors import LlmkitError, ModelNotFound, Unsupported

Begin = Callable[..., Talk]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Maker of talks with a scripted model, kept in a store of the test's own."""
    made = []

    def talk(*said: str, context: int = 600, **options: object) -> Talk:
        chat = Chat(Scripted(said), sampling=Sampling(temperature=0), context=context)
        made.append(Talk(chat, keeper=Keeper(Store(tmp_path / "chats.sqlite")), **options))  # type: ignore[arg-type]
        return made[-1]

    yield talk
    for each in made:
        each.chat.close()


def test_help_names_every_command(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    begin().hold(["/help", *(f"/help {name[1:]}" for name in COMMANDS)])
    shown = capsys.readouterr().err  # stdout is no terminal here
    assert all(shown.count(command.usage) >= 2 for command in COMMANDS.values())
    assert set(MORE) <= set(COMMANDS)


def test_commands_change_the_conversation(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin("Yes.")
    talk.hold(["Hi", "/system You are kind.", "/set min_p 0.2", "/set seed 7", "/probabilities"])
    assert talk.chat.system == "You are kind."
    assert talk.chat.sampling == Sampling(temperature=0, min_p=0.2, seed=7)
    assert talk.show.probabilities
    assert capsys.readouterr().out == "Yes.\n"
    talk.hold(["/system tutor", "/clear", "/set seed off", "/probabilities off"])
    assert talk.chat.messages == [] and talk.chat.sampling.seed is None and not talk.show.probabilities
    assert talk.chat.system and "\n" not in talk.chat.system[:5]
    talk.hold(["/system off"])
    assert talk.chat.system is None


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("/helf", Unsupported, "/help"),
        ("/set tempratur 1", Unsupported, "temperature"),
        ("/set top-k many", Unsupported, "expected"),
        ("/set top-p 3", Unsupported, "at most 1"),
        ("/set top-p", Unsupported, "value is missing"),
        ("/samplers order top_k,tpo_p", Unsupported, "top_p"),
        ("/samplers kreative", Unsupported, "creative"),
        ("/system nobody", ModelNotFound, "nobody"),
        ("/prompts tutr", ModelNotFound, "tutor"),
        ("/prompts tutor please", Unsupported, "expected a name"),
        ("/personas nobody", ModelNotFound, "nobody"),
        ("/retry", LlmkitError, "Ask a question first"),
        ("/edit what", LlmkitError, "Ask a question first"),
        ("/continue", LlmkitError, "Ask a question first"),
        ("/undo", LlmkitError, "Ask a question first"),
        ("/undo 2", Unsupported, "nothing is expected after it, found '2'"),
        ("/branch 7", ModelNotFound, "no message '7'"),
        ("/branch a b", Unsupported, "expected a message's number"),
        ("/tokens", LlmkitError, "no answer yet"),
        ("/why", Unsupported, "number is missing"),
        ("/why 1", LlmkitError, "no answer yet"),
        ("/instead 1 x", LlmkitError, "no answer yet"),
        ("/alternatives 1", LlmkitError, "no answer yet"),
        ("/save", LlmkitError, "nothing to keep"),
        ("/load", Unsupported, "name or number is missing"),
        ("/load nobody", LlmkitError, "nobody"),
        ("/export", Unsupported, "md, json, html"),
        ("/export pdf", Unsupported, "md, json, html"),
        ("/export md", LlmkitError, "nothing to export"),
        ("/receipt", LlmkitError, "no answer yet"),
        ("/model other.gguf", Unsupported, "no other model"),
        ("/thoughts maybe", Unsupported, "expected on or off"),
    ],
)
def test_mistakes_in_commands_change_nothing(begin: Begin, text: str, kind: type[LlmkitError], words: str) -> None:
    talk = begin("Yes.", typed=False)
    before = talk.chat.sampling
    with pytest.raises(kind) as caught:
        commands.obey(talk, text)
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert talk.chat.sampling == before and not talk.chat.tree.nodes


# ── back, on and sideways ──


def test_branches(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin("One.", "Two.")
    talk.hold(["a", "b", "/retry", "/edit c", "/undo", "/branch new 1", "d"])
    assert capsys.readouterr().out == "One.\nTwo.\nTwo.\nTwo.\nTwo.\n"
    texts = {node.id: node.text for node in talk.chat.tree.nodes.values()}
    assert [texts[id] for id in sorted(texts)] == ["a", "One.", "b", "Two.", "Two.", "c", "Two.", "d", "Two."]
    assert [message.text for message in talk.chat.messages] == ["a", "One.", "d", "Two."]
    assert list(branches.tree_lines(talk.chat)) == [
        "▸0 you: a",
        "▸1 model: One.",
        "├─  2 you: b",
        "│  ├─  3 model: Two.",
        "│  └─  4 model: Two.",
        "├─  5 you: c",
        "│   6 model: Two.",
        "└─ ▸7 you: d",
        "   ▸8 model: Two.",
    ]
    talk.hold(["/branch 5", "/tree", "/branch"])
    assert [message.text for message in talk.chat.messages] == ["a", "One.", "c", "Two."]
    assert "▸  5  you: c" in capsys.readouterr().err


def test_instead_and_continue(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin("Yes.")
    talk.hold(["Hi", "/instead 2 X", "/set max-tokens 1", "/retry", "/set max-tokens off", "/continue"])
    out = capsys.readouterr().out.split("\n")
    assert out[0] == "Yes." and out[1].startswith("YX")  # what was kept is shown again, then the new
    assert out[2:5] == ["Y", "es.", ""]
    assert talk.chat.messages[-1].text == "Yes."
    parted = next(text for text in branches.tree_lines(talk.chat) if "YX" in text)
    assert re.search(r"\(token 2: X 0\.\d%\)$", parted)
    for wrong in ("/instead 9 x", "/instead one x", "/instead 1", "/instead 1 two"):
        with pytest.raises(LlmkitError):
            talk.hold([wrong])


def test_alternatives_go_on_at_once_and_one_is_taken(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = begin("Yes.", typed=True, source=line.Plain(typed=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n7\n1\n2\n"))
    talk.hold(["Hi", *["/alternatives 2 3"] * 3])
    step = talk.chat.answers[1].steps[1]
    assert len(talk.chat.tree.nodes) == 2  # no, there is none of that number, it was said already
    shown = capsys.readouterr()
    assert shown.out == "Yes.\n" and "Go on from 1 to 3, drawn by the samplers? [no]" in shown.err
    rows = re.findall(r"^([▸ ])(\d)  (\S+) +([\d.]+%) +(\S+)  (.*)$", shown.err, re.MULTILINE)[:3]
    assert [(row[0], row[1]) for row in rows] == [("▸", "1"), (" ", "2"), (" ", "3")]
    assert [row[3] for row in rows] == [f"{math.exp(each.logprob):.1%}" for each in step.alternatives[:3]]
    assert rows[0][5] == "es. ■"
    talk.hold(["/alternatives 2 3"])
    assert talk.chat.answers[2].tokens[:2] == (talk.chat.answers[1].steps[0].id, step.alternatives[1].id)
    for wrong in ("/alternatives", "/alternatives 9", "/alternatives 1 0", "/alternatives 1 x"):
        with pytest.raises(LlmkitError):
            commands.obey(talk, wrong)
    before = talk.chat.tree.head
    talk.typed = False  # nobody is there to be asked
    talk.hold(["/alternatives 1"])
    assert talk.chat.tree.head == before


def test_why_and_tokens(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin("Yes.")
    talk.hold(["Hi", "/tokens", "/tokens é b", "/why 1", "/context", "/doubt"])
    shown = capsys.readouterr().err
    assert "0 of 4 tokens are doubtful" in shown and "Certainty is not truth" in shown
    assert "‹c3›" in shown and "␣" in shown
    probability = talk.chat.answers[1].steps[0].logprob
    assert f"{2.718281828459045**probability:.1%}" in shown
    assert "The samplers left nothing else: it is said with any seed." in shown
    assert f"{talk.chat.used} of 600 tokens" in shown


def test_a_deep_tree_is_drawn(begin: Begin) -> None:
    talk = begin("One.")
    for _ in range(1500):
        head = talk.chat.tree.head
        talk.chat.tree.add(head, "user", "a")
        talk.chat.tree.add(head, "user", "b")
    assert sum(1 for _ in branches.tree_lines(talk.chat)) == 3000


def test_prompts_of_one_s_own(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path))
    own = tmp_path / "prompts" / "system"
    own.mkdir(parents=True)
    (own / "tutor.md").write_text("Teach me.\nSlowly.")
    (own / "empty.md").write_text("")
    (own / "broken.md").write_bytes(b"\xff\xfe\x00")
    talk = begin()
    talk.hold(["/prompts", "/personas", "/prompts tutor use"])
    shown = capsys.readouterr().err
    assert re.search(r"tutor +yours, in place of ours +Teach me\.\n", shown)
    assert "empty" in shown and "broken" in shown and "socrates" in shown and str(own) in shown
    assert talk.chat.system == "Teach me.\nSlowly."


def test_samplers_are_shown_in_their_order(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin()
    talk.hold(["/samplers order temperature,top_k", "/samplers creative"])
    assert talk.chat.sampling.order == ("temperature", "top_k") and talk.chat.sampling.temperature == 1.2
    shown = capsys.readouterr().err
    assert shown.index("1  temperature 0\n") < shown.index("2  top-k 40") < shown.index("1  temperature 1.2")
    assert "Left out of the order: logit_bias, grammar" in shown
    assert "xtc has no effect: it is not in the order" in shown and "min_p has no effect" not in shown
    talk.hold(["/set top-k 7", "/set mirostat 2", "/set top-k 8"])
    assert capsys.readouterr().err.count("top_k has no effect: mirostat takes its place") == 1


def test_a_grammar_that_is_none_is_told_at_once(begin: Begin) -> None:
    talk = begin("Yes.")
    for wrong in ("/set json-schema {", "/set logit-bias 99999:1"):
        with pytest.raises(LlmkitError):
            talk.hold([wrong])
    assert talk.chat.sampling == Sampling(temperature=0)


# ── what is kept ──


def test_each_answer_is_kept(begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin("One.", "Two.")
    talk.hold(["first words", "/save trip", "more"])
    store = Store(tmp_path / "chats.sqlite")
    kept = store.load("trip")
    assert [node.text for node in kept.tree.path()] == ["first words", "One.", "more", "Two."]
    assert kept.answers == talk.chat.answers
    again = begin("One.", "Two.", "Three.")
    again.hold(["/load trip", "and then?", "/chats", "/chats first", "/chats nothing-like-it"])
    shown = capsys.readouterr()
    assert shown.out.endswith("Three.\n") and "trip: 4 messages so far." in shown.err
    assert "6 messages" in shown.err and "Nothing kept says that." in shown.err
    assert len(store.list()) == 1 and len(store.load("trip").tree.nodes) == 6


def test_ctrl_c_while_the_model_is_freed_waits(begin: Begin) -> None:
    done = []

    class Loader:
        def close(self) -> None:
            signal.raise_signal(signal.SIGINT)
            done.append("freed")

    with pytest.raises(KeyboardInterrupt):
        begin(loader=Loader()).close()
    assert done == ["freed"]


def test_ctrl_c_while_it_is_kept_waits(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = begin("One.", "Two.")
    write = Store._write

    def interrupted(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.hold(["a"])
    monkeypatch.undo()
    assert talk.chat.conversation.id == 1
    assert talk.keeper.store and len(talk.keeper.store.load(1).tree.nodes) >= 1
    talk.hold(["b"])
    assert [each.id for each in talk.keeper.store.list()] == [1]


def test_the_loaded_model_goes_on_with_what_another_said(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin("One.")
    talk.chat.conversation.model = "/models/other.gguf"
    talk.hold(["a", "/save trip"])
    again = begin("One.", "Two.")
    again.chat.conversation.model = "this.gguf"
    again.hold(["/load trip", "b", "/model"])
    shown = capsys.readouterr().err
    assert "It was held with /models/other.gguf; this.gguf goes on with it." in shown
    assert re.search(r"^model +this\.gguf$", shown, re.MULTILINE)
    assert "chat this.gguf --load trip" in again.keeper.again(again.chat.conversation)


def test_a_store_that_fails_is_told_once_and_the_talk_goes_on(
    begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chats.sqlite").write_bytes(b"this is no database" * 1000)
    talk = begin("One.", "Two.")
    talk.hold(["a", "b"])
    shown = capsys.readouterr()
    assert shown.out == "One.\nTwo.\n" and len(talk.chat.messages) == 4
    assert shown.err.count("could not be kept") == 1 and "chats.sqlite" in shown.err
    assert (tmp_path / "chats.sqlite").read_bytes() == b"this is no database" * 1000


def test_an_export_is_loaded_again(begin: Begin, tmp_path: Path) -> None:
    talk = begin("One.")
    talk.hold(["a", f"/export json {tmp_path / 'a.json'}"])
    other = begin("One.", "Two.")
    other.hold([f"/load {tmp_path / 'a.json'}", "b"])
    assert [message.text for message in other.chat.messages] == ["a", "One.", "b", "Two."]
    for damage in ("", "{}", "[1, 2]", (tmp_path / "a.json").read_text().replace('"parent": 0', '"parent": 5')):
        (tmp_path / "bad.json").write_text(damage)
        with pytest.raises(LlmkitError, match=r"bad\.json: "):
            other.hold([f"/load {tmp_path / 'bad.json'}"])
        assert len(other.chat.messages) == 4


# ── trouble ──


def test_when_the_context_is_full_the_user_chooses(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [f"question {number} " + "x" * 40 for number in range(4)]
    talk = begin(*["y" * 40] * 8, context=330, when_full="ask", source=line.Plain(typed=False))
    monkeypatch.setattr(sys, "stdin", io.StringIO("stop\nsl\n"))
    talk.hold(questions[:3])
    with pytest.raises(LlmkitError, match="the context holds 330"):
        talk.hold([questions[3]])
    assert len(talk.chat.messages) == 6  # nothing is lost
    talk.hold([questions[3]])
    shown = capsys.readouterr().err
    assert shown.count("forget the oldest turns") == 2
    assert "To make room" in shown and talk.when_full == "slide"
    assert len(talk.chat.messages) == 8 and talk.chat.used < 330
    talk.hold(["/context"])
    assert "have left the context to make room" in capsys.readouterr().err


def test_a_question_longer_than_the_context_is_refused(begin: Begin) -> None:
    talk = begin("Yes.", context=50, when_full="ask")
    with pytest.raises(LlmkitError) as caught:
        talk.hold(["x" * 80])
    assert "--context" in (caught.value.hint or "") and not talk.chat.tree.nodes


def test_an_embedding_model_is_refused() -> None:
    from dataclasses import replace

    info = Scripted([]).info
    opening.refuse_what_cannot_chat(info)
    for vectors in (replace(info, pooling="mean"), replace(info, generates=False)):
        with pytest.raises(Unsupported, match="embedding model"):
            opening.refuse_what_cannot_chat(vectors)


ABORTING = """
import os, sys
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.chat.store import Store
from llmkit.cli.chat import keeper
from llmkit.cli.chat.talk import Talk

chat = Chat(Scripted(["One.", "Two."]), sampling=Sampling(temperature=0), context=600)
chat.conversation.model = "model.gguf"
talk = Talk(chat, keeper=keeper.Keeper(Store(sys.argv[1])))
talk.keeper.watch(chat.conversation)
keeper.EVERY = 0
if sys.argv[2] == "loaded":
    talk.hold(["/load 1"])
    os.abort()
talk.hold(["first"])
if sys.argv[2] == "well":
    talk.close()
    sys.exit()
steps = chat.say("second")
def dying():
    for step in steps:
        yield step
        if step.text == "w":
            os.abort()
talk.answer(dying)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_engine_that_aborts_leaves_words_and_the_conversation(tmp_path: Path) -> None:
    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ABORTING, str(tmp_path / "chats.sqlite"), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=cli_environment())

    died = run("badly")
    assert died.returncode == -signal.SIGABRT
    assert "llmkit: error: the process died" in died.stderr
    assert "hint: The conversation is kept up to its last answer: llmkit chat model.gguf --load 1" in died.stderr
    kept = Store(tmp_path / "chats.sqlite").load(1)
    assert [node.text for node in kept.tree.path()] == ["first", "One.", "second", "Tw"]
    assert "kept up to its last answer: llmkit chat model.gguf --load 1" in run("loaded").stderr
    assert run("well").stderr.count("died") == 0


# ── the screen ──


def test_the_bar_shows_what_is_used() -> None:
    assert context.bar(0, 100, 4) == "····" and context.bar(100, 100, 4) == "████"
    assert context.bar(1, 10_000, 4) == "▏···" and context.bar(50, 100, 4) == "██··" and context.bar(7, 0) == "······"


def test_the_meter_counts_what_is_typed(begin: Begin) -> None:
    talk = begin("Yes.")
    talk.hold(["Hi"])
    assert f" {talk.chat.used} of 600" in context.live(talk.chat, "")
    asked = context.live(talk.chat, "And?")
    talk.hold(["And?"])
    assert talk.chat.turn is not None
    assert f" {talk.chat.turn.prompt} of 600 · {600 - talk.chat.turn.prompt} free" in asked
    assert "too many" in context.live(talk.chat, "x" * 700)
    assert " of 600 + this long question · " in context.live(talk.chat, "x" * 20_000)  # not counted with each key


def test_reasoning_is_folded(capsys: pytest.CaptureFixture[str], begin: Begin) -> None:
    talk = begin("<think>long\nthoughts</think>Yes.", "<think>more</think>No.")
    talk.hold(["Hi"])
    shown = capsys.readouterr()
    assert shown.out.strip() == "Yes." and "▸ thought for" in shown.err and "thoughts</" not in shown.err
    talk.hold(["/thoughts", "Why?"])
    shown = capsys.readouterr()
    assert "long\nthoughts" in shown.err and "more" in shown.out and shown.out.endswith("No.\n")


def test_control_characters_do_not_reach_the_terminal(
    begin: Begin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    talk = begin("\x1b[31mred\tend")
    talk.hold(["\x1b]0;title\x07 hi"])
    assert capsys.readouterr().out == "\\x1b[31mred\tend\n"
    talk.hold(["/tree", "/tokens", "/why 1", "/context", "/branch", "/chats", "/save \x1b[0m", "/chats red", "/undo"])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\x07" not in shown.out + shown.err


def test_ctrl_c_before_the_answer_keeps_no_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(Scripted(["Yes."]), context=100)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat._context, "fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers.answer(chat, "Hi")
    assert "Stopped before the first token; the conversation is as it was." in capsys.readouterr().err
    assert chat.messages == []


def test_json_is_what_it_says(begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = begin("One.")
    talk.hold(["a", f"/export json {tmp_path / 'a.json'}"])
    assert json.loads((tmp_path / "a.json").read_text())["form"] == "llmkit conversation"
    with pytest.raises(LlmkitError, match="is there already"):
        talk.hold([f"/export json {tmp_path / 'a.json'}"])


def test_a_receipt_of_any_answer(begin: Begin, tmp_path: Path) -> None:
    talk = begin("One.", "Two.")
    talk.hold(["a", "b", f"/receipt {tmp_path / 'last.html'}", f"/receipt 1 '{tmp_path / 'first one.json'}'"])
    first = json.loads((tmp_path / "first one.json").read_text(encoding="utf-8"))
    assert first["answer"]["node"] == 1 and '"node": 3' in (tmp_path / "last.html").read_text(encoding="utf-8")
    for wrong in ("/receipt 0", "/receipt 99"):
        with pytest.raises(LlmkitError):
            talk.hold([wrong])
