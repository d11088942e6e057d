"""What the stages train on, derived from rows of the schema without copying the corpus.

| view | one item | stage |
|---|---|---|
| `emotion_clips` | a turn with an emotion and a clip | emotion |
| `utterances` | a turn's speaker and text | memory_single |
| `conversations` | a whole dialogue | memory_multi |
| `dialogue_samples` | (history, turn, reply) | dialogue, epo |

Each function takes any iterable of rows (a list, a `datasets.Dataset`, a streamed one) and yields items one at a time.
The turns of a dialogue have to stand together and in order, as `prepare` writes them. For random access in training
`EmotionClips`, `Utterances`, `Conversations` and `DialogueSamples` give the same items by their number: they hold the
dataset and a number or two an item. Every speaker keeps their name, however many there are.

A dialogue never crosses splits: (corpus, split, dialogue_id) names it, and `check_splits` looks for any that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

Row = dict[str, Any]
IDS = ("corpus", "split", "dialogue_id")
UTTERANCE = (*IDS, "turn", "utterance_id", "speaker", "text")
SPOKEN = ("turn", "utterance_id", "speaker", "text", "emotion")


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in IDS)


def _scattered(key: tuple) -> ValueError:
    return ValueError(f"The turns of dialogue {key} do not stand together. Sort the rows by dialogue and turn.")


def _unexpected(key: tuple, turn: int, expected: int) -> ValueError:
    return ValueError(
        f"Dialogue {key} has turn {turn} where turn {expected} was expected. "
        "Number its turns from 0 without gaps and keep them in order."
    )


def _spans(rows: Iterable[Row]) -> Iterator[tuple[int, int]]:
    """(first, end) of the rows of each dialogue. ValueError if they do not stand together or are out of order."""
    seen, start, before, end = set(), 0, None, 0
    for end, row in enumerate(rows):
        key = _key(row)
        if key != before:
            if before is not None:
                yield start, end
            if key in seen:
                raise _scattered(key)
            seen.add(key)
            start, before = end, key
        if row["turn"] != end - start:
            raise _unexpected(key, row["turn"], end - start)
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
            yield {name: row[name] for name in UTTERANCE}


def conversations(rows: Iterable[Row]) -> Iterator[Row]:
    """Each dialogue as {corpus, split, dialogue_id, turns}, each of its turns as {turn, utterance_id, speaker, text,
    emotion} (section 3.2 of the paper)."""
    for turns in _dialogues(rows):
        yield _conversation(turns)


def _conversation(turns: list[Row]) -> Row:
    return {
        **{name: turns[0][name] for name in IDS},
        "turns": [{name: row[name] for name in SPOKEN} for row in turns],
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


# By number. Columns are read as Arrow holds them: no row becomes a Python object before it is asked for, and no media,
# embedded or not, is read to find out which rows an item is of.


def _pick(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Values of the rows of the table, (rows of the table,), as values of the rows of the dataset, (rows,)."""
    # `select` and `filter` leave the table as it is and keep the numbers of the rows. To index the dataset instead
    # would copy whole columns, embedded media included.
    indices = dataset._indices
    return values if indices is None else values[indices.column(0).to_numpy()]


def is_there(dataset: Dataset, name: str) -> np.ndarray:
    """Which rows have a value in the column, (rows,) bool."""
    return _pick(dataset, dataset.data.column(name).is_valid().to_numpy())


def says_something(dataset: Dataset) -> np.ndarray:
    """Which rows have a text that is not empty, (rows,) bool."""
    length = pc.fill_null(pc.binary_length(dataset.data.column("text")), 0)
    return _pick(dataset, length.to_numpy() > 0)


def _codes(dataset: Dataset, name: str) -> tuple[np.ndarray, list[str | None]]:
    """A column of few strings as a number a row, (rows,), and the string of each number."""
    column = dataset.data.column(name)
    strings = pc.unique(column)
    return _pick(dataset, pc.index_in(column, strings).to_numpy()), strings.to_pylist()


def _keys(dataset: Dataset) -> tuple[np.ndarray, list[list]]:
    """The dialogue of each row as a number, (rows,), and the strings that the number stands for, a list a column."""
    keys, names = np.zeros(len(dataset), dtype=np.int64), []
    for name in IDS:
        codes, strings = _codes(dataset, name)
        keys = keys * max(len(strings), 1) + codes
        names.append(strings)
    return keys, names


def _key_of(key: int, names: list[list]) -> tuple:
    """(corpus, split, dialogue_id) of a number of `_keys`."""
    parts = []
    for strings in reversed(names):
        key, place = divmod(int(key), len(strings))
        parts.append(strings[place])
    return tuple(reversed(parts))


def _starts(dataset: Dataset) -> np.ndarray:
    """The first row of each dialogue, (dialogues,). ValueError as in `_spans`."""
    keys, names = _keys(dataset)
    rows = np.arange(len(keys))
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    turns = _pick(dataset, dataset.data.column("turn").to_numpy())
    places = rows - np.repeat(starts, np.diff(starts, append=len(keys)))
    _, first = np.unique(keys[starts], return_index=True)
    again = np.delete(starts, first)
    wrong = np.flatnonzero(turns != places)
    if len(again) and (len(wrong) == 0 or again[0] <= wrong[0]):
        raise _scattered(_key_of(keys[again[0]], names))
    if len(wrong):
        row = wrong[0]
        raise _unexpected(_key_of(keys[row], names), turns[row].item(), places[row].item())
    return starts


def check_splits(datasets: Mapping[str, Dataset]) -> None:
    """
    Refuses splits that share a dialogue, such as those of a shuffled data set that was split by rows.

    The same `dialogue_id` in two splits is two dialogues where the column `split` says so: the ids of some corpora
    start again in each split.

    Args:
        datasets: rows of the schema by the name of their split, as `load_dataset` gives them.

    Raises:
        ValueError: names the dialogue and both splits.
    """
    seen: dict[tuple, str] = {}
    for split, dataset in datasets.items():
        keys, names = _keys(dataset)
        for key in np.unique(keys):
            dialogue = _key_of(key, names)
            other = seen.setdefault(dialogue, split)
            if other != split:
                raise ValueError(
                    f'Dialogue {dialogue} is in "{other}" and in "{split}": what is tested on would be trained on. '
                    "Split the data by dialogues, as `empathic prepare` does."
                )


def _turns(dataset: Dataset, start: int, end: int) -> list[Row]:
    columns = dataset[start:end]
    return [{name: values[i] for name, values in columns.items()} for i in range(end - start)]


class EmotionClips:
    """`emotion_clips` by their number, for a data loader: `len(clips)`, `clips[i]`.

    Args:
        dataset: rows of the schema.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset.with_format(None)
        has_clip = is_there(dataset, "audio") | is_there(dataset, "video")
        self.places = np.flatnonzero(is_there(dataset, "emotion") & has_clip)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        return self.dataset[int(self.places[index])]


class Utterances:
    """`utterances` by their number: `len(utterances)`, `utterances[i]`.

    Args:
        dataset: rows of the schema; it needs no columns of media.
    """

    def __init__(self, dataset: Dataset):
        self.texts = dataset.select_columns(list(UTTERANCE)).with_format(None)
        self.places = np.flatnonzero(says_something(dataset))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        return self.texts[int(self.places[index])]


class Conversations:
    """`conversations` by their number: `len(conversations)`, `conversations[i]`.

    Args:
        dataset: rows of the schema, the turns of a dialogue together and in order; it needs no columns of media.

    Raises:
        ValueError: for turns that are scattered, out of order or missing.
    """

    def __init__(self, dataset: Dataset):
        self.texts = dataset.select_columns([*IDS, *SPOKEN]).with_format(None)
        starts = _starts(dataset)
        self.places = np.stack([starts, np.append(starts[1:], len(dataset))], axis=1) if len(starts) else starts

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        start, end = self.places[index].tolist()
        return _conversation(_turns(self.texts, start, end))


class DialogueSamples:
    """`dialogue_samples` by their number, for a data loader: `len(samples)`, `samples[i]`.

    An item reads the texts of its dialogue up to the reply, and the clip of one turn.

    Args:
        dataset: rows of the schema, the turns of a dialogue together and in order.
        speakers: whose replies; everybody's by default.

    Raises:
        ValueError: for turns that are scattered, out of order or missing, or if none of `speakers` replies to anyone.
    """

    def __init__(self, dataset: Dataset, speakers: Sequence[str] | None = None):
        self.dataset = dataset.with_format(None)
        self.texts = self.dataset.remove_columns(["audio", "video"])  # no media is read for the history
        starts = _starts(dataset)
        first = np.repeat(starts, np.diff(starts, append=len(dataset)))  # of each row, where its dialogue starts
        codes, names = _codes(dataset, "speaker")
        # As `is_reply`, for all rows at once.
        replies = says_something(dataset) & (np.diff(codes, prepend=codes[:1]) != 0)
        replies[starts] = False
        if speakers is not None:
            replies &= np.isin(codes, [code for code, name in enumerate(names) if name in speakers])
        rows = np.flatnonzero(replies)
        self.places = np.stack([first[rows], rows], axis=1)
        if speakers is not None and len(dataset) and not len(rows):
            known = sorted(names[code] for code in np.unique(codes))[:20]
            raise ValueError(f"Nobody of {list(speakers)} replies in this data set; its speakers are {known}.")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        start, row = self.places[index].tolist()
        turns, k = _turns(self.texts, start, row + 1), row - start
        turns[k - 1] = self.dataset[row - 1]
        return make_sample(turns, k)
