"""Show the models on this machine: size, quant, when used.

A row is one revision of a repository in the Hugging Face cache, or one GGUF llmkit has made. What is missing of those
that are not whole stands below the table. When a model was used is told as far as the file system keeps it. No network
is asked.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import output
from .search import count

if TYPE_CHECKING:
    from ..hub.inventory import Holding, Inventory

EXAMPLES = ("llmkit list", "llmkit list --sort size", "llmkit list --json | jq .nbytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The order, and the form."""
    parser.add_argument(
        "--sort", choices=("size", "used", "name"), default="name", help="largest, or latest used, first (default name)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Look and show."""
    from ..hub import client, inventory

    found = inventory.look()
    holdings = sorted(found.holdings, key=_KEYS[args.sort])
    if args.json:
        output.emit_json({
            "models": holdings, "nbytes": found.nbytes, "other_nbytes": found.other_nbytes, "notes": found.notes,
            "cache": client.cache_folder(), "home": inventory.models_folder().parent,
        })  # fmt: skip
        return 0
    for remark in found.notes:
        output.note(f"note: {output.printable(remark)}")
    if not holdings:
        output.note(f"No models in {client.cache_folder()} and {inventory.models_folder()}.")
        output.next_command("llmkit search WORDS")
        return 0
    headers = ("model", "format", "quants", "parameters", "revision", "size", "used", "state")
    output.table(headers, map(_row, holdings), "lllrlrll")
    for holding in holdings:
        for fault in holding.faults:
            output.note(f"{output.one_line(_called(holding))}: {output.one_line(fault)}")
    output.emit(total(found))
    return 0


def _size(holding: Holding) -> tuple[int, str]:
    return -holding.nbytes, holding.name


def _used(holding: Holding) -> tuple[float, str]:
    return -(holding.used or 0.0), holding.name


def _name(holding: Holding) -> tuple[str, str]:
    return holding.name.lower(), holding.revision or ""


_KEYS = {"size": _size, "used": _used, "name": _name}


def _called(holding: Holding) -> str:
    return f"{holding.name}@{holding.revision[:8]}" if holding.revision else holding.name


def _row(holding: Holding) -> tuple[str, ...]:
    refs = f" ({', '.join(holding.refs)})" if holding.refs else ""
    return (
        holding.name,
        " ".join("pickle only" if kind == "pickle" else kind for kind in holding.formats) or "-",
        " ".join(holding.quants) or "-",
        "-" if holding.n_weights is None else count(holding.n_weights),
        holding.revision[:8] + refs if holding.revision else "-",
        output.size(holding.nbytes),
        _when(holding.used),
        holding.state,
    )


def _when(used: float | None) -> str:
    """The day, and today the hour."""
    import time

    if used is None:
        return "-"
    now = time.time()
    today = time.localtime(used)[:3] == time.localtime(now)[:3]
    return time.strftime("today %H:%M" if today else "%Y-%m-%d", time.localtime(used))


def total(found: Inventory) -> str:
    """The closing line: every byte counted once."""
    words = f"{output.size(found.nbytes)} in all"
    if shared := sum(holding.shared_nbytes for holding in found.holdings):
        words += f", what revisions share ({output.size(shared)} in the rows) counted once"
    if found.other_nbytes:
        words += f"; {output.size(found.other_nbytes)} more of data sets and spaces"
    return words
