"""Records a session of `llmkit chat` in a tmux pane: what is typed here is typed there, what is seen there is kept.

    python scripts/record_chat.py MODEL.gguf [--quick] [--out docs/chat-session]

Writes OUT.md (the screens as text) and OUT.svg (the screens in colour). The seed is fixed, so that the same build on
the same kind of machine gives the same answers; times differ. Needs tmux.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLUMNS, ROWS = 112, 38
PROMPT = "> "
# what is typed → why it is shown; a line beginning with a key's name in < > is that key
SCENES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "An answer, token by token, in the colours of their probabilities",
        ("/probabilities on", "What is the capital of France?"),
    ),
    ("Its tokens: the model's own probability, and the one it was drawn with", ("/tokens",)),
    ("Why a token was said, through every sampler", ("/why 6",)),
    (
        "Where other tokens would have led, all at once; one is taken, as a branch that shares what came before",
        ("/alternatives 6", "4", "/tree"),
    ),
    ("What fills the context, right to the token", ("/probabilities off", "And of Italy?", "/context")),
    ("The samplers in their order", ("/set temperature 1.1", "/samplers")),
    ("Kept, searchable, exported", ("/save paris", "/chats Italy", "/export html")),
)
QUICK = 2


@dataclass(frozen=True)
class Screen:
    """What was seen after a scene: lines with their colours as escape codes."""

    title: str
    lines: tuple[str, ...]


class Pane:
    """A tmux pane of fixed size, on a server of its own, with a program in it."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._socket = str(folder / "tmux")
        words = ["env", "-u", "NO_COLOR", *(f"{name}={value}" for name, value in environment.items()), *command]
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        self._tmux("-f", "/dev/null", "new-session", "-d", "-s", "chat", *size, "-c", str(folder), *words)
        self._tmux("set", "-g", "history-limit", "5000")

    def type(self, text: str) -> None:
        """Type a line and Enter."""
        self._tmux("send-keys", "-t", "chat", "-l", text)
        self._tmux("send-keys", "-t", "chat", "Enter")

    def lines(self) -> list[str]:
        """All that has been on the screen, with colours."""
        return self._tmux("capture-pane", "-t", "chat", "-e", "-p", "-S", "-").rstrip("\n").split("\n")

    def wait_for_prompt(self, timeout: float = 120) -> None:
        """Until an empty prompt, or a question, is the last thing on the screen but the meter, and nothing moves."""
        end, before = time.monotonic() + timeout, [""]
        while time.monotonic() < end:
            time.sleep(0.4)
            now = self.lines()
            shown = [line for line in map(plain, now) if line.strip()]
            if now == before and any(
                line.rstrip() == PROMPT.rstrip() or line.rstrip().endswith("? [no]") for line in shown[-2:]
            ):
                return
            before = now
        raise TimeoutError(f"no prompt after {timeout:.0f} s: {before[-5:]}")

    def close(self) -> None:
        """End the program and the server."""
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True, check=False)

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-S", self._socket, *words], capture_output=True, text=True, check=True)
        return done.stdout


def plain(line: str) -> str:
    """A line without its escape codes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def record(model: Path, quick: bool) -> list[Screen]:
    """Play the scenes against a real `llmkit chat`; returns what was seen after each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.symlink(model.resolve(), folder / "smollm2-135m-instruct.gguf")
        source = str(Path(__file__).resolve().parents[1] / "src")
        environment = {
            "TERM": "xterm-256color", "LLMKIT_HOME": str(folder / "home"), "PYTHONPATH": source, "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        words = [sys.executable, "-m", "llmkit", "chat", "smollm2-135m-instruct.gguf"]
        pane = Pane(
            [*words, "--system", "assistant", "--seed", "3", "--max-tokens", "64", "--threads", "1"],
            folder,
            environment,
        )
        try:
            pane.wait_for_prompt()
            return list(_play(pane, SCENES[:QUICK] if quick else SCENES))
        finally:
            pane.close()


def _play(pane: Pane, scenes: tuple[tuple[str, tuple[str, ...]], ...]) -> Iterator[Screen]:
    seen = 0
    for title, typed in scenes:
        for text in typed:
            pane.type(text)
            pane.wait_for_prompt()
        lines = _without_the_end(pane.lines())
        yield Screen(title, tuple(lines[seen:]))
        seen = len(lines)


def _without_the_end(lines: list[str]) -> list[str]:
    """Without the empty prompt that waits at the end, and the meter below it, which move."""
    return lines[: max(number for number, line in enumerate(lines) if plain(line).rstrip() == PROMPT.rstrip())]


# ── as text ──


def markdown(screens: list[Screen], command: str) -> str:
    """The screens as a page."""
    made = f"Made by `{command}`: a real model in a real terminal; times are of the machine that made it."
    parts = ["# A session of `llmkit chat`", f"{made} The same in colour: `docs/chat-session.svg`."]
    for screen in screens:
        seen = "\n".join(plain(line).rstrip() for line in screen.lines)
        parts += [f"## {screen.title}", f"```text\n{seen}\n```"]
    return "\n\n".join(parts) + "\n"


# ── as a picture ──

_CHAR, _LINE, _EDGE = 8.4, 18, 14
_FONT = "ui-monospace, Menlo, Consolas, monospace"
_INK, _GROUND = "#d0d0d0", "#1c1c1c"
_CODES = re.compile(r"\x1b\[([0-9;]*)m")
_BRIGHT = ("#1c1c1c", "#d75f5f", "#87af5f", "#d7af5f", "#5f87af", "#af87af", "#5fafaf", "#d0d0d0")


def svg(screens: list[Screen]) -> str:
    """One picture of all screens, one below the other; text with colours, nothing else."""
    rows: list[list[tuple[str, str, bool]]] = []
    for screen in screens:
        rows.append([(f"── {screen.title} ", "#5fafaf", True)])
        rows += [list(spans(line)) for line in screen.lines]
        rows.append([])
    width, height = round(COLUMNS * _CHAR + 2 * _EDGE), len(rows) * _LINE + 2 * _EDGE
    body = []
    for number, row in enumerate(rows):
        cells = "".join(_cell(*span) for span in row)
        if cells:
            body.append(f'<text x="{_EDGE}" y="{_EDGE + (number + 1) * _LINE - 5}">{cells}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<rect width="100%" height="100%" fill="{_GROUND}"/>\n'
        f'<g font-family="{_FONT}" font-size="14" fill="{_INK}" xml:space="preserve" style="white-space:pre">\n'
        + "\n".join(body)
        + "\n</g>\n</svg>\n"
    )


def _cell(text: str, colour: str, bold: bool) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<tspan fill="{colour}"{weight}>{html.escape(text)}</tspan>'


def spans(line: str) -> Iterator[tuple[str, str, bool]]:
    """(text, colour, bold) of a line with escape codes."""
    colour, bold, place = _INK, False, 0
    for found in (*_CODES.finditer(line), None):
        if text := line[place : found.start() if found else len(line)]:
            yield text, colour, bold
        if found:
            colour, bold = _changed(found[1], colour, bold)
            place = found.end()


def _changed(codes: str, colour: str, bold: bool) -> tuple[str, bool]:
    numbers = [int(code or 0) for code in codes.split(";")]
    while numbers:
        number = numbers.pop(0)
        if number == 38 and numbers[:1] == [5]:
            code = numbers[1]
            colour, numbers = hex_colour(code) if code > 15 else _BRIGHT[code % 8], numbers[2:]
        elif number in (0, 39):
            colour, bold = _INK, bold and number == 39
        elif number == 1:
            bold = True
        elif number == 90:
            colour = "#808080"
        elif 30 <= number <= 37:
            colour = _BRIGHT[number - 30]
    return colour, bold


def hex_colour(code: int) -> str:
    """One of the terminal's 256 colours, from 16 on, as #rrggbb (a cube of 6 levels, then 24 greys)."""
    if code >= 232:
        return f"#{8 + 10 * (code - 232):02x}" + f"{8 + 10 * (code - 232):02x}" * 2
    levels = (0, 95, 135, 175, 215, 255)
    cube = code - 16
    return "#" + "".join(f"{levels[cube // step % 6]:02x}" for step in (36, 6, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("docs/chat-session"), help="OUT.md and OUT.svg are written")
    parser.add_argument("--quick", action="store_true", help="the first scenes only")
    args = parser.parse_args()
    if shutil.which("tmux") is None:
        parser.error("tmux is not installed")
    screens = record(args.model, args.quick)
    args.out.with_suffix(".md").write_text(markdown(screens, "scripts/record_chat.py"), encoding="utf-8")
    args.out.with_suffix(".svg").write_text(svg(screens), encoding="utf-8")
    print(f"{args.out.with_suffix('.md')}, {args.out.with_suffix('.svg')}: {len(screens)} screens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
