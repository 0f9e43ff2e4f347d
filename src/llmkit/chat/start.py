"""How an answer begins: anew, on the tokens another answer has, or on text that no tokens are known of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..backends import Backend
from .answer import Answer, Step
from .fitting import Prepared
from .persona import Persona
from .reasoning import Reading, opened
from .sampler_settings import Sampling
from .templates import ChatTemplate
from .tree import Node, Tree

PENDING = -1  # id of a question not in the tree yet
_RETRY = 1 << 16  # of a variation: second answers to a question come after the first ones to all
_MARK_TOKENS = 16  # enough to hold the longest mark of a thinking block


@dataclass(frozen=True)
class Start:
    """The prompt of an answer, its random numbers, and the steps it has, `given` of them not drawn with `sampling`.

    `first` is set as the next token; or the likeliest one is, of those not in `not_first`.
    """

    prepared: Prepared
    sampling: Sampling
    variation: int
    steps: tuple[Step, ...] = ()
    given: int = 0
    first: int | None = None
    not_first: frozenset[int] = frozenset()


def variation(tree: Tree, path: Sequence[Node]) -> int:
    """Which of a seed's random numbers the next answer to the end of `path` takes: no other answer on it has them."""
    known = path[-1].id if path and path[-1].id != PENDING else None
    return len(path) + _RETRY * (len(tree.children(known)) if known is not None else 0)


def as_it_was(backend: Backend, answer: Answer, count: int) -> Prepared:
    """An answer's own prompt, with the first `count` of its tokens."""
    end = b"".join(map(backend.piece, answer.prompt[-_MARK_TOKENS:])).decode("utf-8", "replace")
    return Prepared(answer.prompt, answer.tokens[:count], answer.turn.merged_system, opened(end))


def written(backend: Backend, tokens: Sequence[int], reading: Reading) -> tuple[Step, ...]:
    """Steps of tokens that nobody drew: without probabilities."""
    steps = []
    for token in tokens:
        piece = backend.piece(token)
        text, thinking = reading.feed(piece)
        steps.append(Step(token, piece, text, thinking=thinking))
    return tuple(steps)


def reread(steps: Sequence[Step], reading: Reading) -> Reading:
    """The reading after these steps. What was shown of them only because the answer ended there is not shown again."""
    given = "".join(reading.feed(step.piece)[0] for step in steps)
    shown = "".join(step.text for step in steps)
    reading.skip(shown[len(given) :] if shown.startswith(given) else "")
    return reading


def is_of(backend: Backend, answer: Answer) -> bool:
    """Whether its tokens are of this model's vocabulary."""
    info = backend.info
    return answer.model == info.name and max((*answer.prompt, *answer.tokens), default=0) < info.n_vocab


def form_of(template: ChatTemplate | Persona, source: str | None) -> str:
    """Whose form prompts have, with the beginning of its SHA-256."""
    text = template.text if isinstance(template, Persona) else source or ""
    return f"{template.name} {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"
