"""
Computes once what the frozen encoders make of each clip of a stage's data sets, for training without them:

    accelerate launch -m empathic.trainers.prepare_features --config recipes/tiny/emotion.yaml --feature_cache FOLDER

`empathic prepare-features --config ...` is the same. The configuration is that of the training, so that both mean the
same clips, encoders and options. A run that was stopped goes on; clips that are there are not encoded again. Identical
clips are encoded once.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

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

from empathic.composition_empathic import find_file, read_stage, resolve_base
from empathic.configuration_empathic import EmpathicConfig
from empathic.data_prep.views import EmotionClips
from empathic.media_empathic import MediaError, load_video
from empathic.modeling_empathic import audio_position_mask, encode_frames, encode_sound
from empathic.trainers.feature_cache import (
    FILES,
    KINDS,
    MANIFEST,
    REPORT,
    SHARDS,
    Digests,
    ShardWriter,
    clips_of,
    describe,
    differences,
    draw_generator,
    read_entries,
    read_json,
    write_json,
)
from empathic.trainers.stages import check_choice
from empathic.trainers.train import ScriptArguments, build_processor, load_splits, parse, part_names

logger = logging.get_logger(__name__)

DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_DRAWS = 1


@dataclass
class FeatureArguments:
    """How features are stored. ValueError for a value outside its choices or range."""

    feature_dtype: str = field(default="float16", metadata={"help": f"Stored precision: {', '.join(DTYPES)}."})
    shard_megabytes: float = field(default=256, metadata={"help": "Size of a shard, held by each process at most."})

    def __post_init__(self):
        check_choice("feature_dtype", self.feature_dtype, DTYPES)
        if not self.shard_megabytes > 0:
            raise ValueError(f"shard_megabytes must be above 0, got {self.shard_megabytes!r}.")


# The encoders --------------------------------------------------------------------------------------------------------


def _checkpoint_tensors(path: str, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a whole checkpoint, a folder or a Hub repository, whose names start with a prefix, cut off."""
    index = find_file(path, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if index is not None:
        weight_map = read_json(Path(index), {})["weight_map"]
        names = sorted({file for name, file in weight_map.items() if name.startswith(prefix)})
    tensors = {}
    for name in names:
        file = find_file(path, name)
        if file is None:
            raise ValueError(f"{path} holds no {name}: it is no checkpoint of this model.")
        with safe_open(file, "pt") as shard:
            tensors |= {
                key.removeprefix(prefix): shard.get_tensor(key)
                for key in shard.keys()  # noqa: SIM118
                if key.startswith(prefix)
            }
    return tensors


def load_towers(script: ScriptArguments, model_args: ModelConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """CLIP's vision tower and Whisper's encoder of the model that training would build; nothing else is loaded."""
    path, dtype = model_args.model_name_or_path, model_args.dtype or "float32"
    parts = part_names(script) if path is None else None
    while parts is None and (stage := read_stage(path)) is not None:
        base = stage["base"]
        if isinstance(base, dict):
            parts = {name: resolve_base(path, base[name]) for name in ("text", "vision", "audio")}
        else:
            path = resolve_base(path, base)
    if parts is not None:
        if dtype == "auto":  # the language model's, see `from_parts_pretrained`
            dtype = AutoConfig.from_pretrained(parts["text"]).dtype or torch.float32
        vision = parts["vision"]
        if AutoConfig.from_pretrained(vision).model_type == "clip":
            vision_tower = CLIPModel.from_pretrained(vision, dtype=dtype).vision_model
        else:
            vision_tower = CLIPVisionModel.from_pretrained(vision, dtype=dtype)
        return vision_tower.eval(), AutoModel.from_pretrained(parts["audio"], dtype=dtype).get_encoder().eval()
    config = EmpathicConfig.from_pretrained(path)
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    towers = []
    for kind, sub_config, name in (
        (CLIPVisionModel, config.vision_config, "vision_tower"),
        (WhisperEncoder, config.audio_config, "audio_tower"),
    ):
        tower = kind._from_config(sub_config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        tower.load_state_dict(_checkpoint_tensors(path, f"model.{name}."))
        towers.append(tower.eval())
    return towers[0], towers[1]


# The clips -----------------------------------------------------------------------------------------------------------


class Clips:
    """
    The clips that a stage sees of a data set, each as `(kind, row)`: `len`, `clips[i]` gives (kind, item).

    Args:
        rows: turn rows, or preference rows for stage epo.
        stage: stage emotion sees labelled turns only.
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
        for kind in KINDS:
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
        """How messages call a clip."""
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
    Clips as the encoders' inputs: `(name, kind, (values, mask or draws) or None, error or None)`.

    Args:
        work: (name, digest, kind, clips, index) of each clip.
        processor: an `EmpathicProcessor`.
        draws: random frame draws of a video beside the evenly spaced one.
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
        """Each frame of any draw once (frames, 3, height, width), and the frames of each draw."""
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
    """This process's part."""
    return items[state.process_index :: state.num_processes]


def _progress(items: Iterable, state: PartialState, name: str, total: int, hidden: bool) -> Iterator:
    """A bar of the main process's share."""
    return tqdm(items, name, total=total, unit="clip", disable=hidden or not state.is_main_process)


def open_folder(folder: Path, wanted: dict, draws: int) -> None:
    """Makes the folder ready: a cache that fits is kept, a stale one is deleted and begun again."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_json(folder / MANIFEST, None)
    if manifest is not None:
        stale = differences(manifest["features"], wanted)
        if manifest["draws"] < draws:
            stale.append(f"draws: the cache has {manifest['draws']!r}, {draws!r} are asked for")
        if stale:
            logger.warning("%s: the feature cache is stale and made anew. %s", folder, "; ".join(stale))
            manifest = None
    if manifest is None:
        for name in (MANIFEST, REPORT):
            (folder / name).unlink(missing_ok=True)
        for shard in folder.glob(SHARDS):
            shard.unlink()
        write_json(folder / MANIFEST, {"features": wanted, "draws": draws})
    for partial in folder.glob("features-*.part"):  # of a run that was killed
        partial.unlink()


def _hash_clips(sets: list[Clips], folder: Path, state: PartialState, hidden: bool) -> dict[tuple, str | MediaError]:
    """The content hash of each clip (set, index), or what is wrong with it; the work is shared."""
    digests = Digests(read_json(folder / FILES, {}))
    state.wait_for_everyone()
    places = [(number, index) for number, clips in enumerate(sets) for index in range(len(clips))]
    found = []
    share = _share(places, state)
    for number, index in _progress(share, state, "reading", len(share), hidden):
        try:
            found.append(((number, index), digests.of(sets[number][index][1]), None))
        except MediaError as error:
            found.append(((number, index), None, str(error)))
    files = {name: value for part in gather_object([digests.files]) for name, value in part.items()}
    if state.is_main_process:
        write_json(folder / FILES, files)
    return {place: (digest, error) for place, digest, error in gather_object(found)}


def prepare(script, args, model_args, options: FeatureArguments) -> dict:
    """Fills the cache; returns report.json's content. All processes take part."""
    state = PartialState()
    folder = Path(script.feature_cache)
    processor = build_processor(script, model_args)
    vision_tower, audio_tower = load_towers(script, model_args)
    draws = DEFAULT_DRAWS if script.frame_draws is None else script.frame_draws
    if state.is_main_process:
        open_folder(folder, describe(vision_tower, audio_tower, processor), draws)
    state.wait_for_everyone()
    draws = read_json(folder / MANIFEST, {})["draws"]

    with state.main_process_first():
        data = load_splits(script.dataset_name, [script.train_split])
        if script.eval_split:
            data += load_splits(script.dataset_name, script.eval_split, optional=True)
    sets = [Clips(rows, script.stage) for rows in data if rows is not None]
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
    state.wait_for_everyone()  # nobody adds a shard before all have seen what there is

    share = _share(work, state)
    writer = ShardWriter(
        folder, state.process_index, getattr(torch, options.feature_dtype), int(options.shard_megabytes * 2**20)
    )
    vision_tower.to(state.device), audio_tower.to(state.device)
    loader = DataLoader(
        Decoded(share, processor, draws), batch_size=None, num_workers=args.dataloader_num_workers, pin_memory=False
    )
    broken = []
    for name, kind, decoded, error in _progress(loader, state, "encoding", len(share), args.disable_tqdm):
        if error is not None:
            broken.append((name, error))
            continue
        values, extra = decoded
        with torch.no_grad():
            # Clip by clip: however the clips are divided, the same numbers come out.
            if kind == "video":
                writer.add(name, encode_frames(vision_tower, values.to(state.device)), extra)
            else:
                hidden = encode_sound(audio_tower, values[None].to(state.device))[0]
                writer.add(name, hidden[audio_position_mask(extra).to(state.device)])
    writer.flush()

    for name, error in gather_object(broken):
        digest, kind, clips, index = wanted[name]
        unreadable.append({"kind": kind, "item": clips.name(index), "digest": digest, "reason": error})
    state.wait_for_everyone()
    entries = read_entries(folder)
    # What other data sets of this cache had; what this one had was tried again.
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
    """Fills the feature cache of a stage; returns report.json's content."""
    argv = sys.argv[1:] if argv is None else argv
    # One process may have much more to do at the end of its share than another.
    script, args, model_args, options = parse(["--ddp_timeout", "86400", *argv], FeatureArguments)
    if script.feature_cache is None:
        raise ValueError("Name the folder to write with --feature_cache.")
    if script.stage not in ("emotion", "dialogue", "epo"):
        raise ValueError(f"Stage {script.stage} sees no clip: there is nothing to cache.")
    report = prepare(script, args, model_args, options)
    if PartialState().is_main_process:
        print(
            f"{report['encoded']} clips were encoded and {report['found']} were there: {report['cached']} are in "
            f"{script.feature_cache}."
        )
        for found in report["unreadable"][:10]:
            print(f"cannot be read: {found['kind']}: {found['reason']}")
        if len(report["unreadable"]) > 10:
            print(f"... {len(report['unreadable']) - 10} more; all are in {REPORT}.")
    return report


if __name__ == "__main__":
    sys.exit(0 if main()["cached"] else 1)
