"""chat/: conversations over the scripted backend (exact) and over SmolLM2 (the real thing)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import backends
from llmkit.backends import Backend, scripted
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Message, Sampling, Step
from llmkit.chat.streams import TextStream
from llmkit.errors import EngineError, LlmkitError

GREEDY = Sampling(temperature=0)


def said(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


# ── text streams ──


@pytest.mark.parametrize("text", ["naïve", "東京 🙂🏽", "e\u0301\u200d", "plain"])
def test_half_characters_are_never_given(text: str) -> None:
    stream = TextStream()
    parts = [stream.feed(bytes([byte])) for byte in text.encode()]
    assert "".join(parts) == text == stream.text
    assert all(part in text and "\ufffd" not in part for part in parts)


def test_an_unfinished_character_is_dropped_at_the_end() -> None:
    stream = TextStream()
    assert stream.feed("a🙂".encode()[:3]) == "a"
    assert stream.finish() == "" and stream.text == "a"


def test_bytes_that_are_no_text_are_marked_once() -> None:
    stream = TextStream()
    assert stream.feed(b"a\xffb") == "a\ufffdb"


def test_a_possible_stop_string_is_held_back() -> None:
    stream = TextStream(["<end>", "\nUser:"])
    assert [stream.feed(piece) for piece in (b"a<", b"e", b"x<en")] == ["a", "", "<ex"]
    assert stream.feed(b"d>zzz") == "" and stream.stopped
    assert stream.feed(b"more") == "" == stream.finish()
    assert stream.text == "a<ex"


def test_what_was_held_back_comes_at_the_end() -> None:
    stream = TextStream(["\nUser:"])
    assert stream.feed(b"Hi\nUs") == "Hi"
    assert stream.finish() == "\nUs"


@settings(max_examples=300, deadline=None)
@given(st.text("ab<>é🙂", max_size=30), st.lists(st.text("ab<>é", min_size=1, max_size=3), max_size=3), st.data())
def test_streams_cut_at_the_first_stop_string_however_the_bytes_come(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    stream, given = TextStream(stop), ""
    for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        given += stream.feed(raw[begin:end])
    given += stream.finish()
    assert given == stream.text
    assert text.startswith(given)
    assert not any(word in given for word in stop)
    if not any(word in text for word in stop):
        assert given == text


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
    assert first.logprob == pytest.approx(math.log(p))
    assert [other.id for other in first.alternatives] == [ord("H"), 0]
    assert first.alternatives[0].piece == b"H" and first.alternatives[0].logprob == first.logprob
    rest = 1 / (math.exp(12) + 258)
    assert first.entropy == pytest.approx(-(p * math.log2(p) + 258 * rest * math.log2(rest)))
    assert all(step.ms >= 0 for step in steps)


def test_a_second_turn_evaluates_only_what_is_new() -> None:
    backend = Scripted(["One.", "Two."])
    chat = Chat(backend, system="Count.", sampling=GREEDY, context=200)
    list(chat.say("First"))
    session = chat._session
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


def test_an_error_of_the_engine_keeps_what_came_before_it() -> None:
    backend = Scripted(["A long answer."])
    chat = Chat(backend, sampling=GREEDY, context=200)
    answer = chat.say("First")
    next(answer)
    chat._session.eval = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        list(answer)
    assert chat.messages[-1] == Message("assistant", "A")


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
    tokens, _ = chat.encode_prompt([Message("user", "hi")])
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


# ── the real thing ──


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[Backend]:
    backend = backends.load(smollm2_gguf, n_threads=1)
    yield backend
    backend.close()


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
    long.messages[:] = []
    short_answer = said(list(short.say("Name a planet.")))
    assert said(list(long.say("Name a planet."))) == short_answer
    assert long.turn is not None and long.turn.reused > 0
    long.close()
    short.close()


def test_the_same_seed_gives_the_same_answer(smol: Backend) -> None:
    def answer(seed: int | None) -> tuple[str, int]:
        chat = Chat(smol, sampling=Sampling(temperature=1.2, seed=seed, max_tokens=8), context=256)
        text = said(list(chat.say("Tell me a story.")))
        chat.close()
        assert chat.turn is not None
        return text, chat.turn.seed

    first = answer(42)
    assert answer(42) == first
    drawn = answer(None)
    assert answer(drawn[1]) == drawn  # the seed that was drawn is told
    assert len({answer(seed)[0] for seed in range(3)}) > 1
