"""Find models on the Hub, with their size at Q4_K_M.

Parameters are what the Hub read in the weights' headers; ~ marks those that only the name claims, - what nobody says.
"converts" tells whether llmkit can convert the safetensors; a GGUF needs no conversion.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import output
from .quantize import count_argument

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..hub.search import Found

EXAMPLES = (
    "llmkit search qwen3 0.6b",
    "llmkit search smollm2 --gguf --sort likes",
    "llmkit search llama-3 --limit 5 --json",
)
_SORTS = ("downloads", "likes", "trending", "updated")
_MOST = 1000
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """WORDS, how many, in which order."""
    parser.add_argument("words", nargs="+", metavar="WORDS", help="words of the model's name")
    parser.add_argument("--limit", type=_limit, default=20, metavar="N", help="at most so many (default 20)")
    parser.add_argument("--sort", choices=_SORTS, default="downloads", help="what comes first (default downloads)")
    parser.add_argument("--gguf", action="store_true", help="only repositories with GGUF files")
    parser.add_argument("--json", action="store_true", help="print the models as JSON")


def _limit(text: str) -> int:
    number = count_argument(text)
    if number > _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MOST}")
    return number


def run(args: argparse.Namespace) -> int:
    """Ask the Hub and show what it says."""
    from ..convert.architectures import CLASSES
    from ..hub import search

    words = " ".join(args.words)
    found = search.search(words, limit=args.limit, sort=args.sort, only_gguf=args.gguf, on_wait=output.note)
    if args.json:
        output.emit_json([{**output.plain(each), "converts": converts(each, CLASSES)} for each in found])
        return 0
    if not found:
        output.note(f"The Hub has no model that matches '{words}'{' in GGUF' if args.gguf else ''}.")
        return 0
    headers = ("model", "parameters", "at Q4_K_M", "licence", "downloads", "likes", "formats", "gated", "converts")
    output.table(headers, [_row(each, CLASSES) for each in found], "lrrlrrlll")
    if any(each.weights_from_name for each in found):
        output.note("~ parameters as the name claims them")
    output.note(
        f"at Q4_K_M: derived from the parameter count, {search.ACCURACY}: `llmkit quantize … --dry-run` is exact"
    )
    first = next((each for each in found if "gguf" in each.formats or converts(each, CLASSES)), None)
    if first:
        output.next_command(f"llmkit download {output.shell_word(first.name)} --dry-run")
    return 0


def converts(found: Found, known: Collection[str]) -> bool | None:
    """Whether llmkit can make a GGUF of its safetensors; None where there are none, or nobody says what they are."""
    if "safetensors" not in found.formats or found.architecture is None:
        return None
    return found.architecture in known and not found.packed


def _row(found: Found, known: Collection[str]) -> tuple[str, ...]:
    mark = "~" if found.weights_from_name else ""
    formats = " ".join("pickle only" if kind == "pickle" else kind for kind in found.formats)
    return (
        found.name,
        "-" if found.n_weights is None else mark + count(found.n_weights),
        "-" if found.q4_k_m_nbytes is None else mark + output.size(found.q4_k_m_nbytes),
        found.licence or "-",
        "-" if found.downloads is None else f"{found.downloads:,}",
        "-" if found.likes is None else f"{found.likes:,}",
        (formats or "-") + (" (quantized)" if found.packed else ""),
        {True: "yes", False: "no", None: "-"}[found.gated],
        {True: "yes", False: "not yet", None: "-"}[converts(found, known)],
    )


def count(number: int) -> str:
    """A parameter count for people: 134.5M, 8.0B."""
    unit, letter = next((row for row in _UNITS if number >= row[0]), (1, ""))
    return f"{number / unit:.1f}{letter}" if letter else str(number)
