"""
Compute the outputs of the frozen encoders for each clip of a stage's data sets, so that training needs no encoder:

    accelerate launch -m empathic.trainers.prepare_features --config recipes/tiny/emotion.yaml --feature_cache FOLDER

`empathic prepare-features --config ...` is the same. Use the configuration of the training, so that clips, encoders and
options agree. What was encoded is written about once a minute, and a run that was interrupted continues. Cached clips
are not encoded again, and identical clips are encoded once.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import safe_open
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPVisionModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging
from trl import ModelConfig

from ..composition_empathic import find_file, read_stage, resolve_base
from ..configuration_empathic import SOUND_OPTIONS, EmpathicConfig, check_layers
from ..data_prep.clip_digests import MEDIA_KINDS, Digests
from ..data_prep.views import EmotionClips
from ..errors import run_program
from ..files import held_folder, write_json
from ..media_empathic import MediaError, load_video
from ..modeling_empathic import audio_position_mask, encode_frames, encode_sound
from ..processes import leave
from .frozen.feature_cache import (
    FILES,
    MANIFEST,
    REPORT,
    SECONDS_BETWEEN_SAVES,
    SHARDS,
    UNFINISHED_FILES,
    ShardWriter,
    clips_of,
    describe,
    differences,
    draw_generator,
    read_entries,
    read_json,
)
from .options import revision_of
from .stages import check_choice
from .train import ScriptArguments, build_processor, load_splits, parse, part_names

logger = logging.get_logger(__name__)

DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_DRAWS = 1


@dataclass
class FeatureArguments:
    """How features are stored. Raises a ValueError if a value is not among its choices or is out of range."""

    feature_dtype: str = field(default="float16", metadata={"help": f"Stored precision: {', '.join(DTYPES)}."})
    shard_megabytes: float = field(
        default=256, metadata={"help": "Maximum size of a shard, which each process keeps in memory."}
    )

    def __post_init__(self):
        check_choice("feature_dtype", self.feature_dtype, DTYPES)
        if not self.shard_megabytes > 0:
            raise ValueError(f"shard_megabytes must be above 0, got {self.shard_megabytes!r}.")


# The encoders --------------------------------------------------------------------------------------------------------


def _checkpoint_tensors(path: str, prefix: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """Load the tensors of a whole checkpoint (folder or Hub id) whose names start with a prefix; strip the prefix."""
    index = find_file(path, "model.safetensors.index.json", revision=revision)
    names = ["model.safetensors"]
    if index is not None:
        weight_map = read_json(Path(index), {})["weight_map"]
        names = sorted({file for name, file in weight_map.items() if name.startswith(prefix)})
    tensors = {}
    for name in names:
        file = find_file(path, name, revision=revision)
        if file is None:
            raise ValueError(f"{path} has no {name}: it is not a checkpoint of this model.")
        with safe_open(file, "pt") as shard:
            tensors |= {
                key.removeprefix(prefix): shard.get_tensor(key)
                for key in shard.keys()  # noqa: SIM118
                if key.startswith(prefix)
            }
    return tensors


def load_towers(script: ScriptArguments, model_args: ModelConfig) -> tuple[Any, Any, dict[str, Any]]:
    """
    Load only CLIP's vision tower, Whisper's encoder and its options (`SOUND_OPTIONS`) of the model that training would
    build.
    """
    path, dtype = model_args.model_name_or_path, model_args.dtype or "float32"
    revision = revision_of(model_args)
    parts = part_names(script) if path is None else None
    sound = {name: getattr(script, name) for name in SOUND_OPTIONS}
    while parts is None and (stage := read_stage(path, revision=revision)) is not None:
        base = stage["base"]
        if isinstance(base, dict):
            parts = {name: resolve_base(path, base[name]) for name in ("text", "vision", "audio")}
            sound = {name: base[name] for name in SOUND_OPTIONS if name in base}
        else:
            path, revision = resolve_base(path, base), stage.get("base_revision")
    if parts is not None:
        if dtype == "auto":  # the dtype of the language model, see `from_parts_pretrained`
            dtype = AutoConfig.from_pretrained(parts["text"]).dtype or torch.float32
        vision = parts["vision"]
        if AutoConfig.from_pretrained(vision).model_type == "clip":
            vision_tower = CLIPModel.from_pretrained(vision, dtype=dtype).vision_model
        else:
            vision_tower = CLIPVisionModel.from_pretrained(vision, dtype=dtype)
        audio_tower = AutoModel.from_pretrained(parts["audio"], dtype=dtype).get_encoder()
        check_layers(sound.get("audio_feature_layers"), audio_tower.config.encoder_layers)
        return vision_tower.eval(), audio_tower.eval(), sound
    config = EmpathicConfig.from_pretrained(path, revision=revision)
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    towers = []
    for kind, sub_config, name in (
        (CLIPVisionModel, config.vision_config, "vision_tower"),
        (WhisperEncoder, config.audio_config, "audio_tower"),
    ):
        tower = kind._from_config(sub_config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        tower.load_state_dict(_checkpoint_tensors(path, f"model.{name}.", revision))
        towers.append(tower.eval())
    return towers[0], towers[1], config.sound_options


# The clips -----------------------------------------------------------------------------------------------------------


class StageClips:
    """
    The clips that a stage uses of a data set; `clips[i]` gives (kind, item), and `places[i]` is its (kind, row number).

    Args:
        rows: turn rows, or preference rows for stage epo.
        stage: the stage; `emotion` uses labeled turns only.
    """

    def __init__(self, rows: Dataset, stage: str):
        self.rows, self.places = rows, []
        self.paths: list[str | None] = []  # None: the bytes are in the data set
        if stage == "epo":
            for number, row in enumerate(rows.select_columns(["prompt"])):
                if isinstance(row["prompt"], list):
                    for item in clips_of(row["prompt"][-1]):
                        self._add(item["type"], number, item.get("path"), item.get("bytes") is not None)
            return
        wanted = set(EmotionClips(rows).places) if stage == "emotion" else range(len(rows))
        for kind in MEDIA_KINDS:
            column = rows.with_format("arrow")[kind]  # no media is read
            there = column.is_valid().to_pylist()
            paths = pc.struct_field(column, "path").to_pylist()
            embedded = pc.struct_field(column, "bytes").is_valid().to_pylist()
            for number, path in enumerate(paths):
                if there[number] and number in wanted:
                    self._add(kind, number, path, embedded[number])

    def _add(self, kind: str, number: int, path: str | None, embedded: bool) -> None:
        self.places.append((kind, number))
        self.paths.append(None if embedded else path)

    def name(self, index: int) -> str:
        """The name of a clip in messages."""
        return self.paths[index] or f"{self.rows.info.dataset_name}, {self.rows.split}, row {self.places[index][1]}"

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, dict]:
        kind, number = self.places[index]
        if self.paths[index] is not None:
            return kind, {"path": self.paths[index]}
        if "prompt" in self.rows.column_names:
            items = clips_of(self.rows[number]["prompt"][-1])
            return kind, next(item for item in items if item["type"] == kind)
        return kind, self.rows.select_columns([kind])[number][kind]


class Decoded(TorchDataset):
    """
    Clips decoded to encoder inputs: `(name, kind, (values, mask or draws) or None, error or None)`.

    Args:
        work: (name, digest, kind, clips, index) of each clip.
        processor: an `EmpathicProcessor`.
        draws: number of random frame draws of a video, besides the evenly spaced draw.
    """

    def __init__(self, work: list[tuple], processor, draws: int):
        self.work, self.processor, self.draws = work, processor, draws

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, number: int) -> tuple:
        name, digest, kind, clips, index = self.work[number]
        try:
            _, item = clips[index]
            return name, kind, self.processor.sound(item) if kind == "audio" else self._video(item, digest), None
        except MediaError as error:
            return name, kind, None, str(error)

    def _video(self, item: dict, digest: str) -> tuple[torch.Tensor, list[list[int]]]:
        """Return the distinct frames of all draws (frames, 3, height, width), and the frame indices of each draw."""
        generators = [None, *(draw_generator(digest, draw) for draw in range(self.draws))]
        places, frames, draws = {}, [], []
        for generator in generators:
            rows = []
            for frame in load_video(item, self.processor.num_frames, generator):
                rows.append(places.setdefault(frame.tobytes(), len(frames)))
                if rows[-1] == len(frames):
                    frames.append(frame)
            draws.append(rows)
        return self.processor.pixels(frames), draws


# The work ------------------------------------------------------------------------------------------------------------


def _share(items: list, state: PartialState) -> list:
    """Return this process's share of the items."""
    return items[state.process_index :: state.num_processes]


def _progress(items: Iterable, state: PartialState, name: str, total: int, hidden: bool) -> Iterator:
    """Show a progress bar of the main process's share."""
    return tqdm(items, name, total=total, unit="clip", disable=hidden or not state.is_main_process)


def open_folder(folder: Path, wanted: dict, draws: int) -> None:
    """Prepare the cache folder: keep a cache that fits the model, delete a stale cache and start a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_json(folder / MANIFEST, None)
    if manifest is not None:
        stale = differences(manifest["features"], wanted)
        if manifest["draws"] < draws:
            stale.append(f"draws: the cache has {manifest['draws']!r}, this run needs {draws!r}")
        if stale:
            logger.warning("%s: the feature cache is stale and will be rebuilt. %s", folder, "; ".join(stale))
            manifest = None
    if manifest is None:
        for name in (MANIFEST, REPORT):
            (folder / name).unlink(missing_ok=True)
        for shard in folder.glob(SHARDS):
            shard.unlink()
        write_json(folder / MANIFEST, {"features": wanted, "draws": draws})
    for partial in folder.glob("features-*.part"):  # left by a killed run
        partial.unlink()


def _hash_clips(
    sets: list[StageClips], folder: Path, state: PartialState, hidden: bool
) -> dict[tuple, str | MediaError]:
    """Compute the content hash of each clip (set, index), or the error that it gave; all processes share the work."""
    files = read_json(folder / FILES, {})
    for unfinished in sorted(folder.glob(UNFINISHED_FILES)):  # of a run that was killed
        files |= read_json(unfinished, {})
    digests, mine = Digests(files), folder / f"files-{state.process_index:04d}.json"
    state.wait_for_everyone()
    places = [(number, index) for number, clips in enumerate(sets) for index in range(len(clips))]
    found = []
    share, saved = _share(places, state), time.monotonic()
    for number, index in _progress(share, state, "reading", len(share), hidden):
        if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
            write_json(mine, digests.files, indent=None)
            saved = time.monotonic()
        try:
            found.append(((number, index), digests.of(sets[number][index][1]), None))
        except MediaError as error:
            found.append(((number, index), None, str(error)))
    files = {name: value for part in gather_object([digests.files]) for name, value in part.items()}
    if state.is_main_process:
        write_json(folder / FILES, files)
        for unfinished in folder.glob(UNFINISHED_FILES):
            unfinished.unlink()
    return {place: (digest, error) for place, digest, error in gather_object(found)}


def prepare(script, args, model_args, options: FeatureArguments) -> dict:
    """Fill the cache and return the content of report.json. Every process must call it."""
    state = PartialState()
    folder = Path(script.feature_cache)
    processor = build_processor(script, model_args)
    vision_tower, audio_tower, sound = load_towers(script, model_args)
    draws = DEFAULT_DRAWS if script.frame_draws is None else script.frame_draws
    if state.is_main_process:
        open_folder(folder, describe(vision_tower, audio_tower, processor, **sound), draws)
    state.wait_for_everyone()
    draws = read_json(folder / MANIFEST, {})["draws"]

    with state.main_process_first():
        pairs = script.stage == "epo"
        data = load_splits(script.dataset_name, [script.train_split], pairs=pairs)
        if script.eval_split:
            data += load_splits(script.dataset_name, script.eval_split, optional=True, pairs=pairs)
    sets = [StageClips(rows, script.stage) for rows in data if rows is not None]
    hashed = _hash_clips(sets, folder, state, args.disable_tqdm)

    unreadable, wanted = [], {}
    for number, clips in enumerate(sets):
        for index, (kind, _) in enumerate(clips.places):
            digest, error = hashed[number, index]
            if digest is None:
                unreadable.append({"kind": kind, "item": clips.name(index), "digest": None, "reason": error})
            else:
                wanted.setdefault(f"{kind}.{digest}", (digest, kind, clips, index))
    done = read_entries(folder)
    work = [(name, *wanted[name]) for name in sorted(wanted) if name not in done]
    state.wait_for_everyone()  # no process may add a shard before all have listed the entries

    share = _share(work, state)
    writer = ShardWriter(
        folder, state.process_index, getattr(torch, options.feature_dtype), int(options.shard_megabytes * 2**20)
    )
    vision_tower.to(state.device), audio_tower.to(state.device)
    loader = DataLoader(
        Decoded(share, processor, draws), batch_size=None, num_workers=args.dataloader_num_workers, pin_memory=False
    )
    broken = []
    try:
        for name, kind, decoded, error in _progress(loader, state, "encoding", len(share), args.disable_tqdm):
            if error is not None:
                broken.append((name, error))
                continue
            values, extra = decoded
            with torch.no_grad():
                # Clip by clip, so that the features do not depend on how the clips are divided.
                if kind == "video":
                    writer.add(name, encode_frames(vision_tower, values.to(state.device)), extra)
                else:
                    features, mask = values[None].to(state.device), extra[None].to(state.device)
                    hidden = encode_sound(audio_tower, features, mask, **sound)[0]
                    writer.add(name, hidden[audio_position_mask(extra).to(state.device)])
    finally:  # an error or Ctrl-C must not lose what was encoded
        writer.flush()

    for name, error in gather_object(broken):
        digest, kind, clips, index = wanted[name]
        unreadable.append({"kind": kind, "item": clips.name(index), "digest": digest, "reason": error})
    state.wait_for_everyone()
    entries = read_entries(folder)
    # Keep the report's unreadable clips of other data sets; the clips of these data sets were tried again.
    tried = {(kind, clips.name(index)) for clips in sets for index, (kind, _) in enumerate(clips.places)}
    for found in read_json(folder / REPORT, {"unreadable": []})["unreadable"]:
        name = f"{found['kind']}.{found['digest']}"
        if (found["kind"], found["item"]) not in tried and name not in entries and name not in wanted:
            unreadable.append(found)
    report = {
        "clips": sum(map(len, sets)),
        "distinct": len(wanted),
        "encoded": len(work) - sum(name not in entries for name, *_ in work),
        "found": sum(name in done for name in wanted),
        "cached": len(entries),
        "unreadable": sorted(unreadable, key=lambda found: (found["item"], found["kind"])),
    }
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(folder / REPORT, report)
    return report


def main(argv: list[str] | None = None) -> dict:
    """Fill the feature cache of a stage and return the content of report.json."""
    argv = sys.argv[1:] if argv is None else argv
    # A long timeout, because the last clips of one process may take much longer than those of another.
    script, args, model_args, options = parse(["--ddp_timeout", "86400", *argv], FeatureArguments)
    if script.feature_cache is None:
        raise ValueError("feature_cache is not set: name the folder to write with --feature_cache.")
    if script.stage not in ("emotion", "dialogue", "epo"):
        raise ValueError(f"Stage {script.stage} uses no clips, so there is nothing to cache: train it without a cache.")
    writes = PartialState().is_main_process
    with held_folder(script.feature_cache, "empathic prepare-features") if writes else nullcontext():
        report = prepare(script, args, model_args, options)
    if PartialState().is_main_process:
        print(
            f"{report['encoded']} clips were encoded, {report['found']} were already cached; {script.feature_cache} "
            f"now has {report['cached']} clips."
        )
        for found in report["unreadable"][:10]:
            print(f"cannot be read: {found['kind']}: {found['reason']}")
        if len(report["unreadable"]) > 10:
            print(f"... {len(report['unreadable']) - 10} more; all are in {REPORT}.")
    return report


def program() -> int:
    """Fill the cache in a process of its own; return the exit status."""
    return 0 if main()["cached"] else 1


if __name__ == "__main__":
    leave(run_program("empathic prepare-features", program))
