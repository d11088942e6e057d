"""The preference loss: a pure function of log-probabilities."""

import torch
import torch.nn.functional as F


def epo_loss(
    chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, beta: float, gamma: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Emotional Preference Optimization, equations 1 and 2 of the paper, one value a pair.

    The reward of a reply is `beta` times the mean log-probability of its tokens; the loss is
    `-log sigmoid(reward(chosen) - reward(rejected) - gamma)`. There is no reference model. `gamma` is absolute, as
    TRL's `simpo_gamma`, and not relative to `beta` as in the SimPO paper.

    Args:
        chosen_logps: mean log-probability (nats) of a token of the chosen reply, (batch,).
        rejected_logps: the same of the counter-emotional reply, (batch,).
        beta: scale of the rewards; 2 in section 4.2.
        gamma: margin by which the chosen reward should lead; 0.5 in section 4.2.

    Returns:
        losses (batch,), with gradient; chosen_rewards (batch,) and rejected_rewards (batch,), detached, for logging.

    Raises:
        ValueError: the two inputs differ in shape.
    """
    if chosen_logps.shape != rejected_logps.shape:
        raise ValueError(
            "epo_loss takes one chosen and one rejected log-probability a pair, but got the shapes "
            f"{tuple(chosen_logps.shape)} and {tuple(rejected_logps.shape)}."
        )
    losses = -F.logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)
    return losses, beta * chosen_logps.detach(), beta * rejected_logps.detach()
