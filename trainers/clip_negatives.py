"""Clips of another emotion for the prompts of preference rows, so that a reply is preferred under its true clip.

A row's *clip negative* is its prompt with the clips of another row, the donor, which has the same kinds of clips and
another emotion. The text and the history stay, so the two prompts differ in the voice and the face alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast

import datasets
import numpy as np
import pyarrow as pa

from ..data_prep.clip_digests import MEDIA_KINDS

BATCH = 1000  # rows of a data set that are looked at together
NO_CLIP, NO_EMOTION = "it has no clip", "it has no emotion"
NO_DONOR = "no row of another emotion has the same kinds of clips"


class ClipNegatives:
    """Draws a donor for each row of a data set.

    Donors by the same speaker (`corpus` and the `name` of the last message) are preferred: others are drawn only if the
    speaker has no clip of another emotion. No clip is read for this.

    Attributes:
        without: {reason: number of rows} of the rows that get no donor.

    Args:
        rows: preference rows with the column `emotion` and conversational prompts.
    """

    def __init__(self, rows: Sequence[dict]):
        self._rows: list[tuple] = []  # (speaker or None, emotion, kinds) of each row; the kinds are () without a clip
        groups: dict[tuple, dict[str, list[int]]] = {}  # {(speaker or None for all, kinds): {emotion: rows}}
        for number, (speaker, emotion, kinds) in enumerate(_described(rows)):
            self._rows.append((speaker, emotion, kinds))
            if emotion is None or not kinds:
                continue
            for wanted in {kinds, *((kind,) for kind in kinds)}:  # a row with a video needs no more of its donor
                for whose in {speaker, None}:
                    groups.setdefault((whose, wanted), {}).setdefault(emotion, []).append(number)
        self._groups = {
            key: {emotion: np.array(found) for emotion, found in by_emotion.items()}
            for key, by_emotion in groups.items()
        }
        reasons = (self.why_not(number) for number in range(len(self._rows)))
        self.without = Counter(reason for reason in reasons if reason is not None)

    def why_not(self, number: int) -> str | None:
        """Return the reason why a row gets no donor, or None."""
        _, emotion, kinds = self._rows[number]
        if not kinds:
            return NO_CLIP
        if emotion is None:
            return NO_EMOTION
        return None if self._donors(number) else NO_DONOR

    def kinds(self, number: int) -> tuple[str, ...]:
        """Return the kinds of clips of a row's last message."""
        return self._rows[number][2]

    def draw(self, number: int, seed: Sequence[int]) -> int | None:
        """Draw the donor of a row, which depends on the data set, the row and the seed alone; None if there is none."""
        if self.why_not(number) is not None:
            return None
        donors = self._donors(number)
        place = int(np.random.default_rng([*seed, number]).integers(sum(map(len, donors))))
        for part in donors:
            if place < len(part):
                return int(part[place])
            place -= len(part)
        return None

    def _donors(self, number: int) -> list[np.ndarray]:
        speaker, emotion, kinds = self._rows[number]
        for whose in dict.fromkeys((speaker, None)):
            by_emotion = self._groups.get((whose, kinds), {})
            found = [by_emotion[other] for other in sorted(by_emotion) if other != emotion]
            if found:
                return found
        return []


def with_clips(messages: Sequence[dict], clips: dict[str, dict]) -> list[dict]:
    """Return the messages with other clips in the last one.

    Args:
        messages: a conversation, which is not changed.
        clips: {kind: item} for each kind of clip in the last message.
    """
    *earlier, last = messages
    content = [clips[item["type"]] if item["type"] in MEDIA_KINDS else item for item in last["content"]]
    return [*earlier, {**last, "content": content}]


def _described(rows: Sequence[dict]) -> Iterator[tuple]:
    """Yield (speaker or None, emotion or None, kinds of clips) of each row."""
    if isinstance(rows, datasets.Dataset) and _has_items(rows.features.arrow_schema):
        yield from _described_table(rows)
        return
    for number in range(len(rows)):
        row = rows[number]
        last = row["prompt"][-1] if isinstance(row["prompt"], list) else {}
        content = last.get("content")
        types = {item["type"] for item in content} if isinstance(content, list) else set()
        yield _speaker(row.get("corpus"), last.get("name")), row.get("emotion"), _kinds(types)


def _has_items(schema: pa.Schema) -> bool:
    """Whether the contents of a table's prompts are lists of items, as `empathic counter` writes them."""
    kind = schema.field("prompt").type if "prompt" in schema.names else pa.null()
    for name in ("content", "type"):
        if not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
            return False
        fields = {field.name: field.type for field in kind.value_type}
        kind = fields.get(name, pa.null())
    return pa.types.is_string(kind)


def _described_table(rows: datasets.Dataset) -> Iterator[tuple]:
    """`_described` for a table with items; the bytes of its clips are not read."""
    columns = [name for name in ("prompt", "emotion", "corpus") if name in rows.column_names]
    tables = cast(Iterator[pa.Table], rows.select_columns(columns).with_format("arrow").iter(BATCH))
    for table in tables:
        for batch in table.to_batches():
            found = {name: batch[name].to_pylist() for name in columns if name != "prompt"}
            corpora, emotions = (found.get(name, [None] * len(batch)) for name in ("corpus", "emotion"))
            lasts = _last_messages(batch["prompt"])
            for corpus, emotion, (name, types) in zip(corpora, emotions, lasts, strict=True):
                yield _speaker(corpus, name), emotion, _kinds(types)


def _last_messages(prompts: pa.ListArray) -> Iterator[tuple[str | None, set[str]]]:
    """Yield the name and the types of the content items of each prompt's last message."""
    messages, ends = prompts.values, prompts.offsets.to_pylist()[1:]
    contents, has_names = messages.field("content"), "name" in {field.name for field in messages.type}
    names = messages.field("name").to_pylist() if has_names else [None] * len(messages)
    types, offsets = contents.values.field("type").to_pylist(), contents.offsets.to_pylist()
    for end in ends:
        yield names[end - 1], set(types[offsets[end - 1] : offsets[end]])


def _speaker(corpus: str | None, name: str | None) -> tuple | None:
    return None if name is None else (corpus, name)


def _kinds(types: set[str]) -> tuple[str, ...]:
    return tuple(kind for kind in MEDIA_KINDS if kind in types)
