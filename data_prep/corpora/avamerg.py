"""AvaMERG: empathetic conversations spoken by avatars, with audio and video of every utterance.

RAW is a folder with the tables and the unpacked clips, at any depth:

    train.json  valid.json  test.json                      some or all of them
    .../audio_v5_0/dia00012utt0_37.wav                     dia CONVERSATION utt INDEX _ PROFILE
    .../video_v5_0/dia00012utt0_37.mp4

A table is a list of conversations:

    {"conversation_id": "00012", "topic": ..., "speaker_profile": {"ID": 37, ...}, "listener_profile": {"ID": 5, ...},
     "turns": [{"turn_id", "dialogue_history": [{"index": 0, "role": "speaker", "utterance": ...}, ...],
                "response": ..., "chain_of_empathy": {"speaker_emotion": "anxious", ...}}, ...]}

- Each entry of `turns` repeats the conversation so far and adds the listener's response. An utterance that occurs in
  several entries is one row. An utterance's number is its `index`; a response's is the one after its history.
- `speaker_emotion` labels the last utterance of the history, which the response answers. It is one of the feelings of
  EmpatheticDialogues, which the corpus is built on, or one of the seven emotions; responses have no label.
- A clip is that of a row if its conversation, its index and, where its name has one, its profile are the row's.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ...media_empathic import LFS_HEAD
from ..schema import SPLIT_NAMES, SPLITS, SchemaError, parse_emotion
from ..text import clean_text
from .base import Clip, CorpusInfo, Dialogue, LayoutError, Options, Report, Turn
from .empathetic_dialogues import MAPPING as FEELINGS

MAPPING = {**FEELINGS, "anger": "angry", "fear": "fearful", "joy": "happy", "sadness": "sad"}
ROLES = ("speaker", "listener")
KINDS = {"wav": "audio", "mp4": "video"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")

_TABLE = re.compile(r"(train|training|valid|validation|val|dev|test)[.]json", re.IGNORECASE)
_CLIP = re.compile(r"dia([0-9]{1,9})_?utt([0-9]{1,9})(?:_([0-9]{1,9}))?[.](wav|mp4)", re.IGNORECASE)

ABOUT = CorpusInfo(
    name="avamerg",
    title="AvaMERG",
    description=(
        "Conversations of EmpatheticDialogues and further ones, spoken by avatars: sound and a talking face of each "
        "utterance, with the feeling that each response answers. `speaker` is `speaker` or `listener`."
    ),
    license="other",
    license_note="The terms of the data set's page; it is built on EmpatheticDialogues, which is CC BY-NC 4.0.",
    redistributable=False,
    homepage="https://huggingface.co/datasets/ZhangHanXD/AvaMERG",
)


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the conversations split by split, in the order of the tables.

    Args:
        raw: the folder.
        report: receives every file, conversation, utterance and clip with a problem.
        options: `emotion_map` and `text_only` are used.

    Raises:
        LayoutError: if there is no table, or a table is a Git-LFS pointer or not a list.
    """
    tables, clips = _find_files(raw, report)
    mapping, used = {**MAPPING, **options.emotion_map}, set()
    for split in SPLITS:
        if split not in tables:
            continue
        path, name = tables[split]
        seen: dict[str, str] = {}
        for place, conversation in enumerate(_load(path)):
            where = f"{name}:{place}"
            try:
                key = _conversation_id(conversation)
            except SchemaError as error:
                report.ignore(where, str(error))
                continue
            if key in seen:
                report.ignore(where, f"conversation {key} is in {seen[key]} already.")
                continue
            seen[key] = where
            turns = _read_turns(f"{name}:{key}", key, conversation, mapping, report)
            for turn, index, profile in turns:
                _add_clips(turn, (int(key), index), profile, split, clips, used, options, report)
            if turns:
                yield Dialogue(split, key, [turn for turn, _, _ in turns])
    _report_unused(clips, used, options, report)


def _find_files(raw: Path, report: Report) -> tuple[dict[str, tuple[Path, str]], dict[tuple, list[tuple]]]:
    """
    Find the tables, split -> (path, name), and the clips, (conversation, index) -> [(profile or None, kind, `Clip`)].
    """
    tables: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    clips: dict[tuple[int, int], list[tuple]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    for folder, folders, names in os.walk(raw, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(raw).as_posix()
            if name.startswith("."):
                others["a hidden file."].append(relative)
            elif match := _TABLE.fullmatch(name):
                tables[SPLIT_NAMES[match[1].lower()]].append((path, relative))
            elif match := _CLIP.fullmatch(name):
                profile = None if match[3] is None else int(match[3])
                clip = (profile, KINDS[match[4].lower()], Clip(path, relative))
                clips[int(match[1]), int(match[2])].append(clip)
            elif name.lower().endswith(ARCHIVES):
                others["an archive, which is not unpacked here: unpack it in its folder."].append(relative)
            else:
                others["neither a table nor a clip of this corpus by its name."].append(relative)
    for reason, found in sorted(others.items()):
        report.ignore(f"{len(found)} files, the first {found[0]}" if len(found) > 1 else found[0], reason)
    if not tables:
        there = ", ".join(sorted(os.listdir(raw))[:10]) if raw.is_dir() else "a file"
        raise LayoutError(
            f"{raw}: expected train.json, valid.json or test.json, but found {there or 'nothing'}. Download them from "
            f"{ABOUT.homepage}, and unpack the archives of the clips beside them."
        )
    chosen = {}
    for split, files in tables.items():
        files.sort(key=lambda file: (file[1].count("/"), file[1]))
        chosen[split] = files[0]
        for _, name in files[1:]:
            report.ignore(name, f"the split {split} is read from {files[0][1]}.")
    return chosen, clips


def _load(path: Path) -> list:
    content = path.read_bytes()
    if content.startswith(LFS_HEAD):
        raise LayoutError(f"{path}: is a Git-LFS pointer, not the file itself. Fetch it with `git lfs pull`.")
    try:
        conversations = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{path}: is not JSON ({error}). Download it again.") from None
    if not isinstance(conversations, list):
        raise LayoutError(f"{path}: is a {type(conversations).__name__}, not a list of conversations.")
    return conversations


def _conversation_id(conversation) -> str:
    """The conversation's number without leading zeros, as in the names of the clips."""
    value = conversation.get("conversation_id") if isinstance(conversation, dict) else None
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise SchemaError(f'"conversation_id" is {value!r}, not a number.')
    if not isinstance(conversation.get("turns"), list):
        raise SchemaError('it has no list "turns".')
    return str(int(text))


def _read_turns(
    where: str, key: str, conversation: dict, mapping: dict, report: Report
) -> list[tuple[Turn, int, int | None]]:
    """The rows of a conversation, each with its index and the profile of who says it."""
    said: dict[int, tuple[str, str]] = {}  # index -> (role, text)
    emotions: dict[int, str | None] = {}
    for number, entry in enumerate(conversation["turns"]):
        at = f"{where}:turn {number}"
        history = entry.get("dialogue_history") if isinstance(entry, dict) else None
        if not isinstance(history, list) or not history:
            report.ignore(at, 'it has no list "dialogue_history".')
            continue
        last = None
        for place, utterance in enumerate(history):
            try:
                index, role, text = _utterance(utterance, place)
            except SchemaError as error:
                report.ignore(f"{at}:{place}", str(error))
                continue
            _add(said, index, role, text, f"{at}:{place}", report)
            last = index if last is None else max(last, index)
        if last is None:
            continue
        response = entry.get("response")
        if isinstance(response, str):
            _add(said, last + 1, ROLES[1], response, f"{at}:response", report)
        else:
            report.ignore(f"{at}:response", f'"response" is {response!r:.40}, not a text.')
        about = entry.get("chain_of_empathy")
        label = about.get("speaker_emotion") if isinstance(about, dict) else None
        try:
            emotions[last] = parse_emotion(label, mapping)
        except SchemaError as error:
            report.repair(at, f"{error} The turn is kept without it.")
    turns: list[tuple[Turn, int, int | None]] = []
    for index in sorted(said):
        role, raw_text = said[index]
        report.find()
        text, repairs = clean_text(raw_text)
        for reason in repairs:
            report.repair(f"{where}:{index}", reason)
        if not text:
            report.leave_out(f"{where}:{index}", "its utterance is empty.")
            continue
        emotion = emotions.get(index) if role == ROLES[0] else None
        turn = Turn(f"{where}:{index}", f"dia{key}utt{index}", role, text, emotion)
        turns.append((turn, index, _profile(conversation, role)))
    missing = sorted(set(range(max(said, default=-1) + 1)) - set(said))
    if missing:
        shown = ", ".join(map(str, missing[:10]))
        report.repair(where, f"utterance {shown} is missing. The turns were renumbered from 0.")
    return turns


def _utterance(utterance, place: int) -> tuple[int, str, str]:
    if not isinstance(utterance, dict):
        raise SchemaError(f"the utterance is {utterance!r:.60}, not an object.")
    index, role, text = utterance.get("index", place), utterance.get("role"), utterance.get("utterance")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 10_000:
        raise SchemaError(f'"index" is {index!r}, not the number of the utterance.')
    role = role.strip().lower() if isinstance(role, str) else role
    if role not in ROLES:
        raise SchemaError(f'"role" is {role!r}, not one of {", ".join(ROLES)}.')
    if not isinstance(text, str):
        raise SchemaError(f'"utterance" is {text!r:.40}, not a text.')
    return index, role, text


def _add(said: dict[int, tuple[str, str]], index: int, role: str, text: str, where: str, report: Report) -> None:
    """Add an utterance, unless it is there; another text under the same number is reported."""
    known = said.setdefault(index, (role, text))
    if (known[0], known[1].strip()) != (role, text.strip()):
        report.repair(where, f"utterance {index} differs from an earlier one of the same number, which is kept.")


def _profile(conversation: dict, role: str) -> int | None:
    """The ID of a person's profile; None if there is none."""
    about = conversation.get(f"{role}_profile")
    value = str(about.get("ID", "")).strip() if isinstance(about, dict) else ""
    return int(value) if re.fullmatch("[0-9]{1,9}", value) else None


def _add_clips(turn, key, profile, split, clips, used, options, report) -> None:
    """Add the clips of a turn: of its conversation and number and, where both are known, of its profile."""
    if options.text_only:
        return
    for kind in KINDS.values():
        there = [clip for clip in clips.get(key, ()) if clip[1] == kind]
        fitting = [clip for clip in there if None in (clip[0], profile) or clip[0] == profile]
        # Conversations of two splits may have the same number; a clip in a folder of this split comes first.
        fitting.sort(key=lambda clip: (not _in_split(clip[2].name, split), clip[2].name))
        fitting = [clip for clip in fitting if _in_split(clip[2].name, split) or not _in_other(clip[2].name, split)]
        used.update(clip[2].name for clip in fitting)
        if kind == "audio":
            turn.audio = tuple(clip[2] for clip in fitting)
        else:
            turn.video = tuple(clip[2] for clip in fitting)
        if not fitting:
            suffix = next(suffix for suffix, name in KINDS.items() if name == kind)
            shown = f"dia{key[0]:05d}utt{key[1]}" + ("" if profile is None else f"_{profile}")
            reason = f"there is no {shown}.{suffix}. The turn is kept without it."
            near = [clip for clip in there if not _in_other(clip[2].name, split)]
            if near:
                reason = f"{near[0][2].name} is of another profile than {profile}. The turn is kept without it."
            report.lack_media(turn.where, reason)


def _in_split(name: str, split: str) -> bool:
    return any(_split_of(part) == split for part in name.split("/")[:-1])


def _in_other(name: str, split: str) -> bool:
    return any(_split_of(part) not in (None, split) for part in name.split("/")[:-1])


def _split_of(folder: str) -> str | None:
    """The split that a folder's name begins with, as in `train_audio`."""
    return SPLIT_NAMES.get(re.split("[^a-z]", folder.lower())[0])


def _report_unused(clips, used: set[str], options: Options, report: Report) -> None:
    names = sorted(clip[2].name for found in clips.values() for clip in found if clip[2].name not in used)
    if names and options.text_only:
        report.ignore(names[0], f"{len(names)} clips are not read, because only the text is wanted.")
    elif names:
        report.ignore(names[0], f"{len(names)} such clips belong to no utterance of a table.")
