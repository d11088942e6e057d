"""Training views: the items that each training stage reads, derived from schema rows without copying the corpus.

| view | one item | stage |
|---|---|---|
| `emotion_clips` | a turn with an emotion and a clip | emotion |
| `utterances` | a turn's speaker and text | memory_single |
| `conversations` | a whole dialogue | memory_multi |
| `dialogue_samples` | (history, turn, reply) | dialogue, epo |

Each function takes any iterable of rows (a list, a `datasets.Dataset` or a streamed dataset) and yields items one at a
time. The turns of a dialogue must be contiguous and in order, as `prepare` writes them. For random access in training,
`EmotionClips`, `Utterances`, `Conversations` and `DialogueSamples` return the same items by index; they store the
dataset and one or two integers per item. Speaker names are kept, for any number of speakers.

A dialogue never crosses splits: (corpus, split, dialogue_id) identifies a dialogue, and `check_splits` checks this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

Row = dict[str, Any]
DIALOGUE_IDS = ("corpus", "split", "dialogue_id")
UTTERANCE = (*DIALOGUE_IDS, "turn", "utterance_id", "speaker", "text")
SPOKEN = ("turn", "utterance_id", "speaker", "text", "emotion")


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in DIALOGUE_IDS)


def _scattered(key: tuple) -> ValueError:
    return ValueError(f"The turns of dialogue {key} are not contiguous. Sort the rows by dialogue and turn.")


def _unexpected(key: tuple, turn: int, expected: int) -> ValueError:
    return ValueError(
        f"Dialogue {key} has turn {turn} where turn {expected} was expected. "
        "Number its turns from 0 without gaps and keep them in order."
    )


def _spans(rows: Iterable[Row]) -> Iterator[tuple[int, int]]:
    """Yield the row range (first, end) of each dialogue. ValueError if turns are not contiguous or not in order."""
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
    """Yield the rows of each dialogue, one dialogue at a time."""
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
    """Yield the rows that have an emotion and an audio or video clip, unchanged (section 3.1 of the paper)."""
    for row in rows:
        if row["emotion"] is not None and (row["audio"] is not None or row["video"] is not None):
            yield row


def utterances(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the turns with non-empty text as {corpus, split, dialogue_id, turn, utterance_id, speaker, text}."""
    for row in rows:
        if row["text"]:
            yield {name: row[name] for name in UTTERANCE}


def conversations(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield each dialogue as {corpus, split, dialogue_id, turns}, where each turn is {turn, utterance_id, speaker,
    text, emotion} (section 3.2 of the paper)."""
    for turns in _dialogues(rows):
        yield _conversation(turns)


def _conversation(turns: list[Row]) -> Row:
    return {
        **{name: turns[0][name] for name in DIALOGUE_IDS},
        "turns": [{name: row[name] for name in SPOKEN} for row in turns],
    }


def is_reply(turns: list[Row], k: int) -> bool:
    """Whether turn k replies to turn k-1: turn k-1 exists, the speaker changes, and the text of turn k is not empty."""
    return k >= 1 and turns[k]["speaker"] != turns[k - 1]["speaker"] and bool(turns[k]["text"])


def _media(kind: str, value: Row | None) -> list[Row]:
    if value is None:
        return []
    return [{"type": kind, **{name: value[name] for name in ("path", "bytes") if value[name] is not None}}]


def make_sample(turns: list[Row], k: int) -> Row:
    """Make the training sample whose reply is turn k: the history, turn k-1 with its clip, and the reply.

    The replying speaker has the role `assistant`, every other speaker the role `user`; `name` keeps the speaker's name.
    Only turn k-1 has media.

    Args:
        turns: rows 0 to k of the dialogue; only row k-1 needs its `audio` and `video`.

    Returns:
        A dict with `prompt` (messages), `reply` (text), `emotion` (emotion of turn k-1), `reply_emotion`, `corpus`,
        `split`, `dialogue_id`, `turn` (k) and `utterance_id` (id of turn k).
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
        **{name: reply[name] for name in (*DIALOGUE_IDS, "turn", "utterance_id")},
    }


def dialogue_samples(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield a sample of `make_sample` for each turn k that replies to turn k-1 (see `is_reply`)."""
    for turns in _dialogues(rows):
        for k in range(1, len(turns)):
            if is_reply(turns, k):
                yield make_sample(turns, k)


# Random access. Columns are read as Arrow arrays: a row becomes a Python object only when it is requested, and no media
# is read, embedded or not, to find the rows of each item.


def _pick(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Map one value per table row, (table rows,), to one value per dataset row, (rows,)."""
    # `select` and `filter` do not change the table; they store row indices. Indexing the dataset instead would copy
    # whole columns, including embedded media.
    indices = dataset._indices
    return values if indices is None else values[indices.column(0).to_numpy()]


def is_there(dataset: Dataset, name: str) -> np.ndarray:
    """Mask of the rows with a value in column `name`, (rows,) bool."""
    return _pick(dataset, dataset.data.column(name).is_valid().to_numpy())


def says_something(dataset: Dataset) -> np.ndarray:
    """Mask of the rows whose text is not empty, (rows,) bool."""
    length = pc.fill_null(pc.binary_length(dataset.data.column("text")), 0)
    return _pick(dataset, length.to_numpy() > 0)


def _codes(dataset: Dataset, name: str) -> tuple[np.ndarray, list[str | None]]:
    """Encode a string column of few distinct values: an integer code per row, (rows,), and the string of each code."""
    column = dataset.data.column(name)
    strings = pc.unique(column)
    return _pick(dataset, pc.index_in(column, strings).to_numpy()), strings.to_pylist()


def _keys(dataset: Dataset) -> tuple[np.ndarray, list[list]]:
    """Encode the dialogue of each row as an integer key, (rows,). Also returns the distinct strings of each column."""
    keys, names = np.zeros(len(dataset), dtype=np.int64), []
    for name in DIALOGUE_IDS:
        codes, strings = _codes(dataset, name)
        keys = keys * max(len(strings), 1) + codes
        names.append(strings)
    return keys, names


def _key_of(key: int, names: list[list]) -> tuple:
    """The (corpus, split, dialogue_id) of a key of `_keys`."""
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
    Check that no dialogue is in two splits, as happens when a shuffled dataset is split by rows.

    Rows with equal `dialogue_id` but different values in the column `split` belong to different dialogues, because the
    ids of some corpora start again in each split.

    Args:
        datasets: maps the name of each split to its schema rows, as `load_dataset` returns them.

    Raises:
        ValueError: if two splits share a dialogue; the message names the dialogue and both splits.
    """
    seen: dict[tuple, str] = {}
    for split, dataset in datasets.items():
        keys, names = _keys(dataset)
        for key in np.unique(keys):
            dialogue = _key_of(key, names)
            other = seen.setdefault(dialogue, split)
            if other != split:
                raise ValueError(
                    f'Dialogue {dialogue} is in "{other}" and in "{split}": test data would leak into training. '
                    "Split the data by dialogues, as `empathic prepare` does."
                )


def _turns(dataset: Dataset, start: int, end: int) -> list[Row]:
    columns = dataset[start:end]
    return [{name: values[i] for name, values in columns.items()} for i in range(end - start)]


class EmotionClips:
    """Map-style dataset of the items of `emotion_clips`: `len(clips)`, `clips[i]`.

    Args:
        dataset: schema rows.
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
    """Map-style dataset of the items of `utterances`: `len(utterances)`, `utterances[i]`.

    Args:
        dataset: schema rows; the media columns are not needed.
    """

    def __init__(self, dataset: Dataset):
        self.texts = dataset.select_columns(list(UTTERANCE)).with_format(None)
        self.places = np.flatnonzero(says_something(dataset))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        return self.texts[int(self.places[index])]


class Conversations:
    """Map-style dataset of the items of `conversations`: `len(conversations)`, `conversations[i]`.

    Args:
        dataset: schema rows, with the turns of each dialogue contiguous and in order; the media columns are not needed.

    Raises:
        ValueError: if the turns of a dialogue are not contiguous, not in order or not complete.
    """

    def __init__(self, dataset: Dataset):
        self.texts = dataset.select_columns([*DIALOGUE_IDS, *SPOKEN]).with_format(None)
        starts = _starts(dataset)
        self.places = np.stack([starts, np.append(starts[1:], len(dataset))], axis=1) if len(starts) else starts

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        start, end = self.places[index].tolist()
        return _conversation(_turns(self.texts, start, end))


class DialogueSamples:
    """Map-style dataset of the items of `dialogue_samples`: `len(samples)`, `samples[i]`.

    An item reads the texts of its dialogue up to the reply, and the clip of one turn.

    Args:
        dataset: schema rows, with the turns of each dialogue contiguous and in order.
        speakers: speakers whose replies are used; all speakers by default.

    Raises:
        ValueError: if the turns of a dialogue are not contiguous, not in order or not complete, or if none of
            `speakers` replies to anyone.
    """

    def __init__(self, dataset: Dataset, speakers: Sequence[str] | None = None):
        self.dataset = dataset.with_format(None)
        self.texts = self.dataset.remove_columns(["audio", "video"])  # the history needs no media
        starts = _starts(dataset)
        first = np.repeat(starts, np.diff(starts, append=len(dataset)))  # first row of each row's dialogue
        codes, names = _codes(dataset, "speaker")
        # `is_reply`, vectorized over all rows.
        replies = says_something(dataset) & (np.diff(codes, prepend=codes[:1]) != 0)
        replies[starts] = False
        if speakers is not None:
            replies &= np.isin(codes, [code for code, name in enumerate(names) if name in speakers])
        rows = np.flatnonzero(replies)
        self.places = np.stack([first[rows], rows], axis=1)
        if speakers is not None and len(dataset) and not len(rows):
            known = sorted(names[code] for code in np.unique(codes))[:20]
            raise ValueError(f"None of {list(speakers)} replies in this dataset; its speakers are {known}.")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        start, row = self.places[index].tolist()
        turns, k = _turns(self.texts, start, row + 1), row - start
        turns[k - 1] = self.dataset[row - 1]
        return make_sample(turns, k)
