"""
Trains one of the five stages:

    accelerate launch -m empathic.trainers.train --config recipes/tiny/emotion.yaml

`empathic train --config ...` is the same. Options on the command line override those of the YAML file.
"""

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import yaml
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from empathic.composition_empathic import read_stage, resolve_base
from empathic.data_prep.views import Conversations, DialogueSamples, EmotionClips, Utterances, check_splits
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers.checkpoint import StageRecord, load_model, new_tensors
from empathic.trainers.dry_run import dry_run, leave_no_trace
from empathic.trainers.epo_config import EPOConfig
from empathic.trainers.epo_trainer import EPOTrainer
from empathic.trainers.feature_cache import FeatureCache, describe
from empathic.trainers.model_card import new_run, read_record
from empathic.trainers.monitor import Monitored
from empathic.trainers.preference_collator import PreferenceCollator
from empathic.trainers.quantization import (
    check_not_sharded,
    load_quantized_model,
    quantization_config,
    quantize_language_model,
)
from empathic.trainers.samples import (
    SampleStream,
    StageCollator,
    dialogue_sample,
    draw_utterances,
    emotion_sample,
    rebuild_sample,
)
from empathic.trainers.saving import StageSaving, StageTrainer, checkpoint_to_resume
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
    eval_split: list[str] | None = field(
        default_factory=lambda: ["validation"],
        metadata={"help": "Split to evaluate on; of several names the first that a data set has."},
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder of `empathic prepare-features`: no clip is decoded, no encoder runs."}
    )
    frame_draws: int | None = field(
        default=None,
        metadata={
            "help": "Frames of a clip: one of so many fixed random draws, 0: evenly spaced. If left out, new random "
            "ones each time, or one of all that the feature cache has."
        },
    )
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
    hub_base: str | None = field(
        default=None,
        metadata={"help": "With push_to_hub, of a stage that starts from a folder: where that base was pushed to."},
    )
    log_samples: int = field(
        default=4,
        metadata={"help": "Replies to so many samples are shown at each evaluation, and kept in samples.jsonl."},
    )
    log_samples_tokens: int = field(default=64, metadata={"help": "Tokens of such a reply at most."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Build all, run two steps, print parameters, memory and time, and stop; nothing is written."},
    )

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        for name in ("dataset_name", "eval_split"):
            if isinstance(getattr(self, name), str):  # in YAML
                setattr(self, name, [getattr(self, name)])
        if isinstance(self.dataset_weights, (int, float)):
            self.dataset_weights = [self.dataset_weights]
        if self.frame_draws is not None and self.frame_draws < 0:
            raise ValueError(f"frame_draws must be at least 0, got {self.frame_draws!r}.")
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset_name):
            raise ValueError(
                f"{len(self.dataset_weights)} dataset_weights were given for {len(self.dataset_name)} data sets."
            )


class EPOStageTrainer(StageSaving, Monitored, EPOTrainer):
    """`EPOTrainer` whose folders name their stage and base."""


def parse(argv: list[str], *more: type) -> tuple:
    """
    `ScriptArguments`, `StageConfig` or for stage epo `EPOConfig`, `ModelConfig`, and `more` dataclasses, from
    `--config FILE` and the command line, which wins.
    """
    stage = argv[argv.index("--stage") + 1] if "--stage" in argv[:-1] else None
    if stage is None and "--config" in argv[:-1]:
        with open(argv[argv.index("--config") + 1], encoding="utf-8") as file:
            stage = yaml.safe_load(file).get("stage")
    config = EPOConfig if stage == "epo" else StageConfig
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if processes > 1 and not torch.accelerator.is_available() and "--use_cpu" not in argv:
        # The launcher keeps the `use_cpu` of its file to itself, and without it each process would train alone.
        argv = [*argv, "--use_cpu", "True"]
    parsed = TrlParser((ScriptArguments, config, ModelConfig, *more)).parse_args_and_config(args=argv)
    if processes != 1 and parsed[1].world_size != processes:
        raise RuntimeError(
            f"{processes} processes were started, but each sees {parsed[1].world_size}. Add --use_cpu True."
        )
    return parsed


def part_names(script: ScriptArguments) -> dict[str, str]:
    """The four parts that a new model is composed of. ValueError if some are not given."""
    parts = {name: getattr(script, name) for name in PARTS}
    if None in parts.values():
        absent = [f"--{name}" for name, value in parts.items() if value is None]
        raise ValueError(
            f"Give --model_name_or_path, or all four parts of a new model: {', '.join(absent)} are missing."
        )
    return parts


def build_processor(script: ScriptArguments, model_args: ModelConfig) -> EmpathicProcessor:
    """The processor of `build_model`."""
    if model_args.model_name_or_path is not None:
        return EmpathicProcessor.from_pretrained(model_args.model_name_or_path)
    return EmpathicProcessor.from_parts_pretrained(
        **part_names(script),
        num_query_tokens=script.num_query_tokens,
        num_frames=script.num_frames,
        max_audio_seconds=script.max_audio_seconds,
        with_text=script.with_text,
    )


def build_model(script: ScriptArguments, model_args: ModelConfig):
    """The model, its processor, and the base that the stage's folder will name."""
    options = {"dtype": model_args.dtype or "float32"}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    quantization = quantization_config(model_args)
    path = model_args.model_name_or_path
    if path is not None:
        trainable = script.stage in LORA_STAGES
        if quantization is None:
            model = load_model(path, trainable=trainable, **options)
        else:
            model = load_quantized_model(path, quantization, trainable, **options)
        # An adapter that goes on training keeps its own base.
        base = resolve_base(path, read_stage(path)["base"]) if isinstance(model, PeftModel) else path
        return model, build_processor(script, model_args), base
    if script.stage in LORA_STAGES:
        raise ValueError(f"Stage {script.stage} starts from an earlier stage: name its folder as --model_name_or_path.")
    parts = part_names(script)
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
    if quantization is not None:
        quantize_language_model(model, quantization)
    return model, build_processor(script, model_args), base


@contextmanager
def whole_weights(args):
    """Under ZeRO-3 transformers would shard each pretrained part as it is loaded, before the parts are put together.
    Within, every process loads the whole model; DeepSpeed shards it when training starts."""
    unset_hf_deepspeed_config()
    yield
    if args.deepspeed:  # given by `--deepspeed`; that of the launcher is set again by the Trainer
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def rebuild_one(row: dict, rng) -> dict:
    """One utterance to rebuild."""
    return rebuild_sample([row])


def rebuild_run(args: StageConfig, conversation: dict, rng) -> dict:
    """A run of a conversation's utterances to rebuild."""
    turns = draw_utterances(conversation["turns"], rng, args.single_ratio, args.max_utterances)
    return rebuild_sample(turns, conversation)


def reply(args: StageConfig, sample: dict, rng) -> dict:
    """A reply to give."""
    return dialogue_sample(sample, args.history, args.use_media)


def load_splits(
    names: list[str], wanted: list[str], optional: bool = False, option: str = "--train_split"
) -> list[Dataset | None]:
    """
    Of each data set the first of the `wanted` splits that it has; with `optional` None, and a warning, where it has
    none of them. `option` is what an error calls the choice of them.

    Raises:
        ValueError: naming the splits there are, for a data set without a wanted one; with `optional` if all are so.
    """
    found, missing = [], []
    for name in names:
        splits = load_dataset(name)
        if "dialogue_id" in next(iter(splits.values())).column_names:  # preference rows of other makers lack it
            check_splits(splits)
        split = next((split for split in wanted if split in splits), None)
        found.append(None if split is None else splits[split])
        if split is None:
            missing.append(f"{name} has no split {' or '.join(wanted)}; its splits are {', '.join(splits)}.")
    if missing and (not optional or len(missing) == len(names)):
        mend = "Name one with --eval_split, or turn evaluation off." if optional else f"Name one with {option}."
        raise ValueError(" ".join([*missing, mend]))
    for line in missing:
        logger.warning("left out of evaluation: %s", line)
    return found


def evaluates(script: ScriptArguments, args: StageConfig | EPOConfig) -> bool:
    """Whether a stage is evaluated."""
    return args.eval_strategy != "no" and bool(script.eval_split)


def stage_sources(script: ScriptArguments, args: StageConfig, data_sets: list[Dataset | None]) -> list[tuple]:
    """The weighted sources of a supervised stage's `SampleStream`, one or two a data set."""
    sources = []
    weights = script.dataset_weights or [None] * len(data_sets)
    for rows, weight in zip(data_sets, weights, strict=True):
        if rows is None:
            continue
        if script.stage == "emotion":
            view, make = EmotionClips(rows), emotion_sample
        elif script.stage == "memory_single":
            view, make = Utterances(rows), rebuild_one
        elif script.stage == "memory_multi":
            view, make = Conversations(rows), partial(rebuild_run, args)
        else:
            view, make = DialogueSamples(rows, args.reply_speakers), partial(reply, args)
        weight = len(view) if weight is None else weight
        if script.stage == "dialogue" and args.rebuild_ratio > 0:
            sources.append((weight * args.rebuild_ratio, Conversations(rows), partial(rebuild_run, args)))
            weight *= 1 - args.rebuild_ratio
        sources.append((weight, view, make))
    return sources


def open_cache(script: ScriptArguments, model, processor) -> FeatureCache | None:
    """The feature cache, if one is asked for. FeatureCacheError if it does not fit the model."""
    if script.feature_cache is None:
        return None
    body = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    wanted = describe(body.vision_tower, body.audio_tower, processor)
    return FeatureCache(script.feature_cache, wanted, script.frame_draws)


def supervised_trainer(script, args, model, processor) -> StageTrainer:
    """The trainer of the stages before EPO. ValueError for `cache_frozen_gib` in a stage that trains what it keeps."""
    if args.cache_frozen_gib > 0 and script.stage != "dialogue":
        raise ValueError(f"cache_frozen_gib is for stages dialogue and epo: nothing of it is frozen in {script.stage}.")
    sources = stage_sources(script, args, load_splits(script.dataset_name, [script.train_split]))
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = sum(len(view) for _, view, _ in sources)
    length = args.max_steps * step if args.max_steps > 0 else round(rows * args.num_train_epochs)
    args.num_train_epochs = 1  # the stream holds all passes over the data
    train = SampleStream(sources, length, args.seed)
    evaluation = None
    if evaluates(script, args):
        sources = stage_sources(script, args, load_splits(script.dataset_name, script.eval_split, optional=True))
        rows = sum(len(view) for _, view, _ in sources)
        evaluation = SampleStream(sources, min(rows, args.max_eval_samples), args.seed + 1, random_frames=False)
    return StageTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=StageCollator(
            processor, script.frame_draws, open_cache(script, model, processor), args.max_length
        ),
    )


def epo_trainer(script, args, model, processor) -> EPOStageTrainer:
    """The trainer of stage `epo`, on preference rows."""
    if len(script.dataset_name) != 1:
        raise ValueError(f"Stage epo takes one data set of preference rows, got {len(script.dataset_name)}.")
    cache = open_cache(script, model, processor)
    collator = PreferenceCollator(processor, args.max_length, args.history, script.frame_draws, cache)
    evaluation = None
    if evaluates(script, args):
        evaluation = load_splits(script.dataset_name, script.eval_split, option="--eval_split")[0]
    return EPOStageTrainer(
        model=model,
        args=args,
        train_dataset=load_splits(script.dataset_name, [script.train_split])[0],
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=collator,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains a stage and saves its folder; returns the trainer's metrics."""
    script, args, model_args = parse(sys.argv[1:] if argv is None else argv)
    if script.dry_run:
        leave_no_trace(args)
    if model_args.load_in_4bit:
        check_not_sharded(args)
    set_seed(args.seed)
    with whole_weights(args):
        model, processor, base = build_model(script, model_args)

    if isinstance(model, PeftModel) and script.stage not in LORA_STAGES:
        raise ValueError(
            f"Stage {script.stage} trains no adapter, but {model_args.model_name_or_path} has one. Start from a stage "
            "before `dialogue`, or from what `empathic merge` makes of it."
        )
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
        # As an absolute path: the auto classes take it as it stands, in whichever folder they are called.
        model.peft_config["default"].base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    for parameter in model.parameters():  # what trains is kept in full precision; the frozen rest as it was loaded
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.activation_checkpointing and isinstance(model, PeftModel):
        model.enable_input_require_grads()

    build = epo_trainer if script.stage == "epo" else supervised_trainer
    trainer = build(script, args, model, processor)
    start = model_args.model_name_or_path
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    run = new_run(script, args, model_args, base if start is None else start, num_trained)
    runs = [] if start is None else read_record(start)["runs"]
    trainer.stage_record = StageRecord(script.stage, base, trained, [*runs, run])
    trainer.log_samples, trainer.log_samples_tokens = script.log_samples, script.log_samples_tokens
    if script.dry_run:
        return dry_run(trainer)
    if args.push_to_hub:
        trainer.start_pushing(script.hub_base)
    resume = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = dict(result.metrics)
    if "train_loss" not in metrics:  # it was finished before, so what it got then stands
        earlier = read_record(args.output_dir)["runs"][-1:]
        run["metrics"] = earlier[0]["metrics"] if earlier and earlier[0]["stage"] == script.stage else {}
    trainer.save_model()
    trainer.save_state()
    if "train_loss" in metrics:
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        evaluation = trainer.evaluate()
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)
        metrics.update(evaluation)
    trainer.record_metrics(metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


if __name__ == "__main__":
    main()
