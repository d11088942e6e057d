"""The supervised stages' loss on rows packed into one, without padding and without logits."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from transformers.utils import logging

from empathic.trainers.frozen_outputs import frozen_inputs, is_frozen_key
from empathic.trainers.log_probabilities import log_probabilities_from
from empathic.trainers.preference_collator import IGNORE
from empathic.trainers.shared_prefix import CannotShare, drops, enable_pair_layouts, why_not_packed
from empathic.trainers.varlen_attention import PackedLayout

logger = logging.get_logger(__name__)

_NOT_FOR_MODEL = ("labels", "sample_ids", "sample_places", "left_out")


class RowLayout(PackedLayout):
    """
    A packed row `prefix | rest of row 0 | rest of row 1 | ...`: each row sees the prefix and itself.

    Attention runs over the rows side by side again, padded to the longest rest: there padding costs little. All the
    rest of a layer, where nearly all of its arithmetic is, runs without. On a GPU in half precision a variable-length
    kernel needs no padding in attention either.

    Args:
        prefix: tokens that the rows share.
        rests: tokens of each row after it.
    """

    def __init__(self, prefix: int, rests: list[int], device: torch.device):
        self.prefix, self.rests = prefix, rests
        lengths = torch.tensor(rests, device=device)
        place = torch.arange(max(rests), device=device)
        present = place < lengths[:, None]  # (rows, longest)
        starts = prefix + lengths.cumsum(0) - lengths
        self.index = torch.where(present, starts[:, None] + place, 0)
        self.places = present.flatten().nonzero().squeeze(1)
        # Padding at the end is seen by no row, so the causal mask is that of all; and no query sees nothing.
        causal = place[:, None] >= place
        self.mask = torch.cat([causal.new_ones(len(place), prefix), causal], dim=1)

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """The prefix, and each row after it."""
        own = [(0, self.prefix, 0, 0)] if self.prefix else []
        ends = accumulate(self.rests, initial=self.prefix)
        return [*own, *((start, end, 0, self.prefix) for start, end in pairwise(ends))]

    def plain(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """Attention (1, length, heads, width) of states (1, heads, length, width), the rows side by side."""
        options = {"dropout_p": dropout, "scale": scale}
        # (rows, heads, longest, width)
        queries, keys, values = (states[0][:, self.index].transpose(0, 1) for states in (query, key, value))
        if self.prefix == 0:
            rest = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, **options)
            return self._in_one_row(rest)
        shared = [states[:, :, : self.prefix] for states in (query, key, value)]
        keys, values = (
            torch.cat([states.expand(len(own), -1, -1, -1), own], dim=2)
            for states, own in zip(shared[1:], (keys, values), strict=True)
        )
        first = F.scaled_dot_product_attention(*shared, is_causal=True, **options).transpose(1, 2)
        rest = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask, **options)
        return torch.cat([first, self._in_one_row(rest)], dim=1)

    def _in_one_row(self, outputs: torch.Tensor) -> torch.Tensor:
        """(rows, heads, longest, width) -> (1, tokens, heads, width)."""
        return outputs.transpose(1, 2).flatten(0, 1)[self.places][None]


@dataclass
class PackedRows:
    """
    A batch in one row: `inputs` of the model in place of `input_ids` and `attention_mask`; `columns` (targets,), the
    positions that predict a target; `targets` (targets,), its token ids.
    """

    inputs: dict
    columns: torch.Tensor
    targets: torch.Tensor


def pack_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, unshared: set[int] | None
) -> PackedRows:
    """
    Packs the right-padded rows (batch, length) of `StageCollator`, on the device they are on.

    Args:
        labels: as for the model, `IGNORE` where there is no target.
        unshared: token ids that end the prefix that rows share, because something else takes their places (the
            placeholders); None: nothing is shared.
    """
    device = input_ids.device
    input_ids, labels, lengths = input_ids.cpu(), labels.cpu(), attention_mask.sum(1).tolist()
    prefix = 0
    if unshared is not None and len(lengths) > 1:
        same = (input_ids == input_ids[:1]).all(0) & (labels == IGNORE).all(0)
        same &= ~torch.isin(input_ids[0], torch.tensor(sorted(unshared)))
        prefix = min(int(same.long().cumprod(0).sum()), min(lengths) - 1)
    ids, positions, columns, targets = [input_ids[0, :prefix]], [torch.arange(prefix)], [], []
    start = prefix
    for row, length in enumerate(lengths):
        ids.append(input_ids[row, prefix:length])
        positions.append(torch.arange(prefix, length))
        before = (labels[row, 1:length] != IGNORE).nonzero().squeeze(1)  # each predicts the token after it
        columns.append(torch.where(before < prefix, before, before + start - prefix))
        targets.append(labels[row, before + 1])
        start += length - prefix
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions)[None].to(device),
        # With four dimensions it counts as made already; else a mask of the whole row would be made, and not used.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "pair_layout": RowLayout(prefix, [length - prefix for length in lengths], device),
    }
    return PackedRows(inputs, torch.cat(columns).to(device), torch.cat(targets).to(device))


class PackedLoss:
    """
    Mixin over `Trainer` for the batches of `StageCollator`: the next-token loss of the model's forward, from rows that
    are packed into one, whose common beginning (the system prompt) is computed once, and from log-probabilities of the
    targets alone. Where a language model cannot be packed, or has dropout, which differs from row to row, one line of
    the log says what is done instead.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        self._head, self._decoder = base.get_output_embeddings(), base.get_decoder()
        config = base.config
        self._placeholders = {config.video_token_id, config.audio_token_id, config.memory_token_id}
        reason = self._why_not_packed()
        self._packs, self._shares = reason is None, not any(map(drops, self._decoder.modules()))
        if self._packs:
            enable_pair_layouts()
        else:
            logger.warning("Rows are padded, not packed: %s.", reason)

    def _why_not_packed(self) -> str | None:
        if self.args.n_gpu > 1:
            return "torch's DataParallel divides rows; start one process for each GPU instead"
        if self.args.torch_compile:
            return "torch_compile wants the same shapes each step"
        return why_not_packed(self._decoder)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in transformers: the mean over the batch's targets, or over `num_items_in_batch`, those of the step."""
        batch = {k: v for k, v in inputs.items() if k not in _NOT_FOR_MODEL and not is_frozen_key(k)}
        logps = None
        if self._packs:
            try:
                logps = self._packed(model, batch | frozen_inputs(inputs, slice(None), packed=True), inputs["labels"])
            except CannotShare as reason:
                self._packs = False
                logger.warning("Rows are padded, not packed: %s.", reason)
        if logps is None:
            labels = inputs["labels"][:, 1:]
            where = (labels != IGNORE).nonzero(as_tuple=True)
            with log_probabilities_from(self._head, where, labels[where]):
                logps = model(**batch, **frozen_inputs(inputs, slice(None), packed=False), use_cache=False).logits
        # A batch may have no target, if all its samples were left out: then the loss is 0 / 1.
        loss = -logps.sum() / (max(len(logps), 1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the ranks
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch alone; `evaluation_loop` has that of all."""
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        count = (inputs["labels"][:, 1:] != IGNORE).sum().item()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach().mean()
        self._eval_sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
        return loss, None, None

    def _without_repeats(self, batch: dict) -> dict:
        """
        Takes the labels off the samples that accelerate repeats to give every rank a full last batch: those past the
        remainder, counted rank by rank, just as in `Accelerator.gather_for_metrics`.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        samples = len(batch["sample_ids"]) + len(batch["left_out"])
        first = self.accelerator.process_index * samples
        is_repeat = [first + place >= state.remainder for place in batch["sample_places"]]
        if not is_repeat:  # the row that stands for a batch of nothing
            return batch
        labels = batch["labels"]
        return {**batch, "labels": labels.masked_fill(torch.tensor(is_repeat, device=labels.device)[:, None], IGNORE)}

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As in transformers, but the loss is the mean over all targets, however they are batched; NaN if none."""
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._eval_sums
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        total, count = sums.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count if count else float("nan")
        return output

    def _packed(self, model, batch: dict, labels: torch.Tensor) -> torch.Tensor:
        unshared = self._placeholders if self._shares else None
        packed = pack_rows(batch["input_ids"], batch["attention_mask"], labels, unshared)
        where = (torch.zeros_like(packed.columns), packed.columns)
        with log_probabilities_from(self._head, where, packed.targets):
            logps = model(**{**batch, **packed.inputs}, use_cache=False).logits
        layers, layout = self._decoder.config.num_hidden_layers, packed.inputs["pair_layout"]
        if layout.attended != layers:
            count = f"{layout.attended} of {layers} layers of {type(self._decoder).__name__} attend row by row"
            raise CannotShare(layout.obstacle or count)
        return logps
