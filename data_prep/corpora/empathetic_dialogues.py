"""EmpatheticDialogues (text only): two people talk about a situation in which one of them had a strong feeling.

RAW is `empatheticdialogues.tar.gz`, a folder with it, or a folder with all or some of `train.csv`, `valid.csv` and
`test.csv`, at any depth. A line of a table is an utterance:

    conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags

- Values have no quotes: a comma inside of one is written `_comma_`, and so a line is split at its commas. The test
  table has one more column, with candidate replies of the authors' retrieval models, which is not read.
- `context` is the feeling that the first person was to talk about, one of 32. It labels the turns of that person, where
  it is one of the seven emotions (`MAPPING`); the other person's turns have no label.
- `speaker` is `speaker` for the first person, and `listener` for the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ...media_empathic import LFS_HEAD
from ..archives import unpack
from ..schema import SPLIT_NAMES, SPLITS, SchemaError, parse_emotion
from ..text import clean_text
from .base import CorpusInfo, Dialogue, LayoutError, Options, Report, Turn

# The 32 feelings; None: it is not one of the seven emotions, or may be several of them.
MAPPING: dict[str, str | None] = {
    **dict.fromkeys(("afraid", "anxious", "apprehensive", "terrified"), "fearful"),
    **dict.fromkeys(("angry", "annoyed", "furious"), "angry"),
    **dict.fromkeys(("content", "excited", "grateful", "hopeful", "joyful", "proud"), "happy"),
    **dict.fromkeys(("devastated", "disappointed", "guilty", "lonely", "sad"), "sad"),
    "disgusted": "disgust",
    "surprised": "surprise",
    **dict.fromkeys(
        (
            *("anticipating", "ashamed", "caring", "confident", "embarrassed", "faithful", "impressed", "jealous"),
            *("nostalgic", "prepared", "sentimental", "trusting"),
        )
    ),
}
ROLES = ("speaker", "listener")
COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")
COMMA = "_comma_"
ARCHIVE = "empatheticdialogues.tar.gz"

_TABLE = re.compile(r"(train|valid|test)[.]csv", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,9}")

ABOUT = CorpusInfo(
    name="empathetic-dialogues",
    title="EmpatheticDialogues",
    description=(
        "Written conversations of two people about a situation in which the first, the speaker, had a strong feeling. "
        "There are no clips. The turns of the speaker have the feeling of the situation as their emotion, where it is "
        "one of the seven."
    ),
    license="cc-by-nc-4.0",
    license_note="CC BY-NC 4.0: may be shared with attribution, for non-commercial use.",
    redistributable=True,
    homepage="https://github.com/facebookresearch/EmpatheticDialogues",
    published={"train": {"dialogues": 19533}, "validation": {"dialogues": 2770}, "test": {"dialogues": 2547}},
)


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the conversations split by split, in the order of the tables.

    Args:
        raw: the archive, or a folder.
        report: receives every file and line with a problem.
        options: `unpacked` and `emotion_map` are used.

    Raises:
        LayoutError: if there is no table, a table lacks columns, or a file is a Git-LFS pointer.
    """
    tables = _find_tables(raw, report, options)
    mapping = {**MAPPING, **options.emotion_map}
    for split in SPLITS:
        if split in tables:
            yield from _read_table(split, *tables[split], mapping, report)


def _find_tables(raw: Path, report: Report, options: Options) -> dict[str, tuple[Path, str]]:
    """split -> (path, name in the report) of its table, the one nearest to `raw`."""
    files = _list(raw, raw, report) if raw.is_dir() else [(raw, raw.name)]
    tables = _tables(files)
    for path, name in files:
        if path.name.lower() != ARCHIVE:
            continue
        if len(tables) == len(SPLITS):
            report.ignore(name, "it was not unpacked: its tables are there already.")
            continue
        inner = _list(unpack(path, options.unpacked, report), options.unpacked, report)
        for split, copies in _tables(inner).items():
            tables.setdefault(split, copies)
    if not tables:
        seen = ", ".join(name for _, name in files[:5]) or "nothing"
        raise LayoutError(
            f"{raw}: expected {ARCHIVE}, or train.csv, valid.csv and test.csv, but found {seen}. Download the archive "
            f"from {ABOUT.homepage}."
        )
    for split, copies in tables.items():
        for _, name in copies[1:]:
            report.ignore(name, f"the split {split} is read from {copies[0][1]}.")
    return {split: copies[0] for split, copies in tables.items()}


def _tables(files: list[tuple[Path, str]]) -> dict[str, list[tuple[Path, str]]]:
    found: dict[str, list[tuple[Path, str]]] = {}
    for path, name in sorted(files, key=lambda file: (file[1].count("/"), file[1])):
        if match := _TABLE.fullmatch(path.name):
            found.setdefault(SPLIT_NAMES[match[1].lower()], []).append((path, name))
    return found


def _list(root: Path, base: Path, report: Report) -> list[tuple[Path, str]]:
    """The files below a folder with their names relative to `base`; hidden files and files of macOS are reported."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        for name in sorted(names):
            relative = Path(folder, name).relative_to(base).as_posix()
            if name.startswith("."):
                report.ignore(relative, "a hidden file.")
            else:
                found.append((Path(folder, name), relative))
    return found


def _read_table(split: str, path: Path, name: str, mapping: dict, report: Report) -> Iterator[Dialogue]:
    content = path.read_bytes()
    if content.startswith(LFS_HEAD):
        raise LayoutError(f"{path}: is a Git-LFS pointer, not a table. Fetch it with `git lfs pull`.")
    lines = content.decode("utf-8-sig", "replace").split("\n")
    header = [title.strip() for title in lines[0].split(",")]
    missing = [title for title in COLUMNS if title not in header]
    if missing:
        raise LayoutError(f"{path}: its first line lacks {', '.join(missing)}. Give the original table.")
    places = {title: header.index(title) for title in COLUMNS}
    dialogues: dict[str, list[tuple[int, str, Turn]]] = {}
    seen: dict[tuple[str, int], str] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        report.find()
        values = line.rstrip("\r").split(",")
        if len(values) < len(COLUMNS):
            report.leave_out(where, f"the line has {len(values)} columns, the table {len(COLUMNS)}.")
            continue
        row = {title: values[place] for title, place in places.items()}
        key, index = row["conv_id"].strip(), row["utterance_idx"].strip()
        if not key or not _NUMBER.fullmatch(index):
            report.leave_out(where, f"conv_id is {key!r}, utterance_idx {index!r}: give a name and a number.")
            continue
        if (key, int(index)) in seen:
            report.leave_out(where, f"utterance {index} of {key} is in {seen[key, int(index)]} already.")
            continue
        seen[key, int(index)] = where
        text, repairs = clean_text(row["utterance"].replace(COMMA, ","))
        for reason in repairs:
            report.repair(where, reason)
        if not text:
            report.leave_out(where, "its utterance is empty.")
            continue
        emotion = None
        try:
            emotion = parse_emotion(row["context"], mapping)
        except SchemaError as error:
            report.repair(where, f"{error} The turn is kept without it.")
        turn = Turn(where, f"{key}_{index}", "", text, emotion)
        dialogues.setdefault(key, []).append((int(index), row["speaker_idx"].strip(), turn))
    for key, rows in dialogues.items():
        rows.sort(key=lambda row: row[0])
        _note_gaps(f"{name}:{key}", [index for index, _, _ in rows], report)
        yield Dialogue(split, key, _with_speakers(key, rows, name, report))


def _note_gaps(where: str, numbers: list[int], report: Report) -> None:
    missing = sorted(set(range(1, numbers[-1] + 1)) - set(numbers))
    if missing:
        shown = ", ".join(map(str, missing[:10]))
        report.repair(where, f"utterance {shown} is missing. The turns were renumbered from 0.")


def _with_speakers(key: str, rows: list[tuple[int, str, Turn]], name: str, report: Report) -> list[Turn]:
    """Name the speakers: who says the first utterance, number 1, is the `speaker`, whom the emotion belongs to."""
    first = rows[0][1] if rows[0][0] % 2 else next((who for index, who, _ in rows if index % 2), "")
    people = {who for _, who, _ in rows}
    if len(people) > 2:
        report.repair(f"{name}:{key}", f"it has {len(people)} speakers; all but the first are the listener.")
    turns = []
    for _, who, turn in rows:
        turn.speaker = ROLES[0] if who == first else ROLES[1]
        if turn.speaker != ROLES[0]:
            turn.emotion = None
        turns.append(turn)
    if len(turns) > 1 and len(people) == 1:
        report.repair(f"{name}:{key}", "all of its utterances are by one person.")
    return turns
