"""All routes, one row each: the table that makes the app, its checks and its documentation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from . import chat_completions, completions, embeddings, health, inspecting, models_list, tokenizing
from .checking import Schema
from .service import Call
from .telling import Json

Reply = Json | bytes | AsyncIterator[bytes]
Handler = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True)
class Route:
    """A way in. `body`: what it takes; `open`: without a key; `streams`: it may answer with events."""

    method: str
    path: str
    tag: str
    handler: Handler
    body: Schema | None = None
    open: bool = False
    streams: bool = False

    @property
    def name(self) -> str:
        """For its operation in OpenAPI."""
        return f"{self.method} {self.path}".lower().translate(str.maketrans(" /-{}:", "______"))

    @property
    def summary(self) -> str:
        """The first line of the handler's docstring."""
        return (self.handler.__doc__ or "").strip().partition("\n")[0]


def _inspect(topic: str, handler: Handler, body: Schema) -> Route:
    return Route("POST", f"/inspect/{topic}", "inspect", handler, body)


ROUTES = (
    Route("GET", "/v1/models", "models", models_list.listed),
    Route("GET", "/v1/models/{name:path}", "models", models_list.one),
    Route("POST", "/models/load", "models", models_list.load, models_list.NAMED),
    Route("POST", "/models/unload", "models", models_list.unload, models_list.NAMED),
    Route("POST", "/v1/chat/completions", "openai", chat_completions.complete, chat_completions.SCHEMA, streams=True),
    Route("POST", "/v1/completions", "openai", completions.complete, completions.SCHEMA, streams=True),
    Route("POST", "/v1/embeddings", "openai", embeddings.embed, embeddings.SCHEMA),
    Route("POST", "/tokenize", "tokens", tokenizing.tokenize, tokenizing.TOKENIZE),
    Route("POST", "/detokenize", "tokens", tokenizing.detokenize, tokenizing.DETOKENIZE),
    Route("POST", "/apply-template", "tokens", tokenizing.apply_template, tokenizing.TEMPLATE),
    _inspect("tokens", inspecting.tokens, inspecting.TEXT),
    _inspect("steps", inspecting.steps, inspecting.STEPS),
    _inspect("alternatives", inspecting.alternatives, inspecting.ALTERNATIVES),
    _inspect("sampler", inspecting.sampler, inspecting.SAMPLER),
    _inspect("temperature", inspecting.heat, inspecting.TEMPERATURE),
    _inspect("branches", inspecting.branches, inspecting.BRANCHES),
    _inspect("lens", inspecting.lens, inspecting.LENS),
    _inspect("attention", inspecting.attention, inspecting.ATTENTION),
    _inspect("residual", inspecting.residual, inspecting.TEXT),
    _inspect("neighbours", inspecting.neighbours, inspecting.NEIGHBOURS),
    _inspect("embeddings", inspecting.texts, inspecting.EMBEDDINGS),
    _inspect("template", inspecting.template, inspecting.TEMPLATE),
    Route("GET", "/health", "server", health.health, open=True),
    Route("GET", "/metrics", "server", health.metrics),
)
OPEN_PATHS = frozenset({"/docs", "/openapi.json"} | {route.path for route in ROUTES if route.open})
