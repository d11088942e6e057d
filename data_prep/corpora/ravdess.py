"""RAVDESS, speech: 24 actors say two sentences with eight emotions, as audio and video.

RAW contains the downloaded zips (`Video_Speech_Actor_01.zip` ..., `Audio_Speech_Actors_01-24.zip`) or their unpacked
files, at any depth. A file name has seven codes, such as `01-01-05-02-02-01-16.mp4`:

| code | meaning |
|---|---|
| modality | 01 video with audio, 02 video without audio, 03 audio |
| channel | 01 speech, 02 song |
| emotion | 01 neutral, 02 calm, 03 happy, 04 sad, 05 angry, 06 fearful, 07 disgust, 08 surprised |
| intensity | 01 normal, 02 strong |
| statement | 01 "Kids are talking by the door", 02 "Dogs are sitting by the door" |
| repetition | 01, 02 |
| actor | 01 to 24 |

Files that differ only in the modality are one performance: one row, which is a dialogue of its own, both named by the
other six codes (`01-05-02-02-01-16`). Modality 01 gives the video, else 02; modality 03 gives the audio, else 01. If a
file exists several times, the first copy is used, or a later copy if the first cannot be read.

Left out: songs, codes outside of the table, and calm, which is not one of the seven emotions. `keep_calm` maps calm to
neutral; an emotion map can map it to another emotion, `{"calm": "sad"}`, or keep it without a label, `{"calm": None}`.
An emotion map uses the labels of the table.

The corpus has no published splits. The 24 actors are shuffled by the split seed: 19 train, 3 validation, 2 test. All 24
actors are always shuffled, so that an actor stays in its split when more of the corpus is downloaded.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..archives import DAMAGE, unpack
from ..schema import parse_emotion
from .base import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn, divide

ABOUT = CorpusInfo(
    name="ravdess",
    title="RAVDESS (speech)",
    description="24 actors speak two sentences with eight emotions in two intensities, with audio and video. Each "
    "performance is a dialogue of one turn. The splits are by actor. Of the 1,440 performances, 192 are calm, which is "
    "not one of the seven emotions: they are left out by default, and the published counts exclude them.",
    license="cc-by-nc-sa-4.0",
    license_note="CC BY-NC-SA 4.0: may be shared with attribution, for non-commercial use, under the same license.",
    redistributable=True,
    homepage="https://zenodo.org/records/1188976",
    published={
        "all": {
            "rows": 1248,
            "neutral": 96,
            "happy": 192,
            "sad": 192,
            "angry": 192,
            "fearful": 192,
            "disgust": 192,
            "surprise": 192,
        }
    },
)

LABELS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fearful",
    "07": "disgust",
    "08": "surprised",
}
MAPPING = {"surprised": "surprise"}
STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
ACTORS = tuple(f"{number:02d}" for number in range(1, 25))
CODES = {
    "channel": ("01", "02"),
    "emotion": tuple(LABELS),
    "intensity": ("01", "02"),
    "statement": tuple(STATEMENTS),
    "repetition": ("01", "02"),
    "actor": ACTORS,
}
MODALITIES = ("01", "02", "03")
PICTURES, SOUNDS = ("01", "02"), ("03", "01")  # best first
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}

CLIP_NAME = re.compile(r"(\d\d)-(\d\d(?:-\d\d){5})\.(mp4|wav)", re.IGNORECASE)
ACTOR_FOLDER = re.compile(r"actor_(\d+)", re.IGNORECASE)
SONG = "02"
LAYOUT = (
    "Expected Video_Speech_Actor_01.zip ... 24.zip and Audio_Speech_Actors_01-24.zip, or their unpacked files: "
    "files named like Actor_16/01-01-05-02-02-01-16.mp4"
)


@dataclass(frozen=True)
class _File:
    """One file of a performance; `suffix` is `mp4` or `wav`."""

    modality: str
    suffix: str
    clip: Clip


def list_files(folder: Path, report: Report, skip: Path | None = None) -> list[tuple[Path, str]]:
    """
    List all files below a folder, following symlinks, with their names relative to the folder, sorted by name.

    Args:
        folder: the folder.
        report: receives what is skipped: files of macOS, hidden folders and folders that cannot be read.
        skip: a folder to skip.
    """
    files, macos, seen = [], [], set()

    def note(error: OSError) -> None:
        report.ignore(str(error.filename), f"it cannot be read ({error.strerror}).")

    for place, folders, names in os.walk(folder, onerror=note, followlinks=True):
        here = os.path.realpath(place)
        if here in seen or (
            skip is not None and here == os.path.realpath(skip)
        ):  # such as a symlink to a parent folder
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        above = "" if Path(place) == folder else Path(place).relative_to(folder).as_posix() + "/"
        for name in [name for name in folders if name == "__MACOSX" or name.startswith(".")]:
            folders.remove(name)
            reason = "a folder of macOS." if name == "__MACOSX" else "a hidden folder."
            report.ignore(above + name, reason)
        for name in names:
            if name.startswith("._") or name == ".DS_Store":
                macos.append(above + name)
            else:
                files.append((Path(place, name), above + name))
    if macos:
        report.ignore(min(macos), f"{len(macos)} such files of macOS, which are not clips.")
    return sorted(files, key=lambda file: file[1])


def show_names(names: list[str]) -> str:
    """The first names, for an error message about the files that were found."""
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "no files"


def _all_files(raw: Path, report: Report, options: Options) -> list[tuple[Path, str]]:
    """List the files below RAW and in its zips. A zip is unpacked if it has speech clips that are not unpacked yet."""
    files = list_files(raw, report, skip=options.unpacked)
    known = {path.name for path, _ in files}
    clips = [(path, name) for path, name in files if path.suffix.lower() != ".zip"]
    for path, name in files:
        if path.suffix.lower() != ".zip":
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                members = {os.path.basename(member) for member in archive.namelist()}
        except (*DAMAGE, OSError) as error:
            report.ignore(name, f"it cannot be read as a zip ({error}). Download it again.")
            continue
        matches = [match for match in map(CLIP_NAME.fullmatch, members) if match]
        if not matches:
            report.ignore(name, "it has no clip of this corpus.")
        elif all(match[2].startswith(SONG) for match in matches):
            report.ignore(name, "it has songs only and was not unpacked: the rows are speech.")
        elif all(match[0] in known for match in matches):
            report.ignore(name, "it was not unpacked: all of its clips are there already.")
        else:
            # Zips with equal names in two folders are unpacked to different folders.
            folder = unpack(path, options.unpacked / Path(name).parent, report)
            unpacked = list_files(folder, report)
            clips += [(file, f"{name}/{inner}") for file, inner in unpacked]
            known |= {file.name for file, _ in unpacked}
    return clips


def _performances(files: list[tuple[Path, str]], report: Report) -> dict[str, list[_File]]:
    """Group the files by performance: the six codes of the performance -> files."""
    performances: dict[str, list[_File]] = {}
    seen, copies = set(), []
    for path, name in files:
        match = CLIP_NAME.fullmatch(path.name)
        if not match:
            clip = path.suffix.lower() in (".mp4", ".wav")
            codes = "its name is not seven codes of two digits, such as 01-01-05-02-02-01-16.mp4."
            report.ignore(name, codes if clip else "it is neither a .mp4 nor a .wav file.")
            continue
        modality, performance, suffix = match.groups()
        if modality not in MODALITIES:
            report.ignore(name, f"its modality {modality} is not one of {', '.join(MODALITIES)}.")
            continue
        if path.name.lower() in seen:
            copies.append(name)
        seen.add(path.name.lower())
        performances.setdefault(performance, []).append(_File(modality, suffix.lower(), Clip(path, name)))
    if copies:
        report.ignore(copies[0], f"{len(copies)} such files are copies of other files with the same name.")
    return performances


def _find_fault(codes: dict[str, str]) -> str | None:
    """Why a performance is not a row, judged by its codes only; None if there is no fault."""
    for field, code in codes.items():
        if code not in CODES[field]:
            return f"its {field} {code} is not one of {CODES[field][0]} to {CODES[field][-1]}. Check the name."
    return "it is a song: the rows are speech." if codes["channel"] == SONG else None


def _note_folders(files: list[_File], actor: str, report: Report) -> None:
    for file in files:
        folders = [ACTOR_FOLDER.fullmatch(folder) for folder in file.clip.name.split("/")[:-1]]
        inner = next((folder for folder in reversed(folders) if folder), None)
        if inner and int(inner[1]) != int(actor):
            report.repair(
                file.clip.name, f"it is in {inner[0]}, but its name says actor {actor}: read as Actor_{actor}."
            )


def _turn(performance: str, files: list[_File], codes: dict[str, str], emotion: str | None) -> Turn:
    def clips(modalities: tuple[str, ...], suffixes: tuple[str, ...]) -> tuple[Clip, ...]:
        chosen = [file for file in files if file.modality in modalities and file.suffix in suffixes]
        return tuple(file.clip for file in sorted(chosen, key=lambda file: modalities.index(file.modality)))

    return Turn(
        where=files[0].clip.name,
        utterance_id=performance,
        speaker=f"Actor_{codes['actor']}",
        text=STATEMENTS[codes["statement"]],
        emotion=emotion,
        video=clips(PICTURES, ("mp4",)),
        audio=clips(SOUNDS, ("mp4", "wav")),
        needs_media=True,
    )


def note_absent(turns: list[Turn], pictures: str, sounds: str, report: Report) -> None:
    """
    Report the turns without a video or audio file: each turn, or one entry if no turn has such a file.

    Args:
        turns: all turns.
        pictures, sounds: where to get the video and audio files.
        report: the report.
    """
    for kind, source in (("video", pictures), ("audio", sounds)):
        absent = [turn for turn in turns if not (turn.video if kind == "video" else turn.audio)]
        if len(absent) == len(turns) > 1:
            report.lack_media("all rows", f"there is no {kind}. Add {source} to include it.")
        else:
            for turn in absent:
                report.lack_media(turn.where, f"there is no {kind} of this turn. Look for it in {source}.")


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the performances, each as a dialogue of one turn, sorted by split, actor and codes.

    Args:
        raw: the folder.
        report: the report.
        options: `unpacked`, `split_seed`, `emotion_map` and `keep_calm` are used.

    Raises:
        LayoutError: if there is no clip of the corpus.
    """
    files = _all_files(raw, report, options)
    performances = _performances(files, report)
    if not performances:
        raise LayoutError(
            f"{raw}: has no clip of RAVDESS. {LAYOUT}; saw {show_names([line['item'] for line in report.ignored])}. "
            "Give the folder with these files; unpack a zip that contains zips."
        )
    calm = {"calm": "neutral"} if options.keep_calm else {}
    mapping = {**MAPPING, **calm, **options.emotion_map}
    turns = []
    for performance in sorted(performances, key=lambda codes: (codes[-2:], codes)):
        report.find()
        files_here = performances[performance]
        codes = dict(zip(CODES, performance.split("-"), strict=True))
        fault = _find_fault(codes)
        if fault:
            report.leave_out(files_here[0].clip.name, fault)
            continue
        label = LABELS[codes["emotion"]]
        if label == "calm" and label not in mapping:
            report.leave_out(
                files_here[0].clip.name, "calm is not one of the seven emotions; --keep_calm maps it to neutral."
            )
            continue
        _note_folders(files_here, codes["actor"], report)
        turns.append(_turn(performance, files_here, codes, parse_emotion(label, mapping)))
    note_absent(turns, "Video_Speech_Actor_*.zip", "Audio_Speech_Actors_01-24.zip", report)
    splits = divide((f"Actor_{actor}" for actor in ACTORS), SHARES, options.split_seed)
    for split in SHARES:
        for turn in turns:
            if splits[turn.speaker] == split:
                yield Dialogue(split, turn.utterance_id, [turn])
