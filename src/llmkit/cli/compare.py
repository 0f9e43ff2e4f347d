"""Compare two quants of a model on a prompt: KL by token, where they part, which layers drift.

The first model is the reference. Each may be a .gguf file, org/name:QUANT of the Hub, a folder of MLX, or a checkpoint
folder, which is run by PyTorch in float32 (extra `transformers`). Both continue the prompt greedily. Where both do not
fit into memory together, one is loaded after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from . import models, output
from .inspect import views
from .quantize import count_argument

if TYPE_CHECKING:
    from ..backends import Backend
    from ..inspection.compare import Comparison, Passage, Side
    from ..inspection.tokens import Odds

EXAMPLES = (
    "llmkit compare model-Q8_0.gguf model-Q2_K.gguf --prompt 'The capital of France is'",
    "llmkit compare ./SmolLM2-135M-Instruct model-Q4_K_M.gguf --prompt - --tokens 64 < text.txt",
    "llmkit compare a.gguf b.gguf --prompt 'Once upon a time' --html report.html",
)
_SHOWN = 8
_FLOAT32 = 2  # times the bytes of a checkpoint in 16 bits
_SHARE = 0.9  # of the free memory that both models together may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two models and a prompt."""
    from ..backends.choice import NAMES

    parser.add_argument("model", metavar="A", help=f"the reference: {models.RUN_HELP}, or a checkpoint folder")
    parser.add_argument("other", metavar="B", help="what is compared with it")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what both read; - reads it from the input")
    parser.add_argument("--tokens", type=count_argument, default=32, metavar="N", help="tokens each adds (default 32)")
    models.add_backend_arguments(parser)
    parser.add_argument("--other-backend", choices=NAMES, help="what computes B (default: as --backend)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as one page, too")
    views.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Find both, compare them, show it."""
    from ..inspection import compare, compare_html

    prompt = views.text_of(args.prompt)
    asked = ((args.model, args.backend), (args.other, args.other_backend or args.backend))
    wishes = [(text, _backend_for(text, wanted)) for text, wanted in asked]
    found = [(models.runnable(text, wish), wish) for text, wish in wishes]
    together = _fit([path for path, _ in found])
    if not together:
        output.note("The models do not fit into the free memory together: one is loaded after the other.")
    a, b = (_opener(args, path, wish) for path, wish in found)
    names = [path.name or str(path) for path, _ in found]
    comparison = compare.compare(a, b, prompt, count=args.tokens, together=together, names=names)
    if args.json:
        output.emit_json(comparison)
    else:
        show(comparison)
    if args.html:
        views.write(args.html, compare_html.page(comparison))
    return 0


def _backend_for(text: str, wanted: str) -> str:
    """The wish for one of the two: a checkpoint folder is the original, so it runs by transformers unless said else."""
    from .. import model
    from ..backends import choice

    ref = model.parse(text)
    folder = ref.path is not None and ref.path.is_dir()
    if folder and wanted == choice.AUTO and ref.path and (ref.path / "config.json").is_file():
        return choice.MLX if choice.is_mlx_folder(ref.path) else choice.TRANSFORMERS
    quantized = bool(ref.quant) or (ref.path is not None and not folder)
    return choice.AUTO if wanted == choice.TRANSFORMERS and quantized else wanted


def _opener(args: argparse.Namespace, path: Path, wish: str) -> Callable[[], AbstractContextManager[Backend]]:
    own = argparse.Namespace(**{**vars(args), "backend": wish})
    return lambda: models.opened(own, str(path))


def _fit(paths: list[Path]) -> bool:
    """Whether both models fit into free memory together, with some room for their contexts."""
    from ..errors import LlmkitError
    from ..memory.devices import machine

    needed = 0
    for path in paths:
        files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
        needed += sum(each.stat().st_size for each in files if each.is_file()) * (_FLOAT32 if path.is_dir() else 1)
    try:
        available = machine.ram().available
    except LlmkitError:
        return True
    return available is None or needed <= _SHARE * available


# ── showing ──


def show(comparison: Comparison) -> None:
    """Figures, both continuations, the tokens that differ most, the layers that drift most."""
    _show_sides(comparison.a, comparison.b)
    output.emit()
    _show_passages(comparison.passages)
    output.emit()
    _show_continuations(comparison)
    _show_worst(comparison)
    _show_layers(comparison)
    for note in comparison.notes:
        output.note(f"note: {note}")


def _show_sides(a: Side, b: Side) -> None:
    rows = [
        ("name", a.name, b.name),
        ("weights", output.size(a.weight_nbytes), output.size(b.weight_nbytes)),
        ("engine", a.engine or "-", b.engine or "-"),
    ]
    output.table(("", "A (reference)", "B"), rows)


def _show_passages(passages: tuple[Passage, ...]) -> None:
    names = {"prompt": "the prompt", "a": "A's continuation", "b": "B's continuation"}
    rows = []
    for each in passages:
        if each.mean_kl_nats is None or each.agreement is None:
            rows.append((names[each.name], 0, *["-"] * 7))
            continue
        rows.append((
            names[each.name], len(each.tokens), f"{each.mean_kl_nats:.4f}", f"{each.mean_kl_bits:.4f}",
            f"{each.max_kl_nats:.4f}", f"{each.agreement:.0%}", "-" if each.first_flip is None else each.first_flip,
            f"{each.perplexity_a:.2f}", f"{each.perplexity_b:.2f}",
        ))  # fmt: skip
    headers = ("text read", "tokens", "KL(A‖B) nats", "bits", "largest", "same top-1", "first flip",
               "perplexity A", "B")  # fmt: skip
    output.table(headers, rows, "lrrrrrrrr")
    output.emit("All measured on raw probabilities (before samplers); KL is the mean over tokens, largest in nats.")


def _show_continuations(comparison: Comparison) -> None:
    a, b, parts = comparison.a, comparison.b, comparison.parts_at
    if parts is None:
        output.emit(f"Both go on alike, for {len(a.ids)} tokens: {a.text!r}")
        return
    output.emit(f"A goes on: {a.text!r}")
    output.emit(f"B goes on: {b.text!r}")
    rows = [row for name in "ab" for row in comparison.passage(name).tokens[parts : parts + 1]]
    if rows:
        chosen = f"A finds {_best(rows[0].best_a)} most likely, B {_best(rows[0].best_b)}"
        output.emit(f"They part at token {parts + 1} of the continuation: {chosen}.")


def _best(best: Odds) -> str:
    return f"{best.piece} ({best.probability:.1%})"


def _show_worst(comparison: Comparison) -> None:
    begins = {"b": len(comparison.a.ids) if comparison.parts_at is None else comparison.parts_at}  # as in a before
    every = [(each.name, token) for each in comparison.passages for token in each.tokens[begins.get(each.name, 0) :]]
    worst = sorted((row for row in every if row[1].kl_nats > 0), key=lambda row: -row[1].kl_nats)[:_SHOWN]
    if not worst:
        return
    rows = [
        (f"{name} {each.position}", each.piece, f"{each.kl_nats:.4f}", f"{each.kl_bits:.4f}",
         f"{each.probability_a:.1%}", f"{each.probability_b:.1%}", _best(each.best_a), _best(each.best_b))
        for name, each in worst
    ]  # fmt: skip
    output.emit()
    headers = ("differ most at", "token", "KL nats", "bits", "p in A", "p in B", "A's best", "B's best")
    output.table(headers, rows, "llrrrrll")


def _show_layers(comparison: Comparison) -> None:
    if not any(each.relative_error for each in comparison.layers):
        return
    most = sorted(comparison.layers, key=lambda each: -each.added)[:_SHOWN]
    rows = [
        ("embeddings" if each.layer < 0 else f"layer {each.layer}", f"{each.relative_error:.2%}", f"{each.added:+.2%}",
         f"{each.cosine:.5f}")
        for each in sorted(most, key=lambda each: each.layer)
    ]  # fmt: skip
    last = comparison.layers[-1]
    output.emit()
    output.table(("drifts most in", "off by |A-B|/|A|", "of it new here", "cosine"), rows, "lrrr")
    output.emit(
        f"After the last layer ({last.layer}): off by {last.relative_error:.2%}, cosine {last.cosine:.5f}; means over"
        f" the first {comparison.hidden_tokens} tokens of the prompt."
    )
