"""Lines of input: typed at a terminal, with history and completion, or read from a pipe.

prompt_toolkit edits the line on a real terminal; a dumb one, or an output that goes into a file, gets Python's own
`input`. Ctrl-C drops a line, the second one in a row ends the input, as Ctrl-D does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import settings
from .. import output

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

    from .completion import Candidate

END_OF_SEVERAL = "."  # a line of its own, where several lines are typed without an editor
_STYLE = {"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"}


def aside() -> AbstractContextManager[Any]:
    """Inside, what is no answer is printed: to stderr where stdout is no terminal, so that a file gets answers only."""
    return nullcontext() if sys.stdout.isatty() else redirect_stdout(sys.stderr)


def unquoted(text: str) -> str:
    """What stands between quotation marks, else the text: names of files, and tokens that begin with a blank."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


class Plain:
    """Lines from the input as it is: a pipe, or a terminal that can do nothing but show characters.

    `several`: lines are gathered until one that is only a dot.
    """

    def __init__(self, typed: bool) -> None:
        self.typed = typed
        self.several = False

    def read(self, default: str = "") -> str:
        """The next question or command. Raises EOFError at the end, KeyboardInterrupt for Ctrl-C."""
        line = self._line("> ")
        if not self.several or line.startswith("/"):
            return line
        lines = []
        while line != END_OF_SEVERAL:
            lines.append(line)
            line = self._line("… ")
        return "\n".join(lines)

    def ask(self, question: str, default: str = "") -> str:
        """An answer to `question`; `default` for an empty one."""
        return self._line(f"{question} ") or default

    def _line(self, prompt: str) -> str:
        if self.typed:
            with aside():
                return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class Editor:
    """prompt_toolkit: history kept in `history`, completion by `complete`, `meter` below the line while it is typed.

    `several`: Enter begins a new line and Alt-Enter sends; else the other way round.
    """

    def __init__(
        self,
        complete: Callable[[str], Iterable[Candidate]],
        meter: Callable[[str], str],
        history: Path | None,
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.styles import Style

        self.several = False
        self._complete, self._meter = complete, meter
        self._session: PromptSession[str] = PromptSession(
            history=_history(history), completer=self._completer(), key_bindings=self._keys(),
            complete_while_typing=False, enable_open_in_editor=True, style=Style.from_dict(_STYLE),
            prompt_continuation="… ", multiline=self._many(), bottom_toolbar=self._toolbar,
        )  # fmt: skip

    def read(self, default: str = "") -> str:
        """The next question or command, `default` typed already. Raises EOFError, KeyboardInterrupt."""
        return self._session.prompt("> ", default=default)

    def ask(self, question: str, default: str = "") -> str:
        """An answer to `question`, which is not kept in the history."""
        from prompt_toolkit import prompt

        return prompt(f"{question} ") or default

    def _toolbar(self) -> str:
        return self._meter(self._session.default_buffer.text)

    def _many(self) -> Any:
        from prompt_toolkit.filters import Condition

        return Condition(lambda: self.several and not self._session.default_buffer.text.startswith("/"))

    def _completer(self) -> Any:
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion
        from prompt_toolkit.document import Document

        complete = self._complete

        class Words(Completer):
            """Candidates for what stands before the cursor."""

            def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
                """As prompt_toolkit asks for them."""
                for each in complete(document.text_before_cursor):
                    yield Completion(each.text, start_position=-each.replaces, display_meta=each.what)

        return Words()

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            if self.several:
                event.current_buffer.validate_and_handle()
            else:
                event.current_buffer.newline(copy_margin=False)

        return keys


def _history(path: Path | None) -> History:
    """The file's, where it can be written to; else one that ends with the program."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass
            path.chmod(0o600)  # what was asked is nobody else's
            return FileHistory(str(path))
        except OSError as error:
            output.note(f"The history of lines is not kept: {error}")
    return InMemoryHistory()


def reader(
    complete: Callable[[str], Iterable[Candidate]], meter: Callable[[str], str], *, keep: bool = True
) -> Plain | Editor:
    """What reads lines here: the editor on a real terminal, else the plain one. `keep`: its history stays in a file."""
    if not sys.stdin.isatty():
        return Plain(typed=False)
    if sys.stdout.isatty():
        from prompt_toolkit.utils import is_dumb_terminal

        if not is_dumb_terminal():
            return Editor(complete, meter, settings.data() / "history" if keep else None)
    try:
        import readline  # noqa: F401  # gives input() its editing
    except ImportError:
        pass
    return Plain(typed=True)


def lines(source: Plain | Editor) -> Iterator[str]:
    """Line after line until the end. Ctrl-C drops one, the second in a row ends the input."""
    interrupted = False
    while True:
        try:
            line = source.read()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            if isinstance(source, Plain):
                with aside():
                    output.emit()
            if interrupted:
                return
            interrupted = True
            output.note("Ctrl-C once more, or /exit, leaves.")
        except EOFError:
            if isinstance(source, Plain) and source.typed:
                with aside():
                    output.emit()
            return
        else:
            interrupted = False
            yield line
