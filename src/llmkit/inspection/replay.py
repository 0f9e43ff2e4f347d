"""An answer once more, from its receipt: token by token the same, or where and why not.

The prompt is evaluated in the very calls by which it came into the chat's context: engines round differently for one
token and for many. Then each token is drawn with the receipt's samplers, seed and random numbers. The first token that
differs ends it: all after it follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..backends import Backend, Session
from ..chat.answer import Step
from ..chat.sampling import Sampler, describe
from ..errors import LlmkitError
from ..progress import OnProgress, Progress, ignore
from . import receipt as receipts
from .receipt import Receipt
from .tokens import visible

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

ROUNDING = 0.05  # nats by which another build or processor may move a log-probability; more is another model or text


@dataclass(frozen=True)
class Circumstance:
    """What is not as it was: `recorded` in the receipt, `found` here, and what that means."""

    what: str
    recorded: str
    found: str
    meaning: str


@dataclass(frozen=True)
class Candidate:
    """A token at the place where both part. Raw probability: the model's own here; sampled: after the samplers, or None
    where it was not drawn."""

    id: int
    piece: str
    raw_probability: float
    sampled_probability: float | None


@dataclass(frozen=True)
class Parting:
    """The first token that differs. `recorded` has the receipt's own numbers, `recorded_here` those it has here."""

    position: int
    recorded: Candidate
    recorded_here: Candidate
    found: Candidate


@dataclass(frozen=True)
class Report:
    """`equal`: every token came again. `same` of `tokens` did, from the first on; `given` of them were set, not drawn.

    `largest_error`: of the recorded log-probabilities of these tokens, in nats, None where none were kept; 0 is to the
    bit. `why` says in words what explains the difference, or what the equality is worth.
    """

    equal: bool
    tokens: int
    same: int
    given: int
    largest_error: float | None
    circumstances: tuple[Circumstance, ...]
    parting: Parting | None
    why: tuple[str, ...]


def replay(
    receipt: Receipt, backend: Backend, *, facts: Mapping[str, Any] | None = None, on_progress: OnProgress = ignore
) -> Report:
    """Have the receipt's answer again. `facts`: its JSON as it was read, whose seal is checked then.

    Raises LlmkitError for a receipt this model cannot replay at all (its tokens are not in the vocabulary, the prompt
    is too long), and what the backend raises.
    """
    circumstances = tuple(_circumstances(receipt, backend, facts, on_progress))
    answer = receipt.answer
    if not answer.prompt:
        raise LlmkitError("the receipt has no prompt tokens, so there is nothing to replay")
    _require_vocabulary(receipt, backend)
    session = backend.session(max(receipt.context, len(answer.prompt) + len(answer.steps)))
    sampler = Sampler(answer.sampling, backend=backend, seed=answer.sampling.seed or 0, turn=answer.variation)
    try:
        same, error, parting = _walk(receipt, backend, session, sampler, on_progress)
    finally:
        sampler.close()
        session.close()
    equal = parting is None
    why = tuple(_why(receipt, circumstances, parting, error))
    return Report(equal, len(answer.steps), same, min(answer.given, same), error, circumstances, parting, why)


def _walk(
    receipt: Receipt, backend: Backend, session: Session, sampler: Sampler, on_progress: OnProgress
) -> tuple[int, float | None, Parting | None]:
    """Tokens that came again, the largest error of their log-probabilities, and where it parts."""
    answer, error = receipt.answer, None
    history = list(answer.prompt)
    rows = _rows(session, len(answer.prompt), [*answer.prompt, *answer.tokens], answer.calls)
    for position, (step, logits) in enumerate(zip(answer.steps, rows, strict=True)):
        on_progress(Progress("replaying", position, len(answer.steps), "tokens"))
        here = math.nan if logits is None else describe(logits, step.id, 1).logprob
        if logits is None or position < answer.given:
            sampler.accept(step.id, step.sampled_probability)
        else:
            choice = sampler.choose(logits, history)
            if choice.token != step.id:
                return position, error, _parting(backend, position, step, here, logits, choice)
        if not math.isnan(off := abs(step.logprob - here)):
            error = max(error or 0.0, off)
        history.append(step.id)
    return len(answer.steps), error, None


def _rows(
    session: Session, n_prompt: int, tokens: list[int], calls: Sequence[tuple[int, int]]
) -> Iterator[Floats | None]:
    """Before each token after the prompt its logits, evaluated as the chat did; None where it came along with others.

    Of a call whose tokens were not all kept the rest is filled up: what comes later changes nothing before it.
    """
    held = sum(kept for _, kept in calls)
    whole = bool(calls) and calls[-1][0] == calls[-1][1] and all(1 <= kept <= size for size, kept in calls)
    if not (whole and n_prompt <= held <= len(tokens)):
        calls = [(n_prompt, n_prompt)]
    at = 0
    for size, kept in calls:
        filler = [tokens[0]] * min(size - kept, session.context - at - kept)
        logits: Floats = session.eval(tokens[at : at + kept] + filler).logits[-1]
        yield from (None for place in range(at + 1, at + kept) if place >= n_prompt)
        at += kept
        if not session.rewind(at):  # what is held cannot be cut: have it all again without the filler
            session.rewind(0)
            session.eval(tokens[:at], logits="none")
        if n_prompt <= at < len(tokens):
            yield None if filler else logits
    for place in range(at, len(tokens) - 1):
        yield session.eval([tokens[place]]).logits[-1]


def _parting(backend: Backend, position: int, step: Step, here: float, logits: Floats, choice: Any) -> Parting:
    piece = visible(step.piece)
    drawn = None if math.isnan(step.sampled_probability) else step.sampled_probability
    raw = float("nan") if math.isnan(step.logprob) else math.exp(step.logprob)
    other = math.exp(describe(logits, choice.token, 1).logprob)
    return Parting(
        position,
        Candidate(step.id, piece, raw, drawn),
        Candidate(step.id, piece, math.exp(here), None),
        Candidate(choice.token, visible(backend.piece(choice.token)), other, choice.probability),
    )


def _require_vocabulary(receipt: Receipt, backend: Backend) -> None:
    answer, limit = receipt.answer, backend.info.n_vocab
    if bad := [token for token in (*answer.prompt, *answer.tokens) if not 0 <= token < limit]:
        raise LlmkitError(
            f"the receipt's token {bad[0]} is not in the vocabulary of {backend.info.name} ({limit:,} tokens)",
            f"The answer was given by {receipt.model}: name that model with --model.",
        )
    for step in answer.steps:
        if (found := backend.piece(step.id)) != step.piece:
            raise LlmkitError(
                f"token {step.id} is {visible(step.piece)!r} in the receipt and {visible(found)!r} in"
                f" {backend.info.name}: another vocabulary, or an edited receipt",
                f"The answer was given by {receipt.model}: name that model with --model.",
            )


# ── why ──


def _circumstances(
    receipt: Receipt, backend: Backend, facts: Mapping[str, Any] | None, on_progress: OnProgress
) -> Iterator[Circumstance]:
    if facts is not None and receipts.seal(facts) != facts.get("seal"):
        meaning = "the receipt was changed after it was made, or damaged: nothing in it can be relied on"
        yield Circumstance("seal", str(facts.get("seal"))[:16], receipts.seal(facts)[:16], meaning)
    then = ", ".join(f"{file.name} {file.sha256[:16]}" for file in receipt.files)
    files = receipts.files(backend, on_progress)
    if [file.sha256 for file in receipt.files] != [file.sha256 for file in files]:
        now = ", ".join(f"{file.name} {file.sha256[:16]}" for file in files)
        meaning = "other weights: other probabilities are to be expected"
        yield Circumstance("model", then or receipt.model, now or backend.info.name, meaning)
    if receipt.engine != backend.info.engine:
        meaning = "another build rounds differently: probabilities move a little, and near ties may turn"
        yield Circumstance("engine", receipt.engine, backend.info.engine, meaning)
    machine = receipts.this_machine()
    if receipt.machine != machine:
        gone = sorted(set(receipt.machine.features) - set(machine.features))
        new = sorted(set(machine.features) - set(receipt.machine.features))
        recorded = f"{receipt.machine.system} {' '.join(gone)}".strip()
        meaning = "another processor takes other kernels, which round differently"
        yield Circumstance("processor", recorded, f"{machine.system} {' '.join(new)}".strip(), meaning)
    threads = getattr(backend, "n_threads", None)
    if receipt.threads is not None and isinstance(threads, int) and threads != receipt.threads:
        meaning = "sums may be split differently; most kernels do not depend on it"
        yield Circumstance("threads", str(receipt.threads), str(threads), meaning)
    if receipt.llmkit != __version__:
        yield Circumstance("llmkit", receipt.llmkit, __version__, "its samplers may have changed")


def _why(
    receipt: Receipt, circumstances: tuple[Circumstance, ...], parting: Parting | None, error: float | None
) -> Iterator[str]:
    answer = receipt.answer
    at_once = 0 < answer.reused < len(answer.prompt) and not answer.calls
    if parting is None:
        if error == 0:
            yield "every log-probability is the same to the bit"
        elif error is not None and error > ROUNDING:
            yield f"log-probabilities differ by up to {error:.2g} nats, more than rounding: they are not this model's"
        elif error is not None:
            yield f"log-probabilities differ by at most {error:.2g} nats: rounding" + (
                "; the prompt's reused part was evaluated in another turn then, here at once" if at_once else ""
            )
        if answer.given:
            yield f"the first {answer.given} tokens were set then, so they are here"
        return
    changed = {each.what for each in circumstances}
    if _off(parting) > ROUNDING and not changed & {"model", "engine"}:
        yield (
            f"the receipt says {parting.recorded.raw_probability:.2%} for {parting.recorded.piece}, the model"
            f" {parting.recorded_here.raw_probability:.2%}: token or number was edited"
        )
    if "seal" in changed:
        yield "the seal is broken: a setting, a token or a number was changed after the receipt was made"
    if "model" in changed:
        yield "the model's file is another one"
    yield from (f"the {what} is another one" for what in ("engine", "processor") if what in changed)
    if not changed:
        yield (
            "nothing recorded explains it: "
            + ("the reused part of the prompt was evaluated in another turn, which rounds differently" if at_once
               else "the engine did not give the same numbers twice")
        )  # fmt: skip


def _off(parting: Parting) -> float:
    """Nats between the probability recorded for the token and the one it has here; 0 where none was recorded."""
    then, now = parting.recorded.raw_probability, parting.recorded_here.raw_probability
    return 0.0 if math.isnan(then) else abs(math.log(max(then, 1e-300)) - math.log(max(now, 1e-300)))
