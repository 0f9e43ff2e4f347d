"""POST /inspect/…: what happens inside, as the functions of llmkit.inspection tell it, in the engine's own thread.

Probabilities are the model's own (raw), but where a field says sampled. Every route takes a text or token ids.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..backends import Backend
from ..chat.answer import Step
from ..chat.sampler_settings import Sampling
from ..errors import LlmkitError
from . import fields
from .answers import submit
from .checking import Schema
from .errors import Refused, refusal
from .fields import sampling
from .jobs import Echo, Failed, Request
from .messages import FIELDS, asked
from .service import Call, computed
from .telling import Json

if TYPE_CHECKING:
    from .scheduler import Scheduler

_POSITION: Schema = {
    "type": "integer", "minimum": -(2**31), "maximum": 2**31,
    "description": "Counted from 0, negative from the end; the last one if left out.",
}  # fmt: skip
_TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TOKENS: Schema = {"type": "array", "items": _TOKEN, "maxItems": 64}


def _count(most: int, default: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": most, "default": default}


def _of_text(**others: Schema) -> Schema:
    text: dict[str, Schema] = {
        "model": fields.MODEL,
        "text": {"type": "string", "description": "Marks in it are single tokens; it begins as the model expects."},
        "tokens": {**fields.IDS, "description": "In place of a text."},
    }
    return {"type": "object", "properties": {**text, **others}}


TEXT = _of_text()
STEPS = _of_text(top=_count(fields.MOST_ALTERNATIVES, 5))
ALTERNATIVES = _of_text(position=_POSITION, top=_count(1000, 10))
SAMPLER = _of_text(position=_POSITION, top=_count(1000, 5), watch=_TOKENS, **fields.SAMPLING)
TEMPERATURE = _of_text(
    position=_POSITION,
    top=_count(1000, 5),
    temperatures={"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 100}, "maxItems": 50},
    **fields.SAMPLING,
)
LENS = _of_text(
    positions={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31}, "maxItems": 128},
    top=_count(50, 5),
    watch=_TOKENS,
)
ATTENTION = _of_text(layer={"type": "integer", "minimum": -1000, "maximum": 1000, "default": -1})
BRANCHES = _of_text(width=_count(16, 4), length=_count(32, 16), starts=_TOKENS)
NEIGHBOURS: Schema = {
    "type": "object",
    "required": ["token"],
    "properties": {"model": fields.MODEL, "token": _TOKEN, "top": _count(1000, 10)},
}
EMBEDDINGS: Schema = {
    "type": "object",
    "required": ["texts"],
    "properties": {
        "model": fields.MODEL,
        "texts": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 64},
    },
}
TEMPLATE: Schema = {
    "type": "object",
    "required": ["messages"],
    "properties": {"model": fields.MODEL, "messages": FIELDS["messages"]},
}


def plain(value: object) -> Any:
    """In JSON's types: dataclasses and arrays too; nan and infinities are null. Nothing else gets through."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(each) for each in value]
    raise TypeError(f"no JSON for {type(value).__name__}")


# ── texts ──


async def tokens(call: Call) -> Json:
    """How the text is cut: ids, pieces, kinds, the characters each token covers."""
    from ..inspection import tokens as cutting

    async with call.service.leased(call.model) as scheduler:
        text = call.body.get("text")
        if not text:
            raise Refused("text is missing", param="text", code="missing_field")
        backend = scheduler.backend
        return _object(await asyncio.to_thread(lambda: cutting.tokenize(backend, text, special=True)))


def _object(value: object) -> Json:
    told: Json = plain(value)
    return told


def _ids(call: Call, scheduler: Scheduler, most: int) -> list[int]:
    """The tokens of the text, or those given, `most` at most. Raises Refused."""
    backend, body = scheduler.backend, call.body
    if not backend.info.generates:
        raise Refused(f"{backend.info.name}: makes vectors of texts, it does not write", code="unsupported")
    if "tokens" in body:
        found = list(body["tokens"])
    else:
        found = backend.encode(body.get("text", ""), special=True, bos=True)
    if not found:
        raise Refused("text is missing", param="text", code="missing_field")
    if max(found) >= backend.info.n_vocab:
        expected = f"expected 0 to {backend.info.n_vocab - 1}"
        raise Refused(f"tokens: {max(found)} is no token, {expected}", param="tokens", code="invalid_value")
    if len(found) > most:
        message = f"the text has {len(found):,} tokens, at most {most:,} are inspected"
        raise Refused(message, param="text", code="context_length_exceeded")
    return found


async def _inspected(call: Call, look: Callable[[Backend, list[int]], object]) -> Json:
    """What `look` finds in the request's tokens."""
    async with call.service.leased(call.model) as scheduler:
        backend = scheduler.backend
        ids = _ids(call, scheduler, min(call.service.limits.inspected_tokens, scheduler.context - 1))
        found = await computed(call, scheduler, lambda: look(backend, ids))
        return await asyncio.to_thread(_object, found)  # weights of attention are many


def _sampling(call: Call, backend: Backend) -> Sampling:
    return sampling(call.body, backend, max_tokens=None, grammar=None)


# ── what comes next ──


async def steps(call: Call) -> Json:
    """Every token of the text: its probability, rank, entropy, and what might have stood in its place."""
    top = call.body.get("top", 5)
    lease = await call.service.lease(call.model)
    try:
        ids = _ids(call, lease.scheduler, lease.scheduler.context - 1)
        request = Request(
            tuple(ids), Sampling(temperature=0, max_tokens=1), echo=True, details=True, n_alternatives=top, key=call.key
        )
        answers = await submit(call, lease, [request])
    except BaseException:
        lease.release()
        raise
    found: list[Step] = []
    async for numbered in answers.events():
        event = numbered and numbered[1]
        if isinstance(event, Failed):
            raise refusal(event.error)
        if isinstance(event, Echo):
            found += event.steps
    return {"tokens": [_step(step) for step in found]}


def _step(step: Step) -> Json:
    others = [{"id": each.id, "piece": plain(each.piece), "logprob": plain(each.logprob)} for each in step.alternatives]
    return {
        "id": step.id, "piece": plain(step.piece), "text": step.text, "logprob": plain(step.logprob),
        "rank": step.rank or None, "entropy": plain(step.entropy), "alternatives": others,
    }  # fmt: skip


async def alternatives(call: Call) -> Json:
    """What might come after a position: the likeliest tokens, and the entropy."""
    from ..chat.details import describe
    from ..inspection import temperature
    from ..inspection.tokens import visible

    def look(backend: Backend, ids: list[int]) -> Json:
        place = temperature.at(backend, ids, call.body.get("position"))
        best = int(place.logits.argmax())
        found = describe(place.logits, best, min(call.body.get("top", 10), len(place.logits)))
        pairs = zip(found.ids.tolist(), found.logprobs.tolist(), strict=True)
        rows = [{"id": id, "piece": visible(backend.piece(id)), "logprob": logprob} for id, logprob in pairs]
        return {"position": place.position, "entropy": found.entropy, "alternatives": rows}

    return await _inspected(call, look)


async def sampler(call: Call) -> Json:
    """Every stage of the samplers after a position: what it left, what it removed, the fate of the `watch`ed tokens."""
    from ..inspection import temperature

    def look(backend: Backend, ids: list[int]) -> object:
        chosen = _sampling(call, backend)
        place = temperature.at(backend, ids, call.body.get("position"))
        return temperature.trace(place, chosen, tokens=call.body.get("watch", ()), top=call.body.get("top", 5))

    return await _inspected(call, look)


async def heat(call: Call) -> Json:
    """The distribution after a position at several temperatures, sampled and uncut."""
    from ..inspection import temperature

    def look(backend: Backend, ids: list[int]) -> object:
        chosen = _sampling(call, backend)
        place = temperature.at(backend, ids, call.body.get("position"))
        wanted = call.body.get("temperatures") or temperature.TEMPERATURES
        return temperature.grid(place, chosen, wanted, top=min(call.body.get("top", 5), len(place.logits)))

    return await _inspected(call, look)


async def branches(call: Call) -> Json:
    """How the text might go on: the likeliest next tokens (or `starts`), each gone on with. Others wait meanwhile."""
    from ..inspection import branches as growing

    def look(backend: Backend, ids: list[int]) -> object:
        body = call.body
        starts = tuple(body.get("starts", ()))[:16]
        width = min(body.get("width", 4), backend.info.n_vocab)
        return growing.grow(backend, ids, growing.Shape(width=width, length=body.get("length", 16), starts=starts))

    return await _inspected(call, look)


# ── inside ──


async def lens(call: Call) -> Json:
    """What the model would say after each of its layers (logit lens)."""
    from ..inspection import lens as lenses

    def look(backend: Backend, ids: list[int]) -> object:
        body = call.body
        return lenses.lens(
            backend,
            ids,
            positions=body.get("positions"),
            top=body.get("top", 5),
            watch=_of(backend, body.get("watch", ())),
        )

    return await _inspected(call, look)


def _of(backend: Backend, ids: Iterable[int]) -> list[int]:
    found = list(ids)
    if found and max(found) >= backend.info.n_vocab:
        raise LlmkitError(f"token {max(found)}: the model has tokens 0 to {backend.info.n_vocab - 1}")
    return found


async def attention(call: Call) -> Json:
    """Which tokens each head of a layer looks at: weights by head, query and key."""
    from ..inspection import attention as heads

    return await _inspected(call, lambda backend, ids: heads.attention(backend, ids, call.body.get("layer", -1)))


async def residual(call: Call) -> Json:
    """The residual stream: norms and directions at every layer and position."""
    from ..inspection import layers

    return await _inspected(call, layers.residual)


async def neighbours(call: Call) -> Json:
    """The rows of the embedding table nearest to a token's."""
    from ..inspection import embeddings

    async with call.service.leased(call.model) as scheduler:
        backend = scheduler.backend
        token = _of(backend, [call.body["token"]])[0]
        top = min(call.body.get("top", 10), backend.info.n_vocab - 1)
        return _object(await computed(call, scheduler, lambda: embeddings.neighbours(backend, token, top)))


async def texts(call: Call) -> Json:
    """Texts as vectors, and how alike they are."""
    from ..inspection import embeddings

    async with call.service.leased(call.model) as scheduler:
        backend, given = scheduler.backend, call.body["texts"]
        count = sum(len(backend.encode(text, special=False)) for text in given)
        if count > (most := call.service.limits.inspected_tokens):
            raise Refused(f"the texts have {count:,} tokens, at most {most:,} are read", param="texts", code="size")
        return _object(await computed(call, scheduler, lambda: embeddings.sentences(backend, given)))


async def template(call: Call) -> Json:
    """The prompt of messages under X-rays: which tokens are whose words, and which the template's."""
    from ..inspection import xray

    async with call.service.leased(call.model) as scheduler:
        backend, messages = scheduler.backend, asked(call.body).messages
        own = call.service.template(backend)
        return _object(await asyncio.to_thread(lambda: xray.xray(backend, messages, template=own)))
