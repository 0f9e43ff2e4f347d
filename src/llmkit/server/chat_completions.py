"""POST /v1/chat/completions: the next message of a conversation, at once or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from time import time
from typing import TYPE_CHECKING, Any

from ..backends import Backend
from ..chat.answer import Step, Turn
from ..chat.reasoning import opened
from ..inspection.xray import encode
from . import fields, telling, tools
from .answers import Answers, submit
from .checking import Schema
from .errors import Refused, refusal
from .fields import asked_grammar, gbnf, sampling, stops
from .jobs import Begun, Ended, Failed, Request
from .messages import FIELDS as MESSAGE_FIELDS
from .messages import Asked, asked, rendered
from .service import Call, Service
from .telling import Json, chat_logprobs

if TYPE_CHECKING:
    from .residents import Lease

SCHEMA: Schema = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "model": fields.MODEL,
        **MESSAGE_FIELDS,
        "max_completion_tokens": fields.MAX_TOKENS,
        "max_tokens": fields.MAX_TOKENS,
        "n": fields.N,
        "stop": fields.STOP,
        "stream": fields.BOOLEAN,
        "stream_options": fields.STREAM_OPTIONS,
        "logprobs": fields.BOOLEAN,
        "top_logprobs": {
            "type": "integer", "minimum": 0, "maximum": fields.MOST_ALTERNATIVES,
            "description": "The likeliest tokens at each place, with their raw log-probabilities.",
        },
        "response_format": fields.RESPONSE_FORMAT,
        **fields.SAMPLING,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """One request, understood: what the engine is asked, and how the answer is to be read and told."""

    request: Request
    count: int
    prompt: str
    logprobs: bool
    top: int
    names: frozenset[str]
    syntax: tools.Syntax
    forced: bool
    parallel: bool


def prepared(service: Service, backend: Backend, body: Mapping[str, Any], key: str = "") -> Wanted:
    """Render, encode and check. Takes its time with long prompts. Raises Refused, LlmkitError."""
    conversation = asked(body)
    source = backend.info.chat_template
    template = service.template(backend)
    syntax = tools.syntax_of(source)
    grammar = asked_grammar(body)
    if grammar is not None and conversation.forced:
        raise Refused(
            "response_format and tool_choice both ask for a grammar, expected one of them", param="tool_choice"
        )
    if conversation.forced:
        grammar = gbnf(tools.schema(syntax, conversation.tools), "tools")
    constrained = grammar is not None or "grammar" in body
    text = _prompt(service, backend, conversation, constrained=constrained)
    if conversation.forced:
        text += tools.opening(syntax)
    top = int(body.get("top_logprobs", 0)) if body.get("logprobs") else 0
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise Refused("top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    request = Request(
        prompt=tuple(encode(backend, text)),
        sampling=sampling(body, backend, max_tokens=_max_tokens(body), grammar=grammar),
        stop=(*stops(body), *template.stop),
        details=bool(body.get("logprobs")),
        n_alternatives=top,
        form=opened(text),
        key=key,
    )
    names = frozenset(tool["function"]["name"] for tool in conversation.tools)
    return Wanted(
        request, counted(service, int(body.get("n", 1))), text, bool(body.get("logprobs")), top, names, syntax,
        conversation.forced, body.get("parallel_tool_calls") is not False,
    )  # fmt: skip


def counted(service: Service, n: int) -> int:
    """`n` answers. Raises Refused for more than one request may ask for."""
    if n > (most := service.limits.answers):
        raise Refused(f"{n} answers in one request, expected at most {most}", param="n", code="size")
    return n


def _prompt(service: Service, backend: Backend, conversation: Asked, *, constrained: bool) -> str:
    """The rendered prompt; where a grammar rules the answer it does not begin with a thinking block."""
    thinking = False if constrained else conversation.thinking
    text = rendered(service.template(backend), backend.info.chat_template, conversation, thinking)
    form = opened(text) if constrained else None
    return text if form is None else f"{text}\n{form.closes[-1]}\n\n"


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    most: int | None = body.get("max_completion_tokens", body.get("max_tokens"))
    if most == 0:
        raise Refused("max_tokens: expected 1 or more", param="max_tokens", code="invalid_value")
    return most


async def complete(call: Call) -> Json | AsyncIterator[bytes]:
    """The answer, or the events of its stream."""
    lease = await call.service.lease(call.model)
    try:
        backend = lease.scheduler.backend
        wanted = await asyncio.to_thread(prepared, call.service, backend, call.body, call.key)
        requests = [replace(wanted.request, variation=number) for number in range(wanted.count)]
        answers = await submit(call, lease, requests)
    except BaseException:
        lease.release()
        raise
    frame = _frame(lease, call.model or call.service.models.default)
    choices = [Choice(wanted) for _ in requests]
    if call.body.get("stream"):
        await answers.started()
        options = call.body.get("stream_options") or {}
        return telling.stream(_chunks(answers, choices, frame, bool(options.get("include_usage"))))
    return await _whole(answers, choices, frame)


def _frame(lease: Lease, model: str) -> Json:
    return {
        "id": telling.fresh_id("chatcmpl"), "object": "chat.completion", "created": int(time()), "model": model,
        "system_fingerprint": telling.fingerprint(lease.scheduler.backend),
    }  # fmt: skip


# ── one answer ──


class Choice:
    """An answer on its way: Steps become deltas; `end` tells of its end."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._reader = tools.CallReader(wanted.syntax, wanted.names, inside=wanted.forced) if wanted.names else None
        self._steps: list[Step] = []
        self._told = 0  # of them, in log-probabilities
        self.reasoning = 0
        self.turn: Turn | None = None
        self.finish = "length"

    def feed(self, step: Step) -> list[Json]:
        """What may be told now: parts of choices, without their index."""
        if self._wanted.logprobs:
            self._steps.append(step)
        self.reasoning += step.thinking
        if step.thinking:
            return self._dressed([{"reasoning_content": step.text}] if step.text else [])
        if self._reader is None:
            return self._dressed([{"content": step.text}] if step.text else [])
        return self._dressed(self._parts(*self._reader.feed(step.text)))

    def end(self, ended: Ended) -> list[Json]:
        """The rest, and the reason why it ended."""
        self.turn = ended.turn
        rest = self._dressed(self._parts(*self._reader.finish()) if self._reader else [], last=True)
        called = self._reader is not None and self._reader.count
        self.finish = (
            "tool_calls" if called and ended.finish in ("end", "stop") else telling.finish_reason(ended.finish)
        )
        return [*rest, {"delta": {}, "finish_reason": self.finish, "logprobs": None}]

    def joined(self, parts: list[Json]) -> Json | None:
        """The log-probabilities of all parts; None where they were not asked for."""
        given = [part["logprobs"]["content"] for part in parts if part["logprobs"]]
        return {"content": [each for one in given for each in one], "refusal": None} if self._wanted.logprobs else None

    def _parts(self, text: str, deltas: list[tools.Delta]) -> list[Json]:
        parts: list[Json] = [{"content": text}] if text else []
        calls = [_call(delta) for delta in deltas if self._wanted.parallel or delta.index == 0]
        return parts + [{"tool_calls": [each]} for each in calls]

    def _dressed(self, parts: list[Json], last: bool = False) -> list[Json]:
        """With the log-probabilities of the tokens they are of, on the first of them."""
        if self._wanted.logprobs and (parts or last):
            until = telling.said(self._steps, self._wanted.request.stop)
            new = self._steps[self._told : until]
            self._told = max(self._told, until)
            if new and not parts:
                parts = [{}]
            if parts:
                first = {"content": chat_logprobs(new, self._wanted.top), "refusal": None}
                head: Json = {"delta": parts[0], "finish_reason": None, "logprobs": first}
                return [head, *map(_part, parts[1:])]
        return [_part(part) for part in parts]


def _part(delta: Json) -> Json:
    return {"delta": delta, "finish_reason": None, "logprobs": None}


def _call(delta: tools.Delta) -> Json:
    function: Json = {"arguments": delta.arguments}
    if delta.name is None:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}


# ── all of them ──


async def _chunks(
    answers: Answers, choices: list[Choice], frame: Json, include_usage: bool
) -> AsyncIterator[Json | None]:
    frame = {**frame, "object": "chat.completion.chunk"}
    rest: Json = {"usage": None} if include_usage else {}
    async for numbered in answers.events():
        if numbered is None:
            yield None
            continue
        number, event = numbered
        if isinstance(event, Failed):
            raise refusal(event.error)
        if isinstance(event, Begun):
            parts: list[Json] = [_part({"role": "assistant", "content": ""})]
        elif isinstance(event, Step):
            parts = choices[number].feed(event)
        else:
            parts = choices[number].end(event) if isinstance(event, Ended) else []
        for part in parts:
            yield {**frame, "choices": [{"index": number, **part}], **rest}
    if include_usage:
        yield {**frame, "choices": [], **_figures(choices)}


async def _whole(answers: Answers, choices: list[Choice], frame: Json) -> Json:
    parts: list[list[Json]] = [[] for _ in choices]
    async for numbered in answers.events():
        if numbered is None:
            continue
        number, event = numbered
        if isinstance(event, Failed):
            raise refusal(event.error)
        if isinstance(event, Step):
            parts[number] += choices[number].feed(event)
        elif isinstance(event, Ended):
            parts[number] += choices[number].end(event)
    told = [
        {"index": number, "message": _message(mine), "logprobs": choice.joined(mine), "finish_reason": choice.finish}
        for number, (choice, mine) in enumerate(zip(choices, parts, strict=True))
    ]
    return {**frame, "choices": told, **_figures(choices)}


def _figures(choices: list[Choice]) -> Json:
    turns = [choice.turn for choice in choices if choice.turn is not None]
    reasoning = sum(choice.reasoning for choice in choices)
    usage = telling.usage(turns[0].prompt if turns else 0, turns, reasoning)
    return {"usage": usage, "timings": telling.timings(turns)} if turns else {"usage": usage}


def _message(parts: list[Json]) -> Json:
    """The message that deltas add up to."""
    deltas = [part["delta"] for part in parts]
    content = "".join(delta.get("content", "") for delta in deltas)
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas).strip()
    calls: list[Json] = []
    for delta in deltas:
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
            else:
                calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message
