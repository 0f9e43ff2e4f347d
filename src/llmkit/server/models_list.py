"""The models of the server: which there are, which are in memory; load one, unload one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import fields
from .checking import Schema
from .errors import Refused
from .service import Call, Service
from .telling import Json

if TYPE_CHECKING:
    from .residents import Resident

NAMED: Schema = {"type": "object", "required": ["model"], "properties": {"model": fields.MODEL}}


async def listed(call: Call) -> Json:
    """All of them."""
    return {"object": "list", "data": [_told(call.service, each) for each in call.service.models.list()]}


async def one(call: Call) -> Json:
    """One of them."""
    return _told(call.service, _known(call, call.path["name"]))


async def load(call: Call) -> Json:
    """Load a model now, so that the first request need not wait."""
    _known(call, call.model)
    (await call.service.lease(call.model)).release()
    return _told(call.service, _known(call, call.model))


async def unload(call: Call) -> Json:
    """Take a model out of memory, unless it is in use."""
    _known(call, call.model)
    await asyncio.to_thread(call.service.models.unload, call.model)
    return _told(call.service, _known(call, call.model))


def _known(call: Call, name: str) -> Resident:
    found = next((each for each in call.service.models.list() if each.name == name), None)
    if found is None:
        names = ", ".join(call.service.models.names)
        raise Refused(f"no model '{name[:200]}'; there are: {names}", status=404, param="model", code="model_not_found")
    return found


def _told(service: Service, resident: Resident) -> Json:
    told: Json = {
        "id": resident.name, "object": "model", "created": int(service.began), "owned_by": "llmkit",
        "state": resident.state,
    }  # fmt: skip
    info, stats = resident.info, resident.stats
    if info is not None:
        told["meta"] = {
            "architecture": info.architecture, "n_params": info.n_params, "n_vocab": info.n_vocab,
            "n_embd": info.n_embd, "n_layer": info.n_layer, "n_ctx_train": info.n_ctx_train,
            "size": info.weight_nbytes, "generates": info.generates, "pooling": info.pooling, "engine": info.engine,
        }  # fmt: skip
    if stats is not None:
        told["context_length"] = stats.context
    return told
