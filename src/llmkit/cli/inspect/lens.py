"""Show what a model would say if it ended after each of its layers: the logit lens.

The final norm and the output matrix are applied to what each layer leaves, so values before the last row are
approximate, and noise in the first half of a model. The last row is the model's own answer. Probabilities are raw:
before any sampler.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LlmkitError
from .. import models, output
from . import views

if TYPE_CHECKING:
    from ...inspection.lens import Lens
    from ...inspection.pictures import HeatMap
    from ...inspection.tokens import Odds

EXAMPLES = (
    'llmkit inspect lens "The capital of France is" --model model.gguf',
    'llmkit inspect lens "The capital of France is" --model model.gguf --token Paris --token London',
    'llmkit inspect lens "The capital of France is" --model model.gguf --all --html lens.html',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TEXT, the model, and which positions and tokens to show."""
    views.add_text(parser)
    views.add_model(parser)
    parser.add_argument("--all", action="store_true", help="every position of the text (at most 128 tokens)")
    views.add_at(parser)
    views.add_token(parser, "follow this token's probability")
    views.add_top(parser, 5)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with every position and layer")
    views.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Look through the lens, and show it."""
    from ...inspection import lens, tokens

    if args.all and args.at is not None:
        raise LlmkitError("--all and --at: expected one of them", "--at shows one position, --all every one.")
    with models.opened(args) as backend:
        ids = views.tokens_of(backend, views.text_of(args.text), args.chat)
        watch = [tokens.find(backend, word) for word in args.token]
        place = tokens.position_of(len(ids), args.at)
        positions = range(len(ids)) if args.all or args.html else [place]
        seen = lens.lens(backend, ids, positions=positions, top=args.top, watch=watch)
    if args.html:
        views.write_page(args.html, f"{seen.model}: what each layer would say", [_map(seen)])
    if args.json:
        output.emit_json(seen)
    elif args.all:
        views.heat(_map(seen))
        _explain(seen)
    elif not args.html:
        _show_position(seen)
        _explain(seen)
    if not args.all and not args.json:
        views.suggest(args, "lens", "--all")
    return 0


def _row_name(layer: int | None) -> str:
    return "the model" if layer is None else f"after {layer}"


def _show_position(seen: Lens) -> None:
    """One position: a row for each layer with its likeliest tokens, and the watched ones."""
    place = seen.positions[0]
    output.emit(f"What comes after token {place}, {seen.pieces[place]}:")
    rows, colours = [], []
    for row in seen.rows:
        top = [f"{each.piece} {views.percent(each.probability)}" for each in row.top[0]]
        watched = row.watched[0]
        rows.append((_row_name(row.layer), *(f"{value:.4f}" for value in watched), f"{row.entropy[0]:.1f}", *top))
        ramp = [[output.probability_colour(value) for value in values] for values in (watched, _shares(row.top[0]))]
        colours.append([None, *ramp[0], None, *ramp[1]])
    titles = [f"P({piece})" for piece in seen.watch_pieces]
    ranks = [f"{number}." for number in range(1, len(seen.rows[0].top[0]) + 1)]
    output.table(("layer", *titles, "bits", *ranks), rows, "l" + "r" * (len(titles) + 1), colours)


def _shares(top: Sequence[Odds]) -> list[float]:
    return [each.probability for each in top]


def _map(seen: Lens) -> HeatMap:
    """Every position: the first token in each cell, coloured by its probability."""
    from ...inspection.pictures import Cell, HeatMap

    def cell(top: tuple[Odds, ...]) -> Cell:
        said = [f"{each.piece} {views.percent(each.probability)}" for each in top]
        return Cell(said[0], top[0].probability, "\n".join(said))

    return HeatMap(
        title="Logit lens",
        sentence="In each cell the token the model would put next if it ended after that layer, with its raw"
        " probability. Rows before the last are approximate; the last row is the model's own.",
        columns=tuple(f"{place}: {seen.pieces[place]}" for place in seen.positions),
        rows=tuple((_row_name(row.layer), tuple(map(cell, row.top))) for row in seen.rows),
    )


def _explain(seen: Lens) -> None:
    """What the rows tell, in words."""
    if len(seen.positions) == 1:
        output.emit("bits: how undecided that layer is; 0 is certain, each bit doubles the choice.")
    if legend := output.probability_legend():
        output.emit(legend)
    first = seen.rows[-1].top[-1][0]
    where = "" if len(seen.positions) == 1 else f", at position {seen.positions[-1]}"
    since = _since([row.top[-1][0].id == first.id for row in seen.rows[:-1]])
    if since is not None:
        output.emit(f"{first.piece} comes first from layer {since} on{where}.")
    agreed = round(seen.agreement * len(seen.positions))
    output.emit(
        "Rows before the last are approximate. After the last layer the lens puts the model's own first token first at"
        f" {agreed} of {len(seen.positions)} positions."
    )
    if seen.engine.startswith("llama.cpp"):
        output.emit("Measured without flash attention, which a chat has: its probabilities differ a little.")


def _since(same: list[bool]) -> int | None:
    """From which layer on all say the same."""
    if not same or not same[-1]:
        return None
    return next((index + 1 for index in range(len(same) - 1, -1, -1) if not same[index]), 0)
