"""
Generation by a vLLM server, which gets the prompts as embeddings.

vLLM serves the language model alone (see `empathic export`) with `--enable-prompt-embeds`. This process keeps the
encoders and the memory, and sends each prompt to vLLM's completions API: `prompt_embeds` is a tensor (positions,
hidden_size), saved by torch and in base64.
"""

import base64
import http.client
import io
import json
import queue
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

import torch
from torch import nn

from ..sampling import Sampling
from .prompts import Steps
from .replies import BackendError, Reply

LONGEST_STEP = 0.1  # seconds that a step waits for text, while new requests wait for the step


def keep_embeddings_only(model) -> None:
    """Drop the layers and the head of the language model, which vLLM has, and keep its token embeddings."""
    decoder, embeddings = model.model.language_model, model.get_input_embeddings()
    for name, child in decoder.named_children():
        if child is not embeddings:
            setattr(decoder, name, nn.Identity())
    model.lm_head = nn.Identity()


class VllmDecoder:
    """
    Generates replies with a vLLM server.

    Args:
        url: base URL of the server, such as `http://127.0.0.1:8001/v1`.
        name: the name of the language model there.
        max_batch: the maximum number of replies at once; vLLM has its own limit of what it batches.
        api_key: the key of the server.
        timeout: seconds that the server may be silent.

    Raises:
        ValueError: for an invalid URL.
    """

    gives_logprobs = False

    def __init__(self, url: str, name: str, max_batch: int, api_key: str | None = None, timeout: float = 120):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The URL of vLLM is {url!r}; give one such as http://127.0.0.1:8001/v1.")
        self.url, self.name, self.max_batch, self.timeout = parts, name, max_batch, timeout
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self._events: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._sockets: dict[Reply, socket.socket | None] = {}  # None until the connection is there
        self._lock = threading.Lock()

    def check(self) -> None:
        """
        Check that the server answers and has the model.

        Raises:
            ConnectionError: otherwise.
        """
        try:
            connection = self._connect()
            connection.request("GET", f"{self.url.path.rstrip('/')}/models", headers=self.headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            names = [model["id"] for model in json.loads(content)["data"]]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise ConnectionError(
                f"No vLLM server answers at {self.url.geturl()} ({type(error).__name__}: {error}). Start it with `vllm "
                "serve LANGUAGE_MODEL --enable-prompt-embeds`, or give --vllm_url."
            ) from error
        if self.name not in names:
            raise ConnectionError(
                f"The vLLM server at {self.url.geturl()} has no model {self.name!r}, only {', '.join(names)}. Give "
                "--vllm_model."
            )

    def _connect(self) -> http.client.HTTPConnection:
        secure = self.url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(self.url.hostname or "", self.url.port, timeout=self.timeout)

    def _body(self, reply: Reply) -> bytes:
        buffer, options, config = io.BytesIO(), reply.request.options, reply.config
        torch.save(reply.prompt.embeddings.detach().cpu().contiguous().clone(), buffer)
        body = {
            "model": self.name,
            "prompt": "",
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
            "max_tokens": reply.most,
            "stop_token_ids": sorted(reply.ends),
            "repetition_penalty": 1.0,  # vLLM would use that of the model's generation config
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if config.suppress_tokens:
            body["logit_bias"] = {str(token): -100 for token in config.suppress_tokens}
        if options.samples(config):
            warping = Sampling(temperature=options.temperature, top_p=options.top_p).warping(config)
            body |= {"temperature": warping["temperature"], "top_p": warping["top_p"], "seed": options.seed}
            body["top_k"] = warping["top_k"] or -1
        else:
            body["temperature"] = 0
        return json.dumps(body).encode()

    def begin(self, reply: Reply) -> Steps[None]:
        """Send the prompt of a reply; its text comes with later steps."""
        body = self._body(reply)
        reply.prompt.embeddings = torch.empty(0)
        self._sockets[reply] = None
        threading.Thread(target=self._follow, args=(reply, body), name="vllm", daemon=True).start()
        yield

    def _follow(self, reply: Reply, body: bytes) -> None:
        """Pass on what the server writes for a reply, in a thread."""
        connection, reason, tokens = self._connect(), None, 0
        try:
            connection.connect()
            with self._lock:
                if reply not in self._sockets:  # it has ended meanwhile
                    return
                self._sockets[reply] = connection.sock  # the response takes it from the connection
            connection.request("POST", f"{self.url.path.rstrip('/')}/completions", body, self.headers)
            response = connection.getresponse()
            if response.status != 200:
                raise BackendError(f"vLLM answered with the status {response.status}: {response.read(500)!r}")
            while line := response.readline():
                value = line.strip().removeprefix(b"data:").strip()
                if value == b"[DONE]":
                    break
                if not value:
                    continue
                chunk = json.loads(value)
                if "error" in chunk:
                    raise BackendError(f"vLLM failed: {str(chunk['error'])[:500]}")
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                for choice in chunk.get("choices") or ():
                    reason = choice.get("finish_reason") or reason
                    if choice.get("text"):
                        self._events.put((reply, choice["text"], None, 0))
            if reason is None:
                raise BackendError("vLLM ended the connection before the reply")
            self._events.put((reply, "", reason, tokens))
        except Exception as error:
            self._events.put((reply, "", error, 0))
        finally:
            connection.close()

    def step(self, replies: list[Reply]) -> None:
        """Take the text that has come since the last step, or wait for some."""
        events = []
        with suppress(queue.Empty):
            events.append(self._events.get(timeout=LONGEST_STEP))
            while True:
                events.append(self._events.get_nowait())
        for event in events:
            if event is None or event[0] not in replies or event[0].reason is not None:
                continue  # of a reply that has ended here: cancelled, or at a stop string
            reply, text, end, tokens = event
            if text:
                reply.add_text(text)
            elif isinstance(end, Exception):
                reply.error = end
            else:
                reply.end("length" if end == "length" else "stop", tokens)

    def end(self, reply: Reply) -> None:
        """End the request of a reply; vLLM stops to generate when the connection is gone."""
        with self._lock:
            opened = self._sockets.pop(reply, None)
        if opened is not None:
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def wake(self) -> None:
        """Interrupt a step that waits."""
        self._events.put(None)
