"""MultiDialog, as its Hub copy `IVLLab/MultiDialog` lies on disk after download.

    RAW/metadata/<split>/<split>_metadata_0000.jsonl    one JSON object an utterance
    RAW/data/<split>/<split>_chunks_0000.tar.gz         t_<uuid>/t_<uuid>_<n><actor>.wav, 16 kHz

The splits are train, valid_freq, valid_rare, test_freq and test_rare, and keep their names; some of them are enough.
Any number of files of each kind will do, and so will wavs that are unpacked already, anywhere in the folder.

- A line's sound is the wav of the name in `original_full_path`, `audpath` or `file_name`, whichever is there; else the
  only wav of the utterance's number in the folder of its dialogue.
- `speaker` is the line's `from`: `human`, or `gpt`, whose replies the model is trained to give (`reply_speakers: [gpt]`
  of stage `dialogue`). Utterance 0 may be either's. `utterance_id` is the wav's name, whose last letter is the actor.
- Turns are in the order of `utterance_id`, and numbered again from 0.
- A dialogue that two splits hold stays in the held-out one.
- The pictures are a download of their own: `video_pattern` says where they lie.

The lines are read twice: once for where those of a dialogue are, which may be in several files, then a dialogue at a
time. Held in between are two numbers a line and the last letters of each wav's name: some 20 MB for the whole corpus.
"""

from __future__ import annotations

import json
import os
import re
import string
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from empathic.data_prep import archives
from empathic.data_prep.corpus import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn
from empathic.data_prep.schema import SchemaError, parse_emotion, parse_id, parse_text, parse_turn
from empathic.data_prep.text import clean_text
from empathic.media_empathic import LFS_HEAD

SPLITS = ("train", "valid_freq", "valid_rare", "test_freq", "test_rare")

MAPPING = {
    "neutral": "neutral",
    "happy": "happy",
    "fear": "fearful",
    "angry": "angry",
    "disgusting": "disgust",
    "surprising": "surprise",
    "sad": "sad",
    # Of Topical-Chat, whose texts were recorded.
    "curious to dive deeper": "neutral",
    "disgusted": "disgust",
    "surprised": "surprise",
}

ABOUT = CorpusInfo(
    name="multidialog",
    title="MultiDialog",
    description=(
        "Conversations between two of twelve actors, who speak texts of Topical-Chat with the emotion written for each "
        "utterance. `speaker` is `gpt` for the part that a model is to learn and `human` for the other; the last "
        "letter of `utterance_id` is the actor."
    ),
    license="other",
    license_note=(
        "Its page on the Hub says `cc` and names no licence, so it is not known what may be done with it: use it for "
        "research, ask its authors for anything else, and do not publish copies."
    ),
    redistributable=False,
    homepage="https://huggingface.co/datasets/IVLLab/MultiDialog",
    published={
        "train": {"dialogues": 7011, "rows": 151645},
        "valid_freq": {"dialogues": 448, "rows": 8516},
        "valid_rare": {"dialogues": 443, "rows": 9556},
        "test_freq": {"dialogues": 450, "rows": 9811},
        "test_rare": {"dialogues": 381, "rows": 8331},
    },
)

DOWNLOAD = "hf download IVLLab/MultiDialog --repo-type dataset --local-dir RAW"
FETCH = f"Fetch it with `git lfs pull`, or all with `{DOWNLOAD}`."
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
CLIP_KEYS = ("original_full_path", "audpath", "file_name")
PATTERN_FIELDS = ("split", "conv_id", "n", "actor", "stem")

# t_<uuid>, then _<n><actor>. Wavs of other names are their own group.
_STEM = re.compile(r"(.+?)(_(\d+)([A-Za-z]*))?", re.DOTALL)


def _parts(stem: str) -> tuple[str, int | None, str]:
    """(t_<uuid>, n, actor) of t_<uuid>_<n><actor>."""
    group, _, number, actor = _STEM.fullmatch(stem).groups()
    return group, None if number is None else int(number), actor or ""


class _Wavs:
    """Which wavs there are and which no line has named yet; of each, the end of its name is held."""

    def __init__(self):
        self.folders: list[tuple[str, str]] = []  # the path, and how the report calls it
        self.groups: dict[str, list[tuple[int, str]]] = {}  # t_<uuid> -> (number of the folder, ends of the names)

    def add(self, folder: str, name: str, files: list[str]) -> None:
        """Adds a folder's wavs."""
        ends: dict[str, list[str]] = {}
        for file in files:
            group = _parts(os.path.splitext(file)[0])[0]
            ends.setdefault(group, []).append(file[len(group) :])
        self.folders.append((folder, name))
        for group, members in ends.items():
            self.groups.setdefault(group, []).append((len(self.folders) - 1, "/".join(members)))

    def take(self, stem: str) -> tuple[Clip, ...]:
        """The wavs of that name, in any folder. No later line gets them."""
        group = _parts(stem)[0]
        tail = stem[len(group) :]
        clips, left = [], []
        for number, ends in self.groups.get(group, ()):
            folder, name = self.folders[number]
            others = []
            for end in ends.split("/"):
                if end.rpartition(".")[0] == tail:
                    clips.append(Clip(Path(folder, group + end), f"{name}/{group}{end}"))
                else:
                    others.append(end)
            if others:
                left.append((number, "/".join(others)))
        if clips:
            self.groups[group] = left
        return tuple(clips)

    def numbered(self, group: str, n: int) -> list[str]:
        """The names, without `.wav`, of a dialogue's utterance."""
        members = (end for _, ends in self.groups.get(group, ()) for end in ends.split("/"))
        stems = dict.fromkeys(group + end.rpartition(".")[0] for end in members)
        return [stem for stem in stems if _parts(stem)[1] == n]

    def rest(self) -> Iterator[tuple[str, int]]:
        """(name, how many) of the wavs that no line named, one entry a folder and dialogue: `t_<uuid>{_0a.wav,...}`."""
        for group, places in self.groups.items():
            for number, ends in places:
                yield f"{self.folders[number][1]}/{group}{{{ends.replace('/', ',')}}}", ends.count("/") + 1


@dataclass
class _Files:
    """What a folder holds, by kind."""

    tables: dict[str, list[Path]] = field(default_factory=dict)
    archives: dict[str, list[Path]] = field(default_factory=dict)
    wavs: _Wavs = field(default_factory=_Wavs)
    videos: int = 0


@dataclass
class _Line:
    """A line of the metadata that is a turn, on its way to become one."""

    where: str
    n: int
    stems: list[str]
    speaker: str | None
    text: str
    emotion: str | None
    repairs: list[str]
    name: str = ""
    clips: tuple[Clip, ...] = ()

    @property
    def actor(self) -> str:
        """The letter at the end of the wav's name, if it is known."""
        names = (self.name, *self.stems) if self.name else self.stems
        return next((actor for _, _, actor in map(_parts, names) if actor), "")


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(LFS_HEAD)) == LFS_HEAD


def _walk(root: Path, report: Report) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files), sorted. Names that start with a point are no part of the corpus."""
    apple, seen = 0, set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        apple += sum(name.startswith("._") for name in files)
        yield folder, sorted(name for name in files if name[0] != ".")
    if apple:
        report.ignore("._*", f"{apple} files that macOS left are no part of the corpus.")


def _split_of(path: Path) -> str | None:
    """The split that a file's folder or name says it is of."""
    for name in reversed(path.parts[:-1]):
        if name in SPLITS:
            return name
    return next((name for name in SPLITS if re.match(rf"{name}(_metadata|_chunks|\.)", path.name)), None)


def _add_file(found: dict[str, list[Path]], split: str, raw: Path, path: Path, report: Report) -> None:
    """Adds a table or archive, of which the folder may hold a copy."""
    first = next((other for other in found.get(split, ()) if other.name == path.name), None)
    if first is None:
        found.setdefault(split, []).append(path)
    elif (raw / first).stat().st_size == (raw / path).stat().st_size:
        report.ignore(str(path), f"it is a copy of {first}.")
    else:
        raise LayoutError(
            f"{raw}: holds {first} and {path}, which differ. These look like two snapshots of MultiDialog: "
            "give the folder of one of them."
        )


def _list(raw: Path, report: Report) -> _Files:
    """One pass over the folder."""
    files = _Files()
    for folder, names in _walk(raw, report):
        inside = Path(folder).relative_to(raw)
        wavs = [name for name in names if name.lower().endswith(".wav")]
        if wavs:
            files.wavs.add(folder, inside.as_posix(), wavs)
        for name in names:
            path, kind = inside / name, name.lower()
            files.videos += kind.endswith(VIDEOS)
            found = (
                files.tables if kind.endswith(".jsonl") else files.archives if kind.endswith(archives.ENDINGS) else None
            )
            if found is None:
                continue
            split = _split_of(path)
            if split is None:
                reason = f"neither its folder nor its name says of which split it is: {', '.join(SPLITS)}."
                report.ignore(path.as_posix(), reason)
            elif _is_pointer(raw / path):
                report.ignore(path.as_posix(), f"it is a Git-LFS pointer, not the file itself. {FETCH}")
            else:
                _add_file(found, split, raw, path, report)
    return files


def _check_layout(raw: Path, files: _Files, report: Report) -> None:
    pointers = [entry["item"] for entry in report.ignored if "Git-LFS pointer" in entry["reason"]]
    if not files.tables:
        expected = "metadata/<split>/<split>_metadata_0000.jsonl and data/<split>/<split>_chunks_0000.tar.gz"
        if any(name.endswith(".jsonl") for name in pointers):
            raise LayoutError(f"{raw / pointers[-1]}: is a Git-LFS pointer, not the file itself. {FETCH}")
        if not raw.is_dir():
            raise LayoutError(f"{raw}: there is no such folder. Expected {expected} in it. Get them with `{DOWNLOAD}`.")
        there = ", ".join(sorted(os.listdir(raw))[:10]) or "nothing"
        raise LayoutError(
            f"{raw}: expected {expected}, with the splits {', '.join(SPLITS)}; found no .jsonl of any of these, but "
            f"{there}. Give the folder of a snapshot: `{DOWNLOAD}`."
        )
    if not files.archives and not files.wavs.groups and pointers:
        raise LayoutError(f"{raw / pointers[0]}: is a Git-LFS pointer, and no archive is there itself. {FETCH}")


def _parse_object(line: bytes) -> dict:
    """The object in a line. SchemaError if there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SchemaError(f"the line is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise SchemaError(f"the line is not JSON ({error.msg} at column {error.colno}).") from None
    except RecursionError:
        raise SchemaError("the line is nested too deeply to be an utterance.") from None
    except ValueError:  # json's only other one
        raise SchemaError("the line holds a number of too many digits.") from None
    if not isinstance(row, dict):
        raise SchemaError(f"the line is a {type(row).__name__}, not an object with the keys of an utterance.")
    return row


def _stems(row: dict) -> list[str]:
    """The names of the line's wav, without folder and ending, the best first."""
    names = (row[key] for key in CLIP_KEYS if isinstance(row.get(key), str))
    stems = (os.path.splitext(re.split(r"[/\\]", name.strip())[-1])[0] for name in names)
    return list(dict.fromkeys(filter(None, stems)))


def _conv_id(row: dict) -> str:
    """The dialogue's name, if need be out of the wav's."""
    try:
        return parse_id(row, "conv_id")
    except SchemaError:
        named = [group for group, n, _ in map(_parts, _stems(row)) if n is not None]
        if not named:
            raise
        return named[0]


def _index(raw: Path, tables: list[Path], report: Report) -> dict[str, array]:
    """Where the lines of each dialogue are: file and line (upper and lower 32 bits) and offset, for each line."""
    dialogues: dict[str, array] = {}
    for place, path in enumerate(tables):
        offset = 0
        with open(raw / path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    report.find()
                    try:
                        places = dialogues.setdefault(_conv_id(_parse_object(line)), array("Q"))
                        places.extend((place << 32 | number, offset))
                    except SchemaError as error:
                        report.leave_out(f"{path.as_posix()}:{number}", str(error))
                offset += len(line)
    return dialogues


def _read_line(where: str, row: dict, mapping: dict) -> _Line:
    """The values of a line. SchemaError if it cannot be a turn."""
    stems, value, repairs = _stems(row), row.get("utterance_id"), []
    try:
        n = parse_turn(value)
    except SchemaError:
        found = [number for _, number, _ in map(_parts, stems) if number is not None]
        if not found:
            raise SchemaError(f'"utterance_id" is {value!r}. Give the number of the utterance, from 0.') from None
        n = found[0]
        repairs.append(f'"utterance_id" is {value!r}. The number in the name of its wav was taken: {n}.')
    try:
        text, changes = clean_text(parse_text(row.get("value")))
    except SchemaError as error:
        raise SchemaError(str(error).replace('"text"', '"value"')) from None
    try:
        emotion = parse_emotion(row.get("emotion"), mapping)
    except SchemaError as error:
        changes.append(f"{error} The turn is kept without it.")
        emotion = None
    speaker = row.get("from")
    speaker = speaker.strip().lower() if isinstance(speaker, str) else None
    return _Line(where, n, stems, speaker or None, text, emotion, repairs + changes)


def _name_speakers(lines: list[_Line], report: Report) -> list[_Line]:
    """The lines that have a speaker: one of no `from` is who else the actor is in the dialogue."""
    actors: dict[str, set[str]] = {}
    for line in lines:
        if line.actor and line.speaker:
            actors.setdefault(line.actor, set()).add(line.speaker)
    named = []
    for line in lines:
        if line.speaker is None:
            known = actors.get(line.actor, ())
            if len(known) != 1:
                report.leave_out(line.where, '"from" is missing, and nothing else tells whether it is gpt or human.')
                continue
            (line.speaker,) = known
            line.repairs.append(f'"from" is missing. Actor {line.actor} is {line.speaker} elsewhere in the dialogue.')
        named.append(line)
    return named


def _lack(lines: list[tuple[str, int, str]], all_of: int, conv_id: str, kind: str, report: Report) -> None:
    """Reports the (where, n, reason) of turns without a clip; in one entry if none of a dialogue's `all_of` has one,
    since whole archives may be absent."""
    if lines and len(lines) == all_of:
        numbers = ", ".join(str(n) for _, n, _ in lines)
        lines = [(f"{lines[0][0]}, dialogue {conv_id}", 0, f"no {kind} of it is there, for utterances {numbers}.")]
    for where, _, reason in lines:
        report.lack_media(where, reason)


def _find_wavs(conv_id: str, lines: list[_Line], wavs: _Wavs, report: Report) -> None:
    """Gives the lines their clips and names: by name first, so that no other line takes them by number."""
    for line in lines:
        for stem in line.stems:
            line.clips = wavs.take(stem)
            if line.clips:
                line.name = stem
                break
    lacking = []
    for line in lines:
        if line.clips:
            continue
        line.name = next((stem for stem in line.stems if _parts(stem)[1] == line.n), f"{conv_id}_{line.n}")
        names = wavs.numbered(conv_id, line.n) or wavs.numbered(f"t_{conv_id}", line.n)
        if len(names) == 1:
            line.clips, line.name = wavs.take(names[0]), names[0]
        elif names:
            lacking.append((line.where, line.n, f"several wavs are its number {line.n}: {', '.join(names)}."))
        else:
            reason = f"{line.name}.wav: there is no such file, or another line has it."
            lacking.append((line.where, line.n, reason))
    _lack(lacking, len(lines), conv_id, "wav", report)


def check_pattern(pattern: str) -> None:
    """ValueError if a video pattern has other fields than `{split} {conv_id} {n} {actor} {stem}`, or a broken one."""
    known = ", ".join(f"{{{name}}}" for name in PATTERN_FIELDS)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
        for name in names:
            if name not in PATTERN_FIELDS:
                raise ValueError(f"{{{name}}} is none of its fields")
        pattern.format(split="train", conv_id="t_0", n=0, actor="a", stem="t_0_0a")
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"the video pattern {pattern!r} cannot be used: {error}. Its fields: {known}. "
            'Example: "video/{split}/{conv_id}/{stem}.mp4".'
        ) from None


def _video(raw: Path, pattern: str, split: str, conv_id: str, line: _Line) -> Clip:
    """Where a turn's picture should lie."""
    name = pattern.format(split=split, conv_id=conv_id, n=line.n, actor=line.actor, stem=line.name)
    return Clip(raw / name, name)


@dataclass
class _Reader:
    """Makes dialogues of lines."""

    raw: Path
    wavs: _Wavs
    mapping: dict[str, str | None]
    pattern: str | None
    report: Report

    def dialogue(self, split: str, conv_id: str, rows: Iterator[tuple[str, dict]]) -> Dialogue | None:
        """The dialogue of (where, object) in any order; None if none of them is a turn."""
        lines: dict[int, _Line] = {}
        for where, row in rows:
            try:
                line = _read_line(where, row, self.mapping)
            except SchemaError as error:
                self.report.leave_out(where, str(error))
                continue
            first = lines.setdefault(line.n, line)
            if first is not line:
                self.report.leave_out(where, f"utterance {line.n} of {conv_id} is in {first.where} already.")
        kept = _name_speakers([lines[n] for n in sorted(lines)], self.report)
        if not kept:
            return None
        self._report_repairs(split, conv_id, kept)
        _find_wavs(conv_id, kept, self.wavs, self.report)
        videos, lacking = [], []
        for line in kept:
            clip = None if self.pattern is None else _video(self.raw, self.pattern, split, conv_id, line)
            videos.append((clip,) if clip and clip.path.is_file() else ())
            if clip and not videos[-1]:
                lacking.append((line.where, line.n, f"{clip.name}: there is no such video."))
        _lack(lacking, len(kept), conv_id, "video", self.report)
        turns = [
            Turn(line.where, line.name, line.speaker, line.text, line.emotion, audio=line.clips, video=video)
            for line, video in zip(kept, videos, strict=True)
        ]
        return Dialogue(split, conv_id, turns)

    def _report_repairs(self, split: str, conv_id: str, lines: list[_Line]) -> None:
        for line in lines:
            for reason in line.repairs:
                self.report.repair(line.where, reason)
        numbers = [line.n for line in lines]
        gaps = []
        for before, after in zip([-1, *numbers], numbers, strict=False):
            if after > before + 1:
                gaps.append(f"{before + 1}" if after == before + 2 else f"{before + 1}-{after - 1}")
        if gaps:
            reason = f"utterance {', '.join(gaps)} is missing. The turns were numbered again from 0."
            self.report.repair(f"dialogue {conv_id} of {split}", reason)


def _dialogues(raw: Path, tables: list[Path], dialogues: dict[str, array]) -> Iterator[tuple[str, Iterator]]:
    """(conv_id, its lines as (where, object)) of a split's dialogues."""
    with ExitStack() as stack:
        handles = [stack.enter_context(open(raw / path, "rb")) for path in tables]

        def rows(places: array) -> Iterator[tuple[str, dict]]:
            for position, offset in zip(places[::2], places[1::2], strict=True):
                file, number = position >> 32, position & 0xFFFFFFFF
                handles[file].seek(offset)
                yield f"{tables[file].as_posix()}:{number}", _parse_object(handles[file].readline())

        for conv_id, places in dialogues.items():
            yield conv_id, rows(places)


def _check_videos(raw: Path, pattern: str, index: dict[str, dict[str, array]], tables: dict[str, list[Path]]) -> None:
    """LayoutError, before any clip is opened, if not one video is where the pattern says."""
    expected = None
    needs_name = "{stem" in pattern or "{actor" in pattern
    for split, dialogues in index.items():
        for conv_id, rows in _dialogues(raw, tables[split], dialogues):
            for where, row in rows:
                try:
                    line = _read_line(where, row, {})
                except SchemaError:
                    continue
                if needs_name and not line.stems:  # only the wav's name will tell
                    return
                line.name = line.stems[0] if line.stems else ""
                clip = _video(raw, pattern, split, conv_id, line)
                if clip.path.is_file():
                    return
                expected = expected or f"{clip.path} for {where}"
    if expected:
        raise LayoutError(
            f"the video pattern {pattern!r} leads to no video: expected {expected}, and none of the other lines' is "
            f"there either. Give the path of a turn's video below {raw}."
        )


def _one_split_each(index: dict[str, dict[str, array]], tables: dict[str, list[Path]], report: Report) -> None:
    """Leaves a dialogue of several splits to the last of them. The tests come last: nothing of them is trained on."""
    for place, split in enumerate(SPLITS[:-1]):
        for conv_id in list(index.get(split, ())):
            other = next((name for name in reversed(SPLITS[place + 1 :]) if conv_id in index.get(name, ())), None)
            if other is None:
                continue
            for position in index[split].pop(conv_id)[::2]:
                where = f"{tables[split][position >> 32].as_posix()}:{position & 0xFFFFFFFF}"
                report.leave_out(where, f"dialogue {conv_id} is in {other} as well, and stays there.")


def _unpack(raw: Path, split: str, dialogues: dict, files: _Files, report: Report, options: Options) -> None:
    """Adds the wavs in a split's archives, unless they lie unpacked in RAW already."""

    def is_there(conv_id: str) -> bool:
        return conv_id in files.wavs.groups or f"t_{conv_id}" in files.wavs.groups

    found = files.archives.get(split, [])
    if found and dialogues and all(map(is_there, dialogues)):
        for path in found:
            report.ignore(path.as_posix(), f"wavs of all dialogues of {split} lie unpacked in {raw.name} already.")
        return
    for path in found:
        folder = archives.unpack(raw / path, options.unpacked, report)
        for inside, names in _walk(folder, report):
            wavs = [name for name in names if name.lower().endswith(".wav")]
            if wavs:
                name = Path(path, Path(inside).relative_to(folder)).as_posix()
                files.wavs.add(inside, name, wavs)


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    The dialogues of a snapshot, split by split in the order of `SPLITS`, in the order of their first lines.

    Raises:
        LayoutError: if there is no metadata of any split, two snapshots, Git-LFS pointers for all archives, or a video
            pattern by which no video is there.
        ValueError: for a video pattern that cannot be used.
    """
    raw = Path(raw)
    pattern = options.video_pattern
    if pattern is not None:
        check_pattern(pattern)
    files = _list(raw, report)
    _check_layout(raw, files, report)
    for split in SPLITS:
        if split not in files.tables:
            report.ignore(split, f"there is no metadata of it, as metadata/{split}/{split}_metadata_0000.jsonl.")
            for path in files.archives.get(split, ()):
                report.ignore(path.as_posix(), f"there is no metadata of {split}: it was not unpacked.")
    if files.videos and pattern is None:
        report.ignore("videos", f"{files.videos} files: give a video pattern, which says where a turn's video lies.")

    index = {split: _index(raw, files.tables[split], report) for split in SPLITS if split in files.tables}
    _one_split_each(index, files.tables, report)
    if pattern is not None:
        _check_videos(raw, pattern, index, files.tables)
    reader = _Reader(raw, files.wavs, {**MAPPING, **options.emotion_map}, pattern, report)
    for split, dialogues in index.items():
        _unpack(raw, split, dialogues, files, report, options)
        for conv_id, rows in _dialogues(raw, files.tables[split], dialogues):
            dialogue = reader.dialogue(split, conv_id, rows)
            if dialogue is not None:
                yield dialogue
    for name, count in files.wavs.rest():
        wavs = "a wav" if count == 1 else f"{count} wavs"
        report.ignore(name, f"{wavs} that no line of the metadata names.")
