"""Finding a term, and telling it: three sentences, a number of the user's own model, the command that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ModelNotFound, nearest
from .term_facts import FACTS, Fact, Subject
from .terms import AREAS, TERMS, Term

WORD = "MODEL"  # stands for the model in a term's command


@dataclass(frozen=True)
class Explanation:
    """A term with what the model says of it. `asked` is the user's word; `model` is None where none is known."""

    asked: str
    term: str
    area: str
    sentences: tuple[str, str, str]
    also: tuple[str, ...]
    fact: Fact | None
    model: str | None
    command: str


def find(word: str) -> Term:
    """The term called so, by any of its names; case, blanks and hyphens do not count.

    Raises ModelNotFound with the nearest terms.
    """
    names = _names()
    if found := names.get(_key(word)):
        return found
    near = list(dict.fromkeys(names[key].name for key in nearest(_key(word), names)))
    near += [term.name for term in TERMS.values() if _key(word) in _key(term.name) and term.name not in near]
    hint = f"Nearest: {', '.join(near[:3])}." if near else "All terms: llmkit explain"
    raise ModelNotFound(f"no term '{word}' is explained here", hint)


def explain(word: str, subject: Subject | None = None, model: str | None = None) -> Explanation:
    """The term, with a number from `subject` where it tells one; `model` is what commands call it.

    Raises ModelNotFound for a term nobody knows.
    """
    term = find(word)
    fact = FACTS[term.fact](subject) if term.fact and subject else None
    command = term.command.replace(WORD, model) if model else term.command
    return Explanation(
        word, term.name, AREAS[term.area], term.sentences, term.also, fact, subject.name if subject else None, command
    )


def by_area() -> Mapping[str, tuple[Term, ...]]:
    """All terms under their area's title."""
    return {title: tuple(term for term in TERMS.values() if term.area == area) for area, title in AREAS.items()}


def _names() -> dict[str, Term]:
    names = {_key(term.name): term for term in TERMS.values()}
    for term in TERMS.values():
        for other in term.also:
            names.setdefault(_key(other), term)
    return names


def _key(word: str) -> str:
    return "".join(char for char in word.lower() if char.isalnum())
