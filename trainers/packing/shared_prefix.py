"""Packing of pairs, with shared prompts, into one row without padding.

A pair's part of the row is `prompt | chosen | rejected`, with the common prefix of both sequences stored once. The
positions of the rejected reply continue from the end of the prompt, and the reply does not attend to the chosen reply.
Further rejected replies of the same prompt follow in the same way, and no reply attends to another. The pairs of a
batch follow each other, and no pair attends to another. Every hidden state thus equals that of a separate run of its
sequence.

No attention mask of the whole row is made, because its cost would grow with the square of the row's length. The
attention of each layer runs pair by pair: the causal kernel over prompt and chosen reply, then a small masked call for
each rejected reply. On a GPU in half precision, one call of a variable-length kernel replaces these calls.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..losses import IGNORE_INDEX
from .varlen_attention import PackedLayout

# In a packed row, all of these use torch's scaled_dot_product_attention, which also has flash kernels, and so do the
# attention kernels of the Hub, which are named `owner/name`.
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Arguments that change a layer's attention in ways that packed rows do not support.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


class CannotShare(Exception):
    """Raised if some layers of a model do not attend pair by pair; the message has the reason."""


@dataclass(eq=False)
class PairLayout(PackedLayout):
    """The positions of the pairs in a packed row.

    `spans` has (start, length of the shared prefix, start of the rejected reply, its end) of each pair; the rejected
    reply may be empty. `further` has, for pairs with more rejected replies, (length of the shared prefix, start, end)
    of each of these, which follow in the row. Starts and ends are offsets in the row.
    """

    spans: list[tuple[int, int, int, int]]
    further: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """See `PackedLayout`: prompt and chosen reply of each pair, then the rejected replies, after the prompt."""
        found = []
        for index, (start, shared, rejected, end) in enumerate(self.spans):
            found += [(start, rejected, start, start), (rejected, end, start, start + shared)]
            found += [(begin, stop, start, start + common) for common, begin, stop in self.further.get(index, ())]
        return [each for each in found if each[0] < each[1]]


class _PairAttention:
    """An attention function of transformers that uses the `pair_layout` of a call, if there is one."""

    def __init__(self, function):
        self.function = function

    def __call__(self, module, query, key, value, attention_mask, *args, pair_layout=None, **kwargs):
        if pair_layout is None:
            return self.function(module, query, key, value, attention_mask, *args, **kwargs)
        odd = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
        if odd or not kwargs.get("is_causal", getattr(module, "is_causal", True)):
            # The output is not usable. No error is raised here, because a sharded model must finish its forward.
            pair_layout.obstacle = f"the attention of {type(module).__name__} uses {', '.join(odd) or 'no causal mask'}"
            return self.function(module, query, key, value, None, *args, **kwargs)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        pair_layout.attended += 1
        dropout = kwargs.get("dropout", 0.0)
        return pair_layout.attend(query, key, value, dropout, kwargs.get("scaling")), None


def enable_pair_layouts() -> None:
    """Let the attention of every model in this process use a `pair_layout` that is passed to the model's forward.

    The change is permanent, because a checkpointed layer attends again in the backward. Calls without a layout are
    unaffected.
    """
    for name in (*IMPLEMENTATIONS, *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "/" in name)):
        function = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(function, _PairAttention):
            ALL_ATTENTION_FUNCTIONS[name] = _PairAttention(function)


def why_not_packed(decoder: nn.Module) -> str | None:
    """Return the reason why a language model cannot run packed pairs, or None if it can.

    Tokens may interact only through causal attention over the whole sequence, computed by transformers' attention
    interface. `PairLayout.attended` reveals, after a forward, violations that this function cannot detect.

    Args:
        decoder: the language model without its head.
    """
    config, name = decoder.config, type(decoder).__name__
    if config._attn_implementation not in IMPLEMENTATIONS and "/" not in config._attn_implementation:
        return (
            f"its attention is {config._attn_implementation!r}, but packing needs one of {', '.join(IMPLEMENTATIONS)}, "
            "or a kernel of the Hub"
        )
    if not decoder._supports_attention_backend:
        return f"{name} does not pass its arguments on to transformers' attention functions"
    kinds = set(config.layer_types) if hasattr(config, "layer_types") and config.layer_types else {"full_attention"}
    if kinds != {"full_attention"}:
        return f"not all layers of {name} use full attention: {', '.join(sorted(kinds))}"
    return None


def dropout_rates(module: nn.Module) -> dict[str, float]:
    """
    The dropout rates of a module by attribute name: the rate of a dropout layer, and rates that the module passes to
    functions (`attention_dropout`, `layerdrop`, `attn_pdrop`).
    """
    rates = {name: value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)}
    return {**rates, "p": module.p} if isinstance(module, _DropoutNd) else rates


def drops(module: nn.Module) -> bool:
    """Whether a module has dropout, also as a rate passed to a function."""
    return any(rate > 0 for rate in dropout_rates(module).values())


def disable_dropout(model: nn.Module, decoder: nn.Module) -> None:
    """
    Set every dropout rate of a model to 0, also the rates that are passed to functions, and those in the config of its
    decoder, which a few models (Falcon, Persimmon) read in each forward.
    """
    for module in model.modules():
        for name in dropout_rates(module):
            setattr(module, name, 0.0)
    for name, value in vars(decoder.config).items():
        if "drop" in name and isinstance(value, float):
            setattr(decoder.config, name, 0.0)


@dataclass
class PackedBatch:
    """
    A batch packed into one row.

    Attributes:
        inputs: `input_ids`, `position_ids` (1, tokens), an `attention_mask` that is not used, and `pair_layout`.
        columns: the positions (targets,) that predict a target.
        targets: the token ids (targets,) of the targets, sequence by sequence, in the order of the padded batch (for
            pairs: first all chosen replies, then all rejected replies).
        lengths: the number of targets of each sequence.
        repeats_prompts: whether the row has a part of a prompt twice.
    """

    inputs: dict
    columns: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]
    repeats_prompts: bool = False


def pack_pairs(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    share: bool = True,
    groups: list[list[int]] | None = None,
) -> PackedBatch:
    """Pack the right-padded sequences (sequences, length) of `PreferenceCollator`, on their device.

    Without `share`, each sequence is packed whole, so the row has each pair's prompt once for every reply. `groups` has
    the sequences of each pair: the one of the chosen reply, then those of the rejected replies, if any. None: the first
    half are chosen replies, and the second half their rejected replies.
    """
    device = input_ids.device
    input_ids, labels, present = input_ids.cpu(), labels.cpu(), attention_mask.cpu().bool()
    lengths = present.sum(1).tolist()
    if groups is None:
        pairs = len(lengths) // 2
        groups = [[pair, pairs + pair] for pair in range(pairs)]
    first = torch.arange(len(lengths))  # the chosen sequence of each sequence's pair
    for chosen, *others in groups:
        first[others] = chosen
    same = (input_ids == input_ids[first]) & present & present[first]
    prefixes = same.long().cumprod(1).sum(1).tolist() if share else [0] * len(lengths)

    ids, positions, spans, further, start, repeats = [], [], [], {}, 0, not share
    columns, targets = ([torch.empty(0, dtype=torch.long)] * len(lengths) for _ in range(2))  # of each sequence
    for group in groups:
        replies, end = [], start  # (length of the shared prefix, start, end) of each sequence's own part of the row
        for place, row in enumerate(group):
            prefix, length = (prefixes[row] if place else 0), lengths[row]
            ids.append(input_ids[row, prefix:length])
            positions.append(torch.arange(prefix, length))
            replies.append((prefix, end, end + length - prefix))
            rest = labels[row, prefix:length]
            repeats |= bool(place and (rest[:1] == IGNORE_INDEX).any() and (rest != IGNORE_INDEX).any())
            before = (labels[row, 1:] != IGNORE_INDEX).nonzero().squeeze(1)  # each position predicts the next token
            targets[row] = labels[row, before + 1]
            columns[row] = before + torch.where(before < prefix, start, end - prefix)
            end += length - prefix
        chosen_end = replies[0][2]
        shared, _, rejected_end = replies[1] if len(replies) > 1 else (0, chosen_end, chosen_end)
        if len(replies) > 2:
            further[len(spans)] = replies[2:]
        spans.append((start, shared, chosen_end, rejected_end))
        start = end
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions)[None].to(device),
        # transformers takes a 4D mask as final; otherwise it would make a mask of the whole row, which is not used.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "pair_layout": PairLayout(spans, further),
    }
    counts = [len(those) for those in targets]
    return PackedBatch(inputs, torch.cat(columns).to(device), torch.cat(targets).to(device), counts, repeats)
