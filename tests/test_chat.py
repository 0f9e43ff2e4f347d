"""chat/: conversations over the scripted backend (exact) and over SmolLM2 (the real thing)."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from conftest import cli_environment
from llmkit.backends import Backend, scripted
from llmkit.backends.scripted import Scripted
from llmkit.chat import Answer, Chat, Message, Sampling, Step
from llmkit.errors import EngineError, InvalidModel, LlmkitError, Unsupported

GREEDY = Sampling(temperature=0)


def said(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


# ── answers, exactly ──


def test_an_answer_step_by_step() -> None:
    chat = Chat(Scripted(["Hi 🙂"]), sampling=GREEDY, context=100, n_alternatives=2)
    steps = list(chat.say("Hello"))
    assert [step.piece for step in steps] == [bytes([byte]) for byte in "Hi 🙂".encode()] + [b"<end>"]
    assert [step.text for step in steps] == ["H", "i", " ", "", "", "", "🙂", ""]
    assert [step.finish for step in steps] == [None] * 7 + ["end"]
    assert chat.messages == [Message("user", "Hello"), Message("assistant", "Hi 🙂")]
    first = steps[0]
    # the script gives the next token a logit of 12, the 258 others 0
    p = math.exp(12) / (math.exp(12) + 258)
    assert first.logprob == pytest.approx(math.log(p), abs=1e-6)
    assert [other.id for other in first.alternatives] == [ord("H"), 0]
    assert first.alternatives[0].piece == b"H" and first.alternatives[0].logprob == first.logprob
    rest = 1 / (math.exp(12) + 258)
    assert first.entropy == pytest.approx(-(p * math.log2(p) + 258 * rest * math.log2(rest)), abs=1e-5)
    assert first.rank == 1 and first.sampled_probability == 1.0
    assert all(step.ms >= 0 for step in steps)


def test_a_second_turn_evaluates_only_what_is_new() -> None:
    backend = Scripted(["One.", "Two."])
    chat = Chat(backend, system="Count.", sampling=GREEDY, context=200)
    list(chat.say("First"))
    session = chat._context._session
    assert isinstance(session, scripted.ScriptedSession)
    assert chat.turn is not None and (chat.turn.reused, chat.turn.prompt) == (0, len("Count.") + len("First") + 3)
    before, held = session.evaluated, chat.used
    assert said(list(chat.say("Next"))) == "Two."
    assert chat.turn is not None
    assert chat.turn.reused == held
    assert chat.turn.prompt == held + len("Next") + 3  # <end>, Next, <end>, <assistant>
    assert session.evaluated - before == chat.turn.prompt - chat.turn.reused + len("Two.")


def test_the_last_token_of_a_known_prompt_is_evaluated_again() -> None:
    chat = Chat(Scripted(["One."]), sampling=GREEDY, context=200)
    list(chat.say("First"))
    chat.clear()
    assert said(list(chat.say("First"))) == "One."
    assert chat.turn is not None and chat.turn.reused == chat.turn.prompt - 1


def test_a_model_that_cannot_rewind_begins_anew() -> None:
    chat = Chat(Scripted(["One.", "Two."], can_rewind=False), sampling=GREEDY, context=200)
    list(chat.say("First"))
    chat.clear()
    assert said(list(chat.say("Another"))) == "One."
    assert chat.turn is not None and chat.turn.reused == 0


def test_a_stop_string_ends_the_answer() -> None:
    chat = Chat(Scripted(["yes\nUser: no"]), sampling=GREEDY, context=100, stop=["\nUser:"])
    steps = list(chat.say("?"))
    assert said(steps) == "yes" and steps[-1].finish == "stop"
    assert chat.messages[-1].text == "yes"


def test_a_length_ends_the_answer() -> None:
    chat = Chat(Scripted(["12345"]), sampling=Sampling(temperature=0, max_tokens=3), context=100)
    steps = list(chat.say("?"))
    assert said(steps) == "123" and steps[-1].finish == "length" and len(steps) == 3


def test_a_full_context_ends_the_answer_and_says_so() -> None:
    chat = Chat(Scripted(["123456789"]), sampling=GREEDY, context=8)
    steps = list(chat.say("hello"))  # 7 tokens of prompt: room for one more
    assert said(steps) == "12" and steps[-1].finish == "context"
    assert (chat.used, chat.total) == (8, 8)
    assert chat.turn is not None and chat.turn.finish == "context"


def test_a_conversation_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    chat = Chat(Scripted(["Hi."]), sampling=GREEDY, context=20)
    list(chat.say("hello"))
    before = list(chat.messages)
    with pytest.raises(LlmkitError, match=r"\d+ tokens long, the context holds 20") as caught:
        list(chat.say("a question that is far too long"))
    assert "--context" in (caught.value.hint or "")
    assert chat.messages == before
    chat.clear()
    assert said(list(chat.say("hello"))) == "Hi."


def test_closing_keeps_the_partial_answer_and_the_conversation_goes_on() -> None:
    chat = Chat(Scripted(["A long answer.", "Two."]), sampling=GREEDY, context=200)
    answer = chat.say("First")
    for _ in range(6):
        next(answer)
    answer.close()
    assert chat.messages == [Message("user", "First"), Message("assistant", "A long")]
    assert chat.turn is not None and chat.turn.finish is None and chat.turn.generated == 6
    assert said(list(chat.say("Next"))) == "Two."


def fail(*_: object, **__: object) -> NoReturn:
    raise EngineError("out of memory")


def test_an_error_of_the_engine_keeps_what_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted(["A long answer."])
    chat = Chat(backend, sampling=GREEDY, context=200)
    answer = chat.say("First")
    next(answer)
    assert chat._context._session is not None
    monkeypatch.setattr(chat._context._session, "eval", fail)
    with pytest.raises(EngineError, match="out of memory"):
        list(answer)
    assert chat.messages[-1] == Message("assistant", "A")
    assert [step.text for step in chat.answers[1].steps] == ["A"] and chat.answers[1].finish is None
    assert said(list(chat.go_on())) == " long answer."  # in a new session
    assert chat.turn is not None and chat.turn.reused == 0
    assert chat.messages[-1] == Message("assistant", "A long answer.")


def test_logits_that_are_no_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(Scripted(["x"]), sampling=GREEDY, context=100)
    monkeypatch.setattr(scripted, "_LOGIT", float("nan"))
    with pytest.raises(EngineError, match="not a number"):
        list(chat.say("?"))
    assert chat.messages == []
    monkeypatch.undo()
    assert said(list(chat.say("?"))) == "x"


@pytest.mark.parametrize(("writes_bos", "expected"), [(True, 1), (False, 1)])
def test_one_beginning_of_text_whoever_writes_it(writes_bos: bool, expected: int) -> None:
    template = ("{{ bos_token }}" if writes_bos else "") + scripted.TEMPLATE
    chat = Chat(Scripted(["x"], template=template, add_bos=True), context=100)
    tokens = chat.prompt_tokens([Message("user", "hi")])
    assert tokens[0] == scripted.BOS and tokens.count(scripted.BOS) == expected


def test_a_model_without_template_stops_before_it_plays_the_user() -> None:
    class Dialogue(Scripted):
        def next_token(self, tokens: object) -> int:
            text = bytes(token for token in tokens if token < 256).decode()  # type: ignore[attr-defined]
            _, asked, said_so_far = text.rpartition("Assistant:")
            return b" Rome.\nUser: And then?"[len(said_so_far)] if asked else scripted.END

    chat = Chat(Dialogue([], template=None), sampling=GREEDY, context=200)
    steps = list(chat.say("Capital of Italy?"))
    assert said(steps) == " Rome." and steps[-1].finish == "stop"


def test_a_system_prompt_a_template_cannot_take_is_told() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + scripted.TEMPLATE
    chat = Chat(Scripted(["x"], template=template), system="Be brief.", sampling=GREEDY, context=100)
    list(chat.say("hi"))
    assert chat.turn is not None and chat.turn.merged_system


def test_a_system_prompt_nobody_asked_about_is_told_once() -> None:
    chat = Chat(Scripted(["x"]), system="Be brief.", context=100)
    assert [each.role for each in chat.in_context] == ["system"] and chat.messages == []
    assert chat.prompt([Message("user", "hi")]).text == "Be brief.<end>hi<end><assistant>"
    assert chat.cost([Message("user", "hi")]) == len("Be brief.") + len("hi") + 3


def test_the_meter_knows_that_the_context_holds_something_else() -> None:
    chat = Chat(Scripted(["One."]), sampling=GREEDY, context=100)
    list(chat.say("abc"))
    assert chat.used == chat._context.n == 9
    chat._context.fill([1, 2])  # as a summary that then failed would
    assert chat.used == len("abc") + len("One.") + 3


# ── the real thing ──


def test_the_capital_of_france_in_two_turns(smol: Backend) -> None:
    chat = Chat(smol, system="You are a helpful assistant.", sampling=Sampling(temperature=0, max_tokens=30))
    steps = list(chat.say("What is the capital of France?"))
    assert "Paris" in said(steps) and steps[-1].finish == "end"
    assert all(step.alternatives[0].id == step.id for step in steps)  # greedy takes the best
    assert all(0 <= step.entropy < math.log2(49152) for step in steps)
    held = chat.used
    assert "Rome" in said(list(chat.say("And of Italy?")))
    assert chat.turn is not None and chat.turn.reused == held  # the answer's own tokens are recognised
    assert chat.turn.tokens_per_second > 0
    assert chat.total == 4096
    chat.close()


def test_reusing_a_prefix_does_not_change_the_answer(smol: Backend) -> None:
    brief = Sampling(temperature=0, max_tokens=15)
    long, short = Chat(smol, sampling=brief, context=512), Chat(smol, sampling=brief, context=512)
    list(long.say("Name a fruit."))
    long.clear()
    short_answer = said(list(short.say("Name a planet.")))
    assert said(list(long.say("Name a planet."))) == short_answer
    assert long.turn is not None and long.turn.reused > 0
    long.close()
    short.close()


def seeded(**settings: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "seed": 42, "max_tokens": 24, **settings})


def begun(chat: Chat, question: str = "Tell me a story.") -> Answer:
    """The answer to a first question."""
    list(chat.say(question))
    assert chat.tree.head is not None
    return chat.answers[chat.tree.head]


def test_the_same_seed_gives_the_same_tokens(smol: Backend) -> None:
    def answer(seed: int | None) -> Answer:
        chat = Chat(smol, sampling=seeded(temperature=1.2, seed=seed, max_tokens=8), context=256)
        found = begun(chat)
        chat.close()
        return found

    first = answer(42)
    assert answer(42).tokens == first.tokens
    drawn = answer(None)
    assert drawn.sampling.seed == drawn.turn.seed
    assert answer(drawn.sampling.seed).tokens == drawn.tokens  # the seed that was drawn is told
    assert len({answer(seed).tokens for seed in range(3)}) > 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_tokens_in_another_process(smol: Backend, smollm2_gguf: Path) -> None:
    chat = Chat(smol, sampling=seeded(), context=256)
    here = begun(chat).tokens
    chat.close()
    program = (
        "import sys; from llmkit import backends; from llmkit.chat import Chat, Sampling\n"
        "chat = Chat(backends.load(sys.argv[1], n_threads=1), context=256,\n"
        "            sampling=Sampling(temperature=1.0, seed=42, max_tokens=24))\n"
        "list(chat.say('Tell me a story.')); print(*chat.answers[1].tokens)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, smollm2_gguf],
        capture_output=True, encoding="utf-8", env=cli_environment(), check=True,
    )  # fmt: skip
    assert tuple(map(int, done.stdout.split())) == here


@pytest.mark.parametrize("changed", [{}, {"temperature": 0}, {"mirostat": 2}], ids=["drawn", "greedy", "mirostat"])
def test_an_answer_gone_on_with_has_the_tokens_of_one_without_a_break(smol: Backend, changed: dict[str, Any]) -> None:
    sampling = seeded(**changed)
    chat = Chat(smol, sampling=sampling, context=256)
    whole = begun(chat)
    chat.clear()
    chat.sampling = replace(sampling, max_tokens=7)
    broken = begun(chat)
    assert broken.tokens == whole.tokens[:7]
    chat.sampling = replace(sampling, max_tokens=17)
    list(chat.go_on())
    assert chat.answers[1].tokens == whole.tokens and chat.answers[1].given == 0
    assert [step.sampled_probability for step in chat.answers[1].steps] == pytest.approx(
        [step.sampled_probability for step in whole.steps], rel=1e-4
    )
    assert chat.messages[-1].text == "".join(step.text for step in whole.steps)
    chat.close()


def test_a_token_clicked_gives_what_a_fresh_run_with_it_gives(smol: Backend) -> None:
    chat = Chat(smol, sampling=seeded(temperature=0, max_tokens=12), context=256)
    answer = begun(chat, "Name a fruit.")
    other = answer.steps[3].alternatives[1].id
    steps = list(chat.instead(1, 3, other))
    # the same by hand, in a session that holds nothing else
    session = smol.session(256)
    logits = session.eval([*answer.prompt, *answer.tokens[:3], other]).logits[-1]
    expected = [other]
    for _ in steps[1:]:
        expected.append(int(logits.argmax()))
        logits = session.eval([expected[-1]]).logits[-1]
    session.close()
    assert [step.id for step in steps] == expected
    assert chat.answers[2].tokens == (*answer.tokens[:3], *expected)
    assert chat.turn is not None and chat.turn.reused == len(answer.prompt) + 2
    # and its probability is the one it was shown with
    assert steps[0].logprob == pytest.approx(answer.steps[3].alternatives[1].logprob, abs=1e-3) and steps[0].rank == 2
    chat.close()


def test_the_token_that_was_there_changes_nothing(smol: Backend) -> None:
    chat = Chat(smol, sampling=seeded(), context=256)
    answer = begun(chat)
    list(chat.instead(1, 5, answer.tokens[5]))
    assert chat.answers[2].tokens[: len(answer.tokens)] == answer.tokens  # and max_tokens more
    assert chat.answers[2].variation == answer.variation
    chat.sampling = seeded(seed=None)
    list(chat.instead(1, 5))
    assert chat.answers[3].tokens[:5] == answer.tokens[:5] and chat.answers[3].tokens != answer.tokens
    chat.close()


def test_the_meter_tells_the_tokens_in_the_engine(smol: Backend) -> None:
    chat = Chat(smol, sampling=seeded(temperature=0, max_tokens=20), context=512)
    list(chat.say("Hi!"))
    session = chat._context._session
    assert (
        session is not None and chat.used == session.n == len(chat.answers[1].prompt) + len(chat.answers[1].steps) - 1
    )
    foreseen = chat.cost([*chat.messages, Message("user", "And you?")])
    list(chat.say("And you?"))
    assert chat.turn is not None and chat.turn.prompt == foreseen
    assert chat.used == session.n == foreseen + chat.turn.generated - 1
    # moved elsewhere, it tells what the conversation takes: the prompt without the beginning of the next answer
    chat.switch(1)
    opening = smol.encode("<|im_start|>assistant\n", special=True)
    assert chat.used == chat.cost(chat.messages) - len(opening)
    chat.close()


def test_details_off_say_so(smol: Backend) -> None:
    chat = Chat(smol, sampling=seeded(max_tokens=2), context=256, n_alternatives=0)
    for step in chat.say("Hi!"):
        assert math.isnan(step.logprob) and math.isnan(step.entropy) and step.rank == 0 and step.alternatives == ()
        assert 0 < step.sampled_probability <= 1
    chat.close()


def test_a_closed_session_is_made_anew(smol: Backend) -> None:
    chat = Chat(smol, sampling=seeded(temperature=0, max_tokens=6), context=256)
    answer = chat.say("Name a fruit.")
    next(answer)
    assert chat._context._session is not None
    chat._context._session.close()
    with pytest.raises(EngineError, match="closed"):
        list(answer)
    kept = chat.answers[1]
    assert len(kept.steps) == 1 and chat.messages[-1].text == kept.steps[0].text
    chat._context.close()  # closed between two answers, too
    list(chat.go_on())
    assert len(chat.answers[1].steps) == 7 and chat.answers[1].steps[0] == replace(kept.steps[0])
    chat.close()


def test_another_model_reads_the_conversation_anew(smol: Backend) -> None:
    chat = Chat(Scripted(["Rome."]), sampling=seeded(temperature=0, max_tokens=4), context=256)
    list(chat.say("Capital of Italy?"))
    chat.change(smol)
    assert chat.messages[-1].text == "Rome" and chat.total == 256 and chat.backend is smol
    list(chat.say("And of France?"))
    assert chat.turn is not None and chat.turn.reused == 0
    assert chat.answers[3].prompt == tuple(chat.prompt_tokens([node_message(chat, id) for id in (0, 1, 2)]))
    assert chat.held == (*chat.answers[3].prompt, *chat.answers[3].tokens[:-1])
    encoder = Scripted([])
    encoder.info = replace(encoder.info, generates=False)
    with pytest.raises(Unsupported):
        chat.change(encoder)
    broken = Scripted([], template="{% for %}")
    with pytest.raises(InvalidModel):
        chat.change(broken)
    assert chat.backend is smol and said(list(chat.retry()))
    chat.close()


def node_message(chat: Chat, id: int) -> Message:
    return Message(chat.tree.node(id).role, chat.tree.node(id).text)


def test_how_the_prompt_came_into_the_cache_is_told() -> None:
    chat = Chat(Scripted(["One.", "Two."]), sampling=GREEDY, context=200)
    list(chat.say("abc"))
    assert chat.answers[1].calls == ((5, 5),)
    list(chat.say("d"))
    # the first prompt at once, the answer's four bytes and its end one by one …
    assert chat.answers[3].calls == ((5, 5), (1, 1), (1, 1), (1, 1), (1, 1), (4, 4))
    assert sum(kept for _, kept in chat.answers[3].calls) == len(chat.answers[3].prompt)
    list(chat.retry())
    # … and now of the second prompt's four tokens the last one again
    assert chat.answers[4].calls == ((5, 5), *[(1, 1)] * 4, (4, 3), (1, 1))
