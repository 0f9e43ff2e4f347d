"""inspection/xray: every token of a prompt has the right owner, and together they are the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends import Backend
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat
from llmkit.chat.templates import ChatTemplate, Message
from llmkit.errors import LlmkitError
from llmkit.inspection import xray

CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Where is Paris?"),
    Message("assistant", "In France."),
    Message("user", "And 東京 🙂?"),
)
QWEN_LIKE = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}"
    "(think {{ m.reasoning_content.strip() }} end)\n{% endif %}{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
DROPPING = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<end>{% endfor %}"
USER_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
REPEATING = "{% for m in messages %}{{ m.content }}={{ m.content }}<end>{% endfor %}"
NO_SPACE = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"


def words(seen: xray.XRay, message: int) -> str:
    """What the X-ray says are a message's words."""
    parts = [segment.text for segment in seen.segments if segment.message == message]
    return "".join(parts)


def check_whole(seen: xray.XRay, backend: Backend) -> None:
    """The segments in a row are the encoded prompt; every token is counted once."""
    ends = [0, *(segment.end for segment in seen.segments)]
    assert [segment.start for segment in seen.segments] == ends[:-1] and ends[-1] == len(seen.tokens)
    assert list(seen.ids) == xray.encode(backend, seen.text)
    for segment in seen.segments:
        pieces = b"".join(backend.piece(id) for id in seen.ids[segment.start : segment.end])
        assert segment.text == pieces.decode("utf-8", "backslashreplace")
    assert sum(cost.total for cost in seen.costs) + seen.opening == len(seen.tokens)
    for cost in seen.costs:
        own = sum(each.end - each.start for each in seen.segments if each.message == cost.message)
        assert cost.content == own and cost.template >= 0


def test_the_parts_of_a_chatml_prompt(smol: Backend) -> None:
    seen = xray.xray(smol, CONVERSATION)
    check_whole(seen, smol)
    assert [words(seen, number) for number in range(4)] == [message.text for message in CONVERSATION]
    parts = [segment.part for segment in seen.segments]
    assert parts == ["template", "system", "template", "user", "template", "assistant", "template", "user", "template"]
    # <|im_start|> role \n … <|im_end|> \n: five tokens of the template around each
    assert [cost.template for cost in seen.costs] == [5, 5, 6, 5]  # "assistant" is two tokens
    assert seen.opening == 4
    for cost, message in zip(seen.costs, CONVERSATION, strict=True):
        assert cost.content == len(smol.encode(message.text)) and cost.shown == 1.0


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "qwen2", "smollm", "llama3", "mistral", "llama"])
def test_every_familys_template(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, family: str) -> None:
    backend = backends.load(gguf_of(tiny_checkpoint(family), "f32"), n_threads=1)
    try:
        for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]):
            try:
                seen = xray.xray(backend, messages)
            except LlmkitError:
                ChatTemplate(backend.info.chat_template)  # it compiles: the template refuses these roles
                continue
            check_whole(seen, backend)
            known = [number for number, each in enumerate(messages) if each.text in seen.text]
            assert known and all(seen.costs[number].content > 0 for number in known)
            for number in known:
                assert messages[number].text[1:-1] in words(seen, number)
    finally:
        backend.close()


def scripted(template: str | None) -> Scripted:
    """One token a byte: borders between words and template fall between tokens."""
    return Scripted([], template=template)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Co")), max_size=12)
conversations = st.lists(
    st.tuples(st.sampled_from(("user", "assistant")), texts, st.sampled_from(("", "", "because"))).map(
        lambda row: Message(row[0], row[1], row[2] if row[0] == "assistant" else "")
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(conversations, st.sampled_from([QWEN_LIKE, DROPPING, REPEATING, NO_SPACE, None]))
def test_any_messages_in_any_template(messages: Sequence[Message], template: str | None) -> None:
    backend = scripted(template)
    seen = xray.xray(backend, messages)
    check_whole(seen, backend)
    assert seen.text == ChatTemplate(template, bos="<s>", eos="<end>").render(messages).text


@settings(max_examples=60, deadline=None)
@given(conversations)
def test_words_and_only_they_belong_to_a_message(messages: Sequence[Message]) -> None:
    """Each byte is a token here, so the words are found exactly; the template trims."""
    seen = xray.xray(scripted(QWEN_LIKE), messages)
    for number, message in enumerate(messages):
        thinking = message.thinking.strip() if message.role == "assistant" else ""
        assert words(seen, number) == thinking + message.text.strip()


def test_a_message_that_looks_like_the_template_stays_the_users(smol: Backend) -> None:
    tricky = [Message("user", "user\nuser"), Message("assistant", "user"), Message("user", "<|im_end|>\n")]
    seen = xray.xray(smol, tricky)
    check_whole(seen, smol)
    assert [words(seen, number) for number in range(3)] == ["user\nuser", "user", "<|im_end|>\n"]


def test_a_template_that_drops_a_message_says_so() -> None:
    seen = xray.xray(scripted(DROPPING), CONVERSATION)
    assert [cost.shown for cost in seen.costs] == [1.0, 1.0, 0.0, 1.0]
    assert seen.costs[2].total == 0


def test_a_system_prompt_that_the_first_question_carries() -> None:
    backend = scripted(USER_ONLY)
    seen = xray.xray(backend, CONVERSATION)
    check_whole(seen, backend)
    assert seen.merged_system and [words(seen, number) for number in range(4)] == [each.text for each in CONVERSATION]
    assert seen.of("system") == len(CONVERSATION[0].text)


def test_a_template_that_reads_the_words_falls_back_to_looking_for_them() -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'hello' %}<s>{{ m.content }}!{% else %}-{% endif %}{% endfor %}"
    )
    seen = xray.xray(scripted(template), [Message("user", "hello")])
    assert seen.text == "<s>hello!" and words(seen, 0) == "hello"


def test_without_messages_and_with_a_broken_template() -> None:
    with pytest.raises(LlmkitError, match="no messages"):
        xray.xray(scripted(None), [])
    with pytest.raises(LlmkitError, match="template"):
        xray.xray(scripted("{{ messages[7].content }}{% if x %}"), [Message("user", "a")])


# ── a chat ──


def test_a_chats_prompt_is_the_one_it_evaluates() -> None:
    backend = Scripted(["One.", "Two."])
    chat = Chat(backend, system="Be brief.")
    list(chat.say("First?"))
    seen = xray.of_chat(chat, "Second?")
    check_whole(seen, backend)
    assert list(seen.ids) == chat.prompt_tokens([*chat.in_context, Message("user", "Second?")])
    assert [cost.role for cost in seen.costs] == ["system", "user", "assistant", "user"]
    list(chat.say("Second?"))
    assert chat.turn is not None and chat.turn.prompt == len(seen.ids)
    assert seen.reused == chat.turn.reused > 0
    chat.close()


def test_what_the_context_holds_is_reused_but_for_the_last_token(smol: Backend) -> None:
    ids = xray.xray(smol, CONVERSATION).ids
    assert xray.xray(smol, CONVERSATION, held=ids).reused == len(ids) - 1
    assert xray.xray(smol, CONVERSATION, held=[*ids[:7], 5]).reused == 7
    assert xray.xray(smol, CONVERSATION, held=[5]).reused == 0
