"""The thread that owns the model: it joins, advances and ends replies between two tokens."""

import logging
import threading
import time
from collections import deque

import torch
from transformers import DynamicCache

from ..emotions import name_emotion
from ..thoughts import WrittenDecoder
from .metrics import Metrics
from .prefix_cache import PrefixCache
from .prompts import FrontEnd, History, Steps, Utterance, fill_cache
from .replies import BackendError, Done, Failed, Felt, Look, Memory, Progress, Reply, Request, Skipped
from .rows import decode

logger = logging.getLogger("empathic.serve")

MOST_BETWEEN_SWEEPS = 60.0  # seconds between two sweeps of the cache while nothing else is to be done
KINDS = {"audio": "listening", "video": "watching"}  # of clips, and the stage in which they are encoded
STEPS_BETWEEN_TOKENS = 4  # passes for the prompt of a new request between two tokens of the replies in progress
ENDING = Failed(503, "The server is shutting down. Send the request again.", "shutting_down")


class QueueFull(Exception):
    """Too many requests wait."""


def failure(error: Exception) -> Failed:
    """Log why a reply failed, and return the API's error."""
    if isinstance(error, BackendError):
        logger.error("%s", error)
        return Failed(502, "The backend could not generate the reply.", "backend_error")
    logger.error("a reply failed", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        return Failed(
            503, "The GPU's memory is full. Send a shorter conversation or clip, or try again later.", "out_of_memory"
        )
    number = time.strftime("%H:%M:%S")
    return Failed(500, f"The request could not be answered. The server's log has the reason, at {number}.")


class LocalDecoder:
    """
    Generates replies with the model in this process, all of them one token at a time.

    Args:
        model: an `EmpathicForConditionalGeneration`.
        cache: keeps the keys and values that conversations share.
        max_batch: the maximum number of replies at once.
    """

    gives_logprobs = True

    def __init__(self, model, cache: PrefixCache, max_batch: int):
        self.model, self.cache, self.max_batch = model, cache, max_batch

    def begin(self, reply: Reply) -> Steps[None]:
        """Process the prompt of a reply and choose its first token."""
        logits = yield from fill_cache(self.model, reply.prompt, self.cache)
        reply.prompt.embeddings = torch.empty(0)  # they are not needed any more
        reply.choose(logits)

    def step(self, replies: list[Reply]) -> None:
        """Choose the next token of each reply."""
        caches: list[DynamicCache] = [reply.prompt.cache for reply in replies if reply.prompt.cache is not None]
        logits = decode(self.model, [reply.token for reply in replies], caches, self.max_batch)
        for place, reply in enumerate(replies):
            reply.choose(logits[place : place + 1])

    def end(self, reply: Reply) -> None:
        """Free what a reply has used."""
        reply.prompt.cache = None

    def wake(self) -> None:
        """Interrupt a step that waits."""


class RequestQueue:
    """
    The requests that wait for an engine, and what their clients are told of it. An engine inherits it.

    Args:
        at_once: the maximum number of replies at once.
        max_queue: the maximum number of requests that wait.
        reply_seconds: the first estimate of the seconds of a reply.
    """

    def __init__(self, at_once: int, max_queue: int, reply_seconds: float):
        self.at_once, self.max_queue = at_once, max_queue
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._reply_seconds = reply_seconds  # a moving average

    @property
    def queue_length(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    @property
    def capacity(self) -> int:
        """The number of requests that may wait or be answered at once."""
        return self.max_queue + self.at_once

    @property
    def is_full(self) -> bool:
        """Whether no further request may wait."""
        return self.queue_length >= self.max_queue

    def seconds_to_wait(self) -> float:
        """Estimate after how many seconds a new request would begin."""
        return self._reply_seconds * (1 + self.queue_length / self.at_once)

    def submit(self, request: Request) -> None:
        """
        Take a request; its events come through `request.emit`.

        Raises:
            QueueFull: if too many requests wait.
        """
        with self._changed:
            if self._stopping:
                request.emit(ENDING)
                return
            if self.is_full:
                raise QueueFull
            self._waiting.append(request)
            if self._running >= self.at_once:
                self._show_places()
            self._begin_soon()

    @property
    def _running(self) -> int:
        """The number of requests that are answered."""
        raise NotImplementedError

    def _begin_soon(self) -> None:
        """See to it that the request that was submitted will be answered. The queue is locked meanwhile."""
        raise NotImplementedError

    def _show_places(self) -> None:
        """Send each waiting request the number of requests before it, if that has changed."""
        for place, request in enumerate(self._waiting):
            ahead = self._running + place
            if request.details and ahead != request.ahead:
                request.ahead = ahead
                request.emit(Progress("waiting", ahead))

    def _note_seconds(self, seconds: float) -> None:
        """Take the seconds of a reply into the estimate."""
        self._reply_seconds += 0.2 * (seconds - self._reply_seconds)


class Engine(RequestQueue):
    """
    Answers requests, several at once.

    Args:
        front: the encoders and the memory.
        decoder: generates the replies: a `LocalDecoder`, or one of another backend.
        metrics: counts what happens.
        max_queue: the maximum number of requests that wait.
        with_emotion: whether the emotion of each turn with a clip is recognized.
    """

    def __init__(self, front: FrontEnd, decoder, metrics: Metrics, max_queue: int = 64, with_emotion: bool = True):
        super().__init__(decoder.max_batch, max_queue, reply_seconds=1.0)
        self.front, self.decoder, self.metrics, self.with_emotion = front, decoder, metrics, with_emotion
        self.model, self.processor = front.model, front.processor
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        self.max_positions = limit or 1 << 31
        self._decode = WrittenDecoder(self.processor.tokenizer)
        self._looks: deque[Look] = deque()
        self._beginning: list[Request] = []  # their first token is not there yet
        self._tasks: deque[Steps[None]] = deque()
        self._replies: list[Reply] = []
        kept = front.cache.max_seconds
        self._seconds_between_sweeps = None if kept is None else min(kept / 2, MOST_BETWEEN_SWEEPS)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End all replies, with an error for those who wait, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.decoder.wake()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def gives_logprobs(self) -> bool:
        """Whether log-probabilities of tokens can be reported."""
        return self.decoder.gives_logprobs

    def submit(self, request: Request) -> None:
        """See `RequestQueue`."""
        super().submit(request)
        self.decoder.wake()

    def look(self, look: Look) -> None:
        """
        Take clips whose emotion is asked for; the result comes through `look.emit`. Between two steps of the replies
        there is at most one look, so that looks can hardly hold up a reply.

        Raises:
            QueueFull: if too many looks wait.
        """
        with self._changed:
            if self._stopping:
                look.emit(ENDING)
                return
            if look.if_idle and (self.is_busy or self._looks):
                look.emit(Skipped())
                return
            if len(self._looks) >= self.max_queue:
                raise QueueFull
            self._looks.append(look)
            self._changed.notify_all()

    @property
    def is_busy(self) -> bool:
        """Whether a reply waits, begins or is generated, or a turn is read into the memory."""
        return bool(self._waiting or self._beginning or self._tasks or self._replies)

    @property
    def _running(self) -> int:
        return len(self._replies) + len(self._beginning)

    def _begin_soon(self) -> None:
        self._changed.notify_all()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                self._drop_cancelled()
                self._encode_waiting()
                self._work()
                self._step()
                self._take_look()
                self.front.cache.sweep()
                self._show_state()
        for request in (*self._waiting, *self._beginning, *self._looks):
            request.emit(ENDING)
        for reply in self._replies:
            reply.request.emit(ENDING)
            self.decoder.end(reply)

    def _wait(self) -> bool:
        """Wait for something to do; return False to stop."""
        with self._changed:
            while not (self._stopping or self.is_busy or self._looks):
                self.front.cache.sweep()
                self._changed.wait(self._seconds_between_sweeps if len(self.front.cache) else None)
            return not self._stopping

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for reply in [reply for reply in self._replies if reply.request.cancelled]:
            self._remove(reply)

    def _encode_waiting(self) -> None:
        """Encode the clips of the requests that can begin, all in one pass."""
        free = self.at_once - self._running
        with self._changed:
            chosen = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._beginning += chosen
            self._show_places()
        if not chosen:
            return
        items: list[dict] = [{} for _ in chosen]
        try:
            for kind, stage in KINDS.items():
                for request in chosen:
                    if request.details and kind in request.clips:
                        request.emit(Progress(stage))
                clips = [{kind: request.clips[kind]} if kind in request.clips else {} for request in chosen]
                items = [found | more for found, more in zip(items, self.front.encode_clips(clips), strict=True)]
        except Exception as error:
            for request in chosen:
                self._beginning.remove(request)
                self._fail(request, error)
            return
        self._tasks.extend(self._begin(*pair) for pair in zip(chosen, items, strict=True))

    def _work(self) -> None:
        """Do a few steps of the first task, which is then the last one: a long history holds nobody up."""
        if not self._tasks:
            return
        task, before = self._tasks.popleft(), self.front.tokens_read
        try:
            for _ in range(STEPS_BETWEEN_TOKENS):
                next(task)
            self._tasks.append(task)
        except StopIteration:
            pass
        self.metrics.memory_tokens.inc(self.front.tokens_read - before)

    def _begin(self, request: Request, items: dict) -> Steps[None]:
        """Prepare a reply up to its first token."""
        try:
            for _ in self._prepare(request, items):
                if request.cancelled:
                    return
                yield
        except Exception as error:
            self._fail(request, error)
        finally:
            self._beginning.remove(request)

    def _prepare(self, request: Request, items: dict) -> Steps[None]:
        if request.details:
            request.emit(Progress("answering"))
        prompt = yield from self.front.prompt(request.system, request.history, request.turn.text, items)
        left = self.max_positions - len(prompt.ids)
        if left < 1:
            request.emit(
                Failed(
                    400,
                    f"The prompt has {len(prompt.ids)} positions; the limit of the model is {self.max_positions}. Send "
                    "a shorter conversation, or start the server with --max_memories.",
                    "context_length_exceeded",
                )
            )
            return
        self.metrics.prompt_positions.inc(len(prompt.ids) - prompt.reused)
        self.metrics.cached_positions.inc(prompt.reused)
        most = min(request.options.max_tokens, left)
        reply = Reply(request, prompt, self._decode, self.model.generation_config, most, items)
        yield from self.decoder.begin(reply)
        if request.details and items:  # the first token is out, so that the emotion delays only the next ones
            reply.felt = self._feel(request.turn.text, items, by_kind=True)
            request.emit(reply.felt)
        if reply.reason is not None:
            self._finish(reply)
        else:
            self._replies.append(reply)

    def _step(self) -> None:
        if not self._replies:
            return
        try:
            self.decoder.step(self._replies)
        except Exception as error:  # the caches may be half written, so that no reply can go on
            for reply in list(self._replies):
                self._remove(reply)
                self._fail(reply.request, error)
            return
        for reply in [reply for reply in self._replies if reply.reason is not None or reply.error is not None]:
            if reply.error is None:
                self._finish(reply)
            else:
                self._remove(reply)
                self._fail(reply.request, reply.error)

    def _finish(self, reply: Reply) -> None:
        request, prompt = reply.request, reply.prompt
        self._remove(reply)
        self.metrics.completion_tokens.inc(reply.count)
        self._note_seconds(time.monotonic() - reply.started)
        history = request.history.plus(request.turn, Utterance("assistant", None, reply.stops.sent))
        try:
            felt = reply.felt or self._feel(request.turn.text, reply.items)
            memory = Memory(*self.front.size(history), history.digests[-1].hex()) if request.details else None
        except Exception as error:
            self._fail(request, error)
            return
        size = self.model.config.num_query_tokens
        request.emit(
            Done(
                reply.reason or "stop",
                prompt_tokens=len(prompt.ids),
                cached_tokens=prompt.reused,
                completion_tokens=reply.count,
                audio_tokens=size * ("audio" in reply.items),
                video_tokens=size * ("video" in reply.items),
                felt=felt,
                memory=memory,
            )
        )
        # The client has its reply. What was said is read now, so that the next turn finds it in the memory.
        self._tasks.appendleft(self._remember(history))

    def _feel(self, text: str, items: dict, by_kind: bool = False) -> Felt:
        """Recognize the emotion of a turn; `by_kind`: also from the sound alone and the video alone."""
        if not self.with_emotion:
            return Felt(None, {})
        emotions = name_emotion(self.model, self.processor, text, items)
        parts = items if by_kind and len(items) > 1 else {}
        alone = {kind: name_emotion(self.model, self.processor, "", {kind: item}) for kind, item in parts.items()}
        return Felt(emotions, {kind: found for kind, found in alone.items() if found is not None})

    def _take_look(self) -> None:
        """Answer the first look; one that depends on idleness is skipped as soon as there is a reply to generate."""
        if not self._looks:
            return
        look = self._looks.popleft()
        if look.if_idle and self.is_busy:
            look.emit(Skipped())
            return
        try:
            look.emit(self._feel(look.text, self.front.encode_clips([look.clips])[0], by_kind=True))
        except Exception as error:
            self._fail(look, error)

    def _remember(self, history: History) -> Steps[None]:
        try:
            yield from self.front.hear(history, len(history) - 2)
        except Exception:
            logger.exception("a turn could not be read into the memory; the next turn will read it")

    def _remove(self, reply: Reply) -> None:
        if reply in self._replies:
            self._replies.remove(reply)
        self.decoder.end(reply)

    def _fail(self, request: Request | Look, error: Exception) -> None:
        request.emit(failure(error))

    def _show_state(self) -> None:
        metrics, cache = self.metrics, self.front.cache
        metrics.running.set(self._running)
        metrics.waiting.set(self.queue_length)
        metrics.cache_bytes.set(cache.size)
        metrics.cache_pieces.set(len(cache))
        metrics.evictions.set(cache.evictions)
