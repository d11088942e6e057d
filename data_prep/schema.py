"""The one row schema that every corpus is brought to: one row is one turn of a conversation.

| column | type | meaning |
|---|---|---|
| corpus | string | name of the corpus |
| split | string | train, validation or test (MultiDialog keeps its own names) |
| dialogue_id | string | the dialogue, unique inside (corpus, split) |
| turn | int | 0, 1, 2 ... inside the dialogue, without gaps |
| utterance_id | string | the corpus's own name of the turn |
| speaker | string | who speaks |
| text | string | what is said |
| emotion | string or null | one of the seven |
| audio, video | {path, bytes} or null | the clip of exactly this turn |
| start, end | float or null | seconds in the recording that the turn came from, for information |

`audio` and `video` are plain structs: `datasets.Audio` and `datasets.Video` would decode through torchcodec, while this
project decodes with PyAV.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Features, Value

from empathic.configuration_empathic import EMOTIONS

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
    """A row that does not fit the schema. The message names the value, what is wrong and the mend."""


def row_features() -> Features:
    """The columns of a prepared corpus, for `datasets`."""

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
    """The emotion that a label means.

    Args:
        value: the label: a string in any case, or None or "" for no label.
        emotion_map: what the labels of a corpus mean, lower case; None as a meaning drops the label.

    Returns:
        One of `EMOTIONS`, or None where there is no label.

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
        "Use one of these, leave it out, or map it to one of them."
    )


def parse_split(value: Any) -> str | None:
    """`train`, `validation` or `test` from their usual names; None where there is none. SchemaError for any other."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.strip().lower() in SPLIT_NAMES:
        return SPLIT_NAMES[value.strip().lower()]
    raise SchemaError(f"the split {value!r} is not one of {', '.join(SPLITS)}. Use one of these or leave it out.")


def parse_id(row: dict, key: str) -> str:
    """A required name, given as a string or a whole number. SchemaError if it is missing or empty."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise SchemaError(f'"{key}" is {value!r}. Give a string that is not empty.')


def parse_turn(value: Any) -> int:
    """The number of a turn, from 0. SchemaError for anything but a whole number."""
    number = value
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:  # Python refuses thousands
        number = int(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
        raise SchemaError(f'"turn" is {value!r}. Give the whole number of the turn in its dialogue, from 0.')
    return number


def parse_text(value: Any) -> str:
    """What is said; it may be empty. SchemaError if it is no string."""
    if not isinstance(value, str):
        raise SchemaError(f'"text" is {value!r}. Give what is said as a string ("" if nothing is).')
    return value.strip()


def parse_seconds(row: dict, key: str) -> float | None:
    """A time in seconds or None. SchemaError for anything but a finite number from 0."""
    value = row.get(key)
    if value is None:
        return None
    # No isfinite(): a whole number may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise SchemaError(f'"{key}" is {value!r}. Give seconds as a number from 0, or leave it out.')
    return float(value)
