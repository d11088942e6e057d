"""
A model behind an OpenAI-compatible endpoint (proprietary, vLLM, `transformers serve`), with the history as text:

    gpt=openai:gpt-4o,requests_per_minute=60,price_in=2.5,price_out=10
    local=openai:Qwen/Qwen2.5-7B-Instruct@http://127.0.0.1:8000/v1,key=none,concurrency=16

The key comes from an environment variable and is used only in the request headers. A failed request is retried with
exponential backoff. If all attempts fail, the reply is empty, its note says why, and the job continues. An error that
every request would meet (a wrong key, an unknown model) stops the job.
"""

import base64
import io
import json
import os
import random
import threading
import time
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from urllib.parse import urlsplit

import httpx2
import numpy as np
from PIL import Image
from transformers.utils import logging

from ...baselines.prompts import SYSTEM_PROMPT, chat_turns
from ...data_prep.messages import clip_of, sample_id
from ...media_empathic import MediaError, load_audio, load_video
from ...thoughts import Written, read_written
from .base import Common, Reply, boolean

logger = logging.get_logger(__name__)

OPENAI = "https://api.openai.com/v1"
MEDIA = {"none": (), "frames": ("video",), "audio": ("audio",), "both": ("audio", "video")}
AUDIO_RATE = 16000
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; doubled from one attempt to the next
LONGEST_RETRY_AFTER = 600.0  # seconds; a longer wait usually means that the daily limit is reached
FAILURES_IN_A_ROW = 20
PASSING = (408, 409, 425, 429)  # these status codes, and all from 500 up, are retried
# Fields of a message, and keys of a part of its content, in which servers give the thoughts.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
# Options of a spec in addition to the common options: name -> parser, for `open.open_system`.
OPTIONS = {
    "media": str,
    "num_frames": int,
    "key": str,
    "requests_per_minute": float,
    "concurrency": int,
    "retries": int,
    "timeout": float,
    "price_in": float,
    "price_out": float,
    "folded": boolean,
    "tokens_field": str,
    "sends_temperature": boolean,
    "sends_seed": boolean,
    "starts_in_thought": boolean,
}


class EndpointError(ConnectionError):
    """An error that every request would meet. The message names the endpoint, the problem and the remedy."""


class _Failed(Exception):
    """A failed request. `passing`: a retry may succeed; `wait`: seconds requested by the server, or None."""

    def __init__(self, reason: str, passing: bool, wait: float | None = None):
        super().__init__(reason)
        self.passing, self.wait = passing, wait


class Turnstile:
    """
    A thread-safe rate limiter: requests go one by one, evenly spaced.

    Args:
        per_minute: maximum number of requests per minute; None for no limit.
    """

    def __init__(self, per_minute: float | None):
        self.gap = 0.0 if per_minute is None else 60.0 / per_minute
        self.free_at, self.lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Block until the next request may be sent."""
        with self.lock:
            now = time.monotonic()
            mine = max(now, self.free_at)
            self.free_at = mine + self.gap
        if mine > now:
            time.sleep(mine - now)

    def hold(self, seconds: float) -> None:
        """Block all requests for this time: a `Retry-After` for one request applies to every thread."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic() + seconds)


class EndpointSystem:
    """
    A model behind `BASE_URL/chat/completions`.

    Args:
        name: name of the system.
        target: `MODEL@BASE_URL`, or `MODEL` for OpenAI's own endpoint.
        common: see `Common`; replies are saved after each batch of `batch_size`.
        media: which part of the last turn's clip is sent: `none`, `frames` (JPEG images), `audio` (WAV) or `both`.
        num_frames: number of frames per clip, evenly spaced.
        key: environment variable that holds the key; `none` sends no key.
        requests_per_minute: maximum number of attempts per minute, over all processes; None for no limit.
        concurrency: number of requests in flight in this process.
        retries: number of further attempts after a failed request.
        timeout: seconds that an attempt may take.
        price_in, price_out: price of a million prompt tokens and a million reply tokens, for `cost`.
        folded: put the instruction into the first user turn, for models without a system message.
        tokens_field: the endpoint's name for the maximum reply length; some models need `max_completion_tokens`.
        sends_temperature, sends_seed: false for models or endpoints that refuse the field.
        starts_in_thought: true if the chat template of a reasoning model begins the thought, and the endpoint gives the
            thought as a part of the text. A text without the end of a thought is then no reply.

    Raises:
        ValueError: if a number or a choice is out of range, the URL is invalid, or the key would be sent unencrypted.
    """

    def __init__(
        self,
        name: str,
        target: str,
        common: Common,
        media: str = "none",
        num_frames: int = 8,
        key: str = "OPENAI_API_KEY",
        requests_per_minute: float | None = None,
        concurrency: int = 4,
        retries: int = 6,
        timeout: float = 120.0,
        price_in: float | None = None,
        price_out: float | None = None,
        folded: bool = False,
        tokens_field: str = "max_tokens",
        sends_temperature: bool = True,
        sends_seed: bool = True,
        starts_in_thought: bool = False,
    ):
        for what, ok, rule in (
            (f"media is {media!r}", media in MEDIA, f"one of {', '.join(MEDIA)}"),
            (f"num_frames is {num_frames}", num_frames >= 1, "at least 1"),
            (f"requests_per_minute is {requests_per_minute}", (requests_per_minute or 1) > 0, "above 0"),
            (f"concurrency is {concurrency}", concurrency >= 1, "at least 1"),
            (f"retries is {retries}", retries >= 0, "at least 0"),
            (f"timeout is {timeout}", timeout > 0, "above 0"),
            (f"price_in is {price_in}", (price_in or 0) >= 0, "at least 0"),
            (f"price_out is {price_out}", (price_out or 0) >= 0, "at least 0"),
            ("one price is given", (price_in is None) == (price_out is None), "both or none"),
        ):
            if not ok:
                raise ValueError(f"{name}: {what}; it must be {rule}.")
        model, at, url = target.rpartition("@")
        self.name, self.common, self.batch_size = name, common, common.batch_size
        self.model, self.url = (model, _checked_url(name, url)) if at else (target, OPENAI)
        self.media, self.num_frames, self.folded = media, num_frames, folded
        self.clip_kinds = MEDIA[media]
        self.concurrency, self.retries = concurrency, retries
        self.prices = None if price_in is None else (price_in, price_out)
        self.tokens_field, self.sends_temperature, self.sends_seed = tokens_field, sends_temperature, sends_seed
        self.starts_in_thought = starts_in_thought
        self.key_name = None if key == "none" else key
        secret = self._key()
        if secret is not None and not secret.isascii():
            raise ValueError(f"{name}: the key in {key} has characters outside ASCII. Set the variable again.")
        if secret is not None and not _is_private(self.url):
            raise ValueError(
                f"{name}: the key in {key} would go to {self.url} unencrypted. Use https, or key=none to send no key."
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # each process has its own turnstile
        self.turnstile = Turnstile(requests_per_minute and requests_per_minute / processes)
        self.client = httpx2.Client(timeout=timeout, limits=httpx2.Limits(max_connections=concurrency))
        self._answered, self._failures, self._lock = False, 0, threading.Lock()
        self._stopped: EndpointError | None = None

    @property
    def settings(self) -> dict:
        """See `System`."""
        decoding = self.common.decoding()
        decoding.pop("dtype")  # the endpoint chooses the dtype
        decoding["own_generation_config"] = "as the endpoint uses it, apart from what is sent"
        return {
            "kind": "openai",
            "target": f"{self.model}@{self.url}",
            "system_prompt": SYSTEM_PROMPT,
            "history": "text",
            "media": self.media,
            "num_frames": self.num_frames,
            "folded": self.folded,
            "tokens_field": self.tokens_field,
            "sends_temperature": self.sends_temperature,
            "sends_seed": self.sends_seed,
            "starts_in_thought": self.starts_in_thought,
            **decoding,
        }

    def reply(self, samples: list[dict], seeds: list[int]) -> list[Reply]:
        """
        See `System`. `extra` also has `seconds` (of the last attempt), `attempts` if there was more than one and, with
        prices, `cost`.

        Raises:
            EndpointError: for an error that every request would meet.
        """
        self._stopped = None
        with ThreadPoolExecutor(self.concurrency) as threads:
            futures = [threads.submit(self._reply, *pair) for pair in zip(samples, seeds, strict=True)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    # ------------------------------------------------------------------ one request

    def _reply(self, sample: dict, seed: int) -> Reply:
        body, note = self._body(sample["prompt"], seed)
        attempts = 0
        while True:
            attempts += 1
            self.turnstile.wait()
            if self._stopped is not None:  # set by another thread
                raise self._stopped
            start = time.monotonic()
            try:
                reply = self._read(self._post(body))
                break
            except EndpointError as error:
                self._stopped = error
                raise
            except _Failed as failure:
                wait = self._next_wait(failure, attempts)
                if wait is None:
                    return self._give_up(sample, failure, attempts)
                logger.info("%s: %s: attempt %d: %s", self.name, sample_id(sample), attempts, failure)
                if failure.wait is not None:
                    self.turnstile.hold(wait)
                else:
                    time.sleep(wait)
        with self._lock:
            self._failures, self._answered = 0, True
        reply.extra["seconds"] = round(time.monotonic() - start, 3)
        if attempts > 1:
            reply.extra["attempts"] = attempts
        reply.add(note=note)
        return reply

    def _next_wait(self, failure: _Failed, attempts: int) -> float | None:
        """Seconds until the next attempt; None to give up."""
        if not failure.passing or attempts > self.retries:
            return None
        if failure.wait is not None:
            return failure.wait if failure.wait <= LONGEST_RETRY_AFTER else None
        # Jitter, so that threads do not retry at the same moment.
        return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempts - 1)) * random.uniform(0.5, 1.0)

    def _give_up(self, sample: dict, failure: _Failed, attempts: int) -> Reply:
        with self._lock:
            self._failures += 1
            if not self._answered and isinstance(failure.__cause__, httpx2.ConnectError):
                self._stopped = EndpointError(
                    f"{self.name}: no server answers at {self.url} ({failure}). Check that it is running."
                )
            elif self._failures >= FAILURES_IN_A_ROW:
                self._stopped = EndpointError(
                    f"{self.name}: {self._failures} requests in a row failed, the last one, {sample_id(sample)}, with: "
                    f"{failure}. Fix that and start again: replies received so far are kept."
                )
        if self._stopped is not None:
            raise self._stopped
        logger.warning(
            "%s: %s has no reply after %d attempts: %s. It is recorded as failed, and the job continues.",
            self.name, sample_id(sample), attempts, failure,
        )  # fmt: skip
        about = {"finish_reason": "failed", "attempts": attempts, "note": f"The request failed: {failure}"}
        return Reply("", about)

    def _post(self, body: dict) -> dict:
        """Send a request and return the endpoint's JSON answer."""
        secret = self._key()
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        try:
            response = self.client.post(f"{self.url}/chat/completions", json=body, headers=headers)
        except httpx2.HTTPError as error:  # no connection, a lost connection, or a timeout
            raise _Failed(f"{type(error).__name__}: {self._without_key(str(error))}", passing=True) from error
        status, text = response.status_code, self._without_key(response.text[:500])
        if status == 200:
            try:
                return response.json()
            except ValueError as error:
                raise _Failed(f"the answer is not JSON: {text!r}", passing=True) from error
        if status == 401:
            where = f"the key in {self.key_name}" if self.key_name is not None else "a request without a key"
            raise EndpointError(f"{self.name}: {self.url} does not accept {where}: {text}. Set it, or give key=NAME.")
        if status == 402 or (status == 429 and "insufficient_quota" in text):
            raise EndpointError(
                f"{self.name}: payment required or quota exhausted at {self.url}: {text}. Add credit, then start again."
            )
        if status == 404 or 300 <= status < 400:
            mend = "The target is MODEL@BASE_URL, and most base URLs end in /v1."
            raise EndpointError(f"{self.name}: {self.url} has no model {self.model!r} ({status}): {text}. {mend}")
        passing = status in PASSING or status >= 500
        raise _Failed(f"status {status}: {text}", passing, _retry_after(response.headers.get("retry-after")))

    def _read(self, answer: dict) -> Reply:
        """Parse the endpoint's JSON answer."""
        try:
            choice = answer["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            written = read_message(message, self.starts_in_thought)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            shown = self._without_key(json.dumps(answer)[:300])
            raise _Failed(f"the answer has no reply: {shown}", passing=True) from error
        usage = answer.get("usage") or {}
        prompt, tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        extra = {"finish_reason": reason, "tokens": tokens, "prompt_tokens": prompt}
        if self.prices is not None and prompt is not None and tokens is not None:
            extra["cost"] = (prompt * self.prices[0] + tokens * self.prices[1]) / 1e6
        reply = Reply(written.reply, extra)
        note = None
        if not written.reply:
            if reason == "length" and written.thought:
                written = written._replace(is_cut=True)
            said = message.get("refusal")
            note = written.note() or f"The model gave no text ({said or reason})."
        reply.add(thought=written.thought, note=note)
        return reply

    def _key(self) -> str | None:
        return None if self.key_name is None else os.environ.get(self.key_name, "").strip() or None

    def _without_key(self, text: str) -> str:
        secret = self._key()
        return text if secret is None else text.replace(secret, "***")

    # ------------------------------------------------------------------ request body

    def _body(self, messages: list[dict], seed: int) -> tuple[dict, str | None]:
        """The request body, and a note if a clip cannot be read."""
        turns = chat_turns(messages, self.folded)
        parts, notes = [], []
        for kind in MEDIA[self.media]:
            item = clip_of(messages, kind)
            if item is None:
                continue
            try:
                parts += self._audio(item) if kind == "audio" else self._frames(item)
            except MediaError as error:
                notes.append(f"The clip is left out: {error}")
        if parts:
            turns[-1]["content"] = [*parts, {"type": "text", "text": turns[-1]["content"]}]
        body = {"model": self.model, "messages": turns, self.tokens_field: self.common.max_new_tokens}
        if self.sends_temperature:
            body["temperature"] = 0.0 if self.common.temperature is None else self.common.temperature
            if self.common.top_p is not None:
                body["top_p"] = self.common.top_p
        body |= self.common.penalties()
        if self.sends_seed:
            body["seed"] = seed
        return body, " ".join(notes) or None

    def _frames(self, item: dict) -> list[dict]:
        parts = []
        for frame in load_video(item, self.num_frames):
            data = _in_base64(lambda file, frame=frame: Image.fromarray(frame).save(file, "JPEG", quality=90))
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
        return parts

    def _audio(self, item: dict) -> list[dict]:
        samples = np.clip(load_audio(item, AUDIO_RATE) * 32767, -32768, 32767).astype("<i2")

        def write(file: io.BytesIO) -> None:
            with wave.open(file, "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(AUDIO_RATE)
                sound.writeframes(samples.tobytes())

        return [{"type": "input_audio", "input_audio": {"data": _in_base64(write), "format": "wav"}}]


def read_message(message: dict, starts_in_thought: bool = False) -> Written:
    """
    Separate the reply from the thoughts in an endpoint's message, whose content is a string or a list of parts.

    Thoughts are in the text, in parts of their own, or in a field beside the content.

    Args:
        message: the message of the first choice.
        starts_in_thought: see `EndpointSystem`.
    """
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts, thoughts = [], [_text_of(message.get(name)) for name in THOUGHT_FIELDS]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind in ("text", "output_text", None):
            texts.append(_text_of(part))
        elif kind in ("thinking", "reasoning", "reasoning_text", "summary_text", "thought"):
            thoughts.append(_text_of(part))
    written = read_written("".join(texts), starts_in_thought)
    beside = [thought.strip() for thought in thoughts if thought.strip()]
    return written._replace(thought="\n".join(dict.fromkeys([*beside, *filter(None, [written.thought])])))


def _text_of(value) -> str:
    """The text in a string, a part, or a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_text_of, value))
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "summary", "content", "value")
        return next((text for name in names if (text := _text_of(value.get(name)))), "")
    return ""


def _in_base64(write: Callable[[io.BytesIO], None]) -> str:
    file = io.BytesIO()
    write(file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _checked_url(name: str, url: str) -> str:
    """Return the base URL without a trailing slash, or raise `ValueError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{name}: {url!r} is not a base URL. Write MODEL@https://HOST/v1.")
    return url.rstrip("/")


def _is_private(url: str) -> bool:
    """Whether traffic to the URL is encrypted or stays on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ip_address(parts.hostname).is_loopback
    except ValueError:
        return False


def _retry_after(value: str | None) -> float | None:
    """Seconds from a `Retry-After` header (a number or a date); None if it is missing or cannot be parsed."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
