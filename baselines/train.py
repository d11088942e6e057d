"""
Fine-tune a baseline with LoRA on the dialogue samples of our stage `dialogue` (paper's Sec. 4.3):

    accelerate launch -m empathic.baselines.train --config recipes/baselines/chat.yaml

The loss is computed on the replies only. The output is a PEFT adapter for the option `adapter=` of
`evaluation/systems/transformers_model.py`. Options on the command line override those of the YAML file.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import ModelConfig, get_peft_config

from ..data_prep.views import DialogueSamples
from ..files import held_folder
from ..processes import stop_requests
from ..trainers.compat import TrainingArguments
from ..trainers.frozen.feature_cache import MediaDraws
from ..trainers.losses import IGNORE_INDEX
from ..trainers.options import (
    UNUSED_IN_BASELINES,
    OptionParser,
    check_model_options,
    check_training_options,
    revision_of,
)
from ..trainers.packed_trainer import count_on_all_ranks, evaluate_batch
from ..trainers.samples import SampleStream, dialogue_sample
from ..trainers.stages import check_choice, check_no_smoothing, check_whole_rows
from ..trainers.stopping import NOTICE, StopWhenAsked
from ..trainers.train import load_splits, suggestions
from .models import baseline_lora_targets, load_baseline, load_processor, longest_input
from .prompts import BASELINE_KINDS, FRAMES_AS, BaselinePrompts

logger = logging.get_logger(__name__)


@dataclass
class BaselineArguments:
    """
    Arguments for the model kind and the data.

    Raises:
        ValueError: if a value is not among its choices or out of range.
    """

    kind: str = field(metadata={"help": f"One of {', '.join(BASELINE_KINDS)}."})
    dataset_name: list[str] = field(metadata={"help": "Data sets: folders of `empathic prepare`, or Hub ids."})
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "Sampling weight of each data set; by default its size."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: list[str] | None = field(
        default_factory=lambda: ["validation"],
        metadata={"help": "Split to evaluate on; of several names, the first that a data set has."},
    )
    num_frames: int = field(default=8, metadata={"help": "Kind video: frames per clip."})
    frames_as: str | None = field(
        default=None,
        metadata={"help": f"Kind video: one of {', '.join(FRAMES_AS)}; by default video if the processor supports it."},
    )
    frame_draws: int | None = field(
        default=None,
        metadata={"help": "Number of fixed random frame draws per clip; 0: evenly spaced; None: a new draw each time."},
    )
    reply_speakers: list[str] | None = field(
        default=None, metadata={"help": "Speakers whose replies are trained, such as a corpus's assistant; None: all."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum length of prompt + reply in tokens; the oldest turns are left out to fit."},
    )
    max_eval_samples: int = field(default=500, metadata={"help": "Maximum number of evaluation samples."})

    def __post_init__(self):
        check_choice("kind", self.kind, BASELINE_KINDS)
        for name in ("dataset_name", "eval_split", "reply_speakers"):
            if isinstance(getattr(self, name), str):  # YAML allows a single name
                setattr(self, name, [getattr(self, name)])
        if self.max_eval_samples < 1:
            raise ValueError(
                f"max_eval_samples must be at least 1, got {self.max_eval_samples!r}. For no evaluation, give "
                "--eval_strategy no."
            )
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset_name):
            raise ValueError(
                f"There are {len(self.dataset_weights)} dataset_weights for {len(self.dataset_name)} data sets; give "
                "one weight per data set."
            )


@dataclass
class BaselineConfig(TrainingArguments):
    """Arguments of [`transformers.TrainingArguments`], with the defaults of our stages."""

    learning_rate: float = field(default=1e-4, metadata={"help": "The paper does not give it."})
    logging_steps: float = field(default=10, metadata={"help": "Number of steps between two logs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the collator reads whole rows."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Keep True: the evaluation metric is the loss."})

    def __post_init__(self):
        check_no_smoothing(self)
        check_whole_rows(self)
        check_training_options(self, UNUSED_IN_BASELINES)
        # As in the stages: the stream does its own shuffling, and each index determines its draw.
        self.train_sampling_strategy = "sequential"
        super().__post_init__()


class BaselineCollator:
    """
    Collates samples into a right-padded batch with labels on the replies.

    A clip that cannot be read is left out of its sample, and a sample whose last turn alone is too long is left out of
    the batch; both are reported. If no sample is left, the batch is one row of two tokens without labels, to keep all
    ranks in step. A batch without all samples has a further key `left_out`, (place among the samples, id) of each.

    Args:
        prompts: the builder of the model's inputs.
        frame_draws: as in `StageCollator`.
    """

    def __init__(self, prompts: BaselinePrompts, frame_draws: int | None = None):
        self.prompts, self.draws = prompts, MediaDraws(frame_draws)
        self._reported: set[str] = set()

    def __call__(self, samples: list[dict]) -> dict:
        targets = [self.prompts.reply_ids(sample["target"]) for sample in samples]
        draws = [self.draws.generator(sample["messages"], sample["seed"]) for sample in samples]
        messages = [sample["messages"] for sample in samples]
        batch, rows, notes = self.prompts.encode(messages, [len(target) for target in targets], draws)
        for sample, note in zip(samples, notes, strict=True):
            if note is not None and sample["id"] not in self._reported:
                self._reported.add(sample["id"])
                logger.warning("%s: %s", sample["id"], note)
        left_out = [(place, sample["id"]) for place, sample in enumerate(samples) if place not in set(rows)]
        more = {"left_out": left_out} if left_out else {}
        if batch is None:
            nothing = torch.full((1, 2), self.prompts.tokenizer.eos_token_id)
            return {"input_ids": nothing, "attention_mask": nothing * 0 + 1, "labels": nothing * 0 - 100, **more}
        batch = _with_replies(dict(batch), [targets[row] for row in rows], self.prompts.tokenizer.pad_token_id)
        return {**batch, **more}


def _with_replies(batch: dict, targets: list[list[int]], pad_id: int) -> dict:
    """Append the replies to the left-padded prompts, add labels, and pad on the right instead."""
    shape, mask = batch["input_ids"].shape, batch["attention_mask"].bool()
    replies = [torch.tensor(target) for target in targets]
    labels = [torch.cat([torch.full((int(n),), IGNORE_INDEX), r]) for n, r in zip(mask.sum(1), replies, strict=True)]
    batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    for name, values in batch.items():
        if name == "labels" or not torch.is_tensor(values) or values.shape != shape:
            continue  # not a token-level tensor, such as the inputs of a clip
        # In other token-level tensors, such as token types, text tokens have the value 0.
        added = {"input_ids": replies, "attention_mask": [torch.ones_like(reply) for reply in replies]}
        added = added.get(name, [torch.zeros_like(reply) for reply in replies])
        joined = [torch.cat([row[kept], more]) for row, kept, more in zip(values, mask, added, strict=True)]
        padding = pad_id if name == "input_ids" else 0
        batch[name] = torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=padding)
    return batch


def reply_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """
    Cross-entropy of the labeled tokens, divided by the number of labeled tokens in the whole step. The built-in loss of
    some models is instead a mean over each micro-batch.

    Args:
        outputs: model outputs with `logits` (batch, length, vocabulary).
        labels: (batch, length), -100 for tokens without loss.
        num_items_in_batch: number of labeled tokens in the whole step; None to count the labels of this batch.
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORE_INDEX
    total = cross_entropy(outputs.logits[:, :-1][wanted].float(), targets[wanted], reduction="sum")
    return total / (wanted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class BaselineTrainer(Trainer):
    """
    Trains on the batches of `BaselineCollator`.

    The loss of an evaluation is the mean over all targets, however they are batched, and the samples that were left out
    are counted.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=reply_loss, **kwargs)
        self._left_out: dict[str, set] = {"train": set(), "eval": set()}

    def _without_left_out(self, inputs: dict, kind: str) -> dict:
        """The model's inputs; samples that the batch lacks are noted."""
        self._left_out[kind].update(name for _, name in inputs.get("left_out", ()))
        return {name: value for name, value in inputs.items() if name != "left_out"}

    def count_left_out(self, kind: str) -> int:
        """Return the number of distinct samples that were left out on all ranks. Every rank must call it."""
        return count_on_all_ranks(self._left_out[kind])

    def training_step(self, model, inputs, *args, **kwargs):
        """As in transformers."""
        return super().training_step(model, self._without_left_out(inputs, "train"), *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Compute the loss of one batch; `evaluation_loop` computes the mean over all."""
        inputs = self._without_repeats(inputs)
        inputs = self._prepare_inputs(self._without_left_out(inputs, "eval"))
        loss, sums = evaluate_batch(self, model, inputs)
        self._eval_sums += sums
        return loss, None, None

    def _without_repeats(self, batch: dict) -> dict:
        """Mask the labels of samples that accelerate repeats to give every rank a full last batch."""
        state, ranks = self.accelerator.gradient_state, self.accelerator
        if ranks.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        labels, missing = batch["labels"], {place for place, _ in batch.get("left_out", ())}
        there = bool((labels != IGNORE_INDEX).any())
        samples = len(missing) + (len(labels) if there else 0)
        places = torch.tensor([place for place in range(samples) if place not in missing], device=labels.device)
        if not there:
            return batch
        is_repeat = ranks.process_index * samples + places >= state.remainder
        return {**batch, "labels": labels.masked_fill(is_repeat[:, None], IGNORE_INDEX)}

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """As in transformers, but with the mean over all targets (NaN if none) and the samples that were left out."""
        self._eval_sums, self._left_out["eval"] = torch.zeros(2, dtype=torch.float64), set()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._eval_sums
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        total, count = sums.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count if count else float("nan")
        if left_out := self.count_left_out("eval"):
            output.metrics[f"{metric_key_prefix}_left_out_samples"] = left_out
        return output

    def log(self, logs, start_time=None):
        """As in transformers, with the number of samples that were left out of training."""
        if "train_loss" in logs and (left_out := self.count_left_out("train")):
            logs["left_out_samples"] = left_out
        super().log(logs, start_time)


def one_reply(sample: dict, rng) -> dict:
    """Build a sample as in our stage `dialogue`, with the history as text."""
    return dialogue_sample(sample, "text", True)


def sources(script: BaselineArguments, data_sets: list[Dataset | None]) -> list[tuple]:
    """The weighted sources of a `SampleStream`, as in the stage `dialogue` but without memory rebuilding."""
    weights = script.dataset_weights or [None] * len(data_sets)
    views = [rows if rows is None else DialogueSamples(rows, script.reply_speakers) for rows in data_sets]
    pairs = [(view, weight) for view, weight in zip(views, weights, strict=True) if view is not None]
    return [(len(view) if weight is None else weight, view, one_reply) for view, weight in pairs]


def streams(script: BaselineArguments, args: BaselineConfig) -> tuple[SampleStream, SampleStream | None]:
    """The training samples, drawn as in the stages, and the evaluation samples, if any."""
    found = sources(script, load_splits(script.dataset_name, [script.train_split]))
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = sum(len(view) for _, view, _ in found)
    length = args.max_steps * step if args.max_steps > 0 else round(rows * args.num_train_epochs)
    if rows and not length:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs:g}, which is less than one of the {rows} samples. Give "
            "num_train_epochs above 0, or max_steps from 1 up."
        )
    args.num_train_epochs = 1  # the stream already contains all epochs
    train = SampleStream(found, length, args.seed)
    if args.eval_strategy == "no" or not script.eval_split:
        return train, None
    found = sources(script, load_splits(script.dataset_name, script.eval_split, optional=True))
    length = min(sum(len(view) for _, view, _ in found), script.max_eval_samples)
    return train, SampleStream(found, length, args.seed + 1, random_frames=False)


def parse(argv: list[str]) -> tuple[BaselineArguments, BaselineConfig, ModelConfig]:
    """Parse the arguments from `--config FILE` and the command line, which has precedence."""
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if processes > 1 and not torch.accelerator.is_available() and "--use_cpu" not in argv:
        # The launcher does not pass on `use_cpu` from its config file; without it each process would train alone.
        argv = [*argv, "--use_cpu", "True"]
    parsed = OptionParser((BaselineArguments, BaselineConfig, ModelConfig)).parse_args_and_config(args=argv)
    if processes != 1 and parsed[1].world_size != processes:
        raise RuntimeError(f"{processes} processes were started, but each process sees {parsed[1].world_size}.")
    if parsed[2].model_name_or_path is None:
        raise ValueError("Name the model to fine-tune with --model_name_or_path.")
    check_model_options(parsed[2], quantizes=False)
    return parsed


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fine-tune a baseline and save its adapter; return the trainer's metrics."""
    with suggestions(BaselineArguments, BaselineConfig, ModelConfig):
        script, args, model_args = parse(sys.argv[1:] if argv is None else argv)
    with held_folder(args.output_dir, "baseline training") if args.process_index == 0 else nullcontext():
        return train_baseline(script, args, model_args)


def train_baseline(script: BaselineArguments, args: BaselineConfig, model_args: ModelConfig) -> dict[str, float]:
    """Fine-tune a baseline with parsed arguments, see `main`."""
    train, evaluation = streams(script, args)  # before the model is loaded
    set_seed(args.seed)
    options = {"dtype": model_args.dtype or "float32"}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    target = model_args.model_name_or_path
    revision = revision_of(model_args)
    model = load_baseline(script.kind, target, revision=revision, **options)
    processor = load_processor(script.kind, target, revision)
    reads = longest_input(model)
    longest = min(length for length in (script.max_length, reads, sys.maxsize) if length is not None)
    prompts = BaselinePrompts(processor, script.kind, longest, script.num_frames, script.frames_as)
    model_args.use_peft = True
    peft_config = get_peft_config(model_args)
    peft_config.target_modules = baseline_lora_targets(model, model_args.lora_target_modules)
    model = get_peft_model(model, peft_config)
    model.peft_config["default"].base_model_name_or_path = os.path.abspath(target) if os.path.isdir(target) else target
    model.peft_config["default"].revision = revision
    for parameter in model.parameters():  # trained parameters stay in full precision
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.activation_checkpointing:
        model.enable_input_require_grads()
    trainer = BaselineTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=BaselineCollator(prompts, script.frame_draws),
    )
    resume = args.resume_from_checkpoint
    if resume == "auto":  # the last checkpoint, or a new run if there is none
        resume = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    with stop_requests(NOTICE) as request:
        trainer.add_callback(StopWhenAsked(request, args.device))
        result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    if evaluation is not None:
        metrics.update(trainer.evaluate())
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    return metrics
