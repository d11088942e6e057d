"""The conversation memory: a Mamba encoder that turns each past utterance into one vector, in one pass or as a stream.

The text `u1 <MEM> u2 <MEM> ... uk <MEM>` runs through Mamba-1 or Mamba-2, and the output at each `<MEM>`, projected to
the language model's width, stands for the utterance before it. A Mamba layer looks back only through a short causal
convolution and a linear recurrence, so everything it knows of the past fits into a `MemoryState` of constant size, and
a conversation may be fed in any pieces.

Weights, names and checkpoints stay exactly those of transformers' `MambaModel` and `Mamba2Model`. Only the mixers'
forward is replaced, because transformers' own (a) drops Mamba-1's recurrent state when more than one token continues a
cache, (b) lets padded steps decay the recurrent state, and (c) runs a Python loop over time under autograd on a CPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils.import_utils import is_causal_conv1d_available, is_mamba_2_ssm_available, is_mamba_ssm_available

# Elements of one block's (time, rows, state, inner) buffers. On a CPU four such buffers should stay in the caches (this
# value was the fastest of those measured); a GPU wants few, large kernels instead.
_CPU_BLOCK_ELEMENTS = 1 << 19
_GPU_BLOCK_ELEMENTS = 1 << 25
_MIN_BLOCK_STEPS = 8
_MAX_BLOCK_STEPS = 64


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32: no recurrence runs in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _autocast_off(tensor: torch.Tensor) -> torch.autocast:
    return torch.autocast(device_type=tensor.device.type, enabled=False)


# ------------------------------------------------------------------------------------------ Mamba-1's selective scan


class _SelectiveScan(torch.autograd.Function):
    """The scan in blocks of rows and time steps. Each block expands its inputs to (time, rows, state, inner) in small
    reused buffers, so memory does not grow with `state`, and the recurrence is one in-place kernel a step: autograd
    would copy the whole sequence at every step instead. Only the inputs and the state at each block's start are kept;
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
        # One step more than the block: the first holds the state that the block starts from.
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
        with _autocast_off(u):
            return _scan_backward(u, delta, A, B, C, starts, ctx.steps, ctx.rows, grad_y, grad_final)


def _time_major(picked: slice, delta, u, B, C):
    """Some rows of the scan's inputs as (time, rows, ...): delta, delta * u, B and C."""
    delta = delta[picked].transpose(0, 1).contiguous()
    drive = delta * u[picked].transpose(0, 1)
    return delta, drive, B[picked].transpose(0, 1).contiguous(), C[picked].transpose(0, 1).contiguous()


def _rows_times(vectors, matrices):
    """(time, rows, m) by (time, rows, m, n) -> (time, rows, n). As row vectors: bmm's column case is far slower."""
    return torch.bmm(vectors.flatten(0, 1)[:, None], matrices.flatten(0, 1)).view(*vectors.shape[:2], -1)


def _run_block(delta, drive, log2_decay, B, start, states, decay):
    """Run the recurrence over one block. Returns the states (time + 1, rows, state, inner), of which the first is the
    one before the block, and the decays (time, rows, state, inner); both lie in the given buffers."""
    time, rows, inner = delta.shape
    step = (rows, log2_decay.shape[0], inner)
    H = states[: (time + 1) * math.prod(step)].view(time + 1, *step)
    a = decay[: time * math.prod(step)].view(time, *step)
    # A is negative and delta is not: the exponent is never positive and nothing overflows.
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

            # G_t, the gradient of h_t: C_t dy_t + a_{t+1} G_{t+1}
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


def selective_scan(u, delta, A, B, C, initial_state=None, chunk_size=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-1's recurrence (Gu and Dao 2023, section 3.2), h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and
    y_t = C_t . h_t, from any initial state. A step with delta 0 leaves the state exactly as it is.

    Runs in float32 (float64 if any input is float64). Differentiable once, in all tensors and through both results.

    Args:
        u: (batch, length, inner), the input.
        delta: (batch, length, inner), the time steps, not negative.
        A: (inner, state), negative decay rates.
        B, C: (batch, length, state).
        initial_state: (batch, inner, state), zeros if None.
        chunk_size: time steps in a block; chosen by the size of a step if None. The result does not depend on it.

    Returns:
        y (batch, length, inner) and the final state (batch, inner, state).

    Raises:
        ValueError: shapes that do not fit together.
    """
    batch, length, inner = u.shape
    state = A.shape[1]
    given = [tuple(tensor.shape) for tensor in (delta, A, B, C, initial_state) if tensor is not None]
    one = (batch, length, state)
    wanted = [(batch, length, inner), (inner, state), one, one, (batch, inner, state)]
    if given != wanted[: len(given)]:
        raise ValueError(f"selective_scan: delta, A, B, C, initial_state must have the shapes {wanted}, not {given}")
    wide = any(tensor.dtype == torch.float64 for tensor in (u, delta, A, B, C))
    dtype = torch.float64 if wide else torch.float32
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    initial_state = u.new_zeros(batch, inner, state) if initial_state is None else initial_state.to(dtype)

    budget = _CPU_BLOCK_ELEMENTS if u.device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    steps = chunk_size or min(_MAX_BLOCK_STEPS, max(_MIN_BLOCK_STEPS, budget // max(1, batch * state * inner)))
    steps = max(1, min(steps, length))
    rows = max(1, min(batch, budget // (steps * state * inner)))
    with _autocast_off(u):
        return _SelectiveScan.apply(u, delta, A, B, C, initial_state, steps, rows)


# ------------------------------------------------------------------------------------------------- Mamba-2's SSD scan


def ssd_scan(u, delta, A, B, C, initial_state=None, chunk_size=64) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's recurrence, one decay a head, as matrix products within chunks and a short loop over the chunks
    (Dao and Gu 2024, section 6). Log decays are summed, never subtracted, so no precision is lost over long chunks.

    Args:
        u: (batch, length, heads, head_dim), the input.
        delta: (batch, length, heads), the time steps, not negative; 0 leaves the state as it is.
        A: (heads,), negative decay rates.
        B, C: (batch, length, groups, state); heads is a multiple of groups.
        initial_state: (batch, heads, head_dim, state), zeros if None.
        chunk_size: time steps in a chunk. The result does not depend on it.

    Returns:
        y (batch, length, heads, head_dim) and the final state (batch, heads, head_dim, state), in float32 (float64 if
        u is float64).
    """
    with _autocast_off(u):
        u, delta, A, B, C = (_wide(tensor) for tensor in (u, delta, A, B, C))
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
        h = u.new_zeros(shape) if initial_state is None else _wide(initial_state).reshape(shape)
        starts = []
        for c in range(chunks):
            starts.append(h)
            h = since_start[:, c, ..., -1, None, None] * h + added[:, c]
        if chunks > 1 or (chunks == 1 and initial_state is not None):
            y = y + (C[:, :, :, None] @ torch.stack(starts, 1).mT) * since_start[..., None]
        y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * size, heads, head_dim)[:, :length]
        return y, h.reshape(batch, heads, head_dim, state)


def _segment_decay(log_decay: torch.Tensor) -> torch.Tensor:
    """(..., size) -> (..., size, size): at (i, j) the decay from time j to time i, exp of the sum over j+1..i; 0 above
    the diagonal."""
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    steps = log_decay[..., None].expand(*log_decay.shape, size).masked_fill(~ones.tril(-1), 0)
    return steps.cumsum(-2).exp().masked_fill(~ones.tril(), 0)


# ---------------------------------------------------------------------------------------- state, and the exact mixers


class MemoryState:
    """All that the memory encoder knows of a batch of conversations so far; its size does not grow with them.

    `conv` (layers, batch, conv_kernel - 1, channels) holds each layer's last inputs of the causal convolution, `ssm`
    (layers, batch, ...) the recurrent states, never narrower than float32. Appending replaces these tensors and never
    writes into them.
    """

    def __init__(self, conv: torch.Tensor, ssm: torch.Tensor):
        self.conv = conv
        self.ssm = ssm

    @property
    def batch_size(self) -> int:
        return self.conv.shape[1]

    @property
    def device(self) -> torch.device:
        return self.conv.device

    def fork(self) -> MemoryState:
        """An independent copy: the conversation may go on in two ways."""
        return MemoryState(self.conv.clone(), self.ssm.clone())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Move and/or cast this state in place, as nn.Module.to does, and return it. `state.to(torch.float64)` works
        too. A dtype narrower than float32 is used for `conv` only."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        ssm_dtype = dtype if dtype is None else torch.promote_types(dtype, torch.float32)
        self.conv = self.conv.to(device=device, dtype=dtype)
        self.ssm = self.ssm.to(device=device, dtype=ssm_dtype)
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"conv": self.conv, "ssm": self.ssm}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take over a saved state, with this state's device and dtype. ValueError if its keys or shapes differ."""
        given, own = ({name: tuple(t.shape) for name, t in d.items()} for d in (state_dict, self.state_dict()))
        if given != own:
            raise ValueError(f"memory state: {given} do not fit this state's {own}: same model, same batch size?")
        self.conv = state_dict["conv"].detach().to(self.conv, copy=True)
        self.ssm = state_dict["ssm"].detach().to(self.ssm, copy=True)


class _Pass:
    """What one pass carries to the mixers. It travels in transformers' `cache_params` slot, which reaches every mixer
    through the blocks' own forward. Recomputation under gradient checkpointing reads and writes the same values."""

    def __init__(self, real: torch.Tensor | None, start: MemoryState | None, layers: int):
        self.real = real  # (batch, length), bool; None: nothing is padded
        self.start = start
        self.conv_ends: list[torch.Tensor | None] = [None] * layers
        self.ssm_ends: list[torch.Tensor | None] = [None] * layers

    def convolve(self, x: torch.Tensor, conv: nn.Conv1d, layer: int) -> torch.Tensor:
        """The causal depthwise convolution (batch, length, channels), from the carried inputs if there are any.
        A few shifted products in float32: on a CPU faster than conv1d, and nothing is transposed."""
        taps = conv.weight.shape[-1]
        length = x.shape[1]
        if self.start is None:
            extended = F.pad(x, (0, 0, taps - 1, 0))
        else:
            extended = torch.cat([self.start.conv[layer].to(x.dtype), x], dim=1)
            if self.real is None:
                end = extended[:, length:].clone()
            else:  # each row's last inputs, at its true end
                index = self.real.sum(1)[:, None] + torch.arange(taps - 1, device=x.device)
                end = extended.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
            self.conv_ends[layer] = end
        extended, weight = _wide(extended), _wide(conv.weight[:, 0].t())
        out = extended[:, :length] * weight[0]
        if conv.bias is not None:
            out = out + _wide(conv.bias)
        for tap in range(1, taps):
            out = out.addcmul(extended[:, tap : tap + length], weight[tap])
        return out

    def stop_at_padding(self, delta: torch.Tensor) -> torch.Tensor:
        """Time steps (batch, length, ...), 0 where padded, so that padding leaves the recurrent state as it is."""
        return delta if self.real is None else delta.masked_fill(~self.real[..., None], 0)

    def suits_kernels(self, hidden_states: torch.Tensor) -> bool:
        """Whether transformers' forward can run this pass on mamba-ssm's kernels, which carry no state."""
        plain = self.start is None and hidden_states.dtype != torch.float64
        return plain and hidden_states.is_cuda and is_causal_conv1d_available()


# The classes below keep the names of those they replace: FSDP's wrapping and device maps find layers by class name.


class MambaMixer(modeling_mamba.MambaMixer):
    """transformers' Mamba-1 mixer with exact states and padding, whenever a pass of `MambaCompressor` runs it."""

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        if not isinstance(cache_params, _Pass):
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        if is_mamba_ssm_available() and cache_params.suits_kernels(hidden_states):
            return super().forward(hidden_states, None, cache_params.real, **kwargs)
        return self._scan(hidden_states, cache_params)

    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def _scan(self, hidden_states: torch.Tensor, carried: _Pass) -> torch.Tensor:
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self.act(carried.convolve(x, self.conv1d, self.layer_idx)).to(x.dtype)
        time_step, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        delta = F.softplus(_wide(F.linear(time_step, self.dt_proj.weight)) + _wide(self.dt_proj.bias))
        start = None if carried.start is None else carried.start.ssm[self.layer_idx]
        A = -torch.exp(_wide(self.A_log))
        y, end = selective_scan(x, carried.stop_at_padding(delta), A, B, C, start)
        if start is not None:
            carried.ssm_ends[self.layer_idx] = end
        y = (y + x * _wide(self.D)) * F.silu(gate)
        return self.out_proj(y.to(hidden_states.dtype))


class Mamba2Mixer(modeling_mamba2.Mamba2Mixer):
    """transformers' Mamba-2 mixer with exact states and padding, whenever a pass of `MambaCompressor` runs it."""

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        if not isinstance(cache_params, _Pass):
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        if is_mamba_2_ssm_available() and cache_params.suits_kernels(hidden_states):
            return super().forward(hidden_states, None, cache_params.real, **kwargs)
        return self._scan(hidden_states, cache_params)

    @force_accelerate_hooks("conv1d")
    def _scan(self, hidden_states: torch.Tensor, carried: _Pass) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        projected = self.in_proj(hidden_states)
        gate, x, raw_delta = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        x = self.act(carried.convolve(x, self.conv1d, self.layer_idx)).to(x.dtype)
        group_width = self.n_groups * self.ssm_state_size
        x, B, C = x.split([self.intermediate_size, group_width, group_width], dim=-1)
        x = x.reshape(batch, length, self.num_heads, self.head_dim)
        B, C = (tensor.reshape(batch, length, self.n_groups, self.ssm_state_size) for tensor in (B, C))
        delta = F.softplus(_wide(raw_delta) + _wide(self.dt_bias)).clamp(*self.time_step_limit)
        delta = carried.stop_at_padding(delta)  # after the limit, which may lie above 0
        start = None if carried.start is None else carried.start.ssm[self.layer_idx]
        A = -torch.exp(_wide(self.A_log))
        y, end = ssd_scan(x, delta, A, B, C, start, chunk_size=min(self.chunk_size, 64))
        if start is not None:
            carried.ssm_ends[self.layer_idx] = end
        y = self.norm((y + x * _wide(self.D)[:, None]).flatten(2), gate)
        return self.out_proj(y.to(hidden_states.dtype))


def _rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rms_norm(self, hidden_states):
    """The forward of transformers' norms, which round float64 to float32, kept in float64."""
    return self.weight * _rms_normalise(_wide(hidden_states), self.variance_epsilon).to(hidden_states.dtype)


class MambaRMSNorm(modeling_mamba.MambaRMSNorm):
    forward = _rms_norm


class Mamba2RMSNorm(modeling_mamba2.Mamba2RMSNorm):
    forward = _rms_norm


class MambaRMSNormGated(modeling_mamba2.MambaRMSNormGated):
    """The same for Mamba-2's gated norm."""

    def forward(self, hidden_states, gate=None):
        wide = _wide(hidden_states) if gate is None else _wide(hidden_states) * F.silu(_wide(gate))
        grouped = _rms_normalise(wide.unflatten(-1, (-1, self.group_size)), self.variance_epsilon)
        return self.weight * grouped.flatten(-2).to(hidden_states.dtype)


_EXACT = {exact.__base__: exact for exact in (MambaMixer, MambaRMSNorm, Mamba2Mixer, Mamba2RMSNorm, MambaRMSNormGated)}


def use_exact_layers(mamba: PreTrainedModel) -> PreTrainedModel:
    """Give the mixers and norms of transformers' `MambaModel` or `Mamba2Model` this file's forward, in place; their
    parameters stay. `MambaCompressor` does it by itself: call this for a model put into its place later."""
    for module in mamba.modules():
        module.__class__ = _EXACT.get(type(module), type(module))
    return mamba


# ------------------------------------------------------------------------------------- the encoder and its projection


class Projector(nn.Module):
    """A linear layer, normalised to a root mean square of 1, times one learned scale: vectors start as large as the
    language model's own token embeddings and cannot collapse.

    (..., in_features) -> (..., out_features), in the weight's dtype.
    """

    def __init__(self, in_features: int, out_features: int, init_scale: float):
        super().__init__()
        self.init_scale = init_scale
        self.linear = nn.Linear(in_features, out_features)
        self.scale = nn.Parameter(torch.empty(1))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Initial values, skipping what was loaded from a checkpoint; for `_init_weights` of the whole model."""
        init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)
        init.zeros_(self.linear.bias)
        init.constant_(self.scale, self.init_scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = self.linear.weight.dtype
        projected = _wide(self.linear(hidden_states.to(dtype)))
        return (_rms_normalise(projected, 1e-6) * _wide(self.scale)).to(dtype)


class MambaCompressor(nn.Module):
    """One vector an utterance: Mamba's output at each `<MEM>`, projected to the language model's width.

    `<MEM>` has its own embedding, `mem_embedding` (hidden,), which replaces whatever row the token table has for it, so
    the table of a pretrained Mamba is used unchanged even where `mem_token_id` lies beyond its end.

    Args:
        memory_config: a `mamba` or `mamba2` configuration.
        output_size: the language model's width.
        mem_token_id: the id of `<MEM>`.
        projector_scale: the root mean square of the vectors at the start.

    Raises:
        ValueError: another kind of memory_config.
    """

    def __init__(self, memory_config: PretrainedConfig, output_size: int, mem_token_id: int, projector_scale: float):
        super().__init__()
        if memory_config.model_type not in ("mamba", "mamba2"):
            raise ValueError(f"memory_config must be a 'mamba' or 'mamba2' one, not {memory_config.model_type!r}")
        if mem_token_id is None or mem_token_id < 0:
            raise ValueError(f"mem_token_id must be the id of <MEM> in the memory's tokenizer, not {mem_token_id}")
        self.config = memory_config
        self.mem_token_id = mem_token_id
        self.mamba = use_exact_layers(AutoModel.from_config(memory_config))
        self.mem_embedding = nn.Parameter(torch.empty(memory_config.hidden_size))
        self.projector = Projector(memory_config.hidden_size, output_size, projector_scale)
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """As `Projector.init_parameters`, for this module's own Parameter (transformers dispatches to Mamba's)."""
        init.normal_(self.mem_embedding, std=self.config.initializer_range)

    def forward(
        self,
        memory_input_ids: torch.Tensor,
        memory_attention_mask: torch.Tensor | None = None,
        state: MemoryState | None = None,
    ) -> torch.Tensor:
        """Vectors of the utterances in a batch.

        Args:
            memory_input_ids: (batch, length), integers.
            memory_attention_mask: (batch, length), 1 for tokens and 0 for the padding on their right; None: all tokens.
            state: where the conversations stand; it is moved on in place. None: they start here.

        Returns:
            (number of `<MEM>` among the tokens, output_size), in batch order, then in the order of the text, in the
            dtype of the projector's weight. Possibly (0, output_size).

        Raises:
            ValueError: wrong shapes, a mask that is not right-padded, ids out of range, a state that does not fit.
        """
        real = self._check(memory_input_ids, memory_attention_mask, state)
        is_mem = memory_input_ids == self.mem_token_id
        known = ~is_mem if real is None else real & ~is_mem
        embedded = self.mamba.get_input_embeddings()(memory_input_ids.where(known, 0))
        embedded = torch.where(is_mem[..., None], self.mem_embedding.to(embedded.dtype), embedded)
        # Blocks round the residual stream to float32, also from float64.
        for block in self.mamba.layers:
            block.residual_in_fp32 = self.config.residual_in_fp32 and embedded.dtype != torch.float64
        carried = _Pass(real, state, self.config.num_hidden_layers)
        hidden = self.mamba(inputs_embeds=embedded, cache_params=carried, use_cache=False).last_hidden_state
        vectors = self.projector(hidden[is_mem if real is None else is_mem & real])
        if state is not None:
            state.conv = torch.stack(carried.conv_ends).detach().to(state.conv.dtype)
            state.ssm = torch.stack(carried.ssm_ends).detach().to(state.ssm.dtype)
        return vectors

    def new_state(
        self, batch_size: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryState:
        """The state before the first token; device and dtype are the weights' if not given."""
        device = self.mem_embedding.device if device is None else device
        dtype = self.mem_embedding.dtype if dtype is None else dtype
        mixer = self.mamba.layers[0].mixer
        if self.config.model_type == "mamba":
            channels, shape = mixer.intermediate_size, (mixer.intermediate_size, mixer.ssm_state_size)
        else:
            channels, shape = mixer.conv_dim, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
        conv = torch.zeros(self.config.num_hidden_layers, batch_size, mixer.conv_kernel_size - 1, channels)
        return MemoryState(conv, torch.zeros(*conv.shape[:2], *shape)).to(device, dtype)

    @torch.no_grad()
    def append(
        self, state: MemoryState, memory_input_ids: torch.Tensor, memory_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Feed any number of whole or partial utterances, (batch, length), right-padded under a mask where rows differ
        in length. Moves `state` on in place and returns the new vectors (n, output_size) as `forward` does, without
        gradients. However a text is cut, the vectors equal those of one pass. Raises as `forward` does; then the state
        is unchanged."""
        return self(memory_input_ids, memory_attention_mask, state)

    def _check(self, ids: torch.Tensor, mask: torch.Tensor | None, state: MemoryState | None) -> torch.Tensor | None:
        """The mask as bool (None if nothing is padded)."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"memory_input_ids must be integers (batch, length), not {ids.dtype} {tuple(ids.shape)}")
        if state is not None and (state.batch_size, state.device) != (ids.shape[0], ids.device):
            raise ValueError(
                f"the memory state is of batch size {state.batch_size} on {state.device}, but memory_input_ids of "
                f"{ids.shape[0]} on {ids.device}: use new_state(batch_size) and state.to(device)"
            )
        real = None
        if mask is not None:
            real = mask.to(torch.bool)
            if mask.shape != ids.shape:
                raise ValueError(f"memory_attention_mask {tuple(mask.shape)} does not fit ids {tuple(ids.shape)}")
            if bool((real != mask).any()) or bool((real[:, 1:] & ~real[:, :-1]).any()):
                raise ValueError("memory_attention_mask must be right-padded: in each row ones, then only zeros")
            real = None if bool(real.all()) else real
        bad = ((ids < 0) | (ids >= self.config.vocab_size)) & (ids != self.mem_token_id)
        bad = bad if real is None else bad & real
        if bool(bad.any()):
            raise ValueError(
                f"memory_input_ids hold {int(ids[bad][0])}, but the memory's token table ends at "
                f"{self.config.vocab_size - 1} (<MEM> is {self.mem_token_id}): use the memory's own tokenizer"
            )
        return real
