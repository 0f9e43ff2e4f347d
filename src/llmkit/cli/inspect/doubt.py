"""Mark where an answer was unsure, and ask again to see whether the model says the same.

The greedy answer is shown with the tokens that rules mark as doubtful; then the question is answered anew several times
and the answers are compared. This is about the model's certainty, not about truth: the last lines say what follows.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .. import models, output, sampling_arguments
from ..quantize import count_argument
from . import views

if TYPE_CHECKING:
    from ...inspection.doubt import Consistency, Doubt

EXAMPLES = (
    "llmkit inspect doubt 'What is the capital of Australia?' --model model.gguf",
    "llmkit inspect doubt 'Who wrote Faust?' --model model.gguf --samples 16 --temperature 1",
    "llmkit inspect doubt 'What is 7 times 8?' --model model.gguf --samples 0 --json",
)
_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The question, the model, how many samples, and how they are drawn."""
    parser.add_argument("text", metavar="TEXT", help="the question; - reads it from the input")
    views.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--samples", type=lambda text: count_argument(text, least=0), default=8, metavar="N", help="ask again N times"
    )
    parser.add_argument(
        "--tokens", type=count_argument, default=64, metavar="N", help="tokens of an answer at most (default 64)"
    )
    parser.add_argument("--context", type=count_argument, metavar="N", help="tokens (default 4096)")
    views.add_json(parser)
    sampling_arguments.add_arguments(parser, without=frozenset({"max_tokens"}))


def run(args: argparse.Namespace) -> int:
    """Answer, ask again, show both."""
    from ...chat import Sampling
    from ...inspection import doubt

    question = views.text_of(args.text)
    sampling = sampling_arguments.sampling(args, Sampling(max_tokens=args.tokens))
    with models.opened(args) as backend:
        found = doubt.doubt(
            backend, question, samples=args.samples, sampling=sampling, system=args.system, context=args.context
        )
    if args.json:
        output.emit_json(found)
    else:
        show(found)
    return 0


def show(found: Doubt) -> None:
    """The marked answer, the rules, the samples, the limits."""
    answer = found.answer
    output.emit(output.printable(answer.text.strip()))
    output.emit()
    if answer.spans:
        rows = [
            (f"{span.start + 1}–{span.end}", repr(span.text), f"{span.least_probability:.1%}",
             f"{span.highest_entropy_bits:.1f} bits", ", ".join(span.rules))
            for span in answer.spans
        ]  # fmt: skip
        output.table(("tokens", "doubtful", "least likely token", "highest entropy", "why"), rows, "rlrrl")
        output.emit()
    output.emit(
        f"{answer.doubtful} of {answer.tokens} tokens are doubtful; perplexity {answer.perplexity:.2f}. Measured on raw"
        " probabilities, before samplers."
    )
    for rule in found.rules:
        output.emit(f"  {rule}")
    if found.consistency:
        output.emit()
        _show_samples(found.consistency)
    output.emit()
    for limit in found.limits:
        output.emit(f"- {limit}")


def _show_samples(found: Consistency) -> None:
    count = len(found.samples)
    rows = [(group.count, f"{group.share:.0%}", output.one_line(group.text, 90)) for group in found.groups[:_SHOWN]]
    output.table(("samples", "share", "answer (first wording)"), rows, "rrl")
    if (more := len(found.groups) - _SHOWN) > 0:
        output.emit(f"… and {more} more answers")
    alike = "" if found.similarity is None else f"; mean cosine of their vectors {found.similarity:.3f} (derived, weak)"
    output.emit(
        f"{count} samples at temperature {found.temperature:g}: {found.agreement:.0%} agree on one text,"
        f" {found.with_answer:.0%} with the greedy answer, {found.entropy_bits:.2f} bits between them{alike}."
    )
    output.emit("Texts are compared without case, punctuation and articles: short answers show most.")
