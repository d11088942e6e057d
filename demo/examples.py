"""Example conversations from recordings in the form that `empathic prepare folder` takes."""

import json
from dataclasses import dataclass
from pathlib import Path

from empathic.demo.session import Answer, Conversation, Turn


@dataclass(frozen=True)
class Example:
    """What was said before, and the next thing to say: its text and its clip."""

    name: str
    conversation: Conversation
    text: str
    clip: Path


def read_examples(folder: str | Path, count: int = 6) -> list[Example]:
    """
    Conversations with clips, the first `count` of the split `test`, or of all where there is none.

    Args:
        folder: with a `metadata.jsonl` of turns by `user` and `assistant`, such as quickstart's `recordings`.

    Raises:
        ValueError: for a folder without such conversations.
    """
    folder = Path(folder)
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: holds no examples ({error}). Give quickstart's folder `recordings`.") from None
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
        raise ValueError(f"{folder}: holds no conversation of user and assistant with clips.")
    return examples


def _example(folder: Path, rows: list[dict]) -> Example | None:
    """Up to the last clip of the user; None for a conversation of another form."""
    speakers = [row["speaker"] for row in rows]
    if speakers != [("user", "assistant")[place % 2] for place in range(len(rows))]:
        return None
    last = max((i for i, row in enumerate(rows) if i % 2 == 0 and row.get("video")), default=None)
    if last is None or not (folder / rows[last]["video"]).is_file():
        return None
    turns = [
        Turn(rows[i]["text"], answers=(Answer("from the example", rows[i + 1]["text"]),)) for i in range(0, last, 2)
    ]
    return Example(rows[last]["text"], Conversation(tuple(turns)), rows[last]["text"], folder / rows[last]["video"])
