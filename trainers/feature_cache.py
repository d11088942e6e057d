"""
What the frozen encoders make of each clip, computed once by `empathic prepare-features` and read back in training.

    CACHE/manifest.json                     what the features depend on beside the clips
    CACHE/features-RANK-NUMBER.safetensors  shards of tensors, named {audio|video}.{hash of the clip's content}
    CACHE/files.json                        which file had which content, so that clips are not read again
    CACHE/report.json                       counts, and the clips that cannot be read

An audio tensor is (positions, width): what Whisper's encoder gives within the clip's true length. A video tensor is
(frames, patches, width): each frame that any of the clip's draws takes, once; the shard's metadata names the frames of
each draw, of which the first is evenly spaced and the others are random.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from empathic.media_empathic import MediaError

FORMAT = 1
KINDS = ("audio", "video")
MANIFEST, FILES, REPORT = "manifest.json", "files.json", "report.json"
SHARDS = "features-*.safetensors"
MEND = "Run `empathic prepare-features` again with the configuration of this training"

# What decides a tower's output, beside its weights. A config has much more that may differ between two copies.
VISION_SETTINGS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip
AUDIO_SETTINGS = (
    "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins", "max_source_positions",
    "activation_function", "scale_embedding",
)  # fmt: skip
# What a preprocessor's settings say of its class and not of what it does.
NO_SETTING = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")


class FeatureCacheError(ValueError):
    """A cache that cannot be used, or lacks a clip. The message says why and names the mend."""


# Clips and draws -----------------------------------------------------------------------------------------------------


def clips_of(message: dict) -> list[dict]:
    """The audio and video items of a message."""
    content = message["content"]
    return [] if isinstance(content, str) else [item for item in content if item["type"] in KINDS]


class Digests:
    """
    Content hashes of clips. A file that was hashed before is not read again while its size and time stay the same.

    Args:
        files: {absolute path: [size, time of change in ns, hash]} of earlier calls.
    """

    def __init__(self, files: dict[str, list] | None = None):
        self.files = dict(files or {})

    def of(self, item: dict) -> str:
        """
        The hash of a clip `{"path", "bytes"}`; bytes win over the path, as in decoding.

        Raises:
            MediaError: if the file cannot be read, or the clip is decoded already and thus no file.
        """
        if item.get("bytes") is not None:
            return _hash(item["bytes"])
        if item.get("path") is None:
            raise MediaError(
                f"A clip in a data set needs a path or bytes; this one has {sorted(k for k, v in item.items() if v)}."
            )
        path = os.path.abspath(item["path"])
        try:
            status = os.stat(path)
            known = self.files.get(path)
            if known is None or known[:2] != [status.st_size, status.st_mtime_ns]:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, _new_hash).hexdigest()
                self.files[path] = known = [status.st_size, status.st_mtime_ns, digest]
        except OSError as error:
            raise MediaError(
                f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
            ) from None
        return known[2]


def _new_hash():
    return hashlib.blake2b(digest_size=16)


def _hash(data) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def draw_generator(digest: str, draw: int) -> np.random.Generator:
    """What random frames a clip shows in its draw number `draw`, from 0: the clip's content and the number decide."""
    return np.random.default_rng([draw, int(digest, 16)])


def choose_draw(seed, draws: int) -> int | None:
    """
    Which of a clip's draws a sample takes: None for the evenly spaced frames.

    Args:
        seed: the sample's own seed; None in evaluation.
        draws: how many random draws there are; 0 always gives the evenly spaced frames.
    """
    return None if seed is None or draws == 0 else int(np.random.default_rng([*seed, draws]).integers(draws))


# What features depend on ---------------------------------------------------------------------------------------------


def _weights(tower: nn.Module) -> str:
    """The hash of a tower's weights, as they are: in another precision they make other features."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():  # each process holds a part of every tensor
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(tower.parameters())):
            return _hash_tensors(tower)
    return _hash_tensors(tower)


def _hash_tensors(tower: nn.Module) -> str:
    total = _new_hash()
    for name, tensor in sorted(tower.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def describe(vision_tower: nn.Module, audio_tower: nn.Module, processor) -> dict:
    """
    All that cached features depend on beside the clips and the number of draws, as JSON.

    Args:
        vision_tower, audio_tower: CLIP's vision tower and Whisper's encoder, in the precision that they run in.
        processor: an `EmpathicProcessor`.
    """
    vision, audio = vision_tower.config, audio_tower.config
    image_processor, extractor = processor.image_processor.to_dict(), processor.feature_extractor.to_dict()
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    description = {
        "format": FORMAT,
        "num_frames": processor.num_frames,
        "max_audio_seconds": processor.max_audio_seconds,
        "sizes": {"video": [patches, vision.hidden_size], "audio": [audio.d_model]},
        "vision": {name: getattr(vision, name) for name in VISION_SETTINGS}
        | {"dtype": str(vision_tower.dtype), "weights": _weights(vision_tower)},
        "audio": {name: getattr(audio, name) for name in AUDIO_SETTINGS}
        | {"dtype": str(audio_tower.dtype), "weights": _weights(audio_tower)},
        "image_processor": {k: v for k, v in image_processor.items() if k not in NO_SETTING and k[0] != "_"},
        "feature_extractor": {k: v for k, v in extractor.items() if k not in NO_SETTING and k[0] != "_"},
    }
    return json.loads(json.dumps(description))


def differences(stored: dict, wanted: dict, prefix: str = "") -> list[str]:
    """What of `wanted` is different in `stored`, each as `name: stored value, wanted value`."""
    found = []
    for name in sorted({*stored, *wanted}):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: the cache has {old!r}, the model {new!r}")
    return found


# Writing -------------------------------------------------------------------------------------------------------------


def write_json(path: Path, content) -> None:
    """Writes a JSON file that is whole or not there."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path, default):
    """A JSON file's content; `default` where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


class ShardWriter:
    """
    Writes features in shards of bounded size; a shard is whole or not there, so that a run that was killed goes on.

    Args:
        folder: the cache.
        rank: of this process; the shards of each have their own names.
        dtype: what the features are stored in.
        shard_bytes: a shard is closed when its tensors reach this.
    """

    def __init__(self, folder: Path, rank: int, dtype: torch.dtype, shard_bytes: int):
        self.folder, self.rank, self.dtype, self.shard_bytes = folder, rank, dtype, shard_bytes
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._tensors, self._draws, self._size = {}, {}, 0

    def add(self, name: str, features: torch.Tensor, draws: list[list[int]] | None = None) -> None:
        """
        Takes one clip's features; `draws` names the frames of each draw of a video.

        Raises:
            FeatureCacheError: if the storage precision cannot hold them.
        """
        stored = features.to(device="cpu", dtype=self.dtype).contiguous()
        if not torch.isfinite(stored).all() and torch.isfinite(features).all():
            raise FeatureCacheError(f"{name}: {self.dtype} cannot hold its features; use --feature_dtype bfloat16.")
        self._tensors[name] = stored
        self._size += stored.nbytes
        if draws is not None:
            self._draws[name] = draws
        if self._size >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is held."""
        if not self._tensors:
            return
        while (path := self.folder / f"features-{self.rank:04d}-{self._number:05d}.safetensors").exists():
            self._number += 1
        partial = path.with_suffix(".part")
        save_file(self._tensors, partial, metadata={"draws": json.dumps(self._draws)})
        os.replace(partial, path)
        self._clear()


# Reading -------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Where a clip's features are: the shard, and for a video the frames of each draw."""

    shard: str
    draws: list[list[int]] | None


def read_entries(folder: Path) -> dict[str, Entry]:
    """
    The entries of all shards by name.

    Raises:
        FeatureCacheError: for a damaged shard.
    """
    entries = {}
    for path in sorted(folder.glob(SHARDS)):
        try:
            with safe_open(path, "pt") as shard:
                draws = json.loads(shard.metadata()["draws"])
                entries |= {name: Entry(path.name, draws.get(name)) for name in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise FeatureCacheError(f"{path}: the shard is damaged ({error}). Delete it. {MEND}.") from None
    return entries


class FeatureCache:
    """
    A cache that fits the model: a clip -> what its towers make of it. Shards are memory-mapped.

    Args:
        folder: what `empathic prepare-features` wrote.
        wanted: what the model's features depend on, see `describe`.
        draws: random frame draws to choose from; None for as many as the cache has.

    Raises:
        FeatureCacheError: if there is no cache, it is stale (what differs is named), damaged, or has fewer draws.
    """

    def __init__(self, folder: str | os.PathLike, wanted: dict, draws: int | None = None):
        self.folder = Path(folder)
        manifest = read_json(self.folder / MANIFEST, None)
        if manifest is None:
            raise FeatureCacheError(f"{folder}: holds no feature cache (no {MANIFEST}). {MEND}.")
        stale = differences(manifest["features"], wanted)
        if stale:
            raise FeatureCacheError(f"{folder}: the feature cache does not fit the model. {'; '.join(stale)}. {MEND}.")
        self.draws = manifest["draws"] if draws is None else draws
        if self.draws > manifest["draws"]:
            raise FeatureCacheError(
                f"{folder}: has {manifest['draws']} random frame draws a clip, frame_draws asks for {draws}. {MEND}."
            )
        self.sizes = {kind: tuple(size) for kind, size in wanted["sizes"].items()}
        self._digests = Digests(read_json(self.folder / FILES, {}))
        self._entries = read_entries(self.folder)
        unreadable = read_json(self.folder / REPORT, {"unreadable": []})["unreadable"]
        self._unreadable = {f"{found['kind']}.{found['digest']}": found["reason"] for found in unreadable}
        self._open: dict = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # a data loader's worker opens its own

    def features(self, kind: str, item: dict, draw: int | None = None) -> torch.Tensor:
        """
        Features (positions, width) of an audio, (frames, patches, width) of a video.

        Args:
            kind: "audio" or "video".
            item: the clip, with `path` or `bytes`.
            draw: which of a video's random draws; None for the evenly spaced frames.

        Raises:
            MediaError: for a clip that could not be read when the cache was made, or cannot be found now.
            FeatureCacheError: for a clip that the cache does not have, or that changed since.
        """
        name = f"{kind}.{self._digests.of(item)}"
        entry = self._entries.get(name)
        if entry is None:
            if name in self._unreadable:
                raise MediaError(self._unreadable[name])
            where = f"<{len(item['bytes'])} bytes>" if item.get("path") is None else item["path"]
            raise FeatureCacheError(
                f"{self.folder}: the {kind} of {where} is not in the feature cache: it is new or was changed. {MEND}."
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
        Messages whose last one has features in place of its clips, as `EmpathicProcessor.prepare` takes them.

        Args:
            messages: a conversation.
            seed: the sample's seed, which chooses the draw; None for evenly spaced frames.
        """
        *earlier, last = messages
        if not clips_of(last):
            return messages
        draw = choose_draw(seed, self.draws)
        content = [
            {"type": kind, "features": self.features(kind, item, draw)} if (kind := item["type"]) in KINDS else item
            for item in last["content"]
        ]
        return [*earlier, {**last, "content": content}]


class MediaDraws:
    """
    The random generator of each sample's frames, decoded from media, in one of a few fixed draws a clip: those that a
    cache of as many draws holds.

    Args:
        draws: random draws of each clip; 0 gives evenly spaced frames; None new frames each time.
    """

    def __init__(self, draws: int | None):
        self.draws = draws
        self._digests = Digests()

    def generator(self, messages: Iterable[dict], seed) -> np.random.Generator | None:
        """
        What `EmpathicProcessor.prepare` takes frames with: None for evenly spaced ones.

        Args:
            messages: a conversation; the video of the last message counts.
            seed: the sample's seed; None in evaluation.
        """
        if seed is None or self.draws is None:
            return None if seed is None else np.random.default_rng(seed)
        draw = choose_draw(seed, self.draws)
        videos = [item for item in clips_of(messages[-1]) if item["type"] == "video"]
        return draw_generator(self._digests.of(videos[0]), draw) if videos and draw is not None else None
