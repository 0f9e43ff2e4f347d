"""How a text might go on: several continuations at once, on one context that holds their common beginning once.

    grow(backend, tokens)                                  the four likeliest next tokens, each gone on with greedily
    grow(backend, tokens, Shape(starts=(7042, 260)))       these tokens instead
    grow(backend, tokens, Shape(width=2, depth=3), sampling=…)    forks at the first three tokens, then draws

Every step is one batch with a token of each branch. Probabilities are raw (the model's own) unless called sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from typing import TYPE_CHECKING, Literal

from ..backends import Backend, Part, Session
from ..chat import samplers
from ..chat.sampling import Sampler, Sampling, describe
from ..errors import LlmkitError, Unsupported
from .tokens import visible

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

MOST_BRANCHES = 64
Ending = Literal["end", "length"]


@dataclass(frozen=True)
class Shape:
    """A fork into the `width` likeliest tokens at each of the first `depth`; `length` tokens a branch at most.

    The first fork is into `starts`, if there are any.
    """

    width: int = 4
    length: int = 20
    depth: int = 1
    starts: tuple[int, ...] = ()

    @property
    def leaves(self) -> int:
        """Branches at the end."""
        return int((len(self.starts) or self.width) * self.width ** (self.depth - 1))


@dataclass(frozen=True)
class Said:
    """A token of a branch. `logprob` (natural) and `rank` are raw, `entropy` (bits) is of the raw distribution.

    `sampled_probability` is the one it was drawn with; None where it was not drawn but set, or taken as the likeliest.
    """

    id: int
    piece: str
    logprob: float
    rank: int
    entropy: float
    sampled_probability: float | None = None


@dataclass(frozen=True)
class Fork:
    """Tokens up to where the text forks, or ends. `logprob`: of all from the first on; `text`: of these alone."""

    steps: tuple[Said, ...]
    text: str
    logprob: float
    children: tuple[Fork, ...] = ()
    ending: Ending | None = None


@dataclass(frozen=True)
class Branch:
    """One way through the tree: its text and its raw probability as a whole. `seed` with `turn` repeats its draws."""

    ids: tuple[int, ...]
    text: str
    logprob: float
    ending: Ending
    turn: int

    @property
    def probability(self) -> float:
        """Of all its tokens together, raw."""
        return exp(self.logprob)


@dataclass(frozen=True)
class Branches:
    """The tree and its leaves. `evaluated` tokens were computed, where separate runs compute `separately`.

    `cells`: of the KV cache, measured where the engine tells, else None.
    """

    context: str
    forks: tuple[Fork, ...]
    leaves: tuple[Branch, ...]
    seed: int | None
    prompt: int
    evaluated: int
    separately: int
    cells: int | None


@dataclass
class _Run:
    """A Fork on its way."""

    steps: list[Said] = field(default_factory=list)
    children: list[_Run] = field(default_factory=list)
    ending: Ending | None = None


@dataclass
class _Tip:
    """A branch that grows: its sequence, the logits after its last token, the runs it came through."""

    sequence: int
    logits: Floats
    runs: list[_Run]
    ids: list[int]
    sampler: Sampler | None = None


def grow(
    backend: Backend,
    tokens: Sequence[int],
    shape: Shape = Shape(),
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Branches:
    """Fork after `tokens`, then go on: with the likeliest tokens, or with `sampling` by draws of each branch's own.

    Raises Unsupported for a shape of more than 64 branches or with numbers too small, EngineError when the context
    does not fit into memory.
    """
    _check(backend, tokens, shape)
    session = backend.session(len(tokens) + shape.leaves * shape.length, sequences=shape.leaves)
    drawing: list[Sampler] = []
    try:
        root = _Run()
        tips, evaluated = [_Tip(0, session.eval(tokens).logits[-1].copy(), [root], [])], len(tokens)
        for step in range(shape.length):
            if step < shape.depth:
                tips = _fork(backend, session, tips, shape)
            else:
                if step == shape.depth and sampling is not None:
                    drawing += _arm(backend, tips, sampling, seed)
                _go_on(backend, tips, tokens)
            growing = [tip for tip in tips if not _ended(backend, tip, shape.length)]
            if not growing:
                break
            rows = session.eval_parts([Part(tip.sequence, [tip.ids[-1]]) for tip in growing])
            evaluated += len(growing)
            for tip, logits in zip(growing, rows, strict=True):
                tip.logits = logits[-1]
        cells = getattr(session, "used", None)
    finally:
        for each in drawing:
            each.close()
        session.close()
    leaves = tuple(_leaf(backend, tip, turn) for turn, tip in enumerate(tips))
    return Branches(
        context="".join(visible(backend.piece(token)) for token in tokens[-12:]),
        forks=tuple(_frozen(backend, run, 0.0) for run in root.children),
        leaves=leaves,
        seed=seed if sampling is not None else None,
        prompt=len(tokens),
        evaluated=evaluated,
        separately=sum(len(tokens) + len(each.ids) - 1 for each in leaves),
        cells=cells,
    )


def _check(backend: Backend, tokens: Sequence[int], shape: Shape) -> None:
    if not tokens:
        raise LlmkitError("the text is empty, so nothing can go on from it", "Give a text.")
    for name in ("width", "length", "depth"):
        if getattr(shape, name) < 1:
            raise Unsupported(f"{name} {getattr(shape, name)}: expected 1 or more")
    if shape.depth > shape.length:
        raise Unsupported(f"depth {shape.depth}: the branches have only {shape.length} tokens to fork at")
    if shape.leaves > MOST_BRANCHES:
        raise Unsupported(
            f"width {shape.width} and depth {shape.depth} make {shape.leaves} branches, at most {MOST_BRANCHES} are"
            " grown at once",
            "Take a smaller width or depth.",
        )
    for token in shape.starts:
        if not 0 <= token < backend.info.n_vocab:
            raise Unsupported(f"token {token}: the model has tokens 0 to {backend.info.n_vocab - 1}")
        if shape.starts.count(token) > 1:
            raise Unsupported(f"a branch is to begin with {visible(backend.piece(token))} twice")


def _fork(backend: Backend, session: Session, tips: Sequence[_Tip], shape: Shape) -> list[_Tip]:
    """Every tip that has not ended becomes several; the first keeps its sequence, the others share what it holds."""
    found: list[_Tip] = []
    free = iter(sorted(set(range(shape.leaves)) - {tip.sequence for tip in tips}))
    for tip in tips:
        if tip.runs[-1].ending:
            found.append(tip)
            continue
        given = shape.starts if not tip.ids else ()
        for number, token in enumerate(given or samplers.largest(tip.logits, shape.width).tolist()):
            sequence = tip.sequence if number == 0 else next(free)
            if number:
                session.share(tip.sequence, sequence)
            run = _Run()
            tip.runs[-1].children.append(run)
            twin = _Tip(sequence, tip.logits, [*tip.runs, run], list(tip.ids))
            _say(backend, twin, token, None)
            found.append(twin)
    return found


def _arm(backend: Backend, tips: Sequence[_Tip], sampling: Sampling, seed: int) -> list[Sampler]:
    """Give each branch a sampler of its own, as far on as its text."""
    made = []
    for turn, tip in enumerate(tips):
        if not tip.runs[-1].ending:
            tip.sampler = Sampler(sampling, backend=backend, seed=seed, turn=turn)
            made.append(tip.sampler)
            for token in tip.ids:
                tip.sampler.accept(token)
    return made


def _go_on(backend: Backend, tips: Sequence[_Tip], tokens: Sequence[int]) -> None:
    for tip in tips:
        if tip.runs[-1].ending:
            continue
        if tip.sampler is None:
            _say(backend, tip, int(tip.logits.argmax()), None)
        else:
            choice = tip.sampler.choose(tip.logits, [*tokens, *tip.ids])
            _say(backend, tip, choice.token, choice.probability)


def _say(backend: Backend, tip: _Tip, token: int, sampled: float | None) -> None:
    raw = describe(tip.logits, token, 0)
    piece = visible(backend.piece(token))
    tip.runs[-1].steps.append(Said(token, piece, raw.logprob, raw.rank, raw.entropy, sampled))
    tip.ids.append(token)


def _ended(backend: Backend, tip: _Tip, length: int) -> bool:
    run = tip.runs[-1]
    if run.ending is None and tip.ids[-1] in backend.info.eos:
        run.ending = "end"
    elif run.ending is None and len(tip.ids) >= length:
        run.ending = "length"
    return run.ending is not None


def _text(backend: Backend, ids: Sequence[int]) -> str:
    """Without the token that ends an answer."""
    return b"".join(backend.piece(id) for id in ids if id not in backend.info.eos).decode("utf-8", "replace")


def _leaf(backend: Backend, tip: _Tip, turn: int) -> Branch:
    total = sum(step.logprob for run in tip.runs for step in run.steps)
    return Branch(tuple(tip.ids), _text(backend, tip.ids), total, tip.runs[-1].ending or "length", turn)


def _frozen(backend: Backend, run: _Run, before: float) -> Fork:
    total = before + sum(step.logprob for step in run.steps)
    children = tuple(_frozen(backend, child, total) for child in run.children)
    return Fork(tuple(run.steps), _text(backend, [step.id for step in run.steps]), total, children, run.ending)
