"""One reply in the making: how its tokens are chosen, when it ends, and what the client gets of it."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from ..chat import ReplyText
from ..sampling import Sampling, SeededSampler, end_tokens
from ..thoughts import WrittenDecoder
from .prompts import History, Prompt, Utterance


@dataclass(frozen=True)
class Options:
    """
    How a reply is generated.

    Attributes:
        max_tokens: the maximum number of tokens.
        temperature: 0 takes the most likely token; None does what the model's generation config says.
        top_p: as in `generate`; None uses the generation config.
        seed: makes a sampled reply repeatable.
        stop: the reply ends before the first of these strings.
        logprobs: how many of the most likely tokens are reported at each step; None reports no log-probabilities.
    """

    max_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def samples(self, config: GenerationConfig) -> bool:
        """Whether tokens are sampled."""
        return bool(config.do_sample) if self.temperature is None else self.temperature > 0

    def sampler(self, config: GenerationConfig) -> SeededSampler | None:
        """Return the sampler of one reply; None to take the most likely tokens."""
        if not self.samples(config):
            return None
        seed = secrets.token_hex(8) if self.seed is None else str(self.seed)
        return SeededSampler([seed], **Sampling(temperature=self.temperature, top_p=self.top_p).warping(config))


@dataclass(eq=False)
class Request:
    """
    A turn that a client wants answered.

    Attributes:
        system: the client's system prompt; None for that of the template.
        history: the messages before the turn.
        turn: the user's message.
        clips: the turn's clips by kind, as from `processor.frames` and `processor.sound`.
        options: how the reply is generated.
        emit: called with each `Piece`, and at the end with `Done` or `Failed`, from another thread.
        details: whether `Progress` and `Felt` are emitted too, and `Done` has the memory.
        cancelled: set to True when nobody waits for the reply any more.
        ahead: the number of requests before this one that was last emitted.
    """

    system: str | None
    history: History
    turn: Utterance
    clips: dict
    options: Options
    emit: Callable
    details: bool = False
    cancelled: bool = False
    ahead: int = 0


@dataclass(eq=False)
class Look:
    """
    Clips whose emotion a client asks for, without a reply.

    Attributes:
        text: the user's text; used only by models that were trained with the sentence.
        clips: as in `Request`.
        emit: called with `Felt`, `Skipped` or `Failed`, from another thread.
        if_idle: whether the look is skipped while a reply waits or is generated.
    """

    text: str
    clips: dict
    emit: Callable
    if_idle: bool = False


@dataclass(frozen=True)
class Progress:
    """
    What happens to a request before its first piece.

    Attributes:
        stage: `waiting`, `listening` (to the sound), `watching` (the video) or `answering`.
        ahead: the number of requests before this one; 0 except for `waiting`.
    """

    stage: str
    ahead: int = 0


@dataclass(frozen=True)
class Felt:
    """
    The recognized emotion.

    Attributes:
        emotions: the probability of each emotion; None if there was nothing to recognize it from.
        by_kind: the probabilities from the sound alone and from the video alone, if there are both.
    """

    emotions: dict[str, float] | None
    by_kind: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Skipped:
    """The end of a `Look` for which there was no time."""


@dataclass(frozen=True)
class Memory:
    """
    The memory of a conversation after a reply.

    Attributes:
        vectors: the number of memory vectors that the next prompt has.
        text_tokens: the number of tokens that the conversation would have in a prompt as text.
        digest: identifies the conversation up to here, in hexadecimal digits.
    """

    vectors: int
    text_tokens: int
    digest: str


@dataclass(frozen=True)
class TokenScore:
    """A token, its log-probability, and the most likely tokens at its place with their log-probabilities."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """The next piece of a reply."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Done:
    """
    The end of a reply.

    Attributes:
        reason: `stop` or `length`.
        prompt_tokens: positions of the prompt.
        cached_tokens: those of them that were not processed again.
        completion_tokens: generated tokens.
        audio_tokens, video_tokens: positions of the turn's sound and picture.
        felt: the recognized emotion; None if it was not recognized.
        memory: the memory after this reply; only with `details`.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    audio_tokens: int = 0
    video_tokens: int = 0
    felt: Felt | None = None
    memory: Memory | None = None


@dataclass(frozen=True)
class Failed:
    """A reply that could not be generated, with an HTTP status and a message for the client."""

    status: int
    message: str
    code: str = "server_error"


class BackendError(Exception):
    """An error of the server that generates the replies. The message is for the log."""


class StopStrings:
    """
    Holds a text back as long as it may be the beginning of a stop string.

    Attributes:
        sent: the text that was handed out.
        found: whether a stop string was found; the text ends before it.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop, self.sent, self.found, self._held = stop, "", False, ""

    def add(self, text: str, ends: bool = False) -> str:
        """Add text; return what can be handed out. `ends`: no more text follows."""
        if self.found:
            return ""
        held = self._held + text
        places = [place for stop in self.stop if (place := held.find(stop)) >= 0]
        if places:
            self.found, out = True, held[: min(places)]
            self._held = ""
        else:
            longest = 0 if ends else max((self._overlap(held, stop) for stop in self.stop), default=0)
            out = held[: len(held) - longest]
            self._held = held[len(held) - longest :]
        self.sent += out
        return out

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of a text that begins a stop string."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Reply:
    """
    A reply while it is generated.

    Attributes:
        most: the maximum number of tokens.
        items: the turn's encoded clips by kind.
        felt: the recognized emotion, once it is known.
        token: the newest token.
        started: when the reply began, as `time.monotonic()`.
        reason: why the reply ended; None as long as it goes on.
        error: why the reply failed, if it did.
        ends: the tokens that end a reply.
    """

    request: Request
    prompt: Prompt
    decode: WrittenDecoder
    config: GenerationConfig
    most: int
    items: dict = field(default_factory=dict)
    felt: Felt | None = None
    count: int = 0
    token: int = 0
    reason: str | None = None
    error: Exception | None = None

    def __post_init__(self):
        self.text, self.stops = ReplyText(self.decode), StopStrings(self.request.options.stop)
        self._sampler: Any = self.request.options.sampler(self.config)
        self._scores: list[TokenScore] = []
        self.started = time.monotonic()
        self.ends = end_tokens(self.config)

    def choose(self, logits: torch.Tensor) -> None:
        """Choose the next token from its logits (1, vocabulary), and hand out the text that it completes."""
        scores = logits.float()
        if self.config.suppress_tokens:
            scores[:, self.config.suppress_tokens] = float("-inf")
        chosen = scores if self._sampler is None else self._sampler(None, scores)
        self.token = int(chosen.argmax(-1))
        if self.request.options.logprobs is not None and self.token not in self.ends:
            self._scores.append(self._score(scores))
        self.count += 1
        is_end = self.token in self.ends
        self._hand_out(self.text.add([self.token]))
        if self.stops.found or is_end:
            self.reason = "stop"
        elif self.count >= self.most:
            self.reason = "length"
        if self.reason is not None:
            self._hand_out(self.text.end()[len(self.text.given) :], ends=True)

    def add_text(self, text: str) -> None:
        """Take text that was generated elsewhere, and hand it out."""
        self.count += 1  # a chunk is mostly a token
        self._hand_out(self.text.add_text(text))
        if self.stops.found:
            self.reason = "stop"

    def end(self, reason: str, count: int) -> None:
        """End a reply of `count` tokens that was generated elsewhere."""
        self.reason, self.count = reason, count or self.count
        self._hand_out(self.text.end()[len(self.text.given) :], ends=True)

    def _score(self, scores: torch.Tensor) -> TokenScore:
        logprobs = scores[0].log_softmax(-1)
        top = logprobs.topk(min(self.request.options.logprobs or 0, len(logprobs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenScore(self.token, float(logprobs[self.token]), tuple(pairs))

    def _hand_out(self, text: str, ends: bool = False) -> None:
        text = self.stops.add(text, ends)
        if text or (ends and self._scores):
            self.request.emit(Piece(text, tuple(self._scores)))
            self._scores = []
