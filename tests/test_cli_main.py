"""The frame of the command line: help, exit codes, what is shown where; and the words for quantities."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llmkit
from conftest import Cli, cli_environment
from llmkit import quants
from llmkit.cli import main as frame
from llmkit.cli import output
from llmkit.errors import InvalidModel
from llmkit.progress import Progress

Verb = Callable[..., int]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], int]], None]:
    """Put a verb of our own in place of `inspect`'s module."""

    def put(run: Callable[[Any], int]) -> None:
        module = ModuleType("probe", "A verb for this test.")
        vars(module).update(run=run, add_arguments=lambda parser: parser.add_argument("what"), EXAMPLES=("llmkit x",))
        vars(module)["KEPT"] = "The first file is whole."
        monkeypatch.setattr(frame, "_load", lambda _: module)

    return put


# ── help ──


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, line in frame.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", shown, re.MULTILINE)


@pytest.mark.parametrize("name", frame.VERBS)
def test_every_verb_explains_itself_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert frame.VERBS[name] in shown
    assert re.search(rf"examples:\n  llmkit {name}\b", shown)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmkit {llmkit.__version__}\n"


def test_help_is_nearly_as_fast_as_a_bare_argparse_program() -> None:
    """The figure proper comes from scripts/bench_help.py; this catches a heavy import on a busy machine."""
    import bench_help

    assert min(bench_help.measure(5)["ratio"] for _ in range(2)) < 2


# ── exit codes ──


def test_no_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main([]) == 2
    assert "verbs:" in capsys.readouterr().err


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["quantise", "x"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "llmkit: error: unknown verb 'quantise'\nhint: Nearest: quantize.\n"


@pytest.mark.parametrize("words", [["--nonsense"], ["inspect"], ["inspect", "a", "b"], ["inspect", "a", "--nonsense"]])
def test_bad_options_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(words) == 2
    assert "usage: llmkit" in capsys.readouterr().err


def test_an_error_shows_message_and_hint_and_no_traceback(tmp_path: Path, cli: Cli) -> None:
    page = tmp_path / "model.gguf"
    page.write_text("<html>gone</html>")
    done = cli("inspect", page)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"llmkit: error: {page}: is an HTML or XML page, not a GGUF file\nhint: ")
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_of_an_error(
    verb: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> int:
        raise InvalidModel("broken", "mend it")

    verb(run)
    monkeypatch.setenv("LLMKIT_DEBUG", "1")
    assert frame.main(["inspect", "x"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("llmkit: error: broken\nhint: mend it\n")


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(lambda _: 1 // 0)
    assert frame.main(["inspect", "x"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "ZeroDivisionError" in shown and "Please report it" in shown


def test_an_interruption_says_what_is_kept(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Any) -> int:
        raise KeyboardInterrupt

    verb(run)
    assert frame.main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "\nInterrupted. The first file is whole.\n"


def test_the_verb_s_own_code_is_returned(verb: Callable[..., None]) -> None:
    verb(lambda args: 0 if args.what == "good" else 1)
    assert frame.main(["inspect", "good"]) == 0
    assert frame.main(["inspect", "bad"]) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_control_c_in_a_real_process() -> None:
    """A verb that waits (for a Hub that never answers) is interrupted from outside."""
    command = [sys.executable, "-m", "llmkit", "inspect", "org/name"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment = cli_environment() | {"HF_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        del environment["HF_HUB_OFFLINE"], environment["TRANSFORMERS_OFFLINE"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            listener.settimeout(30)
            with listener.accept()[0]:
                process.send_signal(signal.SIGINT)
                _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert shown == "\nInterrupted. Nothing was written.\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell")
def test_a_reader_that_stops_reading_is_no_error(smollm2_gguf: Path) -> None:
    script = f"'{sys.executable}' -m llmkit inspect '{smollm2_gguf}' --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=cli_environment(), check=True)
    assert (done.stdout, done.stderr) == ("{\n0\n", "")


# ── verbosity ──


@pytest.mark.parametrize("words", [["-q", "inspect", "x"], ["inspect", "x", "-q"], ["inspect", "--quiet", "x"]])
def test_quiet_before_or_after_the_verb(
    words: list[str], verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> int:
        output.note("a note")
        output.next_command("llmkit chat x")
        output.emit("data")
        return 0

    verb(run)
    assert frame.main(words) == 0
    assert capsys.readouterr() == ("data\n", "")
    assert frame.main(["inspect", "x"]) == 0
    assert capsys.readouterr() == ("data\n", "a note\nnext: llmkit chat x\n")


# ── data ──


def test_tables_align(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("file", "size"), [("a.gguf", 5), ("日本語", 1234), ("e\u0301", 1)], "lr")
    assert capsys.readouterr().out == "file    size\na.gguf     5\n日本語  1234\ne\u0301          1\n"


def test_tables_escape_what_would_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("name",), [("\x1b[2Jgone\nnext",)])
    assert capsys.readouterr().out == "name\n\\x1b[2Jgone\\nnext\n"


def test_json_of_everything_we_have(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Row:
        path: Path
        share: Fraction

    value = {
        "row": Row(Path("a") / "b", Fraction(9, 2)),
        "type": quants.tensor_type("Q8_0"),
        "tuple": (1, True, None),
        "nan": [math.nan, math.inf, 1.5],
        "bytes": b"\xffa",
        "text": "ü\udcff",
    }
    output.emit_json(value)
    read = json.loads(capsys.readouterr().out)
    assert read["row"] == {"path": str(Path("a") / "b"), "share": 4.5}
    assert read["type"]["name"] == "Q8_0" and read["tuple"] == [1, True, None] and read["nan"] == [None, None, 1.5]
    assert read["bytes"] == "\\xffa"


# ── words for quantities ──


@pytest.mark.parametrize(
    ("nbytes", "decimal", "binary"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1.0 kB", "1000 B"),
        (1536, "1.5 kB", "1.5 KiB"),
        (999_960, "1.0 MB", "976.5 KiB"),
        (105_400_000, "105.4 MB", "100.5 MiB"),
        (8 * 10**9, "8.0 GB", "7.5 GiB"),
        (3 << 40, "3.3 TB", "3.0 TiB"),
    ],
)
def test_sizes(nbytes: int, decimal: str, binary: str) -> None:
    assert output.size(nbytes) == decimal
    assert output.size(nbytes, binary=True) == binary


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (0.42, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (80, "1 min 20 s"),
     (3599.7, "1 h 0 min"), (7500, "2 h 5 min")],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert output.duration(seconds) == words


# ── colour ──


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert output.paint("x", colour=31, stream=Terminal()) == "\x1b[38;5;31mx\x1b[0m"
    assert output.paint("x", colour=31, bold=True, stream=Terminal()) == "\x1b[1;38;5;31mx\x1b[0m"
    assert output.paint("x", colour=31, stream=io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("x", colour=31, stream=Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert output.paint("x", colour=31, stream=Terminal()) == "x"


def test_the_ramp_runs_from_unlikely_to_likely() -> None:
    steps = [output.probability_colour(step / 100) for step in range(101)]
    assert steps[0] == output.probability_colour(-1) and steps[-1] == output.probability_colour(2)
    assert steps[0] != steps[-1] and all(0 <= colour <= 255 for colour in steps)
    changes = sum(before != after for before, after in zip(steps, steps[1:], strict=False))
    assert changes == len(set(steps)) - 1  # no colour comes twice


# ── progress ──


def test_a_bar_is_silent_where_nobody_looks() -> None:
    stream = io.StringIO()
    with output.ProgressBar(stream) as bar:
        bar(Progress("writing", 5, 10))
    assert stream.getvalue() == ""


def test_a_bar_draws_each_stage_and_cleans_up() -> None:
    stream = Terminal()
    with output.ProgressBar(stream, interval=3600) as bar:
        for done in (0, 10, 20, 100):
            bar(Progress("reading", done, 100))
        bar(Progress("writing", 1, 3, unit="tensors"))
    drawn = stream.getvalue().split("\r\x1b[K")
    assert [part.split()[0] for part in drawn if part] == ["reading", "reading", "writing"]  # the rest was too soon
    assert "100%" in drawn[2] and drawn[-1] == ""


def test_a_bar_is_silenced_by_quiet() -> None:
    stream = Terminal()
    output.be_quiet(True)
    try:
        output.ProgressBar(stream)(Progress("reading", 1, 2))
    finally:
        output.be_quiet(False)
    assert stream.getvalue() == ""


def test_rate_and_time_left_count_from_where_the_stage_began() -> None:
    line = output.progress_line(Progress("writing", 300_000_000, 500_000_000, detail="blk.0"), 2.0, first=100_000_000)
    assert "60%" in line and "300.0 MB of 500.0 MB" in line and "100.0 MB/s" in line
    assert "2.0 s left" in line and line.endswith("blk.0")


@pytest.mark.parametrize("total", [0, -1])
def test_a_bar_of_nothing_is_full(total: int) -> None:
    assert "100%" in output.progress_line(Progress("writing", 0, total), 0.0)


@pytest.mark.parametrize(
    "text", ["Bonjour\xa0! \u202fça", "你好\u3000世", "👨\u200d👩\u200d👧", "می\u200cخ", "soft\xadhyphen"]
)
def test_ordinary_text_is_printable(text: str) -> None:
    assert output.printable(text) == text


@pytest.mark.parametrize("char", ["\x1b", "\r", "\x00", "\x9b", "\u202e", "\u2066", "\ud800"])
def test_what_drives_a_terminal_is_escaped(char: str) -> None:
    assert char not in output.printable(f"a{char}é")


def test_closed_streams_are_empty_ones() -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m llmkit doctor --json <&- >&- "],
        capture_output=True, text=True, timeout=120, env=cli_environment(),
    )  # fmt: skip
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_verbose_shows_the_engine_s_log(cli: Cli, smollm2_gguf: Path) -> None:
    arguments = ("chat", smollm2_gguf, "--prompt", "hi", "--max-tokens", 1, "--threads", 1)
    assert "llama_model_loader" in cli("-v", *arguments).stderr
    assert "llama_model_loader" not in cli(*arguments).stderr
