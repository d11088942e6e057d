"""Pairs that share their prompt, packed into one row without padding.

A pair's row is `prompt | chosen | rejected`: what both sequences begin with stands there once. The rejected reply's
positions go on from the prompt's end, and it does not see the chosen one. The rows of a batch follow each other, and
each sees itself alone. So every hidden state is that of the sequence run by itself.

No mask of the whole row is made, of which the work would grow with the square of its length. Each layer's attention
runs pair by pair: the causal kernel over prompt and chosen, then a small masked call for the rejected reply. On a GPU
in half precision one call of a variable-length kernel does them all.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from empathic.trainers.preference_collator import IGNORE
from empathic.trainers.varlen_attention import PackedLayout

# In a packed row the attention of all of these is torch's scaled_dot_product_attention, which has flash kernels too.
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Arguments that change what a layer attends to, and how.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


class CannotShare(Exception):
    """A model's layers do not all attend pair by pair; the message says why."""


@dataclass(eq=False)
class PairLayout(PackedLayout):
    """Where the pairs of a packed row lie.

    `spans` has (start, length of the shared prefix, where the rejected reply starts, end) of each pair, as offsets in
    the row.
    """

    spans: list[tuple[int, int, int, int]]
    _masks: dict = field(default_factory=dict, repr=False)

    def mask(self, index: int, device: torch.device) -> torch.Tensor:
        """What the rejected reply of a pair sees of the pair, (its length, the pair's length): itself and the prefix,
        and nothing of the chosen reply."""
        if (index, device) not in self._masks:
            start, shared, rejected, end = self.spans[index]
            sees = torch.ones(end - rejected, end - start, dtype=torch.bool, device=device).tril(rejected - start)
            sees[:, shared : rejected - start] = False
            self._masks[index, device] = sees
        return self._masks[index, device]

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """Prompt and chosen reply of each pair, and the rejected reply behind the prompt."""
        found = []
        for start, shared, rejected, end in self.spans:
            found += [(start, rejected, start, start), (rejected, end, start, start + shared)]
        return [each for each in found if each[0] < each[1]]

    def plain(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """Attention (1, length, heads, width) of states (1, heads, length, width), pair by pair."""
        outputs = []
        for index, (start, _, rejected, end) in enumerate(self.spans):
            first, second, pair = slice(start, rejected), slice(rejected, end), slice(start, end)
            options = {"dropout_p": dropout, "scale": scale}
            outputs.append(
                F.scaled_dot_product_attention(
                    query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True, **options
                )
            )
            if end > rejected:
                mask = self.mask(index, query.device)
                outputs.append(
                    F.scaled_dot_product_attention(
                        query[:, :, second], key[:, :, pair], value[:, :, pair], attn_mask=mask, **options
                    )
                )
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


class _PairAttention:
    """An attention function of transformers that follows the call's `pair_layout`, if it has one."""

    def __init__(self, function):
        self.function = function

    def __call__(self, module, query, key, value, attention_mask, *args, pair_layout=None, **kwargs):
        if pair_layout is None:
            return self.function(module, query, key, value, attention_mask, *args, **kwargs)
        odd = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
        if odd or not kwargs.get("is_causal", getattr(module, "is_causal", True)):
            # What comes out is of no use. It is not raised here, because a sharded model must end its forward.
            pair_layout.obstacle = (
                f"the attention of {type(module).__name__} takes {', '.join(odd) or 'no causal mask'}"
            )
            return self.function(module, query, key, value, None, *args, **kwargs)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        pair_layout.attended += 1
        dropout = kwargs.get("dropout", 0.0)
        return pair_layout.attend(query, key, value, dropout, kwargs.get("scaling")), None


def enable_pair_layouts() -> None:
    """Lets the attention of every model in this process follow a `pair_layout` that is given to its forward.

    It stays so: a checkpointed layer attends once more in the backward. A call without a layout is as it was.
    """
    for name in IMPLEMENTATIONS:
        function = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(function, _PairAttention):
            ALL_ATTENTION_FUNCTIONS[name] = _PairAttention(function)


def why_not_packed(decoder: nn.Module) -> str | None:
    """The reason why a language model cannot run packed pairs; None if it can.

    Each token must meet other tokens in causal attention over the whole sequence alone, computed by transformers'
    attention interface. What this cannot see, `PairLayout.attended` shows after a forward.

    Args:
        decoder: the language model without its head.
    """
    config, name = decoder.config, type(decoder).__name__
    if config._attn_implementation not in IMPLEMENTATIONS:
        return f"its attention is {config._attn_implementation!r}, and it works with {', '.join(IMPLEMENTATIONS)}"
    if not decoder._supports_attention_backend:
        return f"{name} does not hand its arguments on to transformers' attention functions"
    kinds = set(config.layer_types) if hasattr(config, "layer_types") and config.layer_types else {"full_attention"}
    if kinds != {"full_attention"}:
        return f"the layers of {name} are not all of full attention: {', '.join(sorted(kinds))}"
    return None


def drops(module: nn.Module) -> bool:
    """Whether a module, which may call a function for it (`attention_dropout`, `layerdrop`), drops anything."""
    rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return any(rate > 0 for rate in rates) or (isinstance(module, nn.Dropout) and module.p > 0)


@dataclass
class PackedPairs:
    """A batch of pairs in one row.

    - `inputs`: `input_ids`, `position_ids` (1, tokens), `attention_mask` that the layout stands in for, `pair_layout`.
    - `columns`, `targets`: (targets,), the positions that predict a target and its token id, in the order of the
      sequences: all chosen ones, then all rejected ones.
    - `lengths`: the number of targets of each of those 2 * pairs sequences.
    - `repeats_prompts`: whether a part of a prompt stands there twice.
    """

    inputs: dict
    columns: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]
    repeats_prompts: bool


def pack_pairs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, share: bool = True
) -> PackedPairs:
    """Packs the right-padded sequences (2 * pairs, length) of `PreferenceCollator`, on the device they are on.

    With `share` false nothing is shared: each sequence is run whole, still without padding. The row then has each
    pair's prompt twice.
    """
    device = input_ids.device
    input_ids, labels, present = input_ids.cpu(), labels.cpu(), attention_mask.cpu().bool()
    lengths = present.sum(1).tolist()
    pairs = len(lengths) // 2
    same = (input_ids[:pairs] == input_ids[pairs:]) & present[:pairs] & present[pairs:]
    prefixes = same.long().cumprod(1).sum(1).tolist() if share else [0] * pairs

    ids, positions, spans, start, repeats = [], [], [], 0, not share
    columns, targets = [None] * (2 * pairs), [None] * (2 * pairs)
    for pair in range(pairs):
        prefix, chosen, rejected = prefixes[pair], lengths[pair], lengths[pairs + pair]
        ids += [input_ids[pair, :chosen], input_ids[pairs + pair, prefix:rejected]]
        positions += [torch.arange(chosen), torch.arange(prefix, rejected)]
        spans.append((start, prefix, start + chosen, start + chosen + rejected - prefix))
        rest = labels[pairs + pair, prefix:rejected]
        repeats |= bool((rest[:1] == IGNORE).any() and (rest != IGNORE).any())
        for row, shift in ((pair, 0), (pairs + pair, chosen - prefix)):
            before = (labels[row, 1:] != IGNORE).nonzero().squeeze(1)  # each predicts the token after it
            targets[row] = labels[row, before + 1]
            columns[row] = start + before + torch.where(before < prefix, 0, shift)
        start = spans[-1][-1]
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions)[None].to(device),
        # With four dimensions it counts as made already; else a mask of the whole row would be made, and not used.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "pair_layout": PairLayout(spans),
    }
    counts = [len(those) for those in targets]
    return PackedPairs(inputs, torch.cat(columns).to(device), torch.cat(targets).to(device), counts, repeats)
