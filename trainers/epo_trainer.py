"""Emotional Preference Optimization on transformers' Trainer."""

import inspect
import logging
import weakref

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback, set_seed

from empathic.trainers.epo_config import EPOConfig
from empathic.trainers.frozen_outputs import FrozenOutputs, frozen_inputs, is_frozen_key
from empathic.trainers.log_probabilities import are_log_probabilities, log_probabilities_from
from empathic.trainers.losses import epo_loss
from empathic.trainers.preference_collator import IGNORE, PairRows, PreferenceCollator
from empathic.trainers.shared_prefix import CannotShare, drops, enable_pair_layouts, pack_pairs, why_not_packed

logger = logging.getLogger(__name__)

# What a batch holds beside the model's inputs.
_NOT_FOR_MODEL = ("labels", "row_ids", "left_out", "logits_to_keep")
_TEXT = ("input_ids", "attention_mask")
# What is summed over pairs (nll: over tokens), so that averages weigh every pair the same however they are batched.
_SUMS = (
    "pairs",
    "tokens",
    "epo",
    "nll",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class EPOTrainer(Trainer):
    """Trains a model to prefer the chosen reply of each pair, with the autoregressive loss on the chosen beside it.

    `loss = epo_weight * mean over pairs of epo_loss + nll_weight * mean over the chosen tokens of -log p`

    (section 3.4 of the paper). Both means are taken over the whole batch of an optimizer step: all ranks, all
    accumulation steps. So however the batch is divided, the step is the same; and rows that accelerate repeats to
    fill up the last batch of an epoch count once. On a text model and one batch, loss and gradients are those of TRL's
    experimental CPOTrainer with `loss_type="simpo"`, and so are the names and values that are logged.

    A pair's prompt, with its media and memory, is computed once (`share_prompt`), the pairs of a batch are packed into
    one row without padding, and the vocabulary is met at the positions alone that predict a reply's token. Where a
    model cannot do one of these, or sharing would change the result, one line of the log says so, and it is done the
    usual way: loss and gradients are the same.

    Args:
        model: an [`EmpathicForConditionalGeneration`] or any causal language model, or a PEFT model of either.
        args: an [`EPOConfig`].
        train_dataset, eval_dataset: preference rows (`prompt`, `chosen`, `rejected`), conversational or plain, that
            can be indexed; `eval_dataset` may be a dict of such. See [`PreferenceCollator`].
        processing_class: an [`EmpathicProcessor`], or the text model's tokenizer.
        peft_config: makes the model a PEFT model, for example with LoRA.
        data_collator: replaces [`PreferenceCollator`]; it must give the same kind of batch.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError: a data set is empty or not one of preference rows, or every one of its pairs was left out.
        FloatingPointError: a loss is NaN or infinite; the rows of the batch are named.
    """

    # compute_loss divides by what the whole batch holds, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: EPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: PeftConfig | None = None,
        data_collator=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        args = EPOConfig() if args is None else args
        if not isinstance(args, EPOConfig):
            raise TypeError(f"args must be an EPOConfig, not {type(args).__name__}.")
        if processing_class is None:
            raise ValueError("EPOTrainer needs processing_class: the model's processor, or its tokenizer.")
        if peft_config is not None:
            if isinstance(model, PeftModel) or model._hf_peft_config_loaded:
                raise ValueError(
                    "The model has an adapter already, which peft_config would begin anew. To go on training it, load "
                    "the folder with `empathic.trainers.checkpoint.load_model(folder, trainable=True)` and leave out "
                    "peft_config; or merge it first."
                )
            set_seed(args.seed)  # the adapter is initialised at random
            model = get_peft_model(model, peft_config)
        if isinstance(model, PeftModel) and args.activation_checkpointing:
            # Else reentrant checkpoints see no input that needs a gradient, and the adapter gets none.
            model.enable_input_require_grads()
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._head, self._decoder = base.get_output_embeddings(), base.get_decoder()
        if data_collator is None:
            data_collator = PreferenceCollator(processing_class, args.max_length, args.history)
        if train_dataset is not None:
            train_dataset = PairRows(train_dataset, "train", seed=args.seed)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: PairRows(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = PairRows(eval_dataset, "eval")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # get_batch_samples counts tokens and pairs; the Trainer need not count labels too.
        self.model_accepts_loss_kwargs = False
        if train_dataset is not None:
            self.add_callback(_BeforeRows(self))
        self._frozen = None
        if args.cache_frozen_gib > 0:
            if not isinstance(data_collator, PreferenceCollator) or not data_collator.is_multimodal:
                raise ValueError(
                    "cache_frozen_gib takes a model with clips and memory, which a text model has not, and the rows of "
                    "a PreferenceCollator."
                )
            sizes = None if data_collator.cache is None else data_collator.cache.sizes
            self._frozen = FrozenOutputs(processing_class, data_collator.prompt, args.cache_frozen_gib, sizes)
        # What is tried; see _log_probabilities.
        self._skips_logits, self._trusts_head, self._has_dropout = True, False, None
        reason = self._why_not_packed()
        self._packs = reason is None
        if self._packs:
            enable_pair_layouts()
        else:
            logger.warning("The pairs are padded, and each prompt is computed twice: %s.", reason)
        self._train_sums = self._new_sums()
        self._eval_sums = self._new_sums()
        self._left_out: dict[str, set[int]] = {"train": set(), "eval": set()}
        self._pairs_trained = self._pairs_not_trained = 0

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of [`PreferenceCollator`], a scalar.

        Args:
            model: the model, wrapped or not.
            inputs: a batch; it is not changed.
            return_outputs: also return the batch's averages under TRL's names, a dict of floats.
            num_items_in_batch: (2,), the chosen tokens and the pairs of the whole batch over all ranks and
                accumulation steps, given by the training loop. None: this batch is the whole batch.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the rows of the batch are named.
        """
        sums = self._forward(model, inputs)
        if num_items_in_batch is None:
            loss = self._weigh(sums["epo"], sums["pairs"].item(), sums["nll"], sums["tokens"].item())
        else:
            tokens, pairs = num_items_in_batch
            # Gradients are averaged over the ranks, but this rank's share of the whole mean must be added.
            loss = self._weigh(sums["epo"], pairs, sums["nll"], tokens) * self.accelerator.num_processes
            self._train_sums += _detached(sums)
        return (loss, self._averages(_detached(sums))) if return_outputs else loss

    def _weigh(self, epo, pairs, nll, tokens):
        """Sums of both losses and what they are sums over -> the loss."""
        # A batch may hold no pair at all, if every one was left out: then the loss is 0 / 1.
        return self.args.epo_weight * epo / max(pairs, 1) + self.args.nll_weight * nll / max(tokens, 1)

    def _forward(self, model, inputs: dict) -> dict[str, torch.Tensor]:
        """A batch -> its sums (scalars); see `_SUMS`."""
        inputs = self._prepare_inputs(inputs)
        token_logps, lengths = self._log_probabilities(model, inputs)
        summed = torch.stack([part.sum() for part in token_logps.split(lengths)])  # (2 * pairs,)
        lengths = torch.tensor(lengths, device=summed.device)
        chosen_logps, rejected_logps = (summed / lengths.clamp(min=1)).chunk(2)  # (pairs,) each
        self._check_finite(chosen_logps, rejected_logps, inputs["row_ids"])

        losses, chosen_rewards, rejected_rewards = epo_loss(
            chosen_logps, rejected_logps, self.args.beta, self.args.gamma
        )
        chosen_lengths = lengths.chunk(2)[0]
        is_pair = chosen_lengths > 0  # false for pairs that are left out, and for repeats
        per_pair = {
            "pairs": torch.ones_like(losses),
            "tokens": chosen_lengths,
            "epo": losses,
            "nll": -summed.chunk(2)[0],
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        return {name: (values * is_pair).sum() for name, values in per_pair.items()}

    # ---- Log-probabilities ----

    def _why_not_packed(self) -> str | None:
        """Why pairs cannot be packed; None if they can. Also settles `_skips_logits`."""
        reason = None
        if self._head is None:
            reason = "the model has no head of its own"
        elif self.args.n_gpu > 1:
            reason = "torch's DataParallel divides rows; start one process for each GPU instead"
        elif self.args.torch_compile:
            reason = "torch_compile wants the same code and shapes each step"
        elif isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            reason = "the adapter writes tokens of its own before the prompt"
        self._skips_logits = reason is None
        return reason or why_not_packed(self._decoder)

    def _log_probabilities(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]]:
        """Of all targets of a batch (targets,), sequence by sequence, and how many each of the 2 * pairs has.

        The fastest way first; one that proves not to work for the model is not tried again.
        """
        if self._packs:
            try:
                packed = self._packed(model, inputs)
            except CannotShare as reason:
                self._packs = False
                logger.warning("The pairs are padded, and each prompt is computed twice: %s.", reason)
            else:
                if packed is not None:
                    return packed
        if not self._skips_logits:
            return self._from_logits(model, inputs)
        return self._padded(model, inputs) or self._from_logits(model, inputs)

    def _packed(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]] | None:
        """From one row without padding; None if the head's log-probabilities do not come through."""
        share = self.args.share_prompt and not (model.training and self._dropout(model))
        text = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        batch = pack_pairs(*text, share)
        if share and batch.repeats_prompts and _model_inputs(inputs, but=_TEXT):
            share, batch = False, pack_pairs(*text, False)  # the prompts, and perhaps their clips, are not the same
        media = _model_inputs(inputs, but=_TEXT)
        if share:
            rows = slice(len(inputs["row_ids"]))
            media = {key: value[rows] for key, value in media.items()}
        else:  # in the order of the row: chosen and rejected of each pair
            sequences = torch.arange(len(inputs["labels"]), device=inputs["labels"].device).view(2, -1).t().flatten()
            rows = sequences % len(inputs["row_ids"])
            media = {key: value[sequences] for key, value in media.items()}
        media |= frozen_inputs(inputs, rows, packed=True)
        where = (torch.zeros_like(batch.columns), batch.columns)
        logps = self._call(model, {**media, **batch.inputs}, where, batch.targets)
        layers, layout = self._decoder.config.num_hidden_layers, batch.inputs["pair_layout"]
        if layout.attended != layers:
            count = f"{layout.attended} of {layers} layers of {type(self._decoder).__name__} attend pair by pair"
            raise CannotShare(layout.obstacle or count)
        return None if logps is None else (logps, batch.lengths)

    def _padded(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]] | None:
        """From two padded rows a pair; None if the head's log-probabilities do not come through."""
        labels = inputs["labels"][:, 1:]
        where = (labels != IGNORE).nonzero(as_tuple=True)  # each position predicts the token after it
        logps = self._call(model, _padded_inputs(inputs), where, labels[where])
        return None if logps is None else (logps, (labels != IGNORE).sum(1).tolist())

    def _call(self, model, model_inputs: dict, where: tuple, targets: torch.Tensor) -> torch.Tensor | None:
        """The log-probabilities of targets, or None if the model bends them; that is looked at once."""
        count = len(targets)
        if not self._trusts_head and count == 0:  # from nothing it could not be told, and all ranks must tell alike
            where, targets = tuple(index.new_zeros(1) for index in where), targets.new_zeros(1)
        with log_probabilities_from(self._head, where, targets) as given:
            logits = model(**model_inputs, use_cache=False).logits
        if self._trusts_head or are_log_probabilities(logits, given):
            self._trusts_head = True
            return logits[:count]
        self._packs = self._skips_logits = False
        logger.warning("%s changes the logits of its head, so all of them are computed.", type(self._decoder).__name__)
        return None

    def _from_logits(self, model, inputs: dict) -> tuple[torch.Tensor, list[int]]:
        """From the logits of two padded rows a pair."""
        model_inputs = _padded_inputs(inputs)
        if self._takes_logits_to_keep and "logits_to_keep" in inputs:
            model_inputs["logits_to_keep"] = inputs["logits_to_keep"]
        logits = model(**model_inputs, use_cache=False).logits[:, :-1]  # (2 * pairs, kept positions, vocabulary)
        labels = inputs["labels"][:, -logits.shape[1] :]  # (2 * pairs, kept positions), already shifted by one
        is_target = labels != IGNORE
        selected = logits[is_target]  # (targets, vocabulary)
        if selected.dtype != torch.float64:
            selected = selected.float()
        logps = -F.cross_entropy(selected, labels[is_target], reduction="none")
        return logps, is_target.sum(1).tolist()

    def _dropout(self, model) -> bool:
        """Whether the model's dropout is on, so that two runs of a prompt differ. Asked once; one line says so."""
        if self._has_dropout is None:
            self._has_dropout = any(drops(module) for module in model.modules() if module.training)
            if self._has_dropout:
                logger.warning(
                    "The model has dropout, with which a prompt that is computed twice differs each time: in training "
                    "no prompt is shared. Turn dropout off (disable_dropout) to train faster."
                )
        return self._has_dropout

    def _check_finite(self, chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, row_ids: torch.Tensor) -> None:
        is_bad = ~torch.isfinite(chosen_logps.detach() + rejected_logps.detach())
        if is_bad.any():
            raise FloatingPointError(
                f"The loss is NaN or infinite at step {self.state.global_step}, in the batch of the rows "
                f"{row_ids.tolist()}; the cause is in the rows {row_ids[is_bad].tolist()} or in the weights. Look at "
                "those rows, lower the learning rate, or train in bf16 or fp32 instead of fp16."
            )

    # ---- Training ----

    def train(self, *args, **kwargs):
        """As in transformers. ValueError if nothing of the model trains."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "Nothing of the model trains: all its parameters are frozen. A stage's folder loads with a frozen "
                "adapter; load it with `empathic.trainers.checkpoint.load_model(folder, trainable=True)`. Of another "
                "model unfreeze what shall train, or give peft_config."
            )
        self._train_sums = self._new_sums()
        self._left_out["train"] = set()
        self._pairs_trained = self._pairs_not_trained = 0
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and what all ranks' steps hold together: (tokens, pairs)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            # Not accelerate's own remainder: a resumed epoch's loader, which skips batches, has none.
            loader = self.callback_handler.train_dataloader
            remainder = 0 if self.args.dataloader_drop_last else len(self.train_dataset) % loader.total_batch_size
            batches[-1] = self._without_repeats(batches[-1], remainder)
        counts = torch.zeros(3, dtype=torch.long, device=device)
        for batch in batches:
            self._note_left_out(batch, "train")
            is_target = batch["labels"][: len(batch["row_ids"]), 1:] != IGNORE  # of the chosen
            counts += torch.stack(
                [is_target.sum(), is_target.any(1).sum(), torch.tensor(len(batch["left_out"]), device=is_target.device)]
            ).to(device)
        tokens, pairs, left_out = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._pairs_trained += pairs
        self._pairs_not_trained += left_out
        if self._pairs_trained == 0 and self._pairs_not_trained >= len(self.train_dataset):
            raise ValueError(f"Every one of the {len(self.train_dataset)} train pairs was left out; see the warnings.")
        return batches, (tokens, pairs)

    def _without_repeats(self, batch: dict, remainder: int) -> dict:
        """Takes the labels off the rows that accelerate repeats to give every rank a full last batch.

        Those are the ones past `remainder`, counted rank by rank, just as in `Accelerator.gather_for_metrics`.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or remainder <= 0:
            return batch
        pairs = len(batch["row_ids"])
        position = self.accelerator.process_index * pairs + torch.arange(pairs, device=batch["labels"].device)
        is_repeat = (position >= remainder).repeat(2).unsqueeze(1)  # (2 * pairs, 1)
        return {**batch, "labels": batch["labels"].masked_fill(is_repeat, IGNORE)}

    def compute_frozen(self, rows: PairRows, model) -> None:
        """With `cache_frozen_gib`, and unless it was done before: computes what the frozen parts make of the rows."""
        if self._frozen is None or rows.frozen is not None:
            return
        rows.set_epoch(0)  # so a resumed run has the same frames
        args = self.args
        rows.frozen = self._frozen.compute(
            model, rows, self.accelerator, args.per_device_eval_batch_size, args.dataloader_num_workers
        )

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(_as_pair_rows(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(_as_pair_rows(test_dataset, "test"))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._without_repeats(inputs, self.accelerator.gradient_state.remainder)
        self._note_left_out(inputs, "eval")
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self._forward(model, inputs)
        self._eval_sums += _detached(sums)
        return self._weigh(sums["epo"], sums["pairs"].item(), sums["nll"], sums["tokens"].item()), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As in transformers, but the loss and all metrics are means over the whole set, however it is batched."""
        self._eval_sums = self._new_sums()
        self._left_out["eval"] = set()
        if self.is_in_train:  # for one evaluation alone it would not pay
            self.compute_frozen(dataloader.dataset, self.model_wrapped)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._averages_over_ranks(self._eval_sums)
        count = self._report_left_out(metric_key_prefix, dataloader.dataset, "eval")
        if not metrics:
            raise ValueError(
                f"Every one of the {len(dataloader.dataset)} {metric_key_prefix} pairs was left out; see the warnings."
            )
        if count:
            metrics["left_out_pairs"] = count
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    # ---- Logs ----

    def log(self, logs, start_time=None):
        if "loss" in logs:  # the training loop's own; all ranks come here together
            averages = self._averages_over_ranks(self._train_sums)
            logs = {**averages, **logs}
            self._train_sums = self._new_sums()
        # The summary at the end of training; here and not after it, because then the reporters have closed.
        if "train_loss" in logs and (count := self._report_left_out("train", self.train_dataset)):
            logs["left_out_pairs"] = count
        super().log(logs, start_time)

    def _new_sums(self) -> torch.Tensor:
        return torch.zeros(len(_SUMS), dtype=torch.float64)

    def _averages_over_ranks(self, sums: torch.Tensor) -> dict[str, float]:
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        return self._averages(sums)

    def _averages(self, sums: torch.Tensor) -> dict[str, float]:
        """Sums in the order of `_SUMS` -> loss and metrics under TRL's names; {} if there was no pair."""
        total = dict(zip(_SUMS, sums.tolist(), strict=True))
        pairs, tokens = total.pop("pairs"), total.pop("tokens")
        if pairs == 0:
            return {}
        epo, nll = total.pop("epo"), total.pop("nll")
        return {
            "loss": self._weigh(epo, pairs, nll, tokens),
            "nll_loss": nll / tokens,
            **{name: value / pairs for name, value in total.items()},
        }

    def _note_left_out(self, batch: dict, kind: str) -> None:
        for row_id, reason in batch["left_out"]:
            if row_id not in self._left_out[kind]:
                self._left_out[kind].add(row_id)
                logger.warning("%s row %d is left out: %s", kind, row_id, reason)

    def _report_left_out(self, name: str, rows: PairRows, kind: str | None = None) -> int:
        """How many different pairs the ranks left out together; also logged."""
        row_ids = set(gather_object(sorted(self._left_out[kind or name])))
        if row_ids and self.accelerator.is_main_process:
            logger.warning("%d of %d %s pairs were left out.", len(row_ids), len(rows), name)
        return len(row_ids)


class _BeforeRows(TrainerCallback):
    """Tells the rows, and the sampler, which epoch it is, before the epoch's first batch is made; before all, has what
    is frozen computed."""

    def __init__(self, trainer: EPOTrainer):
        # Weak, for the trainer holds this: in a circle it would outlive its use, and accelerate's state its loaders.
        self.trainer = weakref.proxy(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.compute_frozen(self.trainer.train_dataset, self.trainer.model_wrapped)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        epoch = int(state.epoch or 0)
        self.trainer.train_dataset.set_epoch(epoch)
        # A resumed epoch's loader, which skips batches, does not hand it on to the sampler of several processes.
        if train_dataloader is not None:
            train_dataloader.set_epoch(epoch)


def _as_pair_rows(rows, name: str):
    """Rows given to evaluate() or predict(); a name or None stands for the eval_dataset of the constructor."""
    return rows if rows is None or isinstance(rows, str | PairRows) else PairRows(rows, name)


def _model_inputs(inputs: dict, but: tuple[str, ...] = ()) -> dict:
    return {
        key: value for key, value in inputs.items() if key not in (*_NOT_FOR_MODEL, *but) and not is_frozen_key(key)
    }


def _padded_inputs(inputs: dict) -> dict:
    """The model's inputs for two padded rows a pair."""
    rows = torch.arange(len(inputs["row_ids"]), device=inputs["input_ids"].device).repeat(2)
    return _model_inputs(inputs) | frozen_inputs(inputs, rows, packed=False)


def _detached(sums: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([sums[name].detach().float() for name in _SUMS]).cpu().double()
