"""Tokens of a text, text of tokens, and the prompt that a chat template makes of messages."""

from __future__ import annotations

import asyncio
from typing import Any

from . import fields
from .chat_completions import prepared
from .checking import Schema
from .errors import Refused
from .messages import FIELDS
from .service import Call
from .telling import Json

TOKENIZE: Schema = {
    "type": "object",
    "required": ["content"],
    "properties": {
        "model": fields.MODEL,
        "content": {"type": "string"},
        "add_special": {"type": "boolean", "default": False, "description": "Begin as the model expects."},
        "parse_special": {"type": "boolean", "default": True, "description": "Marks in the text are single tokens."},
        "with_pieces": {"type": "boolean", "default": False, "description": "Each with its text, or with its bytes."},
    },
}
DETOKENIZE: Schema = {
    "type": "object",
    "required": ["tokens"],
    "properties": {
        "model": fields.MODEL,
        "tokens": {**fields.IDS, "minItems": 0, "maxItems": 1_000_000},
    },
}
TEMPLATE: Schema = {
    "type": "object",
    "required": ["messages"],
    "properties": {"model": fields.MODEL, **FIELDS, "response_format": fields.RESPONSE_FORMAT},
}


async def tokenize(call: Call) -> Json:
    """The ids of a text."""
    body = call.body
    async with call.service.leased(call.model) as scheduler:
        backend = scheduler.backend
        special, bos = body.get("parse_special", True), body.get("add_special", False)
        ids = await asyncio.to_thread(lambda: backend.encode(body["content"], special=special, bos=bos))
        if not body.get("with_pieces"):
            return {"tokens": ids}
        return {"tokens": [{"id": id, "piece": _piece(backend.piece(id))} for id in ids]}


def _piece(piece: bytes) -> Any:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


async def detokenize(call: Call) -> Json:
    """The text of ids; what is no whole character is marked."""
    async with call.service.leased(call.model) as scheduler:
        backend, ids = scheduler.backend, call.body["tokens"]
        if ids and max(ids) >= backend.info.n_vocab:
            expected = f"expected 0 to {backend.info.n_vocab - 1}"
            raise Refused(f"tokens: {max(ids)} is no token, {expected}", param="tokens", code="invalid_value")
        return {"content": b"".join(map(backend.piece, ids)).decode("utf-8", "replace")}


async def apply_template(call: Call) -> Json:
    """The prompt of messages, as a chat completion would give it to the model, and how many tokens it has."""
    async with call.service.leased(call.model) as scheduler:
        wanted = await asyncio.to_thread(prepared, call.service, scheduler.backend, call.body)
        return {"prompt": wanted.prompt, "tokens": len(wanted.request.prompt), "context": scheduler.context}
