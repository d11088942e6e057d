"""The preference losses, pure functions of log-probabilities, and the label of tokens without loss."""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # the label of a token that is not a target
NEGATIVES_LOSSES = ("pairs", "listwise")  # how a row's rejected replies become one loss


def epo_loss(
    chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, beta: float, gamma: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the Emotional Preference Optimization loss of each pair, equations 1 and 2 of the paper.

    The reward of a reply is `beta` times the mean log-probability of its tokens; the loss is
    `-log sigmoid(reward(chosen) - reward(rejected) - gamma)`. There is no reference model. `gamma` is absolute, like
    TRL's `simpo_gamma`, and not relative to `beta` as in the SimPO paper.

    Args:
        chosen_logps: mean log-probability (nats) per token of the chosen reply, (batch,).
        rejected_logps: mean log-probability (nats) per token of the counter-emotional reply, (batch,).
        beta: scale of the rewards; 2 in section 4.2.
        gamma: margin by which the chosen reward should lead; 0.5 in section 4.2.

    Returns:
        losses (batch,), with gradient; chosen_rewards (batch,) and rejected_rewards (batch,), detached, for logging.

    Raises:
        ValueError: if the two inputs differ in shape.
    """
    if chosen_logps.shape != rejected_logps.shape:
        raise ValueError(
            "epo_loss takes one chosen and one rejected log-probability for each pair, but got the shapes "
            f"{tuple(chosen_logps.shape)} and {tuple(rejected_logps.shape)}."
        )
    losses = -F.logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)
    return losses, beta * chosen_logps.detach(), beta * rejected_logps.detach()


def epo_loss_over_negatives(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    beta: float,
    gamma: float,
    kind: str = "pairs",
    present: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the Emotional Preference Optimization loss of each row, which has one or more rejected replies.

    With rewards `r` as in `epo_loss`, the loss of a row is

    - for `pairs`: the mean, over its rejected replies, of `-log sigmoid(r(chosen) - r(rejected) - gamma)`;
    - for `listwise`: `-log(exp(r(chosen) - gamma) / (exp(r(chosen) - gamma) + sum of exp(r(rejected))))`, the negative
      log-probability of the chosen reply under a softmax over the rewards of all replies.

    For a row with one rejected reply, both equal `epo_loss`.

    Args:
        chosen_logps: mean log-probability (nats) per token of the chosen reply, (batch,).
        rejected_logps: likewise of the rejected replies, (batch, negatives).
        beta, gamma: as in `epo_loss`.
        kind: one of `NEGATIVES_LOSSES`.
        present: (batch, negatives), False for the padding of a row with fewer rejected replies. None: no padding. A row
            has at least one rejected reply.

    Returns:
        losses (batch,), with gradient; chosen_rewards (batch,) and rejected_rewards (batch, negatives), detached, for
        logging.

    Raises:
        ValueError: if the inputs do not fit each other, or `kind` is unknown.
    """
    if rejected_logps.dim() != 2 or chosen_logps.shape != rejected_logps.shape[:1]:
        raise ValueError(
            "epo_loss_over_negatives takes chosen log-probabilities (batch,) and rejected ones (batch, negatives), but "
            f"got the shapes {tuple(chosen_logps.shape)} and {tuple(rejected_logps.shape)}."
        )
    if kind not in NEGATIVES_LOSSES:
        raise ValueError(f"The loss over negatives is {kind!r}; choose one of {', '.join(NEGATIVES_LOSSES)}.")
    if present is None:
        present = torch.ones_like(rejected_logps, dtype=torch.bool)
    lead = beta * (chosen_logps[:, None] - rejected_logps) - gamma
    if kind == "listwise":
        losses = -F.logsigmoid(-torch.logsumexp((-lead).masked_fill(~present, float("-inf")), dim=1))
    else:
        losses = (-F.logsigmoid(lead) * present).sum(1) / present.sum(1)
    return losses, beta * chosen_logps.detach(), beta * rejected_logps.detach()
