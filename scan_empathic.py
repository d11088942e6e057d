"""The recurrences of Mamba-1 and Mamba-2 in plain PyTorch, for training and inference on any device.

Both run in chunks over time, start from any state and return the final state. A step with delta 0 does not change the
state, so rows of different lengths can share a batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Elements of one block's (time, rows, state, inner) buffers. On CPU four such buffers should fit into its caches (this
# value was the fastest measured); a GPU needs few, large kernels instead.
_CPU_BLOCK_ELEMENTS = 1 << 19
_GPU_BLOCK_ELEMENTS = 1 << 25
_MIN_BLOCK_STEPS = 8
_MAX_BLOCK_STEPS = 64


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to float32, except for float64: no recurrence runs in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def autocast_off(device: torch.device) -> torch.autocast:
    """Return a context without autocast on a device."""
    return torch.autocast(device_type=device.type, enabled=False)


# ------------------------------------------------------------------------------------------ Mamba-1's selective scan


class _SelectiveScan(torch.autograd.Function):
    """The scan in blocks of rows and time steps. Each block expands its inputs to (time, rows, state, inner) in small
    reused buffers, so memory does not grow with `state`, and the recurrence is one in-place kernel per step; autograd
    would copy the whole sequence at every step. Only the inputs and the state at the start of each block are saved;
    backward recomputes the rest."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, initial_state, steps, rows):
        batch, length, inner = u.shape
        state = A.shape[1]
        blocks = -(-length // steps)
        starts = u.new_empty(blocks, batch, state, inner)
        y = torch.empty_like(u)
        final = u.new_empty(batch, state, inner)
        # exp2 is about twice as fast as exp on a CPU.
        log2_decay = (A * math.log2(math.e)).t().contiguous()
        # One step more than the block: the first entry is the state before the block.
        states = u.new_empty((steps + 1) * rows * state * inner)
        decay = u.new_empty(steps * rows * state * inner)
        for row in range(0, batch, rows):
            picked = slice(row, row + rows)
            delta_r, drive_r, B_r, C_r = _time_major(picked, delta, u, B, C)
            h = initial_state[picked].transpose(1, 2)
            for k in range(blocks):
                starts[k, picked] = h
                cut = slice(k * steps, (k + 1) * steps)
                H, _ = _run_block(delta_r[cut], drive_r[cut], log2_decay, B_r[cut], h, states, decay)
                y[picked, cut] = _rows_times(C_r[cut], H[1:]).transpose(0, 1)
                h = H[-1]
            final[picked] = h
        ctx.save_for_backward(u, delta, A, B, C, starts)
        ctx.steps, ctx.rows = steps, rows
        return y, final.transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_final):
        u, delta, A, B, C, starts = ctx.saved_tensors
        with autocast_off(u.device):
            return _scan_backward(u, delta, A, B, C, starts, ctx.steps, ctx.rows, grad_y, grad_final)


def _time_major(picked: slice, delta, u, B, C):
    """Select rows of the scan's inputs and return delta, delta * u, B and C as (time, rows, ...)."""
    delta = delta[picked].transpose(0, 1).contiguous()
    drive = delta * u[picked].transpose(0, 1)
    return delta, drive, B[picked].transpose(0, 1).contiguous(), C[picked].transpose(0, 1).contiguous()


def _rows_times(vectors, matrices):
    """(time, rows, m) x (time, rows, m, n) -> (time, rows, n), with row vectors: bmm is far slower with columns."""
    return torch.bmm(vectors.flatten(0, 1)[:, None], matrices.flatten(0, 1)).view(*vectors.shape[:2], -1)


def _run_block(delta, drive, log2_decay, B, start, states, decay):
    """Run the recurrence over one block. Returns the states (time + 1, rows, state, inner), the first of which is the
    state before the block, and the decays (time, rows, state, inner); both are views of the given buffers."""
    time, rows, inner = delta.shape
    step = (rows, log2_decay.shape[0], inner)
    H = states[: (time + 1) * math.prod(step)].view(time + 1, *step)
    a = decay[: time * math.prod(step)].view(time, *step)
    # A is negative and delta is not, so the exponent is never positive and cannot overflow.
    torch.mul(delta[:, :, None], log2_decay, out=a)
    torch.exp2(a, out=a)
    H[0] = start
    torch.mul(drive[:, :, None], B[..., None], out=H[1:])
    h = H.unbind(0)
    for t, a_t in enumerate(a.unbind(0)):
        h[t + 1].addcmul_(a_t, h[t])
    return H, a


def _scan_backward(u, delta, A, B, C, starts, steps, rows, grad_y, grad_final):
    blocks, batch, state, inner = starts.shape
    decay_rate = A.t().contiguous()
    log2_decay = (A * math.log2(math.e)).t().contiguous()
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    grad_A = torch.zeros_like(decay_rate)
    grad_initial = u.new_empty(batch, inner, state)
    states = u.new_empty((steps + 1) * rows * state * inner)
    decay, grads, scratch = (u.new_empty(steps * rows * state * inner) for _ in range(3))
    for row in range(0, batch, rows):
        picked = slice(row, row + rows)
        delta_r, drive_r, B_r, C_r = _time_major(picked, delta, u, B, C)
        u_r = u[picked].transpose(0, 1).contiguous()
        grad_y_r = grad_y[picked].transpose(0, 1).contiguous()
        carry = grad_final[picked].transpose(1, 2).contiguous()
        for k in reversed(range(blocks)):
            cut = slice(k * steps, (k + 1) * steps)
            delta_k, drive_k, B_k, C_k, grad_y_k = delta_r[cut], drive_r[cut], B_r[cut], C_r[cut], grad_y_r[cut]
            H, a = _run_block(delta_k, drive_k, log2_decay, B_k, starts[k, picked], states, decay)

            # The gradient of h_t: G_t = C_t dy_t + a_{t+1} G_{t+1}
            G = grads[: a.numel()].view_as(a)
            torch.mul(grad_y_k[:, :, None], C_k[..., None], out=G)
            g, a_steps = G.unbind(0), a.unbind(0)
            g[-1].add_(carry)
            for t in range(len(g) - 2, -1, -1):
                g[t].addcmul_(a_steps[t + 1], g[t + 1])
            carry = a_steps[0] * g[0]

            grad_C[picked, cut] = _rows_times(grad_y_k, H[1:].mT).transpose(0, 1)
            grad_B[picked, cut] = _rows_times(drive_k, G.mT).transpose(0, 1)
            grad_drive = _rows_times(B_k, G)
            # The gradient of delta * A: G_t a_t h_{t-1}
            G.mul_(a).mul_(H[:-1])
            product = scratch[: a.numel()].view_as(a)
            grad_exponent = torch.mul(G, decay_rate, out=product).sum(2)
            grad_A += torch.mul(G, delta_k[:, :, None], out=product).flatten(0, 1).sum(0)
            grad_u[picked, cut] = (grad_drive * delta_k).transpose(0, 1)
            grad_delta[picked, cut] = grad_exponent.addcmul_(grad_drive, u_r[cut]).transpose(0, 1)
        grad_initial[picked] = carry.transpose(1, 2)
    return grad_u, grad_delta, grad_A.t(), grad_B, grad_C, grad_initial, None, None


@torch.compiler.disable  # compilation would unroll the loop over time, which takes minutes for each new length
def selective_scan(u, delta, A, B, C, initial_state=None, chunk_size=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run Mamba-1's recurrence (Gu and Dao 2023, section 3.2), h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and
    y_t = C_t . h_t, from any initial state. A step with delta 0 leaves the state exactly unchanged.

    Runs in float32 (float64 if any input is float64). Differentiable once, in all tensors and through both results.

    Args:
        u: (batch, length, inner), the input.
        delta: (batch, length, inner), the non-negative time steps.
        A: (inner, state), negative decay rates.
        B, C: (batch, length, state).
        initial_state: (batch, inner, state), zeros if None.
        chunk_size: time steps per block; None chooses it by the size of a step. The result does not depend on it.

    Returns:
        y (batch, length, inner) and the final state (batch, inner, state).

    Raises:
        ValueError: for shapes that do not match.
    """
    batch, length, inner = u.shape
    state = A.shape[1]
    given = [tuple(tensor.shape) for tensor in (delta, A, B, C, initial_state) if tensor is not None]
    one = (batch, length, state)
    wanted = [(batch, length, inner), (inner, state), one, one, (batch, inner, state)]
    if given != wanted[: len(given)]:
        raise ValueError(f"selective_scan: delta, A, B, C, initial_state must have the shapes {wanted}, not {given}.")
    wide = any(tensor.dtype == torch.float64 for tensor in (u, delta, A, B, C))
    dtype = torch.float64 if wide else torch.float32
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    initial_state = u.new_zeros(batch, inner, state) if initial_state is None else initial_state.to(dtype)

    budget = _CPU_BLOCK_ELEMENTS if u.device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    steps = chunk_size or min(_MAX_BLOCK_STEPS, max(_MIN_BLOCK_STEPS, budget // max(1, batch * state * inner)))
    steps = max(1, min(steps, length))
    rows = max(1, min(batch, budget // (steps * state * inner)))
    with autocast_off(u.device):
        return _SelectiveScan.apply(u, delta, A, B, C, initial_state, steps, rows)


# ------------------------------------------------------------------------------------------------- Mamba-2's SSD scan


def ssd_scan(u, delta, A, B, C, initial_state=None, chunk_size=64) -> tuple[torch.Tensor, torch.Tensor]:
    """Run Mamba-2's recurrence, with one decay per head, as matrix products within chunks and a short loop over the
    chunks (Dao and Gu 2024, section 6). Log decays are summed, never subtracted, so long chunks lose no precision.

    Args:
        u: (batch, length, heads, head_dim), the input.
        delta: (batch, length, heads), the non-negative time steps; 0 does not change the state.
        A: (heads,), negative decay rates.
        B, C: (batch, length, groups, state); heads is a multiple of groups.
        initial_state: (batch, heads, head_dim, state), zeros if None.
        chunk_size: time steps per chunk. The result does not depend on it.

    Returns:
        y (batch, length, heads, head_dim) and the final state (batch, heads, head_dim, state), in float32 (float64 if
        u is float64).
    """
    with autocast_off(u.device):
        u, delta, A, B, C = (wide(tensor) for tensor in (u, delta, A, B, C))
        batch, length, heads, head_dim = u.shape
        groups, state = B.shape[2:]
        size = max(1, min(chunk_size, length))
        missing = -length % size
        chunks = (length + missing) // size
        split = (batch, chunks, size, groups, heads // groups)
        # b batch, c chunk, i and j times in the chunk, g group, r head of the group, p head_dim, n state
        drive = F.pad(u * delta[..., None], (0, 0, 0, 0, 0, missing)).view(*split, head_dim).permute(0, 1, 3, 4, 2, 5)
        log_decay = F.pad(delta * A, (0, 0, 0, missing)).view(split).permute(0, 1, 3, 4, 2)
        B, C = (
            F.pad(tensor, (0, 0, 0, 0, 0, missing)).view(batch, chunks, size, groups, state).transpose(2, 3)
            for tensor in (B, C)
        )
        decay = _segment_decay(log_decay)  # bcgrij
        y = (C @ B.mT)[:, :, :, None] * decay @ drive  # bcgrip
        added = (drive * decay[..., -1, :, None]).mT @ B[:, :, :, None]  # bcgrpn
        since_start = log_decay.cumsum(-1).exp()  # bcgri
        shape = (batch, groups, heads // groups, head_dim, state)
        h = u.new_zeros(shape) if initial_state is None else wide(initial_state).reshape(shape)
        starts = []
        for c in range(chunks):
            starts.append(h)
            h = since_start[:, c, ..., -1, None, None] * h + added[:, c]
        if chunks > 1 or (chunks == 1 and initial_state is not None):
            y = y + (C[:, :, :, None] @ torch.stack(starts, 1).mT) * since_start[..., None]
        y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * size, heads, head_dim)[:, :length]
        return y, h.reshape(batch, heads, head_dim, state)


def _segment_decay(log_decay: torch.Tensor) -> torch.Tensor:
    """(..., size) -> (..., size, size): entry (i, j) is the decay from time j to time i, exp of the sum over j+1..i; 0
    above the diagonal."""
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    steps = log_decay[..., None].expand(*log_decay.shape, size).masked_fill(~ones.tril(-1), 0)
    return steps.cumsum(-2).exp().masked_fill(~ones.tril(), 0)
