"""What a training step costs, and how far the gradients of two models lie apart."""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from empathic.benchmarks.memory_plan import LiveMemory

aten = torch.ops.aten


@dataclass
class Side:
    """
    One of the trainers that are compared.

    Args:
        name: in tables.
        model: what it trains.
        batch: of its own form, on the model's device.
        compute_loss: (model, batch) -> the loss, a scalar with its graph.
    """

    name: str
    model: nn.Module
    batch: dict
    compute_loss: Callable[[nn.Module, dict], torch.Tensor]

    def step(self) -> torch.Tensor:
        """Forward and backward, from no gradients at all; the loss. There is no optimizer: it costs all the same."""
        self.model.zero_grad(set_to_none=True)
        loss = self.compute_loss(self.model, self.batch)
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the last step, by parameter."""
        return {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}


def _attention(query, key, value, *args, **kwargs) -> int:
    """Operations of a CPU's fused attention, in full and not its causal half, as torch counts those of a GPU's."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward(grad, query, key, value, *args, **kwargs) -> int:
    """Five products in place of two: the scores are computed again."""
    return _attention(query, key, value) * 5 // 2


# torch's counter knows the fused attention of a GPU only.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def operations(side: Side) -> int:
    """Floating point operations of the matrix products of a step, what checkpoints compute again included."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        side.step()
    return counter.get_total_flops()


def watched_step(side: Side) -> tuple[float, int]:
    """
    A step's loss and the largest number of bytes that it holds beside the weights: activations, logits, gradients.

    On a CPU the tensors alive are added up, inside of autograd functions as well; on a GPU its allocator is asked.
    Operations are not counted in the same step: their counter's hooks keep what checkpoints would let go.
    """
    side.model.zero_grad(set_to_none=True)
    gc.collect()
    if next(side.model.parameters()).device.type == "cuda":
        side.step()  # the first takes memory for the libraries' work
        side.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = side.step()
        torch.cuda.synchronize()
        return loss.item(), torch.cuda.max_memory_allocated() - before
    with LiveMemory([*side.model.parameters(), *side.model.buffers()]) as live:
        weights = live.live
        loss = side.step()
    return loss.item(), live.peak - weights


def median_seconds(sides: list[Side], steps: int) -> dict[str, float]:
    """
    The median time of a step of each, in turns so that what disturbs the machine disturbs all: CPU time of the process,
    or on a GPU the time by the clock with the device idle at both ends.
    """
    is_cuda = next(sides[0].model.parameters()).device.type == "cuda"
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(steps):
        for side in sides:
            if is_cuda:
                torch.cuda.synchronize()
            clock = time.perf_counter if is_cuda else time.process_time
            start = clock()
            side.step()
            if is_cuda:
                torch.cuda.synchronize()
            seconds[side.name].append(clock() - start)
            side.model.zero_grad(set_to_none=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def largest_difference(side: Side, other: Side) -> tuple[float, float]:
    """
    Of the gradients that the last step of each left: the largest absolute difference, and the largest gradient.

    Raises:
        ValueError: they train different parameters.
    """
    ours, theirs = side.gradients(), other.gradients()
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"{side.name} and {other.name} train different parameters: {sorted(ours.keys() ^ theirs.keys())[:4]}"
        )
    far = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    return far, max(gradient.abs().max().item() for gradient in theirs.values())


@contextmanager
def norms_in_full():
    """transformers' RMSNorm computes in fp32 even where everything else is fp64: here it does not."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    with patch.object(Qwen2RMSNorm, "forward", forward):
        yield
