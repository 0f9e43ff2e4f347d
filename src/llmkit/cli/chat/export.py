"""A conversation as a file: Markdown to read, JSON to go on with, HTML to show."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...inspection import page as html
from ...inspection.tokens import visible
from .. import output

if TYPE_CHECKING:
    from ...chat import Chat, Step
    from ...chat.answer import Answer
    from ...chat.tree import Node

_WHO = {"user": "You", "assistant": "Model", "system": "System"}


# ── JSON ──


def as_json(chat: Chat) -> str:
    """The whole tree with all answers and tokens; /load takes it back. Of a model's path only the name is in it."""
    facts = chat.conversation.to_json()
    if os.path.exists(facts["model"]):
        facts["model"] = os.path.basename(facts["model"])
    return json.dumps(facts, ensure_ascii=False, indent=1) + "\n"


# ── Markdown ──


def markdown(chat: Chat) -> str:
    """The messages on the way to where the conversation is now, each under a heading; figures of answers in italics."""
    parts = [f"# {_title(chat)}", f"*{_origin(chat)}*"]
    if chat.system:
        parts += ["## System", chat.system]
    for node in chat.tree.path():
        parts += [f"## {_WHO.get(node.role, node.role)}", node.text.strip() or "*(nothing)*"]
        if answer := chat.answers.get(node.id):
            parts.append(f"*{_figures(answer)}*")
    return "\n\n".join(parts) + "\n"


# ── HTML ──


def page(chat: Chat) -> str:
    """One page that needs nothing else: reasoning folded, tokens coloured by probability and told on hovering."""
    body = [html.paragraph(_origin(chat), "quiet")]
    if chat.system:
        body += [html.heading("System"), html.tokens([html.safe(chat.system)])]
    for node in chat.tree.path():
        body += [html.heading(_WHO.get(node.role, node.role)), *_message(node, chat.answers.get(node.id))]
    if others := len(chat.tree.nodes) - len(chat.tree.path()):
        body.append(html.paragraph(f"{others} messages on other branches are not shown; the JSON export has them."))
    return html.page(_title(chat), body)


def _message(node: Node, answer: Answer | None) -> Iterator[str]:
    if answer is None or not answer.steps:
        yield html.tokens([html.safe(node.text.strip())])
        return
    if thoughts := list(_spans([step for step in answer.steps if step.thinking])):
        yield html.details("thoughts", html.tokens(thoughts))
    yield html.tokens(_spans([step for step in answer.steps if not step.thinking]))
    yield html.paragraph(_figures(answer), "quiet")


def _spans(steps: list[Step]) -> Iterator[str]:
    """Tokens whose text comes together (halves of a character, parts of a stop string) make one span."""
    held: list[Step] = []
    for step in steps:
        held.append(step)
        if step.text:
            known = all(math.isfinite(each.logprob) for each in held)
            least = math.exp(min(each.logprob for each in held)) if known else None
            yield html.token(step.text, least, "\n".join(map(_told, held)) if known else "")
            held = []


def _told(step: Step) -> str:
    others = [f"{visible(each.piece)} {math.exp(each.logprob):.1%}" for each in step.alternatives if each.id != step.id]
    return "\n".join([f"{visible(step.piece)} {math.exp(step.logprob):.1%}, raw", *others])


FORMS: dict[str, Callable[[Chat], str]] = {"md": markdown, "json": as_json, "html": page}


# ── words ──


def _title(chat: Chat) -> str:
    asked = next((node.text for node in chat.tree.path() if node.role == "user"), "A conversation")
    return output.one_line(asked.strip(), 70)


def _origin(chat: Chat) -> str:
    info = chat.backend.info
    return f"A conversation with {info.name}" + (f", run by {info.engine}" if info.engine else "") + ", kept by llmkit."


def _figures(answer: Answer) -> str:
    turn = answer.turn
    parts = [f"{turn.generated} tokens"]
    if turn.tokens_per_second:
        parts.append(f"{turn.tokens_per_second:.1f} tokens/s")
    return " · ".join([*parts, answer.model, f"temperature {answer.sampling.temperature:g}", f"seed {turn.seed}"])
