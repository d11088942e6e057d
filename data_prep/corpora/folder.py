"""Your own recordings: a folder with media files and a `metadata.jsonl` with one JSON object per line and turn.

    {"dialogue_id": "visit", "turn": 0, "speaker": "Ann", "text": "I passed!", "emotion": "happy", "file_name": "0.mp4"}
    {"dialogue_id": "visit", "turn": 1, "speaker": "Ben", "text": "I knew you would."}

Required: `dialogue_id`, `turn` (0, 1, 2 ...), `speaker`, `text`. Optional: `emotion` (one of the seven), `split`,
`utterance_id`, `start`, `end`, and the clip of the turn, relative to the folder:

- `file_name`: a file whose video and audio streams are both used, as far as they exist;
- `video`: a file whose video is used; without `audio`, its audio stream is used as well, if there is one;
- `audio`: an audio file, or a video whose audio stream is used instead of the audio of the other two files.

A dialogue without `split` is assigned by the hash of its name: 80% train, 10% validation, 10% test.

A line that is not a valid turn is left out. A turn whose clip cannot be read, or whose emotion or times are invalid, is
kept without them, to complete its dialogue. The report lists all of these with the reason. The lines of a dialogue may
be anywhere in the file: all texts are in memory at once, but no clips.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ...media_empathic import existing_path
from ..pipeline import OptionalClip
from ..prepare import prepare_corpus
from ..schema import SPLITS, SchemaError, parse_emotion, parse_id, parse_seconds, parse_split, parse_text, parse_turn
from .base import Clip, CorpusInfo, Dialogue, Options, Report, Turn, hash_split

METADATA = "metadata.jsonl"
CLIP_KEYS = ("file_name", "video", "audio")
KEYS = ("dialogue_id", "turn", "speaker", "text", "emotion", "split", "utterance_id", "start", "end", *CLIP_KEYS)

ABOUT = CorpusInfo(
    name="folder",
    title="Recordings",
    description=f"Recordings prepared from a folder with `{METADATA}`.",
    license="other",
    license_note="The license of the recordings applies, which their owner decides.",
    redistributable=True,
    homepage="",
)


def _lines(path: Path, report: Report) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) for each line with a JSON object; other lines are reported."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{METADATA}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                report.find()
                row = json.loads(text)
            except UnicodeDecodeError as error:
                report.find()
                reason = f"the line is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
                report.leave_out(where, reason)
                continue
            except RecursionError:
                report.leave_out(where, "the line is nested too deeply to be a turn.")
                continue
            except json.JSONDecodeError as error:
                reason = f"the line is not JSON ({error.msg} at column {error.colno}). Write one object per line."
                report.leave_out(where, reason)
                continue
            except ValueError:  # the only other error of json: int() limits the number of digits
                report.leave_out(where, "the line contains a number with too many digits.")
                continue
            if not isinstance(row, dict):
                report.leave_out(where, f"the line is a {type(row).__name__}, not an object with the keys of a turn.")
                continue
            yield where, row


def _optional(report: Report, where: str, parse: Callable, *args):
    """Parse an optional value; an invalid value is reported and becomes None."""
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


def _read_lines(raw: Path, report: Report, emotion_map: dict) -> dict[str, list[tuple[int, str | None, Turn]]]:
    """Read the valid lines: dialogue -> (turn number, split or None, turn) of each line."""
    dialogues: dict[str, list[tuple[int, str | None, Turn]]] = {}
    unknown, seen = {}, {}
    for where, line in _lines(raw / METADATA, report):
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
            report.repair(where, f"it ends at {end} s, before its start at {start} s. The turn is kept without times.")
            start = end = None
        utterance_id = _optional(report, where, parse_id, line, "utterance_id") if line.get("utterance_id") else None
        turn = Turn(
            where,
            utterance_id or f"{dialogue_id}_{number}",
            speaker,
            text,
            emotion=_optional(report, where, parse_emotion, line.get("emotion"), emotion_map),
            start=start,
            end=end,
        )
        split = _optional(report, where, parse_split, line.get("split"))
        names = {key: _optional(report, where, _clip_name, line, key) for key in CLIP_KEYS}
        turn.audio, turn.video = _clips(raw, **names)
        dialogues.setdefault(dialogue_id, []).append((number, split, turn))
    for key, where in sorted(unknown.items()):
        report.repair(where, f'the key "{key}" is ignored, here and in later lines. The known keys: {", ".join(KEYS)}.')
    return dialogues


def _clips(
    raw: Path, file_name: str | None, video: str | None, audio: str | None
) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """The candidate audio and video clips of a turn, by the rules in the docstring of this module."""
    sound, picture = audio or file_name or video, video or file_name
    # A missing stream is an error only if the key of the file names this kind of media.
    heard = (Clip if audio else OptionalClip)(Path(existing_path(raw / sound)), sound) if sound else None
    seen = (Clip if video else OptionalClip)(Path(existing_path(raw / picture)), picture) if picture else None
    return (heard,) if heard else (), (seen,) if seen else ()


def _dialogue(dialogue_id: str, lines: list[tuple[int, str | None, Turn]], split_seed: int, report: Report) -> Dialogue:
    """Make a dialogue of its lines: the turns in order, all in one split."""
    lines = sorted(lines, key=lambda line: line[0])
    numbers = [number for number, _, _ in lines]
    if numbers != list(range(len(lines))):
        present, missing = set(numbers), []
        for number in range(numbers[-1]):
            if number not in present:
                missing.append(number)
            if len(missing) > 10:
                break
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        report.repair(f'dialogue "{dialogue_id}"', f"turn {shown} is missing. The turns were renumbered from 0.")
    named = [(split, turn.where) for _, split, turn in lines if split]
    split = named[0][0] if named else hash_split(dialogue_id, split_seed)
    other = next(((name, where) for name, where in named if name != split), None)
    if other:
        reason = f"{named[0][1]} has the split {split}, {other[1]} has {other[0]}. The whole dialogue is in {split}."
        report.repair(f'dialogue "{dialogue_id}"', reason)
    return Dialogue(split, dialogue_id, [turn for _, _, turn in lines])


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the dialogues of a folder, sorted by split and by the order of their first lines.

    Args:
        raw: the folder with metadata.jsonl.
        report: the report.
        options: `split_seed` and `emotion_map` are used.

    Raises:
        FileNotFoundError: if there is no metadata.jsonl.
    """
    if not (raw / METADATA).is_file():
        raise FileNotFoundError(f"{raw / METADATA}: there is no such file. Create it with one JSON object per turn.")
    lines = _read_lines(raw, report, options.emotion_map)
    dialogues = [_dialogue(name, members, options.split_seed, report) for name, members in lines.items()]
    yield from sorted(dialogues, key=lambda dialogue: SPLITS.index(dialogue.split))


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
    """
    Convert a folder of your own recordings to the project's schema; `datasets.load_dataset(out)` reads the result.

    Args:
        raw: the folder with metadata.jsonl.
        emotion_map: maps labels outside the seven to emotions, for example {"joy": "happy", "calm": None}.
        out, embed, num_workers, split_seed, progress: see `prepare_corpus`, also for the return value and exceptions.
    """
    return prepare_corpus(
        "folder",
        raw,
        out,
        embed=embed,
        num_workers=num_workers,
        split_seed=split_seed,
        progress=progress,
        emotion_map=emotion_map,
    )
