"""How the tokens of a reply are chosen: greedily, or sampled with a random stream per reply."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """
    How a reply's tokens are chosen.

    Args:
        max_new_tokens: the maximum number of tokens in the reply.
        do_sample: True samples each token; False takes the most likely token.
        temperature, top_p, top_k: as in `generate`. None uses the value of the model's generation config, or, if it has
            none, the neutral 1, 1 and 0.
    """

    max_new_tokens: int = 64
    do_sample: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        for name, ok, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature is None or self.temperature > 0, "above 0 (or set do_sample=False)"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 0, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}.")

    def warping(self, config: GenerationConfig) -> dict:
        """Return `temperature`, `top_p` and `top_k`, with each None replaced by its default."""
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        mine = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        models = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        return {
            name: next(value for value in (mine[name], models[name], neutral[name]) if value is not None)
            for name in neutral
        }

    def recorded(self, name: str) -> dict:
        """Return all options as JSON, with the values of the generation config of a checkpoint (folder or Hub id)."""
        try:
            own = GenerationConfig.from_pretrained(name)
        except OSError:  # the checkpoint has none, or is not there, which the loading of the model reports
            own = GenerationConfig()
        return {**vars(self), **(self.warping(own) if self.do_sample else {})}


# Options of a model's own generation config that change its text, at the values that have no effect. A repetition
# penalty, for example, also counts the tokens of the prompt: it would be harsher on a history given as text than on one
# given as memory vectors. Tokens that are never text (`suppress_tokens`, `bad_words_ids`) stay excluded.
PLAIN_DECODING = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "stop_strings": None,
    "max_time": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "token_healing": False,
}


def plain_decoding(**asked) -> dict:
    """
    Return arguments of `generate` that take the most likely token at each step, whatever the model's own generation
    config says, apart from the options that are asked for.
    """
    known = vars(GenerationConfig())  # a version of transformers may lack some
    return {**{name: value for name, value in PLAIN_DECODING.items() if name in known}, **asked}


def end_tokens(config: GenerationConfig) -> set[int]:
    """The tokens that end a reply."""
    ends = config.eos_token_id
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


class SeededSampler(LogitsProcessor):
    """
    Sample each row's next token with a separate random stream, and give every other token a logit of -inf.

    A reply thus depends only on its own seed, not on the other rows of its batch. `generate` must run greedily.

    Args:
        seeds: one string per row.
        temperature, top_k, top_p: as in `generate`; 1, 0 and 1 have no effect.
    """

    def __init__(self, seeds: Sequence[str], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        self.streams = [random.Random(seed) for seed in seeds]
        self.warpers = LogitsProcessorList()
        if temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Map logits (rows, vocabulary) to 0 for the sampled token of each row and -inf for all other tokens."""
        cumulative = self.warpers(input_ids, scores).double().softmax(-1).cumsum(-1)
        draws = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.float64)  # (rows, 1)
        # The first token whose cumulative probability exceeds the draw (inverse transform sampling).
        chosen = torch.searchsorted(cumulative, draws.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)
