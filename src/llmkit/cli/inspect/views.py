"""What the topics share: the options they all have, the text and the model, bars and heat maps, files they write."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LlmkitError
from .. import models, output
from ..quantize import count_argument

if TYPE_CHECKING:
    from ...backends import Backend
    from ...inspection.pictures import HeatMap

_GAP = 2
_SUGGESTED = 200  # characters of a text


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model and what runs it."""
    parser.add_argument("--model", required=True, metavar="MODEL", help=models.RUN_HELP)
    models.add_backend_arguments(parser)


def add_text(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """TEXT; with --chat it is asked as a question."""
    parser.add_argument("text", metavar="TEXT", nargs=nargs, help="the text; - reads it from the input")
    parser.add_argument("--chat", action="store_true", help="put TEXT as a question, in the model's chat template")


def add_at(parser: argparse.ArgumentParser) -> None:
    """--at N."""
    parser.add_argument("--at", type=int, metavar="N", help="after which token, from 0; -1 is the last (default)")


def add_token(parser: argparse.ArgumentParser, what: str) -> None:
    """--token WORD, any number of times."""
    parser.add_argument("--token", action="append", default=[], metavar="WORD", help=f"{what}; #7042 is an id")


def add_top(parser: argparse.ArgumentParser, default: int, what: str = "likeliest tokens to show") -> None:
    """--top K."""
    parser.add_argument("--top", type=count_argument, default=default, metavar="K", help=f"{what} (default {default})")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def suggest(args: argparse.Namespace, topic: str, *options: str, text: str | None = None) -> None:
    """Suggest a topic for the same text and model, with what runs it.

    Nothing where the text came from the input, is long, or would drive the terminal. `text`: in place of the same one,
    "" for none.
    """
    same = getattr(args, "text", None) or ""
    text = same if text is None else text
    if same == "-" or output.one_line(same, _SUGGESTED) != same:
        return
    model = args.model if isinstance(args.model, str) else args.model[0]
    words = [*([text] if text else []), *(["--chat"] if getattr(args, "chat", False) else []), "--model", model]
    for name in ("backend", "gpu_layers", "threads"):
        if (value := getattr(args, name)) not in (None, "auto"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    output.next_command(" ".join(["llmkit inspect", topic, *map(output.shell_word, [*words, *options])]))


@contextmanager
def vocabulary(args: argparse.Namespace, text: str | None = None) -> Iterator[Backend]:
    """As `models.opened`, without the weights where the backend can do that: enough for tokens and their rows."""
    from ...backends import choice, llamacpp

    name, wanted = args.model if text is None else text, args.backend
    path = models.runnable(name, wanted)
    if choice.choose(path, wanted) != choice.LLAMACPP:
        with models.opened(args, name) as backend:
            yield backend
        return
    found = llamacpp.load(path, vocabulary_only=True)
    try:
        yield found
    finally:
        found.close()


def text_of(word: str) -> str:
    """The word, or with "-" the whole input, without its last line break. Raises LlmkitError for what is not UTF-8."""
    try:
        text = _input().removesuffix("\n") if word == "-" else word
        text.encode()  # an argument's bytes that are no UTF-8 come as lone surrogates, which no tokenizer takes
    except UnicodeError as error:
        raise LlmkitError("the text is not UTF-8", "Convert it first, for instance with iconv.") from error
    return text


def _input() -> str:
    """All of the input, to the byte: sys.stdin itself would replace what is not UTF-8. Raises UnicodeError."""
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if raw is None else str(raw.read(), "utf-8")


def tokens_of(backend: Backend, text: str, chat: bool) -> list[int]:
    """What the model is given: the text, begun as it expects; or with `chat` the question in its template.

    Raises LlmkitError for an empty text.
    """
    from ...chat.templates import Message
    from ...inspection import xray

    if not text:
        raise LlmkitError("the text is empty", "Give a text, or - to read it from the input.")
    if chat:
        return list(xray.xray(backend, [Message("user", text)]).ids)
    return backend.encode(text, special=True, bos=True)


def bar(share: float, width: int) -> str:
    """A bar of `width` columns, full at 1, in eighths of a column."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    return output.blocks(eighths).ljust(width)


def heat(shown: HeatMap, *, colours: bool = True) -> None:
    """A heat map as tables: as many columns beside each other as the terminal has room for."""
    names = [name for name, _ in shown.rows]
    first = max(map(output.columns, ["", *names]))
    widths = [
        max(output.columns(text) for text in [title, *(cells[index].text for _, cells in shown.rows)])
        for index, title in enumerate(shown.columns)
    ]
    room = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else None
    for number, (begin, end) in enumerate(_blocks(widths, first, room)):
        if number:
            output.emit()
        rows = [(name, *(cell.text for cell in cells[begin:end])) for name, cells in shown.rows]
        ramp = [[None, *(_colour(cell.depth, colours) for cell in cells[begin:end])] for _, cells in shown.rows]
        output.table(("", *shown.columns[begin:end]), rows, colours=ramp)


def _colour(depth: float | None, wanted: bool) -> int | None:
    return output.probability_colour(depth) if wanted and depth is not None else None


def _blocks(widths: list[int], first: int, room: int | None) -> list[tuple[int, int]]:
    """[begin, end) of the columns that fit beside each other, at least one."""
    found, begin, used = [], 0, first
    for index, width in enumerate(widths):
        if room is not None and used + _GAP + width > room and index > begin:
            found.append((begin, index))
            begin, used = index, first
        used += _GAP + width
    return [*found, (begin, len(widths))]


def write_page(path: Path, title: str, maps: Sequence[HeatMap]) -> None:
    """Write heat maps as one page. Raises as `write`."""
    from ...inspection import page

    write(path, page.page(title, map(page.heat, maps)))


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, and say so. Raises AccessDenied, LlmkitError."""
    from ... import store

    store.make_folder(path.parent, "Choose another folder.")
    try:
        with store.whole(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise LlmkitError(f"{path}: cannot be written: {error.strerror or error}") from error
    output.note(f"written: {path} ({output.size(path.stat().st_size)}, needs nothing else)")


def percent(probability: float) -> str:
    """A probability for people: 77 %, 0.3 %, <0.1 %."""
    if probability >= 0.0995:
        return f"{probability:.0%}".replace("%", " %")
    return f"{100 * probability:.1f} %" if probability >= 0.001 else "<0.1 %"
