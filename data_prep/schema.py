"""The row schema that every corpus is converted to: one row is one turn of a conversation.

| column | type | meaning |
|---|---|---|
| corpus | string | name of the corpus |
| split | string | train, validation or test (MultiDialog keeps its own names) |
| dialogue_id | string | id of the dialogue, unique within (corpus, split) |
| turn | int | 0, 1, 2 ... within the dialogue, without gaps |
| utterance_id | string | the corpus's own id of the turn |
| speaker | string | name of the speaker |
| text | string | transcript of the turn |
| emotion | string or null | one of the seven emotions |
| audio, video | {path, bytes} or null | the clip of exactly this turn |
| start, end | float or null | seconds in the source recording, informative |

`audio` and `video` are plain structs, because `datasets.Audio` and `datasets.Video` decode with torchcodec and this
project decodes with PyAV.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Features, Value

from ..configuration_empathic import EMOTIONS

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
}


class SchemaError(ValueError):
    """A row does not match the schema. The message gives the value, the rule and the remedy."""


def row_features() -> Features:
    """The columns of a prepared corpus, as `datasets.Features`."""

    def media():
        return {"path": Value("string"), "bytes": Value("binary")}

    return Features(
        {
            "corpus": Value("string"),
            "split": Value("string"),
            "dialogue_id": Value("string"),
            "turn": Value("int32"),
            "utterance_id": Value("string"),
            "speaker": Value("string"),
            "text": Value("string"),
            "emotion": Value("string"),
            "audio": media(),
            "video": media(),
            "start": Value("float64"),
            "end": Value("float64"),
        }
    )


def parse_emotion(value: Any, emotion_map: dict[str, str | None] | None = None) -> str | None:
    """Convert a label to an emotion.

    Args:
        value: the label: a string in any case, or None or "" for no label.
        emotion_map: maps the corpus's labels, in lower case, to emotions, or to None to drop the label.

    Returns:
        One of `EMOTIONS`, or None if there is no label.

    Raises:
        SchemaError: for any other label.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        label = value.strip().lower()
        if emotion_map and label in emotion_map:
            return emotion_map[label]
        if label in EMOTIONS:
            return label
    raise SchemaError(
        f"the emotion {value!r} is not one of {', '.join(EMOTIONS)}. "
        "Use one of these, omit the label, or map it to one of these."
    )


def parse_split(value: Any) -> str | None:
    """Convert a common split name to `train`, `validation` or `test`; None if empty. SchemaError for other names."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.strip().lower() in SPLIT_NAMES:
        return SPLIT_NAMES[value.strip().lower()]
    raise SchemaError(f"the split {value!r} is not one of {', '.join(SPLITS)}. Use one of these or omit it.")


def parse_id(row: dict, key: str) -> str:
    """Read a required id, given as a string or an integer. SchemaError if it is missing or empty."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise SchemaError(f'"{key}" is {value!r}. Give a non-empty string.')


def parse_turn(value: Any) -> int:
    """Read the number of a turn, from 0. SchemaError if it is not a whole number."""
    number = value
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:  # int() limits the number of digits
        number = int(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
        raise SchemaError(f'"turn" is {value!r}. Give the whole number of the turn in its dialogue, from 0.')
    return number


def parse_text(value: Any) -> str:
    """Read the text of a turn, which may be empty. SchemaError if it is not a string."""
    if not isinstance(value, str):
        raise SchemaError(f'"text" is {value!r}. Give the transcript as a string ("" for a turn without words).')
    return value.strip()


def parse_seconds(row: dict, key: str) -> float | None:
    """Read an optional time in seconds. SchemaError if it is not a finite number >= 0."""
    value = row.get(key)
    if value is None:
        return None
    # math.isfinite() would raise for an int that is too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise SchemaError(f'"{key}" is {value!r}. Give seconds as a number >= 0, or omit the key.')
    return float(value)
