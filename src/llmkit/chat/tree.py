"""A conversation as a tree: every message is a node, an edited question or a second answer is a sibling.

Nothing is ever taken out: `head` is where the conversation stands, its path to the root is what was said. Data only,
knows nothing of models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LlmkitError
from .streams import whole

ROLES = ("user", "assistant")
_MOST = 1 << 31  # messages


@dataclass(frozen=True)
class Node:
    """A message. `id` counts up from 0; `parent` is None for a first question; `made` is a time.time().

    `thinking` is what a reasoning model wrote before its answer, without the marks around it.
    """

    id: int
    parent: int | None
    role: str
    text: str
    made: float
    thinking: str = ""


class Tree:
    """Nodes by id, and the `head` among them, None while nothing has been said (or all was undone)."""

    def __init__(self, nodes: Mapping[int, Node] | None = None, head: int | None = None) -> None:
        self.nodes: dict[int, Node] = dict(nodes or {})
        self._children: dict[int | None, list[int]] = {}
        for id in sorted(self.nodes):
            self._children.setdefault(self.nodes[id].parent, []).append(id)
        self.head = head

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and (self.nodes, self.head) == (other.nodes, other.head)

    __hash__ = None  # type: ignore[assignment]

    def node(self, id: int) -> Node:
        """The node of that id. Raises LlmkitError when there is none."""
        found = self.nodes.get(id)
        if found is None:
            have = f"there are {', '.join(map(str, sorted(self.nodes)))}" if self.nodes else "nothing has been said yet"
            raise LlmkitError(f"this conversation has no message {id}", f"{have[0].upper()}{have[1:]}.")
        return found

    def add(self, parent: int | None, role: str, text: str) -> Node:
        """A new message after `parent`, and the head is there. Raises LlmkitError for an unknown parent or role."""
        if role not in ROLES:
            raise LlmkitError(f"a message of '{role}': expected one of {', '.join(ROLES)}")
        if parent is not None:
            self.node(parent)
        node = Node(max(self.nodes, default=-1) + 1, parent, role, whole(text), time.time())
        self.nodes[node.id] = node
        self._children.setdefault(parent, []).append(node.id)
        self.head = node.id
        return node

    def write(self, id: int, text: str, thinking: str = "") -> Node:
        """Give a message another text: of an answer that has grown."""
        self.nodes[id] = replace(self.node(id), text=whole(text), thinking=whole(thinking))
        return self.nodes[id]

    def path(self, node: int | None = None) -> list[Node]:
        """From the first question to `node`, else to the head; empty when there is none."""
        found: list[Node] = []
        at = self.head if node is None else node
        while at is not None:
            found.append(self.node(at))
            at = found[-1].parent
        return found[::-1]

    def children(self, id: int | None) -> list[Node]:
        """What follows a message, oldest first; of None the first questions."""
        return [self.nodes[child] for child in self._children.get(id, ())]

    def siblings(self, id: int) -> list[Node]:
        """The message and those that stand in its place, oldest first."""
        return self.children(self.node(id).parent)

    def leaves(self) -> list[Node]:
        """Messages that nothing follows, oldest first: the ends of all branches."""
        return [self.nodes[id] for id in sorted(self.nodes) if not self._children.get(id)]

    def end(self, id: int) -> Node:
        """Where the branch through a message ends: its newest child's newest child, and so on."""
        node = self.node(id)
        while after := self.children(node.id):
            node = after[-1]
        return node

    def question(self, id: int | None = None) -> Node:
        """That message, else the last question on the path. Raises LlmkitError when it is none."""
        if id is not None:
            if self.node(id).role != "user":
                raise LlmkitError(f"message {id} is an answer, expected a question")
            return self.node(id)
        found = next((node for node in reversed(self.path()) if node.role == "user"), None)
        if found is None:
            raise LlmkitError("nothing has been asked yet")
        return found

    def answer(self, id: int | None) -> Node:
        """That message. Raises LlmkitError when it is no answer."""
        if id is None:
            raise LlmkitError("there is no answer yet")
        if self.node(id).role != "assistant":
            raise LlmkitError(f"message {id} is a question, expected an answer", "/retry answers it.")
        return self.node(id)

    def to_json(self) -> dict[str, Any]:
        """As dictionaries, lists, numbers and texts."""
        nodes = [
            {"id": each.id, "parent": each.parent, "role": each.role, "text": each.text, "made": each.made}
            | ({"thinking": each.thinking} if each.thinking else {})
            for _, each in sorted(self.nodes.items())
        ]
        return {"head": self.head, "nodes": nodes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tree:
        """The tree that `to_json` wrote. Raises LlmkitError when it is none: nodes missing, twice, or in a circle."""
        try:
            nodes = [
                Node(
                    id=_whole(each["id"]),
                    parent=None if each["parent"] is None else _whole(each["parent"]),
                    role=str(each["role"]),
                    text=whole(str(each["text"])),
                    made=float(each["made"]),
                    thinking=whole(str(each.get("thinking", ""))),
                )
                for each in data["nodes"]
            ]
            head = None if data["head"] is None else _whole(data["head"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LlmkitError(f"this is no conversation that llmkit wrote: {type(error).__name__}: {error}") from error
        return _checked(nodes, head)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} is no number of a message")
    return value


def _checked(nodes: list[Node], head: int | None) -> Tree:
    """A parent comes before its children (ids only grow), so there are no circles."""
    found: dict[int, Node] = {}
    for node in sorted(nodes, key=lambda each: each.id):
        wrong = (
            "comes twice" if node.id in found
            else f"follows message {node.parent}, which does not come before it"
            if node.parent is not None and node.parent not in found
            else f"is of '{node.role}', expected one of {', '.join(ROLES)}" if node.role not in ROLES
            else "has no time" if not math.isfinite(node.made)
            else ""
        )  # fmt: skip
        if wrong:
            raise LlmkitError(f"the conversation is damaged: message {node.id} {wrong}")
        found[node.id] = node
    if head is not None and head not in found:
        raise LlmkitError(f"the conversation is damaged: it stands at message {head}, which is not there")
    return Tree(found, head)
