"""epo_loss against numbers worked by hand."""

import math

import pytest
import torch

from empathic.trainers import epo_loss


def test_values_worked_by_hand():
    # beta 2: the rewards are -1 and -2, so the lead is 1 and 1 - 0.5 remains: -log sigmoid(0.5) = log(1 + e^-0.5).
    # Second pair: rewards -3 and -1, lead -2, minus 0.5: log(1 + e^2.5).
    chosen, rejected = torch.tensor([-0.5, -1.5]), torch.tensor([-1.0, -0.5])
    losses, chosen_rewards, rejected_rewards = epo_loss(chosen, rejected, beta=2.0, gamma=0.5)
    torch.testing.assert_close(losses, torch.tensor([math.log1p(math.exp(-0.5)), math.log1p(math.exp(2.5))]))
    torch.testing.assert_close(losses, torch.tensor([0.4740770, 2.5788897]), atol=1e-6, rtol=0)
    torch.testing.assert_close(chosen_rewards, torch.tensor([-1.0, -3.0]))
    torch.testing.assert_close(rejected_rewards, torch.tensor([-2.0, -1.0]))


def test_gamma_is_absolute():
    """Halving beta halves the rewards but not the margin: lead 0.5, minus 0.5 leaves log 2."""
    losses, _, _ = epo_loss(torch.tensor([-0.5]), torch.tensor([-1.0]), beta=1.0, gamma=0.5)
    torch.testing.assert_close(losses, torch.tensor([math.log(2)]))


def test_gradient():
    """d loss / d chosen = -beta * sigmoid(gamma - lead), and the opposite for the rejected."""
    chosen = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    losses, chosen_rewards, rejected_rewards = epo_loss(chosen, rejected, beta=2.0, gamma=0.5)
    losses.sum().backward()
    expected = torch.tensor([2 / (1 + math.exp(0.5))], dtype=torch.float64)
    torch.testing.assert_close(chosen.grad, -expected)
    torch.testing.assert_close(rejected.grad, expected)
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_far_apart_pairs_stay_finite():
    losses, _, _ = epo_loss(torch.tensor([-1000.0, 0.0]), torch.tensor([0.0, -1000.0]), beta=2.0, gamma=0.5)
    torch.testing.assert_close(losses, torch.tensor([2000.5, 0.0]))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        epo_loss(torch.zeros(2), torch.zeros(3), beta=2.0, gamma=0.5)
