"""What each of the five training stages trains, and the arguments of the supervised ones."""

import re
from dataclasses import dataclass, field

from torch import nn
from transformers import TrainingArguments

# Prefixes of the tensors that a stage trains beside its adapter (paper's Sec. 3.1 to 3.4). All else is frozen.
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
LORA_STAGES = ("dialogue", "epo")

# Whisper and CLIP have a q_proj too: the adapter aims at the language model only.
LORA_TARGET = r".*\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def check_choice(name: str, value, choices) -> None:
    """YAML values pass the parser unchecked."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")


def check_no_smoothing(args: TrainingArguments) -> None:
    """ValueError for label smoothing: the losses here are of the targets alone."""
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor!r}: the loss knows no smoothing."
        )


def freeze_for_stage(model: nn.Module, stage: str) -> list[str]:
    """
    Lets the parameters of a stage train and freezes all others.

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
    The modules a LoRA adapter goes to: the language model's linear layers, or `chosen` names within it.

    Raises:
        ValueError: if nothing in the language model matches.
    """
    chosen = [chosen] if isinstance(chosen, str) else chosen  # TRL's ModelConfig takes one out of its list
    pattern = LORA_TARGET if not chosen else rf".*\.language_model\..*\.({'|'.join(map(re.escape, chosen))})"
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if not names:
        raise ValueError(f"No module of the language model matches {pattern!r}; name some with --lora_target_modules.")
    idle = [part for part in chosen or () if not any(name.endswith(f".{part}") for name in names)]
    if idle:
        raise ValueError(f"No module of the language model is called {', '.join(idle)}; see --lora_target_modules.")
    return pattern


@dataclass
class StageConfig(TrainingArguments):
    """
    Arguments of the supervised stages: those of [`transformers.TrainingArguments`] and the ones below.

    Raises:
        ValueError: for a value outside its choices or range.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The paper gives EPO's alone (1e-6)."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the collator reads whole rows."})
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "With push_to_hub: for your eyes only. False: a public repository."}
    )
    history: str = field(
        default="memory",
        metadata={"help": "Earlier turns as `memory` vectors, as `text` (the ablation) or `none`."},
    )
    use_media: bool = field(default=True, metadata={"help": "Stage dialogue: whether it sees and hears the clips."})
    reply_speakers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Stage dialogue: whose replies are trained, such as a corpus's assistant; None: everybody's."
        },
    )
    rebuild_ratio: float = field(
        default=0.2,
        metadata={"help": "Stage dialogue: share of samples that rebuild a memory, so that the skill is kept."},
    )
    single_ratio: float = field(
        default=0.3, metadata={"help": "Stage memory_multi: share of samples with one utterance alone."}
    )
    max_utterances: int | None = field(
        default=None,
        metadata={"help": "Longest run of utterances to rebuild, drawn at random; None: whole conversations."},
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt + target in tokens of the language model. A longer sample is left out and "
            "reported, never cut. None: no limit."
        },
    )
    cache_frozen_gib: float = field(
        default=0.0,
        metadata={
            "help": "Stage dialogue: compute the audio and video vectors of each clip once, before training, and keep "
            "up to so many GiB of them in each process's main memory. For several passes over the data: a clip then "
            "has the same frames in all of them. 0: off."
        },
    )
    max_eval_samples: int = field(default=500, metadata={"help": "Evaluation samples at most."})

    def __post_init__(self):
        if isinstance(self.reply_speakers, str):  # one, in YAML
            self.reply_speakers = [self.reply_speakers]
        check_choice("history", self.history, ("memory", "text", "none"))
        check_no_smoothing(self)
        for name in ("rebuild_ratio", "single_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}.")
        if self.cache_frozen_gib < 0:
            raise ValueError(f"cache_frozen_gib must be at least 0, got {self.cache_frozen_gib!r}.")
        if self.max_utterances is not None and self.max_utterances < 1:
            raise ValueError(f"max_utterances must be at least 1, got {self.max_utterances!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length!r}.")
        # The sample stream is shuffled by itself and knows every draw by its number, so the sampler only counts.
        self.train_sampling_strategy = "sequential"
        super().__post_init__()
