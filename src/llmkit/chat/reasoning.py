"""What a reasoning model thinks before it answers, told apart from the answer while the tokens come.

A block begins where the answer begins (or another block ended), or was begun by the template at the end of the prompt;
the same marks further on are just text. Marks as the models' templates write them: Qwen3, DeepSeek-R1, SmolLM3, GLM
(<think>), Magistral ([THINK]), Kimi-VL (◁think▷), MiniMax, Apriel, Seed-OSS, Command A, Gemma 4, Solar, gpt-oss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .streams import TextStream, held_back


@dataclass(frozen=True)
class Form:
    """The marks around a block; any of `closes` ends it."""

    opens: str
    closes: tuple[str, ...]


_FINAL = "<|start|>assistant<|channel|>final<|message|>"
_CONTENT = "<|begin|>assistant<|content|>"
FORMS = (
    Form("<think>", ("</think>",)),
    Form("[THINK]", ("[/THINK]",)),
    Form("◁think▷", ("◁/think▷",)),
    Form("<thinking>", ("</thinking>",)),
    Form("<mm:think>", ("</mm:think>",)),
    Form("<seed:think>", ("</seed:think>",)),
    Form("<|START_THINKING|>", ("<|END_THINKING|>",)),
    Form("<|channel>thought\n", ("<channel|>",)),
    Form("<|think|>", (f"<|end|>{_CONTENT}", _CONTENT)),
    Form("<|channel|>analysis<|message|>", (f"<|end|>{_FINAL}", _FINAL)),
    Form("<|channel|>commentary<|message|>", (f"<|end|>{_FINAL}", _FINAL)),
)
# marks that begin the answer itself
ANSWERS = ("<|channel|>final<|message|>", "<|content|>", "<|START_RESPONSE|>")
_STARTS = (*(form.opens for form in FORMS), *ANSWERS)


def opened(prompt: str) -> Form | None:
    """The form of the block that a rendered prompt leaves open for the model to write, if any."""
    end = prompt.rstrip()
    return next((form for form in FORMS if end.endswith(form.opens)), None)


def prefilled(prompt: str, thinking: str, text: str) -> str:
    """A prompt with the beginning of its answer, as the model would have written it: to go on from there."""
    form = opened(prompt)
    if form is not None:
        return f"{prompt}{thinking}\n{form.closes[-1]}\n\n{text}" if text else prompt + thinking
    if thinking:
        begun = f"{prompt}{FORMS[0].opens}\n{thinking}"
        return f"{begun}\n{FORMS[0].closes[0]}\n\n{text}" if text else begun
    return prompt + text


class Reading:
    """Takes the bytes of one token after another; gives the text to show, and whether it is thinking.

    `text` and `thinking` are all that came so far, `stopped` is true once a stop string has come. A token's text is
    all of one kind: what a token has of both comes with the next. `form`: the block the prompt has opened.
    """

    def __init__(self, stop: Sequence[str] = (), form: Form | None = None) -> None:
        self._stream = TextStream(stop)
        self._form = form
        self._begins = form is None  # a block may begin here
        self._after = False  # a block has ended right here: the line breaks behind it are no text
        self._buffer = ""
        self._ready: list[tuple[str, bool]] = []
        self._answer: list[str] = []
        self._thinking: list[str] = []
        self._skip = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stream.stopped

    @property
    def text(self) -> str:
        """The answer so far, without the thinking."""
        return "".join(self._answer)

    @property
    def thinking(self) -> str:
        """The thinking so far, without the marks around it."""
        return "".join(self._thinking).strip()

    def skip(self, text: str) -> None:
        """Do not give `text` if it comes next: it has been shown already."""
        self._skip = text

    def feed(self, piece: bytes) -> tuple[str, bool]:
        """The text that `piece` sets free, and whether it is thinking."""
        thought = self._form is not None
        self._take(self._stream.feed(piece))
        return self._give(thought or self._form is not None)

    def finish(self) -> tuple[str, bool]:
        """What was held back, at the end of an answer; of both kinds together if need be."""
        thought = self._form is not None
        self._take(self._stream.finish())
        if self._buffer:
            self._keep(self._buffer.lstrip("\n") if self._after else self._buffer, thought)
            self._buffer = ""
        text = "".join(text for text, _ in self._ready)
        thought = self._ready[-1][1] if self._ready else thought
        self._ready.clear()
        return self._shown(text), thought

    def _give(self, thought: bool) -> tuple[str, bool]:
        if not self._ready:
            return "", thought
        kind, text = self._ready[0][1], ""
        while self._ready and self._ready[0][1] == kind:
            text += self._ready.pop(0)[0]
        return self._shown(text), kind

    def _shown(self, text: str) -> str:
        if not self._skip or not text:
            return text
        if self._skip.startswith(text):
            self._skip = self._skip[len(text) :]
            return ""
        known, self._skip = self._skip, ""
        return text.removeprefix(known)

    def _keep(self, text: str, thought: bool) -> None:
        if text:
            (self._thinking if thought else self._answer).append(text)
            self._ready.append((text, thought))

    def _take(self, text: str) -> None:
        if not (self._begins or self._form or self._buffer):
            self._keep(text, False)  # by far the most
            return
        self._buffer += text
        while self._buffer and self._advance():
            pass

    def _advance(self) -> bool:
        """Take from the buffer what is decided; False when nothing more can be."""
        if self._form is not None:
            return self._think(self._form)
        if not self._begins:
            self._keep(self._buffer, False)
            self._buffer = ""
            return False
        begun = self._buffer.lstrip()
        start = next((start for start in _STARTS if begun.startswith(start)), None)
        if start is not None:
            self._buffer = begun[len(start) :]
            self._form = next((form for form in FORMS if form.opens == start), None)
        elif any(start.startswith(begun) for start in _STARTS):
            return False
        elif self._after:
            self._buffer = self._buffer.lstrip("\n")
        self._begins = False
        return True

    def _think(self, form: Form) -> bool:
        ends = [(at, word) for word in form.closes if (at := self._buffer.find(word)) >= 0]
        if ends:
            at, word = min(ends, key=lambda end: (end[0], -len(end[1])))
            self._keep(self._buffer[:at], True)
            self._buffer = self._buffer[at + len(word) :]
            self._form, self._begins, self._after = None, True, True
            return True
        count = len(self._buffer) - held_back(self._buffer, form.closes)
        self._keep(self._buffer[:count], True)
        self._buffer = self._buffer[count:]
        return False
