"""The common interface of all systems that can reply, and their common options."""

from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from ...sampling import Sampling

PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")
# What decides a reply besides the options. Recorded, so that replies of versions that did otherwise are not reused.
ALWAYS = {
    "thoughts": "left out of the reply",
    "own_generation_config": "only its end, padding and excluded tokens are used",
}


@dataclass
class Reply:
    """
    A system's reply.

    Args:
        text: the reply, stripped; empty if the system gave no reply, and then the `note` in `extra` says why.
        extra: further JSON values to save: `finish_reason` (`stop` or `length`), `tokens`, `prompt_tokens`, `cost`, and
            `note`: what the system could not read, or had to leave out, and `thought`: what a reasoning model wrote
            before the reply.
    """

    text: str
    extra: dict = field(default_factory=dict)

    def add(self, thought: str = "", note: str | None = None) -> None:
        """Add a thought, unless it is empty, and a note to the notes so far."""
        if thought:
            self.extra["thought"] = thought
        if note:
            self.extra["note"] = " ".join(part for part in (note, self.extra.get("note")) if part)


class System(Protocol):
    """
    A system that replies to conversations.

    Attributes:
        name: name of the system in tables and file names.
        settings: all settings that affect the replies, as JSON and without secrets. Saved replies are reused only if
            their settings are equal.
        batch_size: number of samples per call of `reply`.
        clip_kinds: the clips of the last turn that the replies depend on, of `audio` and `video`; a system without this
            attribute depends on both. Saved replies are reused only if these clips have the same content.
    """

    name: str
    settings: dict
    batch_size: int
    clip_kinds: tuple[str, ...]

    def reply(self, samples: list[dict], seeds: list[int]) -> list[Reply]:
        """
        Return a reply to each sample, in order.

        Args:
            samples: items of `DialogueSamples`; the system may read only their `prompt`.
            seeds: one sampling seed per sample.
        """


@dataclass(frozen=True)
class Common:
    """
    Options that all systems share; the spec of a system can override them.

    Args:
        batch_size: number of replies generated at once.
        max_new_tokens: maximum length of a reply.
        temperature: sampling temperature; None for greedy decoding, which is reproducible.
        top_p: nucleus sampling: sample from the likeliest tokens with this total probability. Needs a temperature.
        device: device such as cpu or cuda:1; by default a GPU if there is one.
        dtype: data type of the weights: auto (as saved), float32, bfloat16 or float16.
        repetition_penalty: divides the probability of tokens that are in the prompt or the reply, as in `generate`;
            None for no penalty. The penalties in a model's own generation config are not used.
        no_repeat_ngram_size: length of token sequences that must not occur twice; None for no limit.
    """

    batch_size: int = 16
    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float | None = None
    device: str | None = None
    dtype: str = "auto"
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.temperature is None and self.top_p is not None:
            raise ValueError(f"top_p is {self.top_p}, but without a temperature decoding is greedy. Give both.")
        for name, value in self.penalties().items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0. Omit it for none.")
        Sampling(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)  # checks the ranges

    @property
    def place(self) -> str:
        """The device name: `device`, or by default a GPU if there is one."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def penalties(self) -> dict:
        """The penalties that were asked for, as arguments of `generate`."""
        return {name: value for name in PENALTIES if (value := getattr(self, name)) is not None}

    def decoding(self) -> dict:
        """The options that affect the replies, for `System.settings`: all but the device, and what is always done."""
        options = {name: value for name, value in asdict(self).items() if name != "device"}
        return {**options, **ALWAYS}


def boolean(text: str) -> bool:
    """Parse `true` or `false`, as written in a spec."""
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is not true or false")
    return text == "true"
