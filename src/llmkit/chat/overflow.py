"""What to do when a conversation no longer fits into the context. Nothing is ever cut silently.

stop: say so, with the numbers · slide: the oldest questions leave with their answers, the system prompt stays ·
summarise: the model writes a summary of them first. What left is told as a Dropped, and stays in the tree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from ..errors import LlmkitError, Unsupported, nearest_hint
from .tree import Node

Overflow = Literal["stop", "slide", "summarise"]
POLICIES: tuple[Overflow, ...] = get_args(Overflow)

# shares of the context: room made at once, so that the next turns reuse what is left; the least an answer should have;
# the longest summary
_ROOM, _LEAST, _SUMMARY = 4, 16, 8

SUMMARISE = (
    "Summarise our conversation so far for your own memory, in at most {words} words: what was asked, what was found "
    "or decided, names and numbers that matter. Write only the summary."
)
_WAYS = {"slide": "leave", "summarise": "be summarised"}
MARK = "[Summary of the earlier conversation, written by the model:]"


class ContextFull(LlmkitError):
    """The prompt would be `needed` tokens long, the context holds `total`. Nothing has been evaluated or changed.

    `choices` are the policies that would help.
    """

    def __init__(self, needed: int, total: int, choices: Sequence[Overflow] = ()) -> None:
        self.needed, self.total, self.choices = needed, total, tuple(choices)
        ways = " or ".join(f"{_WAYS[each]} ({each})" for each in choices)
        hint = (
            f"Let the oldest turns {ways}, begin anew, or use a larger --context."
            if ways
            else "The last question alone is too long, with what must stay: shorten it, or use a larger --context."
        )
        super().__init__(f"the conversation is {needed} tokens long, the context holds {total}", hint)


def checked(policy: str) -> Overflow:
    """The policy of that name. Raises Unsupported with the nearest."""
    for each in POLICIES:
        if each == policy:
            return each
    raise Unsupported(f"'{policy}' is nothing to do when the context is full", nearest_hint(policy, POLICIES))


def least_room(total: int, max_tokens: int | None) -> int:
    """Tokens an answer should have before anything is dropped for it."""
    return max(1, min(total // _LEAST, max_tokens or total))


def summary_room(total: int) -> int:
    """Tokens a summary may have."""
    return max(1, total // _SUMMARY)


def request(total: int) -> str:
    """What the model is asked for a summary."""
    return SUMMARISE.format(words=max(10, summary_room(total) // 2))


def system_with(system: str | None, summary: str | None) -> str | None:
    """The system prompt, followed by the marked summary."""
    if not summary:
        return system
    return "\n\n".join(filter(None, [system, f"{MARK}\n{summary}"]))


def turns(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes of a path by turn: a question and what follows it."""
    found: list[list[Node]] = []
    for node in nodes:
        if node.role == "user" or not found:
            found.append([])
        found[-1].append(node)
    return found


def drop_count(most: int, count: Callable[[int], int], total: int) -> int:
    """How many of the `most` oldest turns must leave, so that a quarter of the context is free; all, if that is not
    enough. `count(k)` is the length of the prompt without the first k.
    """
    wanted = total - max(1, total // _ROOM)
    return max(1, bisect_left(range(most), True, key=lambda k: count(k) <= wanted))
