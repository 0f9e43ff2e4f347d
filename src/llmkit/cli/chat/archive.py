"""Commands that keep, find and export conversations."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LlmkitError, OutputExists, Unsupported, nearest_hint
from .. import output
from . import completion, export, line

if TYPE_CHECKING:
    from ...chat.store import Store
    from .completion import Names
    from .talk import Talk

_EXCERPT = 60


def save(talk: Talk, name: str) -> None:
    """Keep the conversation under a name (it is kept under a number anyway)."""
    if not talk.chat.tree.nodes:
        raise LlmkitError("there is nothing to keep yet", "Ask a question first.")
    word = talk.keeper.save(talk.chat, name or None)
    output.note(f"Kept as {word}: /load {word} brings it back, here or with --load {word}.")


def load(talk: Talk, name: str) -> None:
    """Go on with a conversation that was kept."""
    if not name:
        raise Unsupported("/load: the name or number is missing", "/chats lists what is kept.")
    found = talk.keeper.load(line.unquoted(name))
    talk.keeper.keep(talk.chat)
    loaded = talk.chat.conversation.model
    if found.model and Path(found.model).name != Path(loaded).name:
        output.note(f"It was held with {output.one_line(found.model)}; {output.one_line(loaded)} goes on with it.")
    found.model = loaded
    talk.chat.resume(found)
    talk.keeper.tell_watch(found)
    tell_where(talk)


def tell_where(talk: Talk, count: int = 2) -> None:
    """Where a conversation stands: its last messages."""
    messages = talk.chat.messages
    output.note(f"{output.one_line(talk.chat.conversation.title)}: {len(messages)} messages so far.")
    for message in messages[-count:]:
        output.note(f"{'> ' if message.role == 'user' else ''}{output.printable(message.text)}")


def chats(talk: Talk, words: str) -> None:
    """List kept conversations, or those that say all the words."""
    show_kept(talk.keeper.open(), words)


def show_kept(store: Store, words: str) -> None:
    """A table of what is kept, the newest first."""
    if words:
        found = [(each.id, _ago(each.changed), each.title, output.one_line(each.excerpt, _EXCERPT))
                 for each in store.search(words)]  # fmt: skip
        headers: tuple[str, ...] = ("", "changed", "conversation", "said there")
    else:
        found = [(each.id, _ago(each.changed), each.name or each.title, f"{each.messages} messages")
                 for each in store.list()]  # fmt: skip
        headers = ("", "changed", "conversation", "")
    if not found:
        output.emit("Nothing kept says that." if words else "No conversation is kept yet.")
        return
    output.table(headers, [(row[0], row[1], output.one_line(row[2], _EXCERPT), row[3]) for row in found], "r")


def _ago(when: float) -> str:
    """A time for people: how long ago, or the day."""
    past = time.time() - when
    if past < 60:
        return "now"
    if past < 86400:
        return f"{output.duration(past)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(when))


def names(talk: Talk, before: list[str], _: str) -> Names:
    """For Tab: what is kept."""
    try:
        return [] if before else [(each.name or str(each.id), each.title) for each in talk.keeper.open().list()]
    except LlmkitError:
        return []


# ── files ──


def write(talk: Talk, text: str) -> None:
    """Write the conversation into a file."""
    form, _, given = text.partition(" ")
    if form not in export.FORMS:
        asked = f" {output.one_line(form, 20)!r}" if form else ""
        raise Unsupported(
            f"/export{asked}: expected one of {', '.join(export.FORMS)}", nearest_hint(form, export.FORMS)
        )
    if not talk.chat.tree.nodes:
        raise LlmkitError("there is nothing to export yet", "Ask a question first.")
    _write(_path(given, "chat", form), export.FORMS[form](talk.chat))


def export_words(_: Talk, before: list[str], last: str) -> Names:
    """For Tab."""
    return completion.files(last, f".{before[0]}") if before else list(export.FORMS)


def receipt(talk: Talk, text: str) -> None:
    """Write an answer, the last or that of a message, as a page or JSON with everything needed to have it again."""
    from ...inspection import receipt
    from . import tokens

    number, _, file = text.partition(" ") if text.split(" ")[0].isdecimal() else ("", "", text)
    made = receipt.of(talk.chat, int(number) if number else tokens.last_answer(talk.chat).node)
    path = _path(file, "receipt", "html")
    _write(path, made.json() if path.suffix == ".json" else made.html())
    output.next_command(f"llmkit replay {output.shell_word(path)}")


def _path(given: str, stem: str, form: str) -> Path:
    return Path(line.unquoted(given.strip()) or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}.{form}").expanduser()


def _write(path: Path, text: str) -> None:
    """Into a file that is whole or not there; nothing is replaced."""
    from ..inspect import views

    if path.exists():
        raise OutputExists(f"{path}: is there already", "Name another file, or remove this one.")
    views.write(path, text)
