"""MELD (raw): dialogues of the series Friends, one mp4 clip per utterance; its dev split is `validation` here.

RAW is MELD.Raw.tar.gz, a folder with this archive, or a folder with all or some of its content, at any depth:
`train.tar.gz`, `dev.tar.gz`, `test.tar.gz`, the tables `{train,dev,test}_sent_emo.csv` and the clip folders
`train_splits/`, `dev_splits_complete/` and `output_repeated_splits_test/`. An archive is unpacked only if its tables or
clips are not there already.

A row is a line of a table, with the key (split, Dialogue_ID, Utterance_ID). The turns of a dialogue are sorted by
Utterance_ID, because their times are inconsistent with the ids in places, and numbered without the gaps of the ids.
Audio and video are from the same clip. If the test split has both `dia1_utt0.mp4` and `final_videos_testdia1_utt0.mp4`,
only the latter is correct.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from ...configuration_empathic import EMOTIONS
from ...media_empathic import LFS_HEAD
from ..archives import unpack
from ..schema import SPLIT_NAMES, SPLITS, SchemaError, parse_emotion
from ..text import clean_text
from .base import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn

MAPPING = {"anger": "angry", "fear": "fearful", "joy": "happy", "sadness": "sad"}  # the other three keep their names
OWN_NAMES = {"train": "train", "validation": "dev", "test": "test"}
FOLDERS = {"train": "train_splits", "validation": "dev_splits_complete", "test": "output_repeated_splits_test"}
REQUIRED = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")

_SPLIT_OF_FOLDER = {**SPLIT_NAMES, **{folder: split for split, folder in FOLDERS.items()}}
_ARCHIVE_TYPES = (".tar.gz", ".tgz", ".tar", ".zip")
_TABLE = re.compile("(train|dev|test)_sent_emo[.]csv", re.IGNORECASE)
_CLIP = re.compile("(final_videos_test)?dia([0-9]{1,9})_utt([0-9]{1,9})[.]mp4", re.IGNORECASE)
_TIME = re.compile("([0-9]{1,9}):([0-9]{1,2}):([0-9]{1,2})(?:[,.]([0-9]+))?")
_ID = re.compile("([0-9]{1,9})(?:[.]0*)?")


def _published(rows: int, dialogues: int, *emotions: int) -> dict[str, int]:
    return {"rows": rows, "dialogues": dialogues, **dict(zip(EMOTIONS, emotions, strict=True))}


ABOUT = CorpusInfo(
    name="meld",
    title="MELD",
    description="Dialogues of several speakers from the television series Friends, with an emotion for each utterance.",
    license="other",
    license_note="The tables are under GPL-3.0; the clips are copyrighted television and must not be redistributed.",
    redistributable=False,
    homepage="https://affective-meld.github.io",
    published={
        "train": _published(9989, 1038, 1109, 271, 268, 1743, 4710, 683, 1205),
        "validation": _published(1109, 114, 153, 22, 40, 163, 470, 111, 150),
        "test": _published(2610, 280, 345, 68, 50, 402, 1256, 208, 281),
    },
)


@dataclass
class _Files:
    """
    The files below a folder by kind.

    Args:
        tables: split -> (path, name in the report) of each copy of its table.
        clips: split -> (Dialogue_ID, Utterance_ID, whether it is a `final_videos` clip) -> copies of the clip.
        archives: `raw` for MELD.Raw or split -> (path, name in the report) of the archive.
    """

    tables: dict[str, list[tuple[Path, str]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    clips: dict[str, dict[tuple, list[Clip]]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    archives: dict[str, tuple[Path, str]] = field(default_factory=dict)


@dataclass
class _Line:
    """A valid line of a table."""

    where: str
    utterance: int
    speaker: str
    text: str
    emotion: str | None
    start: float | None
    end: float | None


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the dialogues of MELD: train, then validation, then test, each sorted by Dialogue_ID.

    Args:
        raw: the folder, or MELD.Raw.tar.gz.
        report: receives every line, file and clip with a problem.
        options: `unpacked`, `emotion_map` and `text_only` are used.

    Raises:
        LayoutError: if there is no table, if a table lacks columns, or if an archive or table is a Git-LFS pointer.
    """
    files = _find_files(raw, report, options)
    tables = {split: _read_table(split, files, report, options) for split in SPLITS}
    for split, dialogues in tables.items():
        own, clips = OWN_NAMES[split], files.clips[split]
        used = set()
        for number, lines in sorted(dialogues.items()):
            lines.sort(key=lambda line: line.utterance)
            _report_gaps(f"{own} dialogue {number}", lines, report)
            turns = []
            for line in lines:
                used.add((number, line.utterance))
                name = f"dia{number}_utt{line.utterance}"
                copies = clips.get((number, line.utterance, True)) or clips.get((number, line.utterance, False), [])
                if options.text_only:
                    copies = []
                elif not copies:
                    reason = f"there is no {name}.mp4 in {FOLDERS[split]}/. The turn is kept without it."
                    report.lack_media(line.where, reason)
                times = {"start": line.start, "end": line.end}
                media = {"audio": tuple(copies), "video": tuple(copies)}
                turns.append(Turn(line.where, name, line.speaker, line.text, line.emotion, **times, **media))
            yield Dialogue(split, str(number), turns)
        if options.text_only and clips:
            report.ignore(FOLDERS[split], f"{len(clips)} clips are not read, because only the text is wanted.")
        elif files.tables[split]:
            _report_clips(own, clips, used, report)


def _find_files(raw: Path, report: Report, options: Options) -> _Files:
    """List all files below `raw`, and unpack the archives that are needed."""
    files, others = _Files(), {}
    if raw.is_file():
        _sort_file(raw, Path(raw.name), files, others)
    else:
        _scan(raw, raw, files, others, options.unpacked)
    unpacked = set()

    def lacks(split: str) -> bool:
        return not files.tables[split] or not (files.clips[split] or options.text_only)

    def take(archive: str) -> None:
        path, name = files.archives[archive]
        unpacked.add(name)
        _scan(unpack(path, options.unpacked, report), options.unpacked, files, others)

    for archive in (*SPLITS, "raw", *SPLITS):  # the splits again, because MELD.Raw contains their archives
        needed = lacks(archive) if archive in SPLITS else any(map(lacks, SPLITS))
        if needed and archive in files.archives and files.archives[archive][1] not in unpacked:
            take(archive)
    for _, name in files.archives.values():
        if name not in unpacked:
            report.ignore(name, "it was not unpacked: what is needed of it is there already.")
    for reason, names in sorted(others.items()):
        count = f"{len(names)} files, the first {names[0]}" if len(names) > 1 else names[0]
        report.ignore(count, reason)

    if not any(files.tables.values()):
        seen = sorted(os.listdir(raw))[:10] if raw.is_dir() else [f"the file {raw.name}"] if raw.exists() else []
        raise LayoutError(
            f"{raw}: expected MELD.Raw.tar.gz, or the tables {{train,dev,test}}_sent_emo.csv beside the folders "
            f"{', '.join(FOLDERS.values())}, but found {', '.join(seen) or 'nothing'}. "
            "Give the folder that MELD.Raw.tar.gz was downloaded to or unpacked in."
            + "".join(f"\n{note['item']}: {note['reason']}" for note in report.ignored[:5])
        )
    for copies in (copies for clips in files.clips.values() for copies in clips.values()):
        copies.sort(key=lambda clip: (clip.name.count("/"), clip.name))
    for split, tables in files.tables.items():
        tables.sort(key=lambda table: (table[1].count("/"), table[1]))
        for path, _ in tables[:1]:
            with open(path, "rb") as file:
                if file.read(len(LFS_HEAD)) == LFS_HEAD:
                    raise LayoutError(f"{path}: is a Git-LFS pointer, not a table. Fetch it with `git lfs pull`.")
        for _, name in tables[1:]:
            report.ignore(name, f"the table of the split {split} is read from {tables[0][1]}.")
        if not tables:
            count = sum(map(len, files.clips[split].values()))
            reason = f"there is no such table, so the output has no split {split}; {count} clips are ignored."
            report.ignore(f"{OWN_NAMES[split]}_sent_emo.csv", reason)
    return files


def _scan(root: Path, base: Path, files: _Files, others: dict[str, list[str]], skip: Path | None = None) -> None:
    """Add each file below `root`, named relative to `base`, to `files`, or to `others` by the reason to ignore it."""
    visited, skip = set(), skip and os.path.realpath(skip)
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or real == skip:  # a symlink to a parent folder
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            _sort_file(path, path.relative_to(base), files, others)


def _sort_file(path: Path, relative: Path, files: _Files, others: dict[str, list[str]]) -> None:
    name, lower = relative.as_posix(), path.name.lower()
    if path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in relative.parts:
        others.setdefault("a file of macOS, not part of the corpus.", []).append(name)
        return
    if match := _TABLE.fullmatch(path.name):
        files.tables[SPLIT_NAMES[match[1].lower()]].append((path, name))
        return
    for ending in _ARCHIVE_TYPES:
        stem = lower.removesuffix(ending)
        if stem != lower and stem in ("meld.raw", *OWN_NAMES.values()):
            files.archives.setdefault(SPLIT_NAMES.get(stem, "raw"), (path, name))
            return
    match = _CLIP.fullmatch(path.name)
    parents = [part.lower() for part in relative.parts[:-1]]
    split = next((_SPLIT_OF_FOLDER[part] for part in reversed(parents) if part in _SPLIT_OF_FOLDER), None)
    if match and split:
        key = (int(match[2]), int(match[3]), bool(match[1]))
        files.clips[split].setdefault(key, []).append(Clip(path, name))
    elif match:
        reason = f"a clip whose split is unknown: it is not in {', '.join(FOLDERS.values())}, train, dev or test."
        others.setdefault(reason, []).append(name)
    else:
        others.setdefault("neither a table nor a clip of MELD by its name.", []).append(name)


def _read_table(split: str, files: _Files, report: Report, options: Options) -> dict[int, list[_Line]]:
    """Read the table of a split: Dialogue_ID -> valid lines, in the order of the table."""
    if not files.tables[split]:
        return {}
    path, name = files.tables[split][0]
    records = _records(_decode(path, name, report))
    _, header, _ = next(records, (1, [], None))
    columns = {title.strip().lower(): place for place, title in enumerate(header or [])}
    missing = [title for title in REQUIRED if title.lower() not in columns]
    if missing:
        raise LayoutError(
            f"{path}: the first line lacks {', '.join(missing)}. It is {','.join(header or [])[:200]!r}. "
            "Give the original table of MELD, with comma-separated column names in the first line."
        )
    mapping = {**MAPPING, **options.emotion_map}
    dialogues: dict[int, list[_Line]] = {}
    seen: dict[tuple[int, int], str] = {}
    for number, values, problem in records:
        where = f"{name}:{number}"
        report.find()
        if values is None or len(values) < len(header) or any(values[len(header) :]):
            count = f"the line has {len(values or [])} columns, the table {len(header)}."
            if problem and values is not None:
                problem = f"{count} A quote is opened or closed at a wrong place."
            report.leave_out(where, problem or count)
            continue
        if problem:
            report.repair(where, problem)
        row = {title: values[place] for title, place in columns.items()}
        ids = [_ID.fullmatch(row[title].strip()) for title in ("dialogue_id", "utterance_id")]
        if None in ids:
            reason = f"Dialogue_ID is {row['dialogue_id']!r}, Utterance_ID {row['utterance_id']!r}: not two numbers."
            report.leave_out(where, reason)
            continue
        key = (int(ids[0][1]), int(ids[1][1]))
        if key in seen:
            report.leave_out(where, f"utterance {key[1]} of dialogue {key[0]} is in {seen[key]} already.")
            continue
        seen[key] = where
        dialogues.setdefault(key[0], []).append(_parse_line(where, key[1], row, mapping, report))
    return dialogues


def _parse_line(where: str, utterance: int, row: dict[str, str], mapping: dict, report: Report) -> _Line:
    """Parse the values of a line. Invalid values are reported; the line is kept."""
    text, reasons = clean_text(row["utterance"])
    for reason in reasons:
        report.repair(where, f"Utterance: {reason}")
    speaker, reasons = clean_text(row["speaker"])
    for reason in reasons:
        report.repair(where, f"Speaker: {reason}")
    if not speaker:
        speaker = "unknown"
        report.repair(where, 'Speaker is empty; it became "unknown".')
    emotion = None
    try:
        emotion = parse_emotion(row["emotion"].strip(), mapping)
        if not row["emotion"].strip():
            report.repair(where, "Emotion is empty. The turn is kept without it.")
    except SchemaError as error:
        report.repair(where, f"{error} The turn is kept without it.")
    start, end = (
        _parse_time(where, title, row.get(title.lower(), "").strip(), report) for title in ("StartTime", "EndTime")
    )
    if start is not None and end is not None and end <= start:
        report.repair(where, f"it starts at {start} s and ends at {end} s. The turn is kept without times.")
        start = end = None
    return _Line(where, utterance, speaker, text, emotion, start, end)


def _parse_time(where: str, title: str, value: str, report: Report) -> float | None:
    """Convert `h:mm:ss,mmm` to seconds. The digits after the comma, only two in some lines, are a decimal fraction."""
    if not value:
        return None
    match = _TIME.fullmatch(value)
    if match is None:
        report.repair(where, f"{title} is {value!r}, not h:mm:ss,mmm. The turn is kept without it.")
        return None
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(f"{match[3]}.{match[4] or 0}")


def _decode(path: Path, name: str, report: Report) -> str:
    """Read the text of a table. Bytes that are not UTF-8 are read as Latin-1, which `clean_text` corrects later."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    strange = re.compile("[\udc80-\udcff]")
    first = strange.search(text)
    if first is None:
        return text
    where, count = f"{name}:{text.count(chr(10), 0, first.start()) + 1}", len(strange.findall(text))
    report.repair(
        where, f"{count} bytes of the table are not UTF-8, the first in this line; they were read as Latin-1."
    )
    return strange.sub(lambda match: chr(ord(match[0]) - 0xDC00), text)


def _records(text: str) -> Iterator[tuple[int, list[str] | None, str | None]]:
    """
    Yield (number of its first line, values or None, problem or None) of each record of a table, header first.

    A quote that is never closed invalidates only its own line, not the lines after it.
    """
    lines = list(StringIO(text, newline=""))
    width = None
    start = 0
    while start < len(lines):
        base = start
        reader = csv.reader((lines[place] for place in range(base, len(lines))), strict=True)
        while True:
            first = base + reader.line_num
            try:
                values, problem = next(reader), None
            except StopIteration:
                return
            except csv.Error as error:
                values, problem = None, f"the line cannot be read: {error}."
            start = base + reader.line_num
            if values == []:
                continue
            width = width or len(values or ())
            if start > first + 1 and (values is None or len(values) != width):
                problem = "a quote is opened and not closed, or closed on a later line. Close it."
                yield first + 1, None, problem
                start = first + 1
                break  # continue with the next line
            if values is None:
                with suppress(csv.Error):
                    values = next(csv.reader(lines[first:start]))
                    problem = "a quote in the middle of a value was read as part of the value."
            yield first + 1, values, problem


def _report_gaps(dialogue: str, lines: list[_Line], report: Report) -> None:
    numbers = [line.utterance for line in lines]
    if numbers != list(range(len(lines))):
        missing = sorted(set(range(numbers[-1])) - set(numbers))
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        report.repair(dialogue, f"utterance {shown} is missing. The turns were renumbered from 0.")


def _report_clips(own: str, clips: dict[tuple, list[Clip]], used: set[tuple[int, int]], report: Report) -> None:
    """Report the clips that no turn uses: clips without a line, incorrect versions and further copies."""
    again = 0
    for (dialogue, utterance, final), copies in sorted(clips.items()):
        reason = None
        if (dialogue, utterance) not in used:
            reason = f"no line of {own}_sent_emo.csv names this clip."
        elif not final and (dialogue, utterance, True) in clips:
            reason = f"{clips[dialogue, utterance, True][0].name} is the correct clip of this utterance."
        again += len(copies) > 1 and reason is None
        for clip in copies if reason else []:
            report.ignore(clip.name, reason)
    if again:
        report.ignore(own, f"{again} clips exist more than once; the readable copy nearest to RAW is used.")
