"""IEMOCAP (full release): ten actors in pairs, five sessions, improvised and scripted scenes, with audio and video.

RAW is the folder `IEMOCAP_full_release`, a folder that contains it at any depth, or the original archive
(`IEMOCAP_full_release*.tar.gz`). Folder names may be in any case. The files read from each session, where `<dlg>` is a
dialogue such as `Ses01F_impro01` and `<utt>` an utterance such as `Ses01F_impro01_M003`:

| file | content |
|---|---|
| `dialog/transcriptions/<dlg>.txt` | the rows: `<utt> [006.2901-008.2357]: Excuse me.` |
| `dialog/EmoEvaluation/<dlg>.txt` | the labels: `[6.2901 - 8.2357]<tab><utt><tab>neu<tab>[2.5000, 2.5000, 2.5000]` |
| `sentences/wav/<dlg>/<utt>.wav` | the audio; if this file is missing, the audio is cut from `dialog/wav/<dlg>.wav` |
| `dialog/avi/DivX/<dlg>.avi` | the video, cut to the utterance and cropped to the half that shows its speaker |

The last letter in an utterance's name gives its speaker, so there are ten speakers: `Ses01F`, `Ses01M`, ... The letter
after the session gives the actor with the motion capture markers, who is in the left half of the video; the other actor
is in the right half.

The turns of a dialogue are sorted by start time; a turn without a time follows the previous line. The labels hap and
exc become `happy`; fru (frustrated), xxx (no agreement) and oth (other) are not among the seven emotions, and their
turns are kept without a label. An emotion map uses the labels of the corpus: `{"fru": "angry", "exc": None}`.

An utterance without a label is kept without one. A label whose utterance is not in the transcript is left out, because
its text is unknown. Lines of the transcripts without a numbered utterance (`F: ...`, `..._MXX0`) are not rows.

The corpus has no published splits; the paper uses a random 90% for training and 10% for testing. Here whole dialogues
are drawn at random, by the split seed, from the available dialogues.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...media_empathic import LFS_HEAD
from ..archives import unpack
from ..schema import SchemaError, parse_emotion
from ..text import clean_text
from .base import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn, divide

MAPPING = {
    "ang": "angry",
    "hap": "happy",
    "exc": "happy",
    "sad": "sad",
    "neu": "neutral",
    "fea": "fearful",
    "sur": "surprise",
    "dis": "disgust",
    "fru": None,
    "xxx": None,
    "oth": None,
}
SHARES = {"train": 0.9, "test": 0.1}
SESSIONS = range(1, 6)
SAME = 0.01  # tolerated difference between the times of transcript and label, in seconds

ABOUT = CorpusInfo(
    name="iemocap",
    title="IEMOCAP",
    description="Ten actors talk in pairs, in improvised and scripted scenes, with audio and video. Utterances labeled "
    "frustrated or other, or on which the raters did not agree, have no emotion and are kept to complete their "
    "dialogue. The splits are random, by dialogue.",
    license="other",
    license_note="Available from its owners on request, for research; it must not be redistributed.",
    redistributable=False,
    homepage="https://sail.usc.edu/iemocap/",
    published={
        "all": {
            "rows": 10039,
            "dialogues": 151,
            "angry": 1103,
            "disgust": 2,
            "fearful": 40,
            "happy": 595 + 1041,
            "neutral": 1708,
            "sad": 1084,
            "surprise": 107,
            "none": 2507 + 1849 + 3,
        }
    },
)

_DIALOGUE = re.compile("Ses0[1-5][FM]_(?:impro[0-9]{2}[ab]?|script[0-9]{2}_[0-9]b?)")
_UTTERANCE = re.compile(f"({_DIALOGUE.pattern})_([FM])[0-9]+")
_ARCHIVE = re.compile("iemocap_full_release.*[.](?:tar[.]gz|tgz|tar|zip)", re.IGNORECASE)
_LINE = re.compile(r"(\S+?)\s*(?:\[([^\]]*)\]\s*:?|:)\s*(.*)")
_LABEL = re.compile(r"\[([^\]]*)\]\s*(\S+)\s*([^\s\[]*)")
_TIMES = re.compile(r"\s*([0-9]+(?:[.][0-9]+)?)\s*-\s*([0-9]+(?:[.][0-9]+)?)\s*")


@dataclass
class _Files:
    """
    The files below a folder by kind; each entry lists all copies of a file.

    Args:
        transcripts, labels, pictures, sounds: name of the dialogue -> files.
        sentences: name of the utterance -> files.
        archives: archives that may contain the corpus.
        others: number of files that are not read, by (folder or kind, reason).
    """

    transcripts: dict[str, list[Clip]] = field(default_factory=dict)
    labels: dict[str, list[Clip]] = field(default_factory=dict)
    pictures: dict[str, list[Clip]] = field(default_factory=dict)
    sounds: dict[str, list[Clip]] = field(default_factory=dict)
    sentences: dict[str, list[Clip]] = field(default_factory=dict)
    archives: list[Clip] = field(default_factory=list)
    others: Counter[tuple[str, str]] = field(default_factory=Counter)

    def kinds(self) -> list[dict[str, list[Clip]]]:
        return [self.transcripts, self.labels, self.pictures, self.sounds, self.sentences]


@dataclass
class _Label:
    """A label line of a file in EmoEvaluation."""

    where: str
    label: str
    times: tuple[float, float] | None


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the dialogues of IEMOCAP: first train, then test, each sorted by name.

    Args:
        raw: the folder or the archive.
        report: receives every utterance, line and file with a problem.
        options: `unpacked`, `split_seed`, `emotion_map` and `crop` are used.

    Raises:
        LayoutError: if there are no transcripts or no labels, or if they are Git-LFS pointers.
    """
    files = _find_files(raw, report, options)
    labels = {name: _read_labels(copies[0], report) for name, copies in sorted(files.labels.items())}
    splits = divide(files.transcripts, SHARES, options.split_seed)
    used: set[str] = set()
    for split in SHARES:
        for name in sorted(files.transcripts):
            if splits[name] != split:
                continue
            turns = _read_dialogue(name, files, labels.pop(name, None), report, options)
            used.update(turn.utterance_id for turn in turns)
            if turns:
                yield Dialogue(split, name, turns)
            else:
                report.ignore(files.transcripts[name][0].name, "the transcript has no utterance.")
    for name, found in labels.items():
        for utterance, label in found.items():
            report.find()
            reason = f"there is no dialog/transcriptions/{name}.txt, so the text of {utterance} is unknown."
            report.leave_out(label.where, reason)
    _report_unused(files, used, report)


# Files ---------------------------------------------------------------------------------------------------------------


def _find_files(raw: Path, report: Report, options: Options) -> _Files:
    files = _Files()
    if raw.is_file():
        files.archives.append(Clip(raw, raw.name))
    else:
        _scan(raw, raw, files, options.unpacked)
    for archive in sorted(files.archives, key=lambda clip: clip.name):
        if files.transcripts:
            report.ignore(
                archive.name, "it was not unpacked: there are transcripts already. To read it, move them away."
            )
        else:
            _scan(unpack(archive.path, options.unpacked, report), options.unpacked, files)
    for what, found in (("transcriptions", files.transcripts), ("EmoEvaluation", files.labels)):
        if not found:
            seen = sorted(os.listdir(raw))[:10] if raw.is_dir() else [f"the file {raw.name}"]
            raise LayoutError(
                f"{raw}: expected Session1 to Session5 with files such as dialog/{what}/Ses01F_impro01.txt, "
                f"but there is no such file, only {', '.join(seen) or 'an empty folder'}. Give the folder "
                "IEMOCAP_full_release, or IEMOCAP_full_release.tar.gz."
            )
    again = 0
    for copies in (copies for kind in files.kinds() for copies in kind.values()):
        copies.sort(key=lambda clip: (clip.name.count("/"), clip.name))
        again += len(copies) > 1
    if again:
        report.ignore(f"{again} files", "they exist more than once; the readable copy nearest to RAW is used.")
    for (item, reason), count in sorted(files.others.items()):
        report.ignore(f"{item} ({count} files)" if count > 1 else item, reason)
    there = {int(name[4]) for name in files.transcripts}
    for session in SESSIONS:
        if session not in there:
            report.ignore(f"Session{session}", "there is no transcript of this session, so it is not in the output.")
    return files


def _scan(root: Path, base: Path, files: _Files, skip: Path | None = None) -> None:
    """Add each file below `root` to `files`, with its name relative to `base`."""
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
            _sort_file(path, path.relative_to(base), files)


def _sort_file(path: Path, relative: Path, files: _Files) -> None:
    clip, parents = Clip(path, relative.as_posix()), [part.lower() for part in relative.parts[:-1]]
    stem, suffix = path.stem, path.suffix.lower()
    folder = parents[-1] if parents else ""
    if path.name.startswith("._") or path.name == ".DS_Store" or "__macosx" in parents:
        files.others["._* and the like", "files of macOS, not part of the corpus."] += 1
        return
    if _ARCHIVE.fullmatch(path.name):
        files.archives.append(clip)
        return
    kind = None
    if _DIALOGUE.fullmatch(stem):
        if suffix == ".txt" and folder in ("transcriptions", "emoevaluation"):
            kind = files.transcripts if folder == "transcriptions" else files.labels
        elif suffix == ".avi" and "avi" in parents:
            kind = files.pictures
        elif suffix == ".wav" and folder == "wav":
            kind = files.sounds
    elif _UTTERANCE.fullmatch(stem) and suffix == ".wav" and "sentences" in parents:
        kind = files.sentences
    if kind is not None:
        kind.setdefault(stem, []).append(clip)
        return
    # Motion capture, alignments and the ratings of single raters: tens of thousands of files, reported per folder.
    place = next((i for i, part in enumerate(parents) if part in ("dialog", "sentences")), None)
    if folder in ("transcriptions", "emoevaluation", "divx"):
        files.others[relative.as_posix(), "it is not named as a dialogue of IEMOCAP."] += 1
    elif place is None:
        files.others[relative.as_posix(), "it is not read."] += 1
    else:
        end = min(place + (3 if parents[place] == "dialog" else 2), len(parents))
        files.others["/".join(relative.parts[place:end]) + "/", "it is not read."] += 1


def _report_unused(files: _Files, used: set[str], report: Report) -> None:
    """Report the clips that no turn uses."""
    dialogues = {utterance.rpartition("_")[0] for utterance in used}
    for kind, keys in ((files.pictures, dialogues), (files.sounds, dialogues), (files.sentences, used)):
        unused = [clip.name for name, copies in sorted(kind.items()) if name not in keys for clip in copies]
        if unused:
            item = f"{len(unused)} files, the first {unused[0]}" if len(unused) > 1 else unused[0]
            report.ignore(item, "no utterance of a transcript belongs to it.")


def _lines(file: Clip, report: Report) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of each non-empty line; a line that is not UTF-8 is read as cp1252, the Windows encoding."""
    data = file.path.read_bytes()
    if data.startswith(LFS_HEAD):
        raise LayoutError(f"{file.path}: is a Git-LFS pointer, not the file itself. Run `git lfs pull`.")
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        where = f"{file.name}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            text = line.decode("cp1252", "replace")
            report.repair(where, f"byte {error.start} is not UTF-8. The line was read as cp1252.")
        if text.strip():
            yield where, text.strip()


def _parse_times(text: str | None) -> tuple[float, float] | None:
    """Parse the times of `006.2901-008.2357` in seconds; None unless the end is after the start."""
    match = _TIMES.fullmatch(text or "")
    times = (float(match[1]), float(match[2])) if match else None
    return times if times and times[1] > times[0] else None


def _read_labels(file: Clip, report: Report) -> dict[str, _Label]:
    """Read the labels of a dialogue by utterance, in the order of the file. The lines of single raters are skipped."""
    found: dict[str, _Label] = {}
    for where, line in _lines(file, report):
        match = _LABEL.match(line)
        if match is None:
            continue
        times, utterance, label = match.groups()
        name = _UTTERANCE.fullmatch(utterance)
        if name is None or name[1] != file.path.stem:
            report.ignore(where, f"{utterance!r} is not a numbered utterance of this dialogue.")
        elif utterance in found:
            report.ignore(where, f"the label of {utterance} is in {found[utterance].where} already.")
        else:
            found[utterance] = _Label(where, label, _parse_times(times))
    return found


# Turns ---------------------------------------------------------------------------------------------------------------


def _read_dialogue(
    name: str, files: _Files, labels: dict[str, _Label] | None, report: Report, options: Options
) -> list[Turn]:
    """Read the turns of a dialogue, sorted by start time; problems are reported."""
    file = files.transcripts[name][0]
    if labels is None:
        report.repair(file.name, f"there is no dialog/EmoEvaluation/{name}.txt. Its turns are kept without a label.")
    seen: dict[str, str] = {}
    turns: list[tuple[float, Turn]] = []
    for where, line in _lines(file, report):
        match = _LINE.fullmatch(line)
        utterance, times, text = match.groups() if match else (line, None, "")
        known = _UTTERANCE.fullmatch(utterance)
        if match is None or known is None:
            report.ignore(where, f"no numbered utterance: {line[:60]!r}.")
            continue
        report.find()
        if known[1] != name:
            report.leave_out(where, f"{utterance} is an utterance of another dialogue, {known[1]}.")
            continue
        if utterance in seen:
            report.leave_out(where, f"{utterance} is in {seen[utterance]} already.")
            continue
        seen[utterance] = where
        text, reasons = clean_text(text)
        for reason in reasons:
            report.repair(where, reason)
        label = labels.get(utterance) if labels is not None else None
        if labels is not None and label is None:
            report.repair(where, f"{utterance} has no label. The turn is kept without it.")
        start, end = _choose_times(where, times, label, report)
        turn = Turn(where, utterance, name[:5] + known[2], text, _emotion(label, options, report), start, end)
        before = turns[-1][0] if turns else 0.0
        turns.append((before if start is None else start, turn))
    for utterance, label in (labels or {}).items():
        if utterance not in seen:
            report.find()
            report.leave_out(label.where, f"{utterance} is not in {file.name}, so its text is unknown.")
    turns.sort(key=lambda item: item[0])  # stable
    ordered = [turn for _, turn in turns]
    _add_clips(name, ordered, files, report, options)
    return ordered


def _choose_times(
    where: str, written: str | None, label: _Label | None, report: Report
) -> tuple[float | None, float | None]:
    """Choose the times of the transcript or, if they are invalid, the times of the label."""
    times, other = _parse_times(written), label.times if label else None
    if times is None:
        shown = f"the times [{written}] are not a start before an end" if written is not None else "it has no times"
        if other is None:
            report.repair(where, f"{shown}. The turn is kept without times.")
            return None, None
        report.repair(where, f"{shown}; the times in {label.where} are used.")
        return other
    if other is not None and max(abs(a - b) for a, b in zip(times, other, strict=True)) > SAME:
        reason = f"it lasts from {times[0]} s to {times[1]} s, in {label.where} from {other[0]} s to {other[1]} s. "
        report.repair(where, reason + "The times of the transcript are used.")
    return times


def _emotion(label: _Label | None, options: Options, report: Report) -> str | None:
    if label is None:
        return None
    if not label.label:
        report.repair(label.where, "the label is empty. The turn is kept without it.")
    try:
        return parse_emotion(label.label, {**MAPPING, **options.emotion_map})
    except SchemaError as error:
        report.repair(label.where, f"{error} The turn is kept without it.")
        return None


def _add_clips(name: str, turns: list[Turn], files: _Files, report: Report, options: Options) -> None:
    """Add the clips to the turns of a dialogue; clips that are known to be missing are reported."""
    pictures, sounds = files.pictures.get(name, []), files.sounds.get(name, [])
    cut_from_dialogue = []
    for turn in turns:
        crop = None
        if options.crop:
            crop = "left" if turn.utterance_id.rpartition("_")[2][0] == name[5] else "right"
        times = (turn.start, turn.end)
        audio = list(files.sentences.get(turn.utterance_id, []))
        if not audio and sounds and turn.start is not None:
            cut_from_dialogue.append(turn.utterance_id)
        elif not audio:
            reason = f"there is no sentences/wav/{name}/{turn.utterance_id}.wav"
            why = "it has no times to cut its audio by" if sounds else f"no dialog/wav/{name}.wav"
            report.lack_media(turn.where, f"{reason}, and {why}. The turn is kept without its audio.")
        if turn.start is not None:
            audio += [Clip(clip.path, clip.name, *times) for clip in sounds]
            turn.video = tuple(Clip(clip.path, clip.name, *times, crop) for clip in pictures)
        elif pictures:
            report.lack_media(turn.where, "it has no times to cut its video by. The turn is kept without it.")
        turn.audio = tuple(audio)
    if turns and not pictures:
        reason = f"there is no dialog/avi/DivX/{name}.avi. Its {len(turns)} turns are kept without their video."
        report.lack_media(files.transcripts[name][0].name, reason)
    if cut_from_dialogue:
        shown = ", ".join(cut_from_dialogue[:10]) + (", ..." if len(cut_from_dialogue) > 10 else "")
        reason = f"sentences/wav/{name}/ lacks the audio of {shown}. It is cut from {sounds[0].name}."
        report.repair(files.transcripts[name][0].name, reason)
