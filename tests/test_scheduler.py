"""server/: the engine thread. Its logic on the scripted backend, its truth on real models."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends import Backend, Part
from llmkit.backends.scripted import Scripted, ScriptedSession
from llmkit.chat.answer import Step
from llmkit.chat.reasoning import FORMS
from llmkit.chat.sampling import Sampling, log_softmax
from llmkit.errors import EngineError, LlmkitError, Unsupported
from llmkit.server.jobs import Begun, Busy, Closed, ContextTooLong, Echo, Ended, Event, Failed, Job, Request, collect
from llmkit.server.scheduler import CHUNK, Scheduler

Floats = npt.NDArray[np.float32]
GREEDY = Sampling(temperature=0)
PATIENCE = 60.0


class Watched(Scripted):
    """Scripted; notes every call of eval_parts, and before each one does what it is told."""

    def __init__(self, *answers: str | bytes, can_rewind: bool = True) -> None:
        super().__init__(answers, can_rewind=can_rewind)
        self.rounds: list[list[Part]] = []
        self.before: Callable[[int], object] = lambda number: None
        self.sessions: list[ScriptedSession] = []

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> ScriptedSession:
        self.sessions.append(_WatchedSession(self, context, sequences))
        return self.sessions[-1]

    @property
    def evaluated(self) -> int:
        """Tokens, in all sessions."""
        return sum(session.evaluated for session in self.sessions)


class _WatchedSession(ScriptedSession):
    def eval_parts(self, parts: Sequence[Part]) -> list[Floats]:
        assert isinstance(self.backend, Watched)
        self.backend.rounds.append(list(parts))
        self.backend.before(len(self.backend.rounds))
        return super().eval_parts(parts)


Start = Callable[..., Scheduler]


@pytest.fixture
def start() -> Iterator[Start]:
    """Maker of schedulers that are closed at the end."""
    made: list[Scheduler] = []

    def make(backend: Backend, *, context: int = 4096, **options: Any) -> Scheduler:
        made.append(Scheduler(backend, context=context, **options))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def asked(backend: Backend, text: str, sampling: Sampling = GREEDY, **options: object) -> Request:
    return Request(tuple(backend.encode(text)), sampling, **options)  # type: ignore[arg-type]


def text_of(steps: Sequence[Step]) -> str:
    return "".join(step.text for step in steps if not step.thinking)


def tokens_of(parts: Sequence[Part]) -> int:
    return sum(len(part.tokens) for part in parts)


class Gate:
    """Holds the engine thread in its round number `at` until opened."""

    def __init__(self, backend: Watched, at: int = 1) -> None:
        self.reached, self._open, self._at = threading.Event(), threading.Event(), at
        backend.before = self._pass

    def _pass(self, number: int) -> None:
        if number == self._at:
            self.reached.set()
            assert self._open.wait(PATIENCE)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()


# ── one answer ──


def test_an_answer_comes_as_events_in_order(start: Start) -> None:
    backend = Watched("Grüße 🙂!")
    scheduler = start(backend)
    events = list(scheduler.submit(asked(backend, "Hallo<assistant>")).events)
    assert isinstance(events[0], Begun) and (events[0].prompt, events[0].reused) == (6, 0)
    steps = [event for event in events if isinstance(event, Step)]
    assert text_of(steps) == "Grüße 🙂!"
    assert events[1:-1] == steps and steps[-1].finish == "end"
    last = events[-1]
    assert isinstance(last, Ended) and last.finish == "end"
    assert last.turn.generated == len(steps) == len("Grüße 🙂!".encode()) + 1
    stats = scheduler.stats()
    assert (stats.ended, stats.decoded_tokens, stats.prompt_tokens, stats.running) == (1, len(steps), 6, 0)
    assert len(backend.rounds) == stats.rounds == len(steps)


def test_events_are_read_in_an_event_loop(start: Start) -> None:
    backend = Watched("An answer.")
    scheduler = start(backend)

    async def read(job: Job) -> list[Event]:
        return [event async for event in job.events]

    async def both() -> list[list[Event]]:
        return await asyncio.gather(*(read(scheduler.submit(asked(backend, "?<assistant>"))) for _ in range(2)))

    for events in asyncio.run(both()):
        assert text_of([event for event in events if isinstance(event, Step)]) == "An answer."
        assert isinstance(events[-1], Ended)


def test_stop_strings_thinking_and_raw_text(start: Start) -> None:
    backend = Watched("<think>hm</think>\n\none END two")
    scheduler = start(backend)
    steps, ended = collect(scheduler.submit(asked(backend, "?<assistant>", stop=("END",))))
    assert (text_of(steps), ended.finish) == ("one ", "stop")
    assert "".join(step.text for step in steps if step.thinking) == "hm"
    steps, ended = collect(scheduler.submit(asked(backend, "?<assistant>", stop=("END",), reads=False)))
    assert (text_of(steps), ended.finish) == ("<think>hm</think>\n\none ", "stop")
    steps, _ = collect(scheduler.submit(asked(backend, "?<assistant><think>", form=FORMS[0])))
    assert text_of(steps) == "one END two"[: len(text_of(steps))]


def test_details_only_where_asked(start: Start) -> None:
    backend = Watched("abc")
    scheduler = start(backend)
    (plain, *_), _ = collect(scheduler.submit(asked(backend, "?<assistant>")))
    assert np.isnan(plain.logprob) and plain.rank == 0 and plain.alternatives == ()
    (bare, *_), _ = collect(scheduler.submit(asked(backend, "?<assistant>", details=True)))
    (full, *_), _ = collect(scheduler.submit(asked(backend, "?<assistant>", n_alternatives=3)))
    row = np.zeros(backend.info.n_vocab, np.float32)
    row[ord("a")] = 12
    for step, count in ((bare, 0), (full, 3)):
        assert step.logprob == pytest.approx(log_softmax(row)[ord("a")], abs=1e-6)
        assert step.rank == 1 and len(step.alternatives) == count
    assert full.alternatives[0].piece == b"a"


def test_echo_tells_what_the_model_thought_of_the_prompt(start: Start) -> None:
    backend = Watched("x" * 200)
    scheduler = start(backend)
    request = asked(backend, "é?<assistant>" + "x" * 150, replace(GREEDY, max_tokens=2), echo=True, n_alternatives=1)
    collect(scheduler.submit(request))  # the cache is full of it
    backend.rounds.clear()
    events = list(scheduler.submit(request).events)
    shown = [step for event in events if isinstance(event, Echo) for step in event.steps]
    assert [step.id for step in shown] == list(request.prompt)
    assert "".join(step.text for step in shown).startswith("é?<assistant>xx")
    assert np.isnan(shown[0].logprob) and shown[0].alternatives == ()
    rows = ScriptedSession(backend, 4096).eval(request.prompt, logits="all").logits
    for before, step in zip(rows, shown[1:], strict=False):
        assert step.logprob == pytest.approx(log_softmax(before)[step.id], abs=1e-5)
        assert step.alternatives[0].id == before.argmax()
    wide = [part for parts in backend.rounds for part in parts if part.logits == "all"]
    assert sum(len(part.tokens) for part in wide) == len(request.prompt)
    assert max(len(part.tokens) for part in wide) <= 64


def test_several_echoes_keep_no_more_rows_than_one(start: Start) -> None:
    backend = Watched("x")
    scheduler = start(backend)
    sampling = replace(GREEDY, max_tokens=1)
    jobs = [scheduler.submit(asked(backend, f"{i}" * 300 + "<assistant>", sampling, echo=True)) for i in range(3)]
    for job in jobs:
        assert sum(len(event.steps) for event in job.events if isinstance(event, Echo)) == 301
    rows = [sum(len(part.tokens) for part in parts if part.logits == "all") for parts in backend.rounds]
    assert max(rows) <= 64


def test_what_cannot_be_asked(start: Start) -> None:
    backend = Watched("a")
    scheduler = start(backend, context=100)
    with pytest.raises(ContextTooLong) as raised:
        scheduler.submit(Request((65,) * 100))
    assert (raised.value.prompt, raised.value.context) == (100, 100)
    for prompt in ((), (1, 9999), (-1,)):
        with pytest.raises(ValueError, match="vocabulary"):
            scheduler.submit(Request(prompt))
    with pytest.raises(Unsupported, match="logit-bias"):
        scheduler.submit(Request((65,), Sampling(logit_bias=((9999, 1.0),))))
    assert scheduler.stats().submitted == 0


# ── rounds ──


def test_a_long_prompt_does_not_stop_an_answer(start: Start) -> None:
    """While it is read, every round has the other's next token, and no more of the prompt than a chunk."""
    backend = Watched("y" * 100)
    scheduler = start(backend, chunk=128, round_ms=1e9)
    late: list[Job] = []

    def newcomer(number: int) -> None:
        if number == 5:
            late.append(scheduler.submit(asked(backend, "z" * 1000 + "<assistant>")))

    backend.before = newcomer
    steps, _ = collect(scheduler.submit(asked(backend, "?<assistant>")))
    collect(late[0])
    assert len(steps) == 101
    beside = [parts for parts in backend.rounds[5:100] if any(len(part.tokens) > 1 for part in parts)]
    assert len(beside) == -(-1001 // 128)
    for parts in beside:
        assert sorted(len(part.tokens) for part in parts)[0] == 1
        assert tokens_of(parts) <= 128 + 1


def test_prompts_take_less_of_a_round_where_they_are_slow(start: Start) -> None:
    """No round beside answers is to be longer than asked for, as far as the last ones tell."""
    backend = Watched("y" * 400)
    scheduler = start(backend, round_ms=0.0)
    late: list[Job] = []

    def newcomer(number: int) -> None:
        if number == 5:
            late.append(scheduler.submit(asked(backend, "z" * 1000 + "<assistant>")))

    backend.before = newcomer
    collect(scheduler.submit(asked(backend, "?" * 50 + "<assistant>")))
    collect(late[0])
    assert {len(part.tokens) for parts in backend.rounds[5:30] for part in parts} == {1, 32}
    assert len(backend.rounds[0][0].tokens) == 51


def test_a_short_prompt_does_not_wait_for_a_long_one(start: Start) -> None:
    backend = Watched("ab")
    scheduler = start(backend, context=8192, round_ms=1e9)
    with Gate(backend) as gate:
        first = scheduler.submit(asked(backend, "q<assistant>"))
        assert gate.reached.wait(PATIENCE)
        long = scheduler.submit(asked(backend, "z" * 3000 + "<assistant>"))
        short = scheduler.submit(asked(backend, "w" * 40 + "<assistant>"))
    assert [text_of(collect(job)[0]) for job in (first, long, short)] == ["ab"] * 3
    assert {len(part.tokens) for part in backend.rounds[1]} == {1, 41, CHUNK - 41}  # all of it at once


def test_keys_take_turns(start: Start) -> None:
    """Whose key has been served waits behind the others, however many it has sent before them."""
    backend = Watched("a")
    scheduler = start(backend, slots=1)
    with Gate(backend) as gate:
        jobs = [scheduler.submit(asked(backend, "1a<assistant>", key="a"))]
        assert gate.reached.wait(PATIENCE)
        jobs += [scheduler.submit(asked(backend, f"{name}<assistant>", key=name[1])) for name in ("2a", "3a", "4b")]
    for job in jobs:
        collect(job)
    begun = [bytes(part.tokens[:2]).decode() for parts in backend.rounds for part in parts if len(part.tokens) > 1]
    assert begun == ["1a", "4b", "2a", "3a"]


def test_cancelled_within_one_token(start: Start) -> None:
    backend = Watched("y" * 1000)
    scheduler = start(backend)
    jobs: list[Job] = []
    counts: list[int] = []

    def cancel(number: int) -> None:
        if number == 20:
            counts.append(scheduler.stats().decoded_tokens)
            jobs[0].cancel()

    backend.before = cancel
    with Gate(backend):
        jobs.append(scheduler.submit(asked(backend, "?<assistant>")))
        backend.before = cancel
    events = list(jobs[0].events)
    assert isinstance(events[-1], Ended) and events[-1].finish is None
    stats = scheduler.stats()
    assert stats.decoded_tokens - counts[0] <= 1 and stats.cancelled == 1
    assert (stats.running, stats.cells_reserved) == (0, 0)
    assert len(backend.rounds) == 20


def test_one_that_waits_can_be_cancelled_and_leaving_the_block_cancels(start: Start) -> None:
    backend = Watched("y" * 1000)
    scheduler = start(backend, slots=1)
    with Gate(backend) as gate:
        with scheduler.submit(asked(backend, "?<assistant>")) as job:
            assert gate.reached.wait(PATIENCE)
            other = scheduler.submit(asked(backend, "?<assistant>"))
            other.cancel()
        assert job.cancelled
    assert [type(event) for event in other.events] == [Ended]
    assert isinstance(list(job.events)[-1], Ended)
    assert scheduler.stats().cancelled == 2 and scheduler.stats().begun == 1


def test_a_full_queue_says_when_to_come_again(start: Start) -> None:
    backend = Watched("a")
    scheduler = start(backend, slots=1, queue=2)
    with Gate(backend) as gate:
        jobs = [scheduler.submit(asked(backend, "0<assistant>"))]
        assert gate.reached.wait(PATIENCE)
        jobs += [scheduler.submit(asked(backend, f"{i}<assistant>")) for i in (1, 2)]
        with pytest.raises(Busy, match="2 requests are waiting") as raised:
            scheduler.submit(asked(backend, "3<assistant>"))
        assert 1 <= raised.value.retry_after <= 60
        assert (scheduler.stats().waiting, scheduler.stats().refused) == (2, 1)
    assert [text_of(collect(job)[0]) for job in jobs] == ["a"] * 3


# ── the cache ──


def test_a_beginning_that_is_held_is_not_evaluated_again(start: Start) -> None:
    backend = Watched("first", "second")
    scheduler = start(backend)
    collect(scheduler.submit(asked(backend, "q" * 300 + "<assistant>")))
    before = backend.evaluated
    _, ended = collect(scheduler.submit(asked(backend, "q" * 300 + "<assistant>first<end>more<assistant>")))
    assert ended.turn.reused == 306  # the answer too, but its end, which was never evaluated
    assert backend.evaluated - before == 1 + 4 + 1 + len("second")
    assert scheduler.stats().reused_tokens == 306


def test_several_answers_to_one_prompt_evaluate_it_once(start: Start) -> None:
    backend = Watched("abc")
    scheduler = start(backend)
    jobs = [scheduler.submit(asked(backend, "p" * 700 + "<assistant>", variation=i)) for i in range(4)]
    assert [text_of(collect(job)[0]) for job in jobs] == ["abc"] * 4
    assert backend.evaluated == 701 + 3 + 4 * len("abc")
    assert scheduler.stats().reused_tokens == 3 * 700


def test_a_running_slot_lends_its_beginning(start: Start) -> None:
    backend = Watched("y" * 50)
    scheduler = start(backend)
    late: list[Job] = []

    def newcomer(number: int) -> None:
        if number == 5:
            late.append(scheduler.submit(asked(backend, "system" * 50 + "other<assistant>")))

    backend.before = newcomer
    first = scheduler.submit(asked(backend, "system" * 50 + "one<assistant>"))
    assert text_of(collect(first)[0]) == text_of(collect(late[0])[0]) == "y" * 50
    assert collect_begun(backend, scheduler, "system" * 50 + "third<assistant>") == 300


def collect_begun(backend: Backend, scheduler: Scheduler, text: str) -> int:
    """How much of a prompt is reused."""
    return collect(scheduler.submit(asked(backend, text)))[1].turn.reused


def test_what_was_unused_for_longest_makes_room(start: Start) -> None:
    backend = Watched("a")
    scheduler = start(backend, context=1000, slots=3)
    limited = replace(GREEDY, max_tokens=10)
    for letter in "ABC":
        collect(scheduler.submit(asked(backend, letter * 300 + "<assistant>", limited)))
    assert scheduler.stats().evictions == 0
    collect(scheduler.submit(asked(backend, "A" * 300 + "<assistant>", limited)))  # A is used again
    collect(scheduler.submit(asked(backend, "D" * 300 + "<assistant>", limited)))  # B must go
    assert scheduler.stats().evictions == 1
    assert collect_begun(backend, scheduler, "A" * 300 + "<assistant>") == 300
    assert collect_begun(backend, scheduler, "C" * 300 + "<assistant>") == 300
    assert collect_begun(backend, scheduler, "B" * 300 + "<assistant>") == 0


def test_answers_under_way_never_lack_room(start: Start) -> None:
    """More is asked for at once than there is: newcomers wait, and nobody's answer is cut or fails."""
    backend = Watched("y" * 90)
    scheduler = start(backend, context=512, slots=4)
    reserved: list[int] = []
    backend.before = lambda number: reserved.append(scheduler.stats().cells_reserved)
    sampling = replace(GREEDY, max_tokens=80)
    jobs = [scheduler.submit(asked(backend, f"{i}" * 100 + "<assistant>", sampling)) for i in range(8)]
    for job in jobs:
        steps, ended = collect(job)
        assert ended.finish == "length" and len(steps) == 80
    assert 181 < max(reserved) <= 512
    used = [session._cells.used for session in backend.sessions]
    assert [scheduler.stats().cells_used] == used


@pytest.mark.parametrize("can_rewind", [True, False])
def test_books_are_kept_whatever_comes(start: Start, can_rewind: bool) -> None:
    """Prompts with common beginnings, seeds, cancellations, too little room: held, counted and promised cells agree."""
    backend = Watched("the answer", can_rewind=can_rewind)
    scheduler = start(backend, context=160, slots=4, queue=1000)
    chance = random.Random(4)
    jobs: list[Job] = []

    def check(number: int) -> None:
        slots, session = scheduler._held, backend.sessions[-1]
        assert slots is not None and len(backend.sessions) == 1
        assert [slot.tokens for slot in slots.all] == session.held
        assert slots.used == session._cells.used
        assert slots.used + sum(slot.owed for slot in slots.all) <= 160
        if number % 3 == 0:
            for _ in range(chance.randrange(4)):
                text = "".join(chance.choice(("aaaaaaaa", "bbbb")) for _ in range(chance.randrange(1, 9)))
                seed, most = chance.choice((None, None, 5)), chance.choice((None, 3, 30))
                sampling = replace(GREEDY, seed=seed, max_tokens=most)
                jobs.append(scheduler.submit(asked(backend, text + "<assistant>", sampling)))
        if number % 5 == 0:
            chance.choice(jobs).cancel()

    backend.before = lambda number: check(number) if number < 600 else None
    jobs.append(scheduler.submit(asked(backend, "?<assistant>")))
    for job in jobs:
        steps, ended = collect(job)
        if not job.cancelled:
            assert text_of(steps) == ("the" if ended.finish == "length" else "the answer")
    stats = scheduler.stats()
    assert len(jobs) > 100 and stats.ended > 50 and stats.cancelled > 10 and stats.failed == 0
    assert stats.reused_tokens > 0 or not can_rewind
    assert stats.cells_reserved == 0


def test_an_answer_without_an_end_of_its_own_gets_what_is_left(start: Start) -> None:
    backend = Watched("y" * 10_000)
    scheduler = start(backend, context=600, slots=4)
    collect(scheduler.submit(asked(backend, "old" * 50 + "<assistant>", replace(GREEDY, max_tokens=5))))
    steps, ended = collect(scheduler.submit(asked(backend, "?<assistant>")))
    assert ended.finish == steps[-1].finish == "context"
    assert len(steps) == 600 - 2 + 1  # all of it: what an idle slot remembered as well
    assert scheduler.stats().failed == 0


def test_a_model_that_cannot_rewind_reads_anew(start: Start) -> None:
    backend = Watched("first", "second", can_rewind=False)
    scheduler = start(backend, slots=2)
    for _ in range(3):
        steps, ended = collect(scheduler.submit(asked(backend, "q" * 300 + "<assistant>")))
        assert text_of(steps) == "first"
    assert ended.turn.reused == 0
    # what is held whole can be gone on with
    steps, ended = collect(scheduler.submit(asked(backend, "q" * 300 + "<assistant>first<end>more<assistant>")))
    assert (text_of(steps), ended.turn.reused) == ("second", 306)


# ── failures ──


def test_after_a_failed_round_the_scheduler_goes_on(start: Start) -> None:
    backend = Watched("y" * 100)
    scheduler = start(backend, slots=2)

    def fail(number: int) -> None:
        if number == 10:
            raise EngineError("the engine fell over")
        if number == 11:
            raise ZeroDivisionError

    backend.before = fail
    with Gate(backend) as gate:
        jobs = [scheduler.submit(asked(backend, f"{i}<assistant>")) for i in range(2)]
        assert gate.reached.wait(PATIENCE)
        third = scheduler.submit(asked(backend, "3<assistant>"))  # waits while they fail
        backend.before = fail
    for job in jobs:
        last = list(job.events)[-1]
        assert isinstance(last, Failed) and last.error.message == "the engine fell over"
    last = list(third.events)[-1]
    assert isinstance(last, Failed) and "ZeroDivisionError" in last.error.message
    steps, _ = collect(scheduler.submit(asked(backend, "0<assistant>")))
    assert text_of(steps) == "y" * 100
    stats = scheduler.stats()
    assert (stats.failed, stats.remade, stats.ended, stats.running) == (3, 2, 1, 0)
    assert len(backend.sessions) == 3


def test_logits_that_are_no_numbers_fail_only_the_answer_they_are_of(start: Start) -> None:
    class Broken(Watched):
        def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> ScriptedSession:
            return BrokenSession(self, context, sequences)

    class BrokenSession(_WatchedSession):
        def eval_parts(self, parts: Sequence[Part]) -> list[Floats]:
            rows = super().eval_parts(parts)
            for part, row in zip(parts, rows, strict=True):
                if self.held[part.sequence][0] == ord("X"):
                    row[:] = np.nan
            return rows

    backend = Broken("abc")
    scheduler = start(backend)
    good, bad = (scheduler.submit(asked(backend, f"{name}<assistant>")) for name in "AX")
    assert text_of(collect(good)[0]) == "abc"
    with pytest.raises(EngineError, match="not a number"):
        collect(bad)
    assert scheduler.stats().remade == 0


def test_a_session_that_does_not_fit_is_told_at_once() -> None:
    class Full(Watched):
        def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> ScriptedSession:
            raise EngineError("no memory for it")

    with pytest.raises(EngineError, match="no memory"):
        Scheduler(Full("a"), context=4096)


def test_calls_run_in_the_engine_thread_between_rounds(start: Start) -> None:
    backend = Watched("y" * 50)
    scheduler = start(backend)
    job = scheduler.submit(asked(backend, "?<assistant>"))
    names = [scheduler.call(lambda: threading.current_thread().name).result(PATIENCE) for _ in range(3)]
    assert names == ["llmkit engine"] * 3
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 // 0).result(PATIENCE)
    assert text_of(collect(job)[0]) == "y" * 50


def test_a_model_that_only_reads_can_be_called(start: Start) -> None:
    backend = Watched()
    backend.info = replace(backend.info, generates=False)
    scheduler = start(backend)
    with pytest.raises(Unsupported, match="vectors"):
        scheduler.submit(Request((65,)))
    assert backend.sessions == []
    assert scheduler.call(lambda: backend.pool([65]).shape).result(PATIENCE) == (9,)


def test_closing_ends_everything() -> None:
    backend = Watched("y" * 1000)
    scheduler = Scheduler(backend, context=4096, slots=1)
    with Gate(backend) as gate:
        jobs = [scheduler.submit(asked(backend, f"{i}<assistant>")) for i in range(2)]
        assert gate.reached.wait(PATIENCE)
        future = scheduler.call(lambda: 1)
        closing = threading.Thread(target=scheduler.close)
        closing.start()
        while not scheduler._closed:
            pass
    closing.join(PATIENCE)
    for job in jobs:
        last = list(job.events)[-1]
        assert isinstance(last, Failed) and isinstance(last.error, Closed)
    assert isinstance(future.exception(PATIENCE), Closed)
    for function in (lambda: scheduler.submit(asked(backend, "?<assistant>")), lambda: scheduler.call(lambda: 1)):
        with pytest.raises(Closed):
            function()
    scheduler.close()


# ── real models ──

QUESTIONS = (
    "What is the capital of France?", "Write a poem about rain.", "Why is the sky blue?", "Name three fruits.",
    "Tell me a story about a dog.", "What is 12 times 12?", "How do I boil an egg?", "Who wrote Hamlet?",
)  # fmt: skip
# Engines round by how many tokens are evaluated at once, more where activations are quantized: measured on two CPUs,
# greedy answers of SmolLM2 in F32 part only where the two best logits are within 0.008, in Q4_1 within 0.08
NEAR = {"f32": 1e-2, "q4_1": 0.3}


def question(backend: Backend, text: str, sampling: Sampling, **options: object) -> Request:
    return asked(backend, f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", sampling, **options)


def gap(step: Step) -> float:
    """Between the two most likely tokens."""
    return step.alternatives[0].logprob - step.alternatives[1].logprob


def assert_same_but_for_rounding(one: Sequence[Step], other: Sequence[Step], near: float) -> int:
    """Up to the first token where the two best were as good as equal in one of the two; how many were compared."""
    for count, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine.id != its.id:
            assert min(gap(mine), gap(its)) <= near, f"token {count}: {gap(mine):.4f}, {gap(its):.4f}"
            return count
        assert mine.logprob == pytest.approx(its.logprob, abs=2 * near)
    assert len(one) == len(other)
    return len(one)


def test_eight_at_once_say_what_each_says_alone(smol: Backend, start: Start) -> None:
    """A mixed-up sequence, position or row would be off by whole units, not by the rounding allowed here."""
    scheduler = start(smol, slots=8)
    sampling = replace(GREEDY, max_tokens=12)
    requests = [question(smol, text, sampling, n_alternatives=2) for text in QUESTIONS]
    alone = [collect(scheduler.submit(request))[0] for request in requests]
    jobs = [scheduler.submit(request) for request in requests]
    together = [collect(job)[0] for job in jobs]
    compared = [assert_same_but_for_rounding(*pair, NEAR["q4_1"]) for pair in zip(alone, together, strict=True)]
    assert sum(compared) > 8 * 12 / 2
    assert text_of(together[0]).startswith("The capital of France is Paris.")
    stats = scheduler.stats()
    assert stats.rounds < stats.decoded_tokens  # they did run together
    assert stats.reused_tokens > 0 and stats.cells_reserved == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_f32_rounding_is_within_a_hundredth(
    family: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, start: Start
) -> None:
    """gemma3 has sliding windows: what slid out of one must not be missed where a beginning is shared."""
    backend = backends.load(gguf_of(tiny_checkpoint(family), "f32"), n_threads=1)
    scheduler = start(backend, slots=8, context=2048)
    prompts = [tuple((7 * (i // 2) + 3 * k) % backend.info.n_vocab for k in range(40 + 3 * i)) for i in range(8)]
    requests = [Request(prompt, replace(GREEDY, max_tokens=40), n_alternatives=2) for prompt in prompts]
    alone = [collect(scheduler.submit(request))[0] for request in requests]
    jobs = [scheduler.submit(request) for request in requests]
    for one, job in zip(alone, jobs, strict=True):
        assert_same_but_for_rounding(one, collect(job)[0], NEAR["f32"])
    scheduler.close()
    backend.close()


def test_a_seed_gives_the_same_answer_whatever_came_before(smol: Backend, start: Start) -> None:
    """The second time part of the prompt is held, and other conversations lie in the cache."""
    scheduler = start(smol, slots=3)
    long = "The keeper wrote in his book: wind from the west, two ships, rain. " * 20
    request = question(smol, long, Sampling(temperature=1, seed=11, max_tokens=16))
    first, ended = collect(scheduler.submit(request))
    for text in QUESTIONS[:2]:
        collect(scheduler.submit(question(smol, text, Sampling(max_tokens=2))))
    again, later = collect(scheduler.submit(request))
    assert [step.id for step in again] == [step.id for step in first]
    assert (ended.turn.reused, later.turn.reused) == (0, 256)


def test_several_answers_differ_and_share_their_prompt(smol: Backend, start: Start) -> None:
    scheduler = start(smol, slots=4)
    sampling = Sampling(temperature=1, seed=3, max_tokens=8)
    jobs = [scheduler.submit(question(smol, QUESTIONS[4] * 8, sampling, variation=i)) for i in range(3)]
    answers = [collect(job) for job in jobs]
    assert len({text_of(steps) for steps, _ in answers}) == 3
    prompt = len(jobs[0].request.prompt)
    assert [ended.turn.reused for _, ended in answers] == [0, prompt - 1, prompt - 1]


def test_a_schema_is_kept_beside_other_answers(smol: Backend, start: Start) -> None:
    scheduler = start(smol)
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    sampling = Sampling(temperature=0, max_tokens=40, json_schema=json.dumps(schema))
    jobs = [
        scheduler.submit(question(smol, "How old is the dog?", sampling)),
        scheduler.submit(question(smol, QUESTIONS[1], replace(GREEDY, max_tokens=8))),
    ]
    steps, _ = collect(jobs[0])
    assert isinstance(json.loads(text_of(steps))["age"], int)
    collect(jobs[1])
    with pytest.raises(LlmkitError, match="grammar"):
        scheduler.submit(question(smol, "?", Sampling(grammar="this is none")))


def test_a_real_model_stops_within_one_token(smol: Backend, start: Start) -> None:
    scheduler = start(smol)
    job = scheduler.submit(question(smol, QUESTIONS[4], replace(GREEDY, max_tokens=500)))
    came = 0
    for event in job.events:
        came += isinstance(event, Step)
        if came == 3:
            before = scheduler.stats().decoded_tokens
            job.cancel()
            break
    last = list(job.events)[-1]
    assert isinstance(last, Ended) and last.finish is None
    assert scheduler.stats().decoded_tokens - before <= 1
    assert scheduler.stats().running == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlx", "transformers"])
def test_other_backends_serve_as_well(
    name: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, start: Start
) -> None:
    pytest.importorskip("torch" if name == "transformers" else "mlx.core")
    folder = tiny_checkpoint("llama")
    backend = backends.load(folder if name == "transformers" else gguf_of(folder, "f32"), backend=name, n_threads=1)
    scheduler = start(backend, slots=3, context=600)
    prompts = [tuple((7 * i + 3 * k) % backend.info.n_vocab for k in range(50)) for i in range(4)]
    requests = [Request(prompt, replace(GREEDY, max_tokens=8), n_alternatives=2) for prompt in prompts]
    alone = [collect(scheduler.submit(request))[0] for request in requests]
    jobs = [scheduler.submit(request) for request in [*requests, *requests]]
    together = [collect(job)[0] for job in jobs]
    for one, other in zip([*alone, *alone], together, strict=True):
        assert_same_but_for_rounding(one, other, NEAR["f32"])
    assert scheduler.stats().failed == 0 and scheduler.stats().reused_tokens >= 2 * 49
    scheduler.close()
    backend.close()
