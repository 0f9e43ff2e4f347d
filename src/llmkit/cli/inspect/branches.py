"""Show how a text might go on: several continuations at once on one shared context, with probabilities.

The likeliest next tokens (or those of --token) are each gone on with: greedily, or with --draw by the sampling options,
each branch with draws of its own. The tree shows raw probabilities: the model's own, before any sampler.
"""

from __future__ import annotations

import argparse
from math import exp
from typing import TYPE_CHECKING

from ...errors import LlmkitError
from .. import models, output, sampling_arguments
from ..quantize import count_argument
from . import views

if TYPE_CHECKING:
    from ...inspection.branches import Branches, Fork

EXAMPLES = (
    'llmkit inspect branches "The capital of France is" --model model.gguf',
    'llmkit inspect branches "The capital of France is" --model model.gguf --token Rome --token Berlin',
    'llmkit inspect branches "Tell me a joke." --chat --model model.gguf --width 2 --depth 3 --tokens 40',
    'llmkit inspect branches "Once upon a time" --model model.gguf --draw --temperature 1.2 --seed 7',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TEXT, the model, the shape of the tree, and how to go on."""
    views.add_text(parser)
    views.add_model(parser)
    parser.add_argument("--width", type=count_argument, default=4, metavar="N", help="branches of a fork (default 4)")
    parser.add_argument(
        "--tokens", type=count_argument, default=20, metavar="N", help="tokens of a branch at most (default 20)"
    )
    parser.add_argument(
        "--depth", type=count_argument, default=1, metavar="N", help="fork at the first N tokens (default 1)"
    )
    views.add_at(parser)
    views.add_token(parser, "begin a branch with it")
    parser.add_argument("--draw", action="store_true", help="draw tokens, instead of taking the likeliest")
    views.add_json(parser)
    sampling_arguments.add_arguments(parser, without=frozenset({"max_tokens"}))


def run(args: argparse.Namespace) -> int:
    """Grow the tree and draw it."""
    from ...inspection import branches, tokens

    sampling = sampling_arguments.sampling(args)
    if not args.draw and (given := sampling_arguments.given(args)):
        raise LlmkitError(f"{given[0]} is about drawing, and the likeliest tokens are taken", "Give --draw, too.")
    with models.opened(args) as backend:
        ids = views.tokens_of(backend, views.text_of(args.text), args.chat)
        ids = ids[: tokens.position_of(len(ids), args.at) + 1]
        starts = tuple(tokens.find(backend, word) for word in args.token)
        shape = branches.Shape(args.width, args.tokens, args.depth, starts)
        grown = branches.grow(backend, ids, shape, sampling=sampling if args.draw else None, seed=sampling.seed or 0)
    if args.json:
        output.emit_json(grown)
    else:
        _show(grown)
    return 0


def _show(grown: Branches) -> None:
    output.emit(grown.context)
    for index, fork in enumerate(grown.forks):
        _draw(fork, "", index == len(grown.forks) - 1)
    how = "the likeliest token each time" if grown.seed is None else f"drawn, seed {grown.seed}"
    output.emit()
    output.emit(
        f"{len(grown.leaves)} branches, {how}. First the raw probability of the token at the fork, last that of"
    )
    output.emit("the whole branch: all its tokens' raw probabilities multiplied.")
    cells = "" if grown.cells is None else f", {grown.cells:,} cells of the KV cache"
    output.emit(
        f"{grown.evaluated:,} tokens evaluated{cells}; one after another it would have been {grown.separately:,}."
    )


def _draw(fork: Fork, indent: str, last: bool) -> None:
    first, *others = fork.steps
    begin = output.paint(f"{views.percent(exp(first.logprob)):>6} {first.piece}", colour=_colour(first.logprob))
    rest = "".join(output.paint(output.printable(each.piece), colour=_colour(each.logprob)) for each in others)
    end = {"end": " ■", "length": " …", None: ""}[fork.ending]
    whole = "" if fork.children else f"  ({_small(exp(fork.logprob))})"
    output.emit(f"{indent}{'└' if last else '├'}─ {begin}{rest}{end}{whole}")
    for index, child in enumerate(fork.children):
        _draw(child, indent + ("   " if last else "│  "), index == len(fork.children) - 1)


def _colour(logprob: float) -> int:
    return output.probability_colour(exp(logprob))


def _small(probability: float) -> str:
    """A probability that may be very small: 12 %, 0.3 %, 2e-09."""
    return views.percent(probability) if probability >= 0.001 else f"{probability:.0e}"
