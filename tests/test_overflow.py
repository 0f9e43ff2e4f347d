"""chat/overflow.py: a conversation that no longer fits; what leaves is whole turns, and is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.backends import Backend
from llmkit.backends.scripted import ASSISTANT, END, TEMPLATE, Scripted
from llmkit.chat import Chat, ContextFull, Conversation, Message, Sampling, Step
from llmkit.chat import overflow as policies
from llmkit.errors import Unsupported

GREEDY = Sampling(temperature=0)


class Numbered(Scripted):
    """Answers "A1." to a question that ends in 1, "A2." to one in 2 …, however many came before; sums up as told."""

    def next_token(self, tokens: Sequence[int]) -> int:
        tokens = list(tokens)
        at = len(tokens) - 1 - tokens[::-1].index(ASSISTANT) if ASSISTANT in tokens else len(tokens)
        question = bytes(token for token in tokens[:at] if token < 256).decode()
        answer = "SUM" if question.endswith("Write only the summary.") else f"A{question[-1:]}."
        said = len(tokens) - at - 1
        return ord(answer[said]) if 0 <= said < len(answer) else END


def said(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


def asked(chat: Chat, *questions: str) -> list[str]:
    return [said(list(chat.say(question))) for question in questions]


def prompt(chat: Chat, node: int) -> str:
    """What the model was given for that answer."""
    return b"".join(map(chat.backend.piece, chat.answers[node].prompt)).decode()


def test_stop_tells_the_numbers_and_the_choices() -> None:
    chat = Chat(Numbered([]), system="sys", sampling=GREEDY, context=40)
    asked(chat, "question 1", "question 2")
    evaluated, before = chat._context.calls, chat.tree.to_json()
    with pytest.raises(ContextFull) as caught:
        list(chat.say("question 3"))
    # sys<end> q<end> <assistant>A1.<end> q<end> <assistant>A2.<end> q<end> <assistant>
    assert caught.value.needed == 4 + 11 + 5 + 11 + 5 + 11 + 1 == 48 and caught.value.total == 40
    assert caught.value.choices == ("slide", "summarise") and "slide" in (caught.value.hint or "")
    assert str(caught.value) == "the conversation is 48 tokens long, the context holds 40"
    assert chat._context.calls == evaluated and chat.tree.to_json() == before
    chat.overflow = "slide"  # the user has chosen
    assert asked(chat, "question 3") == ["A3."]


def test_sliding_drops_whole_turns_keeps_the_system_prompt_and_tells() -> None:
    chat = Chat(Numbered([]), system="sys", sampling=GREEDY, context=60, overflow="slide")
    asked(chat, "question 1", "question 2", "question 3")
    assert chat.turn is not None and chat.turn.dropped is None
    asked(chat, "question 4")
    assert chat.turn.dropped is not None and chat.turn.dropped.nodes == (0, 1, 2, 3)
    assert chat.turn.dropped.tokens == 2 * 16 and chat.turn.dropped.summary is None
    # a quarter of the context is free, and the next turns find what they know
    assert prompt(chat, 7) == "sys<end>question 3<end><assistant>A3.<end>question 4<end><assistant>"
    asked(chat, "x 5")
    assert chat.turn.dropped is None and chat.turn.reused == len(chat.answers[7].prompt) + 3
    assert [each.text for each in chat.in_context] == ["sys", "question 3", "A3.", "question 4", "A4.", "x 5", "A5."]
    assert len(chat.messages) == 10 and chat.messages[0] == Message("user", "question 1")  # all of it is still there


def test_a_branch_from_before_the_slide_has_everything() -> None:
    chat = Chat(Numbered([]), sampling=GREEDY, context=60, overflow="slide")
    asked(chat, "question 1", "question 2", "question 3", "question 4")
    assert chat.turn is not None and chat.turn.dropped is not None
    list(chat.retry())
    assert chat.turn.dropped is None  # it left with the question already
    chat.switch(3)
    assert [each.text for each in chat.in_context] == ["question 1", "A1.", "question 2", "A2."]
    asked(chat, "b 3")
    assert prompt(chat, chat.tree.head or 0).startswith("question 1<end>")


def test_a_question_too_long_by_itself_is_refused_whatever_was_chosen() -> None:
    for overflow in policies.POLICIES:
        chat = Chat(Numbered([]), system="sys", sampling=GREEDY, context=30, overflow=overflow)
        asked(chat, "q 1")
        with pytest.raises(ContextFull) as caught:
            list(chat.say("a question that goes on and on and on"))
        choices = policies.POLICIES[1:] if overflow == "stop" else ()
        assert caught.value.choices == choices
        assert len(chat.messages) == 2 and chat.conversation.dropped == {}
        with pytest.raises(ContextFull) as caught:
            list(Chat(Numbered([]), context=20, overflow=overflow).say("x" * 19))
        assert caught.value.needed == 21 and caught.value.choices == ()


LONG = [f"{'a long question ' * 10}{n}" for n in range(1, 9)]  # 161 characters, 167 with its answer and the ends


def test_a_summary_stands_for_what_left() -> None:
    chat = Chat(Numbered([]), system="sys", sampling=GREEDY, context=700, overflow="summarise")
    asked(chat, *LONG[:4])
    event = chat.turn.dropped if chat.turn else None
    # with room for the longest summary, and a quarter of the context
    assert event is not None and event.summary == "SUM" and event.nodes == (0, 1, 2, 3)
    system = chat.in_context[0]
    assert system == Message("system", f"sys\n\n{policies.MARK}\nSUM")
    assert prompt(chat, 7).startswith(f"sys\n\n{policies.MARK}\nSUM<end>a long")
    assert event.tokens == 2 * 167 - len(f"\n\n{policies.MARK}\nSUM")
    # the next summary is of the first one, too, and takes its place
    asked(chat, *LONG[4:])
    summaries = [each.summary for each in chat.conversation.dropped.values()]
    assert len(summaries) > 1 and set(summaries) == {"SUM"} and prompt(chat, chat.tree.head or 0).count("SUM") == 1


def test_a_conversation_is_summarised_where_it_already_is() -> None:
    """The old turns are in the context: only the request for the summary is evaluated."""
    chat = Chat(Numbered([]), sampling=GREEDY, context=700, overflow="summarise")
    asked(chat, *LONG[:3])
    session = chat._context._session
    before = session.evaluated  # type: ignore[union-attr]
    asked(chat, LONG[3])
    request = len(policies.request(700)) + 2
    answers = len("SUM") + len("A4.")
    assert session.evaluated - before == request + answers + len(chat.answers[7].prompt)  # type: ignore[union-attr]


def test_what_is_too_long_for_one_summary_is_summarised_in_parts() -> None:
    large = Chat(Numbered([]), sampling=GREEDY, context=2000)
    asked(large, *LONG)
    small = Chat(Numbered([]), context=700, conversation=large.conversation, overflow="summarise")
    asks = 0

    class Counting(Numbered):
        def next_token(self, tokens: Sequence[int]) -> int:
            nonlocal asks
            asks += bytes(token for token in tokens if token < 256).endswith(b"Write only the summary.SU")
            return super().next_token(tokens)

    small.change(Counting([]))
    asked(small, "now 9")
    assert asks == 3 and small.turn is not None and small.turn.dropped is not None
    assert small.turn.dropped.nodes == tuple(range(12)) and small.turn.dropped.summary == "SUM"


def test_a_model_that_thinks_does_not_think_about_its_summary() -> None:
    template = TEMPLATE + "{% if add_generation_prompt and enable_thinking is not defined %}<think>{% endif %}"
    rendered: list[str] = []

    class Reading(Numbered):
        def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
            rendered.append(text)
            return super().encode(text, special=special, bos=bos)

    chat = Chat(Reading([], template=template), sampling=GREEDY, context=700)
    asked(chat, *LONG[:3])
    chat.overflow = "summarise"
    asked(chat, LONG[3])
    requests = [text for text in rendered if "only the summary.<end>" in text]
    assert requests and not any(text.endswith("<think>") for text in requests)
    assert chat.turn is not None and chat.turn.dropped is not None and rendered[-1].endswith("<think>")


def test_no_room_for_a_summary_is_told_before_anything_changes() -> None:
    chat = Chat(Numbered([]), sampling=GREEDY, context=60, overflow="summarise")
    asked(chat, "question 1", "question 2", "question 3")
    with pytest.raises(ContextFull) as caught:
        list(chat.say("question 4"))
    assert caught.value.choices == ("slide",) and len(chat.messages) == 6 and chat.conversation.dropped == {}


def test_an_answer_that_fills_the_context_goes_on_after_sliding() -> None:
    class Long(Numbered):
        def next_token(self, tokens: Sequence[int]) -> int:
            before, _, said = bytes(min(token, 255) for token in tokens).rpartition(bytes([255]))
            return ord(str(len(said) % 10)) if before.endswith(b"L\xff") else super().next_token(tokens)

    chat = Chat(Long([]), system="sys", sampling=GREEDY, context=60)
    asked(chat, "question 1", "question 2")
    shown = asked(chat, "L")[0]
    assert chat.turn is not None and chat.turn.finish == "context" and chat.used == 60
    prompt_length = len(chat.answers[5].prompt)
    assert shown == "".join(str(i % 10) for i in range(61 - prompt_length))
    with pytest.raises(ContextFull) as caught:
        list(chat.go_on())
    assert caught.value.needed == 61
    chat.overflow = "slide"
    shown += said(list(chat.go_on()))
    assert shown == "".join(str(i % 10) for i in range(len(shown))) == chat.messages[-1].text
    assert chat.turn.dropped is not None and chat.turn.dropped.nodes == (0, 1)
    assert chat.turn.finish == "context" and len(shown) == 61 - (prompt_length - 16)
    assert chat.answers[5].given == 61 - prompt_length and len(chat.answers[5].steps) == len(shown)
    shown += said(list(chat.go_on()))
    assert chat.turn.dropped.nodes == (2, 3) and len(shown) == 61 - len("sys L") - 2
    with pytest.raises(ContextFull):  # now there is nothing left to drop
        list(chat.go_on())
    assert chat.messages[-1].text == shown


def test_an_unknown_policy() -> None:
    with pytest.raises(Unsupported, match="'slid'") as caught:
        Chat(Scripted([]), overflow="slid")  # type: ignore[arg-type]
    assert "slide" in (caught.value.hint or "")


def test_a_conversation_loaded_into_a_smaller_context() -> None:
    large = Chat(Numbered([]), sampling=GREEDY, context=200)
    asked(large, *(f"question {n}" for n in range(1, 7)))
    kept = Conversation.from_json(large.conversation.to_json())
    small = Chat(Numbered([]), context=50, conversation=kept, overflow="slide")
    assert small.used > small.total  # and it says so
    assert asked(small, "question 7") == ["A7."] and small.used <= 50
    assert small.turn is not None and small.turn.dropped is not None
    assert small.turn.dropped.nodes == tuple(range(10))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=12),
    st.integers(30, 120),
    st.sampled_from(["slide", "summarise"]),
    st.booleans(),
)
def test_nothing_is_cut_silently(lengths: list[int], context: int, overflow: policies.Overflow, system: bool) -> None:
    """What the model is given is the system prompt and an unbroken run of whole turns up to the question; what is
    missing has been told."""
    chat = Chat(Numbered([]), system="sys" if system else None, sampling=GREEDY, context=context, overflow=overflow)
    told: set[int] = set()
    for number, length in enumerate(lengths):
        question = "q" * length + str(number % 10)
        before = len(chat.tree.nodes)
        try:
            list(chat.say(question))
        except ContextFull as error:
            assert error.total == context and len(chat.tree.nodes) == before
            continue
        assert chat.turn is not None and chat.tree.head is not None
        told |= set(chat.turn.dropped.nodes if chat.turn.dropped else ())
        there = [node.text for node in chat.tree.path() if node.id not in told]
        given_ = [each.text for each in chat.in_context if each.role != "system"]
        assert given_ == there and len(there) % 2 == 0
        assert min(node.id for node in chat.tree.path() if node.id not in told) == len(told)  # the oldest left
        assert ("sys" in chat.in_context[0].text) is (system or chat.in_context[0].role == "system")
        assert chat.turn.prompt == len(chat.answers[chat.tree.head].prompt) < context


# ── the real thing ──


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["slide", "summarise"])
def test_a_small_context_over_many_turns(smol: Backend, overflow: policies.Overflow) -> None:
    sampling = Sampling(temperature=0, max_tokens=24)
    chat = Chat(smol, system="Answer briefly.", sampling=sampling, context=160, overflow=overflow, n_alternatives=0)
    dropped: list[int] = []
    for country in ("France", "Italy", "Spain", "Japan", "Peru"):
        list(chat.say(f"What is the capital of {country}?"))
        turn, session = chat.turn, chat._context._session
        assert turn is not None and session is not None
        assert chat.used == session.n <= 160
        dropped += turn.dropped.nodes if turn.dropped else ()
        if turn.dropped:
            assert (turn.dropped.summary is not None) is (overflow == "summarise")
            assert turn.prompt <= 160 * 3 // 4
    assert dropped and dropped == list(range(len(dropped)))
    assert "Answer briefly." in chat.in_context[0].text
    chat.close()
