"""Talk with a model in the terminal.

MODEL is a GGUF file, an MLX folder, or org/name:QUANT of the Hub: fetched, or made of the checkpoint, once. Answers
stream to stdout, notes to stderr; what commands print goes to stdout only where that is a terminal. Ctrl-C stops an
answer; /exit, the end of the input, or Ctrl-C once more leaves. /help lists the commands: samplers, branches, tokens
and why they were said, exports. Conversations are kept (`llmkit chats`), unless --no-save or --prompt is given.
Without a terminal each line of the input is a question, unless its first word is a command.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ...errors import LlmkitError
from .. import models, output, sampling_arguments
from ..quantize import count_argument
from .answers import answer

if TYPE_CHECKING:
    from .talk import Talk

__all__ = ["EXAMPLES", "KEPT", "add_arguments", "answer", "run"]

EXAMPLES = (
    "llmkit chat SmolLM2-135M-Instruct-Q8_0.gguf",
    "llmkit chat model.gguf --system tutor --temperature 0.2 --min-p 0.1",
    'llmkit chat model.gguf --prompt "Where is Paris?" --show-probabilities',
    'llmkit chat model.gguf --json-schema person.json --prompt "Anna is 31 years old."',
    "llmkit chat model.gguf --load 3",
)
KEPT = (
    "The answer ends here; what was fetched or made of the model is kept, and so is the conversation (`llmkit chats`)."
)
_MOST_ALTERNATIVES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, what it is told, what computes, how it chooses, and how to show the answer."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{models.RUN_HELP}; --load knows it")
    parser.add_argument("--system", metavar="NAME|TEXT", help="a system prompt by name (yours or ours), or a text")
    parser.add_argument("--persona", metavar="NAME|FILE", help="a written dialogue to go on with, without a template")
    parser.add_argument("--load", metavar="NAME", help="go on with a kept conversation, or with a JSON export")
    parser.add_argument("--no-save", action="store_true", help="keep nothing of the conversation")
    parser.add_argument("--prompt", metavar="TEXT", help="answer TEXT and leave; - reads it from the input")
    parser.add_argument(
        "--context", type=count_argument, metavar="N", help="tokens the conversation may hold (default 4096)"
    )
    parser.add_argument(
        "--when-full", choices=("ask", "stop", "slide", "summarise"),
        help="a full context: stop, forget the oldest turns, or let the model sum them up (default: ask, piped: stop)",
    )  # fmt: skip
    models.add_backend_arguments(parser)
    parser.add_argument(
        "--show-probabilities", action="store_true", help="colour tokens by probability, list the doubtful"
    )
    parser.add_argument("--show-thoughts", action="store_true", help="show reasoning, which is folded else")
    parser.add_argument("--thinking", choices=("on", "off"), help="ask the model's template for reasoning, or for none")
    parser.add_argument(
        "--n-alternatives", type=_alternatives, default=5, metavar="N",
        help="alternatives noted for each token (default 5; 0 switches entropy and ranks off too, which is faster)",
    )  # fmt: skip
    sampling_arguments.add_arguments(parser)


def _alternatives(text: str) -> int:
    count = count_argument(text, least=0)
    if count > _MOST_ALTERNATIVES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {_MOST_ALTERNATIVES}")
    return count


def run(args: argparse.Namespace) -> int:
    """Load the model and talk until the input ends."""
    from . import archive, opening

    talk = opening.begin(args)
    try:
        opening.tell_about(talk.chat)
        if args.prompt is not None:
            question = sys.stdin.read() if args.prompt == "-" else args.prompt
            if not question.strip():
                raise LlmkitError("the question is empty", 'For example: --prompt "Where is Paris?"')
            talk.answer(lambda: talk.chat.say(question))
            return 0
        if args.load:
            archive.tell_where(talk)
        _hold(talk, keep=not args.no_save)
    finally:
        talk.close()
    return 0


def _hold(talk: Talk, keep: bool) -> None:
    """Talk until the input ends, or something does not go well; either way it is said how to go on."""
    from . import context, line
    from .commands import candidates

    talk.source = line.reader(
        lambda text: candidates(talk, text), lambda typed: context.live(talk.chat, typed), keep=keep
    )
    talk.keeper.watch(talk.chat.conversation)
    try:
        talk.hold(line.lines(talk.source))
    finally:
        if talk.keeper.store is not None and talk.chat.conversation.id is not None:
            output.next_command(talk.keeper.again(talk.chat.conversation))
