"""Which parameters each of the five stages trains, and the training arguments of the supervised stages."""

import copy
import re
from dataclasses import dataclass, field

from peft import PeftConfig
from torch import nn

from .compat import TrainingArguments
from .options import UNUSED_IN_STAGES, check_training_options

# Prefixes of the tensors that a stage trains besides its adapter (paper's Sec. 3.1 to 3.4). All others are frozen.
TRAINED_PARTS = {
    "emotion": (
        "model.video_qformer.",
        "model.audio_qformer.",
        "model.video_query_tokens",
        "model.audio_query_tokens",
        "model.video_projector.",
        "model.audio_projector.",
    ),
    "memory_single": ("model.memory.",),
    "memory_multi": ("model.memory.",),
    "dialogue": (),
    "epo": (),
}
STAGES = tuple(TRAINED_PARTS)
MEMORY_STAGES = ("memory_single", "memory_multi")
LORA_STAGES = ("dialogue", "epo")

# Whisper and CLIP also have a q_proj, so the pattern matches the language model only.
LORA_TARGET = r".*\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# Matches the modules outside of the language model and its head.
LANGUAGE_MODEL_EXCLUDED = r"(?!(.*\.)?(language_model\.|lm_head$)).*"


def check_choice(name: str, value, choices) -> None:
    """Raise a ValueError if the value is not among the choices. The parser does not check values from YAML."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")


def check_no_smoothing(args: TrainingArguments) -> None:
    """Raise a ValueError for label smoothing: the losses use the target tokens alone."""
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor!r}: the loss does not support it."
        )


def check_whole_rows(args: TrainingArguments) -> None:
    """Raise a ValueError for `remove_unused_columns`: the collators read whole rows."""
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns must be False, got True: the collator reads whole rows. Leave remove_unused_columns "
            "out."
        )


def freeze_for_stage(model: nn.Module, stage: str) -> list[str]:
    """
    Unfreeze the parameters that a stage trains and freeze all others.

    Args:
        model: an `EmpathicForConditionalGeneration` without an adapter.
        stage: one of `STAGES`.

    Returns:
        The names of the trained tensors; none for the stages that train an adapter.
    """
    check_choice("stage", stage, STAGES)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED_PARTS[stage]) if TRAINED_PARTS[stage] else False)
        if parameter.requires_grad:
            trained.append(name)
    return trained


def lora_targets(model: nn.Module, chosen: list[str] | None) -> str | list[str]:
    """
    Return the LoRA target modules: all linear layers of the language model, or those with a name in `chosen`.

    Raises:
        ValueError: if no module of the language model matches.
    """
    chosen = [chosen] if isinstance(chosen, str) else chosen  # TRL's ModelConfig unpacks a list of one name
    pattern = LORA_TARGET if not chosen else rf".*\.language_model\..*\.({'|'.join(map(re.escape, chosen))})"
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if not names:
        raise ValueError(
            f"No module of the language model matches {pattern!r}; name modules with --lora_target_modules."
        )
    idle = [part for part in chosen or () if not any(name.endswith(f".{part}") for name in names)]
    if idle:
        raise ValueError(f"No module of the language model is called {', '.join(idle)}; see --lora_target_modules.")
    return pattern


def aim_at_language_model(config: PeftConfig) -> PeftConfig:
    """
    Return a copy of an adapter's config whose target modules are sought in the language model alone: the encoders and
    the memory have layers of the same names. A regular expression stays as it is, and so does a name with a dot, such
    as `vision_tower.encoder.layers.0.self_attn.q_proj`.
    """
    targets = getattr(config, "target_modules", None)
    if (
        targets is None
        or (isinstance(targets, str) and targets != "all-linear")
        or not hasattr(config, "exclude_modules")
    ):
        return config
    outside = LANGUAGE_MODEL_EXCLUDED
    dotted = [] if isinstance(targets, str) else [name for name in targets if "." in name]
    if dotted:
        outside = rf"(?!(.*\.)?({'|'.join(map(re.escape, dotted))})$){outside}"
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        outside = f"{outside}|{excluded}"
    elif excluded:
        outside = rf"{outside}|(.*\.)?({'|'.join(map(re.escape, excluded))})"
    config = copy.copy(config)
    config.exclude_modules = outside
    return config


@dataclass
class StageConfig(TrainingArguments):
    """
    Training arguments of the supervised stages: those of [`transformers.TrainingArguments`] and the ones below.

    Raises:
        ValueError: if a value is not among its choices or is out of range.
    """

    learning_rate: float = field(
        default=1e-4, metadata={"help": "The initial learning rate. The paper gives only that of EPO (1e-6)."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Number of optimizer steps between two logs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the collator reads whole rows."})
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "With push_to_hub: create a private repository. False: a public one."}
    )
    history: str = field(
        default="memory",
        metadata={
            "help": "How earlier turns are given: as `memory` vectors, as `text` (the ablation) or not at all (`none`)."
        },
    )
    alignment_steps: int = field(
        default=0,
        metadata={
            "help": "Stage emotion: before the training, this many steps without the language model, in which a clip's "
            "vectors learn to be near the language model's token embedding of its emotion."
        },
    )
    alignment_weight: float = field(
        default=0.0,
        metadata={
            "help": "Stage emotion: weight of a further loss, by which a clip's vectors are nearer to the language "
            "model's token embedding of its emotion than to those of the other emotions."
        },
    )
    use_media: bool = field(default=True, metadata={"help": "Stage dialogue: give the clips to the model."})
    reply_speakers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Stage dialogue: speakers whose replies are trained, such as a corpus's assistant; None: everyone."
        },
    )
    rebuild_ratio: float = field(
        default=0.2,
        metadata={
            "help": "Stage dialogue: share of samples that rebuild a memory, so that this skill is not forgotten."
        },
    )
    single_ratio: float = field(
        default=0.3, metadata={"help": "Stage memory_multi: share of samples with a single utterance."}
    )
    max_utterances: int | None = field(
        default=None,
        metadata={
            "help": "Longest run of utterances to rebuild (lengths are drawn at random); None: whole conversations."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt + target in tokens of the language model. A longer sample is left out and "
            "reported, never truncated. None: no limit."
        },
    )
    cache_frozen_gib: float = field(
        default=0.0,
        metadata={
            "help": "Stage dialogue: compute the audio and video vectors of each clip once, before training, and keep "
            "up to this many GiB of vectors in the main memory of each process. Useful for several passes over the "
            "data; a clip then has the same frames in every pass. 0: off."
        },
    )
    max_eval_samples: int = field(default=500, metadata={"help": "Maximum number of evaluation samples."})

    def __post_init__(self):
        if isinstance(self.reply_speakers, str):  # a single name in YAML
            self.reply_speakers = [self.reply_speakers]
        check_choice("history", self.history, ("memory", "text", "none"))
        check_no_smoothing(self)
        for name in ("rebuild_ratio", "single_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}.")
        for name in ("alignment_steps", "alignment_weight", "cache_frozen_gib"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}.")
        if self.max_eval_samples < 1:
            raise ValueError(
                f"max_eval_samples must be at least 1, got {self.max_eval_samples!r}. For no evaluation, give "
                "--eval_strategy no."
            )
        if self.max_utterances is not None and self.max_utterances < 1:
            raise ValueError(f"max_utterances must be at least 1, got {self.max_utterances!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length!r}.")
        check_whole_rows(self)
        check_training_options(self, UNUSED_IN_STAGES)
        # The sample stream is already shuffled and each sample depends on its number alone, so the sampler only counts.
        self.train_sampling_strategy = "sequential"
        super().__post_init__()
