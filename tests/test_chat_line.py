"""cli/chat/line.py and completion.py: the editor on a real pseudo-terminal, the plain lines, what Tab offers."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.cli.chat import commands, line
from llmkit.cli.chat.commands import candidates
from llmkit.cli.chat.completion import Candidate, files
from llmkit.cli.chat.talk import Talk
from terminal import Terminal

needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
PROGRAM = """
import sys
from pathlib import Path
from llmkit.cli.chat import line
from llmkit.cli.chat.completion import Candidate

def complete(text):
    return [Candidate("/system", len(text), "the system prompt")] if "/system".startswith(text) else []

source = line.Editor(complete, lambda typed: f"[{len(typed)} typed]", Path(sys.argv[1]))
for text in line.lines(source):
    print("GOT", repr(text), flush=True)
    source.several = source.several != (text == "/multi")
print("END", flush=True)
"""


@pytest.fixture
def editor(tmp_path: Path) -> Iterator[Terminal]:
    shown = Terminal([sys.executable, "-c", PROGRAM, tmp_path / "home" / "history"], term="xterm-256color")
    yield shown
    shown.close()


@needs_terminal
def test_the_editor(editor: Terminal, tmp_path: Path) -> None:
    def typed(keys: str, got: str) -> None:
        editor.wait_for("typed]")
        editor.type(keys)
        editor.wait_for(f"GOT {got!r}")

    typed("one\x1b\rtwo\r", "one\ntwo")  # Alt-Enter
    editor.wait_for("typed]")
    editor.type("/sy\t")
    editor.wait_for("stem")
    editor.type(" x\r")
    editor.wait_for("GOT '/system x'")
    typed("\x1b[A\r", "/system x")  # up: the history
    typed("\x1b[200~pasted\rtext\x1b[201~\r", "pasted\ntext")  # bracketed paste
    typed("/multi\r", "/multi")
    typed("a\rb\x1b\r", "a\nb")
    editor.wait_for("typed]")
    editor.type("dropped\x03")
    editor.wait_for("once more")
    typed("/multi\r", "/multi")
    editor.wait_for("typed]")
    editor.type("\x03")
    editor.wait_for("once more")
    editor.wait_for("typed]")
    editor.type("\x03")
    editor.wait_for("END")
    history = (tmp_path / "home" / "history").read_text(encoding="utf-8")
    assert "+pasted\n+text" in history and "dropped" not in history
    assert (tmp_path / "home" / "history").stat().st_mode & 0o77 == 0


@needs_terminal
def test_the_history_of_an_earlier_run_and_ctrl_d(tmp_path: Path) -> None:
    (tmp_path / "history").write_text("\n# 2026-01-01\n+asked before\n", encoding="utf-8")
    shown = Terminal([sys.executable, "-c", PROGRAM, tmp_path / "history"], term="xterm-256color")
    shown.wait_for("typed]")
    shown.type("\x1b[A")
    shown.wait_for("asked before")
    shown.type("\r")
    shown.wait_for("GOT 'asked before'")
    shown.wait_for("typed]")
    shown.type("\x04")
    shown.wait_for("END")
    shown.close()


def test_a_history_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert type(line._history(tmp_path / "file" / "history")).__name__ == "InMemoryHistory"
    assert "not kept" in capsys.readouterr().err


# ── without an editor ──


def test_piped_lines_and_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/multi\ntwo\n\nthree\n.\n/exit"))
    source = line.Plain(typed=False)
    found = []
    for text in line.lines(source):
        found.append(text)
        source.several = source.several or text == "/multi"
    assert found == ["one", "/multi", "two\n\nthree", "/exit"]


def test_no_editor_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert isinstance(line.reader(lambda _: [], lambda _: ""), line.Plain)


# ── completion ──


@pytest.fixture
def talk() -> Iterator[Talk]:
    chat = Chat(Scripted(["Yes."]), sampling=Sampling(temperature=0), context=500)
    list(chat.say("Hi"))
    yield Talk(chat)
    chat.close()


def offered(talk: Talk, text: str) -> list[str]:
    return [each.text for each in candidates(talk, text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/sa", ["/samplers", "/save"]),
        ("/set temp", ["temperature"]),
        ("/set min-p ", ["0.05", "off"]),
        ("/samplers order top_k,te", ["top_k,temperature"]),
        ("/samplers pr", ["precise"]),
        ("/export h", ["html"]),
        ("/system tut", ["tutor"]),
        ("/help /und", ["/undo"]),
        ("/multi o", ["on", "off"]),
        ("/branch new 1", ["1"]),
        ("/instead 1", ["1"]),
        ("/alternatives 1", ["1"]),
        ("a question", []),
        ("/nonsense x", []),
        ("/undo ", []),
    ],
)
def test_what_tab_offers(talk: Talk, text: str, expected: list[str]) -> None:
    assert offered(talk, text) == expected


def test_every_command_offers_without_error(talk: Talk) -> None:
    for name, command in commands.COMMANDS.items():
        for rest in ("", "x", "1 ", "order ", "md "):
            for each in candidates(talk, f"{name} {rest}"):
                assert isinstance(each, Candidate) and each.replaces <= len(rest), command


def test_files_are_offered(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "deep").mkdir()
    assert list(files(f"{tmp_path}/", ".gguf")) == [f"{tmp_path}/a.gguf", f"{tmp_path}/deep/"]
    assert list(files(f"{tmp_path}/nowhere/x", ".gguf")) == []
