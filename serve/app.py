"""The HTTP application: checks requests, prepares clips, and passes replies on."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..hosts import is_known_host
from ..media_empathic import MediaError
from . import protocol
from .engine import Engine, QueueFull
from .fetching import FetchError, fetch
from .media_pool import MediaPool
from .prompts import History
from .protocol import APIError, ChatRequest, Limits, MediaPart
from .replies import Failed, Felt, Look, Piece, Progress, Request, Skipped

logger = logging.getLogger("empathic.serve")

MOST_LOGGED = 10  # names of ignored fields


class Service:
    """
    What the application's routes share.

    Args:
        engine: answers requests; it is started with the application and stopped after it.
        pool: decodes clips.
        model_name: the name under which the model is served.
        limits: limits on what a client may send.
        api_key: the key that clients must send; None for none.
        allow_urls: whether clips are downloaded from http URLs.
        hosts: the host names of this server; None allows any.
        others: further models by their names, each with an engine of its own, whose metrics are not reported.
    """

    def __init__(
        self,
        engine: Engine,
        pool: MediaPool,
        model_name: str,
        limits: Limits | None = None,
        api_key: str | None = None,
        allow_urls: bool = False,
        hosts: Iterable[str] | None = None,
        others: dict[str, Engine] | None = None,
    ):
        self.engines = {model_name: engine, **(others or {})}
        self.pool, self.model_name, self.limits = pool, model_name, limits or Limits()
        self.metrics = engine.metrics
        self.key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self.allow_urls, self.hosts = allow_urls, None if hosts is None else set(hosts)
        self.created = int(time.time())
        self.in_progress = 0  # requests, from their first byte to their last
        self.clips_looked_at = 0  # clips of requests that may be skipped, while they are decoded
        # Feature extraction and downloads, beside the event loop.
        self.threads = ThreadPoolExecutor(8, thread_name_prefix="clip")
        self._ignored: set[str] = set()

    def stop(self) -> None:
        """Stop all engines."""
        for engine in self.engines.values():
            engine.stop()

    # ------------------------------------------------------------------ checks

    def check(self, request: HTTPRequest) -> None:
        """Raise an APIError unless the request comes to one of our names, with the key."""
        if self.hosts is not None and not is_known_host(request.headers.get("host", ""), self.hosts):
            raise APIError(
                421,
                f"The host {request.headers.get('host', '')[:100]!r} is not a name of this server. Use localhost or "
                "its IP address, or start it with --allowed_hosts and the name, or with --api_key.",
                code="unknown_host",
            )
        if self.key is None or request.url.path == "/health":
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(given.strip().encode()).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(found, self.key):
            raise APIError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def body(self, request: HTTPRequest) -> bytes:
        """
        Receive the body of a request.

        Raises:
            APIError: if it is no JSON, too large, or comes too slowly.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a web site cannot send this type to another one without asking
            raise APIError(415, f"The content type is {kind[:60]!r}; send application/json.", code="wrong_content_type")
        most = int(self.limits.body_megabytes * 1e6)
        too_large = APIError(
            413,
            f"The request is too large; the limit is {self.limits.body_megabytes:g} MB. Leave out the clips of earlier "
            "messages: the model does not use them.",
            code="request_too_large",
            headers={"Connection": "close"},
        )
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise APIError(
                408,
                f"The request took more than {self.limits.upload_seconds:g} s. Send it again.",
                headers={"Connection": "close"},
            ) from None
        return bytes(body)

    def note_ignored(self, names: list[str]) -> None:
        """Log the unknown fields of a request, each name once."""
        new = [name[:60] for name in names if name not in self._ignored][:MOST_LOGGED]
        if new and len(self._ignored) < 1000:
            self._ignored.update(names)
            logger.warning("ignored fields of requests: %s", ", ".join(map(repr, new)))

    # ------------------------------------------------------------------ clips

    def _bytes_of(self, part: MediaPart) -> bytes:
        """Return the file of a clip; blocks."""
        most = int(self.limits.media_megabytes * 1e6)
        data = part.data
        if part.url is not None:
            head, comma, data = part.url.partition(",")
            if head[:5].lower() != "data:":
                return self._downloaded(part, most)
            if not comma or not head.lower().endswith(";base64"):
                raise APIError(
                    400,
                    f"{part.param} is no data URL in base64; send data:TYPE;base64,DATA.",
                    part.param,
                    "invalid_url",
                )
        assert data is not None
        if len(data) * 3 // 4 > most:
            raise APIError(
                400,
                f"{part.param} has {len(data) * 3 / 4e6:,.1f} MB; the limit is {self.limits.media_megabytes:g} MB. "
                "Send a shorter or smaller clip.",
                part.param,
                "clip_too_large",
            )
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise APIError(
                400, f"{part.param} is not base64 ({error}). Encode the file again.", part.param, "invalid_base64"
            ) from None

    def _downloaded(self, part: MediaPart, most: int) -> bytes:
        if part.url is not None and part.url[:8].lower().startswith(("http://", "https://")) and self.allow_urls:
            try:
                return fetch(part.url, most, self.limits.fetch_seconds)
            except FetchError as error:
                raise APIError(400, f"{part.param}: {error}", part.param, "invalid_url") from None
        rule = "an http, https or data URL" if self.allow_urls else "a data URL; this server downloads nothing"
        raise protocol.wrong(part.param, part.url, f"give {rule}.", "invalid_url")

    def _clip(self, processor, part: MediaPart, also_sound: bool) -> dict:
        """Return the model's inputs of a clip by kind; blocks. `also_sound`: also of the sound of a video."""
        try:
            items = self.pool.decode(self._bytes_of(part), f"the {part.kind} clip")
        except MediaError as error:
            raise APIError(400, f"{part.param}: {error}", part.param, "invalid_clip") from None
        if part.kind not in items:
            raise APIError(400, f"{part.param}: the clip has no {part.kind}.", part.param, "invalid_clip")
        kinds = ("video", "audio") if also_sound else (part.kind,)
        read = {"video": processor.frames, "audio": processor.sound}
        try:
            return {kind: read[kind]({"type": kind, **items[kind]}) for kind in kinds if kind in items}
        except MediaError as error:
            raise APIError(400, f"{part.param}: {error}", part.param, "invalid_clip") from None

    async def clips(self, processor, parts: list[MediaPart]) -> dict:
        """Return the model's inputs of a turn's clips by kind."""
        has_sound = any(part.kind == "audio" for part in parts)
        loop = asyncio.get_running_loop()
        work = [loop.run_in_executor(self.threads, self._clip, processor, part, not has_sound) for part in parts]
        found: dict = {}
        for clip in await asyncio.gather(*work):
            found |= clip
        return found

    # ------------------------------------------------------------------ replies

    async def begin(self, chat: ChatRequest) -> tuple[Request, asyncio.Queue]:
        """Give a request to its engine; return it, and the queue of its events."""
        engine = self.engines[chat.model]
        if engine.is_full:
            raise self.too_many(engine)
        if chat.options.logprobs is not None and not engine.gives_logprobs:
            raise protocol.wrong("logprobs", True, "this server's backend reports none: leave it out.")
        clips = await self.clips(engine.processor, chat.media)
        events: asyncio.Queue = asyncio.Queue()
        emit = _into(events)
        request = Request(chat.system, History(chat.history), chat.turn, clips, chat.options, emit, chat.details)
        try:
            engine.submit(request)
        except QueueFull:
            raise self.too_many(engine) from None
        return request, events

    async def emotion(self, body: dict) -> dict:
        """Return the response to a request for an emotion."""
        name, text, media, if_idle = protocol.read_emotion(body, self.engines, self.limits)
        engine, skipped = self.engines[name], {"model": name, "skipped": True}
        if not engine.with_emotion:
            raise APIError(400, "This server names no emotion without a reply. Ask for a reply.", "content")
        if not (media or (text and engine.processor.with_text)):
            raise APIError(
                400, "content: this model cannot name the emotion without a clip; give audio or video.", "content"
            )
        # Clips that may be skipped are decoded one at a time, so that those of turns find a free process.
        if if_idle and (engine.is_busy or self.clips_looked_at):
            return skipped
        self.clips_looked_at += if_idle
        try:
            clips = await self.clips(engine.processor, media)
        finally:
            self.clips_looked_at -= if_idle
        events: asyncio.Queue = asyncio.Queue()
        try:
            engine.look(Look(text, clips, _into(events), if_idle))
        except QueueFull:
            raise self.too_many(engine) from None
        event = await events.get()
        if isinstance(event, Failed):
            raise _error(event)
        return skipped if isinstance(event, Skipped) else {"model": name, **protocol.emotion(event)}

    def check_capacity(self) -> None:
        """Raise an APIError if too many requests are in progress, before the body of another one takes memory."""
        if self.in_progress > sum(engine.capacity for engine in self.engines.values()):
            raise self.too_many(self.engines[self.model_name])

    def too_many(self, engine: Engine) -> APIError:
        seconds = max(1, math.ceil(engine.seconds_to_wait()))
        return APIError(
            429,
            f"{engine.queue_length} requests wait, the limit. Send the request again in {seconds} s.",
            code="rate_limit_exceeded",
            kind="requests",
            headers={"Retry-After": str(seconds)},
        )


def _into(events: asyncio.Queue) -> Callable:
    """Return a function that puts events into a queue of this event loop, from any thread."""
    loop = asyncio.get_running_loop()

    def emit(event) -> None:
        with suppress(RuntimeError):  # the event loop is closed, so that nobody waits
            loop.call_soon_threadsafe(events.put_nowait, event)

    return emit


def _error(event: Failed) -> APIError:
    headers = {"Retry-After": "1"} if event.status == 503 else {}
    return APIError(event.status, event.message, code=event.code, headers=headers)


def _response(error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _data(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=True, separators=(',', ':'))}\n\n"


class _Exchange:
    """
    A chat request and its response.

    Args:
        service: the service.
        chat: the request.
    """

    def __init__(self, service: Service, chat: ChatRequest):
        self.service, self.chat = service, chat
        self.id, self.created, self.started = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), time.monotonic()
        self.tokenizer = service.engines[chat.model].processor.tokenizer
        self.is_counted = False

    def _object(self, kind: str, choices: list, **more) -> dict:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.chat.model,
            "choices": choices,
            **more,
        }

    def _chunk(self, delta: dict, reason: str | None = None, scores=()) -> str:
        choice: dict = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        if scores:
            choice["logprobs"] = protocol.logprobs(scores, self.tokenizer)
        more = {"usage": None} if self.chat.include_usage else {}
        return _data(self._object("chat.completion.chunk", [choice], **more))

    def _detail(self, event: Progress | Felt) -> str:
        more = protocol.emotion(event) if isinstance(event, Felt) else {"progress": asdict(event)}
        return _data(self._object("chat.completion.chunk", [], **more))

    async def whole(self, events: asyncio.Queue) -> JSONResponse:
        """Return the response with the whole reply."""
        pieces: list[Piece] = []
        while isinstance(event := await events.get(), (Piece, Progress, Felt)):
            if isinstance(event, Piece):
                self._note_first(pieces)
                pieces.append(event)
        if isinstance(event, Failed):
            raise _error(event)
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        scores = [score for piece in pieces for score in piece.scores]
        choice = {
            "index": 0,
            "message": {**message, **protocol.emotion(event.felt)},
            "logprobs": protocol.logprobs(scores, self.tokenizer) if scores else None,
            "finish_reason": event.reason,
        }
        self.note_end("ok")
        more = protocol.memory(event.memory)
        return JSONResponse(self._object("chat.completion", [choice], usage=protocol.usage(event), **more))

    async def chunks(self, first, events: asyncio.Queue) -> AsyncIterator[str]:
        """Yield the response as server-sent events. `first`: the first event, which is no error."""
        event, has_begun = first, False
        while isinstance(event, (Piece, Progress, Felt)) or not has_begun:
            if isinstance(event, (Progress, Felt)):
                yield self._detail(event)
            elif not has_begun:  # a reply without text has no piece
                has_begun = True
                self._note_first([])
                yield self._chunk({"role": "assistant", "content": "", "refusal": None})
                continue
            else:
                yield self._chunk({"content": event.text}, scores=event.scores)
            event = await events.get()
        if isinstance(event, Failed):
            self.note_end("failed")
            yield _data(_error(event).body)
            return
        yield self._chunk(protocol.emotion(event.felt), event.reason)
        if self.chat.details:
            yield _data(self._object("chat.completion.chunk", [], **protocol.memory(event.memory)))
        if self.chat.include_usage:
            yield _data(self._object("chat.completion.chunk", [], usage=protocol.usage(event)))
        self.note_end("ok")
        yield "data: [DONE]\n\n"

    def _note_first(self, pieces: list) -> None:
        if not pieces:
            self.service.metrics.first_token_seconds.observe(time.monotonic() - self.started)

    def note_end(self, outcome: str) -> None:
        """Count the request, once."""
        if not self.is_counted:
            self.is_counted = True
            self.service.metrics.requests.labels(outcome).inc()
            self.service.metrics.request_seconds.observe(time.monotonic() - self.started)


class _Stream(StreamingResponse):
    """A stream whose request is cancelled when the client goes away, at any time."""

    def __init__(self, content, on_end):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _gone(request: HTTPRequest) -> None:
    """Wait until the client is gone; its body is already received."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: HTTPRequest, work):
    """Return the result of some work; raise ClientDisconnect, and cancel the work, if the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _answer(service: Service, request: HTTPRequest) -> Response:
    body = await service.body(request)
    chat = protocol.read_chat(protocol.read_json(body), service.engines, service.limits)
    del body
    service.note_ignored(chat.ignored)
    exchange = _Exchange(service, chat)
    asked, events = await _unless_gone(request, service.begin(chat))
    chat.media = []
    streams = False
    try:
        if not chat.stream:
            return await _unless_gone(request, exchange.whole(events))
        first = await _unless_gone(request, events.get())
        if isinstance(first, Failed):
            raise _error(first)
        streams = True
    except ClientDisconnect:
        exchange.note_end("cancelled")
        raise
    finally:
        if not streams:
            asked.cancelled = True

    def end():
        asked.cancelled = True
        exchange.note_end("cancelled")
        service.in_progress -= 1

    service.in_progress += 1
    return _Stream(exchange.chunks(first, events), end)


def build_app(service: Service, cors: Iterable[str] = ()) -> FastAPI:
    """
    Return the application.

    Args:
        service: what the routes share.
        cors: origins of web pages that may use the server from a browser; `*` for all.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        for engine in service.engines.values():
            engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)
            service.pool.close()
            service.threads.shutdown(wait=False, cancel_futures=True)

    async def check(request: HTTPRequest) -> None:
        service.check(request)

    app = FastAPI(
        title="empathic",
        lifespan=lifespan,
        dependencies=[Depends(check)],
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )

    if origins := list(cors):
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
        )

    @app.exception_handler(APIError)
    async def refused(request: HTTPRequest, error: APIError):
        return _response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: HTTPRequest, error: HTTPException):
        return _response(APIError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}."))

    @app.exception_handler(Exception)
    async def broken(request: HTTPRequest, error: Exception):
        return _response(APIError(500, "The server could not answer. Its log has the reason."))

    @app.get("/health")
    async def health():
        if not all(engine.is_alive for engine in service.engines.values()):
            raise APIError(503, "The server is shutting down.", code="shutting_down")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def model(name: str) -> dict:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "empathic"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model(name) for name in service.engines]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        if name not in service.engines:
            raise APIError(404, f"There is no model {name[:60]!r}.", "model", "model_not_found")
        return model(name)

    @app.post("/v1/chat/completions")
    async def chat(request: HTTPRequest):
        service.in_progress += 1
        try:
            service.check_capacity()
            return await _answer(service, request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody receives it
        except APIError as error:
            service.metrics.requests.labels("refused" if error.status < 500 else "failed").inc()
            raise
        finally:
            service.in_progress -= 1

    @app.post("/v1/emotion")
    async def emotion(request: HTTPRequest):
        service.in_progress += 1
        try:
            service.check_capacity()
            return await service.emotion(protocol.read_json(await service.body(request)))
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            service.in_progress -= 1

    return app
