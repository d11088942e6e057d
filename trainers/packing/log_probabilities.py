"""Log-probabilities of target tokens, without a full tensor of logits.

A language model's head gives a row of logits for every position. With Qwen's vocabulary of 152,000, these logits
dominate memory and computation. Here the head runs only on positions that predict a target, a few rows at a time, and
only one number is kept for each row.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Size of a chunk of logits. On a CPU a chunk should be small compared to the head's weight; on a GPU it should be large
# enough for an efficient matrix product.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


@contextmanager
def log_probabilities_from(head: nn.Module, where: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor):
    """A context in which the head returns log-probabilities in place of logits.

    The context replaces the head's `forward` instead of reading its weight, because ZeRO-3 and FSDP gather the
    parameters of a module when it is called, and the model must be called through its wrapper. The model must compute
    the logits of all positions (its default); its `logits` are then the log-probabilities.

    Args:
        head: the model's output embeddings.
        where: (row, column) of the hidden states that predict a target, (targets,) each.
        targets: the token ids, (targets,).

    Yields:
        A list, to which each call of the head appends its output: (targets,), fp64 for an fp64 model, otherwise fp32.
        See `are_log_probabilities`.
    """
    forward, had_own = head.forward, "forward" in vars(head)
    given = []

    def forward_to_log_probabilities(hidden):
        given.append(head_log_probabilities(head, forward, hidden[where], targets))
        return given[-1]

    head.forward = forward_to_log_probabilities
    try:
        yield given
    finally:
        if had_own:
            head.forward = forward
        else:
            del head.forward


def are_log_probabilities(logits: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether a model returned the unchanged output of its head within `log_probabilities_from`.

    Some models scale or cap the head's logits (Gemma, Cohere, Granite), so that their output is not usable.
    """
    if len(given) != 1 or logits.shape != given[0].shape:
        return False
    return torch.equal(torch.nan_to_num(logits.detach()), torch.nan_to_num(given[0].detach()))


def head_log_probabilities(head: nn.Module, forward, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute log p(target) of hidden states under a head, with gradients for both.

    Args:
        head: the module, whose parameters are gathered.
        forward: the original `forward` of the head.
        hidden: (targets, width).
        targets: token ids (targets,).

    Returns:
        (targets,), fp64 for fp64 hidden states, otherwise fp32.
    """
    is_linear = type(head).forward is nn.Linear.forward and getattr(forward, "__func__", None) is nn.Linear.forward
    if is_linear:
        return linear_log_probabilities(hidden, head.weight, targets, head.bias)
    # A head with an adapter, a quantized or any other head: run the module chunk by chunk, and again in the backward.
    rows = chunk_rows(hidden, head_vocabulary(head))
    parts = []
    for some, of_them in zip(hidden.split(rows), targets.split(rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_through, forward, some, of_them, use_reentrant=False))
        else:
            parts.append(_through(forward, some, of_them))
    return torch.cat(parts)


def linear_log_probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute log p(target) under logits `hidden @ weight.T + bias`, in chunks, in autocast's precision if it is on.

    If weight and bias are frozen, the forward also computes the gradient of each log-probability, so the backward needs
    no second pass over the vocabulary. If they are trained, the backward computes the logits again.

    Args:
        hidden: (targets, width).
        weight: (vocabulary, width).
        targets: token ids (targets,).
        bias: (vocabulary,).

    Returns:
        (targets,), fp64 for fp64 hidden states, otherwise fp32. The softmax is computed in this precision.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    hidden = hidden.to(dtype)
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    rows = chunk_rows(hidden, len(weight))
    return (_TrainedHead if trains else _FrozenHead).apply(hidden, weight, bias, targets, rows)


def chunk_rows(hidden: torch.Tensor, vocabulary: int) -> int:
    """Return the number of rows of logits in a chunk."""
    size = CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
    return max(8, size // (vocabulary * _wide(hidden.dtype).itemsize))


def head_vocabulary(head: nn.Module) -> int:
    """Return the number of rows of a head's largest matrix; an adapter's or quantized matrix has no more rows."""
    return max(getattr(head, "out_features", 0), *(len(p) for p in head.parameters() if p.dim()), 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _through(forward, hidden, targets):
    logits = forward(hidden)
    return -F.cross_entropy(logits.to(_wide(logits.dtype)), targets, reduction="none")


class _Chunks:
    """The logits of a chunk, their exponentials and sums, in buffers that are reused for every chunk."""

    def __init__(self, hidden, weight, bias, rows):
        self.hidden, self.rows = hidden, rows
        self.weight = weight.detach().to(hidden.dtype)
        self.bias = None if bias is None else bias.detach().to(_wide(hidden.dtype))
        self.logits = hidden.new_empty(min(rows, len(hidden)), len(weight))
        self.wide = self.logits.to(_wide(hidden.dtype))  # the same tensor, if it has this precision

    def __iter__(self):
        for start in range(0, len(self.hidden), self.rows):
            yield slice(start, min(start + self.rows, len(self.hidden)))

    def exponentials(self, chunk: slice, targets):
        """Compute target log-probabilities (rows,), exponentials (rows, vocabulary) and their sums (rows, 1)."""
        hidden = self.hidden[chunk]
        logits, wide = self.logits[: len(hidden)], self.wide[: len(hidden)]
        torch.mm(hidden, self.weight.t(), out=logits)
        if wide.dtype != logits.dtype:
            wide.copy_(logits)
        if self.bias is not None:
            wide += self.bias
        wide -= wide.amax(dim=1, keepdim=True)
        of_targets = wide.gather(1, targets[chunk, None])
        sums = wide.exp_().sum(dim=1, keepdim=True)
        return (of_targets - sums.log()).squeeze(1), wide, sums

    def slopes(self, wide, sums, targets):
        """Compute d log p(target) / d logits = onehot - softmax, (rows, vocabulary), in place and scaled by `-sums`."""
        return wide.scatter_add_(1, targets[:, None], -sums)

    def narrow(self, wide):
        """Convert to the precision of the matrix products."""
        return wide if wide.dtype == self.logits.dtype else self.logits[: len(wide)].copy_(wide)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows):
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _Chunks(hidden, weight, bias, rows)
            logps = chunks.wide.new_empty(len(hidden))
            slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            for chunk in chunks:
                logps[chunk], wide, sums = chunks.exponentials(chunk, targets)
                if slope is not None:
                    product = chunks.narrow(chunks.slopes(wide, sums, targets[chunk])) @ chunks.weight
                    slope[chunk] = product / -sums
        ctx.save_for_backward(*([] if slope is None else [slope]))
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.rows = rows
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _Chunks(hidden, weight, bias, rows)
            logps = chunks.wide.new_empty(len(hidden))
            for chunk in chunks:
                logps[chunk] = chunks.exponentials(chunk, targets)[0]
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _Chunks(hidden, weight, bias, ctx.rows)
            for chunk in chunks:
                _, wide, sums = chunks.exponentials(chunk, targets)
                slopes = chunks.slopes(wide, sums, targets[chunk]).mul_(grad[chunk, None] / -sums)
                if bias_grad is not None:
                    bias_grad += slopes.sum(0)
                slopes = chunks.narrow(slopes)
                hidden_grad[chunk] = slopes @ chunks.weight
                if weight_grad is None:
                    continue
                if weight_grad.dtype == slopes.dtype:
                    weight_grad.addmm_(slopes.t(), hidden[chunk])
                else:
                    weight_grad += slopes.t() @ hidden[chunk]
        return hidden_grad, weight_grad, bias_grad, None, None
