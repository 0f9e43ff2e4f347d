"""chat/tree.py and chat/record.py: conversations as data, to JSON and back, and what damaged data is told."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.backends.scripted import Scripted
from llmkit.chat import Answer, Chat, Conversation, Dropped, Node, Sampling, Tree
from llmkit.chat.record import shortened
from llmkit.errors import LlmkitError


def grown() -> Tree:
    """Two answers to the first question, an edited second one."""
    tree = Tree()
    tree.add(None, "user", "a")
    tree.add(0, "assistant", "A")
    tree.add(1, "user", "b")
    tree.add(2, "assistant", "B")
    tree.add(0, "assistant", "AA")
    tree.add(1, "user", "bb")
    return tree


def ids(nodes: list[Node]) -> list[int]:
    return [node.id for node in nodes]


def test_paths_children_siblings_leaves() -> None:
    tree = grown()
    assert tree.head == 5 and ids(tree.path()) == [0, 1, 5] and ids(tree.path(3)) == [0, 1, 2, 3]
    assert ids(tree.children(1)) == [2, 5] and ids(tree.children(None)) == [0]
    assert ids(tree.siblings(4)) == [1, 4] == ids(tree.siblings(1))
    assert ids(tree.leaves()) == [3, 4, 5]
    assert tree.end(0).id == 4 and tree.end(2).id == 3 and tree.end(3).id == 3  # the newest child
    assert Tree().path() == [] and Tree().leaves() == []


@pytest.mark.parametrize("id", [-1, 6, 99])
def test_unknown_messages_are_told(id: int) -> None:
    with pytest.raises(LlmkitError, match=f"no message {id}") as caught:
        grown().node(id)
    assert caught.value.hint == "There are 0, 1, 2, 3, 4, 5."
    with pytest.raises(LlmkitError):
        grown().add(id, "user", "x")
    with pytest.raises(LlmkitError, match="'robot'"):
        grown().add(0, "robot", "x")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.text(max_size=8)), max_size=20), st.data())
def test_a_tree_is_the_same_after_json(moves: list[tuple[int, bool, str]], data: st.DataObject) -> None:
    tree = Tree()
    for parent, asks, text in moves:
        tree.add(parent % len(tree.nodes) if tree.nodes else None, "user" if asks else "assistant", text)
    if tree.nodes:
        tree.head = data.draw(st.sampled_from([None, *tree.nodes]))
    again = Tree.from_json(json.loads(json.dumps(tree.to_json())))
    assert again == tree
    assert [ids(again.children(id)) for id in tree.nodes] == [ids(tree.children(id)) for id in tree.nodes]
    # every node is on the path to some leaf, and a path has each node once
    paths = [ids(tree.path(leaf.id)) for leaf in tree.leaves()]
    assert {id for path in paths for id in path} == set(tree.nodes)
    assert all(len(set(path)) == len(path) for path in paths)


def damaged(change: dict[str, Any], index: int = 1) -> dict[str, Any]:
    data = grown().to_json()
    data["nodes"][index] |= change
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (damaged({"parent": 5}), "message 1 follows message 5"),
        (damaged({"parent": 1}), "message 1 follows message 1"),
        (damaged({"id": 0}), "message 0 comes twice"),
        (damaged({"id": -3}), "-3 is no number"),
        (damaged({"id": True}), "True is no number"),
        (damaged({"id": 1 << 70}), "is no number"),
        (damaged({"role": "system"}), "of 'system'"),
        (damaged({"made": math.nan}), "no time"),
        ({"head": 9, "nodes": []}, "stands at message 9"),
        ({"nodes": []}, "KeyError: 'head'"),
        ({"head": None, "nodes": 3}, "TypeError"),
        ({"head": None, "nodes": ["x"]}, "TypeError"),
    ],
)
def test_damaged_trees_are_told(data: dict[str, Any], words: str) -> None:
    with pytest.raises(LlmkitError, match=words):
        Tree.from_json(data)


def test_lone_halves_of_characters_are_marked() -> None:
    assert Tree.from_json(damaged({"text": "a\ud800"})).nodes[1].text == "a\ufffd"


# ── conversations ──


@pytest.fixture
def talked() -> Conversation:
    """A conversation with everything in it: branches, halves of characters, a token set by hand, drops."""
    chat = Chat(Scripted(["naïve 🙂", "Two."]), system="Be brief.", sampling=Sampling(temperature=0.9), context=200)
    list(chat.say("a"))
    list(chat.instead(1, 1, 66))
    list(chat.say("b"))
    chat.conversation.dropped[3] = Dropped((0, 2), 17, "They talked.")
    chat.conversation.name = "holidays"
    return chat.conversation


def same(one: Conversation, other: Conversation) -> bool:
    """NaN is not equal to itself, so answers are compared as JSON, and their figures each for itself."""
    return one.to_json() == other.to_json() and one.tree == other.tree


def test_a_conversation_is_the_same_after_json(talked: Conversation) -> None:
    again = Conversation.from_json(json.loads(json.dumps(talked.to_json(), allow_nan=False)))
    assert same(again, talked)
    for node, answer in talked.answers.items():
        read = again.answers[node]
        assert read.steps[0].piece == answer.steps[0].piece and read.steps[0] == answer.steps[0]
        assert read.prompt == answer.prompt and read.turn == answer.turn and read.sampling == answer.sampling
        assert [step.ms for step in read.steps] == [step.ms for step in answer.steps]
    halves = [step.piece for step in again.answers[1].steps if step.piece and step.piece[0] > 127]
    assert b"".join(halves).decode() == "ï🙂"
    assert again.dropped == talked.dropped and again.title == "holidays"
    assert math.isnan(again.answers[2].steps[1].sampled_probability)


def test_a_conversation_goes_on_after_json(talked: Conversation) -> None:
    again = Conversation.from_json(json.loads(json.dumps(talked.to_json())))
    chat = Chat(Scripted(["One.", "Two.", "Three."]), sampling=Sampling(temperature=0), context=200, conversation=again)
    chat.switch(1)
    assert "".join(step.text for step in chat.say("c")) == "Two."
    assert len(again.tree.nodes) == 7 and chat.system == "Be brief."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"form": "another"}, "no conversation that llmkit wrote"),
        ({"version": 9}, "version 9, this llmkit reads 1"),
        ({"answers": [{}]}, "no answer that llmkit wrote"),
        ({"answers": 3}, "TypeError"),
        ({"sampling": {"warmth": 1}}, "warmth"),
        ({"sampling": {"temperature": -1}}, "temperature"),
        ({"name": 7}, "7 is no text"),
        ({"dropped": {"x": {}}}, "ValueError"),
        ({"nodes": []}, "stands at message"),
    ],
)
def test_damaged_conversations_are_told(talked: Conversation, change: dict[str, Any], words: str) -> None:
    with pytest.raises(LlmkitError, match=words):
        Conversation.from_json(talked.to_json() | change)


@pytest.mark.parametrize("data", [None, [], "x", 3, {}])
def test_what_is_no_conversation_at_all(data: object) -> None:
    with pytest.raises(LlmkitError, match="no conversation that llmkit wrote"):
        Conversation.from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []}, {"prompt": [-1]}, {"prompt": "abc"}, {"given": 99}, {"pieces": {}}, {"steps": {}},
        {"turn": {"speed": 1}}, {"node": None},
    ],
)  # fmt: skip
def test_damaged_answers_are_told(talked: Conversation, change: dict[str, Any]) -> None:
    with pytest.raises(LlmkitError, match="no answer that llmkit wrote"):
        Answer.from_json(talked.answers[1].to_json() | change)


@pytest.mark.parametrize(
    ("column", "values"),
    [("id", [1]), ("finish", ["tired"] * 12), ("alternatives", [[[1]]] * 12), ("logprob", ["x"] * 12)],
)
def test_damaged_steps_are_told(talked: Conversation, column: str, values: list[Any]) -> None:
    data = talked.answers[1].to_json()
    data["steps"][column] = values[: len(data["steps"]["id"])]
    with pytest.raises(LlmkitError, match="no answer that llmkit wrote"):
        Answer.from_json(data)


def test_what_is_dropped_is_dropped_from_there_on(talked: Conversation) -> None:
    talked.dropped = {2: Dropped((0,), 1, "First."), 3: Dropped((2,), 1), 4: Dropped((3,), 1, "Second.")}
    path = talked.tree.path(4)
    assert ids(path) == [0, 2, 3, 4]
    for end, kept, summary in ((1, [0], None), (2, [2], "First."), (3, [3], "First."), (4, [4], "Second.")):
        nodes, found = talked.in_context(path[:end])
        assert (ids(nodes), found) == (kept, summary)


def test_titles_are_one_line() -> None:
    assert shortened("one\n two\t three") == "one two three"
    assert shortened("word " * 40) == "word " * 11 + "word…"
    assert Conversation().title == ""
