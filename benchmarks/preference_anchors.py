"""
CPOTrainer's loss on its own batches without a tensor of all logits, by other projects' code: the fused head of TRL's
DPOTrainer, and Liger's fused linear SimPO.
"""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from trl.trainer import utils as trl_utils

from ..trainers.losses import IGNORE_INDEX

if TYPE_CHECKING:  # the import would warn before preference_sides turns the warning off
    from trl.experimental.cpo import CPOTrainer

FUSED, FUSED_REPLIES, LIGER = "TRL's fused head", "TRL's fused head, replies only", "Liger's fused SimPO"


def unavailable() -> dict[str, str]:
    """Return the anchors that cannot run with the installed packages, with the reason and the remedy."""
    found: dict[str, str] = {}
    if not hasattr(trl_utils, "add_fused_lm_head"):
        found |= dict.fromkeys((FUSED, FUSED_REPLIES), "this version of TRL has no fused head; install trl>=1.16")
    elif not hasattr(trl_utils, "_use_triton"):
        found |= {FUSED_REPLIES: "this version of TRL chooses the positions of its fused head in another way"}
    if find_spec("liger_kernel") is None:
        found[LIGER] = "liger-kernel is not installed; run `pip install --no-deps liger-kernel`"
    return found


def _rows(trainer: Any, batch: dict) -> tuple[dict, torch.Tensor]:
    """Stack the chosen and the rejected rows as CPOTrainer does; return the model's inputs and the labels."""
    rows = trainer.concatenated_inputs(batch, padding_value=trainer.pad_token_id, device=trainer.accelerator.device)
    names = {name: rows[f"concatenated_{name}"] for name in ("input_ids", "attention_mask")}
    return {**names, "use_cache": False}, rows["concatenated_labels"]


def fused_head_loss(trainer: "CPOTrainer", replies_only: bool) -> Callable[[nn.Module, dict], torch.Tensor]:
    """
    Give the trainer's model the fused head of DPOTrainer; return a `compute_loss` (model, batch) with CPOTrainer's loss
    on the head's log-probabilities.

    Args:
        trainer: gives the batch, the settings and the loss.
        replies_only: score the replies' positions only, as the head does on a GPU. On a CPU it scores every position.
    """
    wrapped: Any = trainer.model
    trl_utils.add_fused_lm_head(wrapped.get_base_model())

    def compute_loss(model: nn.Module, batch: dict) -> torch.Tensor:
        inputs, labels = _rows(trainer, batch)
        as_on_gpu = patch.object(trl_utils, "_use_triton", lambda device: True) if replies_only else nullcontext()
        with as_on_gpu:
            logps = model(**inputs, labels=labels, fused_lm_head=True).log_probs  # (2 * pairs, length - 1)
        summed, lengths = logps.sum(1), (labels[:, 1:] != IGNORE_INDEX).sum(1)
        chosen, rejected = (summed / lengths).chunk(2)
        losses, _, _ = trainer.cpo_loss(chosen, rejected)
        nll = -summed.chunk(2)[0].sum() / lengths.chunk(2)[0].sum()
        return losses.mean() + trainer.cpo_alpha * nll

    return compute_loss


def liger_loss(trainer: "CPOTrainer") -> Callable[[nn.Module, dict], torch.Tensor]:
    """
    Return a `compute_loss` (model, batch) with Liger's fused head and loss, in chunks of one pair. Liger compiles its
    chunks on a GPU; on a CPU they run uncompiled.
    """
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOLoss  # pyright: ignore[reportMissingImports]

    fused = LigerFusedLinearSimPOLoss(
        ignore_index=IGNORE_INDEX,
        beta=trainer.beta,
        gamma=trainer.simpo_gamma,
        alpha=trainer.cpo_alpha,
        compute_nll_loss=True,
        compiled=trainer.accelerator.device.type == "cuda",
    )

    def compute_loss(model: nn.Module, batch: dict) -> torch.Tensor:
        inputs, labels = _rows(trainer, batch)
        base = trainer.accelerator.unwrap_model(model).get_base_model()
        with trainer.accelerator.autocast():
            hidden = base.model(**inputs).last_hidden_state[:, :-1]  # (2 * pairs, length - 1, width)
            head = base.get_output_embeddings()
            return fused(head.weight, hidden, labels[:, 1:], head.bias)[0]

    return compute_loss
