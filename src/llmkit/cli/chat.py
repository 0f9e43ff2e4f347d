"""Talk with a model in the terminal.

MODEL is a GGUF file, or org/name:QUANT of the Hub: fetched, or made of the checkpoint, once. Answers stream to stdout,
notes to stderr; what commands print goes to stdout only where that is a terminal. Ctrl-C stops an answer; /exit, the
end of the input, or Ctrl-C once more leaves. Without a terminal each line of the input is a question, unless its first
word is one of the commands that /help lists.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import LlmkitError, Unsupported, nearest_hint
from . import models, output
from .quantize import count_argument

if TYPE_CHECKING:
    from ..chat import Chat, Sampling, Step

EXAMPLES = (
    "llmkit chat SmolLM2-135M-Instruct-Q8_0.gguf",
    "llmkit chat model.gguf --system tutor --temperature 0.2",
    'llmkit chat model.gguf --prompt "Where is Paris?" --show-probabilities',
)
MOST_THREADS = 512  # the engine's own limit (ggml/include/ggml.h: GGML_MAX_N_THREADS)
KEPT = "The answer ends here; what was fetched or made of the model is kept."
_DIM = 244
# option of the command line and name in /set → type; the names are Sampling's
SAMPLING = {
    "temperature": (float, "0 takes the most likely token, 1 is the model's own spread"),
    "top-k": (int, "keep the K most likely tokens, 0 keeps all"),
    "top-p": (float, "keep the fewest tokens that reach P together, 1 keeps all"),
    "min-p": (float, "keep tokens at least P times as likely as the best, 0 keeps all"),
    "repeat-penalty": (float, "above 1 makes tokens said before less likely"),
    "seed": (int, "the same seed gives the same answer"),
    "max-tokens": (int, "longest answer"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the sampling and how to show the answer."""
    parser.add_argument("model", metavar="MODEL", help="a .gguf file, or org/name:QUANT of the Hub")
    parser.add_argument("--system", metavar="NAME|TEXT", help="a prompt of prompts/system by name, or a text")
    for name, (kind, what) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", help=what)
    parser.add_argument(
        "--context", type=count_argument, metavar="N", help="tokens the conversation may hold (default 4096)"
    )
    parser.add_argument("--threads", type=_thread_count, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--gpu-layers",
        type=lambda text: count_argument(text, least=0),
        metavar="N",
        help="layers on the GPU (default: all that it can take)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer TEXT and leave; - reads it from the input")
    parser.add_argument(
        "--show-probabilities", action="store_true", help="colour tokens by probability, list the doubtful"
    )


def _thread_count(text: str) -> int:
    if (count := count_argument(text)) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_THREADS}")
    return count


def run(args: argparse.Namespace) -> int:
    """Load the model and talk until the input ends."""
    from .. import backends
    from ..chat import Chat, Sampling

    given = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in SAMPLING}
    sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    system = system_text(args.system) if args.system else None
    with output.ProgressBar() as bar:
        backend = backends.load(
            models.runnable(args.model), n_threads=args.threads, gpu_layers=args.gpu_layers, on_progress=bar
        )
    chat = None
    try:
        chat = Chat(backend, system=system, sampling=sampling, context=args.context)
        _tell_about(chat)
        if args.prompt is None:
            typed = sys.stdin.isatty()
            talk = Conversation(chat, args.show_probabilities, typed)
            talk.hold(_typed_lines() if typed else _piped_lines())
        else:
            answer(chat, sys.stdin.read() if args.prompt == "-" else args.prompt, args.show_probabilities)
    finally:
        if chat is not None:
            chat.close()
        backend.close()
    return 0


def system_text(name_or_text: str) -> str:
    """The system prompt of that name, or the text itself. A single word must be a name: raises ModelNotFound."""
    from .. import prompts

    return name_or_text if len(name_or_text.split()) > 1 else prompts.system(name_or_text)


def _tell_about(chat: Chat) -> None:
    info = chat.backend.info
    output.note(_dim(f"{info.name}: {info.n_params / 1e6:,.0f} M parameters, {output.size(info.weight_nbytes)}"))
    if chat.template.name == "plain":
        output.note("The file has no chat template: questions are put as a plain dialogue (User: … Assistant: …).")
    if chat.total > info.n_ctx_train > 0:
        output.note(
            f"The model was trained on {info.n_ctx_train} tokens of context; beyond them it may lose the thread."
        )


# ── an answer ──


def answer(chat: Chat, question: str, show_probabilities: bool = False) -> list[Step]:
    """Ask and stream the answer to stdout, then its figures to stderr. Returns its steps."""
    steps: list[Step] = []
    stopped = False
    said = chat.say(question)
    try:
        held = 0.0  # the least logprob among tokens whose text has not been shown: together they make a character
        for step in said:
            steps.append(step)
            held = min(held, step.logprob)
            show_step(replace(step, logprob=held), coloured=show_probabilities)
            held = 0.0 if step.text else held
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        said.close()  # keeps the partial answer in the chat
        if steps or stopped:
            output.emit()
        if stopped and not steps:
            output.note("Stopped before the answer; the question is not kept.")
        if steps:
            if show_probabilities:
                show_doubtful(steps)
            output.note(_dim(_figures(chat)))
            if chat.turn and chat.turn.merged_system and len(chat.messages) <= 2:
                output.note(_dim("The model's template knows no system prompt: the first question carries it."))
    return steps


def show_step(step: Step, *, coloured: bool) -> None:
    """Write a step's text to stdout; `coloured` by its probability where the terminal can."""
    if not step.text:
        return
    text = step.text
    if sys.stdout.isatty():  # a model must not drive the terminal
        text = "".join(char if char in "\n\t" else output.printable(char) for char in text if char != "\r")
    output.emit(
        output.paint(text, colour=output.probability_colour(math.exp(step.logprob))) if coloured else text, end=""
    )


def show_doubtful(steps: Iterable[Step], count: int = 3) -> None:
    """Below an answer: the legend of the colours, and for the most uncertain tokens what it might have said instead."""
    if legend := output.probability_legend():
        output.emit(legend)
    doubtful = sorted((step for step in steps if step.alternatives), key=lambda step: -step.entropy)[:count]
    rows = []
    for step in doubtful:
        others = [other for other in step.alternatives if other.id != step.id][:3]
        best = [f"{_quoted(other.piece)} {math.exp(other.logprob):.0%}" for other in others]
        rows.append((_quoted(step.piece), f"{math.exp(step.logprob):.0%}", f"{step.entropy:.1f} bits", ", ".join(best)))
    output.table(("most uncertain", "probability", "entropy", "it might have said"), rows, "lrr")


def _quoted(piece: bytes) -> str:
    return repr(piece.decode("utf-8", "backslashreplace"))


def _figures(chat: Chat) -> str:
    turn = chat.turn
    if turn is None:
        return f"context {chat.used} of {chat.total}"
    parts = [f"{turn.generated} tokens"]
    if turn.tokens_per_second:
        parts.append(f"{turn.tokens_per_second:.1f} tokens/s")
    reused = f" ({turn.reused} reused)" if turn.reused else ""
    parts += [f"prompt {turn.prompt}{reused} in {output.duration(turn.prompt_ms / 1000)}"]
    parts += [f"context {chat.used} of {chat.total}", f"seed {turn.seed}"]
    why = {"length": "cut at --max-tokens", "context": "cut: the context is full (/clear, or a larger --context)"}
    parts += [why[turn.finish]] if turn.finish in why else ["stopped"] * (turn.finish is None)
    return " · ".join(parts)


def _dim(text: str) -> str:
    return output.paint(text, colour=_DIM, stream=sys.stderr)


# ── the conversation ──


def _aside() -> AbstractContextManager[Any]:
    """Inside, what is no answer is printed: to stderr where stdout is no terminal, so that a file gets answers only."""
    return nullcontext() if sys.stdout.isatty() else redirect_stdout(sys.stderr)


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal. Ctrl-C drops a line, the second one in a row ends the input."""
    try:
        import readline  # noqa: F401  # gives input() its history and editing
    except ImportError:
        pass
    interrupted = False
    while True:
        try:
            with _aside():
                line = input("> ")
            interrupted = False
            yield line
        except KeyboardInterrupt:
            with _aside():
                output.emit()
            if interrupted:
                return
            interrupted = True
            output.note("Ctrl-C once more, or /exit, leaves.")
        except EOFError:
            with _aside():
                output.emit()
            return


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\n")


class Conversation:
    """The loop: questions are answered, lines that begin with / are commands (COMMANDS)."""

    def __init__(self, chat: Chat, show_probabilities: bool = False, typed: bool = True) -> None:
        self.chat = chat
        self.typed = typed
        self.show_probabilities = show_probabilities
        self.over = False

    def hold(self, lines: Iterable[str]) -> None:
        """Go through `lines`. On a terminal errors are shown and the conversation goes on; else they are raised."""
        for line in lines:
            try:
                self.take(line.strip())
            except LlmkitError as error:
                if not sys.stdin.isatty():
                    raise
                output.error(error.message, error.hint)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
            if self.over:
                return

    def take(self, line: str) -> None:
        """One line."""
        if not line.startswith("/"):
            if line:
                answer(self.chat, line, self.show_probabilities)
            return
        word, _, rest = line.partition(" ")
        command = COMMANDS.get(word)
        if command is None and not self.typed:
            answer(self.chat, line, self.show_probabilities)
            return
        if command is None:
            raise Unsupported(f"unknown command '{word}'", nearest_hint(word, COMMANDS))
        with _aside():
            command.run(self, rest.strip())

    def help(self, _: str) -> None:
        """Show the commands."""
        output.table(("command", ""), [(command.usage, command.what) for command in COMMANDS.values()])

    def clear(self, _: str) -> None:
        """Begin anew."""
        self.chat.clear()
        output.note("The conversation begins anew.")

    def system(self, text: str) -> None:
        """Show or change the system prompt."""
        if text:
            self.chat.system = None if text == "off" else system_text(text)
        output.emit(self.chat.system or "(no system prompt)")

    def set(self, text: str) -> None:
        """Show or change the sampling."""
        name, _, value = text.partition(" ")
        if name:
            self.chat.sampling = changed(self.chat.sampling, name, value.strip())
        fields = ((name, getattr(self.chat.sampling, name.replace("-", "_"))) for name in SAMPLING)
        output.table(("setting", "value"), [(name, "-" if value is None else value) for name, value in fields])

    def context(self, _: str) -> None:
        """Show how full the context is."""
        share = self.chat.used / self.chat.total
        output.emit(f"{self.chat.used} of {self.chat.total} tokens ({share:.0%}), {len(self.chat.messages)} messages")

    def probabilities(self, _: str) -> None:
        """Switch colours and the table of doubtful tokens."""
        self.show_probabilities = not self.show_probabilities
        output.note(f"Probabilities {'on' if self.show_probabilities else 'off'}.")

    def exit(self, _: str) -> None:
        """End the conversation."""
        self.over = True


def changed(sampling: Sampling, name: str, value: str) -> Sampling:
    """`sampling` with one setting changed by its option's name. Raises Unsupported for unknown names and values."""
    name = name.replace("_", "-").removeprefix("--")
    if name not in SAMPLING:
        raise Unsupported(f"unknown setting '{name}'", nearest_hint(name, SAMPLING))
    kind = SAMPLING[name][0]
    try:
        number = None if value in ("off", "-") and name in ("seed", "max-tokens") else kind(value)
    except ValueError:
        raise Unsupported(f"{name} {value!r}: expected a number", f"For example: /set {name} 1") from None
    change: dict[str, Any] = {name.replace("-", "_"): number}
    return replace(sampling, **change)


@dataclass(frozen=True)
class Command:
    """A line that begins with /."""

    usage: str
    what: str
    run: Callable[[Conversation, str], None]


COMMANDS = {
    "/help": Command("/help", "these commands", Conversation.help),
    "/clear": Command("/clear", "begin anew; the system prompt stays", Conversation.clear),
    "/system": Command("/system [NAME|TEXT|off]", "show or change the system prompt", Conversation.system),
    "/set": Command("/set [NAME VALUE]", "show or change sampling, e.g. /set temperature 0.7", Conversation.set),
    "/context": Command("/context", "how full the context is", Conversation.context),
    "/probabilities": Command("/probabilities", "colours and doubtful tokens on or off", Conversation.probabilities),
    "/exit": Command("/exit", "leave", Conversation.exit),
}
