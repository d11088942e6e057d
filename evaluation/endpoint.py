"""
Any model behind an OpenAI-compatible endpoint (proprietary ones, vLLM, `transformers serve`), the history as text:

    gpt=openai:gpt-4o,requests_per_minute=60,price_in=2.5,price_out=10
    local=openai:Qwen/Qwen2.5-7B-Instruct@http://127.0.0.1:8000/v1,key=none,concurrency=16

The key comes from an environment variable and goes nowhere but into the request. A request is tried again, later each
time, for as often as it may; one that fails for good is a reply without a text whose note says why, and the job goes
on. What would fail for every request (a wrong key, an unknown model) stops it.
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

from empathic.evaluation.systems import Common, Reply, boolean
from empathic.media_empathic import MediaError, load_audio, load_video
from empathic.trainers.baseline_prompts import SYSTEM_PROMPT, chat_turns, clip_of
from empathic.trainers.samples import sample_id

logger = logging.get_logger(__name__)

OPENAI = "https://api.openai.com/v1"
MEDIA = {"none": (), "frames": ("video",), "audio": ("audio",), "both": ("audio", "video")}
AUDIO_RATE = 16000
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; doubled from one attempt to the next
LONGEST_RETRY_AFTER = 600.0  # who asks for more says that today there will be no answer
FAILURES_IN_A_ROW = 20
PASSING = (408, 409, 425, 429)  # these and all from 500 on are tried again
# Options of a spec beside the common ones, as `systems.open_system` reads them.
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
}


class EndpointError(ConnectionError):
    """What would fail for every request. The message names the endpoint, what is wrong and the mend."""


class _Failed(Exception):
    """One request failed; `wait` is what the server asked for in seconds, None if it did not."""

    def __init__(self, reason: str, passing: bool, wait: float | None = None):
        super().__init__(reason)
        self.passing, self.wait = passing, wait


class Turnstile:
    """
    Lets requests through one by one, evenly spaced, from any number of threads.

    Args:
        per_minute: requests at most; None for no limit.
    """

    def __init__(self, per_minute: float | None):
        self.gap = 0.0 if per_minute is None else 60.0 / per_minute
        self.free_at, self.lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Returns when the next request may go."""
        with self.lock:
            now = time.monotonic()
            mine = max(now, self.free_at)
            self.free_at = mine + self.gap
        if mine > now:
            time.sleep(mine - now)

    def hold(self, seconds: float) -> None:
        """Nobody goes for so long: the server said so to one, and means all."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic() + seconds)


class EndpointSystem:
    """
    A model behind `BASE_URL/chat/completions`.

    Args:
        name: of the system.
        target: `MODEL@BASE_URL`, or `MODEL` of OpenAI's own endpoint.
        common: see `Common`; `batch_size` replies are asked for before they are saved.
        media: what of the last turn's clip goes along: `none`, `frames` (JPEG images), `audio` (WAV) or `both`.
        num_frames: of a clip, evenly spaced.
        key: the environment variable that holds the key; `none` sends none.
        requests_per_minute: attempts at most, of all processes together; None for no limit.
        concurrency: requests in flight, of this process.
        retries: further attempts of a request that failed.
        timeout: seconds that one attempt may take.
        price_in, price_out: of a million tokens of prompt and reply, for `cost`.
        folded: the instruction stands in the first user's turn, for models without a system message.
        tokens_field: what the endpoint calls the reply's length; some models want `max_completion_tokens`.
        sends_temperature, sends_seed: false for models or endpoints that refuse them.

    Raises:
        ValueError: for a number or a choice out of range, a URL that is none, or a key that would travel unencrypted.
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
        self.concurrency, self.retries = concurrency, retries
        self.prices = None if price_in is None else (price_in, price_out)
        self.tokens_field, self.sends_temperature, self.sends_seed = tokens_field, sends_temperature, sends_seed
        self.key_name = None if key == "none" else key
        secret = self._key()
        if secret is not None and not secret.isascii():
            raise ValueError(f"{name}: the key in {key} has characters that no key has. Set the variable again.")
        if secret is not None and not _is_private(self.url):
            raise ValueError(
                f"{name}: the key in {key} would go to {self.url} unencrypted. Use https, or key=none if it needs none."
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # each has a turnstile of its own
        self.turnstile = Turnstile(requests_per_minute and requests_per_minute / processes)
        self.client = httpx2.Client(timeout=timeout, limits=httpx2.Limits(max_connections=concurrency))
        self._answered, self._failures, self._lock = False, 0, threading.Lock()
        self._stopped: EndpointError | None = None

    @property
    def settings(self) -> dict:
        """See `System`."""
        decoding = self.common.decoding()
        decoding.pop("dtype")  # the endpoint's own matter
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
            **decoding,
        }

    def reply(self, samples: list[dict], seeds: list[int]) -> list[Reply]:
        """
        See `System`. Beside the usual, `extra` has `seconds` (the last attempt's), `attempts` if they were several and,
        with prices, `cost`.

        Raises:
            EndpointError: for what would fail for every request.
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
            if self._stopped is not None:  # by another thread
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
        notes = " ".join(part for part in (note, reply.extra.get("note")) if part)
        if notes:
            reply.extra["note"] = notes
        return reply

    def _next_wait(self, failure: _Failed, attempts: int) -> float | None:
        """Seconds until the next attempt; None if there is to be none."""
        if not failure.passing or attempts > self.retries:
            return None
        if failure.wait is not None:
            return failure.wait if failure.wait <= LONGEST_RETRY_AFTER else None
        # Not all at the same moment: half of the wait is drawn.
        return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempts - 1)) * random.uniform(0.5, 1.0)

    def _give_up(self, sample: dict, failure: _Failed, attempts: int) -> Reply:
        with self._lock:
            self._failures += 1
            if not self._answered and isinstance(failure.__cause__, httpx2.ConnectError):
                self._stopped = EndpointError(
                    f"{self.name}: nobody answers at {self.url} ({failure}). Is the server running?"
                )
            elif self._failures >= FAILURES_IN_A_ROW:
                self._stopped = EndpointError(
                    f"{self.name}: {self._failures} requests in a row failed, the last one, {sample_id(sample)}, with: "
                    f"{failure}. Mend that and start again: what was answered is kept."
                )
        if self._stopped is not None:
            raise self._stopped
        logger.warning(
            "%s: %s has no reply after %d attempts: %s. It is recorded as failed, and the job goes on.",
            self.name, sample_id(sample), attempts, failure,
        )  # fmt: skip
        about = {"finish_reason": "failed", "attempts": attempts, "note": f"The request failed: {failure}"}
        return Reply("", about)

    def _post(self, body: dict) -> dict:
        """The endpoint's answer as JSON."""
        secret = self._key()
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        try:
            response = self.client.post(f"{self.url}/chat/completions", json=body, headers=headers)
        except httpx2.HTTPError as error:  # no connection, one that was cut, or no answer in time
            raise _Failed(f"{type(error).__name__}: {self._without_key(str(error))}", passing=True) from error
        status, text = response.status_code, self._without_key(response.text[:500])
        if status == 200:
            try:
                return response.json()
            except ValueError as error:
                raise _Failed(f"the answer is no JSON: {text!r}", passing=True) from error
        if status == 401:
            where = f"the key in {self.key_name}" if self.key_name is not None else "a request without a key"
            raise EndpointError(f"{self.name}: {self.url} does not accept {where}: {text}. Set it, or give key=NAME.")
        if status == 402 or (status == 429 and "insufficient_quota" in text):
            raise EndpointError(f"{self.name}: {self.url} wants to be paid: {text}. Start again when it is.")
        if status == 404 or 300 <= status < 400:
            mend = "The target is MODEL@BASE_URL, and most base URLs end in /v1."
            raise EndpointError(f"{self.name}: {self.url} has no model {self.model!r} ({status}): {text}. {mend}")
        passing = status in PASSING or status >= 500
        raise _Failed(f"status {status}: {text}", passing, _retry_after(response.headers.get("retry-after")))

    def _read(self, answer: dict) -> Reply:
        """The reply in an answer."""
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            shown = self._without_key(json.dumps(answer)[:300])
            raise _Failed(f"the answer holds no reply: {shown}", passing=True) from error
        usage = answer.get("usage") or {}
        prompt, tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        extra = {"finish_reason": reason, "tokens": tokens, "prompt_tokens": prompt}
        if self.prices is not None and prompt is not None and tokens is not None:
            extra["cost"] = (prompt * self.prices[0] + tokens * self.prices[1]) / 1e6
        if not isinstance(text, str) or not text.strip():
            said = choice["message"].get("refusal")
            extra["note"] = f"The model gave no text ({said or reason})."
            text = ""
        return Reply(text.strip(), extra)

    def _key(self) -> str | None:
        return None if self.key_name is None else os.environ.get(self.key_name, "").strip() or None

    def _without_key(self, text: str) -> str:
        secret = self._key()
        return text if secret is None else text.replace(secret, "***")

    # ------------------------------------------------------------------ what is asked

    def _body(self, messages: list[dict], seed: int) -> tuple[dict, str | None]:
        """The request's JSON, and a note if a clip cannot be read."""
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


def _in_base64(write: Callable[[io.BytesIO], None]) -> str:
    file = io.BytesIO()
    write(file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _checked_url(name: str, url: str) -> str:
    """The base URL without a slash at its end."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{name}: {url!r} is no base URL. Write MODEL@https://HOST/v1.")
    return url.rstrip("/")


def _is_private(url: str) -> bool:
    """Whether nobody else can read what goes there: it is encrypted, or stays on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ip_address(parts.hostname).is_loopback
    except ValueError:
        return False


def _retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, a number or a date; None if there is none that can be read."""
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
