"""chat/persona.py: dialogues without a template, from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llmkit import prompts
from llmkit.backends import Backend
from llmkit.backends.scripted import END, Scripted
from llmkit.chat import Chat, Conversation, Message, Persona, Sampling, persona
from llmkit.errors import LlmkitError, ModelNotFound

# the shape of llama.cpp's chat-with-bob.txt, in words of ours: no head, an unfinished last line
TRANSCRIPT = """Visitor asks, the Harbour master answers shortly.

Visitor: Good morning!
Harbour master: Morning. Mind the rope.
Visitor: When is high water?
Harbour master: At noon: ask again then.
Visitor:
"""


def test_who_speaks_is_read_from_the_transcript() -> None:
    found = persona.parse(TRANSCRIPT, "harbour")
    assert (found.name, found.user, found.assistant) == ("harbour", "Visitor:", "Harbour master:")
    assert found.stop == ("\nVisitor:",)
    assert found.opening.endswith("ask again then.") and found.text == TRANSCRIPT
    messages = [Message("user", "Which ship is that?"), Message("assistant", " The Marie. "), Message("user", "Hers?")]
    assert found.render(messages).text == (
        f"{found.opening}\nVisitor: Which ship is that?\nHarbour master: The Marie.\nVisitor: Hers?\nHarbour master:"
    )
    assert found.render(messages[:2], add_generation_prompt=False).text.endswith("\nHarbour master: The Marie.")
    assert found.render([Message("system", "Fog."), *messages[:1]]).text.startswith("Fog.\n\nVisitor asks")


@pytest.mark.parametrize(
    ("text", "user", "assistant"),
    [
        ("Ann: Hi.\nBob: Hello.\n", "Ann:", "Bob:"),  # nothing unfinished: who speaks first asks
        ("Bob: Who is there?\nAnn: Me.\nBob: Come in.\nAnn:", "Ann:", "Bob:"),
        ("user: A\nassistant: B\n---\n\nOnce upon a time.", "A:", "B:"),
        ("user: A:\nassistant: B:\n---\nA: x\nB: y", "A:", "B:"),
        ("assistant: Ann\n---\nAnn: Hi.\nBob: Hello.\nAnn: Well?", "Bob:", "Ann:"),
        ("\ufeff\n# by me\nuser: Zoë\nassistant: 名前\nstop: Fin.\nname: both\n---\n", "Zoë:", "名前:"),
        ("Ann: Hi.\r\nBob: Hello: you.\r\nAnn:\r\n", "Ann:", "Bob:"),
        ("Time was: short.\nAnn: a\nBob: b\nBob: c\nAnn:", "Ann:", "Bob:"),
    ],
)
def test_heads_and_derivations(text: str, user: str, assistant: str) -> None:
    found = persona.parse(text, "x")
    assert (found.user, found.assistant) == (user, assistant)
    assert "\r" not in found.opening and not found.opening.endswith(user)


def test_a_head_can_name_and_stop() -> None:
    found = persona.parse("user: A\nassistant: B\nstop: Fin.\nstop: The end.\nname: both\n---\nText.", "file")
    assert found.name == "both" and found.stop == ("\nA:", "Fin.", "The end.") and found.opening == "Text."


@pytest.mark.parametrize(
    "text", ["", "A story without anybody.", "Ann: alone.", "user: A\nassistant: A\n---\n", "\0\0"]
)
def test_nobody_to_speak(text: str) -> None:
    with pytest.raises(LlmkitError, match="'x': it is not clear who speaks") as caught:
        persona.parse(text, "x")
    assert "user: User" in (caught.value.hint or "")


def test_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "harbour.txt").write_text(TRANSCRIPT, encoding="utf-8")
    assert persona.load(str(tmp_path / "harbour.txt")).name == "harbour"
    assert persona.load("bob").assistant == "Bob:"
    with pytest.raises(ModelNotFound, match=r"none\.txt"):
        persona.load(str(tmp_path / "none.txt"))
    with pytest.raises(ModelNotFound, match="'bobby'"):
        persona.load("bobby")


@pytest.mark.parametrize("name", prompts.persona_names())
def test_ours_are_ready_for_the_user(name: str) -> None:
    found = persona.load(name)
    lines = found.opening.split("\n")
    assert found.opening.isascii() and 300 < len(found.opening) < 2000
    assert lines[-1].startswith(found.assistant)  # the model has spoken last
    assert sum(line.startswith(found.user) for line in lines) >= 1
    assert sum(line.startswith(found.assistant) for line in lines) >= 2
    assert found.text.startswith("# ")


# ── in a conversation ──


class Parrot(Scripted):
    """Goes on with the last question, and then would play the visitor."""

    def next_token(self, tokens: Sequence[int]) -> int:
        text = bytes(token for token in tokens if token < 256).decode()
        before, _, said = text.rpartition("\nHarbour master:")
        answer = " " + before.rpartition("Visitor: ")[2] + " indeed.\nVisitor: And"
        return ord(answer[len(said)]) if len(said) < len(answer) else END


def test_a_persona_needs_no_template_and_stops_at_the_users_turn() -> None:
    chat = Chat(Parrot([], add_bos=True), persona=persona.parse(TRANSCRIPT, "harbour"), context=600)
    assert chat.template.name == "persona"
    steps = list(chat.say("Fog"))
    assert chat.messages[-1].text == " Fog indeed." and steps[-1].finish == "stop"
    assert chat.answers[1].prompt[0] == 256  # the beginning of text, once
    list(chat.say("Rain <end>"))
    assert chat.messages[-1].text == " Rain <end> indeed."
    assert END not in chat.answers[3].prompt  # a transcript spells out no special tokens
    assert chat.turn is not None and chat.turn.reused >= len(chat.answers[1].prompt)
    list(chat.go_on())  # past the reverse prompt: other than it began with
    assert chat.answers[3].tokens[: len(" Rain <end> indeed.")] == tuple(b" Rain <end> indeed.")


def test_a_kept_conversation_brings_its_persona() -> None:
    chat = Chat(Parrot([]), persona=persona.parse(TRANSCRIPT, "harbour"), context=600)
    list(chat.say("Fog"))
    again = Chat(Parrot([]), context=600, conversation=Conversation.from_json(chat.conversation.to_json()))
    list(again.say("Sun"))
    assert again.messages[-1].text == " Sun indeed."
    again.clear()
    assert again.conversation.persona == TRANSCRIPT
    again.resume(Conversation())
    assert again.template.name == "model" and again.stop == ()


def test_bob_on_a_real_model(smol: Backend) -> None:
    bob: Persona = persona.load("bob")
    chat = Chat(smol, persona=bob, sampling=Sampling(temperature=0, max_tokens=40), context=512, n_alternatives=0)
    steps = list(chat.say("What is the capital of France?"))
    text = chat.messages[-1].text
    assert "France" in text and "User" not in text and steps[-1].finish == "stop"
    assert b"".join(step.piece for step in steps).endswith(b"\nUser:")
    chat.close()
