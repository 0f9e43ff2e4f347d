"""chat/conversation.py: moving in the tree, going on with an answer, another token instead, exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.backends.scripted import END, Scripted
from llmkit.chat import Chat, Conversation, Sampling, Step
from llmkit.errors import LlmkitError, Unsupported

GREEDY = Sampling(temperature=0)


def said(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


def texts(chat: Chat) -> list[str]:
    return [each.text for each in chat.messages]


# ── moving in the tree ──


def test_a_retry_is_a_sibling_and_both_stay() -> None:
    chat = Chat(Scripted(["One.", "Two."]), sampling=GREEDY, context=200)
    list(chat.say("a"))
    list(chat.say("b"))
    assert said(list(chat.retry())) == "Two."
    assert [node.id for node in chat.tree.siblings(3)] == [3, 4] and chat.tree.head == 4
    assert chat.answers.keys() == {1, 3, 4}
    # the prompt is known up to its last token
    assert chat.turn is not None and chat.turn.reused == chat.turn.prompt - 1
    chat.switch(1)
    assert texts(chat) == ["a", "One."]
    assert said(list(chat.say("c"))) == "Two." and texts(chat) == ["a", "One.", "c", "Two."]
    assert {node.id for node in chat.tree.leaves()} == {3, 4, 6}


def test_retries_of_one_seed_differ_and_come_again() -> None:
    class Even(Scripted):
        """Every byte as likely as every other."""

        def next_token(self, tokens: Sequence[int]) -> int:
            return ord("a")

    def answers() -> list[str]:
        chat = Chat(
            Even([]), sampling=Sampling(temperature=9, top_k=0, top_p=1, min_p=0, seed=3, max_tokens=12), context=200
        )
        found = [said(list(chat.say("a")))]
        found += [said(list(chat.retry())) for _ in range(2)]
        chat.undo()
        return [*found, said(list(chat.say("a")))]

    first = answers()
    assert len(set(first)) == 3 and first[3] == first[0]  # asked anew is not retried
    assert answers() == first


def test_an_edit_is_another_question_in_its_place() -> None:
    chat = Chat(Scripted(["One.", "Two."]), sampling=GREEDY, context=200)
    list(chat.say("a"))
    list(chat.say("b"))
    list(chat.edit("B"))
    assert texts(chat) == ["a", "One.", "B", "Two."]
    list(chat.edit("A", 0))
    assert texts(chat) == ["A", "One."]
    assert [node.id for node in chat.tree.children(None)] == [0, 6]
    with pytest.raises(LlmkitError, match="message 1 is an answer"):
        list(chat.edit("x", 1))
    with pytest.raises(LlmkitError, match="no message 99"):
        list(chat.edit("x", 99))


def test_undo_takes_back_the_question_and_loses_nothing() -> None:
    chat = Chat(Scripted(["One.", "Two."]), sampling=GREEDY, context=200)
    list(chat.say("a"))
    list(chat.say("b"))
    assert chat.undo() == "b" and texts(chat) == ["a", "One."]
    assert chat.undo() == "a" and texts(chat) == [] and chat.used == 0
    assert len(chat.tree.nodes) == 4
    with pytest.raises(LlmkitError, match="nothing has been asked"):
        chat.undo()
    with pytest.raises(LlmkitError, match="nothing has been asked"):
        list(chat.retry())


def test_a_question_without_an_answer_is_answered_by_a_retry() -> None:
    chat = Chat(Scripted(["One.", "Two."]), sampling=GREEDY, context=200)
    list(chat.say("a"))
    chat.switch(0)
    with pytest.raises(LlmkitError, match="waits for its answer") as caught:
        list(chat.say("b"))
    assert "/retry" in (caught.value.hint or "")
    assert said(list(chat.retry())) == "One." and chat.tree.head == 2


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_question_is_refused(text: str) -> None:
    chat = Chat(Scripted(["x"]), context=100)
    with pytest.raises(LlmkitError, match="empty"):
        list(chat.say(text))
    assert chat.messages == []


def test_halves_of_characters_are_joined_or_marked() -> None:
    chat = Chat(Scripted(["x"]), context=100, system="a\udc80")
    list(chat.say("\ud83d\ude42 \udcff!"))
    assert chat.messages[0].text == "🙂 \ufffd!" and chat.system == "a\ufffd"


def test_a_model_that_cannot_write_is_refused() -> None:
    backend = Scripted([])
    backend.info = replace(backend.info, generates=False, architecture="bert")
    with pytest.raises(Unsupported, match="bert"):
        Chat(backend)


def test_a_cleared_conversation_leaves_the_old_one_whole() -> None:
    chat = Chat(Scripted(["One.", "Two."]), system="s", sampling=GREEDY, context=200)
    list(chat.say("a"))
    old = chat.conversation
    chat.clear()
    assert chat.messages == [] and chat.system == "s" and chat.sampling == GREEDY and chat.turn is None
    assert len(old.tree.nodes) == 2 and old.answers.keys() == {1}
    chat.resume(old)
    assert texts(chat) == ["a", "One."]
    assert said(list(chat.say("b"))) == "Two."
    assert chat.turn is not None and chat.turn.reused > len("a") + len("One.")


# ── going on with an answer ──


def test_an_answer_cut_short_goes_on_as_if_it_had_not_been() -> None:
    whole, cut = (Chat(Scripted(["naïve 🙂 answer"]), sampling=GREEDY, context=100) for _ in range(2))
    list(whole.say("a"))
    cut.sampling = replace(GREEDY, max_tokens=3)
    shown = said(list(cut.say("a")))  # ends within the ï
    for _ in range(10):
        if cut.answers[1].finish == "end":
            break
        shown += said(list(cut.go_on()))
    assert shown == "naïve 🙂 answer" == cut.messages[-1].text
    assert cut.answers[1].tokens == whole.answers[1].tokens and cut.answers[1].prompt == whole.answers[1].prompt
    assert cut.answers[1].given == 0  # all drawn with one sampling
    assert cut.turn is not None and cut.turn.reused == cut.turn.prompt - 1
    assert len(cut.tree.nodes) == 2


def test_a_stopped_answer_goes_on_and_shows_nothing_twice() -> None:
    chat = Chat(Scripted(["ab\nUsed\nUser: x"]), sampling=replace(GREEDY, max_tokens=5), context=100, stop=["\nUser:"])
    shown = said(list(chat.say("a")))
    assert shown == "ab\nUs"  # might have become the stop string; shown at the end
    chat.sampling = GREEDY
    shown += said(list(chat.go_on()))
    assert shown == "ab\nUsed" == chat.messages[-1].text and chat.answers[1].finish == "stop"


def test_an_answer_the_model_had_ended_goes_on_with_its_likeliest_word() -> None:
    class Brief(Scripted):
        def next_token(self, tokens: Sequence[int]) -> int:
            return END if tokens[-1] == ord(".") and tokens.count(ord(".")) < 2 else super().next_token(tokens)

    chat = Chat(Brief(["One."]), sampling=GREEDY, context=100)
    list(chat.say("a"))
    assert chat.answers[1].finish == "end"
    steps = list(chat.go_on())
    answer = chat.answers[1]
    assert steps[0].id not in chat.backend.info.eos and math.isnan(steps[0].sampled_probability)
    assert answer.given == len("One.") + 1 and answer.steps[-1].finish == "end"
    assert END not in answer.tokens[:-1]


def test_going_on_needs_an_answer() -> None:
    chat = Chat(Scripted(["One."]), context=100)
    with pytest.raises(LlmkitError, match="no answer yet"):
        list(chat.go_on())
    list(chat.say("a"))
    chat.switch(0)
    with pytest.raises(LlmkitError, match="is a question"):
        list(chat.go_on())


def test_text_without_its_tokens_goes_on_too() -> None:
    chat = Chat(Scripted(["One. Two. Three."]), sampling=GREEDY, context=100)
    list(chat.say("a"))
    chat.answers.clear()
    chat.tree.write(1, "One. T")
    assert said(list(chat.go_on())) == "wo. Three."
    assert chat.messages[-1].text == "One. Two. Three."
    assert chat.answers[1].given == 6


# ── another token instead ──


def test_another_token_makes_a_sibling() -> None:
    chat = Chat(Scripted(["Cats purr."]), sampling=GREEDY, context=100)
    list(chat.say("a"))
    steps = list(chat.instead(1, 0, ord("B")))
    assert said(steps) == "Bats purr." and chat.messages[-1].text == "Bats purr."
    answer = chat.answers[2]
    assert answer.given == 1 and math.isnan(answer.steps[0].sampled_probability) and answer.steps[0].rank > 1
    assert said(list(chat.instead(1, 5, ord("h")))) == "hurr." and chat.messages[-1].text == "Cats hurr."
    assert [node.text for node in chat.tree.siblings(1)] == ["Cats purr.", "Bats purr.", "Cats hurr."]
    assert chat.answers[1].steps[0].piece == b"C"
    assert list(chat.instead(1, 4, END))[-1].finish == "end" and chat.messages[-1].text == "Cats"


@pytest.mark.parametrize(
    ("node", "position", "token", "words"),
    [(7, 0, 65, "no message 7"), (0, 0, 65, "is a question"), (1, 99, 65, "tokens 0 to 4"),
     (1, -1, 65, "tokens 0 to 4"), (1, 0, 9999, "tokens 0 to 258"), (1, 0, -5, "tokens 0 to 258")],
)  # fmt: skip
def test_no_such_token(node: int, position: int, token: int, words: str) -> None:
    chat = Chat(Scripted(["Cats"]), sampling=GREEDY, context=100)
    list(chat.say("a"))
    with pytest.raises(LlmkitError, match=words):
        list(chat.instead(node, position, token))
    assert len(chat.tree.nodes) == 2


def test_an_answer_of_another_model_is_read_but_not_taken_up() -> None:
    chat = Chat(Scripted(["Cats"]), sampling=GREEDY, context=100)
    list(chat.say("a"))
    chat.answers[1] = replace(chat.answers[1], model="another")
    with pytest.raises(LlmkitError, match="was given by another"):
        list(chat.instead(1, 0, 65))
    assert said(list(chat.go_on())) == ""  # by its text: the script has nothing to add
    assert chat.answers[1].model == "scripted"


# ── whatever is done ──

MOVES = st.lists(
    st.tuples(
        st.sampled_from(["say", "retry", "edit", "go_on", "instead", "undo", "switch", "json", "clear", "break"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    max_size=14,
)


def do(chat: Chat, move: str, which: int, where: int) -> None:
    nodes = sorted(chat.tree.nodes)
    node = nodes[which % len(nodes)] if nodes else 0
    chat.sampling = replace(GREEDY, max_tokens=1 + where % 9)
    if move in ("say", "edit"):
        steps = chat.say("q" * (which % 5 + 1)) if move == "say" else chat.edit("e" * (which % 5 + 1), node)
        for _, _ in zip(range(where), steps, strict=False):
            pass
        steps.close()
    elif move == "instead":
        list(chat.instead(node, where % 7, None if which % 3 == 0 else 65 + which % 9))
    elif move in ("retry", "go_on"):
        list(getattr(chat, move)())
    elif move == "switch":
        chat.switch(node)
    elif move == "json":
        chat.resume(Conversation.from_json(json.loads(json.dumps(chat.conversation.to_json()))))
    elif move == "break" and chat._context._session is not None:
        chat._context._fail()
    elif move in ("undo", "clear"):
        getattr(chat, move)()


@settings(max_examples=80, deadline=None)
@given(MOVES)
def test_whatever_is_done_answers_follow_from_their_own_tokens(moves: list[tuple[str, int, int]]) -> None:
    """The script says what follows any tokens: so every token that was drawn can be checked, and the context, too."""
    backend = Scripted(["One 🙂.", "Two.", "Three, and more.", "Four."])
    chat = Chat(backend, system="s", sampling=GREEDY, context=120)
    for move, which, where in moves:
        before = {id: (node.role, node.parent) for id, node in chat.tree.nodes.items()}
        try:
            do(chat, move, which, where)
        except LlmkitError as error:
            assert error.message
            assert before == {id: (node.role, node.parent) for id, node in chat.tree.nodes.items()}
        if move != "clear":
            assert before.items() <= {id: (node.role, node.parent) for id, node in chat.tree.nodes.items()}.items()
        session = chat._context._session
        if session is not None:
            assert session.tokens == list(chat.held)  # type: ignore[attr-defined]
            assert sum(kept for _, kept in chat._context.calls) == session.n
    for node, answer in chat.answers.items():
        tokens = list(answer.prompt)
        for index, step in enumerate(answer.steps):
            if index >= answer.given:
                assert step.id == backend.next_token(tokens), (node, index)
            tokens.append(step.id)
        assert chat.tree.node(node).text == "".join(step.text for step in answer.steps)
        assert all(step.finish is None for step in answer.steps[:-1])
        drawn = len(answer.steps) - answer.turn.generated
        assert sum(kept for _, kept in answer.calls) == len(answer.prompt) + drawn == answer.turn.prompt
