"""POST /v1/embeddings: texts, or lists of token ids, as vectors of length 1."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from ..backends import Backend
from ..inspection.embeddings import WEAK, unit
from . import fields
from .checking import Schema
from .errors import Refused
from .service import Call, computed
from .telling import Json

if TYPE_CHECKING:
    from .scheduler import Scheduler

MOST_TOKENS = 300_000  # of all inputs together, as OpenAI has it

SCHEMA: Schema = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "model": fields.MODEL,
        "input": {
            "description": "A text, several texts, a list of token ids of this model, or several.",
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 2048},
                fields.IDS,
                {"type": "array", "items": fields.IDS, "minItems": 1, "maxItems": 2048},
            ],
        },
        "encoding_format": {
            "type": "string", "enum": ["float", "base64"], "default": "float",
            "description": "base64: 32-bit floats, little-endian.",
        },
        "dimensions": {
            "type": "integer", "minimum": 1,
            "description": "Only the first so many, made length 1 again: for models trained to bear it.",
        },
    },
}  # fmt: skip


async def embed(call: Call) -> Json:
    """A vector for each input, in its order."""
    async with call.service.leased(call.model) as scheduler:
        backend = scheduler.backend
        inputs = _tokens(call.body["input"], backend, _most(scheduler))
        size = backend.info.n_embd
        dimensions = call.body.get("dimensions", size)
        if dimensions > size:
            raise Refused(
                f"dimensions: {dimensions:,}, this model has {size:,}", param="dimensions", code="invalid_value"
            )
        data = []
        for index, tokens in enumerate(inputs):
            vector = await computed(call, scheduler, lambda tokens=tokens: backend.pool(tokens))  # type: ignore[misc]
            row = unit(vector[:dimensions]).astype("<f4")
            text = call.body.get("encoding_format") == "base64"
            told = base64.b64encode(row.tobytes()).decode() if text else row.astype(float).tolist()
            data.append({"object": "embedding", "index": index, "embedding": told})
        count = sum(map(len, inputs))
        told = {"object": "list", "data": data, "model": call.model or call.service.models.default}
        told["usage"] = {"prompt_tokens": count, "total_tokens": count}
        return told | ({} if backend.info.pooling else {"warning": WEAK})


def _most(scheduler: Scheduler) -> int:
    """Tokens of one input."""
    return min(scheduler.context, scheduler.backend.info.n_ctx_train or scheduler.context)


def _tokens(given: Any, backend: Backend, most: int) -> list[list[int]]:
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    found = [_one(each, index, backend, most) for index, each in enumerate(given)]
    if (total := sum(map(len, found))) > MOST_TOKENS:
        raise Refused(
            f"input: {total:,} tokens in one request, expected at most {MOST_TOKENS:,}", param="input", code="size"
        )
    return found


def _one(given: Any, index: int, backend: Backend, most: int) -> list[int]:
    tokens = backend.encode(given, special=False, bos=True) if isinstance(given, str) else list(given)
    if not tokens:
        raise Refused(f"input[{index}] has no tokens", param="input", code="size")
    if max(tokens) >= backend.info.n_vocab:
        raise Refused(
            f"input[{index}]: {max(tokens)} is no token of this model, which has 0 to {backend.info.n_vocab - 1}."
            " LangChain sends ids of another tokenizer unless told check_embedding_ctx_length=False.",
            param="input",
            code="invalid_value",
        )
    if len(tokens) > most:
        raise Refused(
            f"input[{index}] has {len(tokens):,} tokens, the model reads at most {most:,}",
            param="input",
            code="context_length_exceeded",
        )
    return tokens
