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

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils.import_utils import is_causal_conv1d_available, is_mamba_2_ssm_available, is_mamba_ssm_available

from .scan_empathic import selective_scan, ssd_scan, wide

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

    def select(self, rows: list[int] | torch.Tensor) -> MemoryState:
        """An independent copy of some of the conversations, in the order given; a row may be taken several times."""
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
        extended, weight = wide(extended), wide(conv.weight[:, 0].t())
        out = extended[:, :length] * weight[0]
        if conv.bias is not None:
            out = out + wide(conv.bias)
        for tap in range(1, taps):
            out = out.addcmul(extended[:, tap : tap + length], weight[tap])
        return out

    def stop_at_padding(self, delta: torch.Tensor) -> torch.Tensor:
        """Time steps (batch, length, ...), 0 where padded, so that padding leaves the recurrent state as it is."""
        return delta if self.real is None else delta.masked_fill(~self.real[..., None], 0)

    def suits_kernels(self, hidden_states: torch.Tensor) -> bool:
        """Whether transformers' forward can run this pass on mamba-ssm's kernels, which carry no state."""
        plain = self.start is None and hidden_states.dtype != torch.float64
        return plain and _on_gpu(hidden_states) and is_causal_conv1d_available()


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


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
        delta = F.softplus(wide(F.linear(time_step, self.dt_proj.weight)) + wide(self.dt_proj.bias))
        start = None if carried.start is None else carried.start.ssm[self.layer_idx]
        A = -torch.exp(wide(self.A_log))
        y, end = selective_scan(x, carried.stop_at_padding(delta), A, B, C, start)
        if start is not None:
            carried.ssm_ends[self.layer_idx] = end
        y = (y + x * wide(self.D)) * F.silu(gate)
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
        delta = F.softplus(wide(raw_delta) + wide(self.dt_bias)).clamp(*self.time_step_limit)
        delta = carried.stop_at_padding(delta)  # after the limit, which may lie above 0
        start = None if carried.start is None else carried.start.ssm[self.layer_idx]
        A = -torch.exp(wide(self.A_log))
        y, end = ssd_scan(x, delta, A, B, C, start, chunk_size=min(self.chunk_size, 64))
        if start is not None:
            carried.ssm_ends[self.layer_idx] = end
        y = self.norm((y + x * wide(self.D)[:, None]).flatten(2), gate)
        return self.out_proj(y.to(hidden_states.dtype))


def _rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rms_norm(self, hidden_states):
    """The forward of transformers' norms, which round float64 to float32, kept in float64."""
    return self.weight * _rms_normalise(wide(hidden_states), self.variance_epsilon).to(hidden_states.dtype)


class MambaRMSNorm(modeling_mamba.MambaRMSNorm):
    forward = _rms_norm


class Mamba2RMSNorm(modeling_mamba2.Mamba2RMSNorm):
    forward = _rms_norm


class MambaRMSNormGated(modeling_mamba2.MambaRMSNormGated):
    """The same for Mamba-2's gated norm."""

    def forward(self, hidden_states, gate=None):
        gated = wide(hidden_states) if gate is None else wide(hidden_states) * F.silu(wide(gate))
        grouped = _rms_normalise(gated.unflatten(-1, (-1, self.group_size)), self.variance_epsilon)
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
        projected = wide(self.linear(hidden_states.to(dtype)))
        return (_rms_normalise(projected, 1e-6) * wide(self.scale)).to(dtype)


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
