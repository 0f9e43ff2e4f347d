"""The application: every row of ROUTES as a route of FastAPI, behind the gate, with errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import LlmkitError
from . import bodies, errors, page
from .checking import checked, documented, parse
from .errors import Refused, refusal, shaped
from .routes import OPEN_PATHS, ROUTES, Reply, Route
from .security import KEY, Gate, Policy
from .service import DEFAULTS, Call, Limits, Service
from .telling import Json

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from .residents import Models

_log = logging.getLogger(__name__)
_LARGE_NBYTES = 1 << 16  # bodies from here on are read in a thread, so that streams go on
_ERROR: Json = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
            },
        }
    },
}  # fmt: skip
_STATUSES = {
    400: "The request is wrong: the field, what was expected, what was found.", 401: "The key is wrong.",
    404: "No such model.", 413: "The body is too large.", 503: "No room for more: try again after Retry-After seconds.",
}  # fmt: skip


def app(models: Models, *, policy: Policy, limits: Limits = DEFAULTS) -> FastAPI:
    """The server's ASGI application; `app.state.service` is what its routes share.

    Raises MissingDependency where FastAPI is not installed.
    """
    from fastapi import FastAPI

    service = Service(models, limits)
    made = FastAPI(
        title="llmkit", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
        description="One model or several: OpenAI's routes, tokens, and what happens inside.",
    )  # fmt: skip
    made.state.service = service
    made.router.redirect_slashes = False
    for route in ROUTES:
        _add(made, route, service)
    _add_documentation(made)
    _add_errors(made)
    made.add_middleware(Gate, policy=policy, service=service)
    return made


def _add(made: FastAPI, route: Route, service: Service) -> None:
    made.add_api_route(
        route.path, _endpoint(route, service), methods=[route.method], tags=[route.tag], summary=route.summary,
        name=route.name, operation_id=route.name, openapi_extra=_extra(route), responses=_responses(route),
        response_model=None,
    )  # fmt: skip


def _endpoint(route: Route, service: Service) -> Callable[..., Awaitable[Response]]:
    from fastapi import Request

    async def endpoint(request: Request) -> Response:
        try:
            body = await _body(request, route, service.limits)
            call = Call(service, body, request.path_params, request.scope.get(KEY, ""), request.receive)
            return _response(await route.handler(call))
        except LlmkitError as error:
            return _refused(refusal(error))
        except Exception:
            _log.exception("a bug, met by %s %s", route.method, route.path)
            return _refused(Refused("a bug in llmkit; its log tells more", status=500, code="internal_error"))

    # FastAPI reads annotations, and would look for this name where it has not been imported
    endpoint.__annotations__ = {"request": Request}
    endpoint.__doc__ = route.handler.__doc__
    return endpoint


async def _body(request: Request, route: Route, limits: Limits) -> Mapping[str, Any]:
    if route.body is None:
        return {}
    raw = await bodies.read(request.receive, limits, request.headers.get("content-length"))
    if len(raw) < _LARGE_NBYTES:
        return checked(parse(raw), route.body)
    schema = route.body
    return await asyncio.to_thread(lambda: checked(parse(raw), schema))


def _response(reply: Reply) -> Response:
    from starlette.responses import Response, StreamingResponse

    if isinstance(reply, bytes):
        return Response(reply, media_type="text/plain; version=0.0.4; charset=utf-8")
    if isinstance(reply, dict):
        return Response(_json(reply), media_type="application/json")
    headers = {"x-accel-buffering": "no"}
    return StreamingResponse(reply, media_type="text/event-stream; charset=utf-8", headers=headers)


def _refused(error: Refused) -> Response:
    from starlette.responses import Response

    return Response(_json(shaped(error)), error.status, errors.headers(error), "application/json")


def _json(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _add_errors(made: FastAPI) -> None:
    from starlette.exceptions import HTTPException

    async def refuse(request: Request, error: HTTPException) -> Response:
        message = {404: "no such route", 405: "this route takes another method"}.get(error.status_code, error.detail)
        response = _refused(Refused(message, status=error.status_code, code="no_such_route"))
        response.headers.update(error.headers or {})
        return response

    made.add_exception_handler(HTTPException, refuse)  # type: ignore[arg-type]


# ── documentation ──


def _add_documentation(made: FastAPI) -> None:
    from starlette.responses import HTMLResponse, Response

    async def schema(_: Request) -> Response:
        return Response(_json(document(made)), media_type="application/json")

    async def docs(_: Request) -> Response:
        return HTMLResponse(page.html(document(made)), headers=page.HEADERS)

    made.add_route("/openapi.json", schema)
    made.add_route("/docs", docs)


def document(made: FastAPI) -> Json:
    """The OpenAPI description of the application."""
    if made.openapi_schema is None:
        told = made.openapi()
        schemes = told.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer", "description": "Where the server has a key."}
    return dict(made.openapi_schema or {})


def _extra(route: Route) -> Json:
    told: Json = {"security": [] if route.path in OPEN_PATHS else [{"key": []}, {}]}
    if route.body is not None:
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": documented(route.body)}}}
    if "{" in route.path:
        told["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return told


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    statuses = {} if route.open else dict(_STATUSES)
    if route.body is None:
        statuses = {status: words for status, words in statuses.items() if status in (401, 404, 503)}
    told: dict[int | str, dict[str, Any]] = {
        status: {"description": words, "content": {"application/json": {"schema": _ERROR}}}
        for status, words in statuses.items()
    }
    kinds: Json = {"application/json": {"schema": {"type": "object"}}}
    if route.path == "/metrics":
        kinds = {"text/plain": {"schema": {"type": "string"}}}
    if route.streams:
        kinds["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": route.summary, "content": kinds}, **told}
