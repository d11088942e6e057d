"""What the stages train on, derived from rows of the schema without copying the corpus.

| view | one item | stage |
|---|---|---|
| `emotion_clips` | a turn with an emotion and a clip | emotion |
| `utterances` | a turn's speaker and text | memory_single |
| `conversations` | a whole dialogue | memory_multi |
| `dialogue_samples` | (history, turn, reply) | dialogue, epo |

Each function takes any iterable of rows (a list, a `datasets.Dataset`, a streamed one) and yields items one at a time.
The turns of a dialogue have to stand together and in order, as `prepare` writes them. For random access in training
`DialogueSamples` gives the same samples by their number. A dialogue never crosses splits: (corpus, split, dialogue_id)
names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset

Row = dict[str, Any]
IDS = ("corpus", "split", "dialogue_id")


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in IDS)


def _spans(rows: Iterable[Row]) -> Iterator[tuple[int, int]]:
    """(first, end) of the rows of each dialogue. ValueError if they do not stand together or are out of order."""
    seen, start, before, end = set(), 0, None, 0
    for end, row in enumerate(rows):
        key = _key(row)
        if key != before:
            if before is not None:
                yield start, end
            if key in seen:
                raise ValueError(
                    f"The turns of dialogue {key} do not stand together. Sort the rows by dialogue and turn."
                )
            seen.add(key)
            start, before = end, key
        if row["turn"] != end - start:
            raise ValueError(
                f"Dialogue {key} has turn {row['turn']} where turn {end - start} was expected. "
                "Number its turns from 0 without gaps and keep them in order."
            )
    if before is not None:
        yield start, end + 1


def _dialogues(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each dialogue, one dialogue at a time."""
    held: list[Row] = []

    def hold() -> Iterator[Row]:
        for row in rows:
            held.append(row)
            yield row

    for start, end in _spans(hold()):
        size = end - start
        yield held[:size]
        del held[:size]


def emotion_clips(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows that have an emotion and an audio or video clip, as they are (section 3.1 of the paper)."""
    for row in rows:
        if row["emotion"] is not None and (row["audio"] is not None or row["video"] is not None):
            yield row


def utterances(rows: Iterable[Row]) -> Iterator[Row]:
    """The turns that say something, as {corpus, split, dialogue_id, turn, utterance_id, speaker, text}."""
    for row in rows:
        if row["text"]:
            yield {name: row[name] for name in (*IDS, "turn", "utterance_id", "speaker", "text")}


def conversations(rows: Iterable[Row]) -> Iterator[Row]:
    """Each dialogue as {corpus, split, dialogue_id, turns}, each of its turns as {turn, utterance_id, speaker, text,
    emotion} (section 3.2 of the paper)."""
    for turns in _dialogues(rows):
        names = ("turn", "utterance_id", "speaker", "text", "emotion")
        yield {
            **{name: turns[0][name] for name in IDS},
            "turns": [{name: row[name] for name in names} for row in turns],
        }


def is_reply(turns: list[Row], k: int) -> bool:
    """Whether turn k answers turn k-1: it exists, another person speaks, and something is said."""
    return k >= 1 and turns[k]["speaker"] != turns[k - 1]["speaker"] and bool(turns[k]["text"])


def _media(kind: str, value: Row | None) -> list[Row]:
    if value is None:
        return []
    return [{"type": kind, **{name: value[name] for name in ("path", "bytes") if value[name] is not None}}]


def make_sample(turns: list[Row], k: int) -> Row:
    """The training sample whose reply is turn k: what was said before, turn k-1 with its clip, the reply.

    Whoever replies is the assistant and everyone else a user; `name` keeps the speaker. Media goes with turn k-1 only.

    Args:
        turns: the rows 0 .. k of the dialogue; only row k-1 needs its `audio` and `video`.

    Returns:
        {prompt: messages, reply: text, emotion: of turn k-1, reply_emotion, corpus, split, dialogue_id, turn: k,
        utterance_id: of turn k}.
    """
    reply = turns[k]
    prompt = []
    for place, row in enumerate(turns[:k]):
        content = [{"type": "text", "text": row["text"]}]
        if place == k - 1:
            content = _media("audio", row["audio"]) + _media("video", row["video"]) + content
        role = "assistant" if row["speaker"] == reply["speaker"] else "user"
        prompt.append({"role": role, "name": row["speaker"], "content": content})
    return {
        "prompt": prompt,
        "reply": reply["text"],
        "emotion": turns[k - 1]["emotion"],
        "reply_emotion": reply["emotion"],
        **{name: reply[name] for name in (*IDS, "turn", "utterance_id")},
    }


def dialogue_samples(rows: Iterable[Row]) -> Iterator[Row]:
    """The samples of `make_sample` for each turn k >= 1 whose speaker differs from that of turn k-1."""
    for turns in _dialogues(rows):
        for k in range(1, len(turns)):
            if is_reply(turns, k):
                yield make_sample(turns, k)


class DialogueSamples:
    """`dialogue_samples` by their number, for a data loader: `len(samples)`, `samples[i]`.

    Holds the dataset and two integers a sample; an item reads the texts of its dialogue and the clip of one turn.

    Args:
        dataset: rows of the schema, the turns of a dialogue together and in order.
        speakers: whose replies; everybody's by default.
    """

    def __init__(self, dataset: Dataset, speakers: Sequence[str] | None = None):
        self.dataset = dataset
        self.texts = dataset.remove_columns(["audio", "video"])  # no media is read for the history
        light = list(dataset.select_columns([*IDS, "turn", "speaker", "text"]))
        self.places = [
            (start, k)
            for start, end in _spans(light)
            for k in range(1, end - start)
            if is_reply(light[start:end], k) and (speakers is None or light[start + k]["speaker"] in speakers)
        ]
        if speakers is not None and light and not self.places:
            known = sorted({row["speaker"] for row in light})[:20]
            raise ValueError(f"Nobody of {list(speakers)} replies in this data set; its speakers are {known}.")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        start, k = self.places[index]
        columns = self.texts[start : start + k + 1]
        turns = [{name: values[i] for name, values in columns.items()} for i in range(k + 1)]
        turns[k - 1] = self.dataset[start + k - 1]
        return make_sample(turns, k)


class EmotionClips:
    """`emotion_clips` by their number, for a data loader: `len(clips)`, `clips[i]`. No media is read to find them.

    Args:
        dataset: rows of the schema.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        columns = [dataset.with_format("arrow")[name] for name in ("emotion", "audio", "video")]
        labelled, heard, seen = (column.is_valid().to_pylist() for column in columns)
        self.places = [i for i in range(len(dataset)) if labelled[i] and (heard[i] or seen[i])]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        return self.dataset[self.places[index]]
