"""Measure the costs of a training step, and the difference between the gradients of two models."""

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

from .memory_plan import LiveMemory

aten = torch.ops.aten


@dataclass
class Side:
    """
    A trainer in a comparison.

    Args:
        name: name in tables.
        model: the trained model.
        batch: a batch in the trainer's format, on the model's device.
        compute_loss: (model, batch) -> the loss, a scalar with its graph.
    """

    name: str
    model: nn.Module
    batch: dict
    compute_loss: Callable[[nn.Module, dict], torch.Tensor]

    def step(self) -> torch.Tensor:
        """
        Run forward and backward after clearing the gradients; return the loss. There is no optimizer, because its cost
        is equal for all trainers.
        """
        self.model.zero_grad(set_to_none=True)
        loss = self.compute_loss(self.model, self.batch)
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the last step by parameter name."""
        return {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}


def _attention(query, key, value, *args, **kwargs) -> int:
    """Operations of the CPU's fused attention, counted in full like torch does for GPUs, not only the causal half."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward(grad, query, key, value, *args, **kwargs) -> int:
    """Operations of the backward pass: five products instead of two, because the scores are recomputed."""
    return _attention(query, key, value) * 5 // 2


# torch's counter supports the fused attention of GPUs only.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _added_product(total, left, right, **kwargs) -> int:
    """Operations of a matrix product that is added in place, such as those of TRL's fused head."""
    return 2 * left[0] * left[1] * right[1]


# What torch's counter leaves out.
UNCOUNTED = {**CPU_ATTENTION, aten.addmm_: _added_product}


def operations(side: Side) -> int:
    """Count the floating point operations of a step's matrix products, including recomputation by checkpointing."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        side.step()
    return counter.get_total_flops()


def watched_step(side: Side) -> tuple[float, int]:
    """
    Run a step and return its loss and its peak bytes without the weights: activations, logits, gradients.

    On a CPU the live tensors are added up, including those inside autograd functions; on a GPU the allocator reports
    the peak. Operations are counted in another step, because the hooks of their counter keep tensors that checkpointing
    would free.
    """
    side.model.zero_grad(set_to_none=True)
    gc.collect()
    if next(side.model.parameters()).device.type == "cuda":
        side.step()  # the first step allocates the workspaces of the libraries
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
    Measure the median time of a step of each side, alternating between the sides so that disturbances affect all sides:
    CPU time of the process, or on a GPU wall-clock time with the device synchronized before and after.
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
    Compare the gradients of the last steps: return their largest absolute difference, and the largest gradient.

    Raises:
        ValueError: if the sides train different parameters.
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
    """Context manager that makes transformers' RMSNorm compute in the input's dtype; by default it computes in fp32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    with patch.object(Qwen2RMSNorm, "forward", forward):
        yield
