"""
Trains one of the five stages:

    accelerate launch -m empathic.trainers.train --config recipes/tiny/emotion.yaml

`empathic train --config ...` is the same. Options on the command line override those of the YAML file.
"""

import sys
from dataclasses import dataclass, field
from functools import partial

import yaml
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from empathic.composition_empathic import read_stage, resolve_base
from empathic.data_prep.views import DialogueSamples, EmotionClips, conversations, utterances
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers.checkpoint import StageRecord, StageSaving, StageTrainer, load_model, new_tensors
from empathic.trainers.epo_config import EPOConfig
from empathic.trainers.epo_trainer import EPOTrainer
from empathic.trainers.samples import (
    SampleStream,
    StageCollator,
    dialogue_sample,
    draw_utterances,
    emotion_sample,
    rebuild_sample,
)
from empathic.trainers.stages import LORA_STAGES, STAGES, StageConfig, check_choice, freeze_for_stage, lora_targets

logger = logging.get_logger(__name__)

PARTS = ("text", "vision", "audio", "memory")


@dataclass
class ScriptArguments:
    """
    What to train and on what.

    Raises:
        ValueError: for an unknown stage, or weights that do not match the data sets.
    """

    stage: str = field(metadata={"help": f"One of {', '.join(STAGES)}."})
    dataset_name: list[str] = field(metadata={"help": "Folders of `empathic prepare`, or Hub ids."})
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "How often each data set is drawn from; by their sizes if left out."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default="validation", metadata={"help": "Split to evaluate on."})
    text: str | None = field(default=None, metadata={"help": "Causal LM that a new model is composed of."})
    vision: str | None = field(default=None, metadata={"help": "CLIP model that a new model is composed of."})
    audio: str | None = field(default=None, metadata={"help": "Whisper model that a new model is composed of."})
    memory: str | None = field(default=None, metadata={"help": "Mamba model that a new model is composed of."})
    num_query_tokens: int = field(default=32, metadata={"help": "New model: queries of each Q-former."})
    num_frames: int = field(default=8, metadata={"help": "New model: frames of a clip."})
    qformer_layers: int = field(default=6, metadata={"help": "New model: layers of each Q-former."})
    qformer_heads: int = field(default=8, metadata={"help": "New model: attention heads of each Q-former."})
    qformer_width: int = field(default=768, metadata={"help": "New model: hidden size of each Q-former."})
    qformer_dropout: float = field(default=0.1, metadata={"help": "New model: dropout of each Q-former."})
    qformer_init: float = field(
        default=0.02, metadata={"help": "New model: standard deviation of a Q-former's weights at the start."}
    )
    max_audio_seconds: float = field(default=120.0, metadata={"help": "New model: sound past this is cut."})
    with_text: bool = field(default=False, metadata={"help": "New model: whether task emotion shows the sentence."})

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset_name):
            raise ValueError(
                f"{len(self.dataset_weights)} dataset_weights were given for {len(self.dataset_name)} data sets."
            )


class EPOStageTrainer(StageSaving, EPOTrainer):
    """`EPOTrainer` whose folders name their stage and base."""


def parse(argv: list[str]) -> tuple[ScriptArguments, StageConfig | EPOConfig, ModelConfig]:
    """Arguments from `--config FILE` and the command line, which wins. The stage decides which ones there are."""
    stage = argv[argv.index("--stage") + 1] if "--stage" in argv[:-1] else None
    if stage is None and "--config" in argv[:-1]:
        with open(argv[argv.index("--config") + 1], encoding="utf-8") as file:
            stage = yaml.safe_load(file).get("stage")
    config = EPOConfig if stage == "epo" else StageConfig
    return TrlParser((ScriptArguments, config, ModelConfig)).parse_args_and_config(args=argv)


def build_model(script: ScriptArguments, model_args: ModelConfig):
    """The model, its processor, and the base that the stage's folder will name."""
    options = {"dtype": model_args.dtype or "float32"}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    path = model_args.model_name_or_path
    if path is not None:
        model = load_model(path, trainable=script.stage in LORA_STAGES, **options)
        # An adapter that goes on training keeps its own base.
        base = resolve_base(path, read_stage(path)["base"]) if isinstance(model, PeftModel) else path
        return model, EmpathicProcessor.from_pretrained(path), base
    if script.stage in LORA_STAGES:
        raise ValueError(f"Stage {script.stage} starts from an earlier stage: name its folder as --model_name_or_path.")
    parts = {name: getattr(script, name) for name in PARTS}
    if None in parts.values():
        absent = [f"--{name}" for name, value in parts.items() if value is None]
        raise ValueError(
            f"Give --model_name_or_path, or all four parts of a new model: {', '.join(absent)} are missing."
        )
    sizes = {"num_query_tokens": script.num_query_tokens, "num_frames": script.num_frames}
    qformer = {
        "num_hidden_layers": script.qformer_layers,
        "num_attention_heads": script.qformer_heads,
        "hidden_size": script.qformer_width,
        "intermediate_size": 4 * script.qformer_width,
        "hidden_dropout_prob": script.qformer_dropout,
        "attention_probs_dropout_prob": script.qformer_dropout,
        "initializer_range": script.qformer_init,
    }
    base = {**parts, **sizes, "video_qformer_config": qformer, "audio_qformer_config": qformer}
    model = EmpathicForConditionalGeneration.from_parts_pretrained(**base, **options)
    processor = EmpathicProcessor.from_parts_pretrained(
        **parts, **sizes, max_audio_seconds=script.max_audio_seconds, with_text=script.with_text
    )
    return model, processor, base


def rebuild_one(row: dict, rng) -> dict:
    """One utterance to rebuild."""
    return rebuild_sample([row])


def rebuild_run(args: StageConfig, conversation: dict, rng) -> dict:
    """A run of a conversation's utterances to rebuild."""
    return rebuild_sample(draw_utterances(conversation["turns"], rng, args.single_ratio, args.max_utterances))


def reply(args: StageConfig, sample: dict, rng) -> dict:
    """A reply to give."""
    return dialogue_sample(sample, args.history, args.use_media)


def stage_sources(script: ScriptArguments, args: StageConfig, split: str) -> list[tuple]:
    """The weighted sources of a supervised stage's `SampleStream`, one or two a data set."""
    sources = []
    weights = script.dataset_weights or [None] * len(script.dataset_name)
    for name, weight in zip(script.dataset_name, weights, strict=True):
        rows = load_dataset(name, split=split)
        texts = rows.remove_columns(["audio", "video"])  # no media is read where none is needed
        if script.stage == "emotion":
            view, make = EmotionClips(rows), emotion_sample
        elif script.stage == "memory_single":
            view, make = list(utterances(texts)), rebuild_one
        elif script.stage == "memory_multi":
            view, make = list(conversations(texts)), partial(rebuild_run, args)
        else:
            view, make = DialogueSamples(rows, args.reply_speakers), partial(reply, args)
        weight = len(view) if weight is None else weight
        if script.stage == "dialogue" and args.rebuild_ratio > 0:
            sources.append((weight * args.rebuild_ratio, list(conversations(texts)), partial(rebuild_run, args)))
            weight *= 1 - args.rebuild_ratio
        sources.append((weight, view, make))
    return sources


def supervised_trainer(script, args, model, processor) -> StageTrainer:
    """The trainer of the stages before EPO."""
    sources = stage_sources(script, args, script.train_split)
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = sum(len(view) for _, view, _ in sources)
    length = args.max_steps * step if args.max_steps > 0 else round(rows * args.num_train_epochs)
    args.num_train_epochs = 1  # the stream holds all passes over the data
    train = SampleStream(sources, length, args.seed)
    evaluation = None
    if args.eval_strategy != "no" and script.eval_split is not None:
        sources = stage_sources(script, args, script.eval_split)
        rows = sum(len(view) for _, view, _ in sources)
        evaluation = SampleStream(sources, min(rows, args.max_eval_samples), args.seed + 1)
    return StageTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=StageCollator(processor),
    )


def epo_trainer(script, args, model, processor) -> EPOStageTrainer:
    """The trainer of stage `epo`, on preference rows."""
    if len(script.dataset_name) != 1:
        raise ValueError(f"Stage epo takes one data set of preference rows, got {len(script.dataset_name)}.")
    name = script.dataset_name[0]
    evaluate = args.eval_strategy != "no" and script.eval_split is not None
    return EPOStageTrainer(
        model=model,
        args=args,
        train_dataset=load_dataset(name, split=script.train_split),
        eval_dataset=load_dataset(name, split=script.eval_split) if evaluate else None,
        processing_class=processor,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains a stage and saves its folder; returns the trainer's metrics."""
    script, args, model_args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    model, processor, base = build_model(script, model_args)

    trained = []
    if not isinstance(model, PeftModel):
        trained = freeze_for_stage(model, script.stage)
        if isinstance(base, dict):  # the first stage on new parts also keeps what it did not train
            trained = sorted({*trained, *new_tensors(model)})
    if script.stage in LORA_STAGES and not isinstance(model, PeftModel):
        model_args.use_peft = True
        peft_config = get_peft_config(model_args)
        peft_config.target_modules = lora_targets(model, model_args.lora_target_modules)
        model = get_peft_model(model, peft_config)
        model.peft_config["default"].base_model_name_or_path = base
    for parameter in model.parameters():  # what trains is kept in full precision; the frozen rest as it was loaded
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.activation_checkpointing and isinstance(model, PeftModel):
        model.enable_input_require_grads()

    build = epo_trainer if script.stage == "epo" else supervised_trainer
    trainer = build(script, args, model, processor)
    trainer.stage_record = StageRecord(script.stage, base, trained)
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        evaluation = trainer.evaluate()
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)
        metrics.update(evaluation)
    return metrics


if __name__ == "__main__":
    main()
