"""The official openai client against a real server, through every documented feature."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends.scripted import TEMPLATE, Scripted
from llmkit.chat.answer import Finish
from llmkit.chat.details import log_softmax
from llmkit.server import telling
from llmkit.server.jobs import Job
from llmkit.server.service import Limits
from serving import Paced, Served, served, until

HI: Any = [{"role": "user", "content": "Hi"}]
ANSWERS = ["Hello there, world.", "<think>Let me see.</think>It is 2.", "naïve 日本 ✓"]


@pytest.fixture(scope="module")
def scripted() -> Iterator[Served]:
    with served(Scripted(ANSWERS)) as server:
        yield server


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> Iterator[Served]:
    """Random weights: what comes out right is not the model's doing."""
    with served(backends.load(gguf_of(tiny_checkpoint("qwen3"), "f32"), n_threads=1), context=2048) as server:
        yield server


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Any) -> Iterator[Served]:
    with served(backends.load(smollm2_gguf, n_threads=1), context=2048) as server:
        yield server


def chat(server: Served, messages: Any = HI, **options: Any) -> Any:
    return server.openai().chat.completions.create(model=server.models.default, messages=messages, **options)


def endless(server: Served) -> dict[str, int]:
    """A logit_bias that keeps random weights from ending their answer at once."""
    return {str(token): -100 for token in server.scheduler.backend.info.eos}


def streamed(server: Served, messages: Any = HI, **options: Any) -> list[ChatCompletionChunk]:
    return list(chat(server, messages, stream=True, **options))


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# ── models ──


def test_models_are_listed_and_found(scripted: Served) -> None:
    client = scripted.openai()
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("scripted", "model", "llmkit")
    assert model.model_extra is not None and model.model_extra["context_length"] == 1024
    assert client.models.retrieve("scripted") == model
    with pytest.raises(openai.NotFoundError, match="there are: scripted"):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-5", messages=HI)
    assert found.value.code == "model_not_found"


# ── chat ──


def test_an_answer(scripted: Served) -> None:
    told = chat(scripted)
    (choice,) = told.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWERS[0], "stop")
    assert told.object == "chat.completion" and told.model == "scripted" and told.id.startswith("chatcmpl-")
    prompt = len(scripted.models.lease().scheduler.backend.encode("Hi<end><assistant>"))
    assert told.usage.prompt_tokens == prompt
    assert told.usage.completion_tokens == len(ANSWERS[0]) + 1  # with the token that ends it
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens


def test_a_stream_says_the_same(scripted: Served) -> None:
    chunks = streamed(scripted)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == ANSWERS[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_a_stream_comes_last_and_without_choices(scripted: Served) -> None:
    chunks = streamed(scripted, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage == chat(scripted).usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_a_stream_ends_as_clients_expect(scripted: Served) -> None:
    told = scripted.post("/v1/chat/completions", messages=HI, stream=True)
    assert told.headers["content-type"].startswith("text/event-stream")
    assert told.text.endswith("data: [DONE]\n\n")


def test_async(scripted: Served) -> None:
    async def go() -> list[str]:
        async with scripted.async_openai() as client:

            async def one() -> str:
                stream = await client.chat.completions.create(model="scripted", messages=HI, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    assert asyncio.run(go()) == [ANSWERS[0]] * 8


def test_letters_of_several_tokens_come_whole(scripted: Served) -> None:
    messages = [*HI, {"role": "assistant", "content": "a"}, *HI, {"role": "assistant", "content": "b"}, *HI]
    assert text_of(streamed(scripted, messages)) == ANSWERS[2] == chat(scripted, messages).choices[0].message.content


@pytest.mark.parametrize("stop", ["there", ["xyz", "there"]])
def test_stop(scripted: Served, stop: Any) -> None:
    told = chat(scripted, stop=stop).choices[0]
    assert (told.message.content, told.finish_reason) == ("Hello ", "stop")
    assert text_of(streamed(scripted, stop=stop)) == "Hello "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(scripted: Served, name: str) -> None:
    told = chat(scripted, **{name: 5})
    assert (told.choices[0].message.content, told.choices[0].finish_reason) == ("Hello", "length")
    assert told.usage.completion_tokens == 5


def test_every_finish_has_a_word() -> None:
    assert {telling.finish_reason(finish) for finish in (*get_args(Finish), None)} == {"stop", "length"}


def test_thinking_is_told_apart_and_taken_back(scripted: Served) -> None:
    messages = [*HI, {"role": "assistant", "content": "a", "reasoning_content": "deep"}, *HI]
    message = chat(scripted, messages).choices[0].message
    assert (message.content, message.reasoning_content) == ("It is 2.", "Let me see.")
    chunks = streamed(scripted, messages)
    thought = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert (thought, text_of(chunks)) == ("Let me see.", "It is 2.")


def test_thinking_goes_to_the_template() -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}{{ enable_thinking }}"
    with served(Scripted([], template=template)) as server:
        messages = [{"role": "assistant", "content": "a", "reasoning_content": "deep"}]
        told = server.post("/apply-template", messages=messages, chat_template_kwargs={"enable_thinking": False})
        assert told.json()["prompt"] == "deep|aFalse"
        assert server.post("/apply-template", messages=messages).json()["prompt"] == "deep|a"


def test_structure_comes_without_thinking_first() -> None:
    """Where a template opens a block whatever it is told, it is closed: the grammar rules from the first token."""
    template = "{{ messages[0].content }}|{{ enable_thinking }}|<think>"
    with served(Scripted([], template=template)) as server:
        plain = server.post("/apply-template", messages=HI).json()["prompt"]
        bound = server.post("/apply-template", messages=HI, response_format={"type": "json_object"}).json()["prompt"]
    assert plain == "Hi||<think>"
    assert bound == "Hi|False|<think>\n</think>\n\n"


def test_roles_parts_and_fields_nobody_knows(scripted: Served) -> None:
    messages = [
        {"role": "system", "content": "A."},
        {"role": "developer", "content": "B."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
    ]
    told = scripted.post("/apply-template", messages=messages, frobnicate=[{"x": None}], user=None)
    assert told.json()["prompt"] == "A.\n\nB.<end>Hi you<end><assistant>"
    extra = {"frobnicate": 1, "store": True, "user": "me", "service_tier": "auto", "metadata": {}, "stop": None}
    assert chat(scripted, messages, extra_body=extra).choices[0].message.content == ANSWERS[0]
    with pytest.raises(openai.BadRequestError, match="image_url") as found:
        chat(scripted, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])
    assert found.value.param == "messages[0].content[0].type"


def test_paths_without_v1_and_with_a_slash(scripted: Served) -> None:
    body = {"messages": HI}
    for path in ("/chat/completions", "/v1/chat/completions/", "/chat/completions/"):
        assert scripted.post(path, **body).json()["choices"][0]["message"]["content"] == ANSWERS[0], path
    with scripted.http() as client:
        assert client.get("/models/").json()["data"][0]["id"] == "scripted"


# ── sampling ──


def test_seeds(tiny: Served) -> None:
    def ids(seed: int, n: int = 1) -> list[str]:
        told = chat(tiny, seed=seed, n=n, max_tokens=8, temperature=1.5, top_p=1, logit_bias=endless(tiny))
        assert [choice.index for choice in told.choices] == list(range(n))
        return [choice.message.content for choice in told.choices]

    assert ids(7) == ids(7) != ids(8)
    several = ids(7, n=3)
    assert len(set(several)) == 3 and several[0] == ids(7)[0]


def test_several_answers_in_one_stream(tiny: Served) -> None:
    chunks = streamed(tiny, n=3, max_tokens=6, seed=1, logit_bias=endless(tiny))
    texts = dict.fromkeys(range(3), "")
    ended = set()
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        ended |= {chunk.choices[0].index} if chunk.choices[0].finish_reason else set()
    whole = chat(tiny, n=3, max_tokens=6, seed=1, logit_bias=endless(tiny))
    assert ended == {0, 1, 2}
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


def test_logit_bias(scripted: Served) -> None:
    told = chat(scripted, logit_bias={str(ord("z")): 100, str(ord("H")): -100}, max_tokens=3)
    assert told.choices[0].message.content == "zzz"
    banned = chat(scripted, logit_bias={str(ord("H")): -100}, max_tokens=1, temperature=0)
    assert banned.choices[0].message.content != "H"
    with pytest.raises(openai.BadRequestError) as found:
        chat(scripted, logit_bias={"259": 1})
    assert found.value.param == "logit_bias"


def test_log_probabilities_are_the_engines(tiny: Served) -> None:
    options = {"max_tokens": 5, "temperature": 0, "logit_bias": endless(tiny)}  # which log-probabilities do not feel
    told = chat(tiny, logprobs=True, top_logprobs=4, **options)
    content = told.choices[0].logprobs.content
    backend = tiny.scheduler.backend
    prompt = tiny.post("/apply-template", messages=HI).json()["prompt"]
    history = backend.encode(prompt)
    assert len(content) == 5
    for token in content:
        session = backend.session(256)
        expected = log_softmax(session.eval(history).logits[-1])
        session.close()
        best = np.argsort(-expected)[:4]
        assert [each.id for each in token.top_logprobs] == best.tolist()
        assert np.allclose([each.logprob for each in token.top_logprobs], expected[best], atol=1e-4)
        expected[list(backend.info.eos)] = -np.inf
        assert token.id == expected.argmax() and bytes(token.bytes) == backend.piece(token.id)
        history.append(token.id)
    chunks = streamed(tiny, logprobs=True, top_logprobs=4, **options)
    again = [each for chunk in chunks if (given := chunk.choices[0].logprobs) for each in given.content or ()]
    assert [each.token for each in again] == [each.token for each in content]


def test_an_empty_answer_has_empty_log_probabilities() -> None:
    with served(Scripted([])) as server:
        told = chat(server, logprobs=True).choices[0]
        assert (told.message.content, told.finish_reason, told.logprobs.content) == ("", "stop", [])
        choice = server.openai().completions.create(model="scripted", prompt="a", logprobs=1).choices[0]
        assert choice.logprobs is not None and choice.logprobs.tokens == [] and choice.text == ""


def test_log_probabilities_are_of_what_is_told(scripted: Served) -> None:
    """Neither of the token that ends an answer, nor of a stop text."""
    for options, text in (({}, ANSWERS[0]), ({"stop": "there"}, "Hello "), ({"max_tokens": 3}, "Hel")):
        told = chat(scripted, logprobs=True, **options).choices[0]
        assert "".join(each.token for each in told.logprobs.content) == text
        assert all(each.top_logprobs == [] for each in told.logprobs.content)


# ── completions ──


def test_completions(scripted: Served) -> None:
    told = scripted.openai().completions.create(model="scripted", prompt="a<assistant>", max_tokens=5)
    assert (told.choices[0].text, told.choices[0].finish_reason, told.object) == ("Hello", "length", "text_completion")
    stream = scripted.openai().completions.create(
        model="scripted", prompt="a<assistant>", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWERS[0]
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage is not None


def test_several_prompts_as_texts_and_as_ids(scripted: Served) -> None:
    backend, client = scripted.scheduler.backend, scripted.openai()
    texts = ["a<assistant>", "a<assistant>x<assistant>", "nothing follows"]
    expected = ["Hello", "<thin", ""]

    def ask(prompt: Any, **options: Any) -> list[str]:
        told = client.completions.create(model="scripted", prompt=prompt, max_tokens=5, **options)
        assert [choice.index for choice in told.choices] == list(range(len(told.choices)))
        return [choice.text for choice in told.choices]

    assert ask(texts) == expected
    assert ask([backend.encode(text) for text in texts]) == expected
    assert ask(backend.encode(texts[0])) == expected[:1]
    assert ask(texts[:2], n=2) == ["Hello", "Hello", "<thin", "<thin"]
    assert ask(texts[:2], echo=True) == [text + answer for text, answer in zip(texts[:2], expected, strict=False)]


def test_echo_measures_the_prompt(tiny: Served) -> None:
    """As lm-eval asks: log-probabilities of a given text, nothing generated."""
    text = "The quick brown fox"
    told = tiny.openai().completions.create(
        model=tiny.models.default, prompt=text, max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    (choice,) = told.choices
    found: Any = choice.logprobs
    backend = tiny.scheduler.backend
    ids = backend.encode(text, bos=True)
    session = backend.session(256)
    rows = session.eval(ids, logits="all").logits
    session.close()
    assert choice.text == text and told.usage is not None and told.usage.completion_tokens == 0
    assert found.token_ids == ids and found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for place in range(1, len(ids)):
        expected = log_softmax(rows[place - 1])
        assert found.token_logprobs[place] == pytest.approx(expected[ids[place]], abs=1e-3)
        assert max(found.top_logprobs[place].values()) == pytest.approx(expected.max(), abs=1e-3)
    ends = [*found.text_offset[1:], len(text)]
    assert [text[a:b] for a, b in zip(found.text_offset, ends, strict=True)] == found.tokens


def test_what_completions_cannot_do_is_said(scripted: Served) -> None:
    client = scripted.openai()
    for options in ({"suffix": "x"}, {"best_of": 2}, {"max_tokens": 0}):
        with pytest.raises(openai.BadRequestError) as found:
            client.completions.create(model="scripted", prompt="a", **options)
        assert found.value.param == next(iter(options))


# ── embeddings ──


def single(numbers: list[float]) -> Any:
    return np.asarray(numbers, np.float32)


def test_embeddings(tiny: Served) -> None:
    client, backend = tiny.openai(), tiny.scheduler.backend
    texts = ["Hello world", "Something else"]
    told = client.embeddings.create(model=tiny.models.default, input=texts)  # base64, as this client asks by itself
    floats = client.embeddings.create(model=tiny.models.default, input=texts, encoding_format="float")
    for index, text in enumerate(texts):
        ids = backend.encode(text, special=False, bos=True)
        vector = backend.pool(ids)
        expected = vector / np.linalg.norm(vector)
        assert np.allclose(told.data[index].embedding, expected, atol=1e-5)
        assert np.array_equal(single(floats.data[index].embedding), single(told.data[index].embedding))
        by_ids = client.embeddings.create(model=tiny.models.default, input=[ids])
        assert np.array_equal(by_ids.data[0].embedding, told.data[index].embedding)
        short = client.embeddings.create(model=tiny.models.default, input=text, dimensions=8).data[0].embedding
        assert len(short) == 8 and math.isclose(np.linalg.norm(short), 1, abs_tol=1e-5)
        assert np.allclose(short, expected[:8] / np.linalg.norm(expected[:8]), atol=1e-5)
    assert told.usage.prompt_tokens == sum(len(backend.encode(text)) for text in texts)
    raw = tiny.post("/v1/embeddings", input="Hello world", encoding_format="base64").json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), single(told.data[0].embedding))


def test_ids_of_another_tokenizer_are_told(tiny: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length"):
        tiny.openai().embeddings.create(model=tiny.models.default, input=[[10, 99_999]])


# ── structure ──

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "good": {"type": "boolean"},
        "legs": {"type": "array", "items": {"enum": [1, 2, 3, 4]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["kind", "good", "legs"],
    "additionalProperties": False,
}


def test_a_schema_binds_even_random_weights(tiny: Served) -> None:
    for seed in range(3):
        told = chat(
            tiny, seed=seed, temperature=2, max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}},
        )  # fmt: skip
        assert told.choices[0].finish_reason == "stop"
        pet = json.loads(told.choices[0].message.content)
        assert set(pet) == {"kind", "good", "legs"} and pet["kind"] in ("cat", "dog") and 1 <= len(pet["legs"]) <= 3


def test_strict_says_what_it_cannot_enforce(tiny: Served) -> None:
    schema = {"type": "integer", "multipleOf": 7}

    def ask(strict: bool) -> Any:
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "strict": strict, "schema": schema}}
        return chat(tiny, response_format=wanted, max_tokens=4)

    with pytest.raises(openai.BadRequestError, match="multipleOf"):
        ask(True)
    ask(False)


def test_a_schema_that_is_none(tiny: Served) -> None:
    for schema in ({"type": "flubber"}, {"$ref": "#/nowhere"}):
        with pytest.raises(openai.BadRequestError) as found:
            chat(tiny, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
        assert found.value.code == "invalid_schema"


def test_json_object(smollm2: Served) -> None:
    told = chat(
        smollm2, [{"role": "user", "content": "Describe Paris as JSON with the keys city and country."}],
        response_format={"type": "json_object"}, temperature=0, max_tokens=120,
    ).choices[0]  # fmt: skip
    assert told.message.content.startswith("{")
    if told.finish_reason == "stop":
        assert isinstance(json.loads(told.message.content), dict)


# ── tools ──


def tool(name: str, **properties: Any) -> Any:
    parameters = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "description": f"{name}s", "parameters": parameters}}


TOOLS = [tool("look", where={"enum": ["up", "down"]}), tool("wait", seconds={"enum": [1, 2]})]
CALLS = (
    'Well. <tool_call>\n{"name": "look", "arguments": {"where": "up"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "wait", "arguments": {"seconds": 2}}\n</tool_call>'
)


def gathered(chunks: list[ChatCompletionChunk]) -> tuple[str, list[tuple[str, str]]]:
    calls: dict[int, tuple[str, str]] = {}
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or ():
            assert delta.function is not None
            if delta.index not in calls:
                assert delta.id and delta.type == "function" and delta.function.name
                calls[delta.index] = delta.function.name, ""
            name, arguments = calls[delta.index]
            calls[delta.index] = name, arguments + (delta.function.arguments or "")
    return text_of(chunks), list(calls.values())


def test_calls_that_a_model_makes() -> None:
    with served(Scripted([CALLS])) as server:
        (choice,) = chat(server, tools=TOOLS).choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Well."
        assert calls == [("look", '{"where": "up"}'), ("wait", '{"seconds": 2}')]
        chunks = streamed(server, tools=TOOLS)
        assert gathered(chunks) == ("Well.", calls) and chunks[-1].choices[0].finish_reason == "tool_calls"
        one = chat(server, tools=TOOLS, parallel_tool_calls=False).choices[0].message
        assert len(one.tool_calls) == 1
        assert chat(server, tools=TOOLS, tool_choice="none").choices[0].message.content == CALLS
        assert chat(server).choices[0].message.content == CALLS


def test_the_round_of_a_call() -> None:
    """The call and its result are given back, and the model goes on."""
    with served(Scripted([CALLS, "It is blue."], template=TEMPLATE)) as server:
        first = chat(server, tools=TOOLS).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "blue"} for call in first.tool_calls]
        messages = [*HI, first.model_dump(exclude_none=True), *results]
        assert chat(server, messages, tools=TOOLS).choices[0].message.content == "It is blue."
        prompt = server.post("/apply-template", messages=messages, tools=TOOLS).json()["prompt"]
        assert "<tool_response>\nblue\n</tool_response>" in prompt and '"name": "look"' in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "wait"}}])
def test_a_call_that_must_come_binds_even_random_weights(tiny: Served, choice: Any) -> None:
    for seed in range(2):
        options = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "temperature": 2, "max_tokens": 200}
        (told,) = chat(tiny, **options).choices
        assert told.finish_reason == "tool_calls" and not told.message.content
        (call,) = told.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert arguments in ({"where": "up"}, {"where": "down"}, {"seconds": 1}, {"seconds": 2})
        assert call.function.name == ("look" if "where" in arguments else "wait")
        assert call.function.name == "wait" or choice == "required"
        again = gathered(streamed(tiny, **options))
        assert again == ("", [(call.function.name, call.function.arguments)])


def test_choices_that_cannot_be(scripted: Served) -> None:
    for options in (
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
        {"tools": TOOLS, "tool_choice": "maybe"},
    ):
        with pytest.raises(openai.BadRequestError) as found:
            chat(scripted, **options)
        assert found.value.param == "tool_choice"


# ── errors ──


def test_a_prompt_too_long_is_told_with_numbers(scripted: Served) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"2,00\d tokens.*1,024") as found:
            chat(scripted, [{"role": "user", "content": "x" * 2000}], stream=stream)
        assert (found.value.code, found.value.type) == ("context_length_exceeded", "invalid_request_error")


@pytest.mark.parametrize(
    "options, param",
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_wrong_field_is_named(scripted: Served, options: dict[str, Any], param: str) -> None:
    told = scripted.post("/v1/chat/completions", **({"messages": HI} | options))
    error = told.json()["error"]
    assert told.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error", error


def test_no_room_is_said_with_a_time(scripted: Served) -> None:
    slow = Paced(["x" * 200] * 9)
    with served(slow, slots=1, queue=1) as server:
        slow.go.clear()

        async def go() -> openai.APIStatusError:
            async with server.async_openai() as client:
                tasks = []
                for count in range(2):
                    tasks.append(asyncio.ensure_future(client.chat.completions.create(model="scripted", messages=HI)))
                    while server.scheduler.stats().submitted <= count:
                        await asyncio.sleep(0.01)
                    while count == 0 and server.scheduler.stats().running == 0:
                        await asyncio.sleep(0.01)
                try:
                    await client.chat.completions.create(model="scripted", messages=HI)
                except openai.APIStatusError as error:
                    return error
                finally:
                    for task in tasks:
                        task.cancel()
                    slow.go.set()
            raise AssertionError("there was room")

        error = asyncio.run(go())
    assert error.status_code == 503 and int(error.response.headers["retry-after"]) >= 1
    assert error.code == "overloaded"


# ── ends ──


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_the_decoding_within_a_token(stream: bool) -> None:
    """By the engine's counter: at most the token that was under way when the client went is decoded."""
    slow = Paced(["x" * 900], seconds=0.01)
    with served(slow) as server:

        def decoded() -> int:
            return server.scheduler.stats().decoded_tokens

        body = json.dumps({"messages": HI, "stream": stream}).encode()
        place = urlsplit(server.address)
        client = socket.create_connection((place.hostname, place.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        until(lambda: decoded() >= 5)
        slow.go.clear()
        time.sleep(0.1)  # the round under way has come to where it waits
        before = decoded()
        client.close()
        until(lambda: server.service.running == set() or all(job.cancelled for job in jobs(server)))
        slow.go.set()
        until(lambda: server.scheduler.stats().running == 0)
        assert decoded() - before <= 1 and before < 100
        assert server.scheduler.stats().cancelled == 1
        until(lambda: server.service.running == set())


def jobs(server: Served) -> list[Job]:
    return [job for answers in list(server.service.running) for job in answers.jobs]


def test_signs_of_life_while_nothing_comes() -> None:
    slow = Paced(["Hi"])
    with served(slow, limits=Limits(keep_alive_seconds=0.05)) as server:
        slow.go.clear()
        with (
            server.http() as client,
            client.stream("POST", "/v1/chat/completions", json={"messages": HI, "stream": True}) as told,
        ):
            lines = told.iter_lines()
            seen = [line for line in (next(lines) for _ in range(8)) if line]
            assert any(line.startswith(":") for line in seen)
            slow.go.set()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"


def test_an_answer_that_takes_too_long() -> None:
    with served(Paced(["x" * 900], seconds=0.05), limits=Limits(answer_seconds=0.4)) as server:
        with pytest.raises(openai.APIStatusError, match="0.4 seconds") as found:
            chat(server)
        assert found.value.status_code == 504
        with pytest.raises(openai.APIError, match="0.4 seconds"):
            streamed(server)
        until(lambda: server.scheduler.stats().running == 0)


# ── a model that talks ──


def test_smollm2_talks(smollm2: Served) -> None:
    messages: Any = [{"role": "user", "content": "What is the capital of France? One word."}]
    told = chat(smollm2, messages, temperature=0, max_tokens=24)
    assert "Paris" in told.choices[0].message.content
    assert text_of(streamed(smollm2, messages, temperature=0, max_tokens=24)) == told.choices[0].message.content
    more = chat(smollm2, [*messages, told.choices[0].message.model_dump(), *HI], temperature=0, max_tokens=4)
    assert more.usage.prompt_tokens_details.cached_tokens > told.usage.prompt_tokens // 2


# ── other clients ──


@pytest.mark.slow
def test_simon_willisons_llm_talks_to_it(scripted: Served, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: scripted\n  api_base: {scripted.address}/v1\n  api_key_name: ours\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    for options in ((), ("--no-stream",)):
        command = [sys.executable, "-m", "llm", "-m", "ours", "--key", "none", "Hi", *options]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, env=environment)
        assert done.stdout.strip() == ANSWERS[0], done.stderr


@pytest.mark.slow
def test_langchain_talks_to_it(tiny: Served, scripted: Served) -> None:
    """Answers, streams, calls, structure; embeddings as it is told to ask for them."""
    langchain: Any = pytest.importorskip("langchain_openai")

    def of(server: Served, **options: Any) -> Any:
        given = {"base_url": f"{server.address}/v1", "api_key": "none", "model": server.models.default}
        return langchain.ChatOpenAI(**given, max_retries=0, **options)

    assert of(scripted).invoke("Hi").content == ANSWERS[0]
    chunks = list(of(scripted, stream_usage=True).stream("Hi"))
    assert "".join(chunk.content for chunk in chunks) == ANSWERS[0]
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == len(ANSWERS[0]) + 1
    bound = of(tiny, max_tokens=200).bind_tools(TOOLS, tool_choice="look")
    (call,) = bound.invoke("Hi").tool_calls
    assert call["name"] == "look" and call["args"]["where"] in ("up", "down")
    pet = of(tiny, max_tokens=300).with_structured_output({"title": "pet", **SCHEMA}, method="json_schema").invoke("Hi")
    assert set(pet) == {"kind", "good", "legs"}
    embeddings = langchain.OpenAIEmbeddings(
        base_url=f"{tiny.address}/v1", api_key="none", model=tiny.models.default, check_embedding_ctx_length=False
    )
    (vector,) = embeddings.embed_documents(["Hello world"])
    same = tiny.openai().embeddings.create(model=tiny.models.default, input="Hello world").data[0].embedding
    assert np.allclose(vector, same, atol=1e-6)
