"""
Fine-tunes a baseline with LoRA on the dialogue samples that our stage `dialogue` trains on (paper's Sec. 4.3):

    accelerate launch -m empathic.trainers.baseline --config recipes/baselines/chat.yaml

The loss is that of the replies alone. What comes out is an ordinary PEFT adapter, which `adapter=` of
`evaluation/systems.py` loads.
Options on the command line override those of the YAML file.
"""

import os
import sys
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from empathic.data_prep.views import DialogueSamples
from empathic.trainers.baseline_models import baseline_lora_targets, load_baseline, load_processor, longest_input
from empathic.trainers.baseline_prompts import FRAMES_AS, KINDS, BaselinePrompts
from empathic.trainers.feature_cache import MediaDraws
from empathic.trainers.samples import SampleStream, dialogue_sample
from empathic.trainers.stages import check_choice, check_no_smoothing
from empathic.trainers.train import load_splits

logger = logging.get_logger(__name__)


@dataclass
class BaselineArguments:
    """
    What to fine-tune and on what.

    Raises:
        ValueError: for a value outside its choices or range.
    """

    kind: str = field(metadata={"help": f"One of {', '.join(KINDS)}."})
    dataset_name: list[str] = field(metadata={"help": "Folders of `empathic prepare`, or Hub ids."})
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "How often each data set is drawn from; by their sizes if left out."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: list[str] | None = field(
        default_factory=lambda: ["validation"],
        metadata={"help": "Split to evaluate on; of several names the first that a data set has."},
    )
    num_frames: int = field(default=8, metadata={"help": "Kind video: frames of a clip."})
    frames_as: str | None = field(
        default=None,
        metadata={"help": f"Kind video: one of {', '.join(FRAMES_AS)}; a video if the processor has a part for it."},
    )
    frame_draws: int | None = field(
        default=None,
        metadata={"help": "Frames of a clip: one of so many fixed random draws, 0: evenly spaced; None: new ones."},
    )
    reply_speakers: list[str] | None = field(
        default=None, metadata={"help": "Whose replies are trained, such as a corpus's assistant; None: everybody's."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt + reply in tokens: the oldest turns of longer ones are left out."},
    )
    max_eval_samples: int = field(default=500, metadata={"help": "Evaluation samples at most."})

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        for name in ("dataset_name", "eval_split", "reply_speakers"):
            if isinstance(getattr(self, name), str):  # one, in YAML
                setattr(self, name, [getattr(self, name)])
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset_name):
            raise ValueError(
                f"{len(self.dataset_weights)} dataset_weights were given for {len(self.dataset_name)} data sets."
            )


@dataclass
class BaselineConfig(TrainingArguments):
    """Arguments of [`transformers.TrainingArguments`], with the defaults of our stages."""

    learning_rate: float = field(default=1e-4, metadata={"help": "The paper does not give it."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the collator reads whole rows."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Keep True: the loss is what is evaluated."})

    def __post_init__(self):
        check_no_smoothing(self)
        # As in the stages: the stream is shuffled by itself and knows every draw by its number.
        self.train_sampling_strategy = "sequential"
        super().__post_init__()


class BaselineCollator:
    """
    Samples -> a right-padded batch with labels on the replies.

    A clip that cannot be read is left out of its sample, and a sample whose last turn alone is too long is left out of
    its batch; both are reported. If all were, one row of two tokens without a target keeps every rank in step.

    Args:
        prompts: what makes the model's inputs.
        frame_draws: as of `StageCollator`.
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
        if batch is None:
            nothing = torch.full((1, 2), self.prompts.tokenizer.eos_token_id)
            return {"input_ids": nothing, "attention_mask": nothing * 0 + 1, "labels": nothing * 0 - 100}
        return _with_replies(dict(batch), [targets[row] for row in rows], self.prompts.tokenizer.pad_token_id)


def _with_replies(batch: dict, targets: list[list[int]], pad_id: int) -> dict:
    """Puts each reply after its prompt, and the padding from the left of the prompt to the right of the reply."""
    shape, mask = batch["input_ids"].shape, batch["attention_mask"].bool()
    replies = [torch.tensor(target) for target in targets]
    labels = [torch.cat([torch.full((int(n),), -100), r]) for n, r in zip(mask.sum(1), replies, strict=True)]
    batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    for name, values in batch.items():
        if name == "labels" or not torch.is_tensor(values) or values.shape != shape:
            continue  # of clips
        # Of other names, such as token types, a reply has what plain text has: 0.
        added = {"input_ids": replies, "attention_mask": [torch.ones_like(reply) for reply in replies]}
        added = added.get(name, [torch.zeros_like(reply) for reply in replies])
        joined = [torch.cat([row[kept], more]) for row, kept, more in zip(values, mask, added, strict=True)]
        padding = pad_id if name == "input_ids" else 0
        batch[name] = torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=padding)
    return batch


def reply_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """
    Cross-entropy of the labelled tokens, over all of a step's: some models' own loss is a mean over each micro-batch.

    Args:
        outputs: with `logits` (batch, length, vocabulary).
        labels: (batch, length), -100 where nothing is learned.
        num_items_in_batch: labelled tokens of the whole step; those of this batch if None.
    """
    targets = labels[:, 1:]
    wanted = targets != -100
    total = cross_entropy(outputs.logits[:, :-1][wanted].float(), targets[wanted], reduction="sum")
    return total / (wanted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def one_reply(sample: dict, rng) -> dict:
    """A sample of our stage `dialogue` with the history as text."""
    return dialogue_sample(sample, "text", True)


def sources(script: BaselineArguments, data_sets: list[Dataset | None]) -> list[tuple]:
    """The weighted sources of a `SampleStream`, as those of stage `dialogue` without the rebuilding."""
    weights = script.dataset_weights or [None] * len(data_sets)
    views = [rows if rows is None else DialogueSamples(rows, script.reply_speakers) for rows in data_sets]
    pairs = [(view, weight) for view, weight in zip(views, weights, strict=True) if view is not None]
    return [(len(view) if weight is None else weight, view, one_reply) for view, weight in pairs]


def streams(script: BaselineArguments, args: BaselineConfig) -> tuple[SampleStream, SampleStream | None]:
    """The samples to train on, drawn as those of the stages are, and those to evaluate on, if any."""
    found = sources(script, load_splits(script.dataset_name, [script.train_split]))
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = sum(len(view) for _, view, _ in found)
    length = args.max_steps * step if args.max_steps > 0 else round(rows * args.num_train_epochs)
    args.num_train_epochs = 1  # the stream holds all passes over the data
    train = SampleStream(found, length, args.seed)
    if args.eval_strategy == "no" or not script.eval_split:
        return train, None
    found = sources(script, load_splits(script.dataset_name, script.eval_split, optional=True))
    length = min(sum(len(view) for _, view, _ in found), script.max_eval_samples)
    return train, SampleStream(found, length, args.seed + 1, random_frames=False)


def parse(argv: list[str]) -> tuple[BaselineArguments, BaselineConfig, ModelConfig]:
    """The arguments, from `--config FILE` and the command line, which wins."""
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if processes > 1 and not torch.accelerator.is_available() and "--use_cpu" not in argv:
        # The launcher keeps the `use_cpu` of its file to itself, and without it each process would train alone.
        argv = [*argv, "--use_cpu", "True"]
    parsed = TrlParser((BaselineArguments, BaselineConfig, ModelConfig)).parse_args_and_config(args=argv)
    if processes != 1 and parsed[1].world_size != processes:
        raise RuntimeError(f"{processes} processes were started, but each sees {parsed[1].world_size}.")
    if parsed[2].model_name_or_path is None:
        raise ValueError("Name the model to fine-tune with --model_name_or_path.")
    return parsed


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fine-tunes a baseline and saves its adapter; returns the trainer's metrics."""
    script, args, model_args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    options = {"dtype": model_args.dtype or "float32"}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    target = model_args.model_name_or_path
    model = load_baseline(script.kind, target, **options)
    processor = load_processor(script.kind, target)
    reads = longest_input(model)
    longest = min(length for length in (script.max_length, reads, sys.maxsize) if length is not None)
    prompts = BaselinePrompts(processor, script.kind, longest, script.num_frames, script.frames_as)
    model_args.use_peft = True
    peft_config = get_peft_config(model_args)
    peft_config.target_modules = baseline_lora_targets(model, model_args.lora_target_modules)
    model = get_peft_model(model, peft_config)
    model.peft_config["default"].base_model_name_or_path = os.path.abspath(target) if os.path.isdir(target) else target
    for parameter in model.parameters():  # what trains is kept in full precision
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.activation_checkpointing:
        model.enable_input_require_grads()
    train, evaluation = streams(script, args)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=BaselineCollator(prompts, script.frame_draws),
        compute_loss_func=reply_loss,
    )
    resume = args.resume_from_checkpoint
    if resume == "auto":  # the last checkpoint, or a new start where there is none
        resume = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    if evaluation is not None:
        metrics.update(trainer.evaluate())
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    return metrics


if __name__ == "__main__":
    main()
