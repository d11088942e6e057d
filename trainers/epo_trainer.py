"""The trainer for Emotional Preference Optimization, built on transformers' Trainer."""

import json
import logging
import os
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)

from ..composition_empathic import ADAPTER_CONFIG, STAGE_FILE, find_file
from ..configuration_empathic import EmpathicConfig
from ..data_prep.loading import NEGATIVES, negatives_limit
from ..files import clean_path
from ..modeling_empathic import EmpathicPreTrainedModel
from ..processing_empathic import EmpathicProcessor
from .checkpoints.stage_folder import load_model
from .epo_config import EPOConfig
from .frozen.outputs import FrozenOutputs, frozen_inputs
from .losses import IGNORE_INDEX, epo_loss, epo_loss_over_negatives
from .packed_trainer import TEXT_KEYS, ComputeFrozenFirst, PackedTrainer, model_inputs
from .packing.shared_prefix import PackedBatch, disable_dropout, drops, pack_pairs
from .preference_collator import PairRows, PreferenceCollator
from .stages import aim_at_language_model

logger = logging.getLogger(__name__)

# Averages over the pairs; with several rejected replies, of the mean over those of a pair.
_PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# Averages over the pairs with a preference over the clip.
_CLIP_METRICS = ("rewards/clip_accuracies", "rewards/clip_margins")
# What is summed over pairs (nll: over tokens), so that averages weigh every pair equally however they are batched.
_SUMS = ("pairs", "tokens", "clips", "epo", "nll", "clip", *_PAIR_METRICS, *_CLIP_METRICS)


class EPOTrainer(PackedTrainer):
    """Trains a model to prefer the chosen reply of each pair, with an autoregressive loss on the chosen reply.

    `loss = epo_weight * mean over pairs of epo_loss + nll_weight * mean over the chosen tokens of -log p`

    (section 3.4 of the paper). Both means are taken over the whole batch of an optimizer step, that is over all ranks
    and accumulation steps. The step therefore does not depend on how the batch is divided, and rows that accelerate
    repeats to fill the last batch of an epoch count once. On a text model and one batch, the loss and gradients equal
    those of TRL's experimental CPOTrainer with `loss_type="simpo"`, and so do the names and values in the logs.

    With several rejected replies of a row (`negatives`), its preference loss is that of `epo_loss_over_negatives`. With
    `clip_negatives`, `clip_weight * mean of epo_loss(chosen reply, chosen reply after the prompt with other clips)` is
    added, a mean over the rows of the whole batch that have other clips.

    A pair's prompt, with its media and memory, is computed once (`share_prompt`), the pairs of a batch are packed into
    one row without padding, and logits are computed only at positions that predict a token of a reply. If a model does
    not support one of these, or sharing would change the result, the log says so in one line, and the trainer falls
    back to the usual computation, with the same loss and gradients.

    Args:
        model: an [`EmpathicForConditionalGeneration`] or any causal language model, or a PEFT model of either; or the
            name (folder or Hub id) of one, which is loaded with `args.model_init_kwargs`. A stage's adapter is trained
            further.
        args: an [`EPOConfig`].
        train_dataset, eval_dataset: preference rows (`prompt`, `chosen`, `rejected`), conversational or plain, that
            can be indexed; `eval_dataset` may be a dict of data sets. See [`PreferenceCollator`].
        processing_class: an [`EmpathicProcessor`], or the text model's tokenizer; may be left out if `model` is a name.
        peft_config: adds an adapter to the model, for example LoRA. In an [`EmpathicForConditionalGeneration`], a list
            of target modules, or "all-linear", means those of the language model; to adapt other parts, give a regular
            expression.
        data_collator: replaces [`PreferenceCollator`]; it must return the same kind of batch.
        callbacks, optimizers: as in [`transformers.Trainer`].

    Raises:
        ValueError: if a data set is empty or has no preference rows, or if all its pairs were left out.
        FloatingPointError: if a loss is NaN or infinite; the message names the rows of the batch.
    """

    args: EPOConfig
    padded_instead = "The pairs are padded, and each prompt is computed twice"
    unit = "pair"
    # compute_loss divides by the counts of the whole batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
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
        if isinstance(model, (str, os.PathLike)):
            model, processing_class = _load(clean_path(os.fspath(model)), args.model_init_kwargs, processing_class)
        elif args.model_init_kwargs is not None:
            raise ValueError(
                f"model_init_kwargs is {args.model_init_kwargs!r}, but the model is already loaded. Leave "
                "model_init_kwargs out, or give the name of the model."
            )
        if processing_class is None:
            raise ValueError("EPOTrainer needs processing_class: the model's processor, or its tokenizer.")
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel):
            raise TypeError(
                f"model is a {type(model).__name__}. Give a causal language model of transformers, a PEFT model, or "
                "the name (folder or Hub id) of one."
            )
        is_ours = isinstance(base, EmpathicPreTrainedModel)
        if args.use_liger_kernel and is_ours:
            raise ValueError(
                "use_liger_kernel is True, but its kernels do not know this model. Leave use_liger_kernel out."
            )
        if peft_config is not None:
            if isinstance(model, PeftModel) or model._hf_peft_config_loaded:
                raise ValueError(
                    "The model already has an adapter, which peft_config would replace with a new one. To continue "
                    "training this adapter, load the folder with `empathic.trainers.checkpoints.load_model(folder, "
                    "trainable=True)` and leave out peft_config; or merge the adapter first."
                )
            if is_ours:
                peft_config = aim_at_language_model(peft_config)
            if args.disable_dropout and getattr(peft_config, "lora_dropout", 0) > 0:
                logger.warning(
                    "lora_dropout is %s, but disable_dropout sets it to 0. Set disable_dropout=False to keep it.",
                    peft_config.lora_dropout,
                )
            set_seed(args.seed)  # the adapter is initialized at random
            model = get_peft_model(model, peft_config)
        if isinstance(model, PeftModel) and args.activation_checkpointing:
            # Otherwise reentrant checkpoints see no input that requires a gradient, and the adapter gets no gradient.
            model.enable_input_require_grads()
        if args.disable_dropout:
            disable_dropout(model, base.get_decoder())
        if data_collator is None:
            negatives = negatives_limit(args.negatives)
            data_collator = PreferenceCollator(processing_class, args.max_length, args.history, negatives=negatives)
        self._multimodal = isinstance(processing_class, ProcessorMixin)
        self._clip_negatives = args.clip_negatives
        _check_data(args, data_collator, self._multimodal, train_dataset)
        if train_dataset is not None:
            train_dataset = PairRows(train_dataset, "train", args.seed, self._multimodal, self._clip_negatives)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._pair_rows(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._pair_rows(eval_dataset, "eval")
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
            self.add_callback(ComputeFrozenFirst(self))
            self.add_callback(_SetEpoch(train_dataset))
        self._frozen = None
        if args.cache_frozen_gib > 0:
            if not isinstance(data_collator, PreferenceCollator) or not data_collator.is_multimodal:
                raise ValueError(
                    "cache_frozen_gib needs a multimodal model and the rows of a PreferenceCollator: a text model has "
                    "no clips and no memory to cache. Leave cache_frozen_gib out."
                )
            sizes = None if data_collator.cache is None else data_collator.cache.sizes
            self._frozen = FrozenOutputs(processing_class, data_collator.prompt, args.cache_frozen_gib, sizes)
        self._has_dropout = None
        self._train_sums = self.new_sums()
        self._eval_sums = self.new_sums()
        self._pairs_trained = self._pairs_not_trained = 0

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a batch of [`PreferenceCollator`], a scalar.

        Args:
            model: the model, wrapped or not.
            inputs: a batch; it is not changed.
            return_outputs: also return the batch's averages under TRL's names, a dict of floats.
            num_items_in_batch: (3,), the numbers of chosen tokens, of pairs, and of pairs with a preference over the
                clip, in the whole batch over all ranks and accumulation steps, given by the training loop. None: this
                batch is the whole batch.

        Raises:
            FloatingPointError: if the loss is NaN or infinite; the message names the rows of the batch.
        """
        sums = self._forward(model, inputs)
        if num_items_in_batch is None:
            loss = self._weigh(sums, *(sums[name].item() for name in ("tokens", "pairs", "clips")))
        else:
            # Gradients are averaged over the ranks, but the shares of the whole mean must be summed.
            loss = self._weigh(sums, *num_items_in_batch) * self.accelerator.num_processes
            self._train_sums += _detached(sums)
        return (loss, self._averages(_detached(sums))) if return_outputs else loss

    def _weigh(self, sums, tokens, pairs, clips):
        """Compute the loss from the sums `epo`, `nll` and `clip`, and the numbers of what they are sums over."""
        # A batch has no pair if all its pairs were left out: then the loss is 0 / 1.
        args = self.args
        loss = args.epo_weight * sums["epo"] / max(pairs, 1) + args.nll_weight * sums["nll"] / max(tokens, 1)
        return loss + args.clip_weight * sums["clip"] / max(clips, 1) if args.clip_negatives else loss

    def _forward(self, model, inputs: dict) -> dict[str, torch.Tensor]:
        """Run a batch and return its sums (scalars) by the names in `_SUMS`."""
        inputs = self._prepare_inputs(inputs)
        token_logps, lengths = self.log_probabilities(model, inputs)
        summed = torch.stack([part.sum() for part in token_logps.split(lengths)])  # (sequences,)
        lengths = torch.tensor(lengths, device=summed.device)
        counts = _counts(inputs)
        pairs = counts[0]
        chosen_logps, rejected_logps, further_logps, clip_logps = (summed / lengths.clamp(min=1)).split(counts)
        rejected_logps, present = _table(rejected_logps, further_logps, inputs.get("negative_of"))  # (pairs, negatives)
        clip_of = inputs.get("clip_of", lengths[:0])
        self._check_finite(chosen_logps, rejected_logps, clip_logps, inputs["row_ids"], clip_of)

        args = self.args
        losses, chosen_rewards, rejected_rewards = epo_loss_over_negatives(
            chosen_logps, rejected_logps, args.beta, args.gamma, args.negatives_loss, present
        )
        margins = chosen_rewards[:, None] - rejected_rewards

        def mean(values: torch.Tensor) -> torch.Tensor:  # over the rejected replies of each pair
            return (values * present).sum(1) / present.sum(1)

        is_pair = lengths[:pairs] > 0  # false for pairs that are left out, and for repeated pairs
        per_pair = {
            "pairs": torch.ones_like(losses),
            "tokens": lengths[:pairs],
            "epo": losses,
            "nll": -summed[:pairs],
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": mean(rejected_rewards),
            "rewards/accuracies": mean((chosen_rewards[:, None] > rejected_rewards).float()),
            "rewards/margins": mean(margins),
            "logps/chosen": chosen_logps,
            "logps/rejected": mean(rejected_logps),
        }
        clip_losses, true_rewards, clip_rewards = epo_loss(chosen_logps[clip_of], clip_logps, args.beta, args.gamma)
        is_clip = lengths[len(lengths) - counts[3] :] > 0
        per_clip = {
            "clips": torch.ones_like(clip_losses),
            "clip": clip_losses,
            "rewards/clip_accuracies": (true_rewards > clip_rewards).float(),
            "rewards/clip_margins": true_rewards - clip_rewards,
        }
        sums = {name: (values * is_pair).sum() for name, values in per_pair.items()}
        return sums | {name: (values * is_clip).sum() for name, values in per_clip.items()}

    def pack(self, model, inputs: dict) -> tuple[PackedBatch, dict]:
        """See `PackedTrainer`."""
        share = self.args.share_prompt and not (model.training and self._dropout(model))
        text = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        groups, others = _groups(inputs), model_inputs(inputs, but=TEXT_KEYS)
        batch = pack_pairs(*text, share, groups)
        if share and batch.repeats_prompts and others:
            share, batch = False, pack_pairs(*text, False, groups)  # a pair's prompts, and perhaps their clips, differ
        # In the order of the packed row: with shared prompts one sequence of each, otherwise all.
        sequences = [sequence for group in groups for sequence in (group[:1] if share else group)]
        sequences = torch.tensor(sequences, device=inputs["labels"].device)
        others = {key: value[sequences] for key, value in others.items()}
        return batch, others | frozen_inputs(inputs, _prompt_of(inputs)[sequences], packed=True)

    def padded_inputs(self, inputs: dict) -> dict:
        """See `PackedTrainer`: a padded row for each sequence."""
        return model_inputs(inputs) | frozen_inputs(inputs, _prompt_of(inputs), packed=False)

    def _dropout(self, model) -> bool:
        """Whether the model has active dropout, so that two runs of a prompt differ. Checked and logged once."""
        if self._has_dropout is None:
            self._has_dropout = any(drops(module) for module in model.modules() if module.training)
            if self._has_dropout:
                logger.warning(
                    "The model has dropout, so a prompt differs each time it is computed: in training no prompt is "
                    "shared. Turn dropout off (disable_dropout) to train faster."
                )
        return self._has_dropout

    def _check_finite(self, chosen_logps, rejected_logps, clip_logps, row_ids, clip_of) -> None:
        sums = chosen_logps.detach() + rejected_logps.detach().sum(1)
        is_bad = ~torch.isfinite(sums.index_add(0, clip_of, clip_logps.detach()))
        if is_bad.any():
            cause = f"in the rows {row_ids[is_bad].tolist()} or in the weights"
            raise self.not_finite(f"the rows {row_ids.tolist()}", cause, "those rows")

    # ---- Training ----

    def train(self, *args, **kwargs):
        """As in transformers. Raises a ValueError if no parameter is trainable."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "The model has no trainable parameter: all its parameters are frozen. A stage's folder loads with a "
                "frozen adapter by default; load it with `empathic.trainers.checkpoints.load_model(folder, "
                "trainable=True)`. For any other model unfreeze the parameters to train, or give peft_config."
            )
        self._train_sums = self.new_sums()
        self._pairs_trained = self._pairs_not_trained = 0
        for kind in ("train negatives", "train clips"):
            self._left_out[kind] = set()
        return super().train(*args, **kwargs)

    def prepare_step(self, batches, items, device):
        """See `PackedTrainer`: the items are the numbers over all ranks that `compute_loss` takes."""
        if batches:
            # Accelerate's own remainder is missing in the loader of a resumed epoch, which skips batches.
            loader = self.callback_handler.train_dataloader
            remainder = 0 if self.args.dataloader_drop_last else len(self.train_dataset) % loader.total_batch_size
            batches[-1] = self._without_repeated_pairs(batches[-1], remainder)
        counts = torch.zeros(4, dtype=torch.long, device=device)
        for batch in batches:
            self._note_left_out(batch, "train")
            is_target = batch["labels"][:, 1:] != IGNORE_INDEX
            sequences = _counts(batch)
            chosen, clips = is_target[: sequences[0]], is_target[len(is_target) - sequences[3] :]
            left_out = torch.tensor(len(batch["left_out"]), device=is_target.device)
            counts += torch.stack([chosen.sum(), chosen.any(1).sum(), clips.any(1).sum(), left_out]).to(device)
        tokens, pairs, clips, left_out = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._pairs_trained += pairs
        self._pairs_not_trained += left_out
        if self._pairs_trained == 0 and self._pairs_not_trained >= len(self.train_dataset):
            raise ValueError(f"All of the {len(self.train_dataset)} train pairs were left out; see the warnings.")
        return batches, (tokens, pairs, clips)

    def _without_repeated_pairs(self, batch: dict, remainder: int) -> dict:
        pairs = len(batch["row_ids"])
        places = [*range(pairs)] * 2  # the pair of each sequence
        for name in ("negative_of", "clip_of"):
            places += batch[name].tolist() if name in batch else []
        return self.without_repeats(batch, places, pairs, remainder)

    def compute_frozen(self, rows: PairRows) -> None:
        """With `cache_frozen_gib`, compute the outputs of the frozen parts for the prompts of the rows."""
        if self._frozen is None or rows.frozen is not None:
            return
        rows.set_epoch(0)  # so that a resumed run has the same frames
        args = self.args
        rows.frozen = self._frozen.compute(
            self.model_wrapped, rows, self.accelerator, args.per_device_eval_batch_size, args.dataloader_num_workers
        )

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(self._pair_rows(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(self._pair_rows(test_dataset, "test"))

    def _pair_rows(self, rows, name: str):
        """Wrap rows for evaluation; a name or None means the eval_dataset of the constructor."""
        if rows is None or isinstance(rows, str | PairRows):
            return rows
        return PairRows(rows, name, multimodal=self._multimodal, clip_negatives=self._clip_negatives)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._without_repeated_pairs(inputs, self.accelerator.gradient_state.remainder)
        self._note_left_out(inputs, "eval")
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self._forward(model, inputs)
        self._eval_sums += _detached(sums)
        return self._weigh(sums, *(sums[name].item() for name in ("tokens", "pairs", "clips"))), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As in transformers, but the loss and all metrics are means over the whole data set, however it is batched."""
        for kind in ("eval", "eval negatives", "eval clips"):
            self._left_out[kind] = set()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._averages(self.over_ranks(self._eval_sums))
        left_out = self._report_left_out(metric_key_prefix, dataloader.dataset, "eval")
        if not metrics:
            raise ValueError(
                f"All of the {len(dataloader.dataset)} {metric_key_prefix} pairs were left out; see the warnings."
            )
        metrics |= left_out
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    # ---- Logs ----

    def log(self, logs, start_time=None):
        if "loss" in logs:  # a log of the training loop, which all ranks reach together
            averages = self._averages(self.over_ranks(self._train_sums))
            logs = {**averages, **logs}
            self._train_sums = self.new_sums()
        # The summary at the end of training belongs here: after it, the reporters have closed.
        if "train_loss" in logs:
            logs |= self._report_left_out("train", self.train_dataset, "train")
        super().log(logs, start_time)

    def new_sums(self) -> torch.Tensor:
        """Return a zero for each of `_SUMS`."""
        return torch.zeros(len(_SUMS), dtype=torch.float64)

    def _averages(self, sums: torch.Tensor) -> dict[str, float]:
        """Compute loss and metrics, under TRL's names, from sums in the order of `_SUMS`; {} if there was no pair."""
        total = dict(zip(_SUMS, sums.tolist(), strict=True))
        pairs, tokens, clips = total["pairs"], total["tokens"], total["clips"]
        if pairs == 0:
            return {}
        return {
            "loss": self._weigh(total, tokens, pairs, clips),
            "nll_loss": total["nll"] / tokens,
            **{name: total[name] / pairs for name in _PAIR_METRICS},
            **({name: total[name] / clips for name in _CLIP_METRICS} if clips else {}),
        }

    def _note_left_out(self, batch: dict, kind: str) -> None:
        for row_id, reason in batch["left_out"]:
            self.note_left_out(kind, row_id, "%s row %d is left out: %s", kind, row_id, reason)
        for row_id, number, reason in batch.get("left_out_negatives", ()):
            message = "%s row %d: rejected reply %d is left out: %s"
            self.note_left_out(f"{kind} negatives", (row_id, number), message, kind, row_id, number, reason)
        for row_id, reason in batch.get("left_out_clips", ()):
            message = "%s row %d: the clip of another emotion is left out: %s"
            self.note_left_out(f"{kind} clips", row_id, message, kind, row_id, reason)

    def _report_left_out(self, name: str, rows: PairRows, kind: str) -> dict[str, int]:
        """Count what was left out over all ranks, log the numbers, and return those that are not 0."""
        found = {"left_out_pairs": self.count_left_out(kind)}
        is_main = self.accelerator.is_main_process
        if found["left_out_pairs"] and is_main:
            logger.warning("%d of %d %s pairs were left out.", found["left_out_pairs"], len(rows), name)
        if self.args.negatives != "lowest":
            found["left_out_negatives"] = count = self.count_left_out(f"{kind} negatives")
            if count and is_main:
                logger.warning("%d rejected replies of the %s pairs were left out.", count, name)
        if self.args.clip_negatives:
            found["left_out_clips"] = count = self.count_left_out(f"{kind} clips")
            if count and is_main:
                logger.warning("%d %s pairs drew a clip of another emotion that cannot be used.", count, name)
        return {key: count for key, count in found.items() if count}


class _SetEpoch(TrainerCallback):
    """Sets the epoch of the rows and of the sampler before the epoch's first batch is made."""

    def __init__(self, rows: PairRows):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        epoch = int(state.epoch or 0)
        self.rows.set_epoch(epoch)
        # The loader of a resumed epoch, which skips batches, does not pass the epoch on to a distributed sampler.
        if train_dataloader is not None:
            train_dataloader.set_epoch(epoch)


def _check_data(args: EPOConfig, collator, multimodal: bool, train_dataset) -> None:
    """Raise a ValueError for settings that the model or the collator does not support; warn if `negatives` is idle."""
    if args.clip_negatives and not multimodal:
        raise ValueError("clip_negatives is on, but a text model reads no clips. Leave clip_negatives out.")
    if not isinstance(collator, PreferenceCollator):
        return
    limit = negatives_limit(args.negatives)
    if collator.negatives != limit:
        raise ValueError(
            f"negatives is {args.negatives!r}, but the data_collator has negatives={collator.negatives!r}. Give the "
            f"collator negatives={limit!r}."
        )
    columns = getattr(train_dataset, "column_names", None)
    if columns is None and isinstance(train_dataset, list):
        columns = {key for row in train_dataset for key in row}
    if limit != 1 and columns is not None and NEGATIVES not in columns:
        logger.warning(
            "negatives is %s, but the train data set has no column negatives, so each row has one rejected reply. "
            "`empathic counter --negatives all` writes the column.",
            args.negatives,
        )


# ---- The sequences of a batch ----


def _counts(batch: dict) -> list[int]:
    """The numbers of sequences of a batch, in order: chosen, rejected, further rejected, chosen with other clips."""
    pairs = len(batch["row_ids"])
    return [pairs, pairs, *(len(batch[name]) if name in batch else 0 for name in ("negative_of", "clip_of"))]


def _groups(batch: dict) -> list[list[int]]:
    """The sequences of each pair, the chosen one first, and then each sequence with other clips, as `pack_pairs`."""
    pairs, _, further, clips = _counts(batch)
    groups = [[pair, pairs + pair] for pair in range(pairs)]
    if further:
        for number, pair in enumerate(batch["negative_of"].tolist()):
            groups[pair].append(2 * pairs + number)
    return groups + [[2 * pairs + further + number] for number in range(clips)]


def _prompt_of(batch: dict) -> torch.Tensor:
    """The prompt of each sequence (sequences,), as an index into the pairs and then the sequences with other clips."""
    pairs, _, _, clips = _counts(batch)
    own = torch.arange(pairs + clips, device=batch["labels"].device)
    return torch.cat([own[:pairs], own[:pairs], batch.get("negative_of", own[:0]), own[pairs:]])


def _table(first: torch.Tensor, further: torch.Tensor, pair_of) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Arrange the rejected replies' values: the first of each pair (pairs,) and the further ones, pair by pair, as a table
    (pairs, negatives) and where it has a value, False in its padding.
    """
    if len(further) == 0:
        return first[:, None], torch.ones_like(first[:, None], dtype=torch.bool)
    counts = torch.bincount(pair_of, minlength=len(first))
    column = 1 + torch.arange(len(further), device=first.device) - (counts.cumsum(0) - counts)[pair_of]
    padding = first.new_zeros(len(first), int(counts.max()))
    table = torch.cat([first[:, None], padding.index_put((pair_of, column - 1), further)], dim=1)
    return table, torch.arange(table.shape[1], device=first.device) <= counts[:, None]


def _load(name: str, options: dict | None, processing_class) -> tuple:
    """
    Load a model by its name, and its processor or tokenizer unless there is one: a model or stage of this project, or
    any causal language model. An adapter is loaded for training.
    """
    options = {"dtype": "float32", **(options or {})}
    hub = {key: options[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in options}
    file = find_file(name, "config.json", **hub)
    config = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    is_ours = config.get("model_type") == EmpathicConfig.model_type or find_file(name, STAGE_FILE, **hub) is not None
    if is_ours:
        model = load_model(name, trainable=True, **options)
    elif find_file(name, ADAPTER_CONFIG, **hub) is not None:
        model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    if processing_class is None:
        processing_class = (EmpathicProcessor if is_ours else AutoTokenizer).from_pretrained(name, **hub)
    return model, processing_class


def _detached(sums: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([sums[name].detach().float() for name in _SUMS]).cpu().double()
