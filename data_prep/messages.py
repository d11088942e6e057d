"""What a message or a turn holds: the one vocabulary for texts, clips and names of samples."""

from collections.abc import Sequence


def message_text(message: dict) -> str:
    """The text of a message, whose content is a string or a list of items."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(item["text"] for item in content or [] if item.get("type") == "text" and item.get("text"))


def clip_of(messages: Sequence[dict], kind: str) -> dict | None:
    """The `audio` or `video` item of the last message, or None."""
    content = messages[-1]["content"]
    items = [] if isinstance(content, str) else [item for item in content if item["type"] == kind]
    return items[0] if items else None


def clip_message(row: dict, modalities: Sequence[str], with_text: bool = True) -> dict:
    """Make the user's message of a turn row, with its media of the given modalities."""
    content = [{"type": kind, **row[kind]} for kind in modalities if row[kind] is not None]
    if with_text and row["text"]:
        content.append({"type": "text", "text": row["text"]})
    return {"role": "user", "name": row["speaker"], "content": content}


def sample_id(row: dict, turns: Sequence[dict] | None = None) -> str:
    """
    The name of a sample in messages: corpus/split/dialogue/turn, as far as they are known.

    Args:
        row: a turn, or a dict that identifies a dialogue.
        turns: a run of turns to use instead of the row's own turn; the name has the first and the last.
    """
    places = [turn["turn"] for turn in ([row] if turns is None else (turns[0], turns[-1])) if "turn" in turn]
    names = [row[name] for name in ("corpus", "split", "dialogue_id") if name in row]
    return "/".join(map(str, [*names, *(["-".join(map(str, dict.fromkeys(places)))] if places else [])]))


def shows_something(message: dict, task: str) -> bool:
    """Whether a turn has the content that its task needs: `emotion` needs a clip, `dialogue` a clip or some text."""
    if isinstance(message["content"], str):
        return bool(message["content"]) and task != "emotion"
    kinds = {item["type"] for item in message["content"] if item["type"] != "text" or item["text"]}
    return bool(kinds - {"text"} if task == "emotion" else kinds)
