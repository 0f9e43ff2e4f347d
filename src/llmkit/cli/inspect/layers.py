"""Show the residual stream layer by layer, and what of a model can be inspected at all.

The residual stream is one vector for each token, to which every layer adds its part. With TEXT its length and direction
are shown after each layer; without, what this model and engine can show.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LlmkitError
from .. import models, output
from . import views

if TYPE_CHECKING:
    from ...inspection.layers import Capabilities, Residual
    from ...inspection.pictures import HeatMap

EXAMPLES = (
    "llmkit inspect layers --model model.gguf",
    'llmkit inspect layers "The capital of France is" --model model.gguf',
    'llmkit inspect layers "The capital of France is" --model model.gguf --all',
)
_BAR = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TEXT and the model."""
    views.add_text(parser, "?")
    views.add_model(parser)
    parser.add_argument("--all", action="store_true", help="every position of the text, not the mean")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the norm at every position")
    views.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Probe the model, or follow a text through its layers."""
    from ...inspection import layers

    if args.text is None and (args.all or args.chat or args.html):
        raise LlmkitError("--all, --chat and --html are about a text", "Give TEXT.")
    with models.opened(args) as backend:
        if args.text is None:
            found = layers.capabilities(backend)
            output.emit_json(found) if args.json else _show_capabilities(found, args)
            return 0
        ids = views.tokens_of(backend, views.text_of(args.text), args.chat)
        seen = layers.residual(backend, ids)
    if args.html:
        views.write_page(args.html, f"{seen.model}: the residual stream", [_map(seen)])
    if args.json:
        output.emit_json(seen)
    elif args.all:
        views.heat(_map(seen))
        output.emit("The length of each token's vector; the deeper the colour, the longer.")
    elif not args.html:
        _show_residual(seen)
        views.suggest(args, "lens")
    return 0


def _show_capabilities(found: Capabilities, args: argparse.Namespace) -> None:
    rows = []
    for begin, end in _runs([(each.hidden, each.attention, each.why) for each in found.layers]):
        each = found.layers[begin]
        which = f"{begin}" if begin == end else f"{begin}–{end}"
        rows.append((which, _yes(each.hidden), _yes(each.attention), each.why))
    output.table(("layers", "output", "attention", "why not"), rows)
    output.emit(f"logit lens: {'yes' if found.lens else f'no, {found.lens_why}'}")
    output.emit(f"Found out by trying on a few tokens, with {found.engine or 'this engine'}.")
    views.suggest(args, "layers", text="The capital of France is")


def _yes(can: bool) -> str:
    return "yes" if can else "not available"


def _runs(rows: list[tuple[bool, bool, str]]) -> list[tuple[int, int]]:
    """[first, last] of neighbours that are alike."""
    found: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        if found and rows[found[-1][0]] == row:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found


def _name(layer: int) -> str:
    return "enters" if layer < 0 else f"after {layer}"


def _show_residual(seen: Residual) -> None:
    longest = max(row.mean_norm for row in seen.layers) or 1.0
    rows = []
    for row in seen.layers:
        bar = views.bar(row.mean_norm / longest, _BAR)
        before, update = ("", "") if row.layer < 0 else (f"{row.cosine_before:.3f}", f"{row.update:.2f}")
        first = f"{row.norms[0]:.1f}"
        rows.append((_name(row.layer), first, f"{row.mean_norm:.1f}", before, f"{row.cosine_last:.3f}", update, bar))
    titles = ("layer", "first token", "the others", "cosine to before", "cosine to last", "added", "")
    output.table(titles, rows, "lrrrrr")
    output.emit(
        "Lengths of the vectors, measured; cosines and what was added are means over the tokens after the first."
        " The first is where many heads rest, so it grows large."
    )
    output.emit("added: the length of what a layer adds, as a share of what came in.")
    output.emit("A cosine near 1: the layer hardly turns the vector. The last layers turn it towards the answer.")


def _map(seen: Residual) -> HeatMap:
    from ...inspection.pictures import Cell, HeatMap

    longest = max(max(row.norms) for row in seen.layers) or 1.0
    return HeatMap(
        title="Length of the residual stream",
        sentence="One vector for each token, to which every layer adds its part: its length after each layer.",
        columns=tuple(f"{place}: {piece}" for place, piece in enumerate(seen.pieces)),
        rows=tuple(
            (_name(row.layer), tuple(Cell(f"{norm:.1f}", norm / longest) for norm in row.norms)) for row in seen.layers
        ),
    )
