"""The map-style views equal the streaming views after any operation on the dataset, and need little memory."""

import pickle
import random
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset

from empathic.data_prep.schema import row_features
from empathic.data_prep.views import (
    Conversations,
    DialogueSamples,
    EmotionClips,
    Utterances,
    check_splits,
    conversations,
    dialogue_samples,
    emotion_clips,
    utterances,
)

VIEWS = [
    (EmotionClips, emotion_clips),
    (Utterances, utterances),
    (Conversations, conversations),
    (DialogueSamples, dialogue_samples),
]


def make_rows(dialogues, seed=0, split="train", corpus="c", media=b"m"):
    """Dialogues of 1 to 7 turns between up to four people, with optional values missing at times."""
    draw = random.Random(seed)
    rows = []
    for number in dialogues:
        for turn in range(draw.randint(1, 7)):
            clip = {"path": f"{number}-{turn}.mp4", "bytes": media}
            rows.append(
                {
                    "corpus": corpus, "split": split, "dialogue_id": f"d{number}", "turn": turn,
                    "utterance_id": f"d{number}_{turn}", "speaker": draw.choice(["Ann", "Ben", "Cleo", "Dora"]),
                    "text": draw.choice(["", "Hello.", "Hé, 你好!"]), "emotion": draw.choice([None, "sad", "happy"]),
                    "audio": draw.choice([None, clip]), "video": draw.choice([None, None, clip]),
                    "start": None, "end": None,
                }
            )  # fmt: skip
    return rows


def make_dataset(*args, **options):
    return Dataset.from_list(make_rows(*args, **options), features=row_features())


def changed(dataset, kind):
    """All or some rows after common operations on a dataset, with the dialogues still contiguous."""
    if kind == "select":
        order = sorted(range(len(dataset)), key=lambda i: (int(dataset[i]["dialogue_id"][1:]) * 7 % 10, i))
        return dataset.select(order)
    if kind == "filter":
        return dataset.filter(lambda row: row["dialogue_id"] not in ("d0", "d3"), keep_in_memory=True)
    if kind == "concatenate":
        parts = [changed(dataset, "select"), make_dataset(range(5), seed=3, corpus="other")]
        return concatenate_datasets([*parts, make_dataset(range(5), seed=3, corpus="other", split="test")])
    if kind == "slice":
        first = next(i for i in range(len(dataset)) if dataset[i]["dialogue_id"] == "d4")
        return dataset.select(range(first, len(dataset)))
    if kind == "format":
        return dataset.with_format("numpy", columns=["turn", "text"])
    if kind == "empty":
        return dataset.select([])
    return dataset


@pytest.mark.parametrize("kind", ["plain", "select", "filter", "concatenate", "slice", "format", "empty"])
@pytest.mark.parametrize(("by_number", "stream"), VIEWS)
def test_by_number_as_in_a_stream(by_number, stream, kind):
    dataset = changed(make_dataset(range(10)), kind)
    expected = list(stream(list(dataset.with_format(None))))
    view = by_number(dataset)
    assert len(view) == len(expected) and (len(expected) > 3 or kind == "empty")
    assert [view[i] for i in range(len(view))] == expected == list(view)
    if expected:
        assert view[-1] == expected[-1] and view[np.int64(1)] == expected[1]
    with pytest.raises(IndexError):
        view[len(view)]
    assert list(pickle.loads(pickle.dumps(view))) == expected  # for the workers of a data loader


def test_text_views_need_no_media():
    dataset = make_dataset(range(4))
    texts = dataset.remove_columns(["audio", "video", "start", "end"])
    assert list(Utterances(texts)) == list(Utterances(dataset))
    assert list(Conversations(texts)) == list(Conversations(dataset))


def test_everybody_keeps_their_name():
    first = {**make_rows([0])[0], "text": "Hi."}
    rows = [{**first, "turn": turn, "speaker": name} for turn, name in enumerate("ABCB")]
    dataset = Dataset.from_list(rows, features=row_features())
    sample = DialogueSamples(dataset)[2]
    assert [(message["role"], message["name"]) for message in sample["prompt"]] == [
        ("user", "A"), ("assistant", "B"), ("user", "C"),
    ]  # fmt: skip
    assert [turn["speaker"] for turn in Conversations(dataset)[0]["turns"]] == list("ABCB")
    assert [row["speaker"] for row in Utterances(dataset)] == list("ABCB")


def test_chosen_speakers_after_select():
    dataset = make_dataset(range(30))
    replies = {(row["dialogue_id"], row["turn"]): row["speaker"] for row in dataset}
    for names in (["Ann"], ["Ben", "Dora"]):
        wanted = [s for s in dialogue_samples(dataset) if replies[s["dialogue_id"], s["turn"]] in names]
        assert wanted and list(DialogueSamples(dataset, names)) == wanted
    only = dataset.filter(lambda row: row["dialogue_id"] == "d0", keep_in_memory=True)
    with pytest.raises(ValueError, match=r"None of \['Eve'\] replies") as error:
        DialogueSamples(only, ["Eve"])
    assert str(error.value).endswith(f"its speakers are {sorted(set(only['speaker']))}.")  # only of these rows
    assert len(DialogueSamples(dataset.select([]), ["Eve"])) == 0


# Order ---------------------------------------------------------------------------------------------------------------


def test_what_a_stream_refuses_is_refused_with_the_same_words():
    rows = make_rows(range(6), seed=1)
    draw = random.Random(0)
    refused = 0
    for _ in range(24):
        some = list(rows)
        kind = draw.randrange(4)
        first, last = sorted(draw.sample(range(len(some)), 2))
        if kind == 0:
            del some[first]
        elif kind == 1:
            some[first], some[last] = some[last], some[first]
        elif kind == 2:
            some = some[first:] + some[:first]
        else:
            some.insert(last, some[first])
        dataset = Dataset.from_list(some, features=row_features())
        try:
            expected = list(conversations(some))
        except ValueError as error:
            refused += 1
            for view in (Conversations, DialogueSamples):
                with pytest.raises(ValueError) as raised:
                    view(dataset)
                assert str(raised.value) == str(error)
        else:
            assert list(Conversations(dataset)) == expected
    assert 10 < refused < 24


def test_a_dialogue_that_crosses_splits():
    train, test = make_dataset(range(6)), make_dataset(range(6), split="test")
    check_splits(DatasetDict(train=train, test=test))  # equal ids in two splits are different dialogues
    check_splits({"train": train, "more": make_dataset(range(6), corpus="other")})
    rows = DatasetDict(train=train.select(range(8)), test=train.select(range(8, len(train))))
    assert rows["train"][-1]["dialogue_id"] == rows["test"][0]["dialogue_id"] == "d1"
    with pytest.raises(ValueError, match=r"Dialogue \('c', 'train', 'd1'\) is in \"train\" and in \"test\""):
        check_splits(rows)
    shuffled = train.train_test_split(test_size=0.3, seed=0)
    with pytest.raises(ValueError, match="Split the data by dialogues"):
        check_splits(shuffled)
    # A split by dialogues is valid, whatever the names of the splits.
    check_splits({"a": train.filter(lambda row: row["dialogue_id"] < "d3", keep_in_memory=True),
                  "b": train.filter(lambda row: row["dialogue_id"] >= "d3", keep_in_memory=True)})  # fmt: skip
    check_splits({"train": train, "test": train.select([])})


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """600 dialogues of 15 turns whose embedded clips are 1 kB each: 9 MB of media on disk."""
    folder = tmp_path_factory.mktemp("large")
    count, turns = 600, 15
    number = np.arange(count * turns)
    columns = {
        "corpus": ["c"] * len(number),
        "split": ["train"] * len(number),
        "dialogue_id": [f"dialogue-{i // turns}" for i in number],
        "turn": number % turns,
        "utterance_id": [f"u{i}" for i in number],
        "speaker": [("Ann", "Ben")[i % 2] for i in number],
        "text": [f"This is what is said in utterance {i}." for i in number],
        "emotion": ["sad"] * len(number),
        "audio": [{"path": "a.wav", "bytes": b"x" * 1000}] * len(number),
        "video": [None] * len(number),
        "start": [None] * len(number),
        "end": [None] * len(number),
    }
    Dataset.from_dict(columns, features=row_features()).to_parquet(folder / "train.parquet", batch_size=1000)
    dataset = load_dataset("parquet", data_files=str(folder / "train.parquet"), cache_dir=str(folder / "cache"))
    return dataset["train"]


@pytest.mark.parametrize("kind", ["plain", "filtered"])
@pytest.mark.parametrize("view", [EmotionClips, Utterances, Conversations, DialogueSamples])
def test_little_is_held(large, view, kind):
    """No media is read to find the items, and no row becomes a Python object."""
    dataset = large if kind == "plain" else large.select(np.arange(0, len(large)))
    if kind == "filtered":
        dataset = large.select([i for i in range(len(large)) if i // 15 != 7])
        assert dataset._indices is not None
    made = view(dataset)  # the first time, imports count
    expected = {EmotionClips: 9000, Utterances: 9000, Conversations: 600, DialogueSamples: 8400}[view]
    assert len(made) == expected - (0 if kind == "plain" else expected // 600)
    arrow, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        made = view(dataset)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(arrow)
    # Bytes per row. The media has 1,000, the strings 100; a row as a Python object needs about 1,000.
    assert held + pool.bytes_allocated() <= 40 * len(dataset)
    assert most + pool.max_memory() <= 150 * len(dataset)
    assert made[len(made) - 1] is not None
