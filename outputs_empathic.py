"""What the model returns."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput


@dataclass
class EmpathicModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    video_hidden_states, audio_hidden_states (`torch.FloatTensor`, *optional*):
        The vectors of the clips there are `(clips, num_query_tokens, hidden_size)`, in the LLM's embedding space.
    memory_hidden_states (`torch.FloatTensor` of shape `(num_utterances, hidden_size)`, *optional*):
        The memory vectors, in batch order, then utterance order.
    """

    video_hidden_states: torch.FloatTensor | None = None
    audio_hidden_states: torch.FloatTensor | None = None
    memory_hidden_states: torch.FloatTensor | None = None


@dataclass
class EmpathicCausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modeling loss (next-token prediction).
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Scores of the vocabulary; `sequence_length` is what `logits_to_keep` left.
    past_key_values (`Cache`, *optional*):
        The LLM's key-value cache.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    video_hidden_states: torch.FloatTensor | None = None
    audio_hidden_states: torch.FloatTensor | None = None
    memory_hidden_states: torch.FloatTensor | None = None
