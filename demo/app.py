"""
The web page for a conversation with the model: static files, and the server of `empathic serve` as their only backend.

The page keeps the conversation in the visitor's browser and sends it with each turn. The server keeps no visitor's
state; what it has computed of a conversation is found again by the conversation's content, and leaves after a while.
"""

import mimetypes
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse

from ..errors import loading
from ..hosts import host_names
from ..modeling_empathic import EmpathicForConditionalGeneration
from ..processing_empathic import EmpathicProcessor
from ..serve.app import Service, build_app
from ..serve.engine import Engine, LocalDecoder
from ..serve.media_pool import MediaPool
from ..serve.metrics import Metrics
from ..serve.prefix_cache import PrefixCache
from ..serve.prompts import FrontEnd
from ..serve.protocol import APIError, Limits
from ..serve.server import address_of, listen, run_server
from .examples import Example

STATIC = Path(__file__).parent / "static"
FIRST_PORT, PORTS = 7860, 100  # where a free port is looked for
CHARACTERS = 4000  # of a visitor's text
READERS = 2  # processes that decode clips
QUEUE = 64  # turns that may wait
CACHE_BYTES = 2 << 30
KEEP_SECONDS = 1800  # that what was computed of a conversation is kept after its last turn
BEFORE_EPO = "dialogue"  # folder of the stage before EPO
# Everything comes from this server, so that even a text that got past the page's escaping could load nothing.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self' https://huggingface.co https://*.hf.space"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageOptions:
    """
    What the page offers.

    Attributes:
        megabytes, seconds: maximum size and length of a clip.
        concurrency: number of turns answered at once; others wait.
        max_new_tokens: maximum length of a reply.
        max_memories: see `ChatSession`.
        keep_seconds: seconds that what was computed of a conversation is kept after its last turn; 0 if it is not kept.
        compare_name: name of the second model's column; by default that of its folder.
        examples: conversations to start from.
        quota_from: origin of the web site whose visitors' GPU time is limited, and which frames the page; None for no
            such limit.
    """

    megabytes: float = 32
    seconds: float = 60
    concurrency: int = 1
    max_new_tokens: int = 128
    max_memories: int | None = None
    keep_seconds: float = KEEP_SECONDS
    compare_name: str | None = None
    examples: Sequence[Example] = field(default_factory=tuple)
    quota_from: str | None = None

    @property
    def limits(self) -> Limits:
        """The limits of the server: a turn may have a sound and a video, in base64, and a long history."""
        return Limits(
            body_megabytes=2 * self.megabytes * 4 / 3 + 8,
            media_megabytes=self.megabytes,
            seconds=self.seconds,
            tokens=self.max_new_tokens,
        )


def local_engine(model, processor, options: PageOptions) -> Engine:
    """Return an engine that keeps the model on its device, and what it has computed of a conversation for a while."""
    cache = PrefixCache(CACHE_BYTES, options.keep_seconds)
    decoder = LocalDecoder(model, cache, options.concurrency)
    return Engine(FrontEnd(model, processor, cache, options.max_memories), decoder, Metrics(), QUEUE)


def build_service(
    model: str,
    compare: str | None,
    options: PageOptions,
    device: str | None = None,
    hosts: Iterable[str] | None = None,
    make_engine: Callable[..., Any] = local_engine,
) -> Service:
    """
    Load the models for inference, by default on a GPU if there is one, each with an engine of its own.

    Args:
        model: folder or Hub id of the model that answers.
        compare: folder or Hub id of a second model to compare with.
        options: options of the page.
        device: device of the models.
        hosts: the host names of this server; None allows any.
        make_engine: makes the engine of a model, of its processor, and of the options.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    engines: dict[str, Any] = {}
    for place in (model, *([compare] if compare is not None else [])):
        with loading(place):
            loaded = EmpathicForConditionalGeneration.from_pretrained(place, dtype="auto").eval().to(device)
            processor = EmpathicProcessor.from_pretrained(place)
        name = _last_part(place)
        name = name if name not in engines else f"{name} (compared)"
        engines[name] = make_engine(loaded, processor, options)
    (name, first), *others = engines.items()
    limits = options.limits
    pool = MediaPool(
        READERS,
        limits.decode_seconds,
        first.processor.num_frames,
        limits.seconds,
        first.metrics.media_restarts.inc,
    )
    return Service(first, pool, name, limits, hosts=hosts, others=dict(others))


def add_page(app: FastAPI, service: Service, options: PageOptions, compare: str | None = None) -> None:
    """
    Add the page's routes to the server's application.

    Args:
        app: from `build_app`.
        service: what its routes share.
        options: options of the page.
        compare: folder or Hub id of the second model.
    """
    columns = [
        {"key": "main", "label": "this model", "model": service.model_name, "clips": True, "history": True},
        {"key": "blind", "label": "without voice and face", "model": service.model_name, "history": True},
        {"key": "forgetful", "label": "without memory", "model": service.model_name, "clips": True},
    ]
    for name in list(service.engines)[1:]:
        label = options.compare_name or ("before EPO" if _last_part(compare or "") == BEFORE_EPO else name)
        columns.append({"key": "other", "label": label, "model": name, "clips": True, "history": True})
    engine = service.engines[service.model_name]
    settings = {
        "model": service.model_name,
        "columns": columns,
        "limits": {"megabytes": options.megabytes, "seconds": options.seconds, "characters": CHARACTERS},
        "keep_seconds": options.keep_seconds,
        "live_emotion": engine.with_emotion,
        "names_emotion_of_text": bool(engine.with_emotion and engine.processor.with_text),
        "quota_from": options.quota_from,
        "examples": [
            {"text": example.text, "history": list(example.history), "clip": f"examples/{number}"}
            for number, example in enumerate(options.examples)
        ],
    }

    def not_found(path: str) -> APIError:
        return APIError(404, f"GET /{path[:100]}: Not Found.")

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page():
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    @app.get("/settings.json")
    async def page_settings():
        return JSONResponse(settings, headers=HEADERS)

    @app.get("/static/{name}")
    async def static(name: str):
        if name not in {path.name for path in STATIC.iterdir()}:
            raise not_found(f"static/{name}")
        kind = "text/javascript" if name.endswith(".js") else None  # some systems' tables say something else
        return FileResponse(STATIC / name, media_type=kind, headers=HEADERS)

    @app.get("/examples/{number}")
    async def example(number: int):
        if not 0 <= number < len(options.examples):
            raise not_found(f"examples/{number}")
        clip = options.examples[number].clip
        kind = mimetypes.guess_type(clip.name)[0] or "application/octet-stream"
        return FileResponse(clip, media_type=kind, headers=HEADERS)


def serve_page(
    model: str,
    compare: str | None = None,
    options: PageOptions | None = None,
    *,
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: Iterable[str] = (),
) -> None:
    """
    Serve the page until a signal to stop.

    Args:
        model, compare, options, device: see `build_service`.
        host, port: address to listen on; by default the first free port from 7860.
        allowed_hosts: names under which browsers reach the page, besides localhost, IP addresses, and those of a
            Space: for example that of a proxy. `*` allows all.
    """
    options = options or PageOptions()
    listening = _listen(host, port)  # before the models are loaded, which takes long
    service = build_service(model, compare, options, device, host_names(host, allowed_hosts))
    app = build_app(service)
    add_page(app, service, options, compare)
    print(f"The page of {service.model_name} is at {address_of(listening)}", flush=True)
    try:
        run_server(app, service, listening, shutdown_seconds=2)
    finally:
        service.pool.close()


def _listen(host: str, port: int | None):
    if port is not None:
        return listen(host, port)
    *ports, last = range(FIRST_PORT, FIRST_PORT + PORTS)
    for place in ports:
        with suppress(OSError):
            return listen(host, place)
    return listen(host, last)


def _last_part(place: str) -> str:
    return place.rstrip("/").split("/")[-1]
