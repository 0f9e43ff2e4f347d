"""An answer as values: its tokens as Steps, what they took as a Turn, and with its prompt as an Answer, JSON both ways.

An Answer holds all that a receipt needs: evaluate `prompt`, accept the `given` first steps, draw the others with
`sampling` (its seed is the one really used) and `variation`, and the same build gives the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any, Literal

from ..errors import LlmkitError
from .sampler_settings import Sampling

# end: the model ended · stop: a stop string came · length: max_tokens · context: the context is full
Finish = Literal["end", "stop", "length", "context"]
_FINISHES = (None, "end", "stop", "length", "context")
_NAN = math.nan
Calls = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token the model might have said, with the natural logarithm of its raw probability."""

    id: int
    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer.

    `text` is what may be shown now (see streams.py), part of the `thinking` or of the answer. Of the model's own
    distribution, before any sampler: `logprob` (natural), `rank` (1 is the most likely), `entropy` (bits) and
    `alternatives` (most likely first); nan, 0 and none where details are off. `sampled_probability` is the token's
    after all samplers, what it was drawn with; nan for a token that was given. `ms`: time since the step before.
    """

    id: int
    piece: bytes
    text: str
    logprob: float = _NAN
    alternatives: tuple[Alternative, ...] = ()
    entropy: float = _NAN
    ms: float = 0.0
    finish: Finish | None = None
    rank: int = 0
    sampled_probability: float = _NAN
    thinking: bool = False


@dataclass(frozen=True)
class Dropped:
    """Messages of the tree that no prompt holds any more from here on, so that the conversation fits.

    `tokens`: how much shorter the prompt became. `summary`: what the model wrote in their place, None if nothing.
    """

    nodes: tuple[int, ...]
    tokens: int
    summary: str | None = None


@dataclass(frozen=True)
class Turn:
    """What one answer took, measured: tokens of its prompt, how many of them the context already held, and times.

    `generated` counts the tokens of this run: an answer that was gone on with has more. `first_ms`: from the question
    to the first token. `dropped`: what had to leave the context for it.
    """

    seed: int
    prompt: int
    reused: int
    merged_system: bool
    prompt_ms: float = 0.0
    generated: int = 0
    generated_ms: float = 0.0
    finish: Finish | None = None
    first_ms: float = 0.0
    dropped: Dropped | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the generated tokens, measured; 0 before the second."""
        return 1000 * (self.generated - 1) / self.generated_ms if self.generated > 1 and self.generated_ms > 0 else 0.0


@dataclass(frozen=True)
class Answer:
    """An answer with everything needed to have it again.

    `node`: its node in the tree. `prompt`: the very tokens before its first step, `reused` of them from the context.
    `sampling`: with the seed really used; `variation`: which of that seed's random numbers (Sampler's `turn`).
    `given`: so many first steps were not drawn with it but set: by another answer, or by hand. `template`: whose form
    the prompt has, with a digest of it. `calls`: how all that stood before the last run's first token came into the
    cache, (tokens evaluated at once, of them still held): engines round differently for one token and for many.
    """

    node: int
    prompt: tuple[int, ...]
    reused: int
    sampling: Sampling
    steps: tuple[Step, ...]
    turn: Turn
    engine: str
    model: str
    template: str
    variation: int = 0
    given: int = 0
    calls: Calls = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the steps."""
        return tuple(step.id for step in self.steps)

    @property
    def finish(self) -> Finish | None:
        """Why it ended; None when it was stopped."""
        return self.steps[-1].finish if self.steps else None

    def to_json(self) -> dict[str, Any]:
        """As dictionaries, lists, numbers and texts. Steps by columns, each piece of text once; no number is rounded.

        A piece that is no whole text is a list of its bytes; a number that is not known is null.
        """
        pieces = {step.id: step.piece for step in self.steps}
        pieces.update((other.id, other.piece) for step in self.steps for other in step.alternatives)
        return {
            "node": self.node,
            "model": self.model,
            "engine": self.engine,
            "template": self.template,
            "prompt": list(self.prompt),
            "reused": self.reused,
            "sampling": self.sampling.to_json(),
            "variation": self.variation,
            "given": self.given,
            "calls": [[*call, len(list(times))] for call, times in groupby(self.calls)],  # size, kept, times
            "turn": asdict(self.turn),
            "pieces": {str(id): _text_or_bytes(piece) for id, piece in sorted(pieces.items())},
            "steps": _columns(self.steps),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """The Answer that `to_json` wrote. Raises LlmkitError, saying what is wrong, for anything else."""
        try:
            pieces = {int(id): _bytes(piece) for id, piece in data["pieces"].items()}
            answer = cls(
                node=int(data["node"]),
                prompt=tuple(map(int, data["prompt"])),
                reused=int(data["reused"]),
                sampling=Sampling.from_json(data["sampling"]),
                steps=tuple(_steps(data["steps"], pieces)),
                turn=_turn(data["turn"]),
                engine=str(data["engine"]),
                model=str(data["model"]),
                template=str(data["template"]),
                variation=int(data["variation"]),
                given=int(data["given"]),
                calls=tuple(
                    (int(size), int(kept)) for size, kept, times in data.get("calls", ()) for _ in range(int(times))
                ),
            )
            answer._check()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise LlmkitError(f"this is no answer that llmkit wrote: {type(error).__name__}: {error}") from error
        return answer

    def _check(self) -> None:
        if not self.prompt or min((*self.prompt, *self.tokens)) < 0:
            raise ValueError("its tokens are none")
        if any(not 0 < kept <= size for size, kept in self.calls):
            raise ValueError("its calls keep more than they evaluate")
        if not 0 <= self.given <= len(self.steps):
            raise ValueError(f"{self.given} of its {len(self.steps)} steps cannot be given")


def _turn(data: Mapping[str, Any]) -> Turn:
    dropped = data.get("dropped")
    if dropped is not None:
        dropped = dropped_from_json(dropped)
    return Turn(**{**data, "dropped": dropped})


def dropped_from_json(data: Mapping[str, Any]) -> Dropped:
    """The Dropped of its fields."""
    return Dropped(tuple(map(int, data["nodes"])), int(data["tokens"]), data.get("summary"))


# ── steps as columns ──

_NUMBERS = ("logprob", "entropy", "sampled_probability", "ms")  # null where nan


def _columns(steps: Iterable[Step]) -> dict[str, Any]:
    steps = tuple(steps)
    columns: dict[str, Any] = {
        name: [getattr(step, name) for step in steps] for name in ("id", "text", "rank", "finish", "thinking")
    }
    for name in _NUMBERS:
        columns[name] = [None if math.isnan(value) else value for value in (getattr(step, name) for step in steps)]
    columns["alternatives"] = [[[other.id, other.logprob] for other in step.alternatives] for step in steps]
    return columns


def _steps(columns: Mapping[str, Any], pieces: Mapping[int, bytes]) -> Iterable[Step]:
    count = len(columns["id"])
    if any(len(columns[field.name]) != count for field in fields(Step) if field.name != "piece"):
        raise ValueError("its columns have different lengths")
    if strange := [finish for finish in columns["finish"] if finish not in _FINISHES]:
        raise ValueError(f"an answer does not end with {strange[0]!r}")
    for index in range(count):
        numbers = {name: _NAN if columns[name][index] is None else float(columns[name][index]) for name in _NUMBERS}
        id = int(columns["id"][index])
        others = tuple(
            Alternative(int(other), pieces[int(other)], float(logprob))
            for other, logprob in columns["alternatives"][index]
        )
        yield Step(
            id=id,
            piece=pieces[id],
            text=str(columns["text"][index]),
            alternatives=others,
            finish=columns["finish"][index],
            rank=int(columns["rank"][index]),
            thinking=bool(columns["thinking"][index]),
            **numbers,
        )


def _text_or_bytes(piece: bytes) -> str | list[int]:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


def _bytes(piece: str | list[int]) -> bytes:
    return piece.encode("utf-8") if isinstance(piece, str) else bytes(piece)
