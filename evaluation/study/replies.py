"""Read the saved replies of several systems, and join them by conversation."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...data_prep.messages import message_text
from ..saved_clips import parts_of, saved_clips

REFERENCE = "reference"  # name of the true replies, if they are rated as a further system


class StudyError(ValueError):
    """A study cannot be built, run or analyzed. The message gives the problem and the remedy."""


@dataclass
class Conversation:
    """A prompt with the reply of each system. `rows` are the rows of the files without their prompts."""

    id: str
    prompt: list[dict]
    replies: dict[str, str]
    rows: dict[str, dict] = field(default_factory=dict)


def read_replies(sources: list[str], reference: bool = False) -> tuple[list[Conversation], list[dict]]:
    """
    Read the conversations that all systems answered, in the order of the first file.

    Args:
        sources: JSONL files with `id`, `prompt`, `reply` and optionally `reference` on each line. The system of a line
            is its `system`, else the name in `NAME=FILE`, else the stem of the file. A clip with a `digest` gets the
            `path` of the saved clip in the folder `clips` next to the file.
        reference: also rate the true replies, as the system `reference`.

    Returns:
        The conversations, and those left out: {"id", "reason"}.

    Raises:
        StudyError: if a file or line cannot be read, a reply is given twice, or no conversation is left.
    """
    rows: dict[str, dict[str, dict]] = {}
    for source in sources:
        named, _, file = source.rpartition("=")
        if not Path(file).is_file() and Path(source).is_file():
            named, file = "", source
        _read(Path(file), named or Path(file).stem, rows)
    systems = list(rows)
    if reference and REFERENCE in rows:
        raise StudyError(f"A system has the name {REFERENCE!r}, which is reserved for the true replies. Rename it.")
    order = list(dict.fromkeys(id for by_id in rows.values() for id in by_id))
    conversations, left_out = [], []
    for id in order:
        missing = [system for system in systems if id not in rows[system]]
        if missing:
            left_out.append({"id": id, "reason": f"no reply from {', '.join(missing)}"})
            continue
        theirs = {system: rows[system][id] for system in systems}
        first = _said(theirs[systems[0]]["prompt"])
        differing = [system for system in systems if _said(theirs[system]["prompt"]) != first]
        if differing:
            reason = f"the prompt of {systems[0]} differs from that of {', '.join(differing)}"
            left_out.append({"id": id, "reason": reason})
            continue
        replies = {system: row["reply"] for system, row in theirs.items()}
        if reference:
            true = next((row["reference"] for row in theirs.values() if row.get("reference")), None)
            if true is None:
                left_out.append({"id": id, "reason": "has no reference"})
                continue
            replies[REFERENCE] = true
        # A text-only system may have no clips in its prompt: raters see the prompt with the most clips.
        prompt = max((row["prompt"] for row in theirs.values()), key=_clips)
        kept = {system: {k: v for k, v in row.items() if k != "prompt"} for system, row in theirs.items()}
        conversations.append(Conversation(id, prompt, replies, kept))
    if not conversations:
        raise StudyError(
            f"No conversation was answered by all of {', '.join(systems)}; the first left out is "
            f"{left_out[0]['id']} ({left_out[0]['reason']}). Give files of the same conversations."
            if left_out
            else f"{', '.join(sources)}: no replies found. Give JSONL files of saved replies."
        )
    return conversations, left_out


def _read(path: Path, stem: str, rows: dict[str, dict[str, dict]]) -> None:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a reply may contain U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}). Give a JSONL file of saved replies.") from None
    clips = saved_clips(path)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise StudyError(f"{where}: not JSON ({error}). Write one object per line.") from None
        problem = _problem(row)
        if problem:
            raise StudyError(f"{where}: {problem}.")
        system = row.get("system") or stem
        theirs = rows.setdefault(system, {})
        if str(row["id"]) in theirs:
            raise StudyError(
                f"{where}: {system} has a second reply to {row['id']!r}. Remove one of the two; if two systems have "
                "files of the same name, give them as NAME=FILE."
            )
        for part in parts_of(row["prompt"]):
            found = clips.get(str(part.get("digest")))
            if found is not None:
                part["path"] = str(found)
        theirs[str(row["id"])] = row


def _problem(row) -> str | None:
    """The problem with a row, or None."""
    if not isinstance(row, dict):
        return "not an object with id, prompt and reply"
    if not isinstance(row.get("id"), str | int):
        return f"its id is {row.get('id')!r}; it must be a string"
    if not isinstance(row.get("reply"), str):
        return f"its reply is {row.get('reply')!r}; it must be a string"
    if not isinstance(row.get("system", ""), str):
        return f"its system is {row['system']!r}; it must be a string"
    prompt = row.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return "its prompt must be a list of messages"
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str | list):
            return f"a message of its prompt has no content: {message!r}"
        if isinstance(message["content"], list) and not all(isinstance(part, dict) for part in message["content"]):
            return f"the content of a message of its prompt must be text or a list of objects: {message!r}"
    return None


def media_of(message: dict) -> dict[str, str]:
    """The media files of a message: {"audio": path, "video": path}; either or both may be missing."""
    if isinstance(message["content"], str):
        return {}
    return {
        part["type"]: part["path"]
        for part in message["content"]
        if part.get("type") in ("audio", "video") and part.get("path")
    }


def has_lost_clip(message: dict) -> bool:
    """Whether a clip of a message was not saved as a file, and is only in the data set."""
    return any(part.get("digest") and not part.get("path") for part in parts_of([message]))


def spoken(prompt: list[dict]) -> list[dict]:
    """The messages without system messages."""
    return [message for message in prompt if message.get("role") != "system"]


def _said(prompt: list[dict]) -> list[tuple]:
    return [(message.get("role"), message_text(message).strip()) for message in spoken(prompt)]


def _clips(prompt: list[dict]) -> int:
    return sum(bool(media_of(message)) for message in prompt)
