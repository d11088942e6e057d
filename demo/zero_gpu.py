"""
The page on ZeroGPU, the shared GPUs of Hugging Face Spaces, which a program has only while a decorated function runs.

The function runs in a forked process. Its arguments and its results are pickled; the model is that of this process,
whose weights `spaces` moves to the GPU. A whole turn is therefore answered in one call, and nothing that it computes is
kept: the next turn reads its conversation anew. Elsewhere `spaces.GPU` changes nothing, and the same code runs in this
process.

An application must import `spaces` before torch.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace

import gradio
import spaces
import torch
from fastapi import FastAPI
from gradio.context import LocalContext
from starlette.requests import Request as HTTPRequest

from ..hosts import host_names
from ..serve.app import build_app
from ..serve.engine import ENDING, Engine, LocalDecoder, RequestQueue, failure
from ..serve.metrics import Metrics
from ..serve.prefix_cache import PrefixCache
from ..serve.prompts import FrontEnd, History, Utterance
from ..serve.replies import Done, Failed, Options, Request
from .app import QUEUE, PageOptions, add_page, build_service

HUGGING_FACE = "https://huggingface.co"
STARTUP = "/gradio_api/startup-events"  # the only route of Gradio that is reachable: its launch asks for it
# Estimates for a model of 7B. A call that takes longer may be ended; a longer estimate waits longer for a GPU.
START_SECONDS = 15  # to move the weights and to encode the clips
TOKENS_PER_SECOND = 20
UTTERANCES_PER_SECOND = 20
MOST_SECONDS = 120
# Titles of the errors of `spaces`: status, remedy and code of the API's error.
ERRORS = {
    "ZeroGPU quota exceeded": (429, "Log in to Hugging Face, or try again later.", "insufficient_quota"),
    "ZeroGPU pending credits exceeded": (429, "Wait for your other turns, and try again.", "insufficient_quota"),
    "ZeroGPU illegal duration": (400, "Send a shorter conversation, or lower max_tokens.", "gpu_time_too_long"),
    "ZeroGPU queue timeout": (503, "Try again in a minute.", "no_gpu"),
    "ZeroGPU client error": (503, "Try again in a minute.", "no_gpu"),
    "ZeroGPU worker error": (503, "Send a shorter conversation or clip, or try again.", "gpu_task_aborted"),
}


def seconds_needed(
    system: str | None, history: History, turn: Utterance, clips: dict, options: Options, details: bool
) -> int:
    """Estimate the seconds of GPU time for a turn; the arguments are those of the function that answers it."""
    seconds = START_SECONDS + options.max_tokens / TOKENS_PER_SECOND + len(history) / UTTERANCES_PER_SECOND
    return min(round(seconds), MOST_SECONDS)


def answering_function(model, processor, max_memories: int | None) -> Callable[..., Generator]:
    """Return the generator function that gets the parts of a `Request` and yields its events, with a GPU."""
    in_use = threading.Lock()  # where `spaces` forks no process, calls share the model

    @spaces.GPU(duration=seconds_needed)
    def answer(
        system: str | None, history: History, turn: Utterance, clips: dict, options: Options, details: bool
    ) -> Generator:
        tensors = {kind: tuple(map(torch.from_numpy, arrays)) for kind, arrays in clips.items()}
        events: queue.SimpleQueue = queue.SimpleQueue()
        request = Request(system, history, turn, tensors, options, events.put, details)
        with in_use:
            cache = PrefixCache(0)
            front = FrontEnd(model, processor, cache, max_memories)
            engine = Engine(front, LocalDecoder(model, cache, 1), Metrics())
            engine.start()
            try:
                engine.submit(request)
                while True:
                    event = events.get()
                    yield event
                    if isinstance(event, (Done, Failed)):
                        return
            finally:
                engine.stop()

    return answer


def zero_gpu_failure(error: Exception) -> Failed:
    """Return the API's error for an exception, including the exceptions of `spaces`."""
    title, message = getattr(error, "title", ""), str(getattr(error, "message", "")).strip()
    if title not in ERRORS or message == "OutOfMemoryError":
        return failure(torch.OutOfMemoryError(message) if message == "OutOfMemoryError" else error)
    status, remedy, code = ERRORS[title]
    return Failed(status, f"{message.rstrip('.')}. {remedy}", code)


class ZeroGPUEngine(RequestQueue):
    """
    Answers each request with a call of a function that runs on ZeroGPU; for the application it is like an `Engine`.

    Emotions are recognized only together with a reply: each further call would cost the visitor GPU time.

    Args:
        answer: from `answering_function`.
        processor: the model's `EmpathicProcessor`.
        concurrency: the maximum number of requests that are answered at once.
        max_queue: the maximum number of requests that wait.
    """

    gives_logprobs, with_emotion = True, False

    def __init__(self, answer: Callable[..., Generator], processor, concurrency: int = 1, max_queue: int = QUEUE):
        super().__init__(concurrency, max_queue, reply_seconds=10.0)
        self.processor, self.metrics = processor, Metrics()
        self._answer = answer
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="reply")
        self._answered = 0

    def start(self) -> None:
        """Do nothing: the threads start with the first requests."""

    def stop(self) -> None:
        """End all replies, with an error for those who wait."""
        with self._changed:
            self._stopping = True
            while self._waiting:
                self._waiting.popleft().emit(ENDING)
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return not self._stopping

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or is answered."""
        return bool(self._waiting or self._running)

    @property
    def _running(self) -> int:
        return self._answered

    def _begin_soon(self) -> None:
        # In the context of the HTTP request, where `spaces` looks for the visitor.
        self._threads.submit(copy_context().run, self._take)

    def _take(self) -> None:
        """Answer the request that waits longest."""
        with self._changed:
            if not self._waiting:  # stopped
                return
            request = self._waiting.popleft()
            self._answered += 1
            self._show_places()
        began = time.monotonic()
        try:
            if not request.cancelled:
                self._reply(request)
                self._note_seconds(time.monotonic() - began)
        except Exception as error:
            request.emit(zero_gpu_failure(error))
        finally:
            with self._changed:
                self._answered -= 1

    def _reply(self, request: Request) -> None:
        # As arrays: tensors would be pickled as shared memory, of which containers have little.
        clips = {kind: tuple(tensor.numpy() for tensor in tensors) for kind, tensors in request.clips.items()}
        events = self._answer(request.system, request.history, request.turn, clips, request.options, request.details)
        last = None
        with closing(events):  # a closed generator ends the work of its process
            for event in events:
                if request.cancelled:
                    return
                if self._stopping:
                    request.emit(ENDING)
                    return
                if isinstance(event, Done):
                    self.metrics.prompt_positions.inc(event.prompt_tokens)
                    self.metrics.completion_tokens.inc(event.completion_tokens)
                request.emit(event)
                last = event
        if not isinstance(last, (Done, Failed)):
            raise RuntimeError("the process on ZeroGPU ended before its reply")


def zero_gpu_engine(model, processor, options: PageOptions) -> ZeroGPUEngine:
    """Return an engine for a model, see `build_service`."""
    return ZeroGPUEngine(answering_function(model, processor, options.max_memories), processor, options.concurrency)


class ZeroGPUServer(gradio.Server):
    """
    Serves an application with Gradio's server, whose launch starts ZeroGPU. Gradio's own routes are not reachable.

    Args:
        page: the application, from `build_app`.
    """

    def __init__(self, page: FastAPI):
        super().__init__()
        self.page = page

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] == STARTUP:
            await super().__call__(scope, receive, send)
            return
        # `spaces` finds here the visitor whose GPU time is used, and the sockets that its processes must close.
        LocalContext.request.set(gradio.Request(HTTPRequest(scope)))
        LocalContext.blocks.set(self.blocks)
        await self.page(scope, receive, send)


def serve_on_zero_gpu(
    model: str,
    compare: str | None = None,
    options: PageOptions | None = None,
    *,
    host: str = "0.0.0.0",
    port: int = 7860,
) -> None:
    """
    Serve the page in a Space with ZeroGPU, or on plain hardware, until a signal to stop.

    Args:
        model, compare, options: see `build_service`.
        host, port: address to listen on.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    options = replace(options or PageOptions(), keep_seconds=0, quota_from=HUGGING_FACE)
    service = build_service(model, compare, options, hosts=host_names(host), make_engine=zero_gpu_engine)
    page = build_app(service)
    add_page(page, service, options, compare)
    try:
        _, url, _ = ZeroGPUServer(page).launch(
            server_name=host,
            server_port=port,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"lifespan": lambda _: page.router.lifespan_context(page)},
        )
        print(f"The page of {service.model_name} is at {url}", flush=True)
        threading.Event().wait()
    finally:
        service.stop()
        service.pool.close()
