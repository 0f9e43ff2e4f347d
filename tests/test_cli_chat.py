"""cli/chat.py: the real program in child processes, its loop over the scripted backend."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import cli_environment
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.cli import chat as cli_chat
from llmkit.errors import LlmkitError, ModelNotFound, Unsupported

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
GREEDY = ("--temperature", "0", "--threads", "1", "--max-tokens", "60", "--system", "You are a helpful assistant.")


# ── the program ──


def test_one_question_one_answer(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("chat", smollm2_gguf, "--prompt", "What is the capital of France?", *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert "tokens/s" in done.stderr and "of 4096" in done.stderr and "seed" in done.stderr


def test_quiet_leaves_only_the_answer(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("chat", smollm2_gguf, "--prompt", "-", "-q", *GREEDY, input="What is the capital\nof France?")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


def test_probabilities_are_shown_below(cli: Cli, smollm2_gguf: Path) -> None:
    arguments = ("--prompt", "What is the capital of France?", "--show-probabilities", *GREEDY)
    done = cli("chat", smollm2_gguf, *arguments)
    lines = done.stdout.splitlines()
    assert lines[0] == "The capital of France is Paris."
    assert lines[1].split() == "most uncertain probability entropy it might have said".split()
    assert len(lines) == 5 and all("%" in line and "bits" in line for line in lines[2:])


def test_lines_from_a_pipe_are_turns_and_commands(cli: Cli, smollm2_gguf: Path) -> None:
    lines = "What is the capital of France?\n\nAnd of Italy?\n/context\n/set top-k 5\n/exit\nnot reached\n"
    done = cli("chat", smollm2_gguf, *GREEDY, input=lines)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "Rome" in done.stdout
    assert "4 messages" in done.stderr and "messages" not in done.stdout
    assert "reused)" in done.stderr
    assert "top-k           5" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--system", "tutr"), 1, ["no system prompt called 'tutr'", "tutor"]),
        (("--top-p", "7"), 1, ["top-p 7.0", "at most 1"]),
        (("--temperature", "warm"), 2, ["invalid float value"]),
        (("--context", "0"), 2, ["--context", "from 1 to"]),
        (("--context", "16", "--prompt", "x" * 400), 1, ["tokens long, the context holds 16", "--context"]),
    ],
)
def test_mistakes_are_named(
    cli: Cli, smollm2_gguf: Path, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    done = cli("chat", smollm2_gguf, *arguments, input="")
    assert done.returncode == code
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_files_that_are_no_models(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<html>404</html>")
    for model, word in ((page, "HTML"), (tmp_path / "none.gguf", "no such file"), (tmp_path, "is a folder")):
        done = cli("chat", model, input="")
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_help_imports_no_engine() -> None:
    code = (
        "import sys\nfrom llmkit.cli import main\nmain.main(['chat', '--help'])\n"
        "bad = {'numpy', 'llama_cpp', 'jinja2'} & set(sys.modules)\nassert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=cli_environment())
    assert done.returncode == 0, done.stderr
    assert "--show-probabilities" in done.stdout


# ── a terminal ──


class Terminal:
    """`llmkit chat` on a pseudo-terminal, as a user sees it."""

    def __init__(self, *arguments: object) -> None:
        import pty

        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "llmkit", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env={**cli_environment(), "TERM": "dumb"},
            start_new_session=True, preexec_fn=_own_the_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def wait_for(self, word: str, timeout: float = 60) -> None:
        """Read until `word` has come after what was waited for before."""
        end = time.monotonic() + timeout
        while word not in self.seen:
            assert time.monotonic() < end, f"no {word!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:  # the other side has closed
                    assert word in self.seen, self.seen
        self.seen = self.seen.partition(word)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self, word: str) -> None:
        """Ctrl-C until `word` comes: one between prompt and readline's wait for a key is noticed with the next key."""
        for _ in range(10):
            self.type("\x03")
            try:
                self.wait_for(word, timeout=3)
                return
            except AssertionError:
                continue
        raise AssertionError(f"no {word!r} in {self.seen!r}")


def _own_the_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(smollm2_gguf: Path) -> Iterator[Terminal]:
    shown = Terminal(smollm2_gguf, "--temperature", "0", "--threads", "1")
    yield shown
    shown.process.kill()
    shown.process.wait()
    os.close(shown.master)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("Tell me a long story about a dragon.\n")
    terminal.wait_for(" the ")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    assert terminal.process.poll() is None
    terminal.type("/context\n")
    terminal.wait_for("2 messages")
    terminal.wait_for("> ")
    terminal.type("/nonsense\n")
    terminal.wait_for("unknown command")
    terminal.wait_for("> ")
    terminal.interrupt("once more")
    terminal.wait_for("> ")
    terminal.interrupt("\n")
    assert terminal.process.wait(20) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("ending", ["\x04", "/exit\n"])
def test_the_end_of_the_input_and_exit_leave(terminal: Terminal, ending: str) -> None:
    terminal.wait_for("> ")
    terminal.type(ending)
    assert terminal.process.wait(20) == 0


def test_ctrl_c_during_a_single_answer_is_130(smollm2_gguf: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "llmkit",
        "chat",
        str(smollm2_gguf),
        "--prompt",
        "Tell me a long story about a dragon.",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli_environment()) as process:
        assert process.stdout is not None
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "The answer ends here; " in err.decode() and "Traceback" not in err.decode()


# ── the loop ──


def talk(lines: list[str], answers: list[str]) -> cli_chat.Conversation:
    conversation = cli_chat.Conversation(Chat(Scripted(answers), sampling=Sampling(temperature=0), context=500))
    conversation.hold(lines)
    return conversation


def test_commands_change_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(["Hi", "/system You are kind.", "/set min_p 0.2", "/set seed 7", "/probabilities"], ["Yes."])
    assert conversation.chat.system == "You are kind."
    assert conversation.chat.sampling == Sampling(temperature=0, min_p=0.2, seed=7)
    assert conversation.show_probabilities
    assert capsys.readouterr().out.startswith("Yes.\n")
    conversation.hold(["/system tutor", "/clear", "/set seed off", "/help"])
    assert conversation.chat.messages == [] and conversation.chat.sampling.seed is None
    assert conversation.chat.system and "\n" not in conversation.chat.system[:5]
    shown = capsys.readouterr().err  # stdout is no terminal here
    assert all(command in shown for command in cli_chat.COMMANDS)
    conversation.hold(["/system off"])
    assert conversation.chat.system is None


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("/helf", Unsupported, "/help"),
        ("/set tempratur 1", Unsupported, "temperature"),
        ("/set top-k many", Unsupported, "expected a number"),
        ("/set top-p 3", Unsupported, "at most 1"),
        ("/system nobody", ModelNotFound, "nobody"),
    ],
)
def test_mistakes_in_commands_change_nothing(line: str, kind: type[LlmkitError], words: str) -> None:
    conversation = talk([], [])
    before = conversation.chat.sampling
    with pytest.raises(kind) as caught:
        conversation.hold([line])
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert conversation.chat.sampling == before


def test_settings_are_those_of_sampling() -> None:
    fields = {field.replace("-", "_") for field in cli_chat.SAMPLING}
    assert fields | {"repeat_last_n"} == set(Sampling.__dataclass_fields__)


def test_control_characters_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    talk(["Hi"], ["\x1b[31mred\tend"])
    assert capsys.readouterr().out == "\\x1b[31mred\tend\n"


def test_a_context_beyond_the_engine_s_integers(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("chat", smollm2_gguf, "--context", 4294967424, "--prompt", "hi")
    assert done.returncode == 2 and "--context" in done.stderr


def test_a_piped_line_that_begins_with_a_slash(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("chat", smollm2_gguf, *GREEDY, input="/usr/bin/env: what is it?\n/context\n")
    assert done.returncode == 0 and "2 messages" in done.stderr, done.stderr


def test_the_gauge_after_clear(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("chat", smollm2_gguf, *GREEDY, input="Hello\n/clear\n/context\n")
    assert "\n0 of " in done.stderr


@pytest.mark.parametrize(("option", "value"), [("--threads", 513), ("--threads", "x"), ("--gpu-layers", 2**31)])
def test_numbers_beyond_the_engine_s_bounds(cli: Cli, option: str, value: object) -> None:
    done = cli("chat", "model.gguf", option, value)
    assert done.returncode == 2 and f"argument {option}: '{value}' is not a number from" in done.stderr


def test_a_refused_question_is_not_called_stopped(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("chat", smollm2_gguf, "--context", 8, "--prompt", "What is the capital of France?")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the context holds" in done.stderr and "Stopped" not in done.stderr


def test_ctrl_c_before_the_answer_keeps_no_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(Scripted(["Yes."]), context=100)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat._session, "eval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli_chat.answer(chat, "Hi")
    assert "Stopped before the answer; the question is not kept." in capsys.readouterr().err
    assert chat.messages == []


def test_the_prompt_does_not_go_into_a_file(smollm2_gguf: Path) -> None:
    import pty

    ours, theirs = pty.openpty()  # the input is a terminal, the output is not
    os.write(ours, b"/context\n/exit\n")
    command = [sys.executable, "-m", "llmkit", "chat", str(smollm2_gguf), "--threads", "1"]
    done = subprocess.run(command, stdin=theirs, capture_output=True, env=cli_environment(), timeout=60, text=True)
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count("> ") == 2 and "0 messages" in done.stderr


def test_a_file_name_that_is_not_utf8(cli: Cli, smollm2_gguf: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/m\xe9.gguf"
    os.symlink(os.fsencode(smollm2_gguf), path)
    done = cli("chat", os.fsdecode(path), *GREEDY, "--prompt", "hi")
    assert done.returncode == 0, done.stderr
