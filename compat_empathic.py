"""Differences between the versions of transformers that the model's code supports, 5.17 to 5.24."""

import torch
import transformers
from packaging.version import Version
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The oldest and the newest minor version that the tests run with.
OLDEST_TESTED, NEWEST_TESTED = "5.17", "5.24"

# Name of the argument and output field for the key-value cache, renamed in transformers 5.24 together with Mamba's.
_RENAMED = "cache" in BaseModelOutputWithPast.__dataclass_fields__
CACHE = "cache" if _RENAMED else "past_key_values"
MAMBA_CACHE = "cache" if _RENAMED else "cache_params"


def warn_if_untested(version: str = transformers.__version__) -> None:
    """Warn once if the installed transformers is newer than every version that this code was tested with."""
    if Version(version).release[:2] > Version(NEWEST_TESTED).release:
        logger.warning_once(
            f"transformers {version} is newer than the versions this model was tested with, {OLDEST_TESTED} to "
            f"{NEWEST_TESTED}. If something fails, install transformers {NEWEST_TESTED} or get a newer copy of the "
            "model's code."
        )


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    Select the positions of `hidden_states` (batch, length, width) whose logits are needed. transformers has this
    function from 5.21 on.

    Args:
        logits_to_keep: how many last positions to keep, 0 for all positions; or positions (count,) for all rows; or
            positions (batch, count) for each row; or a boolean mask (batch, length), with a result (kept, width).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
