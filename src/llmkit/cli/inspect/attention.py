"""Show which tokens each head of a layer looks at: the attention weights of a running model.

Each row is a token that looks, each column a token looked at; a row sums to 1. One layer at a time, at most 256 tokens.
Attention tells where a head reads, not what the answer is made of.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LlmkitError
from .. import models, output
from . import views

if TYPE_CHECKING:
    from ...inspection.attention import Attention, Head
    from ...inspection.pictures import HeatMap

EXAMPLES = (
    'llmkit inspect attention "The cat sat because it was tired" --model model.gguf --layer 10',
    'llmkit inspect attention "The cat sat because it was tired" --model model.gguf --layer 10 --head 3',
    'llmkit inspect attention "The cat sat because it was tired" --model model.gguf --layer -1 --html attention.html',
)
_MOST = 0.5  # a share that names a head


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TEXT, the model, the layer and the head."""
    views.add_text(parser)
    views.add_model(parser)
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="from 0; -1 is the last (default 0)")
    parser.add_argument("--head", type=int, metavar="N", help="show this head's whole table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a table for every head")
    views.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read one layer's attention, and show it."""
    from ...inspection import attention

    with models.opened(args) as backend:
        ids = views.tokens_of(backend, views.text_of(args.text), args.chat)
        seen = attention.attention(backend, ids, args.layer)
    if args.head is not None and not 0 <= args.head < len(seen.heads):
        raise LlmkitError(
            f"head {args.head}: layer {seen.layer} has {len(seen.heads)} heads, 0 to {len(seen.heads) - 1}"
        )
    if args.html:
        maps = [_map(seen, head.head) for head in seen.heads if args.head in (None, head.head)]
        views.write_page(args.html, f"{seen.model}: attention of layer {seen.layer}", maps)
    if args.json:
        output.emit_json(seen)
    elif args.head is not None:
        views.heat(_map(seen, args.head))
        output.emit("Each row is a token that looks, each column one it looks at; a row sums to 100 (percent).")
    elif not args.html:
        _show_heads(seen)
        head = min(seen.heads, key=lambda each: max(each.first, each.own)).head  # looks elsewhere most
        views.suggest(args, "attention", "--layer", str(seen.layer), "--head", str(head))
    return 0


def _show_heads(seen: Attention) -> None:
    """A line a head: where it looks on average, and what the last token looks at most."""
    rows, colours = [], []
    for head in seen.heads:
        last = seen.weights[head.head][-1].tolist()
        most = sorted(range(len(last)), key=lambda key: -last[key])[:3]
        looks = "  ".join(f"{seen.pieces[key]} {views.percent(last[key])}" for key in most)
        shares = (head.first, head.before, head.own)
        rows.append((head.head, *map(views.percent, shares), f"{head.entropy:.1f}", _character(head), looks))
        colours.append([None, *map(output.probability_colour, shares), None, None, None])
    titles = (
        "head",
        "first token",
        "token before",
        "itself",
        "bits",
        "so it",
        f"the last token, {seen.pieces[-1]}, looks at",
    )
    output.emit(f"Layer {seen.layer}, {len(seen.heads)} heads, {len(seen.ids)} tokens; measured, shares are means.")
    output.table(titles, rows, "rrrrr", colours)
    output.emit(
        "bits: 0 looks at one token, 3 at about 8 alike. Many heads rest on the first token when they find nothing."
    )


def _character(head: Head) -> str:
    share, words = max(
        (head.first, "rests on the first"), (head.before, "follows the token before"), (head.own, "stays")
    )
    return words if share >= _MOST else "spreads"


def _map(seen: Attention, head: int) -> HeatMap:
    from ...inspection.pictures import Cell, HeatMap

    rows = []
    for query, weights in enumerate(seen.weights[head].tolist()):
        cells = [
            Cell(f"{100 * weight:.0f}" if key <= query else "", weight if key <= query else None, f"{weight:.4f}")
            for key, weight in enumerate(weights)
        ]
        rows.append((f"{query}: {seen.pieces[query]}", tuple(cells)))
    return HeatMap(
        title=f"Layer {seen.layer}, head {head}",
        sentence="Each row is a token that looks, each column one it looks at; numbers are percent, a row sums to 100.",
        columns=tuple(f"{place}: {piece}" for place, piece in enumerate(seen.pieces)),
        rows=tuple(rows),
    )
