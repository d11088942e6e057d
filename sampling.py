"""How the tokens of a reply are chosen: greedily, or from random numbers that belong to that reply alone."""

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
        max_new_tokens: the greatest length.
        do_sample: samples; False takes the likeliest token each time.
        temperature, top_p, top_k: as in `generate`. None: that of the model's generation config, or if that has none
            the neutral 1, 1 and 0.
    """

    max_new_tokens: int = 64
    do_sample: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        for name, ok, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature is None or self.temperature > 0, "above 0; greedy takes no samples"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 0, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it is {rule}.")

    def warping(self, config: GenerationConfig) -> dict:
        """`temperature`, `top_p` and `top_k`, the gaps filled."""
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        mine = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        models = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        return {
            name: next(value for value in (mine[name], models[name], neutral[name]) if value is not None)
            for name in neutral
        }


class SeededSampler(LogitsProcessor):
    """
    Samples each row's next token with a random stream of its own, and leaves only that token possible.

    So a reply depends on its own seed, not on which other rows share its batch; `generate` then runs greedily.

    Args:
        seeds: one string a row.
        temperature, top_k, top_p: as in `generate`; 1, 0 and 1 change nothing.
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
        """Scores (rows, vocabulary) -> 0 for the sampled token of each row, -inf elsewhere."""
        cumulative = self.warpers(input_ids, scores).double().softmax(-1).cumsum(-1)
        draws = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.float64)  # (rows, 1)
        # The first token whose share of the line from 0 to 1 reaches past the draw.
        chosen = torch.searchsorted(cumulative, draws.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)
