"""How full the context is, right to the token: a meter in a few words, and the command /context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import output

if TYPE_CHECKING:
    from ...chat import Chat
    from .talk import Talk

_WORDS = 44  # characters of a message in the table
_LIVE = 16_384  # characters of a conversation up to which what is being typed is counted with each key


def bar(used: int, total: int, width: int = 6) -> str:
    """A bar of `width` characters, drawn to an eighth of one; anything used shows."""
    eighths = min(8 * width, max(-(-8 * width * used // total) if used else 0, 0)) if total > 0 else 0
    return output.blocks(eighths).ljust(width, "·")


def line(used: int, total: int) -> str:
    """The meter in a few words: "▏····· 57 of 4096"."""
    return f"{bar(used, total)} {used} of {total}"


def live(chat: Chat, typed: str) -> str:
    """The meter while `typed` is on its way: what the context would hold with it, up to where the answer begins."""
    from ...chat import Message
    from ...errors import LlmkitError

    used, more = chat.used, ""
    question = typed.strip()
    if question and not question.startswith("/"):
        if len(question) + sum(len(message.text) for message in chat.messages) < _LIVE:
            try:
                used = chat.cost([*chat.in_context, Message("user", question)])
            except LlmkitError:  # said when the question is asked
                pass
        else:
            more = " + this long question"
    free = chat.total - used
    state = f"{free:,} free" if free >= 0 else f"{-free:,} too many"
    help = "" if question else " · /help"
    return f" context {line(used, chat.total)}{more} · {state}{help} · {output.one_line(chat.backend.info.name, 30)}"


def show(talk: Talk, _: str) -> None:
    """How full the context is, right to the token: who takes how much, what the template adds, what is free."""
    from ...inspection import xray

    chat = talk.chat
    if chat.system or chat.messages:
        seen = xray.of_chat(chat)
        rows: list[tuple[object, ...]] = [
            (cost.role, cost.content, cost.template, output.one_line(cost.text, _WORDS)) for cost in seen.costs
        ]
        if seen.opening:
            rows.append(("(answer)", "", seen.opening, "what the template opens an answer with"))
        output.table(("", "tokens", "template", ""), rows, "lrr")
        if seen.reused:
            output.emit(
                f"{seen.reused} of these {len(seen.tokens)} tokens are in the context: they are not read again."
            )
    output.emit(f"context {bar(chat.used, chat.total, 40)}")
    share = chat.used / chat.total
    output.emit(f"{chat.used} of {chat.total} tokens ({share:.0%}), {len(chat.messages)} messages,"
                f" {chat.total - chat.used} free")  # fmt: skip
    path = chat.tree.path()
    if gone := len(path) - len(chat.conversation.in_context(path)[0]):
        output.emit(f"{gone} of the messages have left the context to make room; the model does not see them any more.")
    if chat.turn:
        output.emit(f"The last prompt had {chat.turn.prompt} tokens, of which {chat.turn.reused} were reused.")
    output.emit(f"When it is full: {talk.when_full}.")
