"""PyTorch model: CLIP and Whisper seen through Q-formers, MambaCompressor for the history, a causal LM that answers."""

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
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple

from .composition_empathic import CompositionMixin
from .configuration_empathic import EmpathicConfig
from .features_empathic import audio_position_mask, check_exclusive, encode_frames, encode_sound, first_given
from .memory_empathic import MambaCompressor, MemoryState, Projector
from .outputs_empathic import EmpathicCausalLMOutputWithPast, EmpathicModelOutputWithPast

# Inputs that are turned into vectors of the prompt; decoding steps with a cache need them no more.
MEDIA_KEYS = (
    "pixel_values_videos",
    "video_features",
    "video_mask",
    "video_embeds",
    "input_features",
    "input_features_mask",
    "audio_features",
    "audio_features_mask",
    "audio_embeds",
    "memory_input_ids",
    "memory_attention_mask",
    "memory_embeds",
)


class EmpathicPreTrainedModel(PreTrainedModel):
    config: EmpathicConfig
    base_model_prefix = "model"
    input_modalities = ("video", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

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

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As in transformers; one name is spread over the parts as far as each supports it."""
        super().set_attn_implementation(self.config.attn_implementation_by_part(attn_implementation), **kwargs)

    def enable_input_require_grads(self):
        """As in transformers, but for the LLM's input alone: the frozen encoders need no backward pass."""
        hook = self.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
        self._require_grads_hooks, self._require_grads_hook = [hook], hook

    def train(self, mode: bool = True):
        """
        As in torch, but a part that is frozen as a whole stays in evaluation mode: no dropout on frozen features. The
        LLM does not: in evaluation mode its layers would not be checkpointed, and gradients pass through them.
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
    The encoders and the LLM's decoder, without its head.

    Audio and video become `num_query_tokens` vectors each (paper's Sec. 3.1), every earlier utterance one vector
    (Sec. 3.2); they replace the placeholder tokens of the prompt.
    """

    def __init__(self, config: EmpathicConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        video, audio = config.video_qformer_config, config.audio_qformer_config
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.audio_tower = WhisperEncoder._from_config(config.audio_config)
        self.video_qformer = Blip2QFormerModel._from_config(video)
        self.audio_qformer = Blip2QFormerModel._from_config(audio)
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
    def _query(qformer, query_tokens, projector, hidden_states, mask) -> BaseModelOutputWithPooling:
        """Q-former over (batch, positions, tower width) under a mask (batch, positions)."""
        # A clip that is absent attends to its first position, so that no softmax runs over nothing; its vectors have
        # no placeholder to go to.
        mask = mask.clone()
        mask[:, 0] |= ~mask.any(dim=1)
        outputs = qformer(
            query_embeds=query_tokens.expand(hidden_states.shape[0], -1, -1),
            encoder_hidden_states=hidden_states.to(query_tokens.dtype),
            encoder_attention_mask=mask.long(),
        )
        vectors = projector(outputs.last_hidden_state.to(projector.linear.weight.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=outputs.last_hidden_state, pooler_output=vectors)

    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_mask: torch.LongTensor | None = None,
        video_features: torch.FloatTensor | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, num_frames, 3, height, width)`, *optional*):
            The frames of each clip.
        video_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`, *optional*):
            1 for a real frame, 0 for padding.
        video_features (`torch.FloatTensor` of shape `(batch_size, num_frames, patches, width)`, *optional*):
            What the vision tower gave for the frames before (a feature cache), in their place.

        Returns `pooler_output` of shape `(batch_size, num_query_tokens, hidden_size)` in the LLM's embedding space.
        """
        check_exclusive("pixel_values_videos", pixel_values_videos, "video_features", video_features)
        if video_features is None:
            batch, frames = pixel_values_videos.shape[:2]
            hidden = encode_frames(self.vision_tower, pixel_values_videos.flatten(0, 1))
            video_features = hidden.unflatten(0, (batch, frames))
        batch, frames, patches = video_features.shape[:3]
        if video_mask is None:
            video_mask = video_features.new_ones(batch, frames, dtype=torch.long)
        mask = video_mask.bool().repeat_interleave(patches, dim=1)
        hidden = video_features.flatten(1, 2)
        return self._query(self.video_qformer, self.video_query_tokens, self.video_projector, hidden, mask)

    def get_audio_features(
        self,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        audio_features: torch.FloatTensor | None = None,
        audio_features_mask: torch.LongTensor | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        input_features (`torch.FloatTensor` of shape `(batch_size, mel, time)`, *optional*):
            Whisper's log-mel features; `time` is a whole number of Whisper windows, which are encoded one by one.
        input_features_mask (`torch.LongTensor` of shape `(batch_size, time)`, *optional*):
            1 within the clip, 0 past its end.
        audio_features (`torch.FloatTensor` of shape `(batch_size, positions, width)`, *optional*):
            What the audio tower gave before (a feature cache), in place of `input_features`.
        audio_features_mask (`torch.LongTensor` of shape `(batch_size, positions)`, *optional*):
            1 within the clip, 0 past its end.

        Returns `pooler_output` of shape `(batch_size, num_query_tokens, hidden_size)` in the LLM's embedding space.
        """
        check_exclusive("input_features", input_features, "audio_features", audio_features)
        if audio_features is None:
            audio_features = encode_sound(self.audio_tower, input_features)
            if input_features_mask is not None:
                audio_features_mask = audio_position_mask(input_features_mask)
        if audio_features_mask is None:
            mask = audio_features.new_ones(audio_features.shape[:2], dtype=torch.bool)
        else:
            # Past the longest clip there is nothing to attend to. Cut there, a batch has the same shape (and dropout)
            # whether its features were cached or not.
            mask = audio_features_mask.bool()
            heard = mask.any(dim=0).nonzero()
            length = int(heard[-1]) + 1 if len(heard) else 1
            audio_features, mask = audio_features[:, :length], mask[:, :length]
        return self._query(self.audio_qformer, self.audio_query_tokens, self.audio_projector, audio_features, mask)

    def get_memory_features(
        self, memory_input_ids: torch.LongTensor, memory_attention_mask: torch.LongTensor | None = None
    ) -> torch.FloatTensor:
        r"""
        memory_input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            Utterances in the memory encoder's vocabulary, `<MEM>` after each, right-padded.
        memory_attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            1 for a real token.

        Returns a tensor of shape `(utterances in the batch, hidden_size)`, in batch order, then utterance order.
        """
        return self.memory(memory_input_ids, memory_attention_mask)

    def new_memory_state(self, batch_size: int = 1) -> MemoryState:
        """An empty memory of `batch_size` conversations, for `append_to_memory`."""
        return self.memory.new_state(batch_size, device=self.device)  # its weights may be offloaded

    def append_to_memory(
        self,
        state: MemoryState,
        memory_input_ids: torch.LongTensor,
        memory_attention_mask: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Reads whole or partial utterances `(batch_size, length)` into `state`, in place, and returns the vectors
        `(new <MEM> tokens, hidden_size)`. However a token sequence is cut, its vectors are those of one pass.
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
        Mask `(batch_size, sequence_length, 1)` of a modality's placeholders; raises a ValueError with both counts
        where a row's placeholders are not as many as its vectors, `counts` `(batch_size,)`. A text of one row may hold
        the prompts of several rows of media, one after the other: then their sums must agree.
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
                f"The {modality} placeholders in the prompts and the {modality} vectors do not match, row by row: "
                f"{placeholders.tolist()} placeholders, {counts.tolist()} vectors."
            )
        return mask.unsqueeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_features: torch.FloatTensor | None = None,
        video_mask: torch.LongTensor | None = None,
        video_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        audio_features: torch.FloatTensor | None = None,
        audio_features_mask: torch.LongTensor | None = None,
        audio_embeds: torch.FloatTensor | None = None,
        memory_input_ids: torch.LongTensor | None = None,
        memory_attention_mask: torch.LongTensor | None = None,
        memory_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> EmpathicModelOutputWithPast:
        r"""
        memory_embeds (`torch.FloatTensor` of shape `(batch_size, utterances, hidden_size)`, *optional*):
            Memory vectors computed before, right-padded, instead of `memory_input_ids`.
        video_embeds, audio_embeds (`torch.FloatTensor` of shape `(clips, num_query_tokens, hidden_size)`, *optional*):
            The vectors of the clips there are, in batch order, computed before, instead of the clips.

        `input_ids` of one row may hold the prompts of several rows of media, one after the other (packing).

        The other media inputs are those of `get_video_features`, `get_audio_features` and `get_memory_features`. A row
        whose mask is all zero lacks that modality and must have no placeholder for it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if memory_embeds is not None and memory_input_ids is not None:
            raise ValueError("Give at most one of memory_embeds and memory_input_ids.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        video = audio = memory = None
        if video_embeds is not None:
            check_exclusive("video_embeds", video_embeds, "a clip", first_given(pixel_values_videos, video_features))
            video = video_embeds
            inputs_embeds = self._place_clips(self.config.video_token_id, input_ids, inputs_embeds, video, "video")
        elif pixel_values_videos is not None or video_features is not None:
            check_exclusive("pixel_values_videos", pixel_values_videos, "video_features", video_features)
            key, values = "pixel_values_videos", pixel_values_videos
            if video_features is not None:
                key, values = "video_features", video_features
            video, counts = self._encode_present(self.get_video_features, key, values, "video_mask", video_mask)
            mask = self.get_placeholder_mask(self.config.video_token_id, input_ids, inputs_embeds, counts, "video")
            inputs_embeds = self._place(inputs_embeds, mask, video[: (counts > 0).sum()].flatten(0, 1))
        if audio_embeds is not None:
            check_exclusive("audio_embeds", audio_embeds, "a clip", first_given(input_features, audio_features))
            audio = audio_embeds
            inputs_embeds = self._place_clips(self.config.audio_token_id, input_ids, inputs_embeds, audio, "audio")
        elif input_features is not None or audio_features is not None:
            check_exclusive("input_features", input_features, "audio_features", audio_features)
            key, values, mask = "input_features", input_features, input_features_mask
            if audio_features is not None:
                key, values, mask = "audio_features", audio_features, audio_features_mask
            audio, counts = self._encode_present(self.get_audio_features, key, values, f"{key}_mask", mask)
            mask = self.get_placeholder_mask(self.config.audio_token_id, input_ids, inputs_embeds, counts, "audio")
            inputs_embeds = self._place(inputs_embeds, mask, audio[: (counts > 0).sum()].flatten(0, 1))
        if memory_input_ids is not None:
            memory = self.get_memory_features(memory_input_ids, memory_attention_mask)
            is_mem = memory_input_ids == self.config.mem_token_id
            if memory_attention_mask is not None:
                is_mem &= memory_attention_mask.bool()
            mask = self.get_placeholder_mask(
                self.config.memory_token_id, input_ids, inputs_embeds, is_mem.sum(dim=1), "memory"
            )
            inputs_embeds = self._place(inputs_embeds, mask, memory)
        elif memory_embeds is not None:
            counts = torch.full((len(memory_embeds),), memory_embeds.shape[1], device=memory_embeds.device)
            if input_ids is not None:  # rows may have fewer utterances than the longest
                placeholders = (input_ids == self.config.memory_token_id).sum(dim=1)
                if placeholders.max() == counts.max():
                    counts = placeholders
            mask = self.get_placeholder_mask(self.config.memory_token_id, input_ids, inputs_embeds, counts, "memory")
            kept = torch.arange(memory_embeds.shape[1], device=counts.device) < counts[:, None]
            memory = memory_embeds[kept]
            inputs_embeds = self._place(inputs_embeds, mask, memory)

        # Placeholders whose vectors were left out. Steps that continue a cache write none.
        if input_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            nothing = input_ids.new_zeros(len(input_ids))
            for modality, token_id, given in (
                ("video", self.config.video_token_id, video),
                ("audio", self.config.audio_token_id, audio),
                ("memory", self.config.memory_token_id, memory_input_ids if memory_embeds is None else memory_embeds),
            ):
                if given is None:
                    self.get_placeholder_mask(token_id, input_ids, inputs_embeds, nothing, modality)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return EmpathicModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            video_hidden_states=video,
            audio_hidden_states=audio,
            memory_hidden_states=memory,
        )

    def _encode_present(self, encode, key, values, mask_key, mask):
        """
        Vectors (clips, num_query_tokens, hidden_size) of the rows that have a clip, and how many each row has (batch,).

        `encode` takes them as the arguments `key` and `mask_key`. Where no row has a clip, the first is encoded all the
        same: every process of a distributed run uses every module.
        """
        if mask is None:
            mask = values.new_ones(values.shape[0], 1, dtype=torch.long)
            rows, masks = values, None
        else:
            chosen = mask.any(dim=1)
            chosen = chosen if chosen.any() else torch.arange(len(mask), device=mask.device) == 0
            rows, masks = values[chosen], mask[chosen]
        counts = mask.any(dim=1).long() * self.config.num_query_tokens
        return encode(**{key: rows, mask_key: masks}).pooler_output, counts

    def _place_clips(self, token_id, input_ids, inputs_embeds, vectors, modality):
        """Vectors (clips, queries, width) of the rows that have a clip, into their placeholders."""
        clips, queries = vectors.shape[:2]
        has_clip = torch.arange(len(inputs_embeds), device=vectors.device) < clips
        counts = has_clip.new_tensor([clips * queries], dtype=torch.long)
        if len(has_clip) > 1:
            if input_ids is not None:
                found = (input_ids == token_id).any(dim=1)
                has_clip = found if found.sum() == clips else has_clip
            counts = has_clip.long() * queries
        mask = self.get_placeholder_mask(token_id, input_ids, inputs_embeds, counts, modality)
        return self._place(inputs_embeds, mask, vectors.flatten(0, 1))

    @staticmethod
    def _place(inputs_embeds, mask, vectors):
        """Vectors into their placeholders. Also where there are none of them, what computed them stays in the graph:
        every process of a distributed run then has a gradient, of zero, for every trained parameter."""
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
        # The table has another name in some LLMs (`wte` in GPT-2).
        table = next(name for name, module in self.named_modules() if module is self.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"{table}.weight"}
        self.post_init()
        self.suppress_placeholders()

    def suppress_placeholders(self):
        """Lets `generate` never write a placeholder: it stands for a vector that no reply has."""
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
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_features: torch.FloatTensor | None = None,
        video_mask: torch.LongTensor | None = None,
        video_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        audio_features: torch.FloatTensor | None = None,
        audio_features_mask: torch.LongTensor | None = None,
        audio_embeds: torch.FloatTensor | None = None,
        memory_input_ids: torch.LongTensor | None = None,
        memory_attention_mask: torch.LongTensor | None = None,
        memory_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_features=video_features,
            video_mask=video_mask,
            video_embeds=video_embeds,
            input_features=input_features,
            input_features_mask=input_features_mask,
            audio_features=audio_features,
            audio_features_mask=audio_features_mask,
            audio_embeds=audio_embeds,
            memory_input_ids=memory_input_ids,
            memory_attention_mask=memory_attention_mask,
            memory_embeds=memory_embeds,
            **kwargs,
        )
        loss = None
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return EmpathicCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            video_hidden_states=outputs.video_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            memory_hidden_states=outputs.memory_hidden_states,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, is_first_iteration=False, use_cache=True, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        # An assistant's first step is not called the first iteration.
        filled = past_key_values is not None and past_key_values.get_seq_length() > 0
        for key in MEDIA_KEYS:
            if use_cache and filled and not is_first_iteration:
                inputs.pop(key, None)
            elif kwargs.get(key) is not None:
                inputs[key] = kwargs[key]
        return inputs


EmpathicModel.register_for_auto_class("AutoModel")
EmpathicForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

# As in configuration_empathic.py.
if __name__ == "empathic.modeling_empathic":
    AutoModel.register(EmpathicConfig, EmpathicModel, exist_ok=True)
    AutoModelForMultimodalLM.register(EmpathicConfig, EmpathicForConditionalGeneration, exist_ok=True)

__all__ = ["EmpathicForConditionalGeneration", "EmpathicModel", "EmpathicPreTrainedModel"]
