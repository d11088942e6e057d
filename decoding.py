"""Token after token for one conversation, without the work that `generate` repeats for each token."""

import torch
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .compat_empathic import CACHE
from .modeling_empathic import MEDIA_KEYS


def can_decode(config: GenerationConfig) -> bool:
    """Whether `decode_one` does all that this generation config of greedy decoding or sampling asks for."""
    # With a function as `custom_generate`, `generate` does not find the tokenizer that stop strings need.
    return not (config.return_dict_in_generate or config.prefill_chunk_size or config.stop_strings)


def next_logits(model, token: torch.LongTensor, cache) -> torch.Tensor:
    """Process a token (1, 1) after those in the cache, and return the logits (1, vocabulary) of the next one."""
    states = model.get_decoder()(inputs_embeds=model.get_input_embeddings()(token), use_cache=True, **{CACHE: cache})
    return model.lm_head(states.last_hidden_state[:, -1])


def decode_one(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer=None,
    **model_kwargs,
) -> torch.LongTensor:
    """
    Greedy decoding or sampling of one row with a key-value cache, for `generate(custom_generate=decode_one)`.

    The tokens are those of `generate` itself, with the same random numbers. Only the prompt runs through the whole
    model; each further token runs through the language model and its head. `generate` prepares the whole model's inputs
    again for each token, and inspects the signatures of all logits processors.

    Args:
        input_ids: (1, length), of which the cache already has the first positions.
        model_kwargs: the cache, and the inputs of `MEDIA_KEYS` that belong to the other positions.

    Returns:
        `input_ids` and the new tokens (1, length).
    """
    cache, media = model_kwargs[CACHE], {key: value for key, value in model_kwargs.items() if key in MEDIA_KEYS}
    new = input_ids[:, cache.get_seq_length() :]
    logits = model(input_ids=new, use_cache=True, logits_to_keep=1, **{CACHE: cache}, **media).logits[:, -1]
    while True:
        scores = logits.float()
        for process in logits_processor:
            scores = process(input_ids, scores)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        if streamer is not None:
            streamer.put(token[0].cpu())
        if stopping_criteria(input_ids, ()).all():
            break
        logits = next_logits(model, token, cache)
    if streamer is not None:
        streamer.end()
    return input_ids
