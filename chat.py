"""A chat session with memory: the cost of a turn depends on its new input, not on the length of the conversation."""

import copy
import json
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer, GenerationMode

from .compat_empathic import CACHE
from .configuration_empathic import MEMORY_SIZE
from .decoding import GrowingCache, can_decode, decode_one, first_logits, fork
from .memory_empathic import MemoryState
from .modeling_empathic import MEDIA_KEYS
from .sampling import plain_decoding
from .thoughts import WrittenDecoder, is_thought_so_far, read_written

KEYS_PER_BLOCK = 256

# A sample history and turn, used where only the structure of a prompt matters.
SOME_HISTORY = {"role": "user", "content": "a"}
MORE_HISTORY = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
SOME_TURN = {"role": "user", "content": "d"}


def dropped_memories(ends: Sequence[int], max_memories: int | None) -> int:
    """
    Return how many of the oldest memory vectors a prompt leaves out: those of whole utterances, at least a quarter of
    `max_memories` at a time. Only the newest utterance is divided, if it alone has more vectors than `max_memories`.
    The number depends only on the utterances, not on how turns grouped them.

    Args:
        ends: for each utterance, the number of vectors up to its end.
        max_memories: the maximum number of vectors in a prompt, or None.
    """
    if max_memories is None or not ends or ends[-1] <= max_memories:
        return 0
    block = max(1, max_memories // 4)
    least = -(-(ends[-1] - max_memories) // block) * block
    last = bisect_left(ends, least)
    return ends[last] if last < len(ends) - 1 else least


def check_memory_of(model, processor) -> None:
    """Raise a ValueError if a model and a processor differ in the number of memory vectors of an utterance."""
    # The code that an older checkpoint brings along knows one vector only.
    plain = dict(zip(MEMORY_SIZE, (1, None), strict=True))
    own, other = ({name: getattr(of, name, plain[name]) for name in plain} for of in (model.config, processor))
    if own != other:
        raise ValueError(f"The model has {own}, but its processor {other}. Load both from the same checkpoint.")


class PromptWriter:
    """
    Writes the prompt of a turn at a cost that does not depend on the length of the history.

    The history enters this project's template as consecutive placeholders only, so it is not rendered: the placeholder
    of one vector is repeated. With other templates, the whole history is rendered at every turn.

    Args:
        processor: an `EmpathicProcessor`.
        placeholder: the token id of the memory placeholder.
    """

    def __init__(self, processor, placeholder: int):
        self.processor, self.placeholder = processor, placeholder

    def write(
        self, system: str | None, earlier: list[dict], turn: dict, vectors: int, recalled: Sequence[dict] = ()
    ) -> dict:
        """
        Return what `processor.prepare` returns for the conversation; `memory_input_ids` may be those of other text.

        Args:
            system: replaces the template's system prompt.
            earlier: the messages that have a memory vector in the prompt.
            turn: the last message, of the user.
            vectors: the number of the newest memory vectors of these messages to use.
            recalled: the messages to show as text too.
        """
        opening = [] if system is None else [{"role": "system", "content": system}]
        more = {"recalled": recalled} if recalled else {}
        if earlier and self._repeats_placeholders:
            sample = self.processor.prepare([*opening, SOME_HISTORY, turn], **more)
            return {**sample, "input_ids": self._repeat(sample["input_ids"], vectors)}
        sample = self.processor.prepare([*opening, *earlier, turn], **more)
        ids = list(sample["input_ids"])
        for _ in range(ids.count(self.placeholder) - vectors):  # the oldest vectors of an utterance over the limit
            ids.remove(self.placeholder)
        return {**sample, "input_ids": ids}

    def _repeat(self, ids: list[int], count: int) -> list[int]:
        """Replace the placeholders, which are consecutive, by `count` of them."""
        place, there = ids.index(self.placeholder), ids.count(self.placeholder)
        return [*ids[:place], *[self.placeholder] * count, *ids[place + there :]]

    @cached_property
    def _repeats_placeholders(self) -> bool:
        one, two = (self.processor.prepare([*h, SOME_TURN])["input_ids"] for h in ([SOME_HISTORY], MORE_HISTORY))
        counts = [ids.count(self.placeholder) for ids in (one, two)]
        return counts[0] > 0 and all(
            self._repeat(one, count) == ids for count, ids in zip(counts, (one, two), strict=True)
        )


class ReplyText:
    """
    Turns the tokens of a reply into pieces of text while they are generated. A piece is emitted once later tokens can
    no longer change it. The pieces have no whitespace at the beginning and the end of the reply, and no thought before.

    Args:
        decode: decodes the tokens.
    """

    def __init__(self, decode: WrittenDecoder):
        self._decode = decode
        self.tokens: list[int] = []
        self._start = self._read = 0  # tokens[start:read] are emitted, and are decoded together with the next tokens
        self._begun, self._space, self._held, self._text = False, "", "", ""
        self.given = ""

    def add(self, tokens: list[int]) -> str:
        """Add tokens; return the next piece, which may be empty."""
        self.tokens += tokens
        handed_over = self._decode.text(self.tokens[self._start : self._read])
        text = self._decode.text(self.tokens[self._start :])
        # A multi-byte character may be complete only with the next token.
        if len(text) <= len(handed_over) or text.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self.tokens)
        return self.add_text(text[len(handed_over) :])

    def add_text(self, text: str) -> str:
        """Add text that later tokens do not change; return the next piece, which may be empty."""
        self._text += text
        if not self._begun:
            self._held += text
            if is_thought_so_far(self._held):
                return ""
            text = read_written(self._held).reply + self._held[len(self._held.rstrip()) :]
        text = self._space + text if self._begun else text.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self._begun = self._begun or bool(piece)
        self.given += piece
        return piece

    def end(self) -> str:
        """Return the whole reply, which begins with the pieces."""
        text = self._decode.text(self.tokens) if self.tokens else self._text
        reply = read_written(text).reply
        if not reply.startswith(self.given):  # what was shown as the reply turned out to be a thought
            text = text.strip()
            reply = text if text.startswith(self.given) else self.given
        return reply


@dataclass(frozen=True)
class TurnCost:
    """
    The cost of a turn of a `ChatSession`.

    Attributes:
        new_positions (`int`): prompt positions that the LLM processed.
        reused_positions (`int`): prompt positions reused from the cached prefix of earlier turns.
        memory_vectors (`int`): memory vectors in the prompt.
        history_text_tokens (`int`): LLM tokens that the history would need in the prompt as text.
        seconds (`float`): time of the whole turn, from reading the clip to adding the utterances to the memory.
        prefill_seconds (`float`): the part of `seconds` from the call of `generate` to the first token's logits,
            including the encoding of the clip.
        recalled (`tuple[int, ...]`): the places in `messages` of the earlier utterances that the prompt had as text.
    """

    new_positions: int
    reused_positions: int
    memory_vectors: int
    history_text_tokens: int
    seconds: float
    prefill_seconds: float
    recalled: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prefilled:
    """
    The processed prompt of a turn, from `ChatSession.prefill`.

    Attributes:
        ids: the prompt (positions,), on the CPU.
        cache: its keys and values; the session does not use it.
        logits: the logits (1, vocabulary) of the first token of a reply.
        reused_positions: the first positions, which an earlier turn or `warm_up` had processed.
        recalled: places in `messages` of the utterances that the prompt has as text.
    """

    ids: torch.Tensor
    cache: GrowingCache
    logits: torch.Tensor
    reused_positions: int
    recalled: tuple[int, ...]


@dataclass(frozen=True)
class _Prefix:
    """The LLM's key-value cache of the first positions of a prompt, up to the first clip."""

    ids: torch.Tensor  # (positions,), on the CPU
    cache: GrowingCache
    dropped: int  # number of memory vectors older than the first one in the prefix


@dataclass(frozen=True)
class _Memory:
    """All data of a session between two turns. It is replaced as a whole, so that a failed turn changes nothing."""

    messages: list  # of dict
    state: MemoryState
    ends: list[int]  # for each message, the number of memory vectors up to its end
    vectors: list  # of (hidden_size,) tensors: the newest memory vectors
    text_tokens: int
    prefix: _Prefix | None
    keys: "Keys"

    @property
    def dropped(self) -> int:
        return self.ends[-1] - len(self.vectors) if self.ends else 0


@dataclass
class _Turn:
    """A turn that is ready for generation."""

    text: str
    ids: torch.Tensor  # (positions,), the prompt, on the CPU
    arguments: dict  # of `generate`
    streams: bool  # whether `generate` supports a streamer with these arguments
    is_simple: bool  # whether `decode_one` generates the reply
    cache: GrowingCache | None  # the cache that `generate` fills, if it is kept after the turn
    reused: int
    clock: "_Clock"
    recalled: tuple[int, ...]


class Keys:
    """
    A vector for each utterance of a conversation, by which the utterances that are like a new one are found. Immutable:
    a longer one shares the blocks of a shorter one.

    Args:
        blocks: tensors (n, width), all but the last of `KEYS_PER_BLOCK` rows.
        centered: whether similarity is measured from the mean of all keys. Memory vectors have much in common, which
            says nothing.
    """

    def __init__(self, blocks: Sequence[torch.Tensor] = (), centered: bool = False):
        self.blocks, self.centered = tuple(blocks), centered

    def plus(self, new: torch.Tensor) -> "Keys":
        """Return the keys with those of further utterances (n, width)."""
        if not len(new):
            return self
        full = [block for block in self.blocks if len(block) == KEYS_PER_BLOCK]
        rest = torch.cat([*self.blocks[len(full) :], new.float()])
        return Keys([*full, *rest.split(KEYS_PER_BLOCK)], self.centered)

    def tensor(self) -> torch.Tensor:
        """Return all keys (utterances, width)."""
        return torch.cat(self.blocks) if self.blocks else torch.zeros(0, 0)

    def nearest(self, query: torch.Tensor, count: int) -> tuple[int, ...]:
        """Return the places of the utterances whose keys have the largest cosine with a query (width,), in order."""
        if not self.blocks:
            return ()
        known = sum(map(len, self.blocks))
        mean = sum(block.sum(0) for block in self.blocks) / known if self.centered else torch.zeros_like(query)
        near = torch.cat([torch.cosine_similarity(block - mean, query.float() - mean, dim=-1) for block in self.blocks])
        return tuple(sorted(near.topk(min(count, known)).indices.tolist()))


def searchable(message: dict) -> str:
    """Return the text of an utterance for `embed`: with the speaker's name, as questions ask for what somebody said."""
    return f"{message['name']}: {message['content']}" if message.get("name") else message["content"]


class ChatSession:
    """
    A conversation with the model. Every utterance is read into the memory once; after that, it costs one vector
    (paper's Sec. 3.2), or as many as the processor's `memory_tokens` and `memory_rate` say.

    Two states are carried from turn to turn. The memory encoder's state reads a new utterance without rereading the old
    utterances. The LLM's key-value cache of the prompt's prefix (the system prompt and the memory vectors so far) is
    kept, and the newest vectors are added to it in the forward pass of the next turn's prompt. The prefix is used for
    greedy decoding and sampling with an LLM that attends to all positions. With beam search, without a cache, or with
    sliding windows, each turn processes its whole prompt, with the same reply.

    At `max_memories` the oldest vectors leave the prompt, a quarter of `max_memories` at a time, so that the prompt
    keeps about 3/4 of `max_memories` or more of them, and the prefix is rarely recomputed. The memory encoder's state
    has read all utterances, so the oldest utterances can still influence later vectors. `messages` keeps every
    utterance.

    The model's weights must not change during a session.

    Args:
        model: an `EmpathicForConditionalGeneration`.
        processor: its `EmpathicProcessor`.
        system (`str`, *optional*): replaces the template's system prompt.
        max_memories (`int`, *optional*): the maximum number of memory vectors in a prompt; no limit by default.
        recall (`int`): number of earlier utterances that a prompt also has as text: those most like the turn's text,
            however old they are. 0 by default. A turn then processes these utterances too, at a cost that does not
            depend on the length of the conversation.
        embed (`Callable`, *optional*): with `recall`, a function of a list of texts that returns a vector for each
            (n, width), a tensor or an array, such as `SentenceTransformer(...).encode`. Utterances are given with the
            name of their speaker, if there is one. By default, utterances are compared by their memory vectors.

    The thought that a reasoning model writes before its reply is neither a part of the reply nor of the memory.

    Attributes:
        last_turn (`TurnCost` or `None`): the cost of the last completed turn.

    Raises:
        ValueError: for a `max_memories` under 1, a `recall` under 0, or a processor whose memory has another size than
            the model's.
    """

    def __init__(
        self,
        model,
        processor,
        system: str | None = None,
        max_memories: int | None = None,
        recall: int = 0,
        embed: Callable[[list[str]], Any] | None = None,
    ):
        if max_memories is not None and max_memories < 1:
            raise ValueError(f"max_memories is {max_memories}; give a number from 1 up, or None for no limit.")
        if recall < 0:
            raise ValueError(f"recall is {recall}; give a number from 0 up.")
        check_memory_of(model, processor)
        self.model, self.processor, self.system, self.max_memories = model, processor, system, max_memories
        self.recall, self.embed = recall, embed
        self.last_turn: TurnCost | None = None
        self._memory = _Memory([], model.new_memory_state(), [], [], 0, None, Keys(centered=embed is None))
        self._lock = Lock()

    @property
    def messages(self) -> list[dict]:
        """The utterances so far, as `{"role", "content"}` with plain strings, and `"name"` if it was given."""
        return self._memory.messages

    @property
    def state(self) -> MemoryState:
        """The memory encoder's state, a `MemoryState`."""
        return self._memory.state

    @property
    def vectors(self) -> torch.Tensor:
        """The memory vectors `(vectors, hidden_size)` of the newest utterances, at most `max_memories`."""
        return self._stack(self._memory.vectors)

    @property
    def remembered(self) -> int:
        """The number of the newest utterances of which a prompt has memory vectors."""
        return len(self.messages) - bisect_right(self._memory.ends, self._memory.dropped)

    # ------------------------------------------------------------------ public methods

    def reply(self, text: str, audio=None, video=None, **generate_kwargs) -> str:
        """
        Answer one turn and add it to the memory.

        Args:
            text: the user's text; may be empty if there is a clip.
            audio, video: clips: a path, the bytes of a file, or a content item such as
                `{"audio": samples, "sampling_rate": 16000}` or `{"video": frames}`.
            generate_kwargs: arguments of `model.generate`, such as `max_new_tokens` (128 by default) or `streamer`.
                With `do_sample=False`, the most likely token is taken at each step: the penalties of the model's own
                generation config are not used, unless they are given here. Without `do_sample`, the generation config
                decides.

        Raises:
            MediaError: for a clip that cannot be read.
            ValueError: for a turn without text and clips.
            RuntimeError: if this session is in the middle of another reply.
            Any error, including `KeyboardInterrupt`, leaves the session unchanged.
        """
        with self._alone():
            started = time.perf_counter()
            turn = self._prepare(text, audio, video, generate_kwargs)
            tokens = self._generate(turn)
            reply = self._decode(tokens.tolist()).reply
            self._finish(turn, reply, time.perf_counter() - started)
        return reply

    def stream(self, text: str, audio=None, video=None, **generate_kwargs) -> Iterator[str]:
        """
        Like `reply`, but yields pieces of the reply while it is generated; joined together they are the reply.

        The turn is added to the memory when the iterator is exhausted. If the iterator is closed or dropped earlier,
        generation stops at the next token and the session is unchanged. With beam search, whose text is known only at
        the end, the reply is one piece.
        """
        with self._alone():
            started = time.perf_counter()
            turn = self._prepare(text, audio, video, generate_kwargs)
            if turn.streams:
                writer = _Writer(self, turn)
                try:
                    yield from writer.pieces()
                finally:
                    writer.stop()
                ended = writer.result()
                reply = writer.text.end()
                if rest := reply[len(writer.text.given) :]:
                    yield rest
            else:
                tokens, ended = self._generate(turn), time.perf_counter()
                reply = self._decode(tokens.tolist()).reply
                if reply:
                    yield reply
            self._finish(turn, reply, ended - started)

    def remember(self, *messages: dict) -> None:
        """
        Read utterances from outside this session into the memory, all at once and without a reply.

        Args:
            messages: `{"role": "user" or "assistant", "content": text}`, and optionally the speaker's `"name"` to use
                in the memory instead of the role.

        Raises:
            ValueError: for a message of another form; then none of the messages is remembered.
        """
        for message in messages:
            if message.get("role") not in ("user", "assistant") or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"{message!r} cannot be remembered: give the role 'user' or 'assistant' and a string as content."
                )
        kept = [{k: m[k] for k in ("role", "content", "name") if m.get(k) is not None} for m in messages]
        with self._alone():
            self._memory = self._read(kept)

    def warm_up(self) -> None:
        """
        Process the prompt up to the next turn now, so that this turn's first token comes sooner: after `remember` or
        `load`, say. Nothing else changes.
        """
        with self._alone():
            turn = self._prepare(SOME_TURN["content"], None, None, {"do_sample": False, "max_new_tokens": 1})
            self._generate(turn)
            self._memory = replace(self._memory, prefix=self._keep_prefix(turn))

    @torch.inference_mode()
    def prefill(self, text: str) -> Prefilled:
        """
        Process the prompt of a turn and nothing more, so that the replies of several sessions can be decoded together
        (`empathic.serve.rows`). The session does not change.
        """
        with self._alone():
            turn = self._prepare(text, None, None, {"do_sample": False})
        cache = turn.cache or GrowingCache.of(self.model)
        media = {name: value for name, value in turn.arguments.items() if name in MEDIA_KEYS}
        logits = first_logits(self.model, turn.arguments["input_ids"], cache, media)
        return Prefilled(turn.ids, cache, logits, turn.reused, turn.recalled)

    def similar(self, text: str) -> tuple[int, ...]:
        """Return the places in `messages` of the `recall` utterances that are most like a text, in order."""
        memory = self._memory
        if not self.recall or not text or not memory.messages:
            return ()
        if self.embed is not None:
            query = self._embed([text])[0]
        else:  # the vector that the turn would have in the memory
            ids = torch.tensor([self.processor.encode_utterance("user", text)], device=self.model.device)
            query = self.model.append_to_memory(memory.state.fork(), ids).float().mean(0)
        return memory.keys.nearest(query, self.recall)

    def fork(self) -> "ChatSession":
        """
        Return a copy of the session, so that the conversation can continue in two ways, even at the same time.

        Both sessions share the model, the processor and the tensors so far (memory vectors, memory encoder's state,
        cached prefix), which no turn writes into, so a fork needs more memory only for its later turns. Later turns of
        one session do not affect the other. A fork in the middle of a reply has the session's state before that turn.
        """
        other = copy.copy(self)
        other._lock = Lock()
        return other

    def save(self, path: str) -> None:
        """
        Save the conversation and its memory to one safetensors file. The cached prefix is not saved: the first turn
        after `load` recomputes it from the saved vectors. A file of this name is replaced once the new one is complete.

        Raises:
            OSError: if the file cannot be written; the message names it.
        """
        tensors = {"vectors": self.vectors, **{f"state.{k}": v for k, v in self.state.state_dict().items()}}
        fields = {"messages": self.messages, "system": self.system, "max_memories": self.max_memories}
        fields |= {"ends": self._memory.ends, "recall": self.recall}
        if self.embed is None:
            tensors["keys"] = self._memory.keys.tensor()
        record = {name: json.dumps(value) for name, value in fields.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if not os.fspath(path) or os.path.isdir(path):
            raise IsADirectoryError(f"{os.fspath(path)!r} is no name of a file. Give the file to write.")
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"There is no folder {folder}. Create it, or give another file.")
        partial = f"{os.fspath(path)}.{os.getpid()}.part"
        try:
            save_file(tensors, partial, metadata=record)
            os.replace(partial, path)
        except SafetensorError as error:  # how safetensors raises an error of the system
            raise OSError(f"{path} cannot be written ({error}). Give another file.") from error
        finally:
            with suppress(OSError):
                os.remove(partial)

    @classmethod
    def load(cls, path: str, model, processor, embed: Callable[[list[str]], Any] | None = None) -> "ChatSession":
        """
        Load a saved conversation, to continue it with the model and processor that it was saved with, and with the
        `embed` if it has one, which is not saved.

        Raises:
            OSError: if the file cannot be read.
            ValueError: for a file that is no conversation, a conversation with a model of another width, or with
                another memory encoder.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no file {os.fspath(path)!r}. Give a file that was saved.")
        try:
            with safe_open(path, framework="pt", device=str(model.device)) as file:
                record = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            record["messages"], record["system"], tensors["vectors"]
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is no saved conversation. Give a file that was saved.") from error
        options = {name: record[name] for name in ("system", "max_memories", "recall") if name in record}
        session = cls(model, processor, embed=embed, **options)
        keys = Keys(centered=embed is None)
        if session.recall:
            saved = tensors.get("keys")
            if embed is not None:
                saved = session._embed([searchable(m) for m in record["messages"]])
            elif saved is None:
                raise ValueError(f"{path} was saved by a session with `embed`. Give the same function as `embed`.")
            keys = keys.plus(saved)
        tensors.pop("keys", None)
        vectors, messages = tensors.pop("vectors"), record["messages"]
        if vectors.shape[1] != session.vectors.shape[1]:
            raise ValueError(
                f"{path} has memory vectors of width {vectors.shape[1]}, but the model's width is "
                f"{session.vectors.shape[1]}. Load it with the model that it was saved with."
            )
        session.state.load_state_dict({name.removeprefix("state."): tensor for name, tensor in tensors.items()})
        ends = record.get("ends", list(range(1, len(messages) + 1)))  # files before there could be several vectors
        vectors = list(vectors.to(model.dtype))
        session._memory = _Memory(messages, session.state, ends, vectors, session._text_tokens(messages), None, keys)
        return session

    # ------------------------------------------------------------------ the prompt

    @contextmanager
    def _alone(self):
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("This session is in the middle of a reply. Read its stream to the end or close it.")
        try:
            yield
        finally:
            self._lock.release()

    def _stack(self, vectors: list) -> torch.Tensor:
        if vectors:
            return torch.stack(vectors)
        width = self.model.config.text_config.hidden_size
        return torch.zeros(0, width, device=self.model.device, dtype=self.model.dtype)

    @cached_property
    def _prompts(self) -> "PromptWriter":
        return PromptWriter(self.processor, self.model.config.memory_token_id)

    def _embed(self, texts: list[str]) -> torch.Tensor:
        """Return the vectors (n, width) of texts from `embed`."""
        assert self.embed is not None
        return torch.as_tensor(self.embed(texts)).reshape(len(texts), -1) if texts else torch.zeros(0, 0)

    def _inputs(self, content: list[dict], recalled: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Return the processor's tensors for the whole conversation, without `memory_*`."""
        memory = self._memory
        earlier = memory.messages[len(memory.messages) - self.remembered :]
        turn = {"role": "user", "content": content}
        shown = [memory.messages[place] for place in recalled]
        sample = self._prompts.write(self.system, earlier, turn, len(memory.vectors), shown)
        return self.processor.pad([{**sample, "memory_input_ids": []}])

    def _text_tokens(self, messages: list[dict]) -> int:
        """Return the number of tokens of the utterances in a prompt with the history as text."""
        prompt = self.processor.prepare([*messages, SOME_TURN], history="text")
        return len(prompt["input_ids"]) - self._tokens_without_history

    @cached_property
    def _tokens_without_history(self) -> int:
        return len(self.processor.prepare([SOME_TURN], history="text")["input_ids"])

    def _prepare(self, text: str, audio, video, generate_kwargs: dict) -> _Turn:
        content = [_media_item(kind, clip) for kind, clip in (("audio", audio), ("video", video)) if clip is not None]
        if text:
            content.append({"type": "text", "text": text})
        recalled = self.similar(text)
        inputs = self._inputs(content, recalled)
        ids = inputs["input_ids"][0]
        if generate_kwargs.get("do_sample") is False and "generation_config" not in generate_kwargs:
            generate_kwargs = plain_decoding(**generate_kwargs)
        arguments = dict(generate_kwargs)
        if not arguments.keys() & {"max_length", "generation_config"}:
            arguments.setdefault("max_new_tokens", 128)
        clock = _Clock()
        arguments["logits_processor"] = LogitsProcessorList([*(arguments.get("logits_processor") or ()), clock])

        streams, keeps, is_simple = _abilities(self.model, generate_kwargs)
        cache, reused = self._take_prefix(ids) if keeps else (None, 0)
        if cache is not None:
            arguments[CACHE] = cache
        there = int((ids[:reused] == self.model.config.memory_token_id).sum())
        if new := self._memory.vectors[there:]:
            arguments["memory_vectors"] = self._stack(new)[None]
        arguments |= inputs.to(self.model.device)
        is_simple = is_simple and cache is not None
        return _Turn(text or "", ids, arguments, streams, is_simple, cache, reused, clock, recalled)

    # ------------------------------------------------------------------ the key-value prefix

    def _take_prefix(self, ids: torch.Tensor) -> tuple[GrowingCache | None, int]:
        """
        Return a cache of the longest prefix of the prompt that was processed before, and its length. The cache shares
        the kept tensors but never writes into them, so the kept prefix stays valid even if the turn fails.
        """
        prefix = self._memory.prefix
        if prefix is None:
            cache = GrowingCache.of(self.model)
            return (cache if cache.can_be_cut else None), 0
        shared = min(len(prefix.ids), len(ids) - 1)  # at least one position gives the first token's scores
        differs = ids[:shared] != prefix.ids[:shared]
        if prefix.dropped != self._memory.dropped:  # the placeholders are equal, but belong to other vectors
            differs |= ids[:shared] == self.model.config.memory_token_id
        shared = _first(differs)
        return fork(prefix.cache, shared), shared

    def _keep_prefix(self, turn: _Turn) -> _Prefix | None:
        if turn.cache is None:
            return self._memory.prefix
        config = self.model.config
        length = _first((turn.ids == config.audio_token_id) | (turn.ids == config.video_token_id))
        return _Prefix(turn.ids[:length], fork(turn.cache, length), self._memory.dropped)

    # ------------------------------------------------------------------ generation and memory

    def _generate(self, turn: _Turn, **more) -> torch.Tensor:
        """Generate the reply and return its new tokens (length,)."""
        turn.clock.start()
        arguments = {**turn.arguments, **more}
        if turn.is_simple:
            arguments["custom_generate"] = partial(decode_one, streamer=arguments.get("streamer"))
        output = self.model.generate(**arguments)
        output = output if isinstance(output, torch.Tensor) else output.sequences
        return output[0, len(turn.ids) :]

    @cached_property
    def _decode(self) -> WrittenDecoder:
        return WrittenDecoder(self.processor.tokenizer)

    def _finish(self, turn: _Turn, reply: str, seconds: float) -> None:
        started, before = time.perf_counter(), self._memory
        said = [{"role": "user", "content": turn.text}, {"role": "assistant", "content": reply}]
        memory = replace(self._read(said), prefix=self._keep_prefix(turn))
        self.last_turn = TurnCost(
            new_positions=len(turn.ids) - turn.reused,
            reused_positions=turn.reused,
            memory_vectors=len(before.vectors),
            history_text_tokens=before.text_tokens,
            seconds=seconds + time.perf_counter() - started,
            prefill_seconds=turn.clock.seconds,
            recalled=turn.recalled,
        )
        self._memory = memory

    def _read(self, messages: list[dict]) -> _Memory:
        """Return the memory after reading more utterances."""
        if not messages:
            return self._memory
        before, encode = self._memory, self.processor.encode_utterance
        rows = [encode(m.get("name") or m["role"], m["content"]) for m in messages]
        ids = [i for row in rows for i in row]
        state = before.state.fork()
        new = self.model.append_to_memory(state, torch.tensor([ids], device=self.model.device))
        counts = [row.count(self.processor.mem_token_id) for row in rows]
        start = before.ends[-1] if before.ends else 0
        ends = [*before.ends, *(start + count for count in accumulate(counts))]
        keys = before.keys
        if self.recall and self.embed is not None:
            keys = keys.plus(self._embed([searchable(m) for m in messages]))
        elif self.recall:
            keys = keys.plus(torch.stack([part.float().mean(0) for part in new.split(counts)]))
        vectors = [*before.vectors, *new.to(self.model.dtype)]
        vectors = vectors[max(0, dropped_memories(ends, self.max_memories) - before.dropped) :]
        tokens = before.text_tokens + self._text_tokens(messages)
        return _Memory([*before.messages, *messages], state, ends, vectors, tokens, before.prefix, keys)


# ---------------------------------------------------------------------- helpers for `generate`


def _abilities(model, generate_kwargs: dict) -> tuple[bool, bool, bool]:
    """
    Whether `generate` supports a streamer with these arguments, whether it can start from a cached prefix, and whether
    `decode_one` can then take its place.
    """
    config = copy.copy(generate_kwargs.get("generation_config") or model.generation_config)
    vars(config).update({key: value for key, value in generate_kwargs.items() if key in vars(config)})
    mode = config.get_generation_mode(generate_kwargs.get("assistant_model"))
    plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    own = generate_kwargs.get("custom_generate") is None and config.num_return_sequences in (None, 1)
    cached = config.use_cache is not False and config.cache_implementation is None
    keeps = plain and own and cached and not generate_kwargs.keys() & {"cache", "past_key_values"}
    return plain and own, keeps, can_decode(config) and not generate_kwargs.get("synced_gpus")


class _Clock(LogitsProcessor):
    """Record when the first token's logits are ready; the logits do not change."""

    def start(self) -> None:
        self.started, self.seconds = time.perf_counter(), None

    def __call__(self, input_ids, scores):
        if self.seconds is None:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.seconds = time.perf_counter() - self.started
        return scores


class _Stopped(Exception):
    """Raised inside `generate` to stop it when the reply is no longer needed."""


class _Writer(BaseStreamer):
    """Run one `generate` call in a separate thread and emit its text once later tokens can no longer change it."""

    def __init__(self, session: ChatSession, turn: _Turn):
        self.text = ReplyText(session._decode)
        self.other = turn.arguments.pop("streamer", None)
        self.queue, self.stopped = SimpleQueue(), Event()
        self.at_prompt = True
        self.outcome: float | BaseException | None = None
        device = session.model.device.type
        # A new thread does not inherit the autocast and inference modes.
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        inference = torch.inference_mode(torch.is_inference_mode_enabled())

        def run():
            try:
                with inference, autocast:
                    session._generate(turn, streamer=self)
                self.outcome = time.perf_counter()
            except BaseException as error:
                self.outcome = error
            finally:
                self.queue.put(None)

        self.thread = Thread(target=run, name="reply")

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: the prompt (1, length), then each token (1,)."""
        if self.stopped.is_set():
            raise _Stopped
        if self.other is not None:
            self.other.put(value)
        if self.at_prompt:
            self.at_prompt = False
            return
        if piece := self.text.add(value.flatten().tolist()):
            self.queue.put(piece)

    def end(self) -> None:
        if self.other is not None:
            self.other.end()

    def pieces(self) -> Iterator[str]:
        """Yield the pieces of the reply."""
        self.thread.start()
        while (piece := self.queue.get()) is not None:
            yield piece

    def stop(self) -> None:
        """Stop the generation and wait for the thread."""
        self.stopped.set()
        if self.thread.ident is not None:
            self.thread.join()

    def result(self) -> float:
        """Return the time when the last token was ready. Raises errors of `generate`."""
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


def _first(mask: torch.Tensor) -> int:
    """Return the index of the first True in a mask (length,), or its length if there is none."""
    there = mask.nonzero()
    return int(there[0]) if len(there) else len(mask)


def _media_item(kind: str, clip) -> dict:
    if isinstance(clip, dict):
        return {"type": kind, **clip}
    return {"type": kind, "bytes": clip} if isinstance(clip, bytes) else {"type": kind, "path": str(clip)}
