"""Settings of Emotional Preference Optimization."""

import json
import math
from dataclasses import dataclass, field

from ..data_prep.loading import negatives_limit
from .compat import TrainingArguments
from .losses import NEGATIVES_LOSSES
from .options import UNUSED_IN_EPO, check_training_options
from .stages import check_choice, check_no_smoothing


@dataclass
class EPOConfig(TrainingArguments):
    """Training arguments of [`EPOTrainer`]: those of [`transformers.TrainingArguments`] and the ones below.

    The defaults of `beta`, `gamma` and `learning_rate` are the paper's (section 4.2). The paper does not give the
    weight of the autoregressive loss: it is 1 here.

    Raises:
        ValueError: if a value is out of range; the message names the value.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate (paper: 1e-6)."})
    logging_steps: float = field(
        default=10,
        metadata={"help": "Number of optimizer steps between two logs; a number below 1 is a share of all steps."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Keep False: prompt, chosen and rejected are not arguments of the model."},
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "With push_to_hub: create a private repository. False: a public one."}
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
    negatives: int | str | None = field(
        default="lowest",
        metadata={
            "help": "Which rejected replies of a row are used: lowest (the column rejected alone), all (also those of "
            "the column negatives), or the number N of the first ones."
        },
    )
    negatives_loss: str = field(
        default="pairs",
        metadata={
            "help": "The preference loss of a row with several rejected replies: pairs (the mean over them) or "
            "listwise (a softmax over the rewards of all replies).",
            "choices": list(NEGATIVES_LOSSES),
        },
    )
    clip_negatives: bool = field(
        default=False,
        metadata={
            "help": "Add a preference over the clip: the reward of the chosen reply should be higher with the true "
            "clip than with the clip of another row, of another emotion."
        },
    )
    clip_weight: float = field(
        default=1.0, metadata={"help": "Weight of the preference over the clip, with clip_negatives."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt + reply in tokens of the language model. A longer pair is left out and reported, "
            "never truncated; of several rejected replies, only those that are too long. None: no limit."
        },
    )
    history: str = field(
        default="memory",
        metadata={
            "help": "How a multimodal prompt gives the earlier turns: as memory vectors, or as text (the ablation).",
            "choices": ["memory", "text"],
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Set all dropout of the model and its adapter to 0, also the rates that are passed to functions, "
            "so that both replies are scored by the same network."
        },
    )
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of `from_pretrained` if EPOTrainer gets the name of a model; the dtype is float32 by "
            "default."
        },
    )

    share_prompt: bool = field(
        default=True,
        metadata={
            "help": "Compute a pair's prompt, with its media and memory, once for both replies. Ignored in training "
            "with dropout, where sharing would change the result."
        },
    )

    cache_frozen_gib: float = field(
        default=0.0,
        metadata={
            "help": "Compute the audio, video and memory vectors of each row once, before training, and keep up to "
            "this many GiB of vectors in the main memory of each process. Useful for several epochs; each row then "
            "has the same frames in every epoch. 0: off."
        },
    )

    def __post_init__(self):
        _check_number("learning_rate", self.learning_rate, at_least=0)
        _check_number("beta", self.beta, above=0)
        _check_number("gamma", self.gamma, at_least=0)
        _check_number("nll_weight", self.nll_weight, at_least=0)
        _check_number("epo_weight", self.epo_weight, at_least=0)
        _check_number("clip_weight", self.clip_weight, at_least=0)
        negatives_limit(self.negatives)
        check_choice("negatives_loss", self.negatives_loss, NEGATIVES_LOSSES)
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
        if isinstance(self.model_init_kwargs, str):
            try:
                self.model_init_kwargs = json.loads(self.model_init_kwargs)
            except ValueError as error:
                raise ValueError(
                    f"model_init_kwargs must be a dict in JSON, got {self.model_init_kwargs!r}."
                ) from error
        check_training_options(self, UNUSED_IN_EPO)
        super().__post_init__()


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value, above: float | None = None, at_least: float | None = None) -> None:
    """Raise a ValueError unless the value is a number in range. YAML reads `1e-6`, without a dot, as text."""
    bound = f"above {above}" if above is not None else f"of at least {at_least}"
    is_number = _is_whole(value) or isinstance(value, float)
    in_range = is_number and math.isfinite(value) and (value > above if above is not None else value >= at_least)
    if not in_range:
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}.")
