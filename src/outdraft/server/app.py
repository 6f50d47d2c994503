"""The routes, and what is around them.

Here: which path is answered by what, the page's files, errors in the right shape, the OpenAPI
description. Not here: the answers themselves, one file a front.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from outdraft import __version__
from outdraft.server import info
from outdraft.server.anthropic_messages import Counted, MessagesRequest, count_tokens, messages
from outdraft.server.completions import CompletionRequest, completions
from outdraft.server.errors import ApiError
from outdraft.server.guard import Access, Guard, Visit
from outdraft.server.openai_chat import ChatRequest, chat
from outdraft.server.responses import ResponsesRequest, responses
from outdraft.server.service import Service
from outdraft.server.sse import error_response, unless_left

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Front = Callable[[Request, Service], Awaitable[Response]]

FRONTS: tuple[tuple[str, Front, type[BaseModel], str], ...] = (
    ("/v1/chat/completions", chat, ChatRequest, "Answer a conversation."),
    ("/v1/completions", completions, CompletionRequest, "Continue one or more texts."),
    ("/v1/responses", responses, ResponsesRequest, "Answer a conversation, in items."),
    ("/v1/messages", messages, MessagesRequest, "Answer a conversation, in Anthropic's words."),
    ("/v1/messages/count_tokens", count_tokens, Counted, "How many tokens a prompt has."),
    ("/v1/embeddings", info.embeddings, info.EmbeddingRequest, "Vectors of texts."),
    ("/tokenize", info.tokenize, info.TokenizeRequest, "Text to token ids."),
    ("/detokenize", info.detokenize, info.DetokenizeRequest, "Token ids to text."),
)
"""POST routes: path, what answers, the body's model, a summary."""

LOOKS: tuple[tuple[str, Callable[[Service], Response], str], ...] = (
    ("/v1/models", info.models, "The model that is served."),
    ("/v1/outdraft/stats", info.stats, "What drafting does just now."),
    ("/health", info.health, "Whether the engine answers; needs no key."),
    ("/ready", info.ready, "Whether a request would be taken on now."),
    ("/props", info.props, "What is loaded, in llama.cpp's words."),
)
"""GET routes without arguments."""


def make_app(service: Service, access: Access, log: Callable[[dict[str, Any]], None]) -> Guard:
    """The whole ASGI application of a service."""
    app = FastAPI(
        title="outdraft", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    for path, front, _, _ in FRONTS:
        app.router.routes.append(Route(path, _post(front, service), methods=["POST"]))
    for path, look, _ in LOOKS:
        app.router.routes.append(Route(path, _get(look, service), methods=["GET"]))

    async def one_model(request: Request) -> Response:
        return info.model(service, request.path_params["name"])

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    description = orjson.dumps(openapi(app))

    async def described(request: Request) -> Response:
        return Response(description, media_type="application/json")

    for path, endpoint in (
        ("/v1/models/{name:path}", one_model),
        ("/metrics", metrics),
        ("/openapi.json", described),
    ):
        app.router.routes.append(Route(path, endpoint, methods=["GET"]))
    for path, file in page_files(PAGE).items():
        app.router.routes.append(Route(path, _file(file), methods=["GET"]))

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unforeseen)

    def done(scope: Scope, visit: Visit) -> None:
        seconds = time.monotonic() - visit.started
        route = scope.get("route")
        visit.route = getattr(route, "path", "") or _route_of(app, scope)
        service.metrics.visited(visit, seconds)
        log(
            {
                "time": time.time(),
                "id": visit.id,
                "client": visit.client,
                "method": scope["method"],
                "route": visit.route or "other",
                "status": visit.status,
                "ms": round(seconds * 1e3, 3),
                **({"left": True} if visit.left_at is not None else {}),
                **visit.notes,
            }
        )

    return Guard(app, access, service.limits, done)


def page_files(folder: Path) -> dict[str, Path]:
    """The page's files by path, found once: a request's path is looked up, never opened."""
    found = {}
    if folder.is_dir():
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix in TYPES:
                found["/" + file.relative_to(folder).as_posix()] = file
        if "/index.html" in found:
            found["/"] = found["/index.html"]
    return found


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of the routes."""
    schema = get_openapi(title=app.title, version=app.version, routes=[])
    components: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, _, body, summary in FRONTS:
        own = body.model_json_schema(ref_template="#/components/schemas/{model}")
        components |= own.pop("$defs", {})
        components[body.__name__] = own
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": reference}},
                },
                "responses": _responses(),
            }
        }
    for path, _, summary in LOOKS:
        paths[path] = {"get": {"summary": summary, "responses": _responses()}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"] = {
        "get": {"summary": "One model.", "parameters": [name], "responses": _responses()}
    }
    metrics = {"200": {"description": "Prometheus' text.", "content": {"text/plain": {}}}}
    paths["/metrics"] = {"get": {"summary": "Counts and gauges.", "responses": metrics}}
    schema["paths"], schema["components"] = paths, {"schemas": components}
    return schema


def _responses() -> dict[str, Any]:
    answer = {"application/json": {"schema": {"type": "object"}}}
    good = {"description": "Done.", "content": {**answer, "text/event-stream": {}}}
    return {"200": good, "default": {"description": "An error.", "content": answer}}


def _post(front: Front, service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        await request.body()  # from here on, what is received next is that the client has left
        answer = await unless_left(front(request, service), request.receive)
        if answer is None:
            raise ClientDisconnect
        return answer

    return endpoint


def _get(
    look: Callable[[Service], Response], service: Service
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return look(service)

    return endpoint


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        headers = {"Cache-Control": "no-cache", "Content-Type": TYPES[path.suffix]}
        return FileResponse(path, headers=headers)

    return endpoint


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.scope)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing here", 405: "this method is not allowed here"}
    text = what.get(error.status_code, "the request cannot be answered")
    shown = ApiError(error.status_code, text, headers=dict(error.headers or {}))
    return error_response(shown, request.scope)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log line has it


async def _unforeseen(request: Request, error: Exception) -> Response:
    logging.getLogger("outdraft.server").error("a request failed", exc_info=error)
    return error_response(ApiError(500, "the server failed on this request"), request.scope)


def _route_of(app: FastAPI, scope: Scope) -> str:
    """The path of the route that a request went to, never the request's own."""
    for route in app.router.routes:
        if isinstance(route, Route) and route.path_regex.match(scope["path"]):
            return route.path
    return ""
