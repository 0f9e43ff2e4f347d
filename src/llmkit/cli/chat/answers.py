"""An answer on the terminal: streamed, coloured by probability, its reasoning folded, its figures below.

With the commands that switch how it is shown.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...errors import Unsupported
from .. import output
from . import context

if TYPE_CHECKING:
    from ...chat import Chat, Step
    from ...chat.answer import Dropped, Turn
    from .talk import Talk

_DIM = 244
_REDRAWN = 0.2  # seconds
_CUT = {
    "length": "Cut at --max-tokens; /continue goes on.",
    "context": "Cut: the context is full; /continue goes on where room can be made.",
    None: "Stopped; /continue goes on.",
}


@dataclass
class Show:
    """How answers are shown: `probabilities` as colours and a table of doubts, `thoughts` unfolded."""

    probabilities: bool = False
    thoughts: bool = False


def answer(chat: Chat, question: str, show_probabilities: bool = False) -> list[Step]:
    """Ask and stream the answer to stdout, then its figures to stderr. Returns its steps."""
    return stream(chat, chat.say(question), Show(show_probabilities))


def stream(
    chat: Chat,
    said: Generator[Step, None, None],
    show: Show,
    *,
    kept: str = "",
    on_step: Callable[[], None] = lambda: None,
) -> list[Step]:
    """Show the steps of `said` as they come, after what is `kept` of an answer, then the figures; returns the steps.

    `on_step` is called after each.
    """
    steps: list[Step] = []
    stopped = False
    page = _Page(show)
    output.status(dim("reading …"))
    try:
        for step in said:
            if not steps:
                output.status("")
                output.emit(harmless(kept) if sys.stdout.isatty() else kept, end="")
            steps.append(step)
            page.show(step)
            on_step()
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        said.close()  # keeps the partial answer in the chat
        if not steps:
            output.status("")
        page.end(bool(steps) or stopped)
        if stopped and not steps:
            output.note("Stopped before the first token; the conversation is as it was.")
        if steps:
            _tell(chat, steps, show)
    return steps


def _tell(chat: Chat, steps: list[Step], show: Show) -> None:
    if show.probabilities:
        head = chat.answers.get(chat.tree.head) if chat.tree.head is not None else None
        show_doubtful(steps, before=len(head.steps) - len(steps) if head else 0)
    turn = chat.turn
    if turn is None:
        return
    if turn.dropped is not None:
        output.note(_room_made(turn.dropped))
    output.note(dim(figures(turn, chat.used, chat.total)))
    if turn.finish in _CUT:
        output.note(dim(_CUT[turn.finish]))
    if turn.merged_system and len(chat.messages) <= 2:
        output.note(dim("The model's template knows no system prompt: the first question carries it."))


def _room_made(dropped: Dropped) -> str:
    how = "forgotten" if dropped.summary is None else "summed up by the model"
    said = "" if dropped.summary is None else f": {output.printable(dropped.summary.strip())}"
    return f"To make room the {len(dropped.nodes)} oldest messages were {how}, {dropped.tokens} tokens{said}"


def figures(turn: Turn, used: int, total: int) -> str:
    """What an answer took, in one line: measured times, counted tokens."""
    parts = [f"{turn.generated} tokens"]
    if turn.tokens_per_second:
        parts.append(f"{turn.tokens_per_second:.1f} tokens/s")
    if turn.first_ms:
        parts.append(f"first after {turn.first_ms / 1000:.2f} s")
    if turn.reused:
        parts.append(f"reused {turn.reused} of {turn.prompt} tokens")
    else:
        parts.append(f"read {turn.prompt} tokens")
    return " · ".join([*parts, f"context {context.line(used, total)}", f"seed {turn.seed}"])


@dataclass
class _Page:
    """Where an answer has come to on the screen."""

    show_as: Show
    held: float = 0.0  # the least logprob among tokens whose text has not been shown: together they make a character
    thinking: int = 0  # tokens of the reasoning that is being folded
    began: float = field(default_factory=time.perf_counter)
    drawn: float = -math.inf

    def show(self, step: Step) -> None:
        """Take the next step."""
        if step.thinking and not self.show_as.thoughts:
            self._fold()
            return
        self._unfold()
        least = min(self.held, step.logprob) if math.isfinite(step.logprob) else self.held
        shown = replace(step, logprob=least)
        show_step(shown, coloured=self.show_as.probabilities and math.isfinite(step.logprob), dimmed=step.thinking)
        self.held = 0.0 if step.text else least

    def end(self, anything: bool) -> None:
        """After the last step, or an interruption."""
        self._unfold()
        if anything:
            output.emit()

    def _fold(self) -> None:
        self.began = self.began if self.thinking else time.perf_counter()
        self.thinking += 1
        now = time.perf_counter()
        if now - self.drawn > _REDRAWN and sys.stdout.isatty():
            self.drawn = now
            output.status(dim(f"▸ thinking … {self.thinking} tokens"))

    def _unfold(self) -> None:
        if not self.thinking:
            return
        if self.drawn > -math.inf:
            output.status("")
        took = output.duration(time.perf_counter() - self.began)
        output.note(dim(f"▸ thought for {self.thinking} tokens, {took} (/thoughts shows them)"))
        self.thinking, self.drawn = 0, -math.inf


def show_step(step: Step, *, coloured: bool, dimmed: bool = False) -> None:
    """Write a step's text to stdout; `coloured` by its probability where the terminal can."""
    if not step.text:
        return
    text = harmless(step.text) if sys.stdout.isatty() else step.text
    if coloured:
        text = output.paint(text, colour=output.probability_colour(math.exp(step.logprob)))
    elif dimmed:
        text = output.paint(text, colour=_DIM)
    output.emit(text, end="")


def harmless(text: str) -> str:
    """`text` of a model, which must not drive the terminal: newlines and tabs stay, other controls are escaped."""
    return "".join(char if char in "\n\t" else output.printable(char) for char in text if char != "\r")


def show_doubtful(steps: Iterable[Step], count: int = 3, *, before: int = 0) -> None:
    """Below an answer: the legend of the colours, and for the most uncertain tokens what it might have said instead.

    Tokens are numbered as in /tokens; `before`: so many of the answer were there already.
    """
    from ...inspection.tokens import visible

    if legend := output.probability_legend():
        output.emit(legend)
    numbered = [(number, step) for number, step in enumerate(steps, before + 1) if step.alternatives]
    rows = []
    for number, step in sorted(numbered, key=lambda each: -each[1].entropy)[:count]:
        others = [other for other in step.alternatives if other.id != step.id][:3]
        best = [f"{visible(other.piece)} {math.exp(other.logprob):.1%}" for other in others]
        raw = f"{math.exp(step.logprob):.1%}"
        rows.append((number, visible(step.piece), raw, f"{step.entropy:.1f} bits", "  ".join(best)))
    if rows:
        output.table(("token", "most uncertain", "raw", "entropy", "it might have said (raw)"), rows, "rlrr")


def dim(text: str) -> str:
    """`text` for stderr, set back."""
    return output.paint(text, colour=_DIM, stream=sys.stderr)


# ── commands ──


def probabilities(talk: Talk, word: str) -> None:
    """Colours and the table of doubtful tokens, on or off."""
    talk.show.probabilities = _switched(talk.show.probabilities, word)
    if talk.show.probabilities and not talk.chat.n_alternatives:
        talk.chat.n_alternatives = 5
    output.note(f"Probabilities {'on' if talk.show.probabilities else 'off'}.")


def thoughts(talk: Talk, word: str) -> None:
    """Show reasoning, or fold it; the last one is shown now."""
    talk.show.thoughts = _switched(talk.show.thoughts, word)
    output.note(f"Reasoning is {'shown' if talk.show.thoughts else 'folded'}.")
    if talk.show.thoughts and (said := _last_thoughts(talk)):
        output.emit(said)


def _last_thoughts(talk: Talk) -> str:
    for node in reversed(talk.chat.tree.path()):
        if answer := talk.chat.answers.get(node.id):
            return harmless("".join(step.text for step in answer.steps if step.thinking)).strip()
    return ""


def _switched(now: bool, word: str) -> bool:
    if word not in ("", "on", "off"):
        raise Unsupported(f"{output.one_line(word, 20)!r}: expected on or off")
    return {"on": True, "off": False}.get(word, not now)
