"""The HTTP side of the server: clients that may ask, clients that hang up, and streams as server-sent events."""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tools.serve import replies, responses
from tools.serve.engine import Engine
from tools.serve.replies import error_object
from tools.serve.requests import MAX_BYTES, Asked, Served, Wrong, understand
from tools.serve.rows import Busy, Event

BODY_SECONDS = 60  # within which a request must have arrived
MOST_READING = 2**28  # bytes of all requests that are being read. Beyond that, only small ones are read
SMALL = 2**16  # bytes of a small request
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[?::1\]?)(:\d*)?", re.IGNORECASE)  # this machine's own names

logger = logging.getLogger(__name__)


class Server:
    """The HTTP side of an engine.

    Args:
        engine: The engine, whose model has a tokenizer.
        name: What clients call the model.
        key: What clients must send as the API key. None asks for none, and answers only requests to this machine's
            own names if `is_local`: another site's page in a browser cannot reach the server under its own name.
        plans: What requests may name as their plan, besides "default" and "none".
        longest: Prompts of more tokens run at full depth.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        key: str | None = None,
        is_local: bool = True,
        plans: dict | None = None,
        longest: int | None = None,
    ):
        self.engine, self.name, self.key, self.is_local = engine, name, key, is_local
        self.served = Served(engine.model, name, plans, longest)
        self.reading = 0  # bytes of requests that are being read
        self.arriving = 0  # requests that are being encoded
        self.encoder = ThreadPoolExecutor(1)  # one at a time, so that their memory is bounded
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.guarded(self.models)),
                Route("/v1/models/{name:path}", self.guarded(self.models)),
                *(self.answering(path) for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses")),
            ],
            exception_handlers={HTTPException: not_found},
        )

    def answering(self, path: str) -> Route:
        """A route that answers prompts."""
        return Route(path, self.guarded(functools.partial(self.answer, path)), methods=["POST"])

    def guarded(self, handler: Callable) -> Callable:
        """The handler, for clients that may ask, and with an error object for whatever it raises."""

        async def call(request: Request) -> Response:
            try:
                self.check_client(request)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                return failure(error)

        return call

    def check_client(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # as it was sent
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Wrong("the API key is wrong", 401, code="invalid_api_key")
        if self.key is None and self.is_local and not LOCAL.fullmatch(request.headers.get("host", "")):
            raise Wrong("without an API key, the host of a request must be localhost, 127.0.0.1 or [::1]", 403)

    async def health(self, request: Request) -> Response:
        counts = self.engine.counts()
        return json_response({"status": "ok"} | counts | {"waiting": counts["waiting"] + self.arriving})

    async def models(self, request: Request) -> Response:
        one = {"id": self.name, "object": "model", "created": 0, "owned_by": "pop", "plans": [*self.served.plans]}
        one["max_model_len"] = self.served.model.max_seq_len
        asked = request.path_params.get("name")
        if asked not in (None, self.name):
            raise Wrong(f"there is no model {asked!r:.80}", 404, "model", "model_not_found")
        return json_response({"object": "list", "data": [one]} if asked is None else one)

    async def answer(self, path: str, request: Request) -> Response:
        form = responses if path == "/v1/responses" else replies
        as_chat = responses.as_chat if form is responses else dict
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(events.put_nowait, event)

        raw = await self.read(request)
        began = time.monotonic()
        if self.arriving >= self.engine.most_waiting:
            raise Busy
        self.arriving += 1
        try:
            arguments = self.served, raw, path != "/v1/completions", emit, as_chat, began
            asked = await loop.run_in_executor(self.encoder, understand, *arguments)
        finally:
            self.arriving -= 1
        del raw, arguments
        found = self.events(request, asked, events)
        if not asked.stream:
            async with aclosing(found):
                return json_response(form.whole(asked, [event async for event in found]))
        chunks = form.chunks_of(asked, found)
        first = await anext(chunks)  # an error up to here still has a status
        return StreamingResponse(stream(first, chunks, found), media_type="text/event-stream")

    async def read(self, request: Request) -> bytes:
        """A request's body. A browser sends JSON to another site only if that site allows it."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Wrong("the content type must be application/json", 415)
        body = bytearray()

        async def collect() -> None:
            async for part in request.stream():
                body.extend(part)
                self.reading += len(part)
                if len(body) > MAX_BYTES:
                    raise Wrong(f"a request may have {MAX_BYTES:,} bytes", 413)
                if len(body) > SMALL and self.reading > MOST_READING:
                    raise Busy

        try:
            await asyncio.wait_for(collect(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Wrong(f"the request has not arrived within {BODY_SECONDS} seconds", 408) from None
        finally:
            self.reading -= len(body)
        return bytes(body)

    async def events(self, request: Request, asked: Asked, events: asyncio.Queue) -> AsyncIterator[Event]:
        """Start a request's jobs, and yield their events. If the client hangs up, they end."""
        self.engine.submit(asked.jobs)
        watcher = asyncio.create_task(hang_up(request, events))
        try:
            left = len(asked.jobs)
            while left:
                event = await events.get()
                if event is None:
                    raise ClientDisconnect
                if event.error is not None:
                    raise event.error
                left -= event.finish_reason is not None
                yield event
        finally:
            watcher.cancel()
            self.engine.cancel(asked.jobs)


async def hang_up(request: Request, events: asyncio.Queue) -> None:
    """Put None among the events when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


async def stream(first: dict, chunks: AsyncIterator[dict], found) -> AsyncIterator[str]:
    """A stream as server-sent events."""
    async with aclosing(found), aclosing(chunks):
        try:
            yield sent(first)
            async for chunk in chunks:
                yield sent(chunk)
            if "type" not in first:
                yield "data: [DONE]\n\n"
        except ClientDisconnect:
            pass
        except Exception as error:
            _, content = error_object(error)
            yield sent(content | (content["error"] | {"type": "error"} if "type" in first else {}))


def sent(chunk: dict) -> str:
    """An object of a stream as a server-sent event. Those of /v1/responses have a type."""
    name = f"event: {chunk['type']}\n" if "type" in chunk else ""
    return f"{name}data: {json.dumps(chunk)}\n\n"


def json_response(content: dict, status: int = 200) -> Response:
    headers = {}
    if status == 429:
        headers["retry-after"] = "1"
    elif status == 501:
        headers["x-should-retry"] = "false"  # read by the package openai: the same request would fail again
    return Response(json.dumps(content), status, headers, media_type="application/json")  # in ASCII: any text fits


def failure(error: Exception) -> Response:
    status, content = error_object(error)
    if status == 500:
        logger.error("a request has failed", exc_info=error)
    return json_response(content, status)


async def not_found(request: Request, error: HTTPException) -> Response:
    return failure(Wrong(f"{request.method} {request.url.path!r:.80}: {error.detail}", error.status_code))
