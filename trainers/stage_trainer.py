"""The trainer of the supervised stages."""

import logging

import torch
from peft import PeftModel

from .frozen.clips import compute_clips
from .frozen.outputs import frozen_inputs
from .packed_trainer import TEXT_KEYS, ComputeFrozenFirst, PackedTrainer, evaluate_batch, model_inputs
from .packing.rows import pack_rows
from .packing.shared_prefix import PackedBatch, drops
from .word_alignment import clips_of_rows, contrast, emotion_labels, word_vectors

logger = logging.getLogger(__name__)


class StageTrainer(PackedTrainer):
    """
    Trains on the batches of `StageCollator` with the next-token loss.

    The prefix that the rows of a batch share (the system prompt) is computed once, except with dropout, which differs
    from row to row. With `cache_frozen_gib`, the vectors of clips are computed before training. Samples that were left
    out are reported.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
        self._placeholders = {config.video_token_id, config.audio_token_id, config.memory_token_id}
        self._shares = not any(map(drops, self._decoder.modules()))
        self._alignment_weight = getattr(self.args, "alignment_weight", 0.0)
        self._words = word_vectors(model, self.processing_class) if self._alignment_weight > 0 else None
        self._clip_vectors: dict[str, torch.Tensor | None] = {}
        self._trained_samples = 0
        if getattr(self.args, "cache_frozen_gib", 0) > 0:
            self.add_callback(ComputeFrozenFirst(self))

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Compute the mean loss over the batch's targets, or the batch's share of the mean over `num_items_in_batch`
        targets of the step; 0 for a batch without a target. In training, `alignment_weight` adds its loss.

        Raises:
            FloatingPointError: if the loss is NaN or infinite; the message names the step and the batch's samples.
        """
        logps, _ = self.log_probabilities(model, inputs)
        loss = -logps.sum()
        if self._words is not None and model.training:
            # A mean over the clips of this batch, which counts by its targets among the batches of a step.
            loss = loss + self._alignment_weight * len(logps) * self._alignment(inputs)
        loss = loss / (max(len(logps), 1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the ranks
        names = inputs["sample_ids"]
        if not names:  # every sample was left out, so this is a mean of no values
            loss = torch.nan_to_num(loss)
        if not torch.isfinite(loss.detach()).all():
            raise self.not_finite(f"the samples {', '.join(names)}", "one of them or the weights", "these samples")
        return (loss, {"loss": loss}) if return_outputs else loss

    def run_model(self, model, inputs: dict):
        """See `PackedTrainer`; with `alignment_weight`, the vectors of the clips are kept for the loss."""
        output = super().run_model(model, inputs)
        if self._words is not None and model.training:
            self._clip_vectors = {"video": output.video_vectors, "audio": output.audio_vectors}
        return output

    def _alignment(self, inputs: dict) -> torch.Tensor:
        """The mean `contrast` of the modalities of a batch; 0 without a clip."""
        kept, self._clip_vectors = self._clip_vectors, {}  # not longer than needed: they hold the graph of the step
        labels, losses, unused = emotion_labels(inputs, self.args.device), [], []
        for modality, there in clips_of_rows(inputs).items():
            vectors = kept[modality]
            if vectors is None:
                continue
            count = int(there.sum())
            if count:
                losses.append(contrast(vectors[:count], self._words.to(vectors.device), labels[there])[0])
            # Under ZeRO-3, an output of the model must have a gradient in all processes or in none.
            unused.append(0 * vectors[count:].sum())
        return sum(unused) + (torch.stack(losses).mean() if losses else 0)

    def pack(self, model, inputs: dict) -> tuple[PackedBatch, dict]:
        """See `PackedTrainer`."""
        text = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        batch = pack_rows(*text, self._placeholders if self._shares else None)
        return batch, model_inputs(inputs, but=TEXT_KEYS) | frozen_inputs(inputs, slice(None), packed=True)

    def padded_inputs(self, inputs: dict) -> dict:
        """See `PackedTrainer`."""
        return model_inputs(inputs) | frozen_inputs(inputs, slice(None), packed=False)

    # ---- Training ----

    def train(self, *args, **kwargs):
        """As in transformers."""
        self._trained_samples = 0
        return super().train(*args, **kwargs)

    def prepare_step(self, batches, items, device):
        """See `PackedTrainer`."""
        for batch in batches:
            self._trained_samples += len(batch["sample_ids"])
            for name, reason in batch["left_out"]:
                self.note_left_out("train", name, "%s is left out of training: %s", name, reason)
        return batches, items

    def compute_frozen(self, rows) -> None:
        """With `cache_frozen_gib`, compute the vectors of the clips of a `SampleStream`'s replies."""
        if self.args.cache_frozen_gib > 0:
            compute_clips(self, rows)

    def log(self, logs, start_time=None):
        """As in transformers, with the number of samples that were left out."""
        if "loss" in logs or "train_loss" in logs:  # all ranks reach this log together
            count = self.count_left_out("train")
            if count and self.over_ranks(torch.tensor([self._trained_samples])).item() == 0:
                raise ValueError(f"All samples so far were left out ({count} distinct samples); see the warnings.")
            # The summary at the end of training belongs here: after it, the reporters have closed.
            if count and "train_loss" in logs:
                logs["left_out_samples"] = count
                if self.is_world_process_zero():
                    logger.warning("%d distinct samples were left out of training.", count)
        super().log(logs, start_time)

    # ---- Evaluation ----

    def new_sums(self) -> torch.Tensor:
        """Return zeros for the summed loss and the number of targets."""
        return torch.zeros(2, dtype=torch.float64)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Compute the loss of one batch; `evaluation_loop` computes the mean over all."""
        for name, reason in inputs["left_out"]:
            self.note_left_out("eval", name, "%s is left out of the evaluation: %s", name, reason)
        inputs = self._prepare_inputs(inputs)
        inputs = self._without_repeated_samples(inputs)
        loss, sums = evaluate_batch(self, model, inputs)
        self._eval_sums += sums
        return loss, None, None

    def _without_repeated_samples(self, batch: dict) -> dict:
        samples = len(batch["sample_ids"]) + len(batch["left_out"])
        return self.without_repeats(batch, batch["sample_places"], samples, self.accelerator.gradient_state.remainder)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """
        As in transformers, but the loss is the mean over all targets, however they are batched; NaN if none. The number
        of samples that were left out is a further metric, unless it is 0.
        """
        self._left_out["eval"] = set()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.over_ranks(self._eval_sums).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count if count else float("nan")
        left_out = self.count_left_out("eval")
        if left_out:
            output.metrics[f"{metric_key_prefix}_left_out_samples"] = left_out
            if self.is_world_process_zero():
                logger.warning("%d distinct samples were left out of the evaluation.", left_out)
        return output
