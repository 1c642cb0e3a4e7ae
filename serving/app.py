# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The routes: who may call, what they answer, and what happens when a client leaves."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..versions import __version__
from .answers import Form
from .errors import ApiError
from .mistakes import invalid, methods_at, unrouted
from .requests import ChatRequest, CompletionRequest
from .service import Asked, Run, Service

LARGEST_BODY = 64 * 2**20
"""Bytes of a request."""


def build_app(service: Service) -> FastAPI:
    """Return the application of a service whose worker runs."""
    app = FastAPI(title="dflash-hub", version=__version__, docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        return await answer(service, request, asked)

    @app.post("/v1/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        return await answer(service, request, asked)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        for one in service.models():
            if one["id"] == name:
                return JSONResponse(one)
        raise service.no_model(name)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> Response:
        if not service.is_ready:
            raise ApiError(503, "The server is shutting down.")
        return JSONResponse({"status": "ok"})

    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Gate, service=service)
    return app


# Who may call --------------------------------------------------------------------------------------------------------


class Gate:
    """Check who calls before anything of a request is read, and count responses.

    Without a key, a page in the user's browser could call the server too. It cannot set the type of its content, and a
    name of its own that leads here is none of ours.
    """

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.responses.labels(str(message["status"])).inc()
            await send(message)

        try:
            self.check(Request(scope))
        except ApiError as error:
            await response_of(error)(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def check(self, request: Request) -> None:
        """Refuse a request.

        Raises:
            ApiError: by its name of this server, its key, its size or the type of its content.
        """
        settings, headers = self.service.settings, request.headers
        host = request.url.hostname
        if settings.hosts and host not in settings.hosts:
            raise ApiError(403, f"This server is not {host}, but {', '.join(settings.hosts)}.")
        if settings.key is not None and request.url.path.startswith("/v1"):
            shown = headers.get("authorization", "").encode()
            if not hmac.compare_digest(shown, f"Bearer {settings.key}".encode()):
                raise ApiError(
                    401,
                    "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
        if request.method != "POST" or "POST" not in methods_at(request):
            return  # nothing of it is read
        size = headers.get("content-length", "0")
        if size.isdecimal() and int(size) > LARGEST_BODY:
            raise ApiError(413, f"The request has {size} bytes; {LARGEST_BODY} are read at most.")
        kind = headers.get("content-type", "")
        if not _is_json(kind):
            raise ApiError(
                415,
                f"Send JSON, with the header 'Content-Type: application/json'; it is {kind or 'missing'}.",
            )


def _is_json(kind: str) -> bool:
    """Tell whether FastAPI reads content of this type as JSON."""
    found = kind.partition(";")[0].strip().lower()
    return found == "application/json" or (
        found.startswith("application/") and found.endswith("+json")
    )


# Answers -------------------------------------------------------------------------------------------------------------


async def answer(service: Service, request: Request, asked: Asked) -> Response:
    """Answer a request, whole or as a stream.

    Raises:
        ApiError: it is refused, or decoding failed.
    """
    run = await service.start(asked)
    form = service.form(asked, run)
    if asked.stream:
        return Stream(service, run, form)
    try:
        if not await _whole(request, run):
            return Response(status_code=499)  # which nobody reads
    finally:
        run.cancel()
    service.count(run)
    return JSONResponse(form.whole(run.answers, run.prompts))


async def _whole(request: Request, run: Run) -> bool:
    """Wait until a request is answered; return False if its client leaves before."""
    answered = asyncio.create_task(run.whole())
    left = asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait({answered, left}, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            answered.result()
            return True
        return False
    finally:
        for task in (answered, left):
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


async def _leaves(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """Send an answer as server-sent events. It ends the decode when its client leaves."""

    def __init__(self, service: Service, run: Run, form: Form):
        self.run_of = run
        super().__init__(
            _events(service, run, form),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run_of.cancel()


async def _events(service: Service, run: Run, form: Form) -> AsyncIterator[str]:
    """Yield the events of a stream."""
    try:
        for index in range(len(run.choices)):
            for body in form.opening(index):
                yield _event(body)
        async for index, piece in run.pieces():
            for body in form.pieces(index, piece):
                yield _event(body)
        service.count(run)
        for body in form.closing(run.answers, run.prompts):
            yield _event(body)
    except ApiError as error:
        yield _event(error.body)
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


# Errors --------------------------------------------------------------------------------------------------------------


def response_of(error: ApiError) -> Response:
    """Return the response that refuses a request."""
    body = json.dumps(error.body)  # in ASCII: what it quotes may be no text that can be encoded
    return Response(body, error.status, error.headers, media_type="application/json")


async def _refused(request: Request, error: Any) -> Response:
    return response_of(error)


async def _no_route(request: Request, error: Any) -> Response:
    response = response_of(unrouted(request, error))
    response.headers.update(error.headers or {})  # which methods are allowed
    return response


async def _failed(request: Request, error: Any) -> Response:
    """Answer where this program is at fault; the server logs the traceback."""
    return response_of(ApiError(500, f"{type(error).__name__}: {error}"))


async def _invalid(request: Request, error: Any) -> Response:
    return response_of(invalid(error.errors()))
