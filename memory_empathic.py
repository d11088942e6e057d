"""The conversation memory: a Mamba encoder that turns each past utterance into one vector, in one pass or as a stream.

The text `u1 <MEM> u2 <MEM> ... uk <MEM>` runs through Mamba-1 or Mamba-2, and the output at each `<MEM>`, projected to
the language model's width, is the memory vector of the utterance before it. An utterance that several `<MEM>` follow
has as many vectors. A Mamba layer sees the past only through a
short causal convolution and a linear recurrence, so everything it knows fits into a `MemoryState` of constant size, and
a conversation may be fed in pieces of any length.

Weights, names and checkpoints are exactly those of transformers' `MambaModel` and `Mamba2Model`. Only the forward of
the mixers and norms is replaced, because transformers' mixers (a) drop Mamba-1's recurrent state when more than one
token continues a cache, (b) let padded steps decay the recurrent state, and (c) run a Python loop over time under
autograd on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from .compat_empathic import MAMBA_CACHE
from .kernels_empathic import convolution_kernel, run_selective_scan, run_ssd_scan
from .scan_empathic import wide

# ---------------------------------------------------------------------------------------- state, and the exact mixers


class MemoryState:
    """The memory encoder's state for a batch of conversations; its size does not grow with their length.

    `conv` (layers, batch, conv_kernel - 1, channels) holds the last inputs of each layer's causal convolution, and
    `ssm` (layers, batch, ...) the recurrent states in at least float32. Appending replaces these tensors and never
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
        """Return an independent copy, with which the conversation can continue separately."""
        return MemoryState(self.conv.clone(), self.ssm.clone())

    def select(self, rows: list[int] | torch.Tensor) -> MemoryState:
        """Return an independent copy of the given rows (conversations), in that order; rows may repeat."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        return MemoryState(self.conv[:, rows], self.ssm[:, rows])

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
        """Load a saved state, keeping this state's device and dtype. ValueError if the keys or shapes differ."""
        given, own = ({name: tuple(t.shape) for name, t in d.items()} for d in (state_dict, self.state_dict()))
        if given != own:
            raise ValueError(
                f"The saved memory state has {given}, but this state has {own}. Use a state of the same model and the "
                "same batch size."
            )
        self.conv = state_dict["conv"].detach().to(self.conv, copy=True)
        self.ssm = state_dict["ssm"].detach().to(self.ssm, copy=True)


class _Pass:
    """The inputs and final states of the mixers in one forward pass. It is passed as transformers' cache argument,
    which the blocks' forward hands to every mixer. Recomputation under gradient checkpointing reads and writes the
    same values."""

    def __init__(self, real: torch.Tensor | None, start: MemoryState | None, layers: int):
        self.real = real  # (batch, length), bool, True for real tokens; None: no padding
        self.start = start
        self.conv_ends: list[torch.Tensor | None] = [None] * layers
        self.ssm_ends: list[torch.Tensor | None] = [None] * layers

    def convolve(self, x: torch.Tensor, mixer: nn.Module) -> torch.Tensor:
        """Run a mixer's causal depthwise convolution and its activation over x (batch, length, channels), continuing
        from the state's inputs if there is a state. Without a kernel it is a sum of shifted products in float32: faster
        than conv1d on a CPU, and without transposes. A convolution that is more than its weight, such as one with an
        adapter, is called instead. The result has the dtype of x."""
        conv, layer = mixer.conv1d, mixer.layer_idx
        taps = conv.weight.shape[-1]
        length = x.shape[1]
        if self.start is None:
            extended = F.pad(x, (0, 0, taps - 1, 0))
        else:
            extended = torch.cat([self.start.conv[layer].to(x.dtype), x], dim=1)
            if self.real is None:
                end = extended[:, length:].clone()
            else:  # the last inputs before the padding of each row
                index = self.real.sum(1)[:, None] + torch.arange(taps - 1, device=x.device)
                end = extended.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
            self.conv_ends[layer] = end
        if not _is_plain(conv, nn.Conv1d):
            out = conv(extended.transpose(1, 2))[..., taps - 1 : taps - 1 + length].transpose(1, 2)
            return mixer.act(out).to(x.dtype)
        kernel = convolution_kernel(x, conv, mixer.activation)
        if kernel is not None:
            return kernel(x) if self.start is None else kernel(extended)[:, taps - 1 :]
        extended, weight = wide(extended), wide(conv.weight[:, 0].t())
        out = extended[:, :length] * weight[0]
        if conv.bias is not None:
            out = out + wide(conv.bias)
        for tap in range(1, taps):
            out = out.addcmul(extended[:, tap : tap + length], weight[tap])
        return mixer.act(out).to(x.dtype)

    def stop_at_padding(self, delta: torch.Tensor) -> torch.Tensor:
        """Set the time steps delta (batch, length, ...) of padding to 0, so that padding does not change the state."""
        return delta if self.real is None else delta.masked_fill(~self.real[..., None], 0)


def _is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer computes what one of these classes computes from its weight: it has no adapter and is not
    quantized. (accelerate's hooks replace the `forward` of an instance and do not change the result.)"""
    return type(layer).forward in [kind.forward for kind in kinds]


class _TimeStep(nn.Linear):
    """The projection of a Mamba-1 mixer to its time steps. The bias is added in at least float32, as in mamba-ssm's
    kernels: it holds time steps as small as 0.001, which 16 bits round too much."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wide(F.linear(x, self.weight)) + wide(self.bias)


# The classes below keep the names of the replaced classes: FSDP wrapping and device maps find layers by class name.


class MambaMixer(modeling_mamba.MambaMixer):
    """transformers' Mamba-1 mixer, with exact states and padding when `MambaCompressor` runs it."""

    def forward(self, hidden_states, *args, **kwargs):
        carried = kwargs.get(MAMBA_CACHE)
        if not isinstance(carried, _Pass):
            return super().forward(hidden_states, *args, **kwargs)
        return self._scan(hidden_states, carried)

    @force_accelerate_hooks("conv1d")
    def _scan(self, hidden_states: torch.Tensor, carried: _Pass) -> torch.Tensor:
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = carried.convolve(x, self)
        time_step, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        delta = F.softplus(wide(self.dt_proj(time_step)))
        start = None if carried.start is None else carried.start.ssm[self.layer_idx]
        A = -torch.exp(wide(self.A_log))
        y, end = run_selective_scan(x, carried.stop_at_padding(delta), A, B, C, start)
        if start is not None:
            carried.ssm_ends[self.layer_idx] = end
        y = (y + x * wide(self.D)) * F.silu(gate)
        return self.out_proj(y.to(hidden_states.dtype))


class Mamba2Mixer(modeling_mamba2.Mamba2Mixer):
    """transformers' Mamba-2 mixer, with exact states and padding when `MambaCompressor` runs it."""

    def forward(self, hidden_states, *args, **kwargs):
        carried = kwargs.get(MAMBA_CACHE)
        if not isinstance(carried, _Pass):
            return super().forward(hidden_states, *args, **kwargs)
        return self._scan(hidden_states, carried)

    @force_accelerate_hooks("conv1d")
    def _scan(self, hidden_states: torch.Tensor, carried: _Pass) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        projected = self.in_proj(hidden_states)
        gate, x, raw_delta = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        x = carried.convolve(x, self)
        group_width = self.n_groups * self.ssm_state_size
        x, B, C = x.split([self.intermediate_size, group_width, group_width], dim=-1)
        x = x.reshape(batch, length, self.num_heads, self.head_dim)
        B, C = (tensor.reshape(batch, length, self.n_groups, self.ssm_state_size) for tensor in (B, C))
        delta = F.softplus(wide(raw_delta) + wide(self.dt_bias)).clamp(*self.time_step_limit)
        delta = carried.stop_at_padding(delta)  # after the clamp, whose lower limit may be above 0
        start = None if carried.start is None else carried.start.ssm[self.layer_idx]
        A = -torch.exp(wide(self.A_log))
        y, end = run_ssd_scan(x, delta, A, B, C, start, chunk_size=self.chunk_size)
        if start is not None:
            carried.ssm_ends[self.layer_idx] = end
        y = self.norm((y + x * wide(self.D)[:, None]).flatten(2), gate)
        return self.out_proj(y.to(hidden_states.dtype))


def _rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rms_norm(self, hidden_states):
    """Forward of transformers' RMS norms that keeps float64, which transformers rounds to float32."""
    return self.weight * _rms_normalize(wide(hidden_states), self.variance_epsilon).to(hidden_states.dtype)


class MambaRMSNorm(modeling_mamba.MambaRMSNorm):
    forward = _rms_norm


class Mamba2RMSNorm(modeling_mamba2.Mamba2RMSNorm):
    forward = _rms_norm


class MambaRMSNormGated(modeling_mamba2.MambaRMSNormGated):
    """Mamba-2's gated RMS norm that keeps float64."""

    def forward(self, hidden_states, gate=None):
        gated = wide(hidden_states) if gate is None else wide(hidden_states) * F.silu(wide(gate))
        grouped = _rms_normalize(gated.unflatten(-1, (-1, self.group_size)), self.variance_epsilon)
        return self.weight * grouped.flatten(-2).to(hidden_states.dtype)


_EXACT = {exact.__base__: exact for exact in (MambaMixer, MambaRMSNorm, Mamba2Mixer, Mamba2RMSNorm, MambaRMSNormGated)}


def use_exact_layers(mamba: PreTrainedModel) -> PreTrainedModel:
    """Give the mixers and norms of transformers' `MambaModel` or `Mamba2Model` this file's forward, in place; the
    parameters do not change. `MambaCompressor` calls this on the model it creates; call it on any replacement of that
    model."""
    for module in mamba.modules():
        module.__class__ = _EXACT.get(type(module), type(module))
        if isinstance(module, MambaMixer) and type(module.dt_proj) is nn.Linear:
            module.dt_proj.__class__ = _TimeStep
        if isinstance(module, Mamba2Mixer):  # transformers before 5.23 normalizes all groups together
            module.norm.group_size = module.intermediate_size // module.n_groups
    for block in mamba.layers:
        # Otherwise transformers 5.24 drops the cache argument, here a `_Pass`, under activation checkpointing.
        block._can_checkpoint_with_cache = True
    return mamba


# ------------------------------------------------------------------------------------- the encoder and its projection


class Projector(nn.Module):
    """A linear layer whose output is normalized to a root mean square of 1 and multiplied by one learned scale, so that
    the vectors start at the size of the language model's token embeddings and cannot collapse.

    (..., in_features) -> (..., out_features), in the dtype of the scale. (The matrix may be quantized.)
    """

    def __init__(self, in_features: int, out_features: int, init_scale: float):
        super().__init__()
        self.init_scale = init_scale
        self.linear = nn.Linear(in_features, out_features)
        self.scale = nn.Parameter(torch.empty(1))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Initialize the parameters that were not loaded from a checkpoint; called by the model's `_init_weights`."""
        init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)
        init.zeros_(self.linear.bias)
        init.constant_(self.scale, self.init_scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = self.scale.dtype
        projected = wide(self.linear(hidden_states.to(dtype)))
        return (_rms_normalize(projected, 1e-6) * wide(self.scale)).to(dtype)


class MambaCompressor(nn.Module):
    """The memory encoder. Each utterance becomes one memory vector: Mamba's output at its `<MEM>` token, projected to
    the language model's width. (With several `<MEM>` tokens, several vectors.)

    `<MEM>` has its own embedding, `mem_embedding` (hidden,), instead of a row of the token table, so the table of a
    pretrained Mamba is used unchanged even if `mem_token_id` is beyond its end.

    Args:
        memory_config: a `mamba` or `mamba2` configuration.
        output_size: the language model's width.
        mem_token_id: the id of `<MEM>`.
        projector_scale: the initial root mean square of the memory vectors.

    Raises:
        ValueError: if memory_config is of another type, or mem_token_id is missing or negative.
    """

    def __init__(self, memory_config: PretrainedConfig, output_size: int, mem_token_id: int, projector_scale: float):
        super().__init__()
        if memory_config.model_type not in ("mamba", "mamba2"):
            raise ValueError(
                f"memory_config has the model type {memory_config.model_type!r}; give a configuration of the type "
                "'mamba' or 'mamba2'."
            )
        if mem_token_id is None or mem_token_id < 0:
            raise ValueError(f"mem_token_id is {mem_token_id}; give the id of <MEM> in the memory tokenizer.")
        self.config = memory_config
        self.mem_token_id = mem_token_id
        self.mamba = use_exact_layers(AutoModel.from_config(memory_config))
        self.mem_embedding = nn.Parameter(torch.empty(memory_config.hidden_size))
        self.projector = Projector(memory_config.hidden_size, output_size, projector_scale)
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Like `Projector.init_parameters`, for `mem_embedding` only: transformers initializes the Mamba model."""
        init.normal_(self.mem_embedding, std=self.config.initializer_range)

    def forward(
        self,
        memory_input_ids: torch.Tensor,
        memory_attention_mask: torch.Tensor | None = None,
        state: MemoryState | None = None,
    ) -> torch.Tensor:
        """Return the memory vectors of the utterances in a batch.

        Args:
            memory_input_ids: (batch, length), integers.
            memory_attention_mask: (batch, length), 1 for tokens and 0 for padding on the right; None: no padding.
            state: the state of the conversations, updated in place. None: the conversations start here.

        Returns:
            (number of `<MEM>` tokens, output_size), in batch order, then in text order, in the dtype of the projector's
            weight. Possibly (0, output_size).

        Raises:
            ValueError: for wrong shapes, a mask that is not right-padded, ids out of range, or a state with another
                batch size or device.
        """
        real = self._check(memory_input_ids, memory_attention_mask, state)
        is_mem = memory_input_ids == self.mem_token_id
        known = ~is_mem if real is None else real & ~is_mem
        embedded = self.mamba.get_input_embeddings()(memory_input_ids.where(known, 0))
        embedded = torch.where(is_mem[..., None], self.mem_embedding.to(embedded.dtype), embedded)
        # With `residual_in_fp32`, transformers' blocks would round a float64 residual stream to float32.
        for block in self.mamba.layers:
            block.residual_in_fp32 = self.config.residual_in_fp32 and embedded.dtype != torch.float64
        carried = _Pass(real, state, self.config.num_hidden_layers)
        hidden = self.mamba(inputs_embeds=embedded, use_cache=False, **{MAMBA_CACHE: carried}).last_hidden_state
        vectors = self.projector(hidden[is_mem if real is None else is_mem & real])
        if state is not None:
            state.conv = torch.stack(carried.conv_ends).detach().to(state.conv.dtype)
            state.ssm = torch.stack(carried.ssm_ends).detach().to(state.ssm.dtype)
        return vectors

    def new_state(
        self, batch_size: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryState:
        """Return the state before the first token; device and dtype default to those of the weights."""
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
        """Read any number of whole or partial utterances, (batch, length), right-padded with a mask if rows differ in
        length. Updates `state` in place and returns the new memory vectors (n, output_size) like `forward`, without
        gradients. The vectors do not depend on how the text is cut into calls. Raises the errors of `forward`; the
        state is then unchanged."""
        return self(memory_input_ids, memory_attention_mask, state)

    def _check(self, ids: torch.Tensor, mask: torch.Tensor | None, state: MemoryState | None) -> torch.Tensor | None:
        """Check the inputs and return the mask as bool (None if there is no padding)."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(
                f"memory_input_ids are {ids.dtype} of shape {tuple(ids.shape)}; give integers (batch, length)."
            )
        if state is not None and (state.batch_size, state.device) != (ids.shape[0], ids.device):
            raise ValueError(
                f"The memory state has batch size {state.batch_size} on {state.device}, but memory_input_ids have "
                f"{ids.shape[0]} on {ids.device}. Use new_state(batch_size) and state.to(device)."
            )
        real = None
        if mask is not None:
            real = mask.to(torch.bool)
            if mask.shape != ids.shape:
                raise ValueError(
                    f"memory_attention_mask has the shape {tuple(mask.shape)}, but memory_input_ids have "
                    f"{tuple(ids.shape)}. Give both the same shape."
                )
            if bool((real != mask).any()) or bool((real[:, 1:] & ~real[:, :-1]).any()):
                raise ValueError("memory_attention_mask must be right-padded: in each row ones, then only zeros.")
            real = None if bool(real.all()) else real
        bad = ((ids < 0) | (ids >= self.config.vocab_size)) & (ids != self.mem_token_id)
        bad = bad if real is None else bad & real
        if bool(bad.any()):
            raise ValueError(
                f"memory_input_ids contain {int(ids[bad][0])}, but the last id of the memory encoder's vocabulary is "
                f"{self.config.vocab_size - 1} (<MEM> is {self.mem_token_id}). Use the memory tokenizer."
            )
        return real
