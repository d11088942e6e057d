"""Token after token for one conversation, without the work that `generate` and its cache repeat for each token."""

from __future__ import annotations

import copy
from threading import Lock
from typing import TypeVar

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .compat_empathic import CACHE
from .modeling_empathic import MEDIA_KEYS

Cache = TypeVar("Cache", bound=DynamicCache)
SPARE = 8  # a full buffer grows by one eighth of its length,
STEP = 32  # and to a multiple of this: each head then begins at an aligned address, so that kernels give the same bits
_reserving = Lock()


class _Buffer:
    """The keys and values of a layer, with room for more positions. Layers that share it write each position once."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        room = (length + length // SPARE) // STEP * STEP + STEP
        self.tensors = [one.new_empty(*one.shape[:-2], room, one.shape[-1]) for one in (keys, values)]
        self.written = length

    def reserve(self, start: int, end: int) -> bool:
        """Reserve the positions from `start` to `end`, unless another layer has them or there is no room."""
        keys = self.tensors[0]
        if end > keys.shape[-2] or (keys.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        with _reserving:
            is_free = self.written == start
            if is_free:
                self.written = end
        return is_free


class _GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new positions into spare room, where a `DynamicLayer` copies all positions."""

    def __init__(self):
        super().__init__()
        self.buffer: _Buffer | None = None
        self.views: tuple = (None, None)  # of the buffer, as long as nothing else has replaced `keys` and `values`

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if torch.is_grad_enabled():  # the buffer cannot be written into
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.keys is not self.views[0] or self.buffer is None or not self.buffer.reserve(start, end):
            self.buffer = _Buffer(key_states, value_states, end)
            if start:
                for whole, part in zip(self.buffer.tensors, (self.keys, self.values), strict=True):
                    whole[..., :start, :] = part
        for whole, part in zip(self.buffer.tensors, (key_states, value_states), strict=True):
            whole[..., start:end, :] = part
        self.keys, self.values = self.views = tuple(whole[..., :end, :] for whole in self.buffer.tensors)
        return self.keys, self.values


class GrowingCache(DynamicCache):
    """
    A key-value cache of a conversation that takes a new position without a copy of all earlier ones.

    The language model sees the keys and values of a `DynamicCache`. Up to an eighth, and 32 positions, are
    spare room.

    Args:
        config: config of the language model. Layers that are not plain (sliding windows, linear attention) stay as
            `DynamicCache` makes them.
    """

    def __init__(self, config):
        super().__init__(config=config)
        self.can_be_cut = all(type(layer) is DynamicLayer for layer in self.layers)
        self.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    @classmethod
    def of(cls, model) -> GrowingCache:
        """An empty cache for a model's language model."""
        return cls(model.config.get_text_config(decoder=True))


def fork(cache: Cache, length: int) -> Cache:
    """
    Return a cache of the first positions. Both share their tensors, and neither changes what the other has.

    Only for a cache of plain layers: sliding windows and linear attention cannot go back to an earlier position.
    """
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    if (more := cache.get_seq_length() - length) > 0:
        forked.crop(-more)
    return forked


def can_decode(config: GenerationConfig) -> bool:
    """Whether `decode_one` does all that this generation config of greedy decoding or sampling asks for."""
    # With a function as `custom_generate`, `generate` does not find the tokenizer that stop strings need.
    return not (config.return_dict_in_generate or config.prefill_chunk_size or config.stop_strings)


def next_logits(model, token: torch.LongTensor, cache) -> torch.Tensor:
    """Process a token (1, 1) after those in the cache, and return the logits (1, vocabulary) of the next one."""
    states = model.get_decoder()(inputs_embeds=model.get_input_embeddings()(token), use_cache=True, **{CACHE: cache})
    return model.lm_head(states.last_hidden_state[:, -1])


def first_logits(model, input_ids: torch.LongTensor, cache, media: dict) -> torch.Tensor:
    """
    Process the positions of a prompt (1, length) that the cache lacks.

    Args:
        media: the inputs of `MEDIA_KEYS` that belong to these positions.

    Returns:
        the logits (1, vocabulary) of the first token of a reply.
    """
    new = input_ids[:, cache.get_seq_length() :]
    return model(input_ids=new, use_cache=True, logits_to_keep=1, **{CACHE: cache}, **media).logits[:, -1]


def decode_one(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer=None,
    **model_kwargs,
) -> torch.LongTensor:
    """
    Greedy decoding or sampling of one row with a key-value cache, for `generate(custom_generate=decode_one)`.

    The tokens are those of `generate` itself, with the same random numbers. Only the prompt runs through the whole
    model; each further token runs through the language model and its head. `generate` prepares the whole model's inputs
    again for each token, and inspects the signatures of all logits processors.

    Args:
        input_ids: (1, length), of which the cache already has the first positions.
        model_kwargs: the cache, and the inputs of `MEDIA_KEYS` that belong to the other positions.

    Returns:
        `input_ids` and the new tokens (1, length).
    """
    cache, media = model_kwargs[CACHE], {key: value for key, value in model_kwargs.items() if key in MEDIA_KEYS}
    logits = first_logits(model, input_ids, cache, media)
    while True:
        scores = logits.float()
        for process in logits_processor:
            scores = process(input_ids, scores)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        if streamer is not None:
            streamer.put(token[0].cpu())
        if stopping_criteria(input_ids, ()).all():
            break
        logits = next_logits(model, token, cache)
    if streamer is not None:
        streamer.end()
    return input_ids
