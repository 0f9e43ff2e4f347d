"""Commands that go back, on and sideways in the conversation, which is a tree: nothing said is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...errors import LlmkitError, ModelNotFound, Unsupported
from .. import output
from . import line, tokens

if TYPE_CHECKING:
    from ...chat import Chat, Step
    from ...chat.answer import Answer
    from ...chat.tree import Node, Tree
    from ...inspection.branches import Branches
    from .completion import Names
    from .talk import Talk

_WIDTH = 60
_LENGTH = 16  # tokens that an alternative goes on for
_MOST = 16  # alternatives at once


# ── the last turn ──


def retry(talk: Talk, _: str) -> None:
    """Answer the last question anew."""
    _last(talk.chat, "user")
    talk.answer(talk.chat.retry)


def edit(talk: Talk, text: str) -> None:
    """Ask the last question in other words; the text is offered for editing where there is an editor."""
    asked = _last(talk.chat, "user")
    if not text:
        if not talk.typed:
            raise Unsupported("/edit: the new text is missing", "For example: /edit Where is Rome?")
        text = _offer(talk.source, asked.text)
    if not text or text == asked.text:
        output.note("The question stays as it is.")
        return
    talk.answer(lambda: talk.chat.edit(text))


def _offer(source: line.Plain | line.Editor, text: str) -> str:
    if not isinstance(source, line.Editor):
        output.note(f"The question was: {output.printable(text)}")
    try:
        return source.read(text if isinstance(source, line.Editor) else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def go_on(talk: Talk, _: str) -> None:
    """Let the model go on with its last answer."""
    _last(talk.chat, "assistant")
    talk.answer(talk.chat.go_on)


def undo(talk: Talk, _: str) -> None:
    """Take the last question and its answer back."""
    _last(talk.chat, "user")
    asked = talk.chat.undo()
    talk.keeper.keep(talk.chat)
    output.note(f"Taken back: {output.one_line(asked, _WIDTH)}  (/tree still has it)")


def clear(talk: Talk, _: str) -> None:
    """Begin anew; what was said is kept under its name."""
    talk.keeper.keep(talk.chat)
    talk.chat.clear()
    output.note("The conversation begins anew.")


def instead(talk: Talk, text: str) -> None:
    """Go on from another token: the answer up to token N, then TOKEN, then as the model goes on."""
    number, _, wanted = text.partition(" ")
    answer = tokens.last_answer(talk.chat)
    position = tokens.position(answer, number)
    _go_on_from(talk, answer, position, tokens.meant(talk.chat, answer.steps[position], wanted.strip(" ")))


def _go_on_from(talk: Talk, answer: Answer, position: int, token: int) -> None:
    kept = "".join(step.text for step in answer.steps[:position] if not step.thinking)
    talk.answer(lambda: talk.chat.instead(answer.node, position, token), kept)


def alternatives(talk: Talk, text: str) -> None:
    """Show where the K likeliest tokens in place of token N lead, all at once; the user may go on from one."""
    from ...chat.start import is_of
    from ...inspection.branches import Shape, grow

    number, _, count = text.partition(" ")
    answer = tokens.last_answer(talk.chat)
    position = tokens.position(answer, number)
    if not is_of(talk.chat.backend, answer):
        raise LlmkitError(f"the answer was given by {answer.model}, another model", "/retry answers with this one.")
    grown = grow(talk.chat.backend, [*answer.prompt, *answer.tokens[:position]], Shape(_width(count), _LENGTH))
    with line.aside():
        show_alternatives(grown, answer.steps[position])
    chosen = _chosen(talk, grown)
    if chosen is not None and chosen != answer.steps[position].id:
        _go_on_from(talk, answer, position, chosen)


def _width(count: str) -> int:
    count = count.strip() or "4"
    if not count.isascii() or not count.isdigit() or not 1 <= int(count) <= _MOST:
        raise Unsupported(f"{output.one_line(count, 20)!r}: expected how many alternatives, 1 to {_MOST}")
    return int(count)


def show_alternatives(grown: Branches, said: Step) -> None:
    """Each with the raw probability of its first token and of all it says; ▸ marks the token that was said."""
    output.emit(f"…{grown.context}")
    rows = []
    for number, (fork, leaf) in enumerate(zip(grown.forks, grown.leaves, strict=True), 1):
        first, end = fork.steps[0], {"end": " ■", "length": " …"}[leaf.ending]
        mark = "▸" if first.id == said.id else " "
        rows.append((f"{mark}{number}", first.piece, tokens.percent(first.logprob), f"{leaf.probability:.1g}",
                     leaf.text + end))  # fmt: skip
    output.table(("", "token", "raw", "of all", "and on with the likeliest"), rows, "rlrr")
    output.emit("raw: the model's own probability of the token; of all: of the whole text, multiplied. ▸ was said.")
    again = next((fork.steps[0].logprob for fork in grown.forks if fork.steps[0].id == said.id), said.logprob)
    if abs(math.exp(again) - math.exp(said.logprob)) > 0.0005:
        output.emit(
            f"When it was said raw was {tokens.percent(said.logprob)}: in other steps, it is rounded otherwise."
        )
    output.emit(f"{grown.evaluated} tokens evaluated in one context; one after another: {grown.separately}.")


def _chosen(talk: Talk, grown: Branches) -> int | None:
    """The first token of the alternative the user takes; None for none, or where nobody is there to be asked."""
    ids = [leaf.ids[0] for leaf in grown.leaves]
    if not talk.typed:
        return None
    try:
        said = talk.source.ask(f"Go on from 1 to {len(ids)}, drawn by the samplers? [no]").strip()
    except EOFError:
        said = ""
    return ids[int(said) - 1] if said.isascii() and said.isdigit() and 1 <= int(said) <= len(ids) else None


def _last(chat: Chat, role: str) -> Node:
    found = [node for node in chat.tree.path() if node.role == role]
    if not found:
        raise LlmkitError("nothing has been said yet", "Ask a question first.")
    return found[-1]


# ── branches ──


def branch(talk: Talk, text: str) -> None:
    """List the branches at the last answer, go to one, or begin one after a message."""
    words = text.split()
    tree = talk.chat.tree
    if words[:1] == ["new"] and len(words) == 2:
        talk.chat.switch(_node(tree, words[1]).id)
        output.note("A new branch begins here: ask.")
    elif len(words) == 1 and words != ["new"]:
        talk.chat.switch(tree.end(_node(tree, words[0]).id).id)
    elif words:
        raise Unsupported(f"/branch {output.one_line(text, 40)}: expected a message's number", "/tree shows them.")
    if words:
        talk.keeper.keep(talk.chat)
    show_branches(talk.chat)


def show_branches(chat: Chat) -> None:
    """Where the conversation has branched, on the way to where it is now."""
    tree = chat.tree
    path = tree.path()
    forks = [tree.siblings(node.id) for node in path if len(tree.siblings(node.id)) > 1]
    here = {node.id for node in path}
    if not forks:
        output.emit("No branches here: /retry, /edit, /instead and /branch new N make some.")
    for fork in forks:
        parted = partings(chat, fork)
        for node in fork:
            output.emit(f"{'▸' if node.id in here else ' '}{node.id:>3}  {_said(node)}{parted.get(node.id, '')}")
        output.emit()
    if path:
        output.emit(f"You are at message {path[-1].id}. /branch N goes to another.")


def draw(talk: Talk, _: str) -> None:
    """Draw the whole conversation."""
    drawn = list(tree_lines(talk.chat))
    for text in drawn or ["(nothing has been said yet)"]:
        output.emit(text)


def tree_lines(chat: Chat) -> Iterator[str]:
    """The tree, a line for each message; only where it forks do lines move to the right. ▸ marks where it is now."""
    here = {node.id for node in chat.tree.path()}

    def placed(nodes: list[Node], indent: str) -> list[tuple[str, int, str]]:
        """(line, node, indent of what follows it), the last first."""
        parted, fork, found = partings(chat, nodes), len(nodes) > 1, []
        for node in nodes:
            last = node is nodes[-1]
            branch = ("└─ " if last else "├─ ") if fork else ""
            inner = indent + (("   " if last else "│  ") if fork else "")
            found.append((f"{indent}{branch}{_drawn(node, here)}{parted.get(node.id, '')}", node.id, inner))
        return found[::-1]

    waiting = placed(chat.tree.children(None), "")
    while waiting:
        text, node, inner = waiting.pop()
        yield text
        waiting += placed(chat.tree.children(node), inner)


def partings(chat: Chat, nodes: list[Node]) -> dict[int, str]:
    """For answers to one question: the first token in which they are not all alike, with its raw probability."""
    from ...inspection.tokens import visible

    found = {node.id: answer for node in nodes if (answer := chat.answers.get(node.id))}
    if len(found) < 2:
        return {}
    alike = 0
    for column in zip(*(answer.tokens for answer in found.values())):  # noqa: B905  # to the end of the shortest
        if len(set(column)) > 1:
            break
        alike += 1
    steps = {id: answer.steps[alike] for id, answer in found.items() if alike < len(answer.steps)}
    return {
        id: f"  (token {alike + 1}: {visible(step.piece)} {tokens.percent(step.logprob)})" for id, step in steps.items()
    }


def _drawn(node: Node, here: set[int]) -> str:
    mark = "▸" if node.id in here else " "
    return f"{mark}{node.id} {_said(node)}"


def _said(node: Node) -> str:
    who = {"user": "you", "assistant": "model"}.get(node.role, node.role)
    return f"{who}: {output.one_line(node.text.strip(), _WIDTH) or '(nothing)'}"


def _node(tree: Tree, number: str) -> Node:
    if not number.isascii() or not number.isdigit() or int(number) not in tree.nodes:
        raise ModelNotFound(f"there is no message {output.one_line(number, 20)!r}", "/tree shows their numbers.")
    return tree.node(int(number))


def messages(talk: Talk, before: list[str], _: str) -> Names:
    """For Tab: the numbers of messages."""
    numbers: list[str | tuple[str, str]] = [(str(node.id), _said(node)) for node in talk.chat.tree.nodes.values()]
    return numbers if before else [("new", "begin a branch after a message"), *numbers]
