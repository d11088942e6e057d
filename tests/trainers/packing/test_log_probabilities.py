"""Log-probabilities without full logits, against torch's on full logits: values, gradients, and memory."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from empathic.trainers.packing import log_probabilities
from empathic.trainers.packing.log_probabilities import (
    are_log_probabilities,
    linear_log_probabilities,
    log_probabilities_from,
)

VOCABULARY, WIDTH, TARGETS, ROWS = 100, 6, 37, 8  # a transposed weight must not look like logits


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Set the chunk to the minimum, `ROWS` rows of fp32 logits."""
    monkeypatch.setitem(log_probabilities.CHUNK_BYTES, "cpu", 1)


def tensors(dtype=torch.float64, trains=False, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=trains)
    bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=trains) if bias else None
    return hidden, weight, bias, torch.randint(VOCABULARY, (TARGETS,)), torch.randn(TARGETS, dtype=torch.float64)


def plain(hidden, weight, bias, targets):
    return -F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")


class Largest(TorchDispatchMode):
    """Records the most rows of a vocabulary-sized tensor, and the matrix products with the head's weight."""

    def __init__(self):
        super().__init__()
        self.rows, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if (
            torch.is_tensor(output)
            and output.dim()
            and output.shape[-1] == VOCABULARY
            and output.dtype.is_floating_point
        ):
            self.rows = max(self.rows, output.numel() // VOCABULARY)
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return output


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_values_and_gradients_are_torchs(trains, bias):
    hidden, weight, bias, targets, slope = tensors(trains=trains, bias=bias)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    expected = plain(hidden, weight, bias, targets)
    found = linear_log_probabilities(hidden, weight, targets, bias)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad((expected * slope).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((found * slope).sum(), inputs), gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("trains", "forward", "backward"), [(False, 10, 0), (True, 5, 15)], ids=["frozen", "trained"])
def test_the_vocabulary_is_met_in_chunks_and_once_if_frozen(trains, forward, backward):
    """There are 5 chunks; each product with the head's weight counts."""
    hidden, weight, _, targets, _ = tensors(torch.float32, trains, bias=False)
    with Largest() as largest:
        loss = linear_log_probabilities(hidden, weight, targets).sum()
        assert (largest.rows, largest.products) == (ROWS, forward)
        largest.rows = 0
        loss.backward()
    assert largest.products == forward + backward
    assert largest.rows == (ROWS if trains else 0)
    with Largest() as largest:
        plain(hidden, weight, None, targets)
    assert largest.rows == TARGETS  # the test would detect it


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_half_precision_takes_the_softmax_in_fp32(trains):
    """As close to the exact gradient as torch comes from the logits in fp32."""
    hidden, weight, _, targets, slope = tensors(trains=trains, bias=False)
    exact = torch.autograd.grad((plain(hidden, weight, None, targets) * slope).sum(), hidden)[0]
    half, weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_(trains)
    logits = F.linear(half, weight).float()
    expected = -F.cross_entropy(logits, targets, reduction="none")
    found = linear_log_probabilities(half, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    ours, theirs = (torch.autograd.grad((each * slope).sum(), half)[0].double() for each in (found, expected))
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()

    full = hidden.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = linear_log_probabilities(full, weight.float(), targets)
    torch.testing.assert_close(under_autocast, found)


def test_no_target_gives_gradients_of_zero():
    hidden, weight, bias, targets, _ = tensors(trains=True)
    linear_log_probabilities(hidden[:0], weight, targets[:0], bias).sum().backward()
    assert all(not tensor.grad.any() for tensor in (hidden, weight, bias))


class TinyModel(nn.Module):
    """Passes ids to its head and, with a cap, caps the logits."""

    def __init__(self, cap=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head, self.cap = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY), cap

    def forward(self, ids):
        logits = self.lm_head(self.embed(ids))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_gives_log_probabilities_within_and_logits_after(lora):
    model = TinyModel().double()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).double()
    head = model.lm_head
    ids = torch.randint(VOCABULARY, (4, 12))
    where, targets = (torch.tensor([0, 0, 3]), torch.tensor([2, 5, 0])), torch.tensor([7, 7, 9])
    logits = model(ids)
    expected = logits[where].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    with Largest() as largest, log_probabilities_from(head, where, targets) as given:
        found = model(ids)
        assert are_log_probabilities(found, given)
    assert largest.rows <= 4 * 12 and found.shape == (3,)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected.sum(), trained, allow_unused=True)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), trained, allow_unused=True), gradients, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(model(ids), logits, atol=0, rtol=0)
    with pytest.raises(RuntimeError), log_probabilities_from(head, where, targets):
        raise RuntimeError
    torch.testing.assert_close(model(ids), logits, atol=0, rtol=0)


def test_logits_that_the_model_bends_are_noticed():
    where, targets = (torch.tensor([0]), torch.tensor([0])), torch.tensor([7])
    model = TinyModel(cap=30.0)
    with log_probabilities_from(model.lm_head, where, targets) as given:
        assert not are_log_probabilities(model(torch.tensor([[1, 2]])), given)
