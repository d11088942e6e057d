"""Additions to the Gradio server: checks of each request, separate folders for uploads, and cleanup after visitors."""

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from gradio.route_utils import API_PREFIX, MultiPartException, upload_fn
from gradio.routes import App, file_upload_statuses
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..hosts import is_known_host
from .uploads import Limits

UPLOAD = f"{API_PREFIX}/upload"
FORM = 100_000  # bytes that a request may have in addition to the file
LARGEST_BODY = 16_000_000  # bytes of other requests: the longest conversation, as JSON
REFUSED, TOO_SLOW, TOO_LARGE, MISDIRECTED = 400, 408, 413, 421  # HTTP status codes


class Guard:
    """
    Middleware that refuses requests to unknown hosts, and bodies over the limit, also if their length is not announced.

    Args:
        app: the application.
        names: patterns of the host names under which the page is reached, see `host_names`.
        limits: limits on what visitors send.
    """

    def __init__(self, app, names: set[str], limits: Limits):
        self.app, self.names, self.limits = app, names, limits

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if b"host" in headers and not is_known_host(host, self.names):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            text = (
                f"The host {host[:100]!r} is not a name of this page. Open it as localhost or by its IP address, or "
                "start it with --allowed_hosts and the name.\n"
            )
            await PlainTextResponse(text, MISDIRECTED)(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/").endswith(UPLOAD)
        most = int(self.limits.megabytes * 1e6) + FORM if is_upload else LARGEST_BODY
        refusal = too_large(self.limits) if is_upload else f"This request is too large: the limit is {most:,} bytes."
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            await PlainTextResponse(refusal, TOO_LARGE)(scope, receive, send)
            return
        taken = 0

        async def receive_limited():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(TOO_LARGE, refusal)
            return message

        await self.app(scope, receive_limited, send)


def too_large(limits: Limits) -> str:
    """The message for an upload over the limit."""
    return f"This file is too large: the limit is {limits.megabytes:g} MB. Send a shorter or smaller clip."


def receive_route(limits: Limits) -> Route:
    """
    Return an upload route that replaces Gradio's. Gradio's route stores identical files of two visitors at one path, so
    that deleting one visitor's file deletes the other's, and it keeps the partial file of a broken upload. Here each
    upload has its own folder, and a failed upload is deleted with its folder.
    """
    return Route(UPLOAD, partial(_receive, limits), methods=["POST"])


async def _receive(limits: Limits, request: Request) -> Response:
    most = int(limits.megabytes * 1e6)
    app, upload_id = request.app, request.query_params.get("upload_id")
    folder, paths = Path(app.uploaded_file_dir, uuid.uuid4().hex), []
    progress = file_upload_statuses if upload_id else None
    try:
        async with asyncio.timeout(limits.upload_seconds):
            paths, _, _ = await upload_fn(request, folder, most, upload_id, upload_progress=progress)
    except MultiPartException as error:
        if "maximum allowed size" in error.message:
            return PlainTextResponse(too_large(limits), TOO_LARGE)
        return PlainTextResponse(error.message, REFUSED)
    except HTTPException as error:  # too large, or not a form
        return PlainTextResponse(error.detail, error.status_code)
    except TimeoutError:
        return PlainTextResponse(f"The upload took more than {limits.upload_seconds:g} s. Send it again.", TOO_SLOW)
    except ClientDisconnect:
        return Response(status_code=REFUSED)  # the client is gone, so the response has no text
    finally:
        if not paths:
            shutil.rmtree(folder, ignore_errors=True)
    app.get_blocks().upload_file_set.update(paths)  # Gradio deletes registered files after `delete_cache`
    return JSONResponse(paths)


def forgetting(forget: Callable[[str], None], seconds: float) -> Callable:
    """
    Return a lifespan handler that deletes the Gradio sessions of visitors who left.

    Args:
        forget: called with the session key of each such visitor.
        seconds: time since the visitor left after which the session is deleted. For Gradio a broken connection also
            counts as leaving, and the visitor may come back.
    """

    @asynccontextmanager
    async def run(app: App) -> AsyncIterator[None]:
        async def watch():
            while True:
                await asyncio.sleep(min(60, seconds))
                for session in _departed(app, seconds):
                    forget(session)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()

    return run


def _departed(app: App, seconds: float) -> list[str]:
    """Remove the sessions of visitors who left, and return their keys."""
    holder, now = app.state_holder, datetime.now()
    with holder.lock:
        gone = [
            session
            for session, state in list(holder.session_data.items())
            if state.is_closed and (now - holder.time_last_used.get(session, now)).total_seconds() >= seconds
        ]
        for session in gone:
            del holder.session_data[session]
            holder.time_last_used.pop(session, None)
    return gone
