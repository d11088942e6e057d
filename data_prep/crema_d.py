"""CREMA-D: 91 actors say twelve sentences with six feelings, filmed and recorded, and judged by a crowd.

RAW is a clone of the repository, or a part of it: any of the folders `VideoFlash` (.flv), `AudioWAV` (.wav) and
`AudioMP3` (.mp3), at any depth. `1001_IEO_ANG_HI` is actor 1001, the sentence IEO, anger, and a high intensity (LO, MD,
HI, or XX where none was asked for). Files of the same name are one row, and a dialogue of its own. Its picture is the
flv; its sound the wav, else the mp3, else that of the flv, which some lack.

The emotion is the one that the actor was asked for, as in the name; surprise is not among them. `crowd_labels` takes
what most of the crowd saw and heard in it instead: the column MultiModalVote of `processedResults/summaryTable.csv`.
Where the vote is a tie, or the table has no such clip, the row has no emotion: to fall back on the name would mix two
kinds of labels. The labels that an emotion map can name are `ang`, `dis`, `fea`, `hap`, `neu`, `sad`, for both.

Left out: the recordings that are known to be bad (`BAD`), whatever their files look like here, and names with codes
that the corpus does not have. `VideoDemographics.csv` is not needed.

The corpus publishes no splits. Its 91 actors are shuffled by the split seed, and 73 go into train, 9 into validation
and 9 into test: always all 91, so that an actor stays in its split whichever part of the corpus is there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from empathic.data_prep.corpus import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn, divide
from empathic.data_prep.ravdess import SHARES, list_files, note_absent, show_names
from empathic.data_prep.schema import parse_emotion
from empathic.media_empathic import LFS_HEAD

ABOUT = CorpusInfo(
    name="crema-d",
    title="CREMA-D",
    description="91 actors speak twelve sentences with six feelings, filmed and recorded. Each recording is a dialogue "
    "of one turn. The splits are by actor. The emotion is the one that the actor was asked for, unless the crowd's "
    "votes were chosen; the published counts are those of the former.",
    license="odbl",
    license_note="Open Database License 1.0: may be shared and changed with attribution, under the same licence.",
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
    "1076_MTI_NEU_XX": "a known bad recording: it cannot be played, or has no sound.",
    "1076_MTI_SAD_XX": "a known bad recording: it has neither a face nor a voice.",
    "1064_TIE_SAD_XX": "a known bad recording: it has no duration.",
    "1064_IEO_DIS_MD": "a known bad recording: a minute long, with several feelings.",
}

SUFFIXES = ("flv", "wav", "mp3")
SOUNDS = ("wav", "mp3", "flv")  # the best first
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
    except OSError:  # a link to nothing, say: told when the clip is opened
        return False


def _check_pointers(clips: list[Clip], report: Report) -> None:
    """Raises LayoutError for a folder of Git-LFS pointers. Those of AudioMP3 are passed over if there are wavs."""
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
                name, f"{count} of its {len(members)} files are Git-LFS pointers. The sound is that of the wavs."
            )
            continue
        raise LayoutError(
            f"{folder}: {count} of its {len(members)} clips are Git-LFS pointers: text of a few lines in place of the "
            f"clip. {PULL}, or move the folder away to do without it."
        )


def _recordings(files: list[tuple[Path, str]], report: Report) -> dict[str, dict[str, list[Clip]]]:
    """The clips of each recording, by its name and their suffix."""
    recordings: dict[str, dict[str, list[Clip]]] = {}
    seen, copies, clips = set(), [], []
    for path, name in files:
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in SUFFIXES:
            if path.name.lower() != TABLE.lower():
                report.ignore(name, f"none of {', '.join(f'.{known}' for known in SUFFIXES)}.")
            continue
        match = NAME.fullmatch(path.stem)
        if not match:
            report.ignore(name, "its name is not actor, sentence, emotion and level, such as 1001_IEO_ANG_HI.")
            continue
        recording = path.stem
        if match[4] == "X":  # old copies hold 1040_ITH_SAD_X.wav
            recording += "X"
            report.repair(name, f"is named with one X at the end: taken as {recording}.")
        if (recording, suffix) in seen:
            copies.append(name)
        seen.add((recording, suffix))
        clip = Clip(path, name)
        clips.append(clip)
        recordings.setdefault(recording, {kind: [] for kind in SUFFIXES})[suffix].append(clip)
    if copies:
        report.ignore(copies[0], f"{len(copies)} such files are copies of others of the same name.")
    _check_pointers(clips, report)
    return recordings


def _read_votes(raw: Path, files: list[tuple[Path, str]]) -> dict[str, str]:
    """What the crowd voted for each recording: letters, several of them with colons in between for a tie."""
    path = next((path for path, _ in files if path.name.lower() == TABLE.lower()), None)
    if path is None:
        raise LayoutError(
            f"{raw}: the crowd's labels are in processedResults/{TABLE}, which is not there. Take it from "
            f"{ABOUT.homepage}, or do without --crowd-labels."
        )
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        table = csv.DictReader(file)
        columns = {column.strip().lower(): column for column in table.fieldnames or ()}
        if "filename" not in columns or VOTE.lower() not in columns:
            seen = ", ".join(table.fieldnames or ()) or "nothing"
            raise LayoutError(
                f"{path}: expected the columns FileName and {VOTE}, saw {seen}. Take it from {ABOUT.homepage} again."
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
        report.repair(where, f"{TABLE} has no vote on it. It is kept without an emotion.")
    elif ":" in vote:
        report.repair(where, f"the crowd's vote is a tie, {vote}. It is kept without an emotion.")
    else:
        report.repair(where, f"the crowd's vote {vote!r} is none of {', '.join(VOTES)}. It is kept without an emotion.")
    return None


def _find_fault(recording: str, codes: dict[str, str]) -> str | None:
    """Why a recording is no row, by its name alone."""
    if recording in BAD:
        return BAD[recording]
    for field, code in codes.items():
        if code not in CODES[field]:
            known = CODES[field] if field != "actor" else ("1001 to 1091",)
            return f"its {field} {code} is none of {', '.join(known)}. Check the name."
    return None


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    The recordings, each a dialogue of one turn, sorted by split and name.

    Raises:
        LayoutError: if there is not a single clip of the corpus, if a folder holds Git-LFS pointers in place of its
            clips, or if the crowd's labels are wanted and their table is not there.
    """
    files = list_files(raw, report, skip=options.unpacked)
    recordings = _recordings(files, report)
    if not recordings:
        raise LayoutError(
            f"{raw}: holds no clip of CREMA-D. Expected VideoFlash/*.flv, AudioWAV/*.wav or AudioMP3/*.mp3, named like "
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
