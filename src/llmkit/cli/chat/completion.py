"""What Tab offers: names that go on as a word was begun. Which names, the table of commands says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Names = Iterable["str | tuple[str, str]"]  # a name, or a name and what it is


@dataclass(frozen=True)
class Candidate:
    """What may stand in place of the last `replaces` characters, and what it is."""

    text: str
    replaces: int
    what: str = ""


def matching(names: Names, begun: str) -> Iterator[Candidate]:
    """The names that go on as the word that was begun."""
    for each in names:
        name, what = (each, "") if isinstance(each, str) else each
        if name.lower().startswith(begun.lower()):
            yield Candidate(name, len(begun), what)


def listed(names: Names, begun: str) -> Names:
    """Names for the last item of a list with commas: "top_k,te" → "top_k,temperature"."""
    done, comma, _ = begun.rpartition(",")
    taken = set(done.split(","))
    return [f"{done}{comma}{name}" for name in map(str, names) if name not in taken]


def files(begun: str, suffix: str) -> Names:
    """Folders and files that end with `suffix`, as far as `begun` leads."""
    folder = Path(begun).expanduser() if begun.endswith("/") or not begun else Path(begun).expanduser().parent
    shown = begun if begun.endswith("/") or not begun else begun[: len(begun) - len(Path(begun).name)]
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [
        f"{shown}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if not entry.name.startswith(".") and (entry.is_dir() or entry.name.endswith(suffix))
    ]
