"""The preference losses against numbers computed by hand."""

import math

import pytest
import torch

from empathic.trainers import epo_loss
from empathic.trainers.losses import NEGATIVES_LOSSES, epo_loss_over_negatives


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


def test_several_negatives_by_hand():
    """Beta 2: rewards -1 against -2 and -4 in the first row, and against -2 alone in the second; gamma 0.5."""
    chosen = torch.tensor([-0.5, -0.5], dtype=torch.float64)
    rejected = torch.tensor([[-1.0, -2.0], [-1.0, 99.0]], dtype=torch.float64)
    present = torch.tensor([[True, True], [True, False]])
    one, two = math.log1p(math.exp(-0.5)), math.log1p(math.exp(-2.5))
    found, chosen_rewards, rejected_rewards = epo_loss_over_negatives(chosen, rejected, 2.0, 0.5, "pairs", present)
    torch.testing.assert_close(found, torch.tensor([(one + two) / 2, one], dtype=torch.float64))
    assert chosen_rewards.tolist() == [-1, -1] and rejected_rewards[0].tolist() == [-2, -4]
    found, *_ = epo_loss_over_negatives(chosen, rejected, 2.0, 0.5, "listwise", present)
    # The softmax is over -1 - 0.5, -2 and -4.
    three = math.log(math.exp(-1.5) + math.exp(-2) + math.exp(-4)) + 1.5
    torch.testing.assert_close(found, torch.tensor([three, one], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NEGATIVES_LOSSES)
def test_one_negative_is_the_paired_loss_bit_by_bit(kind, dtype):
    results = []
    for paired in (True, False):
        torch.manual_seed(0)
        chosen, rejected = (torch.randn(257, dtype=dtype, requires_grad=True) for _ in range(2))
        if paired:
            losses, *rewards = epo_loss(chosen, rejected, 2.0, 0.5)
        else:
            losses, *rewards = epo_loss_over_negatives(chosen, rejected[:, None], 2.0, 0.5, kind)
        losses.sum().backward()
        results.append([losses.detach(), chosen.grad, rejected.grad, *(reward.flatten() for reward in rewards)])
    assert all(map(torch.equal, *results))


def test_listwise_is_a_cross_entropy():
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5,), (5, 3)))
    losses, *_ = epo_loss_over_negatives(chosen, rejected, 1.7, 0.3, "listwise")
    ours = torch.autograd.grad(losses.sum(), (chosen, rejected))
    logits = torch.cat([1.7 * chosen[:, None] - 0.3, 1.7 * rejected], dim=1)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    theirs = torch.autograd.grad(expected.sum(), (chosen, rejected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_absent_negatives_have_no_gradient_and_far_ones_stay_finite():
    for kind in NEGATIVES_LOSSES:
        chosen = torch.tensor([0.0, -1000.0], requires_grad=True)
        rejected = torch.tensor([[-1.0, float("1e4")], [0.0, -3.0]], requires_grad=True)
        present = torch.tensor([[True, False], [True, True]])
        losses, *_ = epo_loss_over_negatives(chosen, rejected, 2.0, 0.5, kind, present)
        losses.sum().backward()
        assert rejected.grad[0, 1] == 0 and torch.isfinite(losses).all()
        assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()


def test_shapes_and_kinds_of_several_negatives():
    with pytest.raises(ValueError, match=r"\(2,\) and \(2,\)"):
        epo_loss_over_negatives(torch.zeros(2), torch.zeros(2), 2.0, 0.5)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3, 1\)"):
        epo_loss_over_negatives(torch.zeros(2), torch.zeros(3, 1), 2.0, 0.5)
    with pytest.raises(ValueError, match="'best'; choose one of pairs, listwise"):
        epo_loss_over_negatives(torch.zeros(2), torch.zeros(2, 1), 2.0, 0.5, "best")
