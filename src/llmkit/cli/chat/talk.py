"""A conversation in the terminal, and its loop: questions are answered, lines that begin with / are commands."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ...errors import LlmkitError, Unsupported
from .. import output
from . import answers, line
from .keeper import Keeper

if TYPE_CHECKING:
    from ...chat import Chat, Step
    from ...chat.overflow import ContextFull, Overflow
    from .opening import Loader

WhenFull = Literal["ask", "stop", "slide", "summarise"]
OVERFLOWS: dict[Overflow, str] = {
    "stop": "end here: the question is not asked",
    "slide": "forget the oldest turns, the system prompt stays",
    "summarise": "let the model sum up the oldest turns, and forget them",
}


@dataclass
class Talk:
    """A chat, how it is shown, what reads the lines, where it is kept.

    `loader` makes a chat with another model; `typed`: a user is there to be asked.
    """

    chat: Chat
    keeper: Keeper = field(default_factory=Keeper)
    show: answers.Show = field(default_factory=answers.Show)
    when_full: WhenFull = "stop"
    typed: bool = False
    source: line.Plain | line.Editor = field(default_factory=lambda: line.Plain(typed=False))
    loader: Loader | None = None
    over: bool = False

    def change_model(self, name: str) -> None:
        """Go on with another model; the conversation stays. Raises LlmkitError, and the model stays."""
        if self.loader is None:
            raise Unsupported("no other model can be loaded here")
        self.chat = self.loader.chat(name, self.chat.conversation, like=self.chat)
        self.keeper.keep(self.chat)

    def begin_persona(self, name: str) -> None:
        """Begin anew with a persona; the conversation there was is kept. Raises LlmkitError for an unknown one."""
        from ...chat import persona
        from ...chat.record import Conversation

        text = persona.load(name).text
        self.keeper.keep(self.chat)
        before = self.chat.conversation
        self.chat.resume(Conversation(model=before.model, sampling=before.sampling, persona=text))

    def close(self) -> None:
        """Free the model; what was said is kept. Ctrl-C waits: what is half freed would be freed again."""
        from ...engine.interrupts import held_interrupts

        with held_interrupts():
            if self.loader is not None:
                self.loader.close()
            self.keeper.close()

    def hold(self, lines: Any) -> None:
        """Go through `lines`. On a terminal errors are shown and the conversation goes on; else they are raised."""
        for each in lines:
            try:
                self.take(each)
            except LlmkitError as error:
                if not self.typed:
                    raise
                output.error(error.message, error.hint)
            except KeyboardInterrupt:
                if not self.typed:
                    raise
            if self.over:
                return

    def take(self, text: str) -> None:
        """One line, or several that are one question. What begins with / and is no command is one too, but typed."""
        from . import commands

        text = text.strip()
        if commands.is_command(text, self.typed):
            commands.obey(self, text)
        elif text:
            self.answer(lambda: self.chat.say(text))

    def answer(self, begin: Callable[[], Generator[Step, None, None]], kept: str = "") -> None:
        """Stream what `begin` generates after what is `kept` of an answer, and keep the conversation.

        Asks what to do where the context is full and the user is there.
        """
        from ...chat.overflow import ContextFull

        try:
            self._stream(begin, kept)
        except ContextFull as full:
            if self.when_full != "ask":
                raise
            self._make_room(full)
            self._stream(begin, kept)

    def _stream(self, begin: Callable[[], Generator[Step, None, None]], kept: str) -> None:
        try:
            answers.stream(self.chat, begin(), self.show, kept=kept, on_step=self._keep_sometimes)
        finally:
            self.keeper.keep(self.chat)

    def _keep_sometimes(self) -> None:
        """With the first token, so that the question is not lost should the engine die, and again every few seconds."""
        turn = self.chat.turn
        if turn is not None and (turn.generated == 1 or self.keeper.due):
            self.chat.write_down()
            self.keeper.keep(self.chat)

    def _make_room(self, full: ContextFull) -> None:
        """Let the user choose, for now and from now on. Raises `full` when the answer is to stop."""
        if not full.choices:
            raise full
        output.note(f"{full.message[0].upper()}{full.message[1:]}:")
        for name, what in OVERFLOWS.items():
            output.note(f"  {name:<10} {what}")
        try:
            said = self.source.ask("stop, slide or summarise? [stop]", "stop").strip().lower()
        except EOFError:
            said = "stop"
        wanted: Overflow = next((name for name in OVERFLOWS if len(said) > 1 and name.startswith(said)), "stop")
        if wanted == "stop":
            raise full
        self.when_full = self.chat.overflow = wanted
