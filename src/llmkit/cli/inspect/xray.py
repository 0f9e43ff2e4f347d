"""Show a prompt under X-rays: which tokens are system, user, assistant, and which the chat template's.

TEXT is asked as a question; a whole conversation comes from a JSON file of messages (role, content). The tokens are
exactly those the model is given, with what each message costs of the context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InvalidModel, LlmkitError
from .. import output
from . import views

if TYPE_CHECKING:
    from ...chat.templates import Message
    from ...inspection.xray import XRay

EXAMPLES = (
    'llmkit inspect xray "Where is Paris?" --model model.gguf',
    'llmkit inspect xray "Where is Paris?" --model model.gguf --system "Be brief."',
    "llmkit inspect xray --messages chat.json --model model.gguf --json",
)
_INKS = {"system": 172, "user": 31, "assistant": 71, "template": 244}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The messages and the model."""
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the question; - reads it from the input")
    views.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument("--messages", type=Path, metavar="FILE", help="JSON: [{role, content}, …], before TEXT")
    parser.add_argument("--ids", action="store_true", help="show every token, too")
    views.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Render, encode and attribute the prompt."""
    from ...inspection import xray

    messages = _messages(args)
    with views.vocabulary(args) as backend:
        seen = xray.xray(backend, messages)
    if args.json:
        plain = output.plain(seen)
        plain["tokens"] = [output.plain(token) | {"bytes": token.bytes.hex()} for token in seen.tokens]
        output.emit_json(plain | {"count": len(seen.tokens)})
        return 0
    _show_segments(seen)
    if args.ids:
        owners = [segment.part for segment in seen.segments for _ in range(segment.start, segment.end)]
        rows = [(token.index, token.id, token.piece, owner) for token, owner in zip(seen.tokens, owners, strict=True)]
        output.table(("", "id", "piece", "whose"), rows, "rr")
        output.emit()
    _show_costs(seen)
    if args.text and not (args.system or args.messages):
        views.suggest(args, "lens", "--chat")
    return 0


def _messages(args: argparse.Namespace) -> list[Message]:
    from ...chat.templates import Message

    found = [Message("system", args.system)] if args.system else []
    if args.messages:
        found += _read(args.messages)
    if args.text is not None:
        text = views.text_of(args.text)
        if not text:
            raise LlmkitError("the question is empty", "Give a text, or - to read it from the input.")
        found.append(Message("user", text))
    if not found:
        raise LlmkitError("there is nothing to ask", "Give a question, --system or --messages FILE.")
    return found


def _read(path: Path) -> list[Message]:
    from ...chat.templates import Message
    from ...errors import ModelNotFound

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path}: is not JSON: {error}") from error
    rows = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InvalidModel(f"{path}: expected a list of messages, each with role and content")
    found = []
    for number, row in enumerate(rows):
        role, text = (row.get("role"), row.get("content")) if isinstance(row, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise InvalidModel(f"{path}: message {number} has no role and content that are text")
        found.append(Message(role, text))
    return found


def _show_segments(seen: XRay) -> None:
    """The prompt with the name of the part and its tokens at the left."""
    names = [f"{segment.part} {segment.end - segment.start}" for segment in seen.segments]
    width = max(map(len, names), default=0)
    for segment, name in zip(seen.segments, names, strict=True):
        ink = _INKS.get(segment.part, 133)
        for index, line in enumerate(segment.text.splitlines(keepends=True) or [""]):
            shown = output.printable(line.rstrip("\n")) + ("↵" if line.endswith("\n") else "")
            label = name if index == 0 else ""
            output.emit(f"{label:<{width}}  {output.paint(shown, colour=ink)}")
    output.emit()


def _show_costs(seen: XRay) -> None:
    rows: list[tuple[object, ...]] = []
    for cost in seen.costs:
        shown = output.one_line(cost.text, 40) + ("" if cost.shown else "  (the template drops it)")
        rows.append((cost.message, cost.role, shown, cost.content, cost.template, cost.total))
    rows.append(("", "opening of the answer", "", 0, seen.opening, seen.opening))
    count = len(seen.tokens)
    own = sum(cost.content for cost in seen.costs)
    rows.append(("", "all", "", own, count - own, count))
    output.table(("", "message", "text", "its words", "template", "tokens"), rows, "rllrrr")
    share = seen.of("template") / count if count else 0.0
    output.emit(
        f"{count} tokens are given to the model, {views.percent(share)} of them are the template's: they tell it"
        " who speaks, and are part of what it was trained on."
    )
    if seen.merged_system:
        output.emit("The template knows no system prompt: the first question carries it.")
    if seen.template == "plain":
        output.emit("The file has no chat template: this is a plain dialogue (User: … Assistant: …).")
