"""Show how models cut a text into tokens: ids, pieces, bytes, kinds; side by side for several models.

In pieces nothing hides: ␣ is a space, ↵ a new line, ⇥ a tab, ‹e6 9d› are bytes that make no character yet. Marks such
as <|im_start|> in TEXT become the tokens they name, unless --plain.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import models, output
from . import views

if TYPE_CHECKING:
    from ...inspection.tokens import Token, Tokenization

EXAMPLES = (
    'llmkit inspect tokens "The capital of France is" --model model.gguf',
    'llmkit inspect tokens "naïve 東京 🙂" --model a.gguf --model b.gguf',
    "llmkit inspect tokens - --model model.gguf --counts < book.txt",
)
_INKS = (31, 166)  # in turn
_MOST_ROWS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TEXT, the models, and how to show it."""
    parser.add_argument("text", metavar="TEXT", help="the text; - reads it from the input")
    parser.add_argument("--model", required=True, action="append", metavar="MODEL", help=models.RUN_HELP)
    models.add_backend_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="marks such as <|im_start|> are plain text")
    parser.add_argument("--bos", action="store_true", help="begin as the model expects a text to begin")
    parser.add_argument("--counts", action="store_true", help="show the counts only")
    views.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Cut the text with each model, and show the pieces."""
    from ...inspection import tokens

    text = views.text_of(args.text)
    cut = []
    for name in args.model:
        with views.vocabulary(args, name) as backend:
            cut.append(tokens.tokenize(backend, text, special=not args.plain, bos=args.bos))
    if args.json:
        output.emit_json([_plain(each) for each in cut])
        return 0
    if not args.counts:
        for name, each in zip(args.model, cut, strict=True):
            _show_pieces(each, name if len(cut) > 1 else None)
        if len(cut) == 1:
            _show_table(cut[0].tokens)
        else:
            _show_side_by_side(cut, args.model)
        output.emit()
    _show_counts(cut, args.model)
    if len(cut) == 1 and len(cut[0].tokens) <= 3:
        views.suggest(args, "embeddings", "--near", text, text="")
    else:
        views.suggest(args, "lens")
    return 0


def _plain(cut: Tokenization) -> dict[str, object]:
    """JSON: bytes as hexadecimal, since they may be no text."""
    rows = [output.plain(token) | {"bytes": token.bytes.hex()} for token in cut.tokens]
    ratios = {"characters_per_token": cut.characters_per_token, "bytes_per_token": cut.bytes_per_token}
    return {**output.plain(cut), "tokens": rows, "count": len(rows), **ratios}


def _show_pieces(cut: Tokenization, name: str | None) -> None:
    """The text with a stroke between tokens, in two colours where there are any."""
    shown = []
    for index, token in enumerate(cut.tokens):
        piece = output.paint(output.printable(token.piece), colour=_INKS[index % 2])
        shown.append(piece + ("\n" if token.bytes.endswith(b"\n") else "│" if index + 1 < len(cut.tokens) else ""))
    if name:
        output.emit(output.paint(name, bold=True))
    output.emit("".join(shown).rstrip("\n"))
    output.emit()


def _show_table(tokens: Sequence[Token]) -> None:
    rows = [
        (token.index, token.id, token.piece, token.bytes.hex(" "), token.kind, _span(token))
        for token in tokens[:_MOST_ROWS]
    ]
    output.table(("", "id", "piece", "bytes", "kind", "characters"), rows, "rr")
    if len(tokens) > _MOST_ROWS:
        output.emit(f"… and {len(tokens) - _MOST_ROWS:,} more (--json shows all)")


def _span(token: Token) -> str:
    if token.start is None or token.end is None:
        return "not in the text"
    part = " (a part)" if "‹" in token.piece and token.end == token.start + 1 else ""
    return (f"{token.start}" if token.end <= token.start + 1 else f"{token.start}–{token.end - 1}") + part


def _show_side_by_side(cut: Sequence[Tokenization], names: Sequence[str]) -> None:
    from ...inspection import tokens

    rows = []
    for stretch in tokens.side_by_side(cut)[:_MOST_ROWS]:
        least = min(map(len, stretch.ids))
        cells = [
            f"{'│'.join(pieces)}{f'  ({len(pieces)})' if len(pieces) > least else ''}" for pieces in stretch.pieces
        ]
        rows.append((stretch.text, *cells))
    output.table(("text", *names), rows)


def _show_counts(cut: Sequence[Tokenization], names: Sequence[str]) -> None:
    rows = [
        (name, f"{len(each.tokens):,}", f"{each.characters_per_token:.2f}", f"{each.bytes_per_token:.2f}")
        for name, each in zip(names, cut, strict=True)
    ]
    output.table(("model", "tokens", "characters per token", "bytes per token"), rows, "lrrr")
    output.emit(
        f"{cut[0].characters:,} characters, {cut[0].nbytes:,} bytes. More characters per token: this vocabulary"
        " knows such text better, so it takes less context and time."
    )
    for each in cut:
        if any(token.kind == "byte" or "‹" in token.piece for token in each.tokens):
            output.emit("‹…› are bytes: the vocabulary has no token for that character, so it takes several.")
            break
    if not all(each.faithful for each in cut):
        output.emit("Put together, the tokens are not quite this text: a tokenizer changes what its model never sees.")
