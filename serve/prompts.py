"""
From a conversation to the embeddings of a prompt, at a cost that does not depend on the length of the history.

Everything that is kept between turns is computed in passes of a fixed size at fixed places of the conversation: the
memory encoder reads `MEMORY_BLOCK` tokens at a time, and the language model processes the prompt before the turn in
blocks of `PROMPT_BLOCK` positions. What is left over is computed again at each turn. A conversation that continues, one
that is branched off another, and one that is rebuilt from nothing thus run the same passes and give the same bits.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar, cast

import torch

from ..chat import SOME_TURN, PromptWriter, check_memory_of, dropped_memories
from ..compat_empathic import CACHE
from ..decoding import GrowingCache
from ..memory_empathic import MemoryState
from ..modeling_empathic import audio_position_mask, encode_frames, encode_sound
from .prefix_cache import PrefixCache, digest

MEMORY_BLOCK = 64  # tokens of the memory encoder
PROMPT_BLOCK = 16  # positions of the language model
MOST_OPENINGS = 64


T = TypeVar("T")
# Work in steps, between which other work may be done, and its result.
Steps = Generator[None, None, T]


def all_steps(steps: Steps[T]) -> T:
    """Do all steps at once; return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Utterance(NamedTuple):
    """A message of the history, as the memory reads it."""

    role: str
    name: str | None
    text: str

    @property
    def speaker(self) -> str:
        return self.name or self.role


class History:
    """
    The messages before a turn.

    Attributes:
        digests: `digests[k]` identifies the first k utterances.
    """

    def __init__(self, utterances: Sequence[Utterance] = (), digests: Sequence[bytes] = ()):
        self.utterances = list(utterances)
        self.digests = list(digests) or [digest(b"memory")]
        for role, name, text in self.utterances[len(self.digests) - 1 :]:
            speaker = (name or role).encode("utf-8", "surrogatepass")
            before = b"%s%d " % (self.digests[-1], len(speaker))
            self.digests.append(digest(before + speaker + text.encode("utf-8", "surrogatepass")))

    def __len__(self) -> int:
        return len(self.utterances)

    def plus(self, *said: Utterance) -> "History":
        """Return the history with further utterances."""
        return History([*self.utterances, *said], self.digests)

    def messages(self) -> list[dict]:
        """Return the utterances as messages of a `ChatSession`."""
        return [
            {"role": said.role, "content": said.text, **({"name": said.name} if said.name else {})}
            for said in self.utterances
        ]


class _Heard(NamedTuple):
    """An utterance in the memory: its vectors (vectors, hidden_size), and how to continue after it."""

    vectors: torch.Tensor
    block: bytes  # the digest of the memory encoder's state at the last boundary of a block
    pending: tuple[int, ...]  # tokens since then


@contextmanager
def _filled_up(module: torch.nn.Module, rows: int):
    """Within, a module that gets vectors (n, width) processes `rows` of them: the bits of a matrix product may depend
    on the number of rows."""
    counts: list[int] = []

    def fill(_, inputs):
        counts.append(len(inputs[0]))
        return (torch.nn.functional.pad(inputs[0], (0, 0, 0, rows - len(inputs[0]))),)

    hooks = [
        module.register_forward_pre_hook(fill),
        module.register_forward_hook(lambda _, inputs, output: output[: counts.pop()]),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Prompt:
    """
    A prompt that is ready for generation.

    Attributes:
        ids: the token ids, with placeholders.
        embeddings: (positions, hidden_size), from the position `reused` on.
        reused: the number of positions whose keys and values are already in `cache`.
        blocks: the keys under which blocks of the first positions are kept, those after `reused` included.
        cache: the key-value cache of the first positions; None if the language model's cache cannot be cut.
    """

    ids: list[int]
    embeddings: torch.Tensor
    reused: int = 0
    blocks: list[bytes] = field(default_factory=list)
    cache: GrowingCache | None = None


class FrontEnd:
    """
    The encoders, the memory, and the token embeddings: all before the language model. Not thread-safe.

    Args:
        model: an `EmpathicForConditionalGeneration`.
        processor: its `EmpathicProcessor`.
        cache: keeps what conversations share.
        max_memories: see `ChatSession`.
        keeps_keys: whether the key-value cache is ours to keep.

    Attributes:
        tokens_read: the number of tokens that the memory encoder has read.
        encodes_together: whether clips are encoded in batches. A batch may give a clip other bits. On a CPU, it is
            not faster, and off.
    """

    def __init__(self, model, processor, cache: PrefixCache, max_memories: int | None = None, keeps_keys: bool = True):
        check_memory_of(model, processor)
        self.model, self.processor, self.cache, self.max_memories = model, processor, cache, max_memories
        self.keeps_keys = keeps_keys and GrowingCache.of(model).can_be_cut
        self.tokens_read = 0
        self.encodes_together = model.device.type != "cpu"
        self._writer = PromptWriter(processor, model.config.memory_token_id)
        self._start = model.new_memory_state()
        self._openings: OrderedDict[str | None, list[int]] = OrderedDict()  # prompts by their system prompt

    # ------------------------------------------------------------------ clips

    def encode_clips(self, turns: Sequence[dict]) -> list[dict]:
        """
        Encode the clips of several turns with the frozen towers; with `encodes_together`, one pass for each shape.

        Args:
            turns: for each turn, its clips by kind: (values, mask) as from `processor.frames` and `processor.sound`.

        Returns:
            for each turn, content items by kind with the tower's outputs, for `processor.prepare`.
        """
        found: list[dict] = [{} for _ in turns]
        groups: dict[tuple, list[int]] = {}
        for place, clips in enumerate(turns):
            for kind, (values, _) in clips.items():
                # With `clip`, a pass over sounds depends on the longest one.
                together = self.encodes_together and (kind == "video" or self.model.config.audio_window == "full")
                alone = -1 if together else place
                groups.setdefault((kind, tuple(values.shape), alone), []).append(place)
        for (kind, *_), places in groups.items():
            values = torch.stack([turns[place][kind][0] for place in places]).to(self.model.device)
            masks = torch.stack([turns[place][kind][1] for place in places]).to(self.model.device)
            if kind == "video":
                states = encode_frames(self.model.model.vision_tower, values.flatten(0, 1))
                states = states.unflatten(0, values.shape[:2])
                real = masks.bool()
            else:
                body = self.model.model
                states = encode_sound(body.audio_tower, values, masks, **body.config.sound_options)
                real = audio_position_mask(masks)
            for place, row, kept in zip(places, states, real, strict=True):
                found[place][kind] = {"features": row[: int(kept.sum())]}
        return found

    # ------------------------------------------------------------------ memory

    def hear(self, history: History, first: int) -> Steps[list[torch.Tensor]]:
        """
        Return the memory vectors (vectors, hidden_size) of each utterance from index `first` on; read what was not
        read yet.
        """
        heard = [self.cache.get(("heard", key)) for key in history.digests[first + 1 :]]
        if None not in heard:
            return [found.vectors for found in heard]
        missing = first + heard.index(None)
        start, block, state, pending = self._restart(history, missing)
        vectors = yield from self._read(history, start, block, state, pending)
        return [*(found.vectors for found in heard[: missing - first]), *vectors[missing - start :]]

    def _restart(self, history: History, missing: int) -> tuple[int, bytes, MemoryState, tuple[int, ...]]:
        """Return the last place at or before an utterance where the reading can start again: the number of utterances
        before it, the digest and the memory encoder's state of the last boundary, and the tokens since then."""
        for count in range(missing, 0, -1):
            found = self.cache.get(("heard", history.digests[count]))
            if found is not None:
                state = self._start if found.block == b"" else self.cache.get(("state", found.block))
                if state is not None:
                    return count, found.block, state, found.pending
        return 0, b"", self._start, ()

    def _read(
        self, history: History, start: int, block: bytes, state: MemoryState, pending: tuple[int, ...]
    ) -> Steps[list[torch.Tensor]]:
        """Read the utterances from index `start` on, one block of tokens after the other; return their vectors."""
        mem_token_id = self.processor.mem_token_id
        tokens, ends, counts = list(pending), [], []
        for said in history.utterances[start:]:
            ids = self.processor.encode_utterance(said.speaker, said.text)
            tokens += ids
            ends.append(len(tokens))
            counts.append(ids.count(mem_token_id))
        vectors: list[torch.Tensor] = []
        unfinished: list[torch.Tensor] = []  # vectors of the utterance at the end of a block, which may divide it
        repeated = pending.count(mem_token_id)  # of utterances that were read before
        for cut in range(0, len(tokens), MEMORY_BLOCK):
            ids = tokens[cut : cut + MEMORY_BLOCK]
            after = MemoryState(state.conv, state.ssm)
            padding = [0] * (MEMORY_BLOCK - len(ids))
            with _filled_up(self.model.model.memory.projector, MEMORY_BLOCK):
                new = self.model.append_to_memory(
                    after,
                    torch.tensor([ids + padding], device=self.model.device),
                    torch.tensor([[1] * len(ids) + padding], device=self.model.device),
                ).to(self.model.dtype)
            self.tokens_read += len(ids)
            unfinished += new[repeated:].unbind(0)
            repeated = 0
            is_whole = len(ids) == MEMORY_BLOCK
            behind = digest(block, torch.tensor(ids).numpy().tobytes()) if is_whole else block
            while len(vectors) < len(ends) and ends[len(vectors)] <= cut + len(ids):
                end, count = ends[len(vectors)], counts[len(vectors)]
                at_end = is_whole and end == cut + MEMORY_BLOCK
                rest = () if at_end else tuple(tokens[cut:end])
                found = _Heard(torch.stack(unfinished[:count]), behind if at_end else block, rest)
                del unfinished[:count]
                self.cache.put(("heard", history.digests[start + len(vectors) + 1]), found, [found.vectors])
                vectors.append(found.vectors)
            if is_whole:
                state, block = after, behind
                # A state is large. Of a long history only the last ones are kept: the others are rarely continued.
                if cut + 3 * MEMORY_BLOCK > len(tokens):
                    self.cache.put(("state", block), state, [state.conv, state.ssm])
            yield
        return vectors

    def size(self, history: History) -> tuple[int, int]:
        """Return the length of a history in a prompt: as memory vectors, and as tokens of text."""
        count, tokens = len(history), 0
        while count and (tokens := self.cache.get(("tokens", history.digests[count]))) is None:
            count -= 1
        new = history.messages()[count:]
        tokens = (tokens or 0) + (self._text_tokens(new) if new else 0)
        self.cache.put(("tokens", history.digests[-1]), tokens, [])
        ends = self._ends(history)
        return (ends[-1] if ends else 0) - dropped_memories(ends, self.max_memories), tokens

    def _text_tokens(self, messages: list[dict]) -> int:
        return len(self.processor.prepare([*messages, SOME_TURN], history="text")["input_ids"]) - self._turn_tokens

    @cached_property
    def _turn_tokens(self) -> int:
        return len(self.processor.prepare([SOME_TURN], history="text")["input_ids"])

    # ------------------------------------------------------------------ the prompt

    def prompt(self, system: str | None, history: History, text: str, clips: dict) -> Steps[Prompt]:
        """
        Write the prompt of a turn.

        Args:
            system: replaces the template's system prompt.
            history: the messages before the turn.
            text: the user's text.
            clips: content items by kind, from `encode_clips`.
        """
        ends = self._ends(history)
        dropped = dropped_memories(ends, self.max_memories)
        earlier = history.messages()[bisect_right(ends, dropped) :]
        content = [{"type": kind, **item} for kind, item in clips.items()]
        if text:
            content.append({"type": "text", "text": text})
        count = ends[-1] - dropped if ends else 0
        sample = self._writer.write(system, earlier, {"role": "user", "content": content}, count)
        ids = sample["input_ids"]
        placeholder = self.model.config.memory_token_id
        places = [place for place, token in enumerate(ids) if token == placeholder]
        prompt = Prompt(ids, torch.empty(0))
        if self.keeps_keys:
            limit = places[-1] + 1 if places else self._opening(system, ids)
            self._reuse(prompt, history, ends, places, limit)
        there = sum(place < prompt.reused for place in places)
        vectors = None
        if places[there:]:
            first = bisect_right(ends, dropped + there)
            heard = torch.cat((yield from self.hear(history, first)))
            vectors = heard[len(heard) - len(places[there:]) :]  # without those of `first` that are reused
        prompt.embeddings = self._embed(ids[prompt.reused :], vectors, self.processor.pad([sample]))
        return prompt

    def _ends(self, history: History) -> list[int]:
        """Return the number of memory vectors up to the end of each utterance."""
        pairs = zip(history.utterances, history.digests[1:], strict=True)
        return list(accumulate(self._count(said, key) for said, key in pairs))

    def _count(self, said: Utterance, key: bytes) -> int:
        """Return the number of memory vectors of an utterance, whose digest is `key`."""
        found = self.cache.get(("heard", key)) if self.processor.memory_rate is not None else None
        return self.processor.count_memories(said.speaker, said.text) if found is None else len(found.vectors)

    def _opening(self, system: str | None, ids: list[int]) -> int:
        """Return how many first positions a prompt without history shares with that of any other turn."""
        if system not in self._openings:
            if len(self._openings) >= MOST_OPENINGS:
                self._openings.popitem(last=False)
            self._openings[system] = self._writer.write(system, [], SOME_TURN, 0)["input_ids"]
        self._openings.move_to_end(system)
        pairs = enumerate(zip(ids[:-1], self._openings[system], strict=False))
        return next((place for place, (one, other) in pairs if one != other), 0)

    def _reuse(self, prompt: Prompt, history: History, ends: list[int], places: list[int], limit: int) -> None:
        """Put the kept blocks of keys and values among the first `limit` positions into the cache of a prompt, and name
        the missing ones. `ends` counts the memory vectors up to the end of each utterance."""
        names = [token.to_bytes(16, "little") for token in prompt.ids[:limit]]
        first = ends[-1] - len(places) if ends else 0
        for vector, place in enumerate(places, first):
            utterance = bisect_right(ends, vector)
            names[place] = history.digests[utterance + 1] + (ends[utterance] - vector).to_bytes(4, "little")
        key, found = digest(b"keys", history.digests[bisect_right(ends, first)]), []
        for start in range(0, limit - limit % PROMPT_BLOCK, PROMPT_BLOCK):
            key = digest(key, b"".join(names[start : start + PROMPT_BLOCK]))
            layers = self.cache.get(("keys", key)) if len(found) == len(prompt.blocks) else None
            prompt.blocks.append(key)
            if layers is not None:
                found.append(layers)
        prompt.reused = len(found) * PROMPT_BLOCK
        cache = prompt.cache = GrowingCache.of(self.model)
        for layer in range(len(found[0]) if found else 0):
            keys, values = (torch.cat([block[layer][which] for block in found], dim=-2) for which in (0, 1))
            cache.update(keys, values, layer)

    def _embed(self, ids: list[int], vectors: torch.Tensor | None, inputs) -> torch.Tensor:
        """Return the embeddings (positions, hidden_size) of a prompt from some position on, where the memory has the
        given vectors (vectors, hidden_size)."""
        body, config = self.model.model, self.model.config
        tokens = torch.tensor(ids, device=self.model.device)
        embeddings = self.model.get_input_embeddings()(tokens)
        placed = {config.memory_token_id: vectors}
        for kind, encode in (("video", body.get_video_features), ("audio", body.get_audio_features)):
            if f"{kind}_encoder_states" in inputs:
                mask = "video_mask" if kind == "video" else "audio_encoder_mask"
                given = {name: inputs[name].to(self.model.device) for name in (f"{kind}_encoder_states", mask)}
                placed[getattr(config, f"{kind}_token_id")] = encode(**given).pooler_output.flatten(0, 1)
        for token, values in placed.items():
            if values is not None:
                embeddings[tokens == token] = values.to(embeddings)
        return embeddings


def fill_cache(model, prompt: Prompt, cache: PrefixCache) -> Steps[torch.Tensor]:
    """
    Process the new positions of a prompt with the language model, and keep the blocks among them.

    Returns:
        the logits (1, vocabulary) of the first token.
    """
    if prompt.cache is None:
        prompt.cache = GrowingCache.of(model)
    decoder, done = model.model.language_model, 0
    split, kept = prompt.reused // PROMPT_BLOCK, []
    for _ in prompt.blocks[split:]:
        block = prompt.embeddings[None, done : done + PROMPT_BLOCK]
        decoder(inputs_embeds=block, use_cache=True, **{CACHE: prompt.cache})
        done += PROMPT_BLOCK
        pairs = [(layer.keys, layer.values) for layer in cast(list[Any], prompt.cache.layers)]
        kept.append([[cast(torch.Tensor, tensor)[..., -PROMPT_BLOCK:, :].clone() for tensor in pair] for pair in pairs])
        yield
    # The first block is marked as used last, so that the end of a prompt is evicted before what it builds on.
    for place, key in reversed(list(enumerate(prompt.blocks))):
        if place < split:
            cache.get(("keys", key))
        else:
            layers = kept[place - split]
            cache.put(("keys", key), layers, [tensor for pair in layers for tensor in pair])
    outputs = decoder(inputs_embeds=prompt.embeddings[None, done:], use_cache=True, **{CACHE: prompt.cache})
    return model.lm_head(outputs.last_hidden_state[:, -1])
