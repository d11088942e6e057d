"""
What a visitor's conversation is, and how a turn of it is answered. Nothing here knows of the page.

A `Conversation` is a plain record and all that a page or a program keeps of it. What the model needs beside it (the
memory of a `ChatSession`) is made from the record, and kept between turns only to save time.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace

from empathic.chat import ChatSession
from empathic.configuration_empathic import EMOTIONS
from empathic.demo.emotions import name_emotion

VERSION = 1
MAX_TURNS = 200
MAX_REPLY = 20_000  # characters
WITHOUT_MEDIA, WITHOUT_MEMORY, OTHER = "without_media", "without_memory", "other"
# A greedy reply would be the same again.
ANOTHER = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}


class ConversationError(ValueError):
    """Why a turn or a saved conversation cannot be taken, in words for the visitor."""


class Stopped(Exception):
    """The visitor has stopped the turn; it is forgotten."""


@dataclass(frozen=True)
class Answer:
    """
    One reply to a turn.

    Attributes:
        label: who gave it and from what.
        text: the reply, or what is there of it.
        seconds: what it took; None while it is written, and for replies that were not given here.
        memory_vectors, history_tokens: what the history took in the prompt, and what it would take as text.
    """

    label: str
    text: str = ""
    seconds: float | None = None
    memory_vectors: int = 0
    history_tokens: int = 0


@dataclass(frozen=True)
class Turn:
    """
    What a visitor said and what was answered.

    Attributes:
        text: of the visitor.
        shown: of `audio` and `video`, what came with it.
        emotions: the probability of each emotion; None where there is nothing to tell it from.
        emotion_seconds: what naming it took.
        answers: the conversation goes on from the first; the others are there to compare.
    """

    text: str
    shown: tuple[str, ...] = ()
    emotions: dict[str, float] | None = None
    emotion_seconds: float | None = None
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The turns so far. It is never changed: a turn makes a new one."""

    turns: tuple[Turn, ...] = ()

    def plus(self, turn: Turn) -> "Conversation":
        """With one more turn."""
        return Conversation((*self.turns, turn))

    def without_last(self) -> "Conversation":
        """Without the last turn."""
        return Conversation(self.turns[:-1])

    def messages(self) -> list[dict]:
        """As `ChatSession.remember` takes it."""
        said = [(turn.text, turn.answers[0].text) for turn in self.turns]
        return [
            {"role": role, "content": text}
            for pair in said
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]

    def record(self) -> dict:
        """As plain values, which `from_record` takes back. Clips are no part of it."""
        return {"empathic_conversation": VERSION, "turns": [asdict(turn) for turn in self.turns]}

    def to_json(self) -> str:
        """The file of a saved conversation."""
        return json.dumps(self.record(), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, content: str | bytes) -> "Conversation":
        """
        Reads a saved conversation.

        Raises:
            ConversationError: for another file.
        """
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            raise ConversationError("This file is no saved conversation: it is not JSON.") from None
        return cls.from_record(record)

    @classmethod
    def from_record(cls, record: dict) -> "Conversation":
        """
        Takes back what `record` gave; whatever else is in it is refused.

        Raises:
            ConversationError: for anything else.
        """
        if not isinstance(record, dict) or record.get("empathic_conversation") != VERSION:
            raise ConversationError("This is no saved conversation of this page.")
        turns = record.get("turns")
        if not isinstance(turns, list) or len(turns) > MAX_TURNS:
            raise ConversationError(f"A saved conversation holds a list of at most {MAX_TURNS} turns.")
        try:
            return cls(tuple(_turn(turn) for turn in turns))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ConversationError("This saved conversation is damaged.") from None


def _text(value) -> str:
    if not isinstance(value, str) or len(value) > MAX_REPLY:
        raise ValueError("not a text of this page")
    return value


def _seconds(value) -> float | None:
    return None if value is None else float(value)


def _turn(record: dict) -> Turn:
    emotions, answers = record["emotions"], record["answers"]
    if emotions is not None:
        emotions = {name: min(1.0, max(0.0, float(emotions[name]))) for name in EMOTIONS}
    if not 1 <= len(answers) <= 4:
        raise ValueError("a turn has one to four answers")
    return Turn(
        text=_text(record["text"]),
        shown=tuple(kind for kind in ("audio", "video") if kind in record["shown"]),
        emotions=emotions,
        emotion_seconds=_seconds(record["emotion_seconds"]),
        answers=tuple(
            Answer(
                label=_text(answer["label"]),
                text=_text(answer["text"]),
                seconds=_seconds(answer["seconds"]),
                memory_vectors=int(answer["memory_vectors"]),
                history_tokens=int(answer["history_tokens"]),
            )
            for answer in answers
        ),
    )


@dataclass(frozen=True)
class Checkpoint:
    """A model, its processor and what it is called on the page."""

    name: str
    model: object
    processor: object

    @classmethod
    def from_pretrained(cls, place: str, device: str | None = None) -> "Checkpoint":
        """Loads a folder or a Hub id for inference; by default onto the GPU where there is one."""
        import torch

        from empathic.modeling_empathic import EmpathicForConditionalGeneration
        from empathic.processing_empathic import EmpathicProcessor

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = EmpathicForConditionalGeneration.from_pretrained(place, dtype="auto").eval().to(device)
        return cls(place.rstrip("/").split("/")[-1], model, EmpathicProcessor.from_pretrained(place))


@dataclass
class Visitor:
    """What is kept for a visitor beside the record. All of it can be lost without harm to the conversation."""

    sessions: dict[int, ChatSession] = field(default_factory=dict)  # by checkpoint
    last: tuple[Turn, dict] | None = None  # the last turn and its clips, decoded, for another try
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Chatbot:
    """
    Answers the turns of many visitors, each apart from the others.

    Args:
        checkpoint: who answers.
        other: a second one to compare with, such as the model before EPO.
        max_new_tokens: length of a reply at most.
        max_memories: see `ChatSession`.
        kept_visitors: for how many visitors the memory is kept between turns; the one that was quiet for longest goes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        other: Checkpoint | None = None,
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
        """What a reply can be compared with, and what that is called."""
        name = self.checkpoints[0].name
        names = {WITHOUT_MEDIA: f"{name}, without voice and face", WITHOUT_MEMORY: f"{name}, without memory"}
        if len(self.checkpoints) > 1:
            names[OTHER] = self.checkpoints[1].name
        return names

    @property
    def visitors(self) -> list[str]:
        """For whom something is kept."""
        return list(self._visitors)

    def stop(self, visitor: str) -> None:
        """Stops the turn that is being answered for a visitor, if any, at the next token."""
        with self._lock:
            if visitor in self._visitors:
                self._visitors[visitor].stopped.set()

    def forget(self, visitor: str) -> None:
        """Stops, and frees what is kept for a visitor."""
        self.stop(visitor)
        with self._lock:
            self._visitors.pop(visitor, None)

    def clips_of_last(self, visitor: str, conversation: Conversation) -> dict[str, dict]:
        """
        The clips of a conversation's last turn, to try it again.

        Raises:
            ConversationError: where there is no turn, or its clips are not there any more.
        """
        if not conversation.turns:
            raise ConversationError("There is no turn yet.")
        turn = conversation.turns[-1]
        last = self._visitor(visitor).last
        if last is not None and last[0] == turn:
            return last[1]
        if turn.shown:
            raise ConversationError(
                "The clip of your last turn is not kept any more. Edit the turn: give the clip again, or send only "
                "the text."
            )
        return {}

    def turn(
        self,
        visitor: str,
        conversation: Conversation,
        text: str,
        clips: dict[str, dict] | None = None,
        compare: Sequence[str] = (),
        another: bool = False,
        memory: bool = True,
    ) -> Iterator[Turn]:
        """
        Answers one turn: gives it again and again as it grows. The last one is whole; add that to the conversation.

        Args:
            visitor: whoever has a key of their own shares nothing with others.
            conversation: what was said before.
            text: of the visitor; may be empty beside a clip.
            clips: content items by kind, see `uploads.read_upload`.
            compare: keys of `comparisons`: what else answers the same turn after the same history.
            another: draws a reply instead of the likeliest one.
            memory: False answers the turn as if it were the first.

        Raises:
            ConversationError: for an empty turn, or where the visitor's turn before is not done yet.
            Stopped: where the visitor has stopped it. After any error the visitor's memory is as it was.
        """
        clips, text = clips or {}, text.strip()
        if not text and not clips:
            raise ConversationError("Say something first: write a text, or add a voice or a clip.")
        if len(conversation.turns) >= MAX_TURNS:
            raise ConversationError(f"{MAX_TURNS} turns are the most here. Save the conversation and start a new one.")
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

    def _visitor(self, key: str) -> Visitor:
        with self._lock:
            visitor = self._visitors.setdefault(key, Visitor())
            self._visitors.move_to_end(key)
            while len(self._visitors) > self.kept_visitors:
                self._visitors.popitem(last=False)
            return visitor

    def _answer(self, visitor, conversation, text, clips, compare, another, memory) -> Iterator[Turn]:
        messages = conversation.messages()
        turn = Turn(text, tuple(kind for kind in ("audio", "video") if kind in clips))
        yield turn
        first = self.checkpoints[0]
        started = time.perf_counter()
        emotions = name_emotion(first.model, first.processor, text, clips)
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
                    turn = replace(before, answers=(*before.answers, Answer(label, written)))
                    yield turn
            cost = session.last_turn
            answer = Answer(label, written, cost.seconds, cost.memory_vectors, cost.history_text_tokens)
            before = turn = replace(before, answers=(*before.answers, answer))
        visitor.last = (turn, clips)
        yield turn

    def _new_session(self, index: int) -> ChatSession:
        checkpoint = self.checkpoints[index]
        return ChatSession(checkpoint.model, checkpoint.processor, max_memories=self.max_memories)

    def _session(self, visitor: Visitor, index: int, messages: list[dict]) -> ChatSession:
        """A session that has read just these messages: the kept one as far as it goes, else a new one."""
        session = visitor.sessions.get(index)
        if session is None or session.messages != messages[: len(session.messages)]:
            session = visitor.sessions[index] = self._new_session(index)
        if rest := messages[len(session.messages) :]:
            session.remember(*rest)
        return session
