"""Keeps the conversation in the user's store after each answer, and tells how to go on should the process die."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LlmkitError
from .. import output

if TYPE_CHECKING:
    from ...chat import Chat
    from ...chat.record import Conversation
    from ...chat.store import Saved, Store

EVERY = 5.0  # seconds: how often an answer on its way is kept
# Waits for words to say, one line each; says the last of them when the pipe ends without an empty line before.
_WATCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
words = ""
for line in sys.stdin:
    words = line.strip()
if words:
    sys.stderr.write("\\n" + words.replace("\\x1f", "\\n") + "\\n")
"""


class Keeper:
    """Where a conversation is kept; without a `store` it is not. Trouble with the store is told once."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store
        self._kept = time.monotonic()
        self._failed = False
        self._watch: subprocess.Popen[str] | None = None

    @property
    def due(self) -> bool:
        """Whether the last time is a while ago."""
        return time.monotonic() - self._kept > EVERY

    def keep(self, chat: Chat) -> None:
        """Keep the conversation as it is."""
        conversation = chat.conversation
        if self.store is None or not conversation.tree.nodes:
            return
        self._kept = time.monotonic()
        try:
            saved = _saved(self.store, conversation)
        except LlmkitError as error:
            if not self._failed:
                output.error(f"the conversation could not be kept: {error.message}", error.hint)
            self._failed = True
            return
        self._failed = False
        if saved.forked:
            output.note(f"Another process went on with this conversation: yours is kept as {called(conversation)}.")
        self.tell_watch(conversation)

    def start(self) -> None:
        """Keep from now on, in the user's store. Where that cannot be read, it is told, and nothing is kept."""
        store = self.open()
        try:
            store.list()
            self.store = store
        except LlmkitError as error:
            output.error(f"the conversation will not be kept: {error.message}", error.hint)

    def save(self, chat: Chat, name: str | None) -> str:
        """Keep it under `name`; returns what to load it by. Raises LlmkitError where that fails."""
        store = self.open()
        before = chat.conversation.name
        chat.conversation.name = name or before
        try:
            _saved(store, chat.conversation)
        except LlmkitError:
            chat.conversation.name = before
            raise
        self.store = store  # who saves wants what follows kept too
        self.tell_watch(chat.conversation)
        return called(chat.conversation)

    def load(self, name: str) -> Conversation:
        """A kept conversation, or one of a JSON export. Raises LlmkitError."""
        if name.endswith(".json") and Path(name).expanduser().is_file():
            return exported(Path(name).expanduser())
        return self.open().load(name)

    def open(self) -> Store:
        """The store; the user's own even where nothing is kept by itself. Raises LlmkitError."""
        from ...chat.store import Store

        return self.store or Store()

    def watch(self, conversation: Conversation) -> None:
        """Start a child that says how to go on, should this process die without a word: an engine can abort it."""
        if self.store is None:
            return
        try:
            self._watch = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WATCH],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
            )  # fmt: skip
        except OSError:
            self._watch = None
        self.tell_watch(conversation)

    def close(self) -> None:
        """All went well: nothing is to be said."""
        if self._watch is not None:
            self._say("")
            self._watch.communicate()
            self._watch = None

    def tell_watch(self, conversation: Conversation) -> None:
        """What it is to say from now on; nothing about a conversation that is not kept."""
        if conversation.id is None:
            return self._say("")
        self._say(
            "llmkit: error: the process died; the engine may have aborted it\x1f"
            f"hint: The conversation is kept up to its last answer: {self.again(conversation)}"
        )

    def again(self, conversation: Conversation) -> str:
        """The command that goes on with a conversation."""
        model = output.shell_word(conversation.model or "MODEL")
        return output.one_line(f"llmkit chat {model} --load {called(conversation)}")

    def _say(self, words: str) -> None:
        if self._watch is not None and self._watch.stdin is not None:
            try:
                self._watch.stdin.write(words.replace("\n", " ") + "\n")
                self._watch.stdin.flush()
            except OSError:  # somebody ended it: then nothing is said
                self._watch = None


def _saved(store: Store, conversation: Conversation) -> Saved:
    """Ctrl-C waits: between the store's writing and our noting it, it would look like another process's doing."""
    from ...engine.interrupts import held_interrupts

    with held_interrupts():
        return store.save(conversation)


def called(conversation: Conversation) -> str:
    """What to load a conversation by, as a word of a shell."""
    name = conversation.name
    return output.shell_word(name if name and name.isprintable() else conversation.id)


def exported(path: Path) -> Conversation:
    """The conversation in a JSON export. Raises LlmkitError for a file that is none."""
    from ...chat.record import Conversation

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = Conversation.from_json(data)
    except (OSError, ValueError, RecursionError) as error:
        raise LlmkitError(f"{path}: no conversation can be read from it: {error}") from error
    except LlmkitError as error:
        raise LlmkitError(f"{path}: {error.message}", error.hint) from error
    found.id = found.name = None  # it is kept as a new one
    return found
