"""Every error a user can meet. A message says what failed, on which thing, what was expected and found.

    LlmkitError                 exit code 1; .hint says what to do next
    ├── ModelNotFound           no such folder, file or repository
    ├── AccessDenied            gated, private or unwritable
    ├── InvalidModel            broken or inconsistent file: file, offset or key, expected, found
    ├── Unsupported             an architecture, quant, setting or tensor llmkit cannot express
    ├── NotEnoughRoom           disk or memory: needed against free
    ├── OutputExists            a finished file is in the way
    ├── Unreachable             the Hub does not answer, or is not to be asked
    ├── MissingDependency       a package or an engine symbol is missing
    └── EngineError             the engine refused or died; its last log lines are attached

Knows nothing of how errors are shown: the doors (cli, server, ui) do that.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmkitError(Exception):
    """An error with a cause the user can act on. `hint` is one sentence or command, or None."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ModelNotFound(LlmkitError):
    """The named folder, file or repository is not there."""


class AccessDenied(LlmkitError):
    """It is there, but may not be read or written."""


class InvalidModel(LlmkitError):
    """A file is broken or contradicts itself."""


class Unsupported(LlmkitError):
    """The thing is sound, but llmkit or the engine cannot express it."""


class NotEnoughRoom(LlmkitError):
    """The disk or the memory is too small."""


class OutputExists(LlmkitError):
    """A finished file of that name exists and was not to be replaced."""


class Unreachable(LlmkitError):
    """The Hub does not answer, or is not to be asked."""


class MissingDependency(LlmkitError):
    """A package, or a symbol of the engine, is missing."""


class EngineError(LlmkitError):
    """The engine refused, failed or died."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names in `known` closest to `word`, ignoring case; may be empty."""
    by_lower: dict[str, str] = {}
    for name in known:
        by_lower.setdefault(name.lower(), name)
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, count, 0.5)]


def nearest_hint(word: str, known: Iterable[str]) -> str:
    """'Nearest: a, b.' or, when nothing is near, 'Known: every name.'."""
    names = sorted(known)
    found = nearest(word, names)
    return f"Nearest: {', '.join(found)}." if found else f"Known: {', '.join(names)}."
