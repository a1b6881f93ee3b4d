"""Serve a model to clients of the OpenAI protocol.

python -m tools.serve smollm2-135m --port 8000
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hmac
import json
import os
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress

import pop
from pop.errors import check_count
from pop.system.memory import free_bytes
from tools.common import exit_status
from tools.serve.engine import Engine
from tools.serve.replies import chunks_of, error_object, whole
from tools.serve.requests import MAX_ANSWERS, MAX_BYTES, Asked, Wrong, understand
from tools.serve.rows import Busy, Event

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise SystemExit("tools.serve needs starlette and uvicorn; run `pip install -e '.[serve]'`") from None

KEY = "POP_API_KEY"  # the environment variable with the key that clients must send
BODY_SECONDS = 60  # within which a request must have arrived
MOST_CONNECTIONS = 512
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Server:
    """The HTTP side of an engine.

    Args:
        model: A model with a tokenizer.
        name: What clients call it.
        key: What clients must send as the API key. None asks for none, and answers only requests to this machine's
            own names if `is_local`: another site's page in a browser cannot reach the server under its own name.
    """

    def __init__(self, engine: Engine, name: str, key: str | None = None, is_local: bool = True):
        self.engine, self.model, self.name, self.key, self.is_local = engine, engine.model, name, key, is_local
        self.arriving = 0  # requests that are being read and encoded
        self.encoder = ThreadPoolExecutor(1)  # one at a time, so that their memory is bounded
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.guarded(self.models)),
                Route("/v1/models/{name:path}", self.guarded(self.models)),
                Route("/v1/chat/completions", self.guarded(functools.partial(self.answer, True)), methods=["POST"]),
                Route("/v1/completions", self.guarded(functools.partial(self.answer, False)), methods=["POST"]),
            ],
            exception_handlers={HTTPException: not_found},
        )

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
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Wrong("the API key is wrong", 401, code="invalid_api_key")
        if self.key is None and self.is_local and request.headers.get("host", "").rsplit(":", 1)[0] not in LOCAL:
            raise Wrong(f"without an API key, the host of a request must be one of {', '.join(LOCAL)}", 403)

    async def health(self, request: Request) -> Response:
        return json_response({"status": "ok", "running": len(self.engine.rows), "waiting": len(self.engine.waiting)})

    async def models(self, request: Request) -> Response:
        one = {"id": self.name, "object": "model", "created": 0, "owned_by": "pop"}
        asked = request.path_params.get("name")
        if asked not in (None, self.name):
            raise Wrong(f"there is no model {asked!r:.80}", 404, "model", "model_not_found")
        return json_response({"object": "list", "data": [one]} if asked is None else one)

    async def answer(self, is_chat: bool, request: Request) -> Response:
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(events.put_nowait, event)

        if self.arriving >= self.engine.most_waiting:
            raise Busy
        self.arriving += 1
        try:
            raw = await read(request)
            arguments = self.model, self.name, raw, is_chat, emit
            asked = await loop.run_in_executor(self.encoder, understand, *arguments)
        finally:
            self.arriving -= 1
        del raw, arguments
        found = self.events(request, asked, events)
        if not asked.stream:
            async with aclosing(found):
                return json_response(whole(asked, [event async for event in found]))
        chunks = chunks_of(asked, found)
        first = await anext(chunks)  # an error so far has a status of its own
        return StreamingResponse(stream(first, chunks, found), media_type="text/event-stream")

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


async def read(request: Request) -> bytes:
    """A request's body. A browser sends JSON to another site only if that site allows it."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Wrong("the content type must be application/json", 415)
    body = bytearray()

    async def collect() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > MAX_BYTES:
                raise Wrong(f"a request may have {MAX_BYTES:,} bytes", 413)

    try:
        await asyncio.wait_for(collect(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Wrong(f"the request has not arrived within {BODY_SECONDS} seconds", 408) from None
    return bytes(body)


async def hang_up(request: Request, events: asyncio.Queue) -> None:
    """Put None among the events when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


async def stream(first: dict, chunks: AsyncIterator[dict], found) -> AsyncIterator[str]:
    """A stream as server-sent events."""
    async with aclosing(found), aclosing(chunks):
        try:
            yield f"data: {json.dumps(first)}\n\n"
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except ClientDisconnect:
            pass
        except Exception as error:
            yield f"data: {json.dumps(error_object(error)[1])}\n\n"


def json_response(content: dict, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == 429 else None
    return Response(json.dumps(content), status, headers, media_type="application/json")  # in ASCII: any text fits


def failure(error: Exception) -> Response:
    status, content = error_object(error)
    if status == 500:
        traceback.print_exception(error)
    return json_response(content, status)


async def not_found(request: Request, error: HTTPException) -> Response:
    return failure(Wrong(f"{request.method} {request.url.path!r:.80}: {error.detail}", error.status_code))


def serve(args: argparse.Namespace) -> None:
    """Load the model, and answer requests until the process is stopped."""
    for option, least in (("batch", 1), ("queue", MAX_ANSWERS)):
        check_count(f"--{option}", getattr(args, option), least)
    loading = ("prune", "max_seq_len", "device", "compile", "quantize")
    model = pop.load(args.model, **{name: getattr(args, name) for name in loading})
    model.need_tokenizer("the server")
    model.warmup(min(args.batch, 2))
    free = free_bytes(model.device) or 2**32
    engine = Engine(model, args.batch, args.queue, free // 4 if args.cache_mb is None else args.cache_mb * 2**20)
    threading.Thread(target=engine.run, daemon=True).start()
    name, key, is_local = os.path.basename(args.model.rstrip("/")), os.environ.get(KEY) or None, args.host in LOCAL
    if key is None and not is_local:
        print(f"anybody who reaches {args.host} can use this server; set {KEY} to ask for a key", file=sys.stderr)
    app = Server(engine, name, key, is_local).app
    options = {"log_level": "warning", "ws": "none", "lifespan": "off", "server_header": False}
    options |= {"limit_concurrency": MOST_CONNECTIONS, "timeout_graceful_shutdown": 5}
    config = uvicorn.Config(app, args.host, args.port, **options)
    with config.bind_socket() as listener:
        print(f"{name} is served at http://{args.host}:{listener.getsockname()[1]}/v1", flush=True)
        uvicorn.Server(config).run([listener])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.serve", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name that `pop models` lists, or a folder")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--prune", default="default", help="as in pop.load: default, none, a share, or a plan's path")
    parser.add_argument("--max-seq-len", type=int, help="the most tokens of a prompt and its answer")
    parser.add_argument("--batch", type=int, default=8, help="the most answers at a time")
    parser.add_argument("--queue", type=int, default=32, help="the most answers that wait; further ones are refused")
    parser.add_argument("--cache-mb", type=int, help="for kept caches (default: a quarter of the free memory)")
    parser.add_argument("--device", help="as in pop.load")
    parser.add_argument("--quantize", choices=["int8"], help="as in pop.load")
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=False, default="auto")
    args = parser.parse_args(argv)
    return exit_status("tools.serve", lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
