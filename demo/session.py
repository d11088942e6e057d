"""
Visitors' conversations and how their turns are answered, independent of the page.

A `ShownConversation` is a plain record, and the only state that a page or a program must keep. The model also needs the
memory of a `ChatSession`: it is rebuilt from the record, and cached between turns only to save time.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace

from ..chat import ChatSession
from ..configuration_empathic import EMOTIONS
from ..emotions import name_emotion

VERSION = 1
MAX_TURNS = 200
MAX_REPLY = 20_000  # characters
LARGEST_NUMBER = 2**31  # of seconds, vectors or tokens; JSON for browsers has no integers over 64 bits
WITHOUT_MEDIA, WITHOUT_MEMORY, OTHER = "without_media", "without_memory", "other"
# Generation options for another reply to the same turn: greedy decoding would repeat the first reply.
ANOTHER = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}


class ConversationError(ValueError):
    """A turn or a saved conversation is invalid. The message is for the visitor."""


class Stopped(Exception):
    """The visitor stopped the turn; it is discarded."""


@dataclass(frozen=True)
class ShownReply:
    """
    A reply to a turn.

    Attributes:
        label: the model and its inputs, as shown on the page.
        text: the reply, or its beginning while it is generated.
        seconds: duration of the reply; None while it is generated, and for replies of an example.
        memory_vectors, history_tokens: length of the history in the prompt as memory vectors, and its length as text.
    """

    label: str
    text: str = ""
    seconds: float | None = None
    memory_vectors: int = 0
    history_tokens: int = 0


@dataclass(frozen=True)
class ShownTurn:
    """
    A visitor's turn and the answers to it.

    Attributes:
        text: the visitor's text.
        shown: kinds of the turn's clips: `audio`, `video` or both.
        emotions: the probability of each emotion; None if the model had no input to name the emotion from.
        emotion_seconds: duration of the emotion recognition.
        answers: the conversation continues from the first answer; the other answers are for comparison.
    """

    text: str
    shown: tuple[str, ...] = ()
    emotions: dict[str, float] | None = None
    emotion_seconds: float | None = None
    answers: tuple[ShownReply, ...] = ()


@dataclass(frozen=True)
class ShownConversation:
    """The turns so far. A conversation is immutable: each turn creates a new `ShownConversation`."""

    turns: tuple[ShownTurn, ...] = ()

    def plus(self, turn: ShownTurn) -> "ShownConversation":
        """Return the conversation with a further turn."""
        return ShownConversation((*self.turns, turn))

    def without_last(self) -> "ShownConversation":
        """Return the conversation without the last turn."""
        return ShownConversation(self.turns[:-1])

    def messages(self) -> list[dict]:
        """Return the messages for `ChatSession.remember`."""
        said = [(turn.text, turn.answers[0].text) for turn in self.turns]
        return [
            {"role": role, "content": text}
            for pair in said
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]

    def record(self) -> dict:
        """Return the conversation as plain values for `from_record`. Clips are not included."""
        return {"empathic_conversation": VERSION, "turns": [asdict(turn) for turn in self.turns]}

    def to_json(self) -> str:
        """Return the content of a conversation file."""
        return json.dumps(self.record(), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, content: str | bytes) -> "ShownConversation":
        """
        Parse a conversation file.

        Raises:
            ConversationError: if the content is not a saved conversation.
        """
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            raise ConversationError("This file is not a saved conversation: it is not JSON.") from None
        return cls.from_record(record)

    @classmethod
    def from_record(cls, record: dict) -> "ShownConversation":
        """
        Convert the result of `record` back into a conversation. The record is untrusted and is validated.

        Raises:
            ConversationError: if the record is invalid.
        """
        if not isinstance(record, dict) or record.get("empathic_conversation") != VERSION:
            raise ConversationError("This is not a conversation saved by this page.")
        turns = record.get("turns")
        if not isinstance(turns, list) or len(turns) > MAX_TURNS:
            raise ConversationError(f"A saved conversation must have a list of at most {MAX_TURNS} turns.")
        try:
            return cls(tuple(_turn(turn) for turn in turns))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ConversationError("This saved conversation is damaged.") from None


def whole_characters(text: str) -> str:
    """Replace lone surrogates (half of an emoji, which JSON can hold) with U+FFFD: no response can contain them."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _text(value) -> str:
    if not isinstance(value, str) or len(value) > MAX_REPLY:
        raise ValueError("not a text, or too long")
    return whole_characters(value)


def _number(value: float) -> float:
    if not 0 <= value <= LARGEST_NUMBER:  # also refuses NaN
        raise ValueError("not a time or a count")
    return value


def _seconds(value) -> float | None:
    return None if value is None else _number(float(value))


def _turn(record: dict) -> ShownTurn:
    emotions, answers = record["emotions"], record["answers"]
    if emotions is not None:
        emotions = {name: min(1.0, max(0.0, float(emotions[name]))) for name in EMOTIONS}
    if not 1 <= len(answers) <= 4:
        raise ValueError("a turn must have one to four answers")
    return ShownTurn(
        text=_text(record["text"]),
        shown=tuple(kind for kind in ("audio", "video") if kind in record["shown"]),
        emotions=emotions,
        emotion_seconds=_seconds(record["emotion_seconds"]),
        answers=tuple(
            ShownReply(
                label=_text(answer["label"]),
                text=_text(answer["text"]),
                seconds=_seconds(answer["seconds"]),
                memory_vectors=_number(int(answer["memory_vectors"])),
                history_tokens=_number(int(answer["history_tokens"])),
            )
            for answer in answers
        ),
    )


@dataclass(frozen=True)
class NamedModel:
    """A model with its processor and its name on the page."""

    name: str
    model: object
    processor: object

    @classmethod
    def from_pretrained(cls, place: str, device: str | None = None) -> "NamedModel":
        """Load a folder or a Hub id for inference, by default on a GPU if there is one."""
        import torch

        from ..modeling_empathic import EmpathicForConditionalGeneration
        from ..processing_empathic import EmpathicProcessor

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = EmpathicForConditionalGeneration.from_pretrained(place, dtype="auto").eval().to(device)
        return cls(place.rstrip("/").split("/")[-1], model, EmpathicProcessor.from_pretrained(place))


@dataclass
class Visitor:
    """Cached state of a visitor. The conversation can continue without it."""

    sessions: dict[int, ChatSession] = field(default_factory=dict)  # index of the checkpoint -> session
    last: tuple[ShownTurn, dict] | None = None  # the last turn and its decoded clips, for a retry
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Chatbot:
    """
    Answers the turns of many visitors, without shared state between visitors.

    Args:
        checkpoint: the checkpoint that answers.
        other: a second checkpoint to compare with, such as the model before EPO.
        max_new_tokens: maximum length of a reply.
        max_memories: see `ChatSession`.
        kept_visitors: maximum number of visitors whose state is cached between turns; the least recently active visitor
            is evicted first.
    """

    def __init__(
        self,
        checkpoint: NamedModel,
        other: NamedModel | None = None,
        max_new_tokens: int = 128,
        max_memories: int | None = None,
        kept_visitors: int = 32,
    ):
        self.checkpoints = [checkpoint, *([other] if other is not None else [])]
        self.max_new_tokens, self.max_memories, self.kept_visitors = max_new_tokens, max_memories, kept_visitors
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def comparisons(self) -> dict[str, str]:
        """The possible comparisons: key -> label on the page."""
        name = self.checkpoints[0].name
        names = {WITHOUT_MEDIA: f"{name}, without voice and face", WITHOUT_MEMORY: f"{name}, without memory"}
        if len(self.checkpoints) > 1:
            names[OTHER] = self.checkpoints[1].name
        return names

    @property
    def visitors(self) -> list[str]:
        """The keys of all visitors with cached state."""
        return list(self._visitors)

    def stop(self, visitor: str) -> None:
        """Stop the turn that is being answered for a visitor, if any, at the next token."""
        with self._lock:
            if visitor in self._visitors:
                self._visitors[visitor].stopped.set()

    def forget(self, visitor: str) -> None:
        """Stop the visitor's turn and delete the visitor's state."""
        self.stop(visitor)
        with self._lock:
            self._visitors.pop(visitor, None)

    def clips_of_last(self, visitor: str, conversation: ShownConversation) -> dict[str, dict]:
        """
        Return the clips of a conversation's last turn, for a retry.

        Raises:
            ConversationError: if there is no turn, or its clips are no longer kept.
        """
        if not conversation.turns:
            raise ConversationError("There is no turn yet.")
        turn = conversation.turns[-1]
        last = self._visitor(visitor).last
        if last is not None and last[0] == turn:
            return last[1]
        if turn.shown:
            raise ConversationError(
                "The clip of your last turn is no longer kept. Edit the turn: add the clip again, or send only text."
            )
        return {}

    def turn(
        self,
        visitor: str,
        conversation: ShownConversation,
        text: str,
        clips: dict[str, dict] | None = None,
        compare: Sequence[str] = (),
        another: bool = False,
        memory: bool = True,
    ) -> Iterator[ShownTurn]:
        """
        Answer a turn: yield its successive states while the answers are generated. The last state is complete; add it
        to the conversation.

        Args:
            visitor: key of the visitor; visitors with different keys share no state.
            conversation: the conversation before this turn.
            text: the visitor's text; may be empty if there is a clip.
            clips: content items by kind, see `uploads.read_upload`.
            compare: keys of `comparisons`: further answers to the same turn after the same history.
            another: sample the reply instead of decoding greedily.
            memory: False answers the turn without the history.

        Raises:
            ConversationError: if the turn is empty, or the visitor's previous turn is still being answered.
            Stopped: if the visitor stopped the turn. After any error the visitor's memory is unchanged.
        """
        clips, text = clips or {}, whole_characters(text).strip()
        if not text and not clips:
            raise ConversationError("Say something first: write a text, or add a voice recording or a clip.")
        if len(conversation.turns) >= MAX_TURNS:
            raise ConversationError(f"The limit is {MAX_TURNS} turns. Save the conversation and start a new one.")
        kept = self._visitor(visitor)
        if not kept.lock.acquire(blocking=False):
            raise ConversationError("Your last turn is still being answered: wait for it, or stop it.")
        try:
            kept.stopped.clear()
            with closing(self._answer(kept, conversation, text, clips, compare, another, memory)) as states:
                for turn in states:
                    if kept.stopped.is_set():
                        raise Stopped
                    yield turn
        finally:
            kept.lock.release()

    def emotions(self, text: str, clips: dict[str, dict]) -> dict[str, float] | None:
        """Return the probability of each emotion of a turn; None if the model has no input to name it from."""
        return name_emotion(self.checkpoints[0].model, self.checkpoints[0].processor, text, clips)

    def _visitor(self, key: str) -> Visitor:
        with self._lock:
            visitor = self._visitors.setdefault(key, Visitor())
            self._visitors.move_to_end(key)
            while len(self._visitors) > self.kept_visitors:
                self._visitors.popitem(last=False)
            return visitor

    def _answer(self, visitor, conversation, text, clips, compare, another, memory) -> Iterator[ShownTurn]:
        messages = conversation.messages()
        turn = ShownTurn(text, tuple(kind for kind in ("audio", "video") if kind in clips))
        yield turn
        first = self.checkpoints[0]
        started = time.perf_counter()
        emotions = Chatbot.emotions(self, text, clips)
        turn = replace(turn, emotions=emotions, emotion_seconds=time.perf_counter() - started)
        yield turn

        own = self._session(visitor, 0, messages) if memory else self._new_session(0)
        ways = [(first.name, own, clips)]
        names = self.comparisons
        if WITHOUT_MEDIA in compare and clips and text:
            ways.append((names[WITHOUT_MEDIA], own.fork(), {}))
        if WITHOUT_MEMORY in compare:
            ways.append((names[WITHOUT_MEMORY], self._new_session(0), clips))
        if OTHER in compare and OTHER in names:
            ways.append((names[OTHER], self._session(visitor, 1, messages).fork(), clips))
        options = {"max_new_tokens": self.max_new_tokens, **(ANOTHER if another else {"do_sample": False})}
        before = turn
        for label, session, given in ways:
            written = ""
            with closing(session.stream(text, **given, **options)) as pieces:
                for piece in pieces:
                    written += piece
                    turn = replace(before, answers=(*before.answers, ShownReply(label, written)))
                    yield turn
            cost = session.last_turn
            answer = ShownReply(label, written, cost.seconds, cost.memory_vectors, cost.history_text_tokens)
            before = turn = replace(before, answers=(*before.answers, answer))
        visitor.last = (turn, clips)
        yield turn

    def _new_session(self, index: int) -> ChatSession:
        checkpoint = self.checkpoints[index]
        return ChatSession(checkpoint.model, checkpoint.processor, max_memories=self.max_memories)

    def _session(self, visitor: Visitor, index: int, messages: list[dict]) -> ChatSession:
        """Return a session with exactly these messages: the cached session, extended if needed, or a new session."""
        session = visitor.sessions.get(index)
        if session is None or session.messages != messages[: len(session.messages)]:
            session = visitor.sessions[index] = self._new_session(index)
        if rest := messages[len(session.messages) :]:
            session.remember(*rest)
        return session
