"""
The training samples of the supervised stages: a stream in which sample number i is always the same.

All random choices of a sample (row, modalities, frames) depend only on the seed and the sample's number, so that
resuming a run, or dividing it over processes, does not change it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import Dataset
from transformers.utils import logging

from ..data_prep.messages import clip_message, sample_id, shows_something
from ..media_empathic import MediaError
from ..processing_empathic import MODALITIES
from .frozen.feature_cache import FeatureCache, MediaDraws
from .frozen.outputs import no_entry, stack_entries
from .losses import IGNORE_INDEX

logger = logging.get_logger(__name__)

# Stage `emotion` shows each clip in one of these settings (paper's Sec. 3.1).
MODALITY_SETTINGS = (("audio",), ("video",), ("audio", "video"))


NOTHING = "its last turn has no text and no readable clip"  # why a sample is left out


def emotion_sample(row: dict, rng: np.random.Generator) -> dict:
    """Make a sample that names the emotion of a labeled clip. Audio, video or both is drawn uniformly where present."""
    there = [s for s in MODALITY_SETTINGS if all(row[kind] is not None for kind in s)]
    modalities = there[rng.integers(len(there))]
    return {
        "messages": [clip_message(row, modalities)],
        "task": "emotion",
        "target": row["emotion"],
        "id": sample_id(row),
    }


def rebuild_sample(turns: list[dict], dialogue: dict | None = None) -> dict:
    """
    Make a sample that rebuilds utterances from their memory vectors (paper's Sec. 3.2), one `name: text` per line.

    Args:
        turns: rows with `speaker` and `text`.
        dialogue: identifies the dialogue in the sample's id, where the turns do not.
    """
    messages = [{"role": "user", "name": turn["speaker"], "content": turn["text"]} for turn in turns]
    target = "\n".join(f"{turn['speaker']}: {turn['text']}" for turn in turns)
    return {"messages": messages, "task": "memory", "target": target, "id": sample_id(dialogue or turns[0], turns)}


def draw_utterances(conversation: list[dict], rng: np.random.Generator, single_ratio: float, longest: int | None):
    """Draw one utterance with probability `single_ratio`, else a run of 2 to `longest` (None: all utterances)."""
    length = len(conversation)
    if rng.random() < single_ratio:
        length = 1
    elif longest is not None:
        length = min(length, int(rng.integers(2, longest + 1)) if longest > 1 else 1)
    start = int(rng.integers(len(conversation) - length + 1))
    return conversation[start : start + length]


def dialogue_sample(sample: dict, history: str, use_media: bool) -> dict:
    """Make a sample of the reply to a turn, given the clip and the history, or without them for the ablations."""
    *earlier, last = sample["prompt"]
    if not use_media and not isinstance(last["content"], str):
        last = {**last, "content": [item for item in last["content"] if item["type"] == "text"]}
    if history == "none":
        earlier, history = [], "memory"
    return {
        "messages": [*earlier, last],
        "task": "dialogue",
        "history": history,
        "target": sample["reply"],
        "id": sample_id(sample),
    }


class SampleStream(Dataset):
    """
    A stream of samples drawn from weighted sources.

    Args:
        sources: (weight, rows, make) triples; `make(row, rng)` gives a sample. Each pass over a source has a new
            random order.
        length: the number of samples in the stream.
        seed: determines each sample, together with its number.
        random_frames: give each sample a seed, from which its frames are drawn. Otherwise (in evaluation) the seed is
            None and the frames are evenly spaced.
    """

    def __init__(
        self, sources: list[tuple[float, Sequence, Callable]], length: int, seed: int, random_frames: bool = True
    ):
        self.sources = [source for source in sources if source[0] > 0 and len(source[1])]
        if not self.sources:
            raise ValueError("No training samples: the data set has no row that this stage can use.")
        weights = np.array([weight for weight, _, _ in self.sources], dtype=float)
        self.length, self.seed, self.random_frames = length, seed, random_frames
        # The source of each sample, and the number of earlier samples from that source.
        probabilities = weights / weights.sum()
        self._chosen = np.random.default_rng([seed, 3]).choice(len(weights), size=length, p=probabilities).astype("u2")
        self._place = np.empty(length, dtype=np.int64)
        for source in range(len(weights)):
            from_here = self._chosen == source
            self._place[from_here] = np.arange(from_here.sum())
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        # The entries of `FrozenOutputs` for the rows of a source. If any source has entries, every sample has a key
        # `frozen`: the entry of its row, or None.
        self.frozen: dict[int, list[dict]] = {}

    def __len__(self) -> int:
        return self.length

    def _order(self, source: int, epoch: int, rows: int) -> np.ndarray:
        if (source, epoch) not in self._orders:
            if len(self._orders) > 2 * len(self.sources):
                self._orders.clear()
            self._orders[source, epoch] = np.random.default_rng([self.seed, 1, source, epoch]).permutation(rows)
        return self._orders[source, epoch]

    def __getitem__(self, number: int) -> dict:
        rng = np.random.default_rng([self.seed, 0, number])
        chosen = int(self._chosen[number])
        _, rows, make = self.sources[chosen]
        epoch, position = divmod(int(self._place[number]), len(rows))
        place = int(self._order(chosen, epoch, len(rows))[position])
        seed = [self.seed, 2, number] if self.random_frames else None
        sample = {"history": "memory", **make(rows[place], rng), "seed": seed}
        if self.frozen:
            sample["frozen"] = self.frozen[chosen][place] if chosen in self.frozen else None
        return sample


class SourceSamples(Dataset):
    """
    Each row of one source of a stream as a sample with fixed frames; for sources whose samples have no other random
    choices.
    """

    def __init__(self, stream: SampleStream, source: int):
        self.stream, self.source = stream, source
        _, self.rows, self.make = stream.sources[source]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict:
        rng = np.random.default_rng([self.stream.seed, 4, self.source, place])
        seed = [self.stream.seed, 4, self.source, place] if self.stream.random_frames else None
        return {"history": "memory", **self.make(self.rows[place], rng), "seed": seed}


class StageCollator:
    """
    Makes a right-padded batch of samples, with labels on the targets and with all modalities.

    A clip that cannot be read is reported once and left out of its sample. A sample is left out if its last turn has
    no text and no readable clip, or in task `emotion` no readable clip. A sample longer than `max_length` is also left
    out; it is never truncated, because each placeholder of its prompt needs its vector.

    Besides the model's inputs a batch has `sample_ids`, the names of its rows; `sample_places`, the positions of the
    rows among the samples; `targets`, their target texts; and `left_out`, (name, reason) of each sample without a row.
    If all samples are left out, the batch is one row of two tokens without a target, so that every rank runs the model.

    Args:
        processor: an `EmpathicProcessor`.
        frame_draws: the number of fixed frame draws of a clip, of which a sample takes one; 0: evenly spaced frames;
            None: new random frames each time.
        cache: gives the features of the encoders in place of the clips, and the frame draws.
        max_length: longest prompt + target in tokens of the language model; None for no limit.
        clips: whether any sample of the run may have a clip. If so, each batch has clips, of zeros where it has none,
            so that every rank runs the encoders.
    """

    def __init__(
        self,
        processor,
        frame_draws: int | None = None,
        cache: FeatureCache | None = None,
        max_length: int | None = None,
        clips: bool = True,
    ):
        self.processor, self.cache, self.max_length = processor, cache, max_length
        self.modalities = MODALITIES if clips else ("memory",)
        self.media_draws = MediaDraws(frame_draws)
        self._reported: set[str] = set()

    def _encode(self, messages: list[dict], sample: dict) -> dict:
        generator, seed = None, sample["seed"]
        if sample["task"] != "memory":  # messages of task memory have no clip
            if self.cache is not None:
                messages = self.cache.fill(messages, seed)
            else:
                generator = self.media_draws.generator(messages, seed)
        return self.processor.prepare(messages, sample["task"], sample["history"], generator=generator)

    def _prepare(self, sample: dict) -> dict | None:
        messages = sample["messages"]
        while sample["task"] == "memory" or shows_something(messages[-1], sample["task"]):
            try:
                return self._encode(messages, sample)
            except MediaError as error:
                if str(error) not in self._reported:
                    self._reported.add(str(error))
                    logger.warning("left out of training: %s", error)
                messages = self._without_unreadable(messages)
        return None

    def _without_unreadable(self, messages: list[dict]) -> list[dict]:
        *earlier, last = messages
        content = []
        for item in last["content"]:
            try:
                if item["type"] != "text" and self.cache is not None:
                    self.cache.features(item["type"], item)
                elif item["type"] == "audio":
                    self.processor.sound(item)
                elif item["type"] == "video":
                    self.processor.frames(item)
                content.append(item)
            except MediaError:
                pass  # reported by the caller
        return [*earlier, {**last, "content": content}]

    def prompt(self, sample: dict) -> tuple[dict | None, str]:
        """Return the prompt without the target, or None and why the sample is left out; for `FrozenOutputs`."""
        return self._prepare(sample), NOTHING

    def prompt_and_target(self, sample: dict) -> tuple[dict, str] | None:
        """Return the prompt, as `EmpathicProcessor.prepare` gives it, and the target; None for a sample left out."""
        encoded = self._prepare(sample)
        return None if encoded is None else (encoded, sample["target"])

    def __call__(self, samples: list[dict]) -> dict:
        prepared, entries, ids, places, left_out = [], [], [], [], []
        for number, sample in enumerate(samples):
            entry = sample.get("frozen")
            encoded = self._prepare(sample) if entry is None else _without_clips(entry)
            name = sample.get("id") or f"sample {number} of the batch"
            if encoded is None:
                left_out.append((name, NOTHING))
                continue
            target = self.processor.encode_reply(sample["target"])
            length = len(encoded["input_ids"]) + len(target)
            if self.max_length is not None and length > self.max_length:
                left_out.append((name, f"prompt + target have {length} tokens, more than max_length={self.max_length}"))
                continue
            encoded["labels"] = [IGNORE_INDEX] * len(encoded["input_ids"]) + target
            encoded["input_ids"] = encoded["input_ids"] + target
            prepared.append(encoded)
            entries.append(no_entry([]) if entry is None else entry)
            ids.append(name)
            places.append(number)
        if not prepared:
            prepared, entries = [self._no_sample()], [no_entry([])]
        sizes = None if self.cache is None else self.cache.sizes
        batch = self.processor.pad(prepared, padding_side="right", all_modalities=self.modalities, feature_sizes=sizes)
        if "frozen" in samples[0]:  # no clip of any batch is encoded, on any rank
            clips = ("video", "pixel_values_videos", "audio", "input_features")
            batch = {key: value for key, value in batch.items() if not key.startswith(clips)}
            batch |= stack_entries(entries)
        targets = [samples[place]["target"] for place in places]
        return {**batch, "sample_ids": ids, "sample_places": places, "targets": targets, "left_out": left_out}

    def _no_sample(self) -> dict:
        """A row of two tokens without a target."""
        eos = self.processor.tokenizer.eos_token_id
        nothing = {"memory_input_ids": [], "video": None, "audio": None}
        return {**nothing, "input_ids": [eos] * 2, "labels": [IGNORE_INDEX] * 2}


def _without_clips(entry: dict) -> dict | None:
    """Convert an entry of `FrozenOutputs` to a prompt without clips, as their vectors are cached."""
    if "left_out" in entry:
        return None
    ids = {key: list(entry[key]) for key in ("input_ids", "memory_input_ids")}
    return {**ids, "video": None, "audio": None}
