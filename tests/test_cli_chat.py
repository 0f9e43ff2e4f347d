"""cli/chat: the real program with a real model, in child processes and on pseudo-terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import cli_environment
from terminal import Terminal

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
    assert lines[1].split() == "token most uncertain raw entropy it might have said (raw)".split()
    assert len(lines) == 5 and all("%" in line and "bits" in line for line in lines[2:])


def test_lines_from_a_pipe_are_turns_and_commands(cli: Cli, smollm2_gguf: Path) -> None:
    lines = "What is the capital of France?\n\nAnd of Italy?\n/context\n/set top-k 5\n/exit\nnot reached\n"
    done = cli("chat", smollm2_gguf, *GREEDY, input=lines)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "Rome" in done.stdout and "not reached" not in done.stdout
    assert "4 messages" in done.stderr and "messages" not in done.stdout
    assert re.search(r"reused \d+ of \d+ tokens", done.stderr)
    assert "top-k    5" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--system", "tutr"), 1, ["no system prompt called 'tutr'", "tutor"]),
        (("--top-p", "7"), 1, ["top-p 7.0", "at most 1"]),
        (("--temperature", "warm"), 1, ["temperature warm: expected"]),
        (("--order", "top_k,tempratur"), 1, ["unknown sampler 'tempratur'", "temperature"]),
        (("--grammar", "root ::= (", "--prompt", "hi"), 1, ["grammar"]),
        (("--json-schema", "{"), 1, ["JSON"]),
        (("--persona", "bobb"), 1, ["bobb", "bob"]),
        (("--load", "nobody"), 1, ["nobody"]),
        (("--prompt", " "), 1, ["the question is empty"]),
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
        "bad = {'llama_cpp', 'jinja2', 'prompt_toolkit', 'numpy'} & set(sys.modules)\nassert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=cli_environment())
    assert done.returncode == 0, done.stderr
    assert "--show-probabilities" in done.stdout


@pytest.mark.slow
def test_what_was_said_is_kept_and_gone_on_with(cli: Cli, smollm2_gguf: Path, tmp_path: Path) -> None:
    env = {**cli_environment(), "LLMKIT_HOME": str(tmp_path)}

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmkit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, **options)  # type: ignore[call-overload, no-any-return]

    asked = "What is the capital of France?\n/save capitals of Europe\n"
    first = run("chat", smollm2_gguf, *GREEDY, input=asked)
    assert "--load 'capitals of Europe'" in first.stderr, first.stderr
    once = run("chat", smollm2_gguf, *GREEDY, "--prompt", "Nothing of this is kept.")
    assert once.returncode == 0
    again = run("chat", "--load", "capitals of Europe", *GREEDY, input="And of Italy?\n/context\n")
    assert "Rome" in again.stdout and "4 messages" in again.stderr, again.stderr
    listed = json.loads(run("chats", "--json").stdout)
    assert [(each["name"], each["messages"]) for each in listed] == [("capitals of Europe", 4)]
    found = run("chats", "italy").stdout
    assert "And of Italy?" in found and "capitals of Europe" in found
    assert run("chats", "--delete", "capitals of Europe", input="").returncode == 1
    assert run("chats", "--delete", "capitals of Europe", "--yes").returncode == 0
    assert "No conversation is kept yet." in run("chats").stdout


def test_a_schema_from_a_file(cli: Cli, smollm2_gguf: Path, tmp_path: Path) -> None:
    schema = tmp_path / "person.json"
    schema.write_text('{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}')
    done = cli("chat", smollm2_gguf, *GREEDY, "--json-schema", schema, "--prompt", "Anna is 31 years old.")
    assert isinstance(json.loads(done.stdout)["age"], int), done.stderr


def test_another_model_in_the_same_conversation(cli: Cli, smollm2_gguf: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    lines = f"What is the capital of France?\n/model {tiny_gguf}\nHi\n/model {tmp_path / 'none.gguf'}\n"
    done = cli("chat", smollm2_gguf, *GREEDY, "--max-tokens", 12, input=lines)
    assert done.returncode == 1 and "no such file" in done.stderr
    assert "2 layers" in done.stderr and done.stderr.count("seed") == 2, done.stderr


@pytest.mark.slow
def test_a_model_without_a_template_and_one_for_embeddings(cli: Cli, tiny_gguf: Path, tmp_path: Path) -> None:
    plain = changed(tiny_gguf, tmp_path / "plain.gguf", without="tokenizer.chat_template")
    done = cli("chat", plain, "--max-tokens", 4, "--prompt", "Hi")
    assert done.returncode == 0 and "has no chat template" in done.stderr and "--persona" in done.stderr, done.stderr
    talked = cli("chat", plain, "--persona", "bob", "--max-tokens", 4, "--prompt", "Hi")
    assert talked.returncode == 0 and "no chat template" not in talked.stderr, talked.stderr
    pooled = changed(tiny_gguf, tmp_path / "pooled.gguf", pooling=1)
    refused = cli("chat", pooled, "--prompt", "Hi")
    assert refused.returncode == 1 and "is an embedding model" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_damaged_store_is_told_and_left_alone(cli: Cli, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.sqlite").write_bytes(b"no database at all" * 500)
    env = {**cli_environment(), "LLMKIT_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "llmkit", "chat", str(tiny_gguf), "--max-tokens", "3"]
    done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and "3 tokens" in done.stderr
    assert done.stderr.count("will not be kept") == 1 and "chats.sqlite: is damaged" in done.stderr
    assert (tmp_path / "chats.sqlite").read_bytes() == b"no database at all" * 500


@pytest.fixture(scope="module")
def tiny_gguf(tiny_checkpoint: Callable[..., Path], gguf_of: Callable[[Path, str], Path]) -> Path:
    return gguf_of(tiny_checkpoint("llama"), "f32")


def changed(source: Path, path: Path, *, without: str = "", pooling: int | None = None) -> Path:
    """A copy of a GGUF without a key, or as one that makes vectors."""
    from llmkit import gguf, gguf_writer
    from llmkit.gguf_values import Value

    file = gguf.read(source)
    metadata = {key: value for key, value in file.metadata.items() if key != without}
    if pooling is not None:
        metadata[f"{file.get('general.architecture')}.pooling_type"] = Value.uint32(pooling)
    raw = source.read_bytes()
    tensors = [(each.name, each.shape, each.type, raw[each.offset : each.offset + each.nbytes])
               for each in file.tensors.values()]  # fmt: skip
    gguf_writer.write(path, metadata, tensors)
    return path


# ── a terminal ──


@pytest.fixture
def terminal(smollm2_gguf: Path) -> Iterator[Terminal]:
    shown = chatting(smollm2_gguf, "--temperature", "0", "--threads", "1")
    yield shown
    shown.close()


def chatting(*arguments: object, term: str = "dumb") -> Terminal:
    return Terminal([sys.executable, "-m", "llmkit", "chat", *arguments], term)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("Tell me a long story about a dragon.\n")
    terminal.wait_for(" the ")
    terminal.type("\x03")
    terminal.wait_for("Stopped; /continue goes on.")
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_real_terminal(smollm2_gguf: Path) -> None:
    shown = chatting(smollm2_gguf, *GREEDY, term="xterm-256color")
    try:
        shown.wait_for("context ······ 0 of 4096")
        shown.type("What is the capital of France?")
        shown.wait_for(" free")
        shown.type("\r")
        shown.wait_for("Paris")
        shown.wait_for("tokens/s")
        shown.wait_for(" free · /help ·")
        shown.type("/why 2\r")
        shown.wait_for("It was the model's first choice")
        shown.wait_for(" free · /help ·")
        shown.type("/edit\r")  # the question is offered
        shown.wait_for("capital of France?")
        shown.type("\x7f" * len("France?") + "Italy?\r")
        shown.wait_for("tokens/s")
        shown.wait_for(" free · /help ·")
        shown.type("/tree\r")
        shown.wait_for("└─ ▸2 you: What is the capital of Italy?")
        shown.wait_for(" free · /help ·")
        shown.type("/exit\r")
        shown.wait_for("--load")
        assert shown.process.wait(20) == 0
    finally:
        shown.close()


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


# ── bad input ──


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
