"""
Train one of the five stages:

    accelerate launch -m empathic.trainers.train --config recipes/tiny/emotion.yaml

`empathic train --config ...` is the same. Options on the command line override those of the YAML file.
"""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging
from trl import ModelConfig, get_peft_config

from ..composition_empathic import (
    ADAPTER_CONFIG,
    PART_NAMES,
    find_file,
    read_stage,
    resolve_base,
)
from ..configuration_empathic import AUDIO_WINDOWS, MEMORY_SIZE, SOUND_OPTIONS, check_memory_size
from ..data_prep.clip_digests import MEDIA_KINDS
from ..data_prep.loading import PAIR_COLUMNS, TURN_COLUMNS, load_prepared, negatives_limit
from ..data_prep.views import Conversations, DialogueSamples, EmotionClips, Utterances, check_splits, is_there
from ..errors import run_program
from ..files import held_folder, packaged
from ..hub.model_card import new_run, read_record
from ..modeling_empathic import EmpathicForConditionalGeneration
from ..processes import leave, stop_requests
from ..processing_empathic import EmpathicProcessor
from .checkpoints.saving import StageSaving, checkpoint_to_resume
from .checkpoints.stage_folder import StageRecord, load_model, new_tensors
from .dry_run import dry_run, leave_no_trace
from .epo_config import EPOConfig
from .epo_trainer import EPOTrainer
from .frozen.feature_cache import FeatureCache, describe
from .frozen.standardize import measure_standardizers
from .monitor import Monitor
from .options import LORA_OPTIONS, OptionParser, check_model_options, check_unset, revision_of
from .preference_collator import PreferenceCollator, shows_clip
from .quantization import check_not_sharded, load_quantized_model, quantization_config, quantize_language_model
from .samples import SampleStream, StageCollator, dialogue_sample, draw_utterances, emotion_sample, rebuild_sample
from .stage_trainer import StageTrainer
from .stages import LORA_STAGES, MEMORY_STAGES, STAGES, StageConfig, check_choice, freeze_for_stage, lora_targets
from .stopping import NOTICE, StopWhenAsked
from .word_alignment import align_with_words

logger = logging.get_logger(__name__)

NEW_MODEL_OPTIONS = (
    *PART_NAMES,
    *("num_query_tokens", "num_frames", "qformer_layers", "qformer_heads", "qformer_width", "qformer_dropout"),
    *(
        "qformer_init",
        "max_audio_seconds",
        "with_text",
        *SOUND_OPTIONS,
        "standardize_features",
        "video_token",
        "audio_token",
        "memory_token",
        "chat_template",
    ),
)


@dataclass
class ScriptArguments:
    """
    The stage, the data sets, the parts of a new model, and what is shown of the run.

    Raises:
        ValueError: if the stage is unknown, or the weights do not match the data sets.
    """

    stage: str = field(metadata={"help": f"One of {', '.join(STAGES)}."})
    dataset_name: list[str] = field(metadata={"help": "Folders of `empathic prepare`, or Hub ids."})
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "Sampling weight of each data set; its size if left out."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: list[str] | None = field(
        default_factory=lambda: ["validation"],
        metadata={"help": "Split to evaluate on; if several are named, each data set uses the first that it has."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder written by `empathic prepare-features`: no clip is decoded, and no encoder runs."},
    )
    frame_draws: int | None = field(
        default=None,
        metadata={
            "help": "Number of fixed random frame draws of a clip, of which each sample takes one; 0: evenly spaced "
            "frames. If left out, new random frames each time, or one of all draws in the feature cache."
        },
    )
    text: str | None = field(default=None, metadata={"help": "New model: the causal LM."})
    vision: str | None = field(default=None, metadata={"help": "New model: the CLIP model."})
    audio: str | None = field(default=None, metadata={"help": "New model: the Whisper model."})
    memory: str | None = field(default=None, metadata={"help": "New model: the Mamba model."})
    num_query_tokens: int = field(default=32, metadata={"help": "New model: number of queries of each Q-former."})
    num_frames: int = field(default=8, metadata={"help": "New model: number of frames of a clip."})
    qformer_layers: int = field(default=6, metadata={"help": "New model: number of layers of each Q-former."})
    qformer_heads: int = field(default=8, metadata={"help": "New model: number of attention heads of each Q-former."})
    qformer_width: int = field(default=768, metadata={"help": "New model: hidden size of each Q-former."})
    qformer_dropout: float = field(default=0.1, metadata={"help": "New model: dropout of each Q-former."})
    qformer_init: float = field(
        default=0.02, metadata={"help": "New model: standard deviation of the initial weights of each Q-former."}
    )
    max_audio_seconds: float = field(default=120.0, metadata={"help": "New model: longer audio is cut to this length."})
    with_text: bool = field(
        default=False, metadata={"help": "New model: the prompt of task emotion contains the sentence."}
    )
    audio_window: str = field(
        default="full",
        metadata={
            "help": "New model: what Whisper's encoder gets, `full` windows of 30 seconds or the `clip` alone, which "
            "takes a fraction of the time."
        },
    )
    audio_feature_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "New model: the layers of Whisper's encoder whose outputs the Q-former gets, side by side (0: "
            "their input). The output of the whole encoder if left out."
        },
    )
    standardize_features: bool = field(
        default=False,
        metadata={
            "help": "New model: the Q-formers get the encoders' outputs standardized per channel. Stage emotion "
            "measures mean and deviation on its first samples."
        },
    )
    memory_tokens: int | None = field(
        default=None,
        metadata={
            "help": "New model, and stages memory_single and memory_multi: number of memory vectors of an utterance; "
            "the model's own number (1 for a new model) if left out."
        },
    )
    memory_rate: int | None = field(
        default=None,
        metadata={
            "help": "Likewise: one memory vector for every so many tokens of an utterance, and at least memory_tokens."
        },
    )
    video_token: str | None = field(
        default=None, metadata={"help": "New model: the unused special token that stands for a vector of a video."}
    )
    audio_token: str | None = field(default=None, metadata={"help": "New model: likewise for audio."})
    memory_token: str | None = field(default=None, metadata={"help": "New model: likewise for memory."})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "New model: Jinja file with the causal LM's chat template, if its tokenizer has none and does not "
            "know ChatML."
        },
    )
    hub_base: str | None = field(
        default=None,
        metadata={"help": "With push_to_hub, for a stage that starts from a folder: the Hub id of that pushed base."},
    )
    log_samples: int = field(
        default=4,
        metadata={"help": "Number of samples whose replies are shown at each evaluation and written to samples.jsonl."},
    )
    log_samples_tokens: int = field(default=64, metadata={"help": "Maximum length of such a reply in tokens."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Build everything, run two steps, print parameters, memory and time, and stop. Nothing is written."
        },
    )

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        check_choice("audio_window", self.audio_window, AUDIO_WINDOWS)
        check_memory_size(1 if self.memory_tokens is None else self.memory_tokens, self.memory_rate)
        for name in ("dataset_name", "eval_split"):
            if isinstance(getattr(self, name), str):  # a single name in YAML
                setattr(self, name, [getattr(self, name)])
        if isinstance(self.audio_feature_layers, int):
            self.audio_feature_layers = [self.audio_feature_layers]
        if isinstance(self.dataset_weights, (int, float)):
            self.dataset_weights = [self.dataset_weights]
        if self.chat_template is not None:
            file = Path(self.chat_template)
            if not file.is_file():
                raise ValueError(f"chat_template: there is no file {file}. Give the path of a Jinja template.")
            self.chat_template = file.read_text(encoding="utf-8")
        if self.frame_draws is not None and self.frame_draws < 0:
            raise ValueError(f"frame_draws must be at least 0, got {self.frame_draws!r}.")
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset_name):
            raise ValueError(
                f"{len(self.dataset_weights)} dataset_weights were given for {len(self.dataset_name)} data sets."
            )


class SupervisedRun(StageSaving, StageTrainer):
    """A `StageTrainer` whose output folders name their stage and base."""


class EPORun(StageSaving, EPOTrainer):
    """An `EPOTrainer` whose output folders name their stage and base."""


def parse(argv: list[str], *more: type) -> tuple:
    """
    Parse `--config FILE` and the command line, which takes precedence, into `ScriptArguments`, `StageConfig` (for
    stage epo `EPOConfig`), `ModelConfig`, and the dataclasses in `more`.
    """
    stage = argv[argv.index("--stage") + 1] if "--stage" in argv[:-1] else None
    if stage is None and "--config" in argv[:-1]:
        with open(packaged(argv[argv.index("--config") + 1]), encoding="utf-8") as file:
            stage = (yaml.safe_load(file) or {}).get("stage")
    config = EPOConfig if stage == "epo" else StageConfig
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if processes > 1 and not torch.accelerator.is_available() and "--use_cpu" not in argv:
        # The launcher does not pass on the `use_cpu` of its file, and without it each process would train alone.
        argv = [*argv, "--use_cpu", "True"]
    parsed = OptionParser((ScriptArguments, config, ModelConfig, *more)).parse_args_and_config(args=argv)
    script, model_args = parsed[0], parsed[2]
    check_model_options(model_args)
    if model_args.model_name_or_path is not None:
        names = NEW_MODEL_OPTIONS if script.stage in MEMORY_STAGES else (*NEW_MODEL_OPTIONS, *MEMORY_SIZE)
        check_unset(script, names, f"the model of {model_args.model_name_or_path} has its own value")
    if processes != 1 and parsed[1].world_size != processes:
        raise RuntimeError(
            f"{processes} processes were started, but each sees {parsed[1].world_size}. Add --use_cpu True."
        )
    return parsed


@contextmanager
def suggestions(*classes: type):
    """Within, parse a command line. An error for options that do not exist names similar ones of these dataclasses."""
    try:
        yield
    except ValueError as error:
        # transformers lists all that is left of the command line, also the values.
        given = re.findall(r"'--([^'=]+)", str(error)) if "HfArgumentParser" in str(error) else []
        if not given:
            raise
        known = [option.name for kind in classes for option in fields(kind)]
        texts = []
        for name in given:
            near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
            texts.append(f"There is no option --{name}." + (f" Do you mean --{near[0]}?" if near else ""))
        raise ValueError(" ".join(texts)) from error


def part_names(script: ScriptArguments) -> dict[str, str]:
    """Return the four parts that a new model is composed of. Raises a ValueError if a part is missing."""
    parts = {name: getattr(script, name) for name in PART_NAMES}
    if None in parts.values():
        absent = [f"--{name}" for name, value in parts.items() if value is None]
        raise ValueError(
            f"Give --model_name_or_path, or all four parts of a new model: {', '.join(absent)} are missing."
        )
    return parts


def token_options(script: ScriptArguments) -> dict[str, str]:
    """Return the options of a new model that its tokenizer needs: placeholder tokens and a chat template."""
    names = ("video_token", "audio_token", "memory_token", "chat_template")
    return {name: getattr(script, name) for name in names if getattr(script, name) is not None}


def memory_size(script: ScriptArguments) -> dict[str, int]:
    """Return the given ones of the options that say how many vectors the memory has."""
    return {name: getattr(script, name) for name in MEMORY_SIZE if getattr(script, name) is not None}


def build_processor(script: ScriptArguments, model_args: ModelConfig) -> EmpathicProcessor:
    """Build the processor of the model that `build_model` gives."""
    if model_args.model_name_or_path is not None:
        processor = EmpathicProcessor.from_pretrained(model_args.model_name_or_path, revision=revision_of(model_args))
        vars(processor).update(memory_size(script))
        return processor
    return EmpathicProcessor.from_parts_pretrained(
        **part_names(script),
        num_query_tokens=script.num_query_tokens,
        num_frames=script.num_frames,
        max_audio_seconds=script.max_audio_seconds,
        with_text=script.with_text,
        **memory_size(script),
        **token_options(script),
    )


def build_model(script: ScriptArguments, model_args: ModelConfig) -> tuple[Any, EmpathicProcessor, tuple]:
    """Build the model, its processor, and the base (with its revision, or None) that the stage's folder will name."""
    options: dict[str, Any] = {"dtype": model_args.dtype or "float32"}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    quantization = quantization_config(model_args)
    path, revision = model_args.model_name_or_path, revision_of(model_args)
    if path is not None:
        trainable = script.stage in LORA_STAGES
        if trainable and find_file(path, ADAPTER_CONFIG, revision=revision) is not None:
            check_unset(
                model_args,
                LORA_OPTIONS,
                f"the adapter of {path} is trained further as it is. For a new adapter merge it with `empathic merge`",
            )
        load = load_model if quantization is None else partial(load_quantized_model, config=quantization)
        model = load(path, trainable=trainable, revision=revision, **options)
        base = path, revision
        vars(model.config).update(memory_size(script))
        if isinstance(model, PeftModel):  # an adapter that is trained further keeps its own base
            stage = read_stage(path, revision=revision)
            base = resolve_base(path, stage["base"]), stage.get("base_revision")
        return model, build_processor(script, model_args), base
    if script.stage in LORA_STAGES:
        raise ValueError(f"Stage {script.stage} starts from an earlier stage: pass its folder as --model_name_or_path.")
    parts = part_names(script)
    sizes: dict[str, Any] = {"num_query_tokens": script.num_query_tokens, "num_frames": script.num_frames}
    qformer = {
        "num_hidden_layers": script.qformer_layers,
        "num_attention_heads": script.qformer_heads,
        "hidden_size": script.qformer_width,
        "intermediate_size": 4 * script.qformer_width,
        "hidden_dropout_prob": script.qformer_dropout,
        "attention_probs_dropout_prob": script.qformer_dropout,
        "initializer_range": script.qformer_init,
    }
    sizes |= {name: getattr(script, name) for name in (*SOUND_OPTIONS, "standardize_features")}
    sizes |= memory_size(script)
    base = {**parts, **sizes, **token_options(script), "video_qformer_config": qformer, "audio_qformer_config": qformer}
    model = EmpathicForConditionalGeneration.from_parts_pretrained(**base, **options)
    if quantization is not None:
        quantize_language_model(model, quantization)
    return model, build_processor(script, model_args), (base, None)


@contextmanager
def whole_weights(args):
    """
    A context in which every process loads the whole model, also under ZeRO-3; DeepSpeed shards it when training starts.

    Otherwise transformers would shard each pretrained part as it is loaded, before the model is composed of the parts.
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:  # given by `--deepspeed`; the Trainer sets the launcher's config again
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def rebuild_one(row: dict, rng) -> dict:
    """Make the sample that rebuilds one utterance."""
    return rebuild_sample([row])


def rebuild_run(args: StageConfig, conversation: dict, rng) -> dict:
    """Make a sample that rebuilds a run of a conversation's utterances."""
    turns = draw_utterances(conversation["turns"], rng, args.single_ratio, args.max_utterances)
    return rebuild_sample(turns, conversation)


def reply(args: StageConfig, sample: dict, rng) -> dict:
    """Make the sample of a dialogue reply."""
    return dialogue_sample(sample, args.history, args.use_media)


def load_splits(
    names: list[str], wanted: list[str], optional: bool = False, option: str = "--train_split", pairs: bool = False
) -> list[Dataset | None]:
    """
    Load, from each data set, the first of the `wanted` splits that it has. With `optional`, a data set without any of
    them gives None and a warning. `option` is the command-line option that an error names as the remedy; `pairs` says
    that the data sets have preference rows.

    Raises:
        ValueError: if a data set (with `optional`: every data set) has none of the wanted splits; the message names
            the splits that it has.
    """
    found, missing = [], []
    for name in names:
        splits = load_prepared(name, columns=PAIR_COLUMNS if pairs else TURN_COLUMNS)
        if "dialogue_id" in next(iter(splits.values())).column_names:  # preference rows from other tools lack it
            check_splits(splits)
        split = next((split for split in wanted if split in splits), None)
        found.append(None if split is None else splits[split])
        if split is None:
            missing.append(f"{name} has no split {' or '.join(wanted)}; its splits are {', '.join(splits)}.")
    if missing and (not optional or len(missing) == len(names)):
        remedy = (
            "Name a split with --eval_split, or turn evaluation off." if optional else f"Name a split with {option}."
        )
        raise ValueError(" ".join([*missing, remedy]))
    for line in missing:
        logger.warning("left out of evaluation: %s", line)
    return found


def evaluates(script: ScriptArguments, args: StageConfig | EPOConfig) -> bool:
    """Whether a stage is evaluated."""
    return args.eval_strategy != "no" and bool(script.eval_split)


def stage_sources(script: ScriptArguments, args: StageConfig, data_sets: list[Dataset | None]) -> list[tuple]:
    """Build the weighted sources of a supervised stage's `SampleStream`, one or two for each data set."""
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
    """Open the feature cache, if `--feature_cache` is given. Raises FeatureCacheError if it does not fit the model."""
    if script.feature_cache is None:
        return None
    body = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    wanted = describe(body.vision_tower, body.audio_tower, processor, **body.config.sound_options)
    return FeatureCache(script.feature_cache, wanted, script.frame_draws)


def supervised_data(script, args) -> tuple[SampleStream, SampleStream | None]:
    """
    Build the training and evaluation samples of a stage before EPO.

    Raises:
        ValueError: if `cache_frozen_gib` is set in a stage that trains the parts whose outputs would be cached, or
            an alignment in a stage that trains no Q-former; if a split is missing, or no sample is trained.
    """
    for name in ("alignment_steps", "alignment_weight"):
        if getattr(args, name) > 0 and script.stage != "emotion":
            raise ValueError(
                f"{name} is {getattr(args, name)}, but stage {script.stage} trains no Q-former. Leave it out."
            )
    if args.cache_frozen_gib > 0 and script.stage != "dialogue":
        raise ValueError(
            f"cache_frozen_gib is set, but stage {script.stage} trains the parts whose outputs it would cache. Leave "
            "it out, or use it in the stages dialogue and epo."
        )
    sources = stage_sources(script, args, load_splits(script.dataset_name, [script.train_split]))
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = sum(len(view) for _, view, _ in sources)
    length = args.max_steps * step if args.max_steps > 0 else round(rows * args.num_train_epochs)
    if rows and not length:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs:g}, which is less than one of the {rows} samples. Give "
            "num_train_epochs above 0, or max_steps from 1 up."
        )
    args.num_train_epochs = 1  # the stream contains all passes over the data
    train = SampleStream(sources, length, args.seed)
    evaluation = None
    if evaluates(script, args):
        sources = stage_sources(script, args, load_splits(script.dataset_name, script.eval_split, optional=True))
        rows = sum(len(view) for _, view, _ in sources)
        evaluation = SampleStream(sources, min(rows, args.max_eval_samples), args.seed + 1, random_frames=False)
    return train, evaluation


def may_have_clips(script: ScriptArguments, args: StageConfig, data: Sequence[SampleStream | None]) -> bool:
    """Whether a run of a stage before EPO may meet a clip, or trains the encoders' Q-formers."""
    if script.stage in MEMORY_STAGES or (script.stage == "dialogue" and not args.use_media):
        return False
    views = [view for stream in data if stream is not None for _, view, _ in stream.sources]
    tables = [view.dataset for view in views if isinstance(view, DialogueSamples)]
    return script.stage == "emotion" or any(is_there(table, kind).any() for table in tables for kind in MEDIA_KINDS)


def supervised_trainer(script, args, data, model, processor) -> SupervisedRun:
    """Build the trainer of a stage before EPO."""
    train, evaluation = data
    clips = may_have_clips(script, args, data)
    return SupervisedRun(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=StageCollator(
            processor, script.frame_draws, open_cache(script, model, processor), args.max_length, clips
        ),
    )


def epo_data(script, args) -> tuple[Dataset, Dataset | None]:
    """Load the preference rows of stage `epo`, for training and evaluation."""
    if len(script.dataset_name) != 1:
        raise ValueError(f"Stage epo takes one data set of preference rows, got {len(script.dataset_name)}.")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs:g}. Give num_train_epochs above 0, or max_steps from 1 up."
        )
    evaluation = None
    if evaluates(script, args):
        evaluation = load_splits(script.dataset_name, script.eval_split, option="--eval_split", pairs=True)[0]
    return load_splits(script.dataset_name, [script.train_split], pairs=True)[0], evaluation


def epo_trainer(script, args, data, model, processor) -> EPORun:
    """Build the trainer of stage `epo`, on preference rows."""
    train, evaluation = data
    cache = open_cache(script, model, processor)
    prompts = (row["prompt"] for rows in data if rows is not None for row in rows.select_columns("prompt"))
    collator = PreferenceCollator(
        *(processor, args.max_length, args.history, script.frame_draws, cache, negatives_limit(args.negatives)),
        clips=any(shows_clip(prompt) for prompt in prompts),
    )
    return EPORun(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=collator,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """
    Train a stage, save its folder, and return the trainer's metrics.

    Raises:
        processes.Stopped: if a signal came during the training, which then has saved a checkpoint.
    """
    with suggestions(ScriptArguments, StageConfig, EPOConfig, ModelConfig):
        script, args, model_args = parse(sys.argv[1:] if argv is None else argv)
    if script.dry_run:
        leave_no_trace(args)
    if script.stage not in LORA_STAGES:
        check_unset(model_args, ("use_peft", *LORA_OPTIONS), f"stage {script.stage} trains no adapter")
    if script.stage == "epo" and args.model_init_kwargs is not None:
        check_unset(args, ("model_init_kwargs",), "this program has own options, such as --dtype")
    if script.stage == "epo" and args.disable_dropout:
        check_unset(
            model_args, ("lora_dropout",), "disable_dropout sets it to 0. Otherwise set --disable_dropout False"
        )
    writes = args.process_index == 0 and not script.dry_run
    with held_folder(args.output_dir, "empathic train") if writes else nullcontext():
        return train_stage(script, args, model_args)


def train_stage(script: ScriptArguments, args: StageConfig | EPOConfig, model_args: ModelConfig) -> dict[str, float]:
    """Train a stage with parsed arguments, see `main`. What needs no model is checked before one is loaded."""
    resume = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    data = (epo_data if script.stage == "epo" else supervised_data)(script, args)
    if model_args.load_in_4bit:
        check_not_sharded(args)
    set_seed(args.seed)
    with whole_weights(args):
        model, processor, (base, base_revision) = build_model(script, model_args)

    if isinstance(model, PeftModel) and script.stage not in LORA_STAGES:
        raise ValueError(
            f"Stage {script.stage} trains no adapter, but {model_args.model_name_or_path} has one. Start from a stage "
            "before `dialogue`, or merge the adapter with `empathic merge`."
        )
    trained = []
    if not isinstance(model, PeftModel):
        trained = freeze_for_stage(model, script.stage)
        if isinstance(base, dict):  # the first stage on new parts also saves the new tensors that it did not train
            trained = sorted({*trained, *new_tensors(model)})
    if script.stage in LORA_STAGES and not isinstance(model, PeftModel):
        model_args.use_peft = True
        peft_config = get_peft_config(model_args)
        peft_config.target_modules = lora_targets(model, model_args.lora_target_modules)
        model = get_peft_model(model, peft_config)
        # Absolute, because the auto classes use this path unchanged, relative to the folder where they are called.
        model.peft_config["default"].base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
        model.peft_config["default"].revision = base_revision
    for parameter in model.parameters():  # trained parameters need full precision; frozen parameters keep their dtype
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.activation_checkpointing and isinstance(model, PeftModel):
        model.enable_input_require_grads()

    build = epo_trainer if script.stage == "epo" else supervised_trainer
    trainer = build(script, args, data, model, processor)
    if script.stage == "emotion" and resume is None:
        if isinstance(base, dict) and script.standardize_features:
            measure_standardizers(model, trainer.data_collator, data[0])
        if args.alignment_steps > 0 and not script.dry_run:
            count = args.alignment_steps * args.per_device_train_batch_size
            samples = SampleStream(data[0].sources, count, args.seed)
            align_with_words(model, processor, trainer.data_collator, samples, args)
    start = model_args.model_name_or_path
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    run = new_run(script, args, model_args, base if start is None else start, num_trained)
    runs = [] if start is None else read_record(start, revision=revision_of(model_args))["runs"]
    trainer.stage_record = StageRecord(script.stage, base, trained, [*runs, run], base_revision)
    trainer.monitor = Monitor(trainer, script.log_samples, script.log_samples_tokens)
    if script.dry_run:
        return dry_run(trainer)
    if args.push_to_hub:
        trainer.start_pushing(script.hub_base)
    with stop_requests(NOTICE) as request:
        trainer.add_callback(StopWhenAsked(request, args.device))
        result = trainer.train(resume_from_checkpoint=resume)
    metrics = dict(result.metrics)
    if "train_loss" not in metrics:  # the run was already finished, so its earlier metrics are kept
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


def program() -> None:
    """Train a stage in a process of its own."""
    main()


if __name__ == "__main__":
    leave(run_program("empathic train", program))
