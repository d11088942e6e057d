"""Settings of Emotional Preference Optimization."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from empathic.trainers.stages import check_no_smoothing


@dataclass
class EPOConfig(TrainingArguments):
    """Training arguments of [`EPOTrainer`]: those of transformers, and the ones below.

    The defaults of `beta`, `gamma` and `learning_rate` are the paper's (section 4.2). The paper does not give the
    weight of the autoregressive loss: it is 1 here.

    Raises:
        ValueError: a value out of range, named in the message.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate (paper: 1e-6)."})
    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every so many optimizer steps; a number below 1 is a share of all steps."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Must stay false: prompt, chosen and rejected are no arguments of the model."},
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "With push_to_hub: for your eyes only. False: a public repository."}
    )
    beta: float = field(default=2.0, metadata={"help": "Scale of the rewards, equation 1 of the paper."})
    gamma: float = field(
        default=0.5,
        metadata={"help": "Margin by which the chosen reward should lead, equation 2 (absolute: TRL's simpo_gamma)."},
    )
    nll_weight: float = field(
        default=1.0, metadata={"help": "Weight of the autoregressive loss on the chosen replies (TRL's cpo_alpha)."}
    )
    epo_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the preference loss. 0 trains on the autoregressive loss alone: a control run."},
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt + reply in tokens of the language model. A longer pair is left out and reported, "
            "never cut. None: no limit."
        },
    )
    history: str = field(
        default="memory",
        metadata={
            "help": "How a multimodal prompt carries the earlier turns: as memory vectors, or as text (the ablation).",
            "choices": ["memory", "text"],
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set the model's dropout layers to 0, so that both replies meet the same network."},
    )

    share_prompt: bool = field(
        default=True,
        metadata={
            "help": "Compute a pair's prompt, with its media and memory, once for both replies. In training with "
            "dropout, where that would change the result, it is not done."
        },
    )

    cache_frozen_gib: float = field(
        default=0.0,
        metadata={
            "help": "Compute the audio, video and memory vectors of each row once, before training, and keep up to so "
            "many GiB of them in each process's main memory. For several epochs: each row then has the frames of its "
            "first epoch in all of them. 0: off."
        },
    )

    def __post_init__(self):
        _check_number("learning_rate", self.learning_rate, at_least=0)
        _check_number("beta", self.beta, above=0)
        _check_number("gamma", self.gamma, at_least=0)
        _check_number("nll_weight", self.nll_weight, at_least=0)
        _check_number("epo_weight", self.epo_weight, at_least=0)
        _check_number("cache_frozen_gib", self.cache_frozen_gib, at_least=0)
        check_no_smoothing(self)
        if self.nll_weight == 0 and self.epo_weight == 0:
            raise ValueError("nll_weight and epo_weight are both 0, so there is nothing to train. Raise one of them.")
        if self.max_length is not None and (not _is_whole(self.max_length) or self.max_length < 2):
            raise ValueError(f"max_length must be None or a whole number of tokens from 2, got {self.max_length!r}.")
        if self.history not in ("memory", "text"):
            raise ValueError(f'history must be "memory" or "text", got {self.history!r}.')
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False, got True: it would drop the columns prompt, chosen and rejected."
            )
        super().__post_init__()


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value, above: float | None = None, at_least: float | None = None) -> None:
    """Also catches what YAML made of a number: `1e-6` without a dot is read as text."""
    bound = f"above {above}" if above is not None else f"of at least {at_least}"
    is_number = _is_whole(value) or isinstance(value, float)
    in_range = is_number and math.isfinite(value) and (value > above if above is not None else value >= at_least)
    if not in_range:
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}.")
