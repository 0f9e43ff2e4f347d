"""A conversation as a value: its tree, its answers and settings, without a model. What is kept and exported."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import LlmkitError
from .answer import Answer, Dropped, dropped_from_json
from .sampler_settings import Sampling
from .streams import whole
from .templates import Message
from .tree import Node, Tree

FORM = "llmkit conversation"
VERSION = 1
_TITLE = 60  # characters


@dataclass
class Conversation:
    """All that has been said and how. `answers` by the id of their node; `model` is what the door loaded it by.

    `dropped`: from that node on, these messages are in no prompt any more. `persona`: the text of its file. `id` and
    `revision` are the store's: None and 0 until it is kept.
    """

    tree: Tree = field(default_factory=Tree)
    answers: dict[int, Answer] = field(default_factory=dict)
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    name: str | None = None
    model: str = ""
    persona: str | None = None
    dropped: dict[int, Dropped] = field(default_factory=dict)
    id: int | None = None
    revision: int = 0
    made: float = field(default_factory=time.time)
    changed: float = 0.0

    @property
    def title(self) -> str:
        """Its name, else the beginning of its first question."""
        first = next((node.text for node in self.tree.children(None)), "")
        return self.name or shortened(first)

    def in_context(self, path: Sequence[Node]) -> tuple[list[Node], str | None]:
        """The nodes of a path that are not dropped, and the newest summary of those that are."""
        events = [self.dropped[node.id] for node in path if node.id in self.dropped]
        gone = {id for event in events for id in event.nodes}
        summaries = [event.summary for event in events if event.summary]
        return [node for node in path if node.id not in gone], summaries[-1] if summaries else None

    def to_json(self) -> dict[str, Any]:
        """As dictionaries, lists, numbers and texts: all of it but the store's own `id` and `revision`."""
        return {
            "form": FORM,
            "version": VERSION,
            "name": self.name,
            "model": self.model,
            "system": self.system,
            "persona": self.persona,
            "sampling": self.sampling.to_json(),
            "made": self.made,
            "changed": self.changed,
            **self.tree.to_json(),
            "dropped": {str(node): asdict(event) for node, event in sorted(self.dropped.items())},
            "answers": [answer.to_json() for _, answer in sorted(self.answers.items())],
        }

    @classmethod
    def from_json(cls, data: Any) -> Conversation:
        """The conversation that `to_json` wrote. Raises LlmkitError, saying what is wrong, for anything else."""
        if not isinstance(data, Mapping) or data.get("form") != FORM:
            raise LlmkitError("this is no conversation that llmkit wrote", f'Expected JSON with "form": "{FORM}".')
        if data.get("version") != VERSION:
            raise LlmkitError(
                f"the conversation has version {data.get('version')}, this llmkit reads {VERSION}", "Update llmkit."
            )
        tree = Tree.from_json(data)
        try:
            answers = [Answer.from_json(each) for each in data["answers"]]
            found = cls(
                tree=tree,
                answers={answer.node: answer for answer in answers},
                system=_text(data["system"]),
                sampling=Sampling.from_json(data["sampling"]),
                name=_text(data["name"]),
                model=str(data["model"]),
                persona=_text(data["persona"]),
                dropped={int(node): dropped_from_json(event) for node, event in data["dropped"].items()},
                made=float(data["made"]),
                changed=float(data["changed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LlmkitError(f"this is no conversation that llmkit wrote: {type(error).__name__}: {error}") from error
        for node in (*found.answers, *found.dropped):
            tree.node(node)
        return found


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return None if value is None else whole(value)


def message(node: Node) -> Message:
    """The message of a node, as templates take it."""
    return Message(node.role, node.text, node.thinking)


def shortened(text: str, length: int = _TITLE) -> str:
    """One line of `text`, with … where it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
