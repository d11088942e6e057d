"""A conversation with memory, in which a turn costs what is new in it and not what was said before."""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from queue import SimpleQueue
from threading import Event, Lock, Thread

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation import BaseStreamer, GenerationMode

# Stand for the history and the turn where only the form of a prompt matters.
SOME_HISTORY = {"role": "user", "content": "a"}
MORE_HISTORY = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
SOME_TURN = {"role": "user", "content": "d"}


@dataclass(frozen=True)
class TurnCost:
    """
    What a turn of a `ChatSession` cost.

    Attributes:
        new_positions (`int`): positions of the prompt that the LLM processed.
        reused_positions (`int`): positions taken from the key-value prefix of the turns before.
        memory_vectors (`int`): memory vectors in the prompt.
        history_text_tokens (`int`): what the history would take in the prompt as text, in the LLM's tokens.
        seconds (`float`): the whole turn, from reading the clip to remembering what was said.
        prefill_seconds (`float`): of these, from the call of `generate` to the first token's scores; the encoding of
            the clip is part of it.
    """

    new_positions: int
    reused_positions: int
    memory_vectors: int
    history_text_tokens: int
    seconds: float
    prefill_seconds: float


@dataclass(frozen=True)
class _Prefix:
    """The LLM's keys and values of the first positions of a prompt, which hold no clip."""

    ids: torch.Tensor  # (positions,), on the CPU
    cache: DynamicCache
    dropped: int  # how many utterances are older than the first memory vector in it


@dataclass(frozen=True)
class _Memory:
    """All that a session knows between two turns. It is replaced as a whole: a turn happens, or nothing does."""

    messages: list  # of dict
    state: object  # MemoryState
    vectors: list  # of (hidden_size,) tensors: the newest utterances
    text_tokens: int
    prefix: _Prefix | None

    @property
    def dropped(self) -> int:
        return len(self.messages) - len(self.vectors)


@dataclass
class _Turn:
    """A turn on its way to a reply."""

    text: str
    ids: torch.Tensor  # (positions,), the prompt, on the CPU
    arguments: dict  # of `generate`
    streams: bool  # whether `generate` can hand over its tokens one by one
    cache: DynamicCache | None  # what `generate` writes into, if it is to be kept
    reused: int
    clock: "_Clock"


class ChatSession:
    """
    Keeps a conversation with the model: every utterance is read into the memory once and costs one vector ever after
    (paper's Sec. 3.2).

    Two things are carried from turn to turn. The memory encoder's state takes in a new utterance without the old ones.
    The LLM's keys and values of the prompt's beginning (the system prompt and the memory vectors so far) are kept, and
    grow by the newest vectors when the next turn's prompt is processed, in the same forward pass. They are used for
    greedy decoding and sampling, with an LLM that attends to all positions; with beams, without a cache, or with
    sliding windows a turn processes its whole prompt, for the same reply.

    At `max_memories` the oldest vectors leave the prompt, a quarter of `max_memories` at a time, so that between 3/4 of
    it and all of it are there and the prefix is seldom computed anew. The memory encoder's state has read everything:
    what the oldest utterances said can still shape the later vectors. `messages` keeps every utterance.

    The weights of the model must stay as they are for the life of a session.

    Args:
        model: an `EmpathicForConditionalGeneration`.
        processor: its `EmpathicProcessor`.
        system (`str`, *optional*): replaces the template's system prompt.
        max_memories (`int`, *optional*): how many memory vectors a prompt holds at most; no limit by default.

    Attributes:
        last_turn (`TurnCost` or `None`): what the last completed turn cost.

    Raises:
        ValueError: for a `max_memories` under 1.
    """

    def __init__(self, model, processor, system: str | None = None, max_memories: int | None = None):
        if max_memories is not None and max_memories < 1:
            raise ValueError(f"max_memories is {max_memories}; give a number from 1 up, or None for no limit.")
        self.model, self.processor, self.system, self.max_memories = model, processor, system, max_memories
        self.last_turn: TurnCost | None = None
        self._memory = _Memory([], model.new_memory_state(), [], 0, None)
        self._lock = Lock()

    @property
    def messages(self) -> list[dict]:
        """What was said so far, as `{"role", "content"}` with plain strings, and `"name"` where one was given."""
        return self._memory.messages

    @property
    def state(self):
        """Where the memory encoder stands, a `MemoryState`."""
        return self._memory.state

    @property
    def vectors(self) -> torch.Tensor:
        """The memory vectors `(utterances, hidden_size)` of the newest utterances, at most `max_memories`."""
        return self._stack(self._memory.vectors)

    # ------------------------------------------------------------------ what a user calls

    def reply(self, text: str, audio=None, video=None, **generate_kwargs) -> str:
        """
        Answers one turn and remembers it.

        Args:
            text: what the user says; may be empty beside a clip.
            audio, video: clips: a path, the bytes of a file, or a content item such as
                `{"audio": samples, "sampling_rate": 16000}` or `{"video": frames}`.
            generate_kwargs: of `model.generate`, such as `max_new_tokens` (128 by default) or `streamer`.

        Raises:
            MediaError: for a clip that cannot be read.
            ValueError: for a turn without text and clip.
            RuntimeError: in the middle of another reply of this session.
            After any error, `KeyboardInterrupt` included, the session is as it was.
        """
        with self._alone():
            started = time.perf_counter()
            turn = self._prepare(text, audio, video, generate_kwargs)
            tokens = self._generate(turn)
            reply = self._decode(tokens).strip()
            self._finish(turn, reply, time.perf_counter() - started)
        return reply

    def stream(self, text: str, audio=None, video=None, **generate_kwargs) -> Iterator[str]:
        """
        As `reply`, but gives pieces of the reply as they are written; put together they are the reply.

        The turn is remembered when the iterator is exhausted. If it is closed or dropped before, generation stops at
        the next token and the session is as it was. With beams, whose text is certain only at the end, the reply is one
        piece.
        """
        with self._alone():
            started = time.perf_counter()
            turn = self._prepare(text, audio, video, generate_kwargs)
            given = ""
            if turn.streams:
                writer = _Writer(self, turn)
                try:
                    for piece in writer.pieces():
                        given += piece
                        yield piece
                finally:
                    writer.stop()
                tokens, ended = writer.result()
            else:
                tokens, ended = self._generate(turn), time.perf_counter()
            reply = self._decode(tokens).strip()
            if rest := reply[len(given) :]:
                yield rest
            self._finish(turn, reply, ended - started)

    def remember(self, *messages: dict) -> None:
        """
        Reads utterances that were said elsewhere into the memory, all at once and without a reply.

        Args:
            messages: `{"role": "user" or "assistant", "content": text}`, and `"name"` where the memory is to know the
                speaker by it.

        Raises:
            ValueError: for another message; then none is remembered.
        """
        for message in messages:
            if message.get("role") not in ("user", "assistant") or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"{message!r} cannot be remembered: give the role 'user' or 'assistant' and a string as content."
                )
        kept = [{k: m[k] for k in ("role", "content", "name") if m.get(k) is not None} for m in messages]
        with self._alone():
            self._memory = self._read(kept)

    def fork(self) -> "ChatSession":
        """
        A session that has heard the same: the conversation may go on in two ways, even at once.

        The two share the model, the processor and the tensors of what was said so far (vectors, memory encoder's state,
        key-value prefix), which no turn writes into: a fork costs memory only as it goes on. What either hears from
        here on is its own. In the middle of a reply, the fork is the session as it was before that turn.
        """
        other = copy.copy(self)
        other._lock = Lock()
        return other

    def save(self, path: str) -> None:
        """
        Writes the conversation and its memory to one safetensors file. The key-value prefix is not saved: the first
        turn after `load` computes it anew, from the saved vectors.
        """
        tensors = {"vectors": self.vectors, **{f"state.{k}": v for k, v in self.state.state_dict().items()}}
        fields = {"messages": self.messages, "system": self.system, "max_memories": self.max_memories}
        record = {name: json.dumps(value) for name, value in fields.items()}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=record)

    @classmethod
    def load(cls, path: str, model, processor) -> "ChatSession":
        """
        Takes up a saved conversation, with the model and processor it was held with.

        Raises:
            ValueError: for a conversation held with a model of another width, or with another memory encoder.
        """
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            record = {name: json.loads(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        session = cls(model, processor, system=record["system"], max_memories=record.get("max_memories"))
        vectors, messages = tensors.pop("vectors"), record["messages"]
        if vectors.shape[1] != session.vectors.shape[1]:
            raise ValueError(
                f"{path} holds memory vectors of width {vectors.shape[1]}, but the model's are "
                f"{session.vectors.shape[1]} wide: it was saved with another model."
            )
        session.state.load_state_dict({name.removeprefix("state."): tensor for name, tensor in tensors.items()})
        vectors = list(vectors.to(model.dtype))
        session._memory = _Memory(messages, session.state, vectors, session._text_tokens(messages), None)
        return session

    # ------------------------------------------------------------------ the prompt

    @contextmanager
    def _alone(self):
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("This session is in the middle of a reply: read its stream to the end or close it.")
        try:
            yield
        finally:
            self._lock.release()

    def _stack(self, vectors: list) -> torch.Tensor:
        if vectors:
            return torch.stack(vectors)
        width = self.model.config.text_config.hidden_size
        return torch.zeros(0, width, device=self.model.device, dtype=self.model.dtype)

    def _inputs(self, content: list[dict]) -> dict[str, torch.Tensor]:
        """
        The tensors that the processor gives for the whole conversation, but for `memory_*`. The history is in them as
        placeholders, so it need not be rendered: those of one utterance are repeated.
        """
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        turn = {"role": "user", "content": content}
        count = len(self._memory.vectors)
        if count and self._repeats_placeholders:
            sample = self.processor.prepare([*opening, SOME_HISTORY, turn])
            sample["input_ids"] = self._repeat_placeholder(sample["input_ids"], count)
        else:
            earlier = self._memory.messages[-count:] if count else []
            sample = self.processor.prepare([*opening, *earlier, turn])
        return self.processor.pad([{**sample, "memory_input_ids": []}])

    def _repeat_placeholder(self, ids: list[int], count: int) -> list[int]:
        placeholder = self.model.config.memory_token_id
        place = ids.index(placeholder)
        return [*ids[:place], *[placeholder] * count, *ids[place + 1 :]]

    @cached_property
    def _repeats_placeholders(self) -> bool:
        """Whether the history enters the processor's prompt as a run of placeholders and in no other way, as it does in
        this project's template. With another, the whole history is rendered at every turn."""
        one, two = (self.processor.prepare([*h, SOME_TURN])["input_ids"] for h in ([SOME_HISTORY], MORE_HISTORY))
        return one.count(self.model.config.memory_token_id) == 1 and self._repeat_placeholder(one, 2) == two

    def _text_tokens(self, messages: list[dict]) -> int:
        """How many tokens the utterances take in a prompt that has the history as text."""
        prompt = self.processor.prepare([*messages, SOME_TURN], history="text")
        return len(prompt["input_ids"]) - self._tokens_without_history

    @cached_property
    def _tokens_without_history(self) -> int:
        return len(self.processor.prepare([SOME_TURN], history="text")["input_ids"])

    def _prepare(self, text: str, audio, video, generate_kwargs: dict) -> _Turn:
        content = [_media_item(kind, clip) for kind, clip in (("audio", audio), ("video", video)) if clip is not None]
        if text:
            content.append({"type": "text", "text": text})
        inputs = self._inputs(content)
        ids = inputs["input_ids"][0]
        arguments = dict(generate_kwargs)
        if not arguments.keys() & {"max_length", "generation_config"}:
            arguments.setdefault("max_new_tokens", 128)
        clock = _Clock()
        arguments["logits_processor"] = LogitsProcessorList([*(arguments.get("logits_processor") or ()), clock])

        streams, keeps = _abilities(self.model, generate_kwargs)
        cache, reused = self._take_prefix(ids) if keeps else (None, 0)
        if cache is not None:
            arguments["past_key_values"] = cache
        there = int((ids[:reused] == self.model.config.memory_token_id).sum())
        if new := self._memory.vectors[there:]:
            arguments["memory_embeds"] = self._stack(new)[None]
        arguments |= inputs.to(self.model.device)
        return _Turn(text or "", ids, arguments, streams, cache, reused, clock)

    # ------------------------------------------------------------------ the key-value prefix

    def _take_prefix(self, ids: torch.Tensor) -> tuple[DynamicCache | None, int]:
        """
        A cache of the longest beginning of the prompt that was processed before, and its length. It shares the kept
        tensors but never writes into them: what is kept stays, whatever becomes of the turn.
        """
        prefix = self._memory.prefix
        if prefix is None:
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            # Other layers (sliding windows, linear attention) cannot go back to an earlier position.
            return (cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None), 0
        shared = min(len(prefix.ids), len(ids) - 1)  # at least one position gives the first token's scores
        differs = ids[:shared] != prefix.ids[:shared]
        if prefix.dropped != self._memory.dropped:  # the same placeholders, but of other vectors
            differs |= ids[:shared] == self.model.config.memory_token_id
        shared = _first(differs)
        cache = copy.copy(prefix.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.crop(shared - cache.get_seq_length())
        return cache, shared

    def _keep_prefix(self, turn: _Turn) -> _Prefix | None:
        if turn.cache is None:
            return self._memory.prefix
        config = self.model.config
        length = _first((turn.ids == config.audio_token_id) | (turn.ids == config.video_token_id))
        turn.cache.crop(length - turn.cache.get_seq_length())
        return _Prefix(turn.ids[:length], turn.cache, self._memory.dropped)

    # ------------------------------------------------------------------ generation and memory

    def _generate(self, turn: _Turn, **more) -> torch.Tensor:
        """The new tokens (length,)."""
        turn.clock.start()
        output = self.model.generate(**turn.arguments, **more)
        output = output if isinstance(output, torch.Tensor) else output.sequences
        return output[0, len(turn.ids) :]

    def _decode(self, tokens) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True)

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
        )
        self._memory = memory

    def _read(self, messages: list[dict]) -> _Memory:
        """The memory with some more utterances."""
        if not messages:
            return self._memory
        before, encode = self._memory, self.processor.encode_utterance
        ids = [i for m in messages for i in encode(m.get("name") or m["role"], m["content"])]
        state = before.state.fork()
        new = self.model.append_to_memory(state, torch.tensor([ids], device=self.model.device))
        all_messages = [*before.messages, *messages]
        vectors = [*before.vectors, *new.to(self.model.dtype)]
        if self.max_memories is not None:
            # How many leave depends on the number of utterances alone, not on the turns that brought them.
            block = max(1, self.max_memories // 4)
            leave = -(-max(0, len(all_messages) - self.max_memories) // block) * block
            vectors = vectors[max(0, leave - before.dropped) :]
        return _Memory(all_messages, state, vectors, before.text_tokens + self._text_tokens(messages), before.prefix)


# ---------------------------------------------------------------------- around `generate`


def _abilities(model, generate_kwargs: dict) -> tuple[bool, bool]:
    """Whether `generate` takes a streamer with these arguments, and whether it can go on from a key-value prefix."""
    config = copy.copy(generate_kwargs.get("generation_config") or model.generation_config)
    vars(config).update({key: value for key, value in generate_kwargs.items() if key in vars(config)})
    mode = config.get_generation_mode(generate_kwargs.get("assistant_model"))
    plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    own = generate_kwargs.get("custom_generate") is None and config.num_return_sequences in (None, 1)
    cached = config.use_cache is not False and config.cache_implementation is None
    return plain and own, plain and own and cached and "past_key_values" not in generate_kwargs


class _Clock(LogitsProcessor):
    """Changes no score; notes when the first token's scores are there."""

    def start(self) -> None:
        self.started, self.seconds = time.perf_counter(), None

    def __call__(self, input_ids, scores):
        if self.seconds is None:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.seconds = time.perf_counter() - self.started
        return scores


class _Stopped(Exception):
    """Ends `generate` where its reply is wanted no more."""


class _Writer(BaseStreamer):
    """Runs one `generate` in a thread of its own and hands over its text, as far as later tokens cannot change it."""

    def __init__(self, session: ChatSession, turn: _Turn):
        self.decode = session._decode
        self.other = turn.arguments.pop("streamer", None)
        self.queue, self.stopped = SimpleQueue(), Event()
        self.tokens, self.at_prompt = [], True
        self.start = self.read = 0  # tokens[start:read] were handed over, and are decoded with those that follow
        self.outcome: tuple | BaseException | None = None
        device = session.model.device.type
        # Threads do not inherit these.
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        inference = torch.inference_mode(torch.is_inference_mode_enabled())

        def run():
            try:
                with inference, autocast:
                    self.outcome = session._generate(turn, streamer=self), time.perf_counter()
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
        self.tokens += value.flatten().tolist()
        handed_over, text = self.decode(self.tokens[self.start : self.read]), self.decode(self.tokens[self.start :])
        # A character of several bytes may be complete only with the next token.
        if len(text) > len(handed_over) and not text.endswith("\ufffd"):
            self.start, self.read = self.read, len(self.tokens)
            self.queue.put(text[len(handed_over) :])

    def end(self) -> None:
        if self.other is not None:
            self.other.end()

    def pieces(self) -> Iterator[str]:
        """The text without white space at its ends."""
        self.thread.start()
        begun, space = False, ""
        while (text := self.queue.get()) is not None:
            text = space + text if begun else text.lstrip()
            piece = text.rstrip()
            space = text[len(piece) :]
            if piece:
                begun = True
                yield piece

    def stop(self) -> None:
        """Ends the thread."""
        self.stopped.set()
        if self.thread.ident is not None:
            self.thread.join()

    def result(self) -> tuple[torch.Tensor, float]:
        """The new tokens (length,), and when the last one was there. Raises what `generate` raised."""
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def _first(mask: torch.Tensor) -> int:
    """The index of the first True of a mask (length,), or its length."""
    there = mask.nonzero()
    return int(there[0]) if len(there) else len(mask)


def _media_item(kind: str, clip) -> dict:
    if isinstance(clip, dict):
        return {"type": kind, **clip}
    return {"type": kind, "bytes": clip} if isinstance(clip, bytes) else {"type": kind, "path": str(clip)}
