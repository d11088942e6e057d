"""CREMA-D: 91 actors say twelve sentences with six emotions, as audio and video, rated by a crowd.

RAW is a clone of the repository or a part of it: any of the folders `VideoFlash` (.flv), `AudioWAV` (.wav) and
`AudioMP3` (.mp3), at any depth. `1001_IEO_ANG_HI` is actor 1001, the sentence IEO, anger, and a high intensity (LO, MD,
HI, or XX for unspecified). Files with equal names are one row, which is a dialogue of its own. The flv file gives the
video. The wav file gives the audio, else the mp3 file, else the flv file, if it has audio.

The emotion is the emotion that the actor was asked to express, from the file name; there is no surprise. With
`crowd_labels` it is the majority vote of the crowd on the audio-visual clip instead: the column MultiModalVote of
`processedResults/summaryTable.csv`. If the vote is a tie, or the clip is not in the table, the row has no emotion,
because using the file name would mix two kinds of labels. In both cases, the labels for an emotion map are `ang`,
`dis`, `fea`, `hap`, `neu` and `sad`.

Left out: the recordings that are known to be bad (`BAD`), regardless of their files, and names with codes that the
corpus does not have. `VideoDemographics.csv` is not needed.

The corpus has no published splits. Its 91 actors are shuffled by the split seed: 73 train, 9 validation, 9 test. All 91
actors are always shuffled, so that the split of an actor does not depend on which part of the corpus is present.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from ...media_empathic import LFS_HEAD
from ..schema import parse_emotion
from .base import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn, divide
from .ravdess import SHARES, list_files, note_absent, show_names

ABOUT = CorpusInfo(
    name="crema-d",
    title="CREMA-D",
    description="91 actors speak twelve sentences with six emotions, with audio and video. Each recording is a "
    "dialogue of one turn. The splits are by actor. The emotion is the emotion that the actor was asked to express, "
    "unless the crowd's votes were chosen; the published counts are for the requested emotions.",
    license="odbl",
    license_note="Open Database License 1.0: may be shared and changed with attribution, under the same license.",
    redistributable=True,
    homepage="https://github.com/CheyneyComputerScience/CREMA-D",
    published={
        "all": {
            "rows": 7442,
            "angry": 1271,
            "disgust": 1271,
            "fearful": 1271,
            "happy": 1271,
            "neutral": 1087,
            "sad": 1271,
        }
    },
)

MAPPING = {"ang": "angry", "dis": "disgust", "fea": "fearful", "hap": "happy", "neu": "neutral", "sad": "sad"}
VOTES = {label[0].upper(): label for label in MAPPING}  # A, D, F, H, N, S
SENTENCES = {
    "IEO": "It's eleven o'clock",
    "TIE": "That is exactly what happened",
    "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about",
    "TAI": "The airplane is almost full",
    "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock",
    "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket",
    "ITS": "I think I've seen this before",
    "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes",
}
CODES = {
    "actor": tuple(str(number) for number in range(1001, 1092)),
    "sentence": tuple(SENTENCES),
    "emotion": tuple(label.upper() for label in MAPPING),
    "level": ("LO", "MD", "HI", "XX"),
}
BAD = {
    "1076_MTI_NEU_XX": "a known bad recording: it cannot be played, or has no audio.",
    "1076_MTI_SAD_XX": "a known bad recording: it has neither a face nor a voice.",
    "1064_TIE_SAD_XX": "a known bad recording: it has no duration.",
    "1064_IEO_DIS_MD": "a known bad recording: it is a minute long, with several emotions.",
}

SUFFIXES = ("flv", "wav", "mp3")
SOUNDS = ("wav", "mp3", "flv")  # best first
NAME = re.compile(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_([A-Z]{1,2})")
TABLE, VOTE = "summaryTable.csv", "MultiModalVote"
POINTER_BYTES = 1024  # no Git-LFS pointer is longer
NEARLY_ALL = 0.9
PULL = "The repository keeps its clips in Git LFS. Run `git lfs install && git lfs pull` in it"


def _is_pointer(path: Path) -> bool:
    try:
        if path.stat().st_size > POINTER_BYTES:
            return False
        with open(path, "rb") as file:
            return file.read(len(LFS_HEAD)) == LFS_HEAD
    except OSError:  # such as a dangling symlink, which is reported when the clip is opened
        return False


def _check_pointers(clips: list[Clip], report: Report) -> None:
    """LayoutError for a folder of Git-LFS pointers. Pointers in AudioMP3 are only reported if there are wav files."""
    folders: dict[Path, list[Clip]] = {}
    pointers = {clip.path for clip in clips if _is_pointer(clip.path)}
    for clip in clips:
        folders.setdefault(clip.path.parent, []).append(clip)
    has_wav = any(clip.path.suffix.lower() == ".wav" for clip in clips)
    for folder, members in folders.items():
        count = sum(clip.path in pointers for clip in members)
        if count < NEARLY_ALL * len(members):
            continue
        name = members[0].name.rpartition("/")[0] or folder.name
        if has_wav and all(clip.path.suffix.lower() == ".mp3" for clip in members):
            report.ignore(
                name, f"{count} of its {len(members)} files are Git-LFS pointers. The wav files are used for the audio."
            )
            continue
        raise LayoutError(
            f"{folder}: {count} of its {len(members)} clips are Git-LFS pointers: a few lines of text instead of the "
            f"clip. {PULL}, or move the folder away to omit it."
        )


def _recordings(files: list[tuple[Path, str]], report: Report) -> dict[str, dict[str, list[Clip]]]:
    """Group the clips: name of the recording -> suffix -> clips."""
    recordings: dict[str, dict[str, list[Clip]]] = {}
    seen, copies, clips = set(), [], []
    for path, name in files:
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in SUFFIXES:
            if path.name.lower() != TABLE.lower():
                report.ignore(name, f"it is not one of {', '.join(f'.{known}' for known in SUFFIXES)}.")
            continue
        match = NAME.fullmatch(path.stem)
        if not match:
            report.ignore(name, "its name is not actor, sentence, emotion and level, such as 1001_IEO_ANG_HI.")
            continue
        recording = path.stem
        if match[4] == "X":  # old copies contain 1040_ITH_SAD_X.wav
            recording += "X"
            report.repair(name, f"its name ends in a single X: read as {recording}.")
        if (recording, suffix) in seen:
            copies.append(name)
        seen.add((recording, suffix))
        clip = Clip(path, name)
        clips.append(clip)
        recordings.setdefault(recording, {kind: [] for kind in SUFFIXES})[suffix].append(clip)
    if copies:
        report.ignore(copies[0], f"{len(copies)} such files are copies of other files with the same name.")
    _check_pointers(clips, report)
    return recordings


def _read_votes(raw: Path, files: list[tuple[Path, str]]) -> dict[str, str]:
    """Read the crowd's vote for each recording: one letter, or several letters joined by colons for a tie."""
    path = next((path for path, _ in files if path.name.lower() == TABLE.lower()), None)
    if path is None:
        raise LayoutError(
            f"{raw}: the crowd's labels are in processedResults/{TABLE}, which is not there. Get it from "
            f"{ABOUT.homepage}, or omit --crowd_labels."
        )
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        table = csv.DictReader(file)
        columns = {column.strip().lower(): column for column in table.fieldnames or ()}
        if "filename" not in columns or VOTE.lower() not in columns:
            seen = ", ".join(table.fieldnames or ()) or "nothing"
            raise LayoutError(
                f"{path}: expected the columns FileName and {VOTE}, saw {seen}. Get it from {ABOUT.homepage} again."
            )
        votes: dict[str, str] = {}
        for row in table:
            name = (row[columns["filename"]] or "").strip()
            votes.setdefault(name + "X" if name.endswith("_X") else name, (row[columns[VOTE.lower()]] or "").strip())
    return votes


def _crowd_label(where: str, recording: str, votes: dict[str, str], report: Report) -> str | None:
    vote = votes.get(recording)
    if vote in VOTES:
        return VOTES[vote]
    if vote is None:
        report.repair(where, f"{TABLE} has no vote on this recording. It is kept without an emotion.")
    elif ":" in vote:
        report.repair(where, f"the crowd's vote is a tie, {vote}. It is kept without an emotion.")
    else:
        report.repair(
            where, f"the crowd's vote {vote!r} is not one of {', '.join(VOTES)}. It is kept without an emotion."
        )
    return None


def _find_fault(recording: str, codes: dict[str, str]) -> str | None:
    """Why a recording is not a row, judged by its name only; None if there is no fault."""
    if recording in BAD:
        return BAD[recording]
    for field, code in codes.items():
        if code not in CODES[field]:
            known = CODES[field] if field != "actor" else ("1001 to 1091",)
            return f"its {field} {code} is not one of {', '.join(known)}. Check the name."
    return None


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the recordings, each as a dialogue of one turn, sorted by split and name.

    Args:
        raw: the folder.
        report: the report.
        options: `unpacked`, `split_seed`, `emotion_map` and `crowd_labels` are used.

    Raises:
        LayoutError: if there is no clip of the corpus, if a folder has Git-LFS pointers instead of clips, or if
            `crowd_labels` is set and the table of the votes does not exist.
    """
    files = list_files(raw, report, skip=options.unpacked)
    recordings = _recordings(files, report)
    if not recordings:
        raise LayoutError(
            f"{raw}: has no clip of CREMA-D. Expected VideoFlash/*.flv, AudioWAV/*.wav or AudioMP3/*.mp3, named like "
            f"1001_IEO_ANG_HI; saw {show_names([name for _, name in files])}. Give the folder of the cloned "
            "repository; unpack it first if it is an archive."
        )
    votes = _read_votes(raw, files) if options.crowd_labels else None
    mapping = {**MAPPING, **options.emotion_map}
    turns = []
    for recording in sorted(recordings):
        report.find()
        clips = recordings[recording]
        where = next(kind[0].name for kind in clips.values() if kind)
        codes = dict(zip(CODES, recording.split("_"), strict=True))
        fault = _find_fault(recording, codes)
        if fault:
            report.leave_out(where, fault)
            continue
        label = codes["emotion"].lower() if votes is None else _crowd_label(where, recording, votes, report)
        turns.append(
            Turn(
                where=where,
                utterance_id=recording,
                speaker=codes["actor"],
                text=SENTENCES[codes["sentence"]],
                emotion=parse_emotion(label, mapping),
                video=tuple(clips["flv"]),
                audio=tuple(clip for kind in SOUNDS for clip in clips[kind]),
                needs_media=True,
            )
        )
    note_absent(turns, "VideoFlash", "AudioWAV", report)
    splits = divide(CODES["actor"], SHARES, options.split_seed)
    for split in SHARES:
        for turn in turns:
            if splits[turn.speaker] == split:
                yield Dialogue(split, turn.utterance_id, [turn])
