"""POST /v1/completions: a text goes on, without a chat template; with `echo` and `logprobs` it is measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from time import time
from typing import Any

from ..backends import Backend
from ..chat.answer import Step, Turn
from ..inspection.xray import encode
from . import fields, telling
from .answers import Answers, submit
from .chat_completions import counted
from .checking import Schema
from .errors import Refused, refusal
from .fields import asked_grammar, sampling, stops
from .jobs import Echo, Ended, Failed, Request
from .service import Call, Service
from .telling import Json

SCHEMA: Schema = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "model": fields.MODEL,
        "prompt": {
            "description": "A text, several texts, a list of token ids, or several.",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                fields.IDS,
                {"type": "array", "items": fields.IDS, "minItems": 1},
            ],
        },
        "max_tokens": {**fields.MAX_TOKENS, "default": 16},
        "n": fields.N,
        "best_of": {"type": "integer", "minimum": 1, "maximum": 128, "description": "Not supported above n."},
        "suffix": {"type": "string", "description": "Not supported."},
        "echo": {"type": "boolean", "description": "Tell the prompt, too; max_tokens may be 0 then."},
        "stop": fields.STOP,
        "stream": fields.BOOLEAN,
        "stream_options": fields.STREAM_OPTIONS,
        "logprobs": {
            "type": "integer", "minimum": 0, "maximum": fields.MOST_ALTERNATIVES,
            "description": "So many of the likeliest tokens at each place, with raw log-probabilities.",
        },
        "response_format": fields.RESPONSE_FORMAT,
        **fields.SAMPLING,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """One request, understood. `silent`: only the prompt is asked about."""

    requests: tuple[Request, ...]
    texts: tuple[str, ...]
    count: int
    echo: bool
    silent: bool
    logprobs: int | None


def prepared(service: Service, backend: Backend, body: Mapping[str, Any], key: str = "") -> Wanted:
    """Encode and check. Raises Refused, LlmkitError."""
    if body.get("suffix"):
        raise Refused("suffix is not supported", param="suffix", code="unsupported")
    n, echo, most = int(body.get("n", 1)), bool(body.get("echo")), body.get("max_tokens", 16)
    if body.get("best_of", n) > n:
        raise Refused("best_of above n is not supported", param="best_of", code="unsupported")
    if most == 0 and not echo:
        raise Refused("max_tokens: expected 1 or more, or echo", param="max_tokens", code="invalid_value")
    prompts = _prompts(body["prompt"], backend)
    counted(service, n * len(prompts))
    logprobs = body.get("logprobs")
    chosen = sampling(body, backend, max_tokens=most or 1, grammar=asked_grammar(body))
    requests = tuple(
        Request(
            prompt=tokens, sampling=chosen, variation=variation, stop=stops(body), details=logprobs is not None,
            n_alternatives=logprobs or 0, echo=echo and logprobs is not None, reads=False, key=key,
        )
        for tokens, _ in prompts
        for variation in range(n)
    )  # fmt: skip
    return Wanted(requests, tuple(text for _, text in prompts), n, echo, most == 0, logprobs)


def _prompts(given: Any, backend: Backend) -> list[tuple[tuple[int, ...], str]]:
    """Tokens and text of each. Raises Refused for an empty one, and for ids that are none."""
    if isinstance(given, str):
        given = [given]
    elif isinstance(given[0], int):
        given = [given]
    found = []
    for each in given:
        tokens = tuple(encode(backend, each) if isinstance(each, str) else each)
        if not tokens:
            raise Refused("prompt: is empty, and this model has no token to begin with", param="prompt", code="size")
        if max(tokens) >= backend.info.n_vocab:
            raise Refused(
                f"prompt: {max(tokens)} is no token, expected 0 to {backend.info.n_vocab - 1}",
                param="prompt",
                code="invalid_value",
            )
        text = each if isinstance(each, str) else b"".join(map(backend.piece, tokens)).decode("utf-8", "replace")
        found.append((tokens, text))
    return found


async def complete(call: Call) -> Json | AsyncIterator[bytes]:
    """The completions, or the events of their stream."""
    lease = await call.service.lease(call.model)
    try:
        backend = lease.scheduler.backend
        wanted = await asyncio.to_thread(prepared, call.service, backend, call.body, call.key)
        answers = await submit(call, lease, wanted.requests)
    except BaseException:
        lease.release()
        raise
    frame: Json = {
        "id": telling.fresh_id("cmpl"), "object": "text_completion", "created": int(time()),
        "model": call.model or call.service.models.default, "system_fingerprint": telling.fingerprint(backend),
    }  # fmt: skip
    choices = [Choice(wanted, number) for number in range(len(wanted.requests))]
    if call.body.get("stream"):
        await answers.started()
        options = call.body.get("stream_options") or {}
        return telling.stream(_chunks(answers, choices, frame, bool(options.get("include_usage"))))
    return await _whole(answers, choices, frame)


class Choice:
    """One completion on its way: the steps of prompt and answer, how many of them have been told."""

    def __init__(self, wanted: Wanted, number: int) -> None:
        self._wanted = wanted
        self.count = wanted.count  # completions of the same prompt
        self._stop = wanted.requests[number].stop
        self._opening = wanted.texts[number // wanted.count] if wanted.echo else ""
        self._prompt: list[Step] = []
        self._steps: list[Step] = []
        self._told = 0
        self._offset = 0  # characters of the tokens told
        self.turn: Turn | None = None
        self.finish = "length"

    def echo(self, steps: Sequence[Step]) -> None:
        """Steps of the prompt: they are told with the first of the answer."""
        self._prompt += steps

    def feed(self, step: Step) -> Json | None:
        """What may be told now."""
        if self._wanted.silent:
            return None
        if self._wanted.logprobs is not None:
            self._steps.append(step)
        return self._told_now(step.text) if step.text or self._opening else None

    def end(self, ended: Ended) -> Json | None:
        """The rest."""
        self.turn = replace(ended.turn, generated=0) if self._wanted.silent else ended.turn
        self.finish = "length" if self._wanted.silent else telling.finish_reason(ended.finish)
        left = bool(self._opening or self._prompt) or self._told < telling.said(self._steps, self._stop)
        left = left or (self._wanted.logprobs is not None and not self._told)  # empty lists are an answer, too
        return self._told_now("") if left else None

    def _told_now(self, text: str) -> Json:
        opening, self._opening = self._opening, ""
        told: Json = {"text": opening + text, "logprobs": None}
        if self._wanted.logprobs is not None:
            until = telling.said(self._steps, self._stop)
            steps = [*self._prompt, *self._steps[self._told : until]]
            self._prompt, self._told = [], max(self._told, until)
            told["logprobs"] = self._logprobs(steps, self._wanted.logprobs)
        return told

    def _logprobs(self, steps: Sequence[Step], top: int) -> Json:
        """In the form of this route: parallel lists, and offsets in characters of the text."""
        tokens = [telling.readable(step.piece) for step in steps]
        offsets = list(accumulate((len(step.piece.decode("utf-8", "ignore")) for step in steps), initial=self._offset))
        self._offset = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [telling.number(step.logprob) for step in steps],
            "top_logprobs": [_best(step, top) or None for step in steps] if top else None,
            "text_offset": offsets,
            "token_ids": [step.id for step in steps],
        }


def _best(step: Step, top: int) -> dict[str, float | None]:
    """The likeliest, and the token itself; where two are written the same, the likelier one."""
    found: dict[str, float | None] = {}
    for each in step.alternatives[:top]:
        found.setdefault(telling.readable(each.piece), telling.number(each.logprob))
    if found:
        found.setdefault(telling.readable(step.piece), telling.number(step.logprob))
    return found


async def _chunks(
    answers: Answers, choices: list[Choice], frame: Json, include_usage: bool
) -> AsyncIterator[Json | None]:
    rest: Json = {"usage": None} if include_usage else {}
    async for numbered in answers.events():
        if numbered is None:
            yield None
            continue
        number, event = numbered
        part = _heard(choices[number], event)
        if part is not None:
            yield {**frame, "choices": [{"index": number, **part, "finish_reason": None}], **rest}
        if isinstance(event, Ended):
            last = {"index": number, "text": "", "logprobs": None, "finish_reason": choices[number].finish}
            yield {**frame, "choices": [last], **rest}
    if include_usage:
        yield {**frame, "choices": [], **_figures(choices)}


def _heard(choice: Choice, event: object) -> Json | None:
    if isinstance(event, Failed):
        raise refusal(event.error)
    if isinstance(event, Echo):
        choice.echo(event.steps)
    elif isinstance(event, Step):
        return choice.feed(event)
    elif isinstance(event, Ended):
        return choice.end(event)
    return None


async def _whole(answers: Answers, choices: list[Choice], frame: Json) -> Json:
    parts: list[list[Json]] = [[] for _ in choices]
    async for numbered in answers.events():
        if numbered is not None and (part := _heard(choices[numbered[0]], numbered[1])) is not None:
            parts[numbered[0]].append(part)
    told = [
        {
            "index": number,
            "text": "".join(part["text"] for part in mine),
            "logprobs": _joined(mine),
            "finish_reason": choice.finish,
        }
        for number, (choice, mine) in enumerate(zip(choices, parts, strict=True))
    ]
    return {**frame, "choices": told, **_figures(choices)}


def _joined(parts: list[Json]) -> Json | None:
    given = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    if not given:
        return None
    return {
        name: [each for one in given for each in one[name]] if given[0][name] is not None else None for name in given[0]
    }


def _figures(choices: list[Choice]) -> Json:
    """Each prompt's tokens are counted once."""
    turns = [choice.turn for choice in choices if choice.turn is not None]
    each = max(1, choices[0].count)
    usage = telling.usage(sum(turn.prompt for turn in turns[::each]), turns)
    return {"usage": usage, "timings": telling.timings(turns)} if turns else {"usage": usage}
