"""
One decoding step of the language model for several conversations, each with a key-value cache of its own length.

The linear layers run on all rows at once. Attention runs row by row on each row's own cache, without padding, so that a
row may join or leave between two tokens and no cache is ever copied for that.

The bits of a row must not depend on what else is decoded. A matrix product gives each row the same bits wherever it is
in the batch, as long as the number of rows selects the same kernel. On a CPU, these are the multiples of
`ROWS_AT_ONCE`, to which a batch is filled up: of other numbers, a rest goes to another kernel, which depends on the
number of threads. On other devices, a batch is filled up to its maximum size.
"""

import threading
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..compat_empathic import CACHE
from ..decoding import GrowingCache, next_logits
from ..sampling import end_tokens

ROWS_AT_ONCE = 4
IMPLEMENTATION = "empathic_rows"
_active = threading.local()


class _RowCaches(DynamicCache):
    """The caches of several rows as the cache of a batch. `kept[layer]` holds each row's keys and values."""

    def __init__(self, rows: Sequence[DynamicCache]):
        super().__init__()
        self.rows = rows
        self.kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Append each row's new keys and values (rows, heads, 1, head size) to its own cache; return the new ones."""
        self.kept[layer_idx] = [
            row.update(key_states[place : place + 1], value_states[place : place + 1], layer_idx)
            for place, row in enumerate(self.rows)
        ]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(row.get_seq_length(layer_idx) for row in self.rows)


def _attend(module, query, key, value, attention_mask, **kwargs):
    """Attention of one new position of each row to the row's own cache; rows that fill up the batch give zeros."""
    output = query.new_zeros(query.shape[0], 1, query.shape[1], value.shape[-1])
    kwargs = {name: kwargs[name] for name in ("scaling", "dropout") if name in kwargs}
    for place, (keys, values) in enumerate(_active.caches.kept[module.layer_idx]):
        output[place] = sdpa_attention_forward(module, query[place : place + 1], keys, values, None, **kwargs)[0][0]
    return output, None


AttentionInterface.register(IMPLEMENTATION, _attend)


def decodes_in_batches(model) -> bool:
    """Whether `decode` can run several rows of this model at once."""
    decoder = model.model.language_model
    return (
        GrowingCache.of(model).can_be_cut
        and decoder.config._attn_implementation == "sdpa"
        and decoder._supports_attention_backend
    )


@contextmanager
def _row_by_row(decoder, caches: _RowCaches):
    config, before = decoder.config, decoder.config._attn_implementation
    _active.caches, config._attn_implementation = caches, IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        del _active.caches


def decode(model, tokens: Sequence[int], caches: Sequence[DynamicCache], max_rows: int) -> torch.Tensor:
    """
    Process the newest token of each row, and append its keys and values to the row's cache.

    Args:
        model: an `EmpathicForConditionalGeneration`.
        tokens: one token id a row.
        caches: each row's key-value cache.
        max_rows: the maximum number of rows that are ever decoded together.

    Returns:
        the logits (rows, vocabulary) of the next tokens.
    """
    decoder, embed, device = model.model.language_model, model.get_input_embeddings(), model.device
    if max_rows == 1 or not decodes_in_batches(model):
        ids = torch.tensor(tokens, device=device)[:, None, None]
        return torch.cat([next_logits(model, token, cache) for token, cache in zip(ids, caches, strict=True)])
    rows = -(-len(tokens) // ROWS_AT_ONCE) * ROWS_AT_ONCE if device.type == "cpu" else max_rows
    filling = [0] * (rows - len(tokens))
    ids = torch.tensor([*tokens, *filling], device=device)[:, None]
    positions = [cache.get_seq_length() for cache in caches]
    combined = _RowCaches(caches)
    with _row_by_row(decoder, combined):
        outputs = decoder(
            inputs_embeds=embed(ids),
            position_ids=torch.tensor([*positions, *filling], device=device)[:, None],
            use_cache=True,
            **{CACHE: combined},
        )
    return model.lm_head(outputs.last_hidden_state[:, -1])[: len(tokens)]


def decode_greedily(
    model, logits: torch.Tensor, caches: Sequence[DynamicCache], max_new_tokens: int
) -> list[list[int]]:
    """
    Generate the most likely tokens of several replies.

    Args:
        model: an `EmpathicForConditionalGeneration`. Of its generation config, the tokens that end a reply and
            `suppress_tokens` are used.
        logits: the logits (rows, vocabulary) of each reply's first token.
        caches: the key-value cache of each reply's prompt.
        max_new_tokens: the maximum number of tokens of a reply.

    Returns:
        the tokens of each reply, with the one that ended it.
    """
    config = model.generation_config
    ends, replies, going = end_tokens(config), [[] for _ in caches], list(range(len(caches)))
    while True:
        scores = logits.float()
        if config.suppress_tokens:
            scores[:, config.suppress_tokens] = float("-inf")
        for row, token in zip(going, scores.argmax(-1).tolist(), strict=True):
            replies[row].append(token)
        going = [row for row in going if replies[row][-1] not in ends and len(replies[row]) < max_new_tokens]
        if not going:
            return replies
        logits = decode(model, [replies[row][-1] for row in going], [caches[row] for row in going], len(caches))
