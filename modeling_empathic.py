"""PyTorch model: CLIP and Whisper with Q-formers, MambaCompressor for the history, and a causal LM for the reply."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    Blip2QFormerModel,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple

from .compat_empathic import CACHE, keep_positions, warn_if_untested
from .composition_empathic import CompositionMixin
from .configuration_empathic import EmpathicConfig
from .memory_empathic import MambaCompressor, MemoryState, Projector

# Inputs that become vectors of the prompt; decoding steps with a cache no longer need them.
MEDIA_KEYS = (
    "pixel_values_videos",
    "video_encoder_states",
    "video_mask",
    "video_vectors",
    "input_features",
    "input_features_mask",
    "audio_encoder_states",
    "audio_encoder_mask",
    "audio_vectors",
    "memory_input_ids",
    "memory_attention_mask",
    "memory_vectors",
)
# Former names of inputs.
_FORMER_INPUTS = {
    "video_embeds": "video_vectors",
    "audio_embeds": "audio_vectors",
    "memory_embeds": "memory_vectors",
    "video_features": "video_encoder_states",
    "audio_features": "audio_encoder_states",
    "audio_features_mask": "audio_encoder_mask",
}


@dataclass
class EmpathicModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    video_vectors, audio_vectors (`torch.FloatTensor` of shape `(clips, num_query_tokens, hidden_size)`, *optional*):
        Vectors of the clips that are present, in the LLM's embedding space.
    memory_vectors (`torch.FloatTensor` of shape `(num_vectors, hidden_size)`, *optional*):
        Memory vectors, in batch order, then utterance order.
    """

    video_vectors: torch.FloatTensor | None = None
    audio_vectors: torch.FloatTensor | None = None
    memory_vectors: torch.FloatTensor | None = None


@dataclass
class EmpathicCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modeling loss (next-token prediction).
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Logits over the vocabulary, at the positions that `logits_to_keep` selects.
    cache (`Cache`, *optional*):
        The LLM's key-value cache; called `past_key_values` by transformers before 5.24.
    """

    video_vectors: torch.FloatTensor | None = None
    audio_vectors: torch.FloatTensor | None = None
    memory_vectors: torch.FloatTensor | None = None


def encode_frames(vision_tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Encode frames `(frames, 3, height, width)` with the vision tower to features `(frames, patches, width)`."""
    return vision_tower(pixels.to(vision_tower.dtype)).last_hidden_state


def encode_sound(
    audio_tower: WhisperEncoder,
    input_features: torch.Tensor,
    input_features_mask: torch.Tensor | None = None,
    audio_window: str = "full",
    audio_feature_layers: list[int] | None = None,
) -> torch.Tensor:
    """
    Encode audio with the audio tower to features `(batch, positions, width)`; a position is two mel frames long.

    Args:
        audio_tower: Whisper's encoder.
        input_features: `(batch, mel, time)`; `time` is a whole number of Whisper windows, which are encoded one by one.
        input_features_mask: `(batch, time)`, 1 within the clip; needed for `clip`.
        audio_window: `full` encodes whole windows, with the silence after the clip; `clip` encodes the clip alone, and
            the features after it are zeros. With `clip`, a clip's features do not depend on the rest of the batch.
        audio_feature_layers: the layers whose outputs are the features, side by side; see `EmpathicConfig`.

    Raises:
        ValueError: if `time` is not a whole number of windows.
    """
    batch, mel, time = input_features.shape
    window = 2 * audio_tower.config.max_source_positions
    if time % window:
        raise ValueError(f"input_features has {time} time steps, not a whole number of windows of {window}.")
    windows = input_features.reshape(batch, mel, -1, window).transpose(1, 2).flatten(0, 1).to(audio_tower.dtype)
    whole = audio_window == "full" or input_features_mask is None
    if whole and audio_feature_layers is None:
        hidden = audio_tower(windows).last_hidden_state
    else:
        if whole:
            heard = torch.ones(len(windows), window // 2, dtype=torch.bool, device=windows.device)
        else:
            heard = audio_position_mask(input_features_mask).reshape(-1, window // 2)
        hidden = _encode_positions(audio_tower, windows, heard, audio_feature_layers)
    return hidden.reshape(batch, time // 2, -1)


def _encode_positions(
    audio_tower: WhisperEncoder, windows: torch.Tensor, heard: torch.Tensor, layers: list[int] | None
) -> torch.Tensor:
    """
    Encode the positions of windows `(windows, mel, 2 * positions)` where `heard` `(windows, positions)` is set, as if
    there were nothing else; the other positions are zeros. The steps are those of Whisper's encoder, which takes whole
    windows only, up to the last of `layers`.
    """
    depth = len(audio_tower.layers)
    layers = [depth] if layers is None else layers
    length = max(int(heard.sum(1).max()), 1)
    heard, dropout = heard[:, :length], audio_tower.dropout if audio_tower.training else 0.0
    frames = heard.repeat_interleave(2, dim=1)[:, None]  # (windows, 1, time)
    hidden = nn.functional.gelu(audio_tower.conv1(windows[..., : 2 * length] * frames))
    hidden = nn.functional.gelu(audio_tower.conv2(hidden * frames)).transpose(1, 2)  # (windows, length, width)
    hidden = hidden + audio_tower.embed_positions(torch.arange(length, device=hidden.device))
    hidden = nn.functional.dropout(hidden, dropout)
    attended = heard.clone()
    attended[:, 0] = True  # a softmax over nothing would give NaN
    mask = None if attended.all() else create_bidirectional_mask(audio_tower.config, hidden, attended.long())
    outputs = {0: hidden}
    for number, layer in enumerate(audio_tower.layers[: max(layers)], start=1):
        hidden = layer(hidden, mask)
        if number in layers:
            outputs[number] = hidden
    if depth in outputs:
        outputs[depth] = audio_tower.layer_norm(hidden)
    hidden = torch.cat([outputs[layer] for layer in layers], dim=-1) * heard[..., None]
    return nn.functional.pad(hidden, (0, 0, 0, windows.shape[2] // 2 - length))


def audio_position_mask(input_features_mask: torch.Tensor) -> torch.Tensor:
    """Mask `(..., time / 2)` of the audio tower's positions within a clip: its second convolution halves time."""
    return input_features_mask.bool()[..., ::2]


def _check_one_given(**inputs) -> None:
    """Raise a ValueError unless exactly one of the inputs is given."""
    if sum(value is not None for value in inputs.values()) != 1:
        raise ValueError(f"Give exactly one of {' and '.join(inputs)}.")


class Standardizer(nn.Module):
    """
    Standardizes an encoder's outputs per channel, so that those with a large offset or range do not outweigh the
    others. The mean and the deviation `(width,)` are measured, not trained; at first they change nothing.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (hidden_states - self.mean) / self.deviation


class EmpathicPreTrainedModel(PreTrainedModel):
    config: EmpathicConfig
    base_model_prefix = "model"
    input_modalities = ("video", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EmpathicConfig, *args, **kwargs):
        warn_if_untested()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EmpathicModel):
            for queries, qformer in (
                (module.video_query_tokens, self.config.video_qformer_config),
                (module.audio_query_tokens, self.config.audio_qformer_config),
            ):
                init.normal_(queries, mean=0.0, std=qformer.initializer_range)
        elif isinstance(module, (MambaCompressor, Projector)):
            module.init_parameters()
        elif isinstance(module, Standardizer):
            init.zeros_(module.mean)
            init.ones_(module.deviation)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As in transformers; a single name is applied to each part that supports it."""
        super().set_attn_implementation(self.config.attn_implementation_by_part(attn_implementation), **kwargs)

    def enable_input_require_grads(self):
        """As in transformers, but only for the LLM's input: the frozen encoders need no backward pass."""
        hook = self.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
        self._require_grads_hooks, self._require_grads_hook = [hook], hook

    def train(self, mode: bool = True):
        """
        As in torch, but a fully frozen part stays in evaluation mode, so that frozen features have no dropout. The LLM
        always switches mode: gradients pass through its layers, which are checkpointed in training mode only.
        """
        super().train(mode)
        if mode:
            body = self.base_model
            for part in (body.vision_tower, body.audio_tower, body.video_qformer, body.audio_qformer, body.memory):
                if not any(parameter.requires_grad for parameter in part.parameters()):
                    part.eval()
        return self


class EmpathicModel(EmpathicPreTrainedModel):
    """
    The encoders and the LLM's decoder, without the LM head.

    Audio and video become `num_query_tokens` vectors each (paper's Sec. 3.1), and each earlier utterance becomes one
    vector (Sec. 3.2), or a few. The vectors replace the placeholder tokens of the prompt.
    """

    def __init__(self, config: EmpathicConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        video, audio = config.video_qformer_config, config.audio_qformer_config
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.audio_tower = WhisperEncoder._from_config(config.audio_config)
        self.video_qformer = Blip2QFormerModel._from_config(video)
        self.audio_qformer = Blip2QFormerModel._from_config(audio)
        standardize = config.standardize_features
        self.video_standardizer = Standardizer(self.video_qformer.config.encoder_hidden_size) if standardize else None
        self.audio_standardizer = Standardizer(self.audio_qformer.config.encoder_hidden_size) if standardize else None
        self.video_query_tokens = nn.Parameter(torch.empty(config.num_query_tokens, video.hidden_size))
        self.audio_query_tokens = nn.Parameter(torch.empty(config.num_query_tokens, audio.hidden_size))
        self.video_projector = Projector(video.hidden_size, width, config.embedding_scale)
        self.audio_projector = Projector(audio.hidden_size, width, config.embedding_scale)
        self.memory = MambaCompressor(config.memory_config, width, config.mem_token_id, config.embedding_scale)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @staticmethod
    def _query(qformer, query_tokens, standardizer, projector, hidden_states, mask) -> BaseModelOutputWithPooling:
        """Run a Q-former over hidden states (batch, positions, tower width) with a mask (batch, positions)."""
        if standardizer is not None:
            hidden_states = standardizer(hidden_states)
        # An absent clip attends to its first position, so that no softmax runs over an empty set; its vectors have no
        # placeholder and are not used.
        mask = mask.clone()
        mask[:, 0] |= ~mask.any(dim=1)
        outputs = qformer(
            query_embeds=query_tokens.expand(hidden_states.shape[0], -1, -1),
            encoder_hidden_states=hidden_states.to(query_tokens.dtype),
            encoder_attention_mask=mask.long(),
        )
        vectors = projector(outputs.last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=outputs.last_hidden_state, pooler_output=vectors)

    def encode_video(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_mask: torch.LongTensor | None = None,
        video_encoder_states: torch.FloatTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the encoder's outputs of each clip `(batch, positions, width)` and their boolean mask
        `(batch, positions)`. The inputs are those of `get_video_features`.
        """
        _check_one_given(pixel_values_videos=pixel_values_videos, video_encoder_states=video_encoder_states)
        if video_encoder_states is None:
            batch, frames = pixel_values_videos.shape[:2]
            hidden = encode_frames(self.vision_tower, pixel_values_videos.flatten(0, 1))
            video_encoder_states = hidden.unflatten(0, (batch, frames))
        batch, frames, patches = video_encoder_states.shape[:3]
        if video_mask is None:
            video_mask = video_encoder_states.new_ones(batch, frames, dtype=torch.long)
        return video_encoder_states.flatten(1, 2), video_mask.bool().repeat_interleave(patches, dim=1)

    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_mask: torch.LongTensor | None = None,
        video_encoder_states: torch.FloatTensor | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, num_frames, 3, height, width)`, *optional*):
            The frames of each clip.
        video_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`, *optional*):
            1 for a real frame, 0 for padding.
        video_encoder_states (`torch.FloatTensor` of shape `(batch_size, num_frames, patches, width)`, *optional*):
            Cached outputs of the vision tower, instead of `pixel_values_videos`.

        Returns `pooler_output` of shape `(batch_size, num_query_tokens, hidden_size)` in the LLM's embedding space.
        """
        parts = self.video_qformer, self.video_query_tokens, self.video_standardizer, self.video_projector
        return self._query(*parts, *self.encode_video(pixel_values_videos, video_mask, video_encoder_states))

    def encode_audio(
        self,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        audio_encoder_states: torch.FloatTensor | None = None,
        audio_encoder_mask: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the encoder's outputs of each clip `(batch, positions, width)` and their boolean mask
        `(batch, positions)`. The inputs are those of `get_audio_features`.
        """
        _check_one_given(input_features=input_features, audio_encoder_states=audio_encoder_states)
        if audio_encoder_states is None:
            audio_encoder_states = encode_sound(
                self.audio_tower, input_features, input_features_mask, **self.config.sound_options
            )
            if input_features_mask is not None:
                audio_encoder_mask = audio_position_mask(input_features_mask)
        if audio_encoder_mask is None:
            return audio_encoder_states, audio_encoder_states.new_ones(audio_encoder_states.shape[:2], dtype=torch.bool)
        # Positions past the longest clip are masked for every row. Cutting them off gives a batch the same shape
        # (and dropout) whether or not its features were cached.
        mask = audio_encoder_mask.bool()
        heard = mask.any(dim=0).nonzero()
        length = int(heard[-1]) + 1 if len(heard) else 1
        return audio_encoder_states[:, :length], mask[:, :length]

    def get_audio_features(
        self,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        audio_encoder_states: torch.FloatTensor | None = None,
        audio_encoder_mask: torch.LongTensor | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, mel, time)`, *optional*):
            Whisper's log-mel features; `time` is a whole number of Whisper windows, which are encoded one by one.
        input_features_mask (`torch.LongTensor` of shape `(batch_size, time)`, *optional*):
            1 within the clip, 0 past its end. Without it, the whole windows are encoded.
        audio_encoder_states (`torch.FloatTensor` of shape `(batch_size, positions, width)`, *optional*):
            Cached outputs of the audio tower, instead of `input_features`.
        audio_encoder_mask (`torch.LongTensor` of shape `(batch_size, positions)`, *optional*):
            1 within the clip, 0 past its end.

        Returns `pooler_output` of shape `(batch_size, num_query_tokens, hidden_size)` in the LLM's embedding space.
        """
        parts = self.audio_qformer, self.audio_query_tokens, self.audio_standardizer, self.audio_projector
        encoded = self.encode_audio(input_features, input_features_mask, audio_encoder_states, audio_encoder_mask)
        return self._query(*parts, *encoded)

    def get_memory_features(
        self, memory_input_ids: torch.LongTensor, memory_attention_mask: torch.LongTensor | None = None
    ) -> torch.FloatTensor:
        r"""
        memory_input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            Utterances in the memory encoder's vocabulary, each followed by its `<MEM>` tokens, right-padded.
        memory_attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            1 for a real token.

        Returns a tensor of shape `(<MEM> tokens in the batch, hidden_size)`, in batch order, then utterance order.
        """
        return self.memory(memory_input_ids, memory_attention_mask)

    def new_memory_state(self, batch_size: int = 1) -> MemoryState:
        """Return an empty memory state for `batch_size` conversations, for `append_to_memory`."""
        return self.memory.new_state(batch_size, device=self.device)  # the memory's weights may be offloaded

    def append_to_memory(
        self,
        state: MemoryState,
        memory_input_ids: torch.LongTensor,
        memory_attention_mask: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Read whole or partial utterances `(batch_size, length)` into `state`, in place, and return the memory vectors
        `(new <MEM> tokens, hidden_size)`. The vectors do not depend on how the token sequence is cut into calls.
        """
        return self.memory.append(state, memory_input_ids, memory_attention_mask)

    def get_placeholder_mask(
        self,
        token_id: int,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        counts: torch.LongTensor,
        modality: str,
    ) -> torch.BoolTensor:
        """
        Return the mask `(batch_size, sequence_length, 1)` of a modality's placeholders. Raises a ValueError with both
        counts if the number of placeholders in a row differs from the number of its vectors, `counts` `(batch_size,)`.
        A single text row may hold the packed prompts of several media rows; then the sums must be equal.
        """
        if input_ids is not None:
            mask = input_ids == token_id
        else:
            token = torch.tensor(token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        placeholders = mask.sum(dim=1)
        if len(placeholders) == 1:
            counts = counts.sum(dim=0, keepdim=True)
        if not torch.equal(placeholders, counts.to(placeholders)):
            raise ValueError(
                f"The {modality} placeholders in the prompts do not match the {modality} vectors. Per row: "
                f"{placeholders.tolist()} placeholders, {counts.tolist()} vectors."
            )
        return mask.unsqueeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_encoder_states: torch.FloatTensor | None = None,
        video_mask: torch.LongTensor | None = None,
        video_vectors: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        audio_encoder_states: torch.FloatTensor | None = None,
        audio_encoder_mask: torch.LongTensor | None = None,
        audio_vectors: torch.FloatTensor | None = None,
        memory_input_ids: torch.LongTensor | None = None,
        memory_attention_mask: torch.LongTensor | None = None,
        memory_vectors: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> EmpathicModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            The LLM's key-value cache. It is called `past_key_values` in transformers before 5.24; both names are
            accepted.
        memory_vectors (`torch.FloatTensor` of shape `(batch_size, vectors, hidden_size)`, *optional*):
            Precomputed memory vectors, right-padded, instead of `memory_input_ids`.
        video_vectors (`torch.FloatTensor` of shape `(clips, num_query_tokens, hidden_size)`, *optional*):
            Precomputed vectors of the clips that are present, in batch order, instead of the clips.
        audio_vectors (`torch.FloatTensor` of shape `(clips, num_query_tokens, hidden_size)`, *optional*):
            The same for audio.

        `input_ids` with a single row may hold the prompts of several media rows, one after another (packing).

        The other media inputs are those of `get_video_features`, `get_audio_features` and `get_memory_features`. A row
        whose mask is all zero lacks that modality and must have no placeholder for it.
        """
        for name in _FORMER_INPUTS.keys() & kwargs:  # the language model would ignore them
            raise TypeError(f"The input {name} is now called {_FORMER_INPUTS[name]}.")
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        inputs_embeds, video = self._place_clips(
            "video",
            input_ids,
            inputs_embeds,
            self.get_video_features,
            {"pixel_values_videos": pixel_values_videos, "video_mask": video_mask},
            {"video_encoder_states": video_encoder_states, "video_mask": video_mask},
            video_vectors,
        )
        inputs_embeds, audio = self._place_clips(
            "audio",
            input_ids,
            inputs_embeds,
            self.get_audio_features,
            {"input_features": input_features, "input_features_mask": input_features_mask},
            {"audio_encoder_states": audio_encoder_states, "audio_encoder_mask": audio_encoder_mask},
            audio_vectors,
        )
        inputs_embeds, memory = self._place_memory(
            input_ids, inputs_embeds, memory_input_ids, memory_attention_mask, memory_vectors
        )

        # Placeholders without vectors are an error. Steps that continue a cache write no placeholders.
        if input_ids is not None and (cache is None or cache.get_seq_length() == 0):
            nothing = input_ids.new_zeros(len(input_ids))
            for modality, token_id, given in (
                ("video", self.config.video_token_id, video),
                ("audio", self.config.audio_token_id, audio),
                ("memory", self.config.memory_token_id, memory),
            ):
                if given is None:
                    self.get_placeholder_mask(token_id, input_ids, inputs_embeds, nothing, modality)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        return EmpathicModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            video_vectors=video,
            audio_vectors=audio,
            memory_vectors=memory,
        )

    def _place_clips(
        self,
        modality: str,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        encode: Callable,
        raw: dict,
        encoded: dict,
        vectors: torch.FloatTensor | None,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """
        Put the vectors of a modality's clips into their placeholders.

        Args:
            encode: `get_video_features` or `get_audio_features`.
            raw, encoded: two ways to give clips, as the arguments of `encode`: a tensor of clips, and its mask.
            vectors: a third way, the vectors (clips, num_query_tokens, hidden_size) of the rows that have a clip.

        Returns:
            `inputs_embeds`, and the vectors of the clips; None if no clips were given.
        """
        token_id = getattr(self.config, f"{modality}_token_id")
        (raw_key, raw_values), (encoded_key, encoded_values) = next(iter(raw.items())), next(iter(encoded.items()))
        if raw_values is None and encoded_values is None and vectors is None:
            return inputs_embeds, None
        if vectors is None:
            _check_one_given(**{raw_key: raw_values, encoded_key: encoded_values})
            vectors, counts = self._encode_present(encode, *(raw if encoded_values is None else encoded).items())
            placed = vectors[: (counts > 0).sum()]
        else:
            given = raw_values if raw_values is not None else encoded_values
            _check_one_given(**{f"{modality}_vectors": vectors, "a clip": given})
            counts, placed = self._count_clips(token_id, input_ids, inputs_embeds, vectors), vectors
        mask = self.get_placeholder_mask(token_id, input_ids, inputs_embeds, counts, modality)
        return self._place(inputs_embeds, mask, placed.flatten(0, 1)), vectors

    def _encode_present(self, encode, clips: tuple, clip_mask: tuple) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """
        Return the vectors (clips, num_query_tokens, hidden_size) of the rows that have a clip, and the number of
        vectors of each row (batch,).

        `clips` and `clip_mask` are arguments of `encode`, (name, value). If no row has a clip, the first row is encoded
        anyway: every process of a distributed run must use every module.
        """
        (key, values), (mask_key, mask) = clips, clip_mask
        if mask is None:
            mask = values.new_ones(values.shape[0], 1, dtype=torch.long)
            rows, masks = values, None
        else:
            chosen = mask.any(dim=1)
            chosen = chosen if chosen.any() else torch.arange(len(mask), device=mask.device) == 0
            rows, masks = values[chosen], mask[chosen]
        counts = mask.any(dim=1).long() * self.config.num_query_tokens
        return encode(**{key: rows, mask_key: masks}).pooler_output, counts

    @staticmethod
    def _count_clips(token_id, input_ids, inputs_embeds, vectors) -> torch.LongTensor:
        """The number of vectors of each row (batch,), for vectors (clips, queries, width) of the rows with a clip."""
        clips, queries = vectors.shape[:2]
        has_clip = torch.arange(len(inputs_embeds), device=vectors.device) < clips
        if len(has_clip) == 1:  # one row may hold several prompts
            return has_clip.new_tensor([clips * queries], dtype=torch.long)
        if input_ids is not None:
            found = (input_ids == token_id).any(dim=1)
            has_clip = found if found.sum() == clips else has_clip
        return has_clip.long() * queries

    def _place_memory(
        self, input_ids, inputs_embeds, memory_input_ids, memory_attention_mask, memory_vectors
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """
        Put the memory vectors into their placeholders. Returns `inputs_embeds`, and the vectors (vectors,
        hidden_size); None if no memory was given.
        """
        if memory_vectors is not None and memory_input_ids is not None:
            raise ValueError("Give at most one of memory_vectors and memory_input_ids.")
        token_id = self.config.memory_token_id
        if memory_input_ids is not None:
            vectors = self.get_memory_features(memory_input_ids, memory_attention_mask)
            is_mem = memory_input_ids == self.config.mem_token_id
            if memory_attention_mask is not None:
                is_mem &= memory_attention_mask.bool()
            counts = is_mem.sum(dim=1)
        elif memory_vectors is not None:
            counts = torch.full((len(memory_vectors),), memory_vectors.shape[1], device=memory_vectors.device)
            if input_ids is not None:  # rows may have fewer vectors than the longest row
                placeholders = (input_ids == token_id).sum(dim=1)
                if placeholders.max() == counts.max():
                    counts = placeholders
            vectors = memory_vectors[torch.arange(memory_vectors.shape[1], device=counts.device) < counts[:, None]]
        else:
            return inputs_embeds, None
        mask = self.get_placeholder_mask(token_id, input_ids, inputs_embeds, counts, "memory")
        return self._place(inputs_embeds, mask, vectors), vectors

    @staticmethod
    def _place(inputs_embeds, mask, vectors):
        """Put vectors into their placeholders. Without placeholders the vectors still stay in the autograd graph, so
        that every process of a distributed run has a (zero) gradient for every trained parameter."""
        return inputs_embeds.masked_scatter(mask, vectors.to(inputs_embeds))


class EmpathicForConditionalGeneration(CompositionMixin, EmpathicPreTrainedModel, GenerationMixin):
    """
    The empathic chatbot: [`EmpathicModel`] with the LLM's head.

    Example:

    ```python
    >>> from transformers import AutoModelForMultimodalLM, AutoProcessor

    >>> model = AutoModelForMultimodalLM.from_pretrained("runs/quickstart/model", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("runs/quickstart/model", trust_remote_code=True)
    >>> messages = [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}]}]
    >>> inputs = processor.apply_chat_template(
    ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    >>> reply = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    >>> print(processor.decode(reply, skip_special_tokens=True))
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # see __init__

    def __init__(self, config: EmpathicConfig):
        super().__init__(config)
        self.model = EmpathicModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Some LLMs use another name for the embedding table (`wte` in GPT-2).
        table = next(name for name, module in self.named_modules() if module is self.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"{table}.weight"}
        self.post_init()
        self.suppress_placeholders()

    def suppress_placeholders(self):
        """Keep `generate` from writing placeholders: a reply has no vectors to replace them."""
        config, generation = self.config, self.generation_config
        placeholders = {config.video_token_id, config.audio_token_id, config.memory_token_id}
        generation.suppress_tokens = sorted(placeholders | set(generation.suppress_tokens or ()))

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def get_video_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`EmpathicModel.get_video_features`]."""
        return self.model.get_video_features(*args, **kwargs)

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`EmpathicModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    def get_memory_features(self, *args, **kwargs) -> torch.FloatTensor:
        """See [`EmpathicModel.get_memory_features`]."""
        return self.model.get_memory_features(*args, **kwargs)

    def new_memory_state(self, batch_size: int = 1) -> MemoryState:
        """See [`EmpathicModel.new_memory_state`]."""
        return self.model.new_memory_state(batch_size)

    def append_to_memory(self, state: MemoryState, *args, **kwargs) -> torch.FloatTensor:
        """See [`EmpathicModel.append_to_memory`]."""
        return self.model.append_to_memory(state, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_encoder_states: torch.FloatTensor | None = None,
        video_mask: torch.LongTensor | None = None,
        video_vectors: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        audio_encoder_states: torch.FloatTensor | None = None,
        audio_encoder_mask: torch.LongTensor | None = None,
        audio_vectors: torch.FloatTensor | None = None,
        memory_input_ids: torch.LongTensor | None = None,
        memory_attention_mask: torch.LongTensor | None = None,
        memory_vectors: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> EmpathicCausalLMOutputWithPast:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Targets of the next-token loss; -100 is ignored.
        logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
            How many last positions, or which positions, go through the head; 0 keeps all.

        The other inputs are those of [`EmpathicModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_encoder_states=video_encoder_states,
            video_mask=video_mask,
            video_vectors=video_vectors,
            input_features=input_features,
            input_features_mask=input_features_mask,
            audio_encoder_states=audio_encoder_states,
            audio_encoder_mask=audio_encoder_mask,
            audio_vectors=audio_vectors,
            memory_input_ids=memory_input_ids,
            memory_attention_mask=memory_attention_mask,
            memory_vectors=memory_vectors,
            **kwargs,
        )
        loss = None
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return EmpathicCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            video_vectors=outputs.video_vectors,
            audio_vectors=outputs.audio_vectors,
            memory_vectors=outputs.memory_vectors,
        )

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, use_cache=True, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        # The first step of an assistant model (assisted decoding) is not marked as the first iteration.
        cache = kwargs.get(CACHE)
        filled = cache is not None and cache.get_seq_length() > 0
        for key in MEDIA_KEYS:
            if use_cache and filled and not is_first_iteration:
                inputs.pop(key, None)
            elif kwargs.get(key) is not None:
                inputs[key] = kwargs[key]
        return inputs


EmpathicModel.register_for_auto_class("AutoModel")
EmpathicForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

# Only the package registers its classes, see configuration_empathic.py.
if __name__ == "empathic.modeling_empathic":
    AutoModel.register(EmpathicConfig, EmpathicModel, exist_ok=True)
    AutoModelForMultimodalLM.register(EmpathicConfig, EmpathicForConditionalGeneration, exist_ok=True)
    # Registers the processor. It is not an import statement, because the model's code in a checkpoint does not need it.
    import_module("empathic.processing_empathic")

__all__ = ["EmpathicForConditionalGeneration", "EmpathicModel", "EmpathicPreTrainedModel"]
