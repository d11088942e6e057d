"""Your own recordings: a folder with media files and a `metadata.jsonl`, one JSON object a line, one line a turn.

    {"dialogue_id": "visit", "turn": 0, "speaker": "Ann", "text": "I passed!", "emotion": "happy", "file_name": "0.mp4"}
    {"dialogue_id": "visit", "turn": 1, "speaker": "Ben", "text": "I knew you would."}

Required: `dialogue_id`, `turn` (0, 1, 2 ...), `speaker`, `text`. Optional: `emotion` (one of the seven), `split`,
`utterance_id`, `start`, `end`, and the clip of the turn, relative to the folder:

- `file_name`: one file for both: its picture is the video, its sound the audio, whichever of the two it has;
- `video`: the picture; if the file also has a sound track and there is no `audio`, it is the audio as well;
- `audio`: the sound, of an audio file or the sound track of a video. It takes the place of that of the other two.

Without `split` a dialogue goes by the hash of its name: 80 % train, 10 % validation, 10 % test.

A line that is no turn is left out. A clip that cannot be read, an emotion outside the seven and times that are none are
left out of their turn, which stays for the sake of its dialogue. All of it is named in the report, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from empathic.data_prep.schema import (
    SchemaError,
    parse_emotion,
    parse_id,
    parse_seconds,
    parse_split,
    parse_text,
    parse_turn,
)
from empathic.data_prep.writer import Report, hash_split, media_struct, write_corpus
from empathic.media_empathic import MediaError, probe, read_audio, read_video

METADATA = "metadata.jsonl"
CLIP_KEYS = ("file_name", "video", "audio")
KEYS = ("dialogue_id", "turn", "speaker", "text", "emotion", "split", "utterance_id", "start", "end", *CLIP_KEYS)


@dataclass
class _Media:
    """What a file can serve as, and what is wrong with it."""

    has_audio: bool
    has_video: bool
    error: str | None = None


def _inspect(path: Path) -> _Media:
    """Opens a clip and decodes the first frames of it. A bad file is described, not raised."""
    try:
        info = probe(path, decode=True)
        return _Media(info.has_audio, info.has_video)
    except MediaError as error:
        message = str(error)
    usable = []
    for read in (read_audio, read_video):  # one of the two streams may be whole
        try:
            read(path)
            usable.append(True)
        except MediaError:
            usable.append(False)
    return _Media(*usable, message)


def _lines(path: Path, report: Report) -> Iterator[tuple[str, dict]]:
    """(where, object) of each line that holds a JSON object."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{METADATA}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                reason = f"the line is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
                report.leave_out(where, reason)
                continue
            except json.JSONDecodeError as error:
                reason = f"the line is not JSON ({error.msg} at column {error.colno}). Write one object a line."
                report.leave_out(where, reason)
                continue
            if not isinstance(row, dict):
                report.leave_out(where, f"the line is a {type(row).__name__}, not an object with the keys of a turn.")
                continue
            yield where, row


def _optional(report: Report, where: str, parse: Callable, *args):
    """The value of an optional key; None, and a line in the report, where it cannot be used."""
    try:
        return parse(*args)
    except SchemaError as error:
        report.repair(where, f"{error} The turn is kept without it.")
        return None


def _clip_name(line: dict, key: str) -> str | None:
    value = line.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise SchemaError(f'"{key}" is {value!r}. Give the path of a file, relative to the folder of {METADATA}.')
    return value


def _read_turns(raw: Path, report: Report, emotion_map: dict | None, progress: bool) -> list[dict]:
    """The valid lines: the values of a row, with the names of the clips in place of audio and video, and `where`."""
    turns, unknown, seen = [], {}, {}
    for where, line in tqdm(_lines(raw / METADATA, report), desc=f"Reading {METADATA}", disable=not progress):
        for key in line.keys() - KEYS:
            unknown.setdefault(key, where)
        try:
            dialogue_id, number = parse_id(line, "dialogue_id"), parse_turn(line.get("turn"))
            speaker, text = parse_id(line, "speaker"), parse_text(line.get("text"))
        except SchemaError as error:
            report.leave_out(where, str(error))
            continue
        first = seen.setdefault((dialogue_id, number), where)
        if first != where:
            reason = f'turn {number} of dialogue "{dialogue_id}" is in {first} already. Give each turn its own number.'
            report.leave_out(where, reason)
            continue
        start = _optional(report, where, parse_seconds, line, "start")
        end = _optional(report, where, parse_seconds, line, "end")
        if start is not None and end is not None and end < start:
            report.repair(where, f"it ends at {end} s, before its start at {start} s. The turn is kept without both.")
            start = end = None
        utterance_id = line.get("utterance_id")
        turns.append(
            {
                "where": where,
                "dialogue_id": dialogue_id,
                "turn": number,
                "utterance_id": _optional(report, where, parse_id, line, "utterance_id") if utterance_id else None,
                "speaker": speaker,
                "text": text,
                "emotion": _optional(report, where, parse_emotion, line.get("emotion"), emotion_map),
                "split": _optional(report, where, parse_split, line.get("split")),
                "clips": {key: _optional(report, where, _clip_name, line, key) for key in CLIP_KEYS},
                "start": start,
                "end": end,
            }
        )
    for key, where in sorted(unknown.items()):
        report.repair(where, f'the key "{key}" is ignored, here and in later lines. The known keys: {", ".join(KEYS)}.')
    return turns


def _inspect_all(raw: Path, names: list[str], num_workers: int, progress: bool) -> dict[str, _Media]:
    """Every file that a turn names, opened once."""
    # Threads are enough: FFmpeg works outside of Python's lock.
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        found = pool.map(_inspect, [raw / name for name in names])
        return dict(zip(names, tqdm(found, desc="Checking clips", total=len(names), disable=not progress), strict=True))


def _choose_clips(turn: dict, media: dict[str, _Media], report: Report) -> tuple[str | None, str | None]:
    """The names of the files that are the turn's audio and video, by the rules at the top of this file."""
    file_name, video, audio = (turn["clips"][key] for key in CLIP_KEYS)
    for name in dict.fromkeys(name for name in (file_name, video, audio) if name):
        if media[name].error:
            report.repair(turn["where"], f"{media[name].error} The turn is kept without it.")
    picture, sound = video or file_name, audio or file_name or video
    if picture and not media[picture].has_video:
        if picture == video and not media[picture].error:
            report.repair(
                turn["where"], f'{picture}: "video" names a file without a picture. The turn is kept without it.'
            )
        picture = None
    if sound and not media[sound].has_audio:
        if sound == audio and not media[sound].error:
            report.repair(turn["where"], f'{sound}: "audio" names a file without sound. The turn is kept without it.')
        sound = None
    return sound, picture


def _dialogue_rows(dialogue_id: str, turns: list[dict], split_seed: int, report: Report) -> Iterator[dict]:
    """The turns of one dialogue in order, numbered without gaps, all in one split."""
    turns = sorted(turns, key=lambda turn: turn["turn"])
    numbers = [turn["turn"] for turn in turns]
    if numbers != list(range(len(turns))):
        missing = sorted(set(range(numbers[-1])) - set(numbers))
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        report.repair(f'dialogue "{dialogue_id}"', f"turn {shown} is missing. The turns were numbered again from 0.")
    named = [(turn["split"], turn["where"]) for turn in turns if turn["split"]]
    split = named[0][0] if named else hash_split(dialogue_id, split_seed)
    other = next(((name, where) for name, where in named if name != split), None)
    if other:
        reason = f"{named[0][1]} puts it into {split}, {other[1]} into {other[0]}. All of it went into {split}."
        report.repair(f'dialogue "{dialogue_id}"', reason)
    for number, turn in enumerate(turns):
        utterance_id = turn["utterance_id"] or f"{dialogue_id}_{turn['turn']}"
        yield {**turn, "corpus": report.corpus, "split": split, "turn": number, "utterance_id": utterance_id}


def prepare_folder(
    raw: str | os.PathLike,
    out: str | os.PathLike,
    *,
    embed: bool = False,
    num_workers: int = 1,
    split_seed: int = 0,
    progress: bool = True,
    emotion_map: dict[str, str | None] | None = None,
) -> dict:
    """Brings a folder of your own recordings to the project's schema, in OUT, which `datasets.load_dataset` reads.

    Args:
        raw: the folder that holds metadata.jsonl.
        out: the folder to write to.
        embed: True copies the media into the parquet files; else they hold absolute paths and need the files in place.
        num_workers: threads that open the clips.
        split_seed: of the hash that splits the dialogues that name no split.
        progress: whether to show progress bars.
        emotion_map: what labels outside the seven mean, for example {"joy": "happy", "calm": None}.

    Returns:
        The content of OUT/report.json: `rows`, `splits`, `left_out`, `repaired`.

    Raises:
        FileNotFoundError: if there is no metadata.jsonl.
        ValueError: if `out` is `raw`, or `emotion_map` leads outside of the seven.
    """
    raw, out = Path(raw), Path(out)
    if not (raw / METADATA).is_file():
        raise FileNotFoundError(f"{raw / METADATA}: there is no such file. Write one JSON object a turn into it.")
    if raw.resolve() == out.resolve():
        raise ValueError(f"{out}: is the folder of the recordings. Choose another folder for the output.")
    emotion_map = {label.strip().lower(): parse_emotion(name) for label, name in (emotion_map or {}).items()}

    report = Report("folder")
    turns = _read_turns(raw, report, emotion_map, progress)
    names = list(dict.fromkeys(name for turn in turns for name in turn["clips"].values() if name))
    media = _inspect_all(raw, names, num_workers, progress)
    dialogues: dict[str, list[dict]] = {}
    for turn in turns:
        dialogues.setdefault(turn["dialogue_id"], []).append(turn)

    def rows() -> Iterator[dict]:
        for dialogue_id, members in tqdm(dialogues.items(), desc="Writing dialogues", disable=not progress):
            for turn in _dialogue_rows(dialogue_id, members, split_seed, report):
                audio, video = _choose_clips(turn, media, report)
                yield {
                    **{key: value for key, value in turn.items() if key not in ("where", "clips")},
                    "audio": media_struct(raw / audio, audio, embed) if audio else None,
                    "video": media_struct(raw / video, video, embed) if video else None,
                }

    return write_corpus(rows(), out, report, f"Recordings prepared from a folder with `{METADATA}`.")
