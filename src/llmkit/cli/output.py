"""Everything the command line shows: data to stdout, the rest to stderr.

Knows nothing of models. Verbs call these functions and format nothing themselves; nothing but the standard
library is imported, and the slower parts of that only when used.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from .. import settings

if TYPE_CHECKING:
    from ..progress import Progress

_quiet = False

# 256-colour ramp from unlikely (red) to likely (blue-green): readable on light and dark grounds, and for
# readers who cannot tell red from green
_RAMP = (160, 166, 172, 178, 143, 108, 73, 37, 31)
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder what is read
_CLEAR_LINE = "\r\x1b[K"


def be_quiet(quiet: bool) -> None:
    """Silence notes, suggestions and progress bars (errors stay)."""
    global _quiet
    _quiet = quiet


# ── lines ──


def emit(text: str = "", end: str = "\n") -> None:
    """Write data to stdout at once; `end=""` to stream a piece of an answer."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell the user something on stderr, unless quiet."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def status(text: str) -> None:
    """On a terminal, a line on stderr that the next one replaces, unless quiet; an empty one takes it away."""
    if _may_draw(sys.stderr):
        print(f"{_CLEAR_LINE}{text}", end="", file=sys.stderr, flush=True)


def _may_draw(stream: TextIO) -> bool:
    """Whether lines that replace each other may be written there."""
    return not _quiet and stream.isatty() and not settings.dumb_terminal()


def error(message: str, hint: str | None = None) -> None:
    """Show an error and what to do about it on stderr."""
    print(paint("llmkit: error:", colour=160, stream=sys.stderr), printable(message), file=sys.stderr)
    if hint:
        print(paint("hint:", bold=True, stream=sys.stderr), printable(hint), file=sys.stderr)


def next_command(command: str) -> None:
    """Suggest the command to run next on stderr; quote what comes from the user with `shell_word`."""
    note(paint("next:", bold=True, stream=sys.stderr) + f" {command}")


def shell_word(text: object) -> str:
    """`text` as one word of a shell command."""
    import shlex

    return shlex.quote(str(text))


def confirm(question: str) -> bool:
    """Ask on the terminal; True for y or yes. Where nobody can answer (no terminal, end of input) it is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # the end of input: the line is still open
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")


# ── data ──


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    align: str = "",
    colours: Sequence[Sequence[int | None]] = (),
) -> None:
    """Print aligned columns to stdout; `align` holds `l` or `r` for each column, `l` where it says nothing.

    `colours`: of each row's cells, as `paint` takes them; the words must do without.
    """
    lines = [tuple(headers), *(tuple(one_line(str(cell)) for cell in row) for row in rows)]
    widths = [max(map(columns, column)) for column in zip(*lines, strict=True)]
    sides = align.ljust(len(widths), "l")[: len(widths)]
    for index, line in enumerate(lines):
        cells = [_pad(cell, width, side) for cell, width, side in zip(line, widths, sides, strict=True)]
        if 1 <= index <= len(colours):
            cells = [paint(cell, colour=colour) for cell, colour in zip(cells, colours[index - 1], strict=True)]
        emit("  ".join(cells).rstrip())


def emit_json(value: object) -> None:
    """Print `value` to stdout as JSON: dataclasses, paths, fractions and enums included."""
    import json

    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    emit(text.encode("utf-8", "backslashreplace").decode("utf-8"))  # a lone surrogate becomes JSON's own \uXXXX


def plain(value: object) -> Any:
    """`value` in JSON's types: dataclass → object, enum → its name, fraction → number, NaN and infinities → null."""
    import dataclasses
    import enum
    import numbers

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


# ── words for quantities ──


def size(nbytes: float, binary: bool = False) -> str:
    """Bytes for people: decimal ("105.4 MB", as files and disks are sold) or binary ("1.5 GiB", as memory is)."""
    base, units = (1024, ("B", "KiB", "MiB", "GiB", "TiB")) if binary else (1000, ("B", "kB", "MB", "GB", "TB"))
    amount, index = float(nbytes), 0
    while round(amount, 1) >= base and index < len(units) - 1:
        amount, index = amount / base, index + 1
    return f"{amount:.0f} B" if index == 0 else f"{amount:.1f} {units[index]}"


def duration(seconds: float) -> str:
    """Seconds for people: "0.4 s", "12 s", "1 min 20 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def amount(count: float, unit: str = "B") -> str:
    """`count` with its unit: "B" becomes kB, MB, GB; others are written as they are ("12 tensors")."""
    return size(count) if unit == "B" else f"{count:,.0f} {unit}".rstrip()


def blocks(eighths: int) -> str:
    """A bar of so many eighths of a column."""
    return "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]


def printable(text: str) -> str:
    """`text` with what drives a terminal escaped: control characters, surrogates, changes of writing direction."""
    if text.isascii() and text.isprintable():
        return text
    import unicodedata

    def drives(char: str) -> bool:
        return char != "\n" and (unicodedata.category(char) in ("Cc", "Cs") or char in _DIRECTIONS)

    return "".join(repr(char)[1:-1] if drives(char) else char for char in text)


def one_line(text: str, width: int | None = None) -> str:
    """`text` on one line, newlines escaped too, of at most `width` characters; an ellipsis shows a cut."""
    flat = printable(text).replace("\n", "\\n")
    return flat if width is None or len(flat) <= width else flat[: width - 1] + "…"


# ── colour ──


def colour_enabled(stream: TextIO | None = None) -> bool:
    """Whether `stream` (default stdout) is a terminal that may be coloured (NO_COLOR)."""
    return settings.colour_allowed() and (stream or sys.stdout).isatty()


def paint(text: str, *, colour: int | None = None, bold: bool = False, stream: TextIO | None = None) -> str:
    """`text` in one of the 256 terminal colours, bold or both; unchanged where colours are off."""
    codes = ["1"] * bold + ([f"38;5;{colour}"] if colour is not None else [])
    if not codes or not colour_enabled(stream):
        return text
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m"


def probability_colour(probability: float) -> int:
    """The terminal colour (0–255) of a probability: red for unlikely, blue-green for certain."""
    clamped = min(max(probability, 0.0), 1.0)
    return _RAMP[round(clamped * (len(_RAMP) - 1))]


def probability_legend() -> str:
    """The ramp as one line, for below a coloured answer; empty where colours are off."""
    if not colour_enabled():
        return ""
    return "unlikely " + "".join(paint("█", colour=colour) for colour in _RAMP) + " likely"


# ── progress ──


class ProgressBar:
    """An OnProgress callback that draws on a terminal, with rate and time left; a context manager that cleans up.

    Silent when the stream is no terminal, or when quiet. A new stage starts a new bar.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 0.1) -> None:
        self._stream = stream or sys.stderr
        self._interval = interval
        self._enabled = _may_draw(self._stream)
        self._stage: str | None = None
        self._first = (0.0, 0)
        self._drawn = -math.inf
        self._visible = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, progress: Progress) -> None:
        """Take one report; draw if enough time has passed or the stage is new or done."""
        if not self._enabled:
            return
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._first, self._drawn = progress.stage, (now, progress.done), -math.inf
        if now - self._drawn >= self._interval or progress.done >= progress.total:
            self._drawn = now
            self._draw(progress, now)

    def clear(self) -> None:
        """Take the bar off the screen, e.g. before writing a line; the next report draws it again."""
        if self._visible:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._visible = False

    def _draw(self, progress: Progress, now: float) -> None:
        import shutil

        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_CLEAR_LINE + progress_line(progress, now - self._first[0], self._first[1])[:width])
        self._stream.flush()
        self._visible = True


def progress_line(progress: Progress, elapsed: float, first: int = 0) -> str:
    """The text of a bar, `elapsed` seconds after the stage's first report, which stood at `first`."""
    done, total, unit = progress.done, progress.total, progress.unit
    share = min(done / total, 1.0) if total > 0 else 1.0
    filled = round(20 * share)
    parts = [
        f"{progress.stage} {'━' * filled}{'╌' * (20 - filled)} {share:4.0%}",
        f"{amount(done, unit)} of {amount(total, unit)}",
    ]
    rate = (done - first) / elapsed if elapsed > 0 else 0.0
    if rate > 0:
        parts.append(f"{amount(rate, unit)}/s")
        if done < total:
            parts.append(f"{duration((total - done) / rate)} left")
    if progress.detail:
        parts.append(one_line(progress.detail, 40))
    return "  ".join(parts)


# ── columns ──


def columns(text: str) -> int:
    """Terminal columns that `text` takes: East Asian wide characters two, combining marks none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _pad(text: str, width: int, side: str) -> str:
    room = " " * (width - columns(text))
    return room + text if side == "r" else text + room
