"""Example conversations, read from recordings in the format of `empathic prepare folder`."""

import json
from dataclasses import dataclass
from pathlib import Path

from .session import ShownConversation, ShownReply, ShownTurn, whole_characters


@dataclass(frozen=True)
class Example:
    """A conversation, and the text and clip of the next turn."""

    name: str
    conversation: ShownConversation
    text: str
    clip: Path


def read_examples(folder: str | Path, count: int = 6) -> list[Example]:
    """
    Read the first `count` conversations with clips from the split `test`, or from all rows if there is no such split.

    Args:
        folder: folder whose `metadata.jsonl` has turns of `user` and `assistant`, such as quickstart's `recordings`.
        count: maximum number of conversations.

    Raises:
        ValueError: if the folder has no such conversations.
    """
    folder = Path(folder)
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no examples ({error}). Give quickstart's folder `recordings`.") from None
    rows = [{**row, "text": whole_characters(str(row.get("text", "")))} for row in rows]
    rows = [row for row in rows if row.get("split") == "test"] or rows
    dialogues: dict[str, list[dict]] = {}
    for row in rows:
        dialogues.setdefault(row["dialogue_id"], []).append(row)
    examples = []
    for turns in dialogues.values():
        example = _example(folder, sorted(turns, key=lambda row: row["turn"]))
        if example is not None:
            examples.append(example)
        if len(examples) == count:
            break
    if not examples:
        raise ValueError(f"{folder} has no conversation of user and assistant with clips.")
    return examples


def _example(folder: Path, rows: list[dict]) -> Example | None:
    """The conversation up to the user's last clip; None if the rows have another form."""
    speakers = [row["speaker"] for row in rows]
    if speakers != [("user", "assistant")[place % 2] for place in range(len(rows))]:
        return None
    last = max((i for i, row in enumerate(rows) if i % 2 == 0 and row.get("video")), default=None)
    if last is None or not (folder / rows[last]["video"]).is_file():
        return None
    turns = [
        ShownTurn(rows[i]["text"], answers=(ShownReply("from the example", rows[i + 1]["text"]),))
        for i in range(0, last, 2)
    ]
    return Example(
        rows[last]["text"], ShownConversation(tuple(turns)), rows[last]["text"], folder / rows[last]["video"]
    )
