"""The base of `StageTrainer` and `EPOTrainer`, which computes the log-probabilities of a batch's targets."""

import inspect
import logging
import weakref
from collections import defaultdict

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from .frozen.outputs import is_frozen_key
from .losses import IGNORE_INDEX
from .monitor import Monitor, kept_random_state
from .packing.log_probabilities import are_log_probabilities, log_probabilities_from
from .packing.shared_prefix import CannotShare, PackedBatch, enable_pair_layouts, why_not_packed

logger = logging.getLogger(__name__)

TEXT_KEYS = ("input_ids", "attention_mask")
# Entries of a batch that the model does not take.
_NOT_FOR_MODEL = (
    *("labels", "row_ids", "sample_ids", "sample_places", "targets", "left_out", "logits_to_keep"),
    *("negative_of", "left_out_negatives", "clip_of", "left_out_clips"),
)


def model_inputs(batch: dict, but: tuple[str, ...] = ()) -> dict:
    """The entries of a batch that the model takes as they are, except for the keys in `but`."""
    return {key: value for key, value in batch.items() if key not in (*_NOT_FOR_MODEL, *but) and not is_frozen_key(key)}


def count_on_all_ranks(names: set) -> int:
    """Return the number of distinct names in the sets of all ranks. Every rank must call it."""
    return len(set(gather_object(sorted(names))))


def evaluate_batch(trainer: Trainer, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a batch, and its (summed loss, number of targets) for the mean over all targets."""
    count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().item()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs).detach().mean()
    return loss, torch.tensor([loss.item() * count, count], dtype=torch.float64)


class PackedTrainer(Trainer):
    """
    A `transformers.Trainer` whose losses are computed from the log-probabilities of target tokens.

    A batch is packed into one row without padding, and the language model's head runs only at the positions that
    predict a target. If a model does not support one of these, the log says so in one line, and the batch is padded or
    all logits are computed, with the same loss and gradients. Subclasses define how a batch is packed, how
    log-probabilities become a loss, and the metrics.

    Attributes:
        monitor: measures the training and shows sample replies, see [`Monitor`]; None for no monitoring.
        padded_instead: the log message if rows cannot be packed; the reason follows.
        unit: name of the segments of a packed row that do not attend to each other ("row" or "pair").
    """

    monitor: Monitor | None = None
    padded_instead = "Rows are padded, not packed"
    unit = "row"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._head, self._decoder = base.get_output_embeddings(), base.get_decoder()
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
        # The methods to try; see `log_probabilities`.
        self._skips_logits, self._trusts_head = True, False
        reason = self._why_not_packed()
        self._packs = reason is None
        if self._packs:
            enable_pair_layouts()
        else:
            logger.warning("%s: %s.", self.padded_instead, reason)
        self._left_out: dict[str, set] = defaultdict(set)

    # ---- What subclasses define ----

    def pack(self, model, inputs: dict) -> tuple[PackedBatch, dict]:
        """Return the batch in one row, and the model's other inputs."""
        raise NotImplementedError

    def padded_inputs(self, inputs: dict) -> dict:
        """Return the model's inputs for the batch with one padded row per sequence."""
        raise NotImplementedError

    def prepare_step(self, batches: list[dict], items, device: torch.device) -> tuple[list[dict], object]:
        """Return the micro-batches of an optimizer step, and the `num_items_in_batch` for `compute_loss`."""
        return batches, items

    def new_sums(self) -> torch.Tensor:
        """Return zeros (values,), to which `prediction_step` adds the sums that an evaluation averages."""
        raise NotImplementedError

    def run_model(self, model, inputs: dict):
        """Return the model's output for a batch."""
        return model(**inputs, use_cache=False)

    def compute_frozen(self, rows) -> None:
        """Compute the outputs of frozen parts for a data set, unless already done."""

    # ---- Log-probabilities ----

    def _why_not_packed(self) -> str | None:
        """Return the reason why rows cannot be packed, or None. Also sets `_skips_logits`."""
        reason = None
        if self._head is None:
            reason = "the model has no output embeddings"
        elif self.args.n_gpu > 1:
            reason = "torch's DataParallel splits the rows of a batch; start one process for each GPU instead"
        elif self.args.torch_compile:
            reason = "torch_compile needs the same code and shapes at each step"
        elif isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            reason = "the adapter adds virtual tokens before the prompt"
        self._skips_logits = reason is None
        return reason or why_not_packed(self._decoder)

    def log_probabilities(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]]:
        """
        Compute the log-probabilities (targets,) of all targets of a batch, sequence by sequence, and the number of
        targets of each sequence. The fastest method comes first; a method that fails for the model is not tried again.
        """
        if self._packs:
            try:
                packed = self._packed(model, inputs)
            except CannotShare as reason:
                self._packs = False
                logger.warning("%s: %s.", self.padded_instead, reason)
            else:
                if packed is not None:
                    return packed
        if not self._skips_logits:
            return self._from_logits(model, inputs)
        return self._padded(model, inputs) or self._from_logits(model, inputs)

    def _packed(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]] | None:
        """`log_probabilities` from one row without padding. None if the model changes the output of its head."""
        batch, others = self.pack(model, inputs)
        where = (torch.zeros_like(batch.columns), batch.columns)
        logps = self._call(model, {**others, **batch.inputs}, where, batch.targets)
        layers, layout = self._decoder.config.num_hidden_layers, batch.inputs["pair_layout"]
        if layout.attended != layers:
            unit = self.unit
            count = f"{layout.attended} of {layers} layers of {type(self._decoder).__name__} attend {unit} by {unit}"
            raise CannotShare(layout.obstacle or count)
        return None if logps is None else (logps, batch.lengths)

    def _padded(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]] | None:
        """`log_probabilities` from one padded row per sequence. None if the model changes the output of its head."""
        labels = inputs["labels"][:, 1:]
        where = (labels != IGNORE_INDEX).nonzero(as_tuple=True)  # each position predicts the next token
        logps = self._call(model, self.padded_inputs(inputs), where, labels[where])
        return None if logps is None else (logps, (labels != IGNORE_INDEX).sum(1).tolist())

    def _call(self, model, inputs: dict, where: tuple, targets: torch.Tensor) -> torch.Tensor | None:
        """
        Return the log-probabilities (targets,) that the head computes in place of logits, or None if the model changes
        the output of its head; the first batch shows whether it does.
        """
        count = len(targets)
        if not self._trusts_head and count == 0:  # the check needs an output, and all ranks must decide alike
            where, targets = tuple(index.new_zeros(1) for index in where), targets.new_zeros(1)
        with log_probabilities_from(self._head, where, targets) as given:
            logits = self.run_model(model, inputs).logits
        if self._trusts_head or are_log_probabilities(logits, given):
            self._trusts_head = True
            return logits[:count]
        self._packs = self._skips_logits = False
        logger.warning("%s changes the logits of its head, so all of them are computed.", type(self._decoder).__name__)
        return None

    def _from_logits(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]]:
        """`log_probabilities` from the full logits of one padded row per sequence."""
        given = self.padded_inputs(inputs)
        if self._takes_logits_to_keep and "logits_to_keep" in inputs:
            given["logits_to_keep"] = inputs["logits_to_keep"]
        logits = self.run_model(model, given).logits[:, :-1]  # (sequences, kept positions, vocabulary)
        labels = inputs["labels"][:, -logits.shape[1] :]  # (sequences, kept positions), shifted by one
        is_target = labels != IGNORE_INDEX
        selected = logits[is_target]  # (targets, vocabulary)
        if selected.dtype != torch.float64:
            selected = selected.float()
        logps = -F.cross_entropy(selected, labels[is_target], reduction="none")
        return logps, is_target.sum(1).tolist()

    def not_finite(self, batch: str, cause: str, look_at: str) -> FloatingPointError:
        """Return the error for a loss that is NaN or infinite; the arguments name the batch, cause and remedy."""
        return FloatingPointError(
            f"The loss is NaN or infinite at step {self.state.global_step}, in the batch of {batch}; the cause is "
            f"{cause}. Look at {look_at}, lower the learning rate, or train in bf16 or fp32 instead of fp16."
        )

    # ---- Batches ----

    def train(self, *args, **kwargs):
        """As in transformers."""
        self._left_out["train"] = set()
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of one optimizer step, and their number of items over all ranks."""
        if self.monitor is not None:
            self.monitor.begin_step()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, items = self.prepare_step(batches, items, device)
        if self.monitor is not None:
            for batch in batches:
                self.monitor.count(batch)
        return batches, items

    def without_repeats(self, batch: dict, places: list[int], samples: int, remainder: int) -> dict:
        """
        Mask the labels of samples that accelerate repeats to give every rank a full last batch: the samples past the
        remainder, counted rank by rank as in `Accelerator.gather_for_metrics`.

        Args:
            places: the position of each row of the batch among the samples of this rank.
            samples: the number of samples of this rank, including those that were left out.
            remainder: the number of samples of the last batch that are not repeats.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or remainder <= 0 or not places:
            return batch
        labels = batch["labels"]
        positions = self.accelerator.process_index * samples + torch.tensor(places, device=labels.device)
        return {**batch, "labels": labels.masked_fill((positions >= remainder)[:, None], IGNORE_INDEX)}

    def note_left_out(self, kind: str, key, message: str, *args) -> None:
        """Record a sample, or a part of one, that was left out of `kind` ("train", "eval"), and warn about it once."""
        if key not in self._left_out[kind]:
            self._left_out[kind].add(key)
            logger.warning(message, *args)

    def count_left_out(self, kind: str) -> int:
        """Return the number of distinct samples that were left out on all ranks. Every rank must call it."""
        return count_on_all_ranks(self._left_out[kind])

    # ---- Evaluation and logs ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As in transformers; the random state is kept, so a run that evaluates has the same losses as one without."""
        with kept_random_state():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if self.monitor is not None and eval_dataset is None:
                self.monitor.show_replies()
        return metrics

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        """As in transformers."""
        self._eval_sums = self.new_sums()
        if self.is_in_train:  # a single evaluation would not save time
            self.compute_frozen(dataloader.dataset)
        return super().evaluation_loop(dataloader, description, *args, **kwargs)

    def over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up sums (values,) over all ranks. Every rank must call it."""
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.args.device), reduction="sum")

    def log(self, logs, start_time=None):
        """As in transformers, with the rates of the monitor."""
        if self.monitor is not None and "loss" in logs:  # a log of the training loop, which all ranks reach together
            logs = {**logs, **self.monitor.rates()}
        super().log(logs, start_time)


class ComputeFrozenFirst(TrainerCallback):
    """Computes the outputs of frozen parts for the training rows before training starts."""

    def __init__(self, trainer: PackedTrainer):
        # Weak, because the trainer owns this callback: a reference cycle would keep both in memory.
        self.trainer = weakref.proxy(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.compute_frozen(self.trainer.train_dataset)
