"""Show embeddings: a model's table of tokens, vectors of texts, and what quantization does to both.

Without options: how long the rows of the table are. A WORD is taken as in running text, with a space before it, where
the vocabulary has that token; #7042 names a token by its id. Cosine: 1 same direction, 0 nothing in common.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LlmkitError, ModelNotFound, Unsupported
from .. import models, output
from . import views

if TYPE_CHECKING:
    from ...backends import Backend
    from ...inspection.embeddings import Analogy, LayerSimilarity, Neighbour, Neighbours, Norms, Sentences, Shift
    from ...inspection.pictures import Scatter

EXAMPLES = (
    "llmkit inspect embeddings --model model.gguf --near king",
    "llmkit inspect embeddings --model model.gguf --analogy man:king::woman",
    "llmkit inspect embeddings --model model.gguf --near king --near Paris --plot words.svg",
    'llmkit inspect embeddings --model model.gguf --texts "A cat sleeps." "A dog naps." "Stocks fell."',
    "llmkit inspect embeddings --model model.gguf --against model-Q2_K.gguf",
)
_BAR = 40
_PAIRS = 8  # columns
_GRID = (76, 22)  # columns and lines of the picture on a terminal
_MARKS = "●■▲◆★✚"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the question."""
    views.add_model(parser)
    parser.add_argument("--near", action="append", default=[], metavar="WORD", help="tokens whose rows point alike")
    parser.add_argument("--analogy", metavar="A:B::C", help="A is to B as C is to …")
    parser.add_argument(
        "--texts", nargs="+", metavar="TEXT", help="how alike texts are: texts, or a file of lines, or -"
    )
    parser.add_argument("--pool", choices=("mean", "last", "cls"), help="how tokens become one vector of a text")
    parser.add_argument("--layers", action="store_true", help="how alike --texts are after each layer, too")
    parser.add_argument("--against", metavar="OTHER", help="another file of the same model: what has shifted")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw --near or --texts in a plane: .svg, or - here")
    views.add_top(parser, 10, "rows to show")
    views.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Answer each of the questions asked; without one show the table's norms."""
    _check(args)
    texts = _texts(args.texts) if args.texts else []
    if len(texts) == 1 and texts[0].strip() and not args.against:
        hint = "Give two texts or more, or a file of lines that exists."
        raise LlmkitError(f"{texts[0]!r} is one text: there is nothing to compare it with", hint)
    opened = models.opened if texts else views.vocabulary  # rows are read from the file
    with opened(args) as backend:
        shown = _look(args, backend, texts)
    if args.json:
        output.emit_json(shown)
    elif args.near and not args.plot:
        near = [part for word in args.near for part in ("--near", word)]
        views.suggest(args, "embeddings", *near, "--plot", "words.svg")
    return 0


def _look(args: argparse.Namespace, backend: Backend, texts: list[str]) -> dict[str, object]:
    """Answer, show unless JSON is wanted, and return the values."""
    from ...inspection import embeddings, tokens

    shown: dict[str, object] = {}

    def answer(name: str, found: Any, show: Callable[[Any], None]) -> None:
        shown[name] = found
        if not args.json:
            show(found)

    near = [embeddings.neighbours(backend, tokens.find(backend, word), args.top) for word in args.near]
    if near:
        answer("near", near, _show_near)
    if args.analogy:
        a, b, c = (tokens.find(backend, word) for word in _analogy_words(args.analogy))
        answer("analogy", embeddings.analogy(backend, (a, b, c), args.top), _show_analogy)
    if args.against:
        with (models.opened if texts else views.vocabulary)(args, args.against) as other:
            answer("shift", embeddings.shift(backend, other, texts, count=args.top), _show_shift)
    elif texts:
        answer("texts", embeddings.sentences(backend, texts, args.pool), _show_sentences)
        if args.layers:
            answer("layers", embeddings.by_layer(backend, texts), _show_layers)
    if not shown:
        answer("norms", embeddings.norms(backend, min(args.top, 8)), _show_norms)
        views.suggest(args, "embeddings", "--near", "king")
    if args.plot:
        shown["plot"] = drawn = _drawn(args, backend, texts, near)
        _show_plot(args, drawn)
    return shown


# ── what was asked ──


def _check(args: argparse.Namespace) -> None:
    if args.plot and not (args.near or args.texts):
        raise LlmkitError("--plot needs something to draw", "Give --near WORD, or --texts.")
    if args.plot and str(args.plot) != "-" and args.plot.suffix != ".svg":
        raise Unsupported(
            f"--plot {args.plot}: pictures are SVG", "Give a name that ends in .svg, or - for the terminal."
        )
    for option, given in (("--pool", args.pool), ("--layers", args.layers)):
        if given and not args.texts:
            raise LlmkitError(f"{option} is about --texts", "Give --texts, too.")
        if given and args.against:
            raise LlmkitError(f"{option} goes not with --against, which compares texts as the model pools them")


def _analogy_words(text: str) -> tuple[str, str, str]:
    left, _, right = text.partition("::")
    first, _, second = left.partition(":")
    if not (first and second and right):
        raise LlmkitError(f"--analogy {text}: expected A:B::C", "For example man:king::woman.")
    return first, second, right


def _texts(words: list[str]) -> list[str]:
    """Texts as given; of one word that is "-" or a file, its lines. Raises ModelNotFound, LlmkitError."""
    if words == ["-"]:
        return _lines(sys.stdin.read(), "the input")
    path = Path(words[0])
    if len(words) > 1 or not path.is_file():
        return words
    try:
        return _lines(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LlmkitError(f"{path}: is no text in UTF-8: {error.reason} at byte {error.start}") from error


def _lines(text: str, where: str) -> list[str]:
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise LlmkitError(f"{where}: holds no text", "Give texts, one a line.")
    return found


# ── rows ──


def _show_near(near: Sequence[Neighbours]) -> None:
    for found in near:
        output.emit(f"Near {found.piece} (token {found.id}, length {found.norm:.2f}):")
        _show_rows(found.rows)
    output.emit("Tokens used alike end up with rows that point alike; nothing was generated for this.\n")


def _show_rows(rows: Sequence[Neighbour]) -> None:
    cells = [(_name(row), f"{row.cosine:.3f}", f"{row.norm:.2f}", row.id, _marked(row)) for row in rows]
    colours = [[None, output.probability_colour(row.cosine), None, None, None] for row in rows]
    output.table(("token", "cosine", "length", "id", ""), cells, "lrrr", colours)


def _name(row: Neighbour) -> str:
    """The piece; of rows that spell nothing the id."""
    return row.piece or f"#{row.id}"


def _marked(row: Neighbour) -> str:
    return "" if row.kind == "normal" else row.kind


def _show_analogy(found: Analogy) -> None:
    a, b, c = found.words
    output.emit(f"{a} is to {b} as {c} is to … ({b} − {a} + {c}, rows of length 1):")
    _show_rows(found.rows)
    itself = found.itself
    if itself.id in found.ids:
        output.emit(f"The three words are left out: with them {itself.piece} would win with {itself.cosine:.3f}.")
    else:
        output.emit(f"The three words are left out; {itself.piece} would win with them, too.")
    output.emit("Rows of a language model are shaped by prediction, not made for such sums: some work, many do not.\n")


def _show_norms(found: Norms) -> None:
    output.emit(f"{found.rows:,} rows of {found.width} numbers; lengths:")
    most = max(found.counts)
    rows = [
        (f"{low:.2f}–{high:.2f}", f"{count:,}", views.bar(count / most, _BAR) if count else "")
        for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True)
    ]
    output.table(("length", "tokens", ""), rows, "rr")
    quantiles = ", ".join(f"{share} below {value:.2f}" for share, value in list(found.quantiles.items())[1:-1])
    output.emit(f"mean {found.mean:.2f}; {quantiles}")
    for title, extreme in (("shortest", found.shortest), ("longest", found.longest)):
        output.emit(f"{title}: " + "  ".join(f"{output.printable(_name(row))} {row.norm:.2f}" for row in extreme))
    output.emit("Length tells little of meaning: tokens that training hardly met stand out at one end or the other.")


# ── texts ──


def _show_sentences(found: Sentences) -> None:
    for number, (text, count) in enumerate(zip(found.texts, found.tokens, strict=True), 1):
        output.emit(f"{number:>3}  {output.one_line(text, 90)}  ({count} tokens)")
    output.emit()
    rows, colours = [], []
    for number, row in enumerate(found.similarity, 1):
        rows.append((number, *(f"{value:.2f}" for value in row)))
        colours.append([None, *(output.probability_colour(value) for value in row)])
    output.table(("", *map(str, range(1, len(rows) + 1))), rows, "r" * (len(rows) + 1), colours)
    output.emit(f"Cosines of the texts' vectors; each is the {_POOLED[found.how]} of the last layer's normed output.")
    if len(rows) > 2:
        pairs = [
            (value, i + 1, j + 1) for i, row in enumerate(found.similarity) for j, value in enumerate(row) if j > i
        ]
        best, worst = max(pairs), min(pairs)
        output.emit(
            f"Most alike: {best[1]} and {best[2]} ({best[0]:.2f}); least: {worst[1]} and {worst[2]} ({worst[0]:.2f})."
        )
    if found.warning:
        output.note(f"note: {found.warning}")


def _show_layers(found: Sequence[LayerSimilarity]) -> None:
    count = len(found[0].similarity)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    rows, colours = [], []
    for each in found:
        near = [each.similarity[i][j] for i, j in pairs[:_PAIRS]]
        rows.append(("enters" if each.layer < 0 else f"after {each.layer}", *(f"{value:.3f}" for value in near)))
        colours.append([None, *map(output.probability_colour, near)])
    output.emit()
    output.table(("layer", *(f"{i + 1} and {j + 1}" for i, j in pairs[:_PAIRS])), rows, "l" + "r" * _PAIRS, colours)
    output.emit("Cosines of the residual stream after each layer, means over a text's tokens after the first.")
    if len(pairs) > _PAIRS:
        output.emit(f"… and {len(pairs) - _PAIRS:,} more pairs (--json shows all)")


_POOLED = {"mean": "mean over all tokens", "last": "last token", "cls": "first token"}


def _show_shift(found: Shift) -> None:
    output.emit(f"{found.rows:,} rows, measured on all of them (dequantized):")
    if any(found.quantiles.values()):
        shares = [(_SHARES.get(share, share), f"{value:.2%}") for share, value in found.quantiles.items()]
        output.table(("rows", "relative error"), [("mean", f"{found.mean_error:.2%}"), *shares], "lr")
        _show_moved(found)
    else:
        output.emit("Not one number differs: both files hold the same table.")
    if found.texts:
        output.emit("\nTexts:")
        texts = [(output.one_line(each.text, 60), f"{each.cosine:.4f}", f"{each.error:.2%}") for each in found.texts]
        output.table(("text", "cosine", "relative error"), texts, "lrr")
        output.emit("A text's vector has passed all layers: it carries the error of every one of them.")


_SHARES = {"0 %": "least", "50 %": "median", "100 %": "most"}


def _show_moved(found: Shift) -> None:
    output.emit(
        f"mean cosine {found.mean_cosine:.6f}. The error is the length of the difference as a share of the row's."
    )
    output.emit("\nRows that moved most:")
    rows = [(row.piece, f"{row.error:.2%}", f"{row.cosine:.4f}", row.id) for row in found.worst]
    output.table(("token", "relative error", "cosine", "id"), rows, "lrrr")


# ── pictures ──


def _drawn(args: argparse.Namespace, backend: Backend, texts: list[str], near: Sequence[Neighbours]) -> Scatter:
    from ...inspection import embeddings

    if near:
        return embeddings.vocabulary_map(backend, [[each.id, *(row.id for row in each.rows)] for each in near])
    return embeddings.text_map(embeddings.sentences(backend, texts, args.pool))


def _show_plot(args: argparse.Namespace, drawn: Scatter) -> None:
    from ...inspection import pictures

    what = ", ".join(args.near) if args.near else f"{len(drawn.points)} texts"
    if str(args.plot) != "-":
        views.write(args.plot, pictures.svg(drawn, f"{what}: two principal components"))
        return
    if args.json:
        return
    for line in _grid(drawn):
        output.emit(line.rstrip())
    across, up = (views.percent(share) for share in drawn.shares)
    output.emit(
        f"Principal components: → {across} and ↑ {up} of how the rows differ; near here need not be near in all."
    )


def _grid(drawn: Scatter) -> list[str]:
    """The points with their names, in characters; a name gives way to a mark where there is no room."""
    width, height = _GRID
    lines = [[" "] * width for _ in range(height)]
    left, right, low, high = drawn.bounds
    for point in drawn.points:
        x = round((point.x - left) / (right - left) * (width - 1))
        y = height - 1 - round((point.y - low) / (high - low) * (height - 1))
        mark, name = _MARKS[point.group % len(_MARKS)], output.one_line(point.label, 24)
        for begin, text in ((x, f"{mark}{name}"), (x - len(name), f"{name}{mark}"), (x, mark)):
            fits = begin >= 0 and begin + len(text) <= width and len(text) == output.columns(text)
            if fits and all(char == " " for char in lines[y][begin : begin + len(text)]):
                lines[y][begin : begin + len(text)] = text
                break
    return ["".join(line) for line in lines]
