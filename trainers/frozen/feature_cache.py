"""
The feature cache: outputs of the frozen encoders for each clip, computed once by `empathic prepare-features`.

    CACHE/manifest.json                     settings and weights that the features depend on
    CACHE/features-RANK-NUMBER.safetensors  shards of tensors, named {audio|video}.{hash of the clip's content}
    CACHE/files.json                        content hashes of files, so that clips are not read again
    CACHE/files-RANK.json                   the same of a run that is not finished
    CACHE/report.json                       counts, and the clips that cannot be read

An audio tensor is (positions, width): the output of Whisper's encoder within the clip's true length. A video tensor is
(frames, patches, width): the distinct frames of all draws of the clip. The shard's metadata has the frame indices of
each draw; the first draw is evenly spaced, the others are random.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ...configuration_empathic import sound_width
from ...data_prep.clip_digests import MEDIA_KINDS, Digests, short_hash
from ...files import atomic_path
from ...media_empathic import MediaError, media_item

CACHE_FORMAT = 2  # increase it when the same clip is decoded to other frames or samples
MANIFEST, FILES, REPORT = "manifest.json", "files.json", "report.json"
SHARDS = "features-*.safetensors"
UNFINISHED_FILES = "files-*.json"
SECONDS_BETWEEN_SAVES = 60
REMEDY = "Run `empathic prepare-features` again with the configuration of this training"

# Settings that determine a tower's output, besides its weights. Other settings may differ between two copies.
VISION_SETTINGS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip
AUDIO_SETTINGS = (
    "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins", "max_source_positions",
    "activation_function", "scale_embedding",
)  # fmt: skip
# Settings of a preprocessor that name its class and do not change its output.
NO_SETTING = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")


class FeatureCacheError(ValueError):
    """Raised if a cache cannot be used or lacks a clip. The message has the reason and the remedy."""


# Clips and draws -----------------------------------------------------------------------------------------------------


def clips_of(message: dict) -> list[dict]:
    """Return the audio and video items of a message."""
    content = message["content"]
    return [] if isinstance(content, str) else [media_item(item) for item in content if item["type"] in MEDIA_KINDS]


def draw_generator(digest: str, draw: int) -> np.random.Generator:
    """Return the generator of a clip's random draw number `draw`, from 0, seeded with the clip's content and `draw`."""
    return np.random.default_rng([draw, int(digest, 16)])


def choose_draw(seed, draws: int) -> int | None:
    """
    Choose the draw of a clip for a sample; None means the evenly spaced frames.

    Args:
        seed: the sample's seed; None in evaluation.
        draws: number of random draws; 0 always gives the evenly spaced frames.
    """
    return None if seed is None or draws == 0 else int(np.random.default_rng([*seed, draws]).integers(draws))


# What features depend on ---------------------------------------------------------------------------------------------


def _weights(tower: nn.Module) -> str:
    """Return the hash of a tower's weights in their current precision: in another precision, the features differ."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():  # each process holds a part of every tensor
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(tower.parameters())):
            return _hash_tensors(tower)
    return _hash_tensors(tower)


def _hash_tensors(tower: nn.Module) -> str:
    total = short_hash()
    for name, tensor in sorted(tower.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def describe(
    vision_tower: nn.Module,
    audio_tower: nn.Module,
    processor,
    audio_window: str = "full",
    audio_feature_layers: list[int] | None = None,
) -> dict:
    """
    Describe, as JSON, everything that cached features depend on, except for the clips and the number of draws.

    Args:
        vision_tower, audio_tower: CLIP's vision tower and Whisper's encoder, in the precision in which they run.
        processor: an `EmpathicProcessor`.
        audio_window, audio_feature_layers: as in the model's config.
    """
    vision, audio = vision_tower.config, audio_tower.config
    image_processor, extractor = processor.image_processor.to_dict(), processor.feature_extractor.to_dict()
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    description = {
        "format": CACHE_FORMAT,
        "num_frames": processor.num_frames,
        "max_audio_seconds": processor.max_audio_seconds,
        "sizes": {"video": [patches, vision.hidden_size], "audio": [sound_width(audio, audio_feature_layers)]},
        "vision": {name: getattr(vision, name) for name in VISION_SETTINGS}
        | {"dtype": str(vision_tower.dtype), "weights": _weights(vision_tower)},
        "audio": {name: getattr(audio, name) for name in AUDIO_SETTINGS}
        | {"dtype": str(audio_tower.dtype), "weights": _weights(audio_tower)}
        | ({} if audio_window == "full" else {"audio_window": audio_window})
        | ({} if audio_feature_layers is None else {"audio_feature_layers": audio_feature_layers}),
        "image_processor": {k: v for k, v in image_processor.items() if k not in NO_SETTING and k[0] != "_"},
        "feature_extractor": {k: v for k, v in extractor.items() if k not in NO_SETTING and k[0] != "_"},
    }
    return json.loads(json.dumps(description))


def differences(stored: dict, wanted: dict, prefix: str = "") -> list[str]:
    """List the differences between two descriptions, each with its name, the stored value and the wanted value."""
    found = []
    for name in sorted({*stored, *wanted}):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: the cache has {old!r}, the model {new!r}")
    return found


# Writing -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, default):
    """Read a JSON file; return `default` if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


class ShardWriter:
    """
    Writes features in shards of bounded size and age. Shards are written atomically, so that a killed run can be
    continued.

    Args:
        folder: the cache.
        rank: the rank of this process; each rank's shards have their own names.
        dtype: the dtype in which features are stored.
        shard_bytes: a shard is written when its tensors reach this size,
        seconds: or when this time has passed since the last shard, so that a killed run loses little.
    """

    def __init__(
        self, folder: Path, rank: int, dtype: torch.dtype, shard_bytes: int, seconds: float = SECONDS_BETWEEN_SAVES
    ):
        self.folder, self.rank, self.dtype, self.shard_bytes, self.seconds = folder, rank, dtype, shard_bytes, seconds
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._tensors, self._draws, self._size = {}, {}, 0
        self._since = time.monotonic()

    def add(self, name: str, features: torch.Tensor, draws: list[list[int]] | None = None) -> None:
        """
        Add one clip's features; `draws` has the frame indices of each draw of a video.

        Raises:
            FeatureCacheError: if the features are out of range for the storage dtype.
        """
        stored = features.to(device="cpu", dtype=self.dtype).contiguous()
        if not torch.isfinite(stored).all() and torch.isfinite(features).all():
            raise FeatureCacheError(f"{name}: its features overflow {self.dtype}; use --feature_dtype bfloat16.")
        self._tensors[name] = stored
        self._size += stored.nbytes
        if draws is not None:
            self._draws[name] = draws
        if self._size >= self.shard_bytes or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write the added features as a shard."""
        if not self._tensors:
            return
        while (path := self.folder / f"features-{self.rank:04d}-{self._number:05d}.safetensors").exists():
            self._number += 1
        with atomic_path(path) as partial:
            save_file(self._tensors, partial, metadata={"draws": json.dumps(self._draws)})
        self._clear()


# Reading -------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """The location of a clip's features: the shard, and for a video the frame indices of each draw."""

    shard: str
    draws: list[list[int]] | None


def read_entries(folder: Path) -> dict[str, Entry]:
    """
    Read the entries of all shards, by name.

    Raises:
        FeatureCacheError: if a shard is damaged.
    """
    entries = {}
    for path in sorted(folder.glob(SHARDS)):
        try:
            with safe_open(path, "pt") as shard:
                draws = json.loads(shard.metadata()["draws"])
                entries |= {name: Entry(path.name, draws.get(name)) for name in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise FeatureCacheError(f"{path}: the shard is damaged ({error}). Delete it. {REMEDY}.") from None
    return entries


class FeatureCache:
    """
    A cache that fits the model. It gives the features of a clip; shards are memory-mapped.

    Args:
        folder: the folder written by `empathic prepare-features`.
        wanted: the description of the model's features, see `describe`.
        draws: number of random frame draws to choose from; None for all draws of the cache.

    Raises:
        FeatureCacheError: if there is no cache, it is stale (the message names the differences) or damaged, or has
            fewer draws.
    """

    def __init__(self, folder: str | os.PathLike, wanted: dict, draws: int | None = None):
        self.folder = Path(folder)
        manifest = read_json(self.folder / MANIFEST, None)
        if manifest is None:
            raise FeatureCacheError(f"{folder} has no feature cache (no {MANIFEST}). {REMEDY}.")
        stale = differences(manifest["features"], wanted)
        if stale:
            raise FeatureCacheError(
                f"{folder}: the feature cache does not fit the model. {'; '.join(stale)}. {REMEDY}."
            )
        self.draws = manifest["draws"] if draws is None else draws
        if self.draws > manifest["draws"]:
            raise FeatureCacheError(
                f"{folder}: the feature cache has {manifest['draws']} random frame draws per clip, but frame_draws is "
                f"{draws}. {REMEDY}."
            )
        self.sizes = {kind: tuple(size) for kind, size in wanted["sizes"].items()}
        self._digests = Digests(read_json(self.folder / FILES, {}))
        self._entries = read_entries(self.folder)
        unreadable = read_json(self.folder / REPORT, {"unreadable": []})["unreadable"]
        self._unreadable = {f"{found['kind']}.{found['digest']}": found["reason"] for found in unreadable}
        self._open: dict = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # a data loader's worker opens its own shards

    def features(self, kind: str, item: dict, draw: int | None = None) -> torch.Tensor:
        """
        Return the features of a clip: (positions, width) for audio, (frames, patches, width) for video.

        Args:
            kind: "audio" or "video".
            item: the clip, with `path` or `bytes`.
            draw: number of the video's random draw; None for the evenly spaced frames.

        Raises:
            MediaError: if the clip could not be read when the cache was made, or cannot be found now.
            FeatureCacheError: if the clip is not in the cache, or was changed since.
        """
        name = f"{kind}.{self._digests.of(item)}"
        entry = self._entries.get(name)
        if entry is None:
            if name in self._unreadable:
                raise MediaError(self._unreadable[name])
            where = f"<{len(item['bytes'])} bytes>" if item.get("path") is None else item["path"]
            raise FeatureCacheError(
                f"{self.folder}: the {kind} of {where} is not in the feature cache: it is new or was changed. {REMEDY}."
            )
        if entry.shard not in self._open:
            self._open[entry.shard] = safe_open(self.folder / entry.shard, "pt")
        tensor = self._open[entry.shard].get_tensor(name)
        if entry.draws is None:
            return tensor
        rows = entry.draws[0 if draw is None else draw + 1]
        return tensor if rows == list(range(len(tensor))) else tensor[rows]

    def fill(self, messages: list[dict], seed) -> list[dict]:
        """
        Replace the clips of the last message by their features, as `EmpathicProcessor.prepare` takes them.

        Args:
            messages: a conversation.
            seed: the sample's seed, which chooses the draw; None for evenly spaced frames.
        """
        *earlier, last = messages
        if not clips_of(last):
            return messages
        draw = choose_draw(seed, self.draws)
        content = [
            {"type": kind, "features": self.features(kind, media_item(item), draw)}
            if (kind := item["type"]) in MEDIA_KINDS
            else item
            for item in last["content"]
        ]
        return [*earlier, {**last, "content": content}]


class MediaDraws:
    """
    Random generators for the frames of clips that are decoded from media, with the same fixed draws as in a cache.

    Args:
        draws: number of random draws of each clip; 0: evenly spaced frames; None: new random frames each time.
    """

    def __init__(self, draws: int | None):
        self.draws = draws
        self._digests = Digests()

    def generator(self, messages: Iterable[dict], seed) -> np.random.Generator | None:
        """
        Return the generator that `EmpathicProcessor.prepare` draws frames with; None for evenly spaced frames.

        Args:
            messages: a conversation; the video of the last message counts.
            seed: the sample's seed; None in evaluation.
        """
        if seed is None or self.draws is None:
            return None if seed is None else np.random.default_rng(seed)
        draw = choose_draw(seed, self.draws)
        videos = [item for item in clips_of(messages[-1]) if item["type"] == "video"]
        return draw_generator(self._digests.of(videos[0]), draw) if videos and draw is not None else None
