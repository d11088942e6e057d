"""Packing of the supervised stages' rows into one row without padding."""

from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from ..losses import IGNORE_INDEX
from .shared_prefix import PackedBatch
from .varlen_attention import PackedLayout


class RowLayout(PackedLayout):
    """
    A packed row `prefix | rest of row 0 | rest of row 1 | ...`, in which each row attends to the prefix and itself.

    On a CPU attention runs row by row; on a GPU in half precision, by a variable-length kernel. On other GPUs, where
    many small calls would be slow, it runs on a batch of the rows, padded to the longest rest.

    Args:
        prefix: number of tokens that the rows share.
        rests: number of tokens of each row after the prefix.
    """

    def __init__(self, prefix: int, rests: list[int], device: torch.device):
        self.prefix, self.rests, self.device = prefix, rests, device

    @cached_property
    def _padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The index (rows, longest) and the mask (longest, prefix + longest) of the batch, and its places in use."""
        lengths = torch.tensor(self.rests, device=self.device)
        place = torch.arange(max(self.rests), device=self.device)
        present = place < lengths[:, None]  # (rows, longest)
        starts = self.prefix + lengths.cumsum(0) - lengths
        index = torch.where(present, starts[:, None] + place, 0)
        # No row attends to the padding at its end, so one causal mask serves all rows; and every query has a key.
        causal = place[:, None] >= place
        mask = torch.cat([causal.new_ones(len(place), self.prefix), causal], dim=1)
        return index, mask, present.flatten().nonzero().squeeze(1)

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """See `PackedLayout`: the prefix, then each row, which also attends to the prefix."""
        own = [(0, self.prefix, 0, 0)] if self.prefix else []
        ends = accumulate(self.rests, initial=self.prefix)
        return [*own, *((start, end, 0, self.prefix) for start, end in pairwise(ends))]

    def plain(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """See `PackedLayout`."""
        return (super().plain if query.device.type == "cpu" else self.batched)(query, key, value, dropout, scale)

    def batched(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """Like `plain`, with the rows as a batch."""
        options = {"dropout_p": dropout, "scale": scale}
        index, mask, _ = self._padded
        # (rows, heads, longest, width)
        queries, keys, values = (states[0][:, index].transpose(0, 1) for states in (query, key, value))
        if self.prefix == 0:
            rest = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, **options)
            return self._in_one_row(rest)
        shared = [states[:, :, : self.prefix] for states in (query, key, value)]
        keys, values = (
            torch.cat([states.expand(len(own), -1, -1, -1), own], dim=2)
            for states, own in zip(shared[1:], (keys, values), strict=True)
        )
        first = F.scaled_dot_product_attention(*shared, is_causal=True, **options).transpose(1, 2)
        rest = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **options)
        return torch.cat([first, self._in_one_row(rest)], dim=1)

    def _in_one_row(self, outputs: torch.Tensor) -> torch.Tensor:
        """(rows, heads, longest, width) -> (1, tokens, heads, width)."""
        return outputs.transpose(1, 2).flatten(0, 1)[self._padded[2]][None]


def pack_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, unshared: set[int] | None
) -> PackedBatch:
    """
    Pack the right-padded rows (batch, length) of `StageCollator`, on their device.

    Args:
        labels: as for the model, `IGNORE_INDEX` where there is no target.
        unshared: token ids that end the shared prefix, because vectors replace them (the placeholders); None: do not
            share a prefix.
    """
    device = input_ids.device
    input_ids, labels, lengths = input_ids.cpu(), labels.cpu(), attention_mask.sum(1).tolist()
    prefix = 0
    if unshared is not None and len(lengths) > 1:
        same = (input_ids == input_ids[:1]).all(0) & (labels == IGNORE_INDEX).all(0)
        same &= ~torch.isin(input_ids[0], torch.tensor(sorted(unshared)))
        prefix = min(int(same.long().cumprod(0).sum()), min(lengths) - 1)
    ids, positions, columns, targets = [input_ids[0, :prefix]], [torch.arange(prefix)], [], []
    start = prefix
    for row, length in enumerate(lengths):
        ids.append(input_ids[row, prefix:length])
        positions.append(torch.arange(prefix, length))
        before = (labels[row, 1:length] != IGNORE_INDEX).nonzero().squeeze(1)  # each position predicts the next token
        columns.append(torch.where(before < prefix, before, before + start - prefix))
        targets.append(labels[row, before + 1])
        start += length - prefix
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions)[None].to(device),
        # transformers takes a 4D mask as final; otherwise it would make a mask of the whole row, which is not used.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "pair_layout": RowLayout(prefix, [length - prefix for length in lengths], device),
    }
    counts = [len(row) for row in targets]
    return PackedBatch(inputs, torch.cat(columns).to(device), torch.cat(targets).to(device), counts)
