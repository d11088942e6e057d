"""
The ways ("arms") to give a language model a long conversation when it answers a question about it.

| arm | the prompt has |
|---|---|
| `full` | all turns as text, or as many of the newest as the language model has positions for |
| `last` | the newest turns as text |
| `retrieval` | the turns most like the question as text |
| `memory` | the memory vectors of all utterances, as in a `ChatSession` |
| `memory_retrieval` | the memory vectors, and the turns most like the question as text: `ChatSession(recall=k)` |

What does not depend on the question is processed once for a conversation, in every arm.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ...chat import ChatSession, Keys, searchable
from ...decoding import GrowingCache, first_logits, fork
from ...serve.rows import decode_greedily
from ...thoughts import WrittenDecoder
from ..efficiency_arms import shared
from .sources import Question, Said

RESERVE = 16  # positions for the words of a template before the memory and before recalled turns

SYSTEM = "You answer questions about a long conversation."
# Around the question, because a small model has forgotten the system prompt after thousands of positions, and otherwise
# goes on with the conversation.
BEFORE = (
    "Answer the question about the conversation with a short phrase, in the words of the conversation where possible. "
    "If the conversation does not tell, answer: not mentioned.\nQuestion: "
)
AFTER = "\nShort answer:"
WHEN = " Tell the date, if need be an approximate one."  # what a temporal question of LoCoMo asks for
CHOICE = " Choose one: (a) {} (b) {}"
NOT_MENTIONED = "Not mentioned in the conversation"


@dataclass(frozen=True)
class Answered:
    """
    An answer and its costs.

    Attributes:
        text: the answer.
        positions, new_positions: positions of the prompt, and those that were processed for this question.
        seconds: time of the question, with retrieval; of questions answered together, their mean.
        held_bytes: keys and values of the prompt, memory vectors and memory state at the end of the prompt.
        shown: ids of the utterances in the prompt, as text or as vectors.
    """

    text: str
    positions: int
    new_positions: int
    seconds: float
    held_bytes: int
    shown: frozenset[str]


@dataclass(frozen=True)
class _Asked:
    """A question whose prompt is processed. `reused` positions of it were processed before."""

    logits: torch.Tensor
    cache: GrowingCache
    positions: int
    reused: int
    held_bytes: int
    shown: frozenset[str]


@dataclass(frozen=True)
class Settings:
    """
    The settings of the arms.

    Args:
        last: number of turns in arm `last`.
        top_k: number of retrieved turns.
        max_new_tokens: maximum length of an answer.
        max_positions: maximum length of a prompt; by default that of the language model.
        max_memories: maximum number of memory vectors in a prompt; by default as many as there are positions for.
    """

    last: int = 20
    top_k: int = 10
    max_new_tokens: int = 32
    max_positions: int | None = None
    max_memories: int | None = None


def ask(benchmark: str, question: Question) -> tuple[str, dict[str, str]]:
    """
    Write a question as the benchmark asks it, and what the letters mean if it is a choice.

    LoCoMo's adversarial questions are a choice between the answer that they suggest and none, in random order.
    """
    text = f"[{question.date}] {question.text}" if question.date else question.text
    if benchmark == "locomo" and question.category == "temporal":
        return text + WHEN, {}
    if benchmark == "locomo" and question.category == "adversarial":
        options = [question.answer, NOT_MENTIONED]
        random.Random(question.id).shuffle(options)
        return text + CHOICE.format(*options), dict(zip("ab", options, strict=True))
    return text, {}


def as_turn(question: str) -> str:
    """Write a question with the instruction, as the turn that the model answers."""
    return f"{BEFORE}{question}{AFTER}"


def read_choice(text: str, options: dict[str, str]) -> str:
    """Replace the letter of a choice by what it means; another answer stays as it is."""
    letter = text.strip().lower().strip("().")[:1] if len(text.strip()) <= 3 or text.strip().startswith("(") else ""
    return options.get(letter, text)


def without_name(text: str, names: Iterable[str]) -> str:
    """Remove the name of a speaker at the start of an answer, written as the turns of the conversation are."""
    return next((text[len(name) + 1 :].lstrip() for name in names if name and text.startswith(f"{name}:")), text)


def _message(said: Said, dated: bool) -> dict:
    text = f"[{said.date}] {said.text}" if dated and said.date else said.text
    return {"role": said.role, "content": text, **({"name": said.name} if said.name else {})}


def _session_starts(said: Sequence[Said]) -> list[dict]:
    """The messages of consecutive turns, with the date at the first turn of each session."""
    return [_message(turn, not i or said[i - 1].date != turn.date) for i, turn in enumerate(said)]


class Arms:
    """
    Answers questions about one conversation in each of the arms.

    Args:
        model, processor: an `EmpathicForConditionalGeneration` in evaluation mode, and its `EmpathicProcessor`.
        said: the conversation.
        asked: all questions about it, as they are asked.
        settings: the settings.
        embed: an embedding of texts for retrieval, see `ChatSession`; None compares memory vectors.
    """

    def __init__(
        self,
        model,
        processor,
        said: Sequence[Said],
        asked: Sequence[str],
        settings: Settings,
        embed: Callable | None,
    ):
        self.model, self.processor, self.settings, self.said = model, processor, settings, said
        self.embed = embed and (lambda texts: embed([one.removeprefix(BEFORE).removesuffix(AFTER) for one in texts]))
        limit = getattr(model.config.text_config, "max_position_embeddings", None) or 1 << 31
        self.max_prompt = min(limit, settings.max_positions or limit) - settings.max_new_tokens
        self.longest = max(asked, key=lambda text: len(processor.encode_plain(text)))
        least = self._length([], self.longest) + RESERVE
        if self.max_prompt < least:
            raise ValueError(
                f"A prompt may have {self.max_prompt + settings.max_new_tokens} positions with its answer, but a "
                f"question needs {least + settings.max_new_tokens}. Give a larger max_positions, or a smaller "
                "max_new_tokens."
            )
        self.reading_seconds: dict[str, float] = {}  # of each arm, for what does not depend on the question
        self._sessions: dict[str, ChatSession] = {}
        self._recalling: tuple[ChatSession, float] | None = None
        self._starts: dict[str, int] = {}
        self._prefixes: dict[str, tuple[list[int], GrowingCache]] = {}
        self._keys: Keys | None = None
        self._decode = WrittenDecoder(processor.tokenizer)

    @torch.inference_mode()
    def answer(self, arm: str, questions: Sequence[str]) -> list[Answered]:
        """Answer questions in an arm. Their prompts are processed one by one, and the answers decoded together."""
        if arm not in self.reading_seconds:
            start = time.perf_counter()
            elsewhere = self._begin(arm)
            self.reading_seconds[arm] = time.perf_counter() - start + elsewhere
        start = time.perf_counter()
        asked = [self._process(arm, question) for question in questions]
        logits, caches = torch.cat([one.logits for one in asked]), [one.cache for one in asked]
        tokens = decode_greedily(self.model, logits, caches, self.settings.max_new_tokens)
        texts = [self._decode(ids).reply for ids in tokens]
        seconds = (time.perf_counter() - start) / len(questions)
        return [
            Answered(text, one.positions, one.positions - one.reused, seconds, one.held_bytes, one.shown)
            for text, one in zip(texts, asked, strict=True)
        ]

    # ------------------------------------------------------------------ what does not depend on the question

    def _begin(self, arm: str) -> float:
        """Prepare an arm; return the seconds that another arm has spent on what this one uses too."""
        known, elsewhere = self._recalling, 0.0
        if arm == "full":
            self._starts[arm] = self._first_that_fits()
        elif arm == "last":
            self._starts[arm] = max(self._first_that_fits(), len(self.said) - self.settings.last)
        elif arm == "retrieval":
            self._near("")
        else:
            session, seconds = self._recalling_session()
            elsewhere = 0.0 if known is None else seconds
            if arm == "memory":
                if session.remembered < len(self.said):  # without recalled turns there may be room for more vectors
                    session, elsewhere = self._session(0), 0.0
                session = session.fork()
                session.recall = 0
            self._sessions[arm] = session
            session.warm_up()
        if arm in ("full", "last"):
            self._from_text(arm, self._newest(arm), self.longest)
        return elsewhere

    def _recalling_session(self) -> tuple[ChatSession, float]:
        """A session that has read the conversation and recalls turns, and the seconds that the reading took."""
        if self._recalling is None:
            start = time.perf_counter()
            session = self._session(self.settings.top_k)
            self._recalling = session, time.perf_counter() - start
        return self._recalling

    def _session(self, recall: int) -> ChatSession:
        # Recalled turns take positions too; they are counted as the longest ones.
        messages = [_message(turn, True) for turn in self.said]
        lengths = sorted(len(self.processor.encode_plain(m["content"])) + 8 for m in messages)
        room = self.max_prompt - RESERVE - self._length([], self.longest) - sum(lengths[len(lengths) - recall :])
        most = max(1, room if self.settings.max_memories is None else min(room, self.settings.max_memories))
        options = {"max_memories": most, "recall": recall, "embed": self.embed}
        session = ChatSession(self.model, self.processor, SYSTEM, **options)
        session.remember(*messages)
        return session

    def _near(self, question: str) -> tuple[int, ...]:
        """The places of the turns most like a question."""
        if self.embed is None:
            return self._recalling_session()[0].similar(as_turn(question))  # what `memory_retrieval` compares
        if self._keys is None:
            texts = [searchable(_message(turn, True)) for turn in self.said]
            self._keys = Keys().plus(torch.as_tensor(self.embed(texts)))
        return self._keys.nearest(torch.as_tensor(self.embed([question]))[0], self.settings.top_k)

    def _length(self, shown: Sequence[Said], question: str) -> int:
        return len(self._prepare(_session_starts(shown), [], question)["input_ids"])

    def _first_that_fits(self) -> int:
        """The first turn of the longest end of the conversation that fits into a prompt."""
        low, high = 0, len(self.said)
        while low < high:
            middle = (low + high) // 2
            if self._length(self.said[middle:], self.longest) + RESERVE <= self.max_prompt:
                high = middle
            else:
                low = middle + 1
        return low

    # ------------------------------------------------------------------ answers

    def _prepare(self, messages: list[dict], recalled: list[dict], question: str) -> dict:
        opening = {"role": "system", "content": SYSTEM}
        turn = {"role": "user", "content": as_turn(question)}
        return self.processor.prepare([opening, *messages, turn], history="text", recalled=recalled)

    def _process(self, arm: str, question: str) -> _Asked:
        """Process the prompt of a question."""
        if arm in self._sessions:
            return self._from_memory(self._sessions[arm].fork(), question)
        shown = [self.said[place] for place in self._near(question)] if arm == "retrieval" else self._newest(arm)
        return self._from_text(arm, shown, question)

    def _newest(self, arm: str) -> Sequence[Said]:
        return self.said[self._starts[arm] :]

    def _from_text(self, arm: str, shown: Sequence[Said], question: str) -> _Asked:
        if arm == "retrieval":
            messages, recalled = [], [_message(turn, True) for turn in shown]
            while recalled and len(self._prepare([], recalled, question)["input_ids"]) > self.max_prompt:
                recalled, shown = recalled[:-1], shown[:-1]
        else:
            messages, recalled = _session_starts(shown), []
        ids = self._prepare(messages, recalled, question)["input_ids"]
        known, cache = self._prefixes.get(arm, ([], GrowingCache.of(self.model)))
        reused = shared(known, ids)
        cache = fork(cache, reused)
        logits = first_logits(self.model, torch.tensor([ids], device=self.model.device), cache, {})
        if cache.can_be_cut:
            self._prefixes[arm] = ids, fork(cache, len(ids))
        held = len(ids) * self._bytes_per_position()
        return _Asked(logits, cache, len(ids), reused, held, frozenset(turn.id for turn in shown))

    def _from_memory(self, session: ChatSession, question: str) -> _Asked:
        in_memory = self.said[len(self.said) - session.remembered :]
        held = sum(tensor.nbytes for tensor in session.state.state_dict().values()) + session.vectors.nbytes
        turn = session.prefill(as_turn(question))
        positions = len(turn.ids)
        held += positions * self._bytes_per_position()
        shown = frozenset(said.id for said in (*in_memory, *(self.said[place] for place in turn.recalled)))
        return _Asked(turn.logits, turn.cache, positions, turn.reused_positions, held, shown)

    def _bytes_per_position(self) -> int:
        """Bytes of the keys and values of a position in all layers."""
        text = self.model.config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * width * self.model.dtype.itemsize
