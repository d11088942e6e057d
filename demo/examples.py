"""Example conversations, read from recordings in the format of `empathic prepare folder`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """
    A conversation, and the text and the clip of its next turn.

    Attributes:
        history: the messages before the turn, `{"role", "content"}` with plain strings.
        text: the user's text.
        clip: the file with the user's face and voice.
    """

    history: tuple[dict[str, str], ...]
    text: str
    clip: Path


def read_examples(folder: str | Path, count: int = 4) -> list[Example]:
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
    rows = [{**row, "text": _whole_characters(str(row.get("text", "")))} for row in rows]
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


def example_files(examples: list[Example]) -> dict[str, bytes]:
    """Return the files of a folder from which `read_examples` reads the same examples: name -> content."""
    lines, files = [], {}
    for number, example in enumerate(examples, 1):
        turns = [*example.history, {"role": "user", "content": example.text}]
        for place, turn in enumerate(turns):
            row = {"dialogue_id": str(number), "turn": place, "speaker": turn["role"], "text": turn["content"]}
            if place == len(example.history):
                row["video"] = f"{number}{example.clip.suffix}"
                files[row["video"]] = example.clip.read_bytes()
            lines.append(json.dumps(row) + "\n")
    return {"metadata.jsonl": "".join(lines).encode(), **files}


def _whole_characters(text: str) -> str:
    """Replace lone surrogates (half of an emoji, which JSON can hold) with U+FFFD: no response can contain them."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _example(folder: Path, rows: list[dict]) -> Example | None:
    """The conversation up to the user's last clip; None if the rows have another form."""
    speakers = [row["speaker"] for row in rows]
    if speakers != [("user", "assistant")[place % 2] for place in range(len(rows))]:
        return None
    last = max((i for i, row in enumerate(rows) if i % 2 == 0 and row.get("video")), default=None)
    if last is None or not (folder / rows[last]["video"]).is_file():
        return None
    history = tuple({"role": row["speaker"], "content": row["text"]} for row in rows[:last])
    return Example(history, rows[last]["text"], folder / rows[last]["video"])
