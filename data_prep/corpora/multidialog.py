"""MultiDialog, in the layout of a download of its Hub copy `IVLLab/MultiDialog`.

    RAW/metadata/<split>/<split>_metadata_0000.jsonl    one JSON object per utterance
    RAW/data/<split>/<split>_chunks_0000.tar.gz         t_<uuid>/t_<uuid>_<n><actor>.wav, 16 kHz

The splits are train, valid_freq, valid_rare, test_freq and test_rare, and keep their names; a subset is enough. There
may be any number of files of each kind, and unpacked wav files anywhere in the folder.

- The audio of a line is the wav file named in `original_full_path`, `audpath` or `file_name`, whichever exists, or
  else the only wav file of its dialogue with the number of the utterance.
- `speaker` is the line's `from`: `human`, or `gpt`, whose replies the model learns (`reply_speakers: [gpt]` in stage
  `dialogue`). Either may speak utterance 0. `utterance_id` is the name of the wav file, whose last letter is the actor.
- Turns are sorted by `utterance_id` and renumbered from 0.
- A dialogue in two splits is kept in the held-out split.
- The videos are a separate download; `video_pattern` gives their paths.

The lines are read twice: first to find the lines of each dialogue, which may be in several files, then one dialogue at
a time. Two integers per line and the end of each wav file's name are kept in memory, about 20 MB for the whole corpus.
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

from ...media_empathic import LFS_HEAD
from .. import archives
from ..schema import SchemaError, parse_emotion, parse_id, parse_text, parse_turn
from ..text import clean_text
from .base import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn

SPLITS = ("train", "valid_freq", "valid_rare", "test_freq", "test_rare")

MAPPING = {
    "neutral": "neutral",
    "happy": "happy",
    "fear": "fearful",
    "angry": "angry",
    "disgusting": "disgust",
    "surprising": "surprise",
    "sad": "sad",
    # Labels of Topical-Chat, whose texts were recorded.
    "curious to dive deeper": "neutral",
    "disgusted": "disgust",
    "surprised": "surprise",
}

ABOUT = CorpusInfo(
    name="multidialog",
    title="MultiDialog",
    description=(
        "Conversations between two of twelve actors, who speak texts of Topical-Chat with the emotion annotated for "
        "each utterance. `speaker` is `gpt` for the side that a model should learn and `human` for the other side; the "
        "last letter of `utterance_id` is the actor."
    ),
    license="other",
    license_note=(
        "Its page on the Hub says `cc` without naming a license, so the terms are unknown: use it for research, ask "
        "its authors about any other use, and do not publish copies."
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
FETCH = f"Fetch it with `git lfs pull`, or download everything with `{DOWNLOAD}`."
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
CLIP_KEYS = ("original_full_path", "audpath", "file_name")
PATTERN_FIELDS = ("split", "conv_id", "n", "actor", "stem")

# t_<uuid>, then _<n><actor>. A wav file with any other name is its own group.
_STEM = re.compile(r"(.+?)(_(\d+)([A-Za-z]*))?", re.DOTALL)


def _parts(stem: str) -> tuple[str, int | None, str]:
    """Split t_<uuid>_<n><actor> into (t_<uuid>, n, actor)."""
    group, _, number, actor = _STEM.fullmatch(stem).groups()
    return group, None if number is None else int(number), actor or ""


class _Wavs:
    """Index of the wav files that no line has used yet. Only the end of each name is stored."""

    def __init__(self):
        self.folders: list[tuple[str, str]] = []  # path, name in the report
        self.groups: dict[str, list[tuple[int, str]]] = {}  # t_<uuid> -> (index of the folder, ends of names)

    def add(self, folder: str, name: str, files: list[str]) -> None:
        """Add the wav files of a folder."""
        ends: dict[str, list[str]] = {}
        for file in files:
            group = _parts(os.path.splitext(file)[0])[0]
            ends.setdefault(group, []).append(file[len(group) :])
        self.folders.append((folder, name))
        for group, members in ends.items():
            self.groups.setdefault(group, []).append((len(self.folders) - 1, "/".join(members)))

    def take(self, stem: str) -> tuple[Clip, ...]:
        """Remove and return the wav files with a name, in any folder. Later lines cannot use them."""
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
        """The names, without `.wav`, of the wav files of utterance `n` of a dialogue."""
        members = (end for _, ends in self.groups.get(group, ()) for end in ends.split("/"))
        stems = dict.fromkeys(group + end.rpartition(".")[0] for end in members)
        return [stem for stem in stems if _parts(stem)[1] == n]

    def rest(self) -> Iterator[tuple[str, int]]:
        """Yield (name, count) of the unused wav files, grouped by folder and dialogue: `t_<uuid>{_0a.wav,...}`."""
        for group, places in self.groups.items():
            for number, ends in places:
                yield f"{self.folders[number][1]}/{group}{{{ends.replace('/', ',')}}}", ends.count("/") + 1


@dataclass
class _Files:
    """The files of a folder by kind."""

    tables: dict[str, list[Path]] = field(default_factory=dict)
    archives: dict[str, list[Path]] = field(default_factory=dict)
    wavs: _Wavs = field(default_factory=_Wavs)
    videos: int = 0


@dataclass
class _Line:
    """A valid line of the metadata, from which a turn is made."""

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
        """The actor's letter at the end of the wav file's name; empty if unknown."""
        names = (self.name, *self.stems) if self.name else self.stems
        return next((actor for _, _, actor in map(_parts, names) if actor), "")


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(LFS_HEAD)) == LFS_HEAD


def _walk(root: Path, report: Report) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files), sorted. Names that start with a dot are skipped."""
    apple, seen = 0, set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a symlink to a parent folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        apple += sum(name.startswith("._") for name in files)
        yield folder, sorted(name for name in files if name[0] != ".")
    if apple:
        report.ignore("._*", f"{apple} files of macOS, not part of the corpus.")


def _split_of(path: Path) -> str | None:
    """The split given by a file's folder or name; None if there is none."""
    for name in reversed(path.parts[:-1]):
        if name in SPLITS:
            return name
    return next((name for name in SPLITS if re.match(rf"{name}(_metadata|_chunks|\.)", path.name)), None)


def _add_file(found: dict[str, list[Path]], split: str, raw: Path, path: Path, report: Report) -> None:
    """Add a table or archive. A copy of a known file is reported and skipped."""
    first = next((other for other in found.get(split, ()) if other.name == path.name), None)
    if first is None:
        found.setdefault(split, []).append(path)
    elif (raw / first).stat().st_size == (raw / path).stat().st_size:
        report.ignore(str(path), f"it is a copy of {first}.")
    else:
        raise LayoutError(
            f"{raw}: has {first} and {path}, which differ. These look like two snapshots of MultiDialog: "
            "give the folder of one of them."
        )


def _list(raw: Path, report: Report) -> _Files:
    """List all files of the folder in one pass."""
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
                reason = f"neither its folder nor its name gives its split: {', '.join(SPLITS)}."
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
        raise LayoutError(f"{raw / pointers[0]}: is a Git-LFS pointer, and there is no actual archive. {FETCH}")


def _parse_object(line: bytes) -> dict:
    """Parse the JSON object of a line. SchemaError if the line is not a JSON object."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SchemaError(f"the line is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise SchemaError(f"the line is not JSON ({error.msg} at column {error.colno}).") from None
    except RecursionError:
        raise SchemaError("the line is nested too deeply to be an utterance.") from None
    except ValueError:  # the only other error of json: int() limits the number of digits
        raise SchemaError("the line contains a number with too many digits.") from None
    if not isinstance(row, dict):
        raise SchemaError(f"the line is a {type(row).__name__}, not an object with the keys of an utterance.")
    return row


def _stems(row: dict) -> list[str]:
    """The names of a line's wav file, without folder and suffix, best first."""
    names = (row[key] for key in CLIP_KEYS if isinstance(row.get(key), str))
    stems = (os.path.splitext(re.split(r"[/\\]", name.strip())[-1])[0] for name in names)
    return list(dict.fromkeys(filter(None, stems)))


def _conv_id(row: dict) -> str:
    """The id of a line's dialogue, from `conv_id` or else from the name of the wav file."""
    try:
        return parse_id(row, "conv_id")
    except SchemaError:
        named = [group for group, n, _ in map(_parts, _stems(row)) if n is not None]
        if not named:
            raise
        return named[0]


def _index(raw: Path, tables: list[Path], report: Report) -> dict[str, array]:
    """Index the lines of each dialogue: file and line number (upper and lower 32 bits) and byte offset per line."""
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
    """Parse the values of a line. SchemaError if the line is not a valid turn."""
    stems, value, repairs = _stems(row), row.get("utterance_id"), []
    try:
        n = parse_turn(value)
    except SchemaError:
        found = [number for _, number, _ in map(_parts, stems) if number is not None]
        if not found:
            raise SchemaError(f'"utterance_id" is {value!r}. Give the number of the utterance, from 0.') from None
        n = found[0]
        repairs.append(f'"utterance_id" is {value!r}. The number in the name of its wav file is used: {n}.')
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
    """The lines with a known speaker. A line without `from` gets the speaker of its actor's other lines."""
    actors: dict[str, set[str]] = {}
    for line in lines:
        if line.actor and line.speaker:
            actors.setdefault(line.actor, set()).add(line.speaker)
    named = []
    for line in lines:
        if line.speaker is None:
            known = actors.get(line.actor, ())
            if len(known) != 1:
                report.leave_out(line.where, '"from" is missing, and whether it is gpt or human is unknown.')
                continue
            (line.speaker,) = known
            line.repairs.append(f'"from" is missing. Actor {line.actor} is {line.speaker} elsewhere in the dialogue.')
        named.append(line)
    return named


def _lack(lines: list[tuple[str, int, str]], all_of: int, conv_id: str, kind: str, report: Report) -> None:
    """Report the (where, n, reason) of turns without a clip, as one entry if all `all_of` turns of the dialogue lack a
    clip, because whole archives may be absent."""
    if lines and len(lines) == all_of:
        numbers = ", ".join(str(n) for _, n, _ in lines)
        lines = [
            (f"{lines[0][0]}, dialogue {conv_id}", 0, f"there is no {kind} of this dialogue, for utterances {numbers}.")
        ]
    for where, _, reason in lines:
        report.lack_media(where, reason)


def _find_wavs(conv_id: str, lines: list[_Line], wavs: _Wavs, report: Report) -> None:
    """Set the clips and names of the lines: first by name, so that no other line takes these clips by number."""
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
            lacking.append((line.where, line.n, f"several wav files have its number {line.n}: {', '.join(names)}."))
        else:
            reason = f"{line.name}.wav: there is no such file, or another line uses it."
            lacking.append((line.where, line.n, reason))
    _lack(lacking, len(lines), conv_id, "wav", report)


def check_pattern(pattern: str) -> None:
    """ValueError if a video pattern is invalid or has fields other than `{split} {conv_id} {n} {actor} {stem}`."""
    known = ", ".join(f"{{{name}}}" for name in PATTERN_FIELDS)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
        for name in names:
            if name not in PATTERN_FIELDS:
                raise ValueError(f"{{{name}}} is not one of its fields")
        pattern.format(split="train", conv_id="t_0", n=0, actor="a", stem="t_0_0a")
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"the video pattern {pattern!r} cannot be used: {error}. Its fields: {known}. "
            'Example: "video/{split}/{conv_id}/{stem}.mp4".'
        ) from None


def _video(raw: Path, pattern: str, split: str, conv_id: str, line: _Line) -> Clip:
    """The expected video clip of a turn."""
    name = pattern.format(split=split, conv_id=conv_id, n=line.n, actor=line.actor, stem=line.name)
    return Clip(raw / name, name)


@dataclass
class _Reader:
    """Convert metadata lines to dialogues."""

    raw: Path
    wavs: _Wavs
    mapping: dict[str, str | None]
    pattern: str | None
    report: Report

    def dialogue(self, split: str, conv_id: str, rows: Iterator[tuple[str, dict]]) -> Dialogue | None:
        """Make a dialogue of the rows (where, object), in any order; None if no row is a valid turn."""
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
            reason = f"utterance {', '.join(gaps)} is missing. The turns were renumbered from 0."
            self.report.repair(f"dialogue {conv_id} of {split}", reason)


def _dialogues(raw: Path, tables: list[Path], dialogues: dict[str, array]) -> Iterator[tuple[str, Iterator]]:
    """Yield (conv_id, iterator over its lines as (where, object)) for the dialogues of a split."""
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
    """LayoutError if the pattern matches no video at all; called before any clip is opened."""
    expected = None
    needs_name = "{stem" in pattern or "{actor" in pattern
    for split, dialogues in index.items():
        for conv_id, rows in _dialogues(raw, tables[split], dialogues):
            for where, row in rows:
                try:
                    line = _read_line(where, row, {})
                except SchemaError:
                    continue
                if (
                    needs_name and not line.stems
                ):  # the path depends on the name of the wav file, which is not known yet
                    return
                line.name = line.stems[0] if line.stems else ""
                clip = _video(raw, pattern, split, conv_id, line)
                if clip.path.is_file():
                    return
                expected = expected or f"{clip.path} for {where}"
    if expected:
        raise LayoutError(
            f"the video pattern {pattern!r} leads to no video: expected {expected}, and there is no video for any "
            f"other line either. Give the path of a turn's video below {raw}."
        )


def _one_split_each(index: dict[str, dict[str, array]], tables: dict[str, list[Path]], report: Report) -> None:
    """Keep a dialogue of several splits only in the last of them. Test splits come last: they are never trained on."""
    for place, split in enumerate(SPLITS[:-1]):
        for conv_id in list(index.get(split, ())):
            other = next((name for name in reversed(SPLITS[place + 1 :]) if conv_id in index.get(name, ())), None)
            if other is None:
                continue
            for position in index[split].pop(conv_id)[::2]:
                where = f"{tables[split][position >> 32].as_posix()}:{position & 0xFFFFFFFF}"
                report.leave_out(where, f"dialogue {conv_id} is in {other} as well, and is kept there.")


def _unpack(raw: Path, split: str, dialogues: dict, files: _Files, report: Report, options: Options) -> None:
    """Unpack the archives of a split and add their wav files, unless RAW already has them unpacked."""

    def is_there(conv_id: str) -> bool:
        return conv_id in files.wavs.groups or f"t_{conv_id}" in files.wavs.groups

    found = files.archives.get(split, [])
    if found and dialogues and all(map(is_there, dialogues)):
        for path in found:
            report.ignore(path.as_posix(), f"all dialogues of {split} are already unpacked in {raw.name}.")
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
    Read the dialogues of a snapshot, sorted by split in the order of `SPLITS` and by the order of their first lines.

    Args:
        raw: the folder.
        report: the report.
        options: `unpacked`, `emotion_map` and `video_pattern` are used.

    Raises:
        LayoutError: if there is no metadata, if there are two snapshots, if all archives are Git-LFS pointers, or if
            the video pattern matches no video.
        ValueError: if the video pattern is invalid.
    """
    raw = Path(raw)
    pattern = options.video_pattern
    if pattern is not None:
        check_pattern(pattern)
    files = _list(raw, report)
    _check_layout(raw, files, report)
    for split in SPLITS:
        if split not in files.tables:
            report.ignore(
                split, f"there is no metadata of this split, such as metadata/{split}/{split}_metadata_0000.jsonl."
            )
            for path in files.archives.get(split, ()):
                report.ignore(path.as_posix(), f"it was not unpacked: there is no metadata of {split}.")
    if files.videos and pattern is None:
        report.ignore("videos", f"{files.videos} files: give a video pattern to use them.")

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
        wavs = "a wav file" if count == 1 else f"{count} wav files"
        report.ignore(name, f"{wavs} that no line of the metadata uses.")
