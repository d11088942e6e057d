"""
The training samples of the supervised stages, as one stream in which sample number i is always the same.

Everything random about a sample (which row, which modalities, which frames) comes from the seed and its number alone,
so that a run can be resumed or divided over processes without changing it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from empathic.media_empathic import MediaError

logger = logging.get_logger(__name__)

# Stage `emotion` shows each clip in one of these settings (paper's Sec. 3.1).
MODALITY_SETTINGS = (("audio",), ("video",), ("audio", "video"))


def clip_message(row: dict, modalities: Sequence[str], with_text: bool = True) -> dict:
    """A turn row as the user's message, with those of its media that are wanted and there."""
    content = [{"type": kind, **row[kind]} for kind in modalities if row[kind] is not None]
    if with_text and row["text"]:
        content.append({"type": "text", "text": row["text"]})
    return {"role": "user", "name": row["speaker"], "content": content}


def emotion_sample(row: dict, rng: np.random.Generator) -> dict:
    """Names the emotion of a labelled clip, heard only, seen only or both, drawn evenly among what the clip has."""
    there = [s for s in MODALITY_SETTINGS if all(row[kind] is not None for kind in s)]
    modalities = there[rng.integers(len(there))]
    return {"messages": [clip_message(row, modalities)], "task": "emotion", "target": row["emotion"]}


def rebuild_sample(turns: list[dict]) -> dict:
    """Writes utterances down again from their memory vectors (paper's Sec. 3.2), one `name: text` a line."""
    messages = [{"role": "user", "name": turn["speaker"], "content": turn["text"]} for turn in turns]
    target = "\n".join(f"{turn['speaker']}: {turn['text']}" for turn in turns)
    return {"messages": messages, "task": "memory", "target": target}


def draw_utterances(conversation: list[dict], rng: np.random.Generator, single_ratio: float, longest: int | None):
    """One utterance with probability `single_ratio`, else a run of 2 to `longest` (None: the whole conversation)."""
    length = len(conversation)
    if rng.random() < single_ratio:
        length = 1
    elif longest is not None:
        length = min(length, int(rng.integers(2, longest + 1)) if longest > 1 else 1)
    start = int(rng.integers(len(conversation) - length + 1))
    return conversation[start : start + length]


def dialogue_sample(sample: dict, history: str, use_media: bool) -> dict:
    """The reply to a turn, given the clip and the history; without them for the ablations."""
    *earlier, last = sample["prompt"]
    if not use_media and not isinstance(last["content"], str):
        last = {**last, "content": [item for item in last["content"] if item["type"] == "text"]}
    if history == "none":
        earlier, history = [], "memory"
    return {"messages": [*earlier, last], "task": "dialogue", "history": history, "target": sample["reply"]}


class SampleStream(Dataset):
    """
    A stream of samples drawn from weighted sources.

    Args:
        sources: (weight, rows, make) triples; `make(row, rng)` gives a sample. A source is passed through in a new
            random order each time it is used up.
        length: how many samples the stream has.
        seed: decides, with a sample's number, everything about it.
    """

    def __init__(self, sources: list[tuple[float, Sequence, Callable]], length: int, seed: int):
        self.sources = [source for source in sources if source[0] > 0 and len(source[1])]
        if not self.sources:
            raise ValueError("No training samples: the data set has no row that this stage can use.")
        weights = np.array([weight for weight, _, _ in self.sources])
        self.probabilities = weights / weights.sum()
        self.length, self.seed = length, seed
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    def _order(self, source: int, epoch: int, rows: int) -> np.ndarray:
        if (source, epoch) not in self._orders:
            if len(self._orders) > 8:
                self._orders.clear()
            self._orders[source, epoch] = np.random.default_rng([self.seed, 1, source, epoch]).permutation(rows)
        return self._orders[source, epoch]

    def __getitem__(self, number: int) -> dict:
        rng = np.random.default_rng([self.seed, 0, number])
        chosen = int(rng.choice(len(self.sources), p=self.probabilities))
        _, rows, make = self.sources[chosen]
        epoch, position = divmod(number, len(rows))
        row = rows[int(self._order(chosen, epoch, len(rows))[position])]
        return {"history": "memory", **make(row, rng), "seed": [self.seed, 2, number]}


class StageCollator:
    """
    Samples -> a right-padded batch with labels on the targets, all modalities present.

    A clip that cannot be read is reported once and left out of its sample; a sample left with nothing, or in task
    `emotion` with no clip, is dropped.

    Args:
        processor: an `EmpathicProcessor`.
        training: samples frames at random; evenly spaced otherwise.
    """

    def __init__(self, processor, training: bool = True):
        self.processor, self.training = processor, training
        self._reported: set[str] = set()

    def _prepare(self, sample: dict) -> dict | None:
        messages = sample["messages"]
        while True:
            generator = np.random.default_rng(sample["seed"]) if self.training else None
            try:
                return self.processor.prepare(messages, sample["task"], sample["history"], generator=generator)
            except MediaError as error:
                if str(error) not in self._reported:
                    self._reported.add(str(error))
                    logger.warning("left out of training: %s", error)
                messages = self._without_unreadable(messages)
                kinds = {item["type"] for item in messages[-1]["content"]}
                if not kinds or (sample["task"] == "emotion" and kinds == {"text"}):
                    return None

    def _without_unreadable(self, messages: list[dict]) -> list[dict]:
        *earlier, last = messages
        readers = {"audio": self.processor.sound, "video": self.processor.frames}
        content = []
        for item in last["content"]:
            try:
                if item["type"] in readers:
                    readers[item["type"]](item)
                content.append(item)
            except MediaError:
                pass  # reported by the caller
        return [*earlier, {**last, "content": content}]

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        prepared = []
        for sample in samples:
            encoded = self._prepare(sample)
            if encoded is not None:
                target = self.processor.encode_reply(sample["target"])
                encoded["labels"] = [-100] * len(encoded["input_ids"]) + target
                encoded["input_ids"] = encoded["input_ids"] + target
                prepared.append(encoded)
        if not prepared:
            raise ValueError(f"No clip of a batch of {len(samples)} samples could be read; the files are named above.")
        return dict(self.processor.pad(prepared, padding_side="right", all_modalities=True))
