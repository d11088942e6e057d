"""Topical-Chat (text only), in the layout of its repository.

    RAW/conversations/<split>.json    {t_<uuid>: {"content": [{"agent", "message", "sentiment", ...}, ...], ...}, ...}

The splits are train, valid_freq, valid_rare, test_freq and test_rare, and keep their names; a subset is enough, in RAW
or any folder below it. MultiDialog's scripts are conversations of this corpus with the same ids.

- A row is an entry of `content`; `speaker` is its `agent`: `agent_1` or `agent_2`.
- Sentiments are mapped as MultiDialog's: "Curious to dive deeper" is neutral.
- A conversation in two splits is kept in the held-out split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ...media_empathic import LFS_HEAD
from ..schema import SchemaError, parse_emotion, parse_text
from ..text import clean_text
from .base import CorpusInfo, Dialogue, LayoutError, Options, Report, Turn
from .multidialog import MAPPING as MULTIDIALOG_MAPPING
from .multidialog import SPLITS

MAPPING = {**MULTIDIALOG_MAPPING, "fearful": "fearful"}

ABOUT = CorpusInfo(
    name="topical-chat",
    title="Topical-Chat",
    description=(
        "Written conversations between two partners about eight topics, with the sentiment that the writer chose for "
        "each message. There are no clips. `speaker` is `agent_1` or `agent_2`."
    ),
    license="cdla-sharing-1.0",
    license_note="Community Data License Agreement - Sharing 1.0: it may be passed on under the same license.",
    redistributable=True,
    homepage="https://github.com/alexa/Topical-Chat",
    published={
        "train": {"dialogues": 8628, "rows": 188378},
        "valid_freq": {"dialogues": 539, "rows": 11681},
        "valid_rare": {"dialogues": 539, "rows": 11692},
        "test_freq": {"dialogues": 539, "rows": 11760},
        "test_rare": {"dialogues": 539, "rows": 11770},
    },
)


def read(raw: Path, report: Report, options: Options) -> Iterator[Dialogue]:
    """
    Read the conversations of Topical-Chat, split by split, in the order of the files.

    Args:
        raw: the folder of the repository, or of some of its files.
        report: receives every file, conversation and message with a problem.
        options: `emotion_map` is used.

    Raises:
        LayoutError: if there is no file of any split, or a file is a Git-LFS pointer or not a JSON object.
    """
    tables = {split: _load(raw, name) for split, name in _find_files(raw, report).items()}
    names = {split: name for split, (name, _) in tables.items()}
    mapping, kept_in = {**MAPPING, **options.emotion_map}, {}
    for split in reversed(SPLITS):  # held-out splits first
        for key in tables.get(split, ("", {}))[1]:
            kept_in.setdefault(key, split)
    for split, (name, conversations) in tables.items():
        for key, conversation in conversations.items():
            where = f"{name}:{key}"
            content = conversation.get("content") if isinstance(conversation, dict) else None
            if not isinstance(content, list):
                report.ignore(where, 'it has no list of messages, "content".')
                continue
            report.find(len(content))
            if kept_in[key] != split:
                for place in range(len(content)):
                    report.leave_out(f"{where}:{place}", f"the conversation is in {names[kept_in[key]]} already.")
                continue
            turns = []
            for place, message in enumerate(content):
                try:
                    turns.append(_read_message(f"{where}:{place}", f"{key}_{place}", message, mapping, report))
                except SchemaError as error:
                    report.leave_out(f"{where}:{place}", str(error))
            if turns:
                yield Dialogue(split, key, turns)


def _find_files(raw: Path, report: Report) -> dict[str, Path]:
    """Find the file of each split, the one nearest to `raw`."""
    found: dict[str, list[Path]] = {}
    for folder, folders, names in os.walk(raw):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in names:
            if name.removesuffix(".json") in SPLITS and name.endswith(".json"):
                found.setdefault(name.removesuffix(".json"), []).append(Path(folder, name))
    if not found:
        there = ", ".join(sorted(os.listdir(raw))[:10]) if raw.is_dir() else "a file"
        raise LayoutError(
            f"{raw}: expected {', '.join(f'{split}.json' for split in SPLITS)}, or some of these, but found "
            f"{there or 'nothing'}. Give the folder `conversations` of the repository: `git clone {ABOUT.homepage}`."
        )
    chosen = {}
    for split in SPLITS:
        files = sorted(found.get(split, ()), key=lambda path: (len(path.parts), path))
        if files:
            chosen[split] = files[0]
        for path in files[1:]:
            report.ignore(str(path.relative_to(raw)), f"the split {split} is read from {files[0].relative_to(raw)}.")
    return chosen


def _load(raw: Path, path: Path) -> tuple[str, dict]:
    """Read the file of a split; return its name in the report and its conversations."""
    content = path.read_bytes()
    if content.startswith(LFS_HEAD):
        raise LayoutError(f"{path}: is a Git-LFS pointer, not the file itself. Fetch it with `git lfs pull`.")
    try:
        conversations = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{path}: is not JSON ({error}). Download it again.") from None
    if not isinstance(conversations, dict):
        raise LayoutError(f"{path}: is a {type(conversations).__name__}, not an object of conversations.")
    return path.relative_to(raw).as_posix(), conversations


def _read_message(where: str, name: str, message: dict, mapping: dict, report: Report) -> Turn:
    """Parse a message. SchemaError if it is not a valid turn; an unknown sentiment is reported and dropped."""
    if not isinstance(message, dict):
        raise SchemaError(f"the message is {message!r:.80}, not an object.")
    try:
        text, repairs = clean_text(parse_text(message.get("message")))
    except SchemaError as error:
        raise SchemaError(str(error).replace('"text"', '"message"')) from None
    speaker, changes = clean_text(str(message.get("agent") or ""))
    repairs += changes
    if not speaker:
        raise SchemaError(f'"agent" is {message.get("agent")!r}. Give the name of the speaker.')
    emotion = None
    try:
        emotion = parse_emotion(message.get("sentiment"), mapping)
    except SchemaError as error:
        repairs.append(f"{error} The turn is kept without it.")
    for reason in repairs:
        report.repair(where, reason)
    return Turn(where, name, speaker, text, emotion)
