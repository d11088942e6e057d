"""What the page's server does beside Gradio: it keeps uploads apart, and forgets visitors who left."""

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
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from empathic.demo.uploads import Limits

FORM = 100_000  # bytes of a request around the file
REFUSED, TOO_SLOW, TOO_LARGE = 400, 408, 413  # statuses of HTTP


def receive_route(limits: Limits) -> Route:
    """
    Takes uploads in the place of Gradio's own route, which puts identical files of two visitors in one place, so that
    one visitor's is deleted with the other's, and leaves the beginning of an upload that breaks off. Here each upload
    has a folder of its own, which goes with it if it fails.
    """
    return Route(f"{API_PREFIX}/upload", partial(_receive, limits), methods=["POST"])


async def _receive(limits: Limits, request: Request) -> Response:
    most = int(limits.megabytes * 1e6)
    too_large = f"This file is too large: {limits.megabytes:g} MB are the most. Send a shorter or smaller clip."
    if int(request.headers.get("content-length", 0)) > most + FORM:
        return PlainTextResponse(too_large, TOO_LARGE)
    app, upload_id = request.app, request.query_params.get("upload_id")
    folder, paths = Path(app.uploaded_file_dir, uuid.uuid4().hex), []
    progress = file_upload_statuses if upload_id else None
    try:
        async with asyncio.timeout(limits.upload_seconds):
            paths, _, _ = await upload_fn(request, folder, most, upload_id, upload_progress=progress)
    except MultiPartException as error:
        if "maximum allowed size" in error.message:
            return PlainTextResponse(too_large, TOO_LARGE)
        return PlainTextResponse(error.message, REFUSED)
    except TimeoutError:
        return PlainTextResponse(f"The upload took more than {limits.upload_seconds:g} s. Send it again.", TOO_SLOW)
    except ClientDisconnect:
        return Response(status_code=REFUSED)  # nobody reads it
    finally:
        if not paths:
            shutil.rmtree(folder, ignore_errors=True)
    app.get_blocks().upload_file_set.update(paths)  # Gradio deletes these after a time
    return JSONResponse(paths)


def forgetting(forget: Callable[[str], None], seconds: float) -> Callable:
    """
    What runs while the server does: the sessions that Gradio keeps of visitors who left go after a time.

    Args:
        forget: called with the key of each.
        seconds: since the visitor left. Gradio hears so too when a connection breaks, and the visitor may come back.
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
    """Takes out the sessions of visitors who left."""
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
