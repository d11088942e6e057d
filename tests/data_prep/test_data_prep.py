"""From a folder of recordings to parquet, card and report, `datasets.load_dataset` and the training views."""

import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset

from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.corpora.base import LayoutError, hash_split
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.prepare import prepare_corpus
from empathic.data_prep.schema import SchemaError, parse_emotion, parse_split, parse_turn, row_features
from empathic.data_prep.views import (
    DialogueSamples,
    EmotionClips,
    conversations,
    dialogue_samples,
    emotion_clips,
    utterances,
)
from empathic.media_empathic import load_audio, load_video
from empathic.tiny.clips import write_clip

COLUMNS = "corpus split dialogue_id turn utterance_id speaker text emotion audio video start end".split()


def line(dialogue_id="d", turn=0, speaker="Ann", text="Hello.", **more):
    return {"dialogue_id": dialogue_id, "turn": turn, "speaker": speaker, "text": text, **more}


def write_folder(path, lines):
    path.mkdir(exist_ok=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in lines)
    (path / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    return path


def prepare(tmp_path, lines, **options):
    raw = write_folder(tmp_path / "raw", lines)
    return prepare_folder(raw, tmp_path / "out", progress=False, **options)


def load(tmp_path):
    return load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))


def reasons(items):
    return {item["item"]: item["reason"] for item in items}


@pytest.fixture
def clips(tmp_path):
    """The folder `raw` with four kinds of clips."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, streams in (("both.mp4", (True, True)), ("mute.mp4", (False, True)), ("voice.mp4", (True, False))):
        write_clip(raw / name, "happy", np.random.default_rng(0), 0.5, *streams)
    return raw


# The schema ----------------------------------------------------------------------------------------------------------


def test_labels():
    assert [parse_emotion(e) for e in EMOTIONS] == list(EMOTIONS)
    assert parse_emotion(" Happy ") == "happy" and parse_emotion(None) is None and parse_emotion("") is None
    assert parse_emotion("Joy", {"joy": "happy", "calm": None}) == "happy"
    assert parse_emotion("calm", {"joy": "happy", "calm": None}) is None
    for value in ("joy", 3, ["happy"]):
        with pytest.raises(SchemaError, match="is not one of angry, disgust, fearful, happy, neutral, sad, surprise"):
            parse_emotion(value)
    assert [parse_split(s) for s in ("train", "Dev", "valid", "test", None)] == [
        "train", "validation", "validation", "test", None,
    ]  # fmt: skip
    assert [parse_turn(t) for t in (0, "12", 3.0)] == [0, 12, 3]
    for value in (None, -1, 1.5, True, "two"):
        with pytest.raises(SchemaError, match='"turn" is'):
            parse_turn(value)


# The folder ----------------------------------------------------------------------------------------------------------


def test_folder_becomes_a_dataset(tmp_path, clips):
    report = prepare(
        tmp_path,
        [
            line("1", 0, "Ann", "I passed!", emotion="Happy", file_name="both.mp4", split="train", start=1.5, end=2),
            line("1", 1, "Ben", "Grüße – I knew.", split="train", utterance_id="b7"),
            line("2", 0, "Ben", "Hm.", emotion="sad", video="mute.mp4", split="dev"),
            line(3, 0, "Ann", "", audio="voice.mp4", split="test", emotion=None),
        ],
    )
    assert report["rows"] == 4 and report["left_out"] == report["repaired"] == []
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    assert report["splits"]["train"] == {
        "rows": 2, "dialogues": 1, "with_audio": 1, "with_video": 1, "emotions": {"happy": 1, "none": 1},
    }  # fmt: skip

    data = load(tmp_path)
    assert {name: len(split) for name, split in data.items()} == {"train": 2, "validation": 1, "test": 1}
    assert data["train"].column_names == COLUMNS and data["train"].features == row_features()
    clip = {"path": str(clips / "both.mp4"), "bytes": None}
    assert data["train"][0] == {
        "corpus": "folder", "split": "train", "dialogue_id": "1", "turn": 0, "utterance_id": "1_0", "speaker": "Ann",
        "text": "I passed!", "emotion": "happy", "audio": clip, "video": clip, "start": 1.5, "end": 2.0,
    }  # fmt: skip
    second = data["train"][1]
    assert (second["text"], second["utterance_id"]) == ("Grüße – I knew.", "b7")
    assert second["emotion"] is second["audio"] is second["video"] is second["start"] is None
    assert data["validation"][0]["audio"] is None and data["validation"][0]["video"]["path"].endswith("mute.mp4")
    assert data["test"][0]["video"] is None and data["test"][0]["dialogue_id"] == "3"
    assert load_video(data["train"][0]["video"], 2).shape == (2, 64, 64, 3)


def test_which_file_is_heard_and_seen(tmp_path, clips):
    cases = [
        (dict(file_name="both.mp4"), ("both.mp4", "both.mp4")),
        (dict(video="both.mp4"), ("both.mp4", "both.mp4")),
        (dict(video="both.mp4", audio=None), ("both.mp4", "both.mp4")),
        (dict(video="both.mp4", audio="voice.mp4"), ("voice.mp4", "both.mp4")),
        (dict(audio="both.mp4"), ("both.mp4", None)),
        (dict(file_name="both.mp4", audio="voice.mp4"), ("voice.mp4", "both.mp4")),
        (dict(file_name="mute.mp4"), (None, "mute.mp4")),
        (dict(file_name="voice.mp4"), ("voice.mp4", None)),
        (dict(video="mute.mp4"), (None, "mute.mp4")),
        (dict(), (None, None)),
    ]
    report = prepare(tmp_path, [line("d", k, split="train", **keys) for k, (keys, _) in enumerate(cases)])
    assert report["repaired"] == []
    for row, (keys, expected) in zip(load(tmp_path)["train"], cases, strict=True):
        found = tuple(row[kind] and row[kind]["path"].split("/")[-1] for kind in ("audio", "video"))
        assert found == expected, keys


def test_embedded_media_needs_no_files(tmp_path, clips):
    prepare(tmp_path, [line(split="train", file_name="both.mp4")], embed=True)
    data = (clips / "both.mp4").read_bytes()
    (clips / "both.mp4").unlink()
    row = load(tmp_path)["train"][0]
    assert row["audio"] == row["video"] == {"path": "both.mp4", "bytes": data}
    assert load_video(row["video"], 2).shape == (2, 64, 64, 3) and len(load_audio(row["audio"])) > 7000


def test_lines_that_are_no_turn_are_left_out(tmp_path):
    bad = [
        "{not json",
        "[1, 2]",
        line(dialogue_id=None),
        line(turn="first"),
        line(speaker="  "),
        line(text=None),
        line(text="Again."),  # turn 0 once more
    ]
    report = prepare(tmp_path, ["", line(split="train"), *bad])
    assert (report["found"], report["rows"], report["repaired"]) == (8, 1, [])
    found = reasons(report["left_out"])
    messages = [
        "not JSON", "is a list, not an object", '"dialogue_id" is None', "\"turn\" is 'first'", "\"speaker\" is '  '",
        '"text" is None', 'turn 0 of dialogue "d" is in metadata.jsonl:2 already',
    ]  # fmt: skip
    assert list(found) == [f"metadata.jsonl:{number}" for number in range(3, 10)]
    for reason, message in zip(found.values(), messages, strict=True):
        assert message in reason

    with open(tmp_path / "raw" / "metadata.jsonl", "ab") as file:
        file.write('{"dialogue_id": "e", "turn": 0, "speaker": "Jörg", "text": "x"}\n'.encode("latin-1"))
    again = prepare_folder(tmp_path / "raw", tmp_path / "out", progress=False)
    assert "not UTF-8" in reasons(again["left_out"])["metadata.jsonl:10"] and again["found"] == 9


def test_what_is_wrong_with_a_turn_is_named_and_the_turn_stays(tmp_path, clips):
    (clips / "empty.mp4").write_bytes(b"")
    (clips / "cut.mp4").write_bytes((clips / "both.mp4").read_bytes()[:-300])
    (clips / "song.mp4").write_bytes((clips / "voice.mp4").read_bytes())
    report = prepare(
        tmp_path,
        [
            line("d", 0, emotion="joyful", split="train"),
            line("d", 1, file_name="empty.mp4"),
            line("d", 2, file_name="cut.mp4", audio="voice.mp4"),
            line("d", 3, video="gone.mp4"),
            line("d", 4, video="song.mp4"),
            line("d", 5, audio="mute.mp4"),
            line("d", 6, audio=["a.wav"]),
            line("d", 7, start=3, end=1),
            line("d", 8, start="soon", emotoin="sad"),
            line("d", 9, split="holdout"),
        ],
        num_workers=2,
    )
    assert report["rows"] == 10 and report["left_out"] == []
    messages = [
        (1, "the emotion 'joyful' is not one of angry, disgust, fearful, happy, neutral, sad, surprise"),
        (7, "\"audio\" is ['a.wav']"),
        (8, "it ends at 1.0 s, before its start at 3.0 s"),
        (9, "\"start\" is 'soon'"),
        (9, 'the key "emotoin" is ignored'),
        (10, "the split 'holdout' is not one of train, validation, test"),
    ]
    found = [(item["item"], item["reason"]) for item in report["repaired"]]
    assert len(found) == len(messages)
    for number, message in messages:
        assert any(item == f"metadata.jsonl:{number}" and message in reason for item, reason in found), message
    tail = "The turn is kept without its"
    lacking = {
        2: ("empty.mp4: the file is empty (0 bytes)", f"{tail} audio and video."),
        3: ("cut.mp4: the mp4 file is cut short", f"{tail} video."),
        4: ("gone.mp4: there is no such file", f"{tail} audio and video."),
        5: ("song.mp4: has no video", f"{tail} video."),
        6: ("mute.mp4: has no audio", f"{tail} audio."),
    }
    assert list(reasons(report["without_media"])) == [f"metadata.jsonl:{number}" for number in lacking]
    for item, (start, end) in zip(report["without_media"], lacking.values(), strict=True):
        assert item["reason"].startswith(start) and item["reason"].endswith(end), item
    rows = load(tmp_path)["train"]
    assert [row["turn"] for row in rows] == list(range(10)) and set(rows["emotion"]) == {None}
    assert [bool(row["audio"]) for row in rows] == [k in (2, 4) for k in range(10)]  # the audio of song.mp4 is used
    assert not any(row["video"] for row in rows)


def test_one_broken_stream_does_not_cost_the_other(tmp_path, clips, write_media, grey_frames, tone):
    path = write_media(clips / "half.mkv", frames=grey_frames(10), samples=tone(1.0), video_codec="mjpeg")
    pieces = path.read_bytes().split(b"\xff\xd8\xff")  # the start of each JPEG image
    assert len(pieces) == 11 and min(map(len, pieces)) > 590
    path.write_bytes(b"\0\0\0".join([pieces[0]] + [bytes(590) + piece[590:] for piece in pieces[1:]]))
    report = prepare(tmp_path, [line(split="train", file_name="half.mkv")])
    assert "half.mkv: no frame of its video stream can be decoded" in report["without_media"][0]["reason"]
    row = load(tmp_path)["train"][0]
    assert row["video"] is None and len(load_audio(row["audio"])) > 15000


def test_dialogues_are_numbered_and_kept_together(tmp_path):
    lines = [
        line("a", 2),
        line("b", 0, split="test"),
        line("a", 1, text="First."),
        line("a", 5),
        line("b", 1, split="train"),
    ]
    report = prepare(tmp_path, lines)
    found = reasons(report["repaired"])
    assert found['dialogue "a"'] == "turn 0, 3, 4 is missing. The turns were renumbered from 0."
    expected = "metadata.jsonl:2 has the split test, metadata.jsonl:5 has train. The whole dialogue is in test."
    assert found['dialogue "b"'] == expected
    data = load(tmp_path)
    rows = [row for split in data.values() for row in split]
    a = [row for row in rows if row["dialogue_id"] == "a"]
    assert [row["turn"] for row in a] == [0, 1, 2] and a[0]["text"] == "First."
    assert [row["utterance_id"] for row in a] == ["a_1", "a_2", "a_5"]  # the names keep the corpus's own numbers
    assert {row["split"] for row in rows if row["dialogue_id"] == "b"} == {"test"}


def test_split_by_hash(tmp_path):
    prepare(tmp_path, [line(f"d{i}", k) for i in range(300) for k in range(2)])
    splits = {}
    for name, split in load(tmp_path).items():
        for row in split:
            assert row["split"] == name
            splits.setdefault(row["dialogue_id"], set()).add(name)
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter(next(iter(found)) for found in splits.values())
    assert 220 < counts["train"] < 260 and counts["validation"] > 15 and counts["test"] > 15
    # The split of a dialogue must never depend on the machine or on the rest of the corpus.
    assert "".join(hash_split(f"d{i}")[1] for i in range(12)) == "rrerraerrrrr"  # tRain, vAlidation, tEst
    assert any(hash_split(f"d{i}", 0) != hash_split(f"d{i}", 1) for i in range(30))


def test_labels_can_be_mapped(tmp_path):
    lines = [line("d", 0, emotion="Joy", split="train"), line("d", 1, emotion="calm"), line("d", 2, emotion="sad")]
    report = prepare(tmp_path, lines, emotion_map={"joy": "happy", "Calm": None})
    assert report["repaired"] == [] and load(tmp_path)["train"]["emotion"][:] == ["happy", None, "sad"]
    with pytest.raises(SchemaError, match="'glad' is not one of"):
        prepare(tmp_path, lines, emotion_map={"joy": "glad"})


def test_nothing_to_write_and_running_again(tmp_path):
    assert prepare(tmp_path, [line(split="test"), line(turn=1, text="Yes.")])["rows"] == 2
    # A run that finds no turn reports this and keeps the earlier output.
    report = prepare(tmp_path, ["{}"])
    assert report["rows"] == 0 and len(report["left_out"]) == 1
    assert len(load(tmp_path)["test"]) == 2
    # Another run replaces it, with no split left over.
    prepare(tmp_path, [line(split="train")])
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache2"))
    assert list(data) == ["train"] and not list((tmp_path / "out" / "data").glob("test*"))


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl: there is no such file"):
        prepare_folder(tmp_path, tmp_path / "out", progress=False)
    raw = write_folder(tmp_path / "raw", [line()])
    with pytest.raises(ValueError, match="is the folder of the recordings"):
        prepare_folder(raw, raw, progress=False)


def test_a_corpus_embedded_again_is_not_unpacked_again(tmp_path, clips, monkeypatch):
    from empathic.data_prep.corpora import ravdess

    raw, out = tmp_path / "ravdess", tmp_path / "out"
    raw.mkdir()
    with zipfile.ZipFile(raw / "Video_Speech_Actor_01.zip", "w") as packed:
        packed.write(clips / "both.mp4", "Actor_01/01-01-03-01-01-01-01.mp4")
    report = prepare_corpus("ravdess", raw, out, embed=True, progress=False)
    assert report["rows"] == 1 and not (out / "unpacked").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(ravdess, "read", lambda *args: pytest.fail("read again"))
    assert prepare_corpus("ravdess", raw, out, embed=True, progress=False) == report
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for change in ({"split_seed": 1}, {"keep_calm": True}):
        with pytest.raises(pytest.fail.Exception):
            prepare_corpus("ravdess", raw, out, embed=True, progress=False, **change)
    (raw / "more.txt").write_text("x")
    with pytest.raises(pytest.fail.Exception):
        prepare_corpus("ravdess", raw, out, embed=True, progress=False)


def test_corpora_and_places_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r'no corpus "melt"\. Choose one of meld, iemocap'):
        prepare_corpus("melt", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="gone: there is no such folder"):
        prepare_corpus("meld", tmp_path / "gone", tmp_path / "out")
    with pytest.raises(LayoutError, match="is in the folder of the corpus"):
        prepare_corpus("meld", tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("place", ["media", "unpacked", ".work", "data", "media/mine"])
def test_recordings_in_a_folder_that_a_run_removes_are_refused(tmp_path, clips, place, embed):
    (clips / "metadata.jsonl").write_text(json.dumps(line(file_name="both.mp4")))
    raw = tmp_path / "out" / place
    raw.parent.mkdir(parents=True)
    clips.rename(raw)
    before = {path: path.read_bytes() for path in raw.iterdir()}
    with pytest.raises(LayoutError, match=r"is in .*Choose another folder for the output"):
        prepare_folder(raw, tmp_path / "out", embed=embed, progress=False)
    assert {path: path.read_bytes() for path in raw.iterdir()} == before and len(before) == 4


def test_folders_that_no_run_has_made_stay(tmp_path, clips):
    mine = [tmp_path / "out" / name / "holiday.mp4" for name in ("media", "unpacked")]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"mine")
    for _ in range(2):
        assert prepare(tmp_path, [line(file_name="both.mp4")], embed=True)["rows"] == 1
        assert [path.read_bytes() for path in mine] == [b"mine", b"mine"]


def test_numbers_that_no_float_and_no_python_takes(tmp_path):
    huge, endless = "1" + "0" * 400, "9" * 5000
    rows = [json.dumps(line(start=0)).replace('"start": 0', f'"start": {huge}')]
    rows += [json.dumps(line(turn=1, note=0)).replace('"note": 0', f'"note": {endless}')]
    rows += [line(turn=endless), line(turn=1)]
    report = prepare(tmp_path, rows)
    assert report["rows"] == 2
    assert '"start" is 1000' in reasons(report["repaired"])["metadata.jsonl:1"]
    left_out = reasons(report["left_out"])
    assert list(left_out) == ["metadata.jsonl:2", "metadata.jsonl:3"]
    assert left_out["metadata.jsonl:2"] == "the line contains a number with too many digits."


# Views ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(tmp_path, clips):
    """A dataset of two dialogues: Ann, Ben, Ben, Cleo, Ann (who says nothing) with clips, and Ann alone."""
    lines = [
        line("x", 0, "Ann", "Zero.", emotion="sad", file_name="both.mp4"),
        line("x", 1, "Ben", "One.", emotion="happy", audio="voice.mp4"),
        line("x", 2, "Ben", "Two.", emotion="angry"),
        line("x", 3, "Cleo", "Three.", video="mute.mp4"),
        line("x", 4, "Ann", ""),
        line("y", 0, "Ann", "Alone.", emotion="neutral", video="mute.mp4"),
        line("z", 0, "Ann", "Hi."),
        line("z", 1, "Ben", "Ho."),
    ]
    prepare(tmp_path, [{**row, "split": "train"} for row in lines])
    return load(tmp_path)["train"]


def test_dialogue_samples(talk, clips):
    samples = list(dialogue_samples(talk))
    assert [(s["dialogue_id"], s["turn"]) for s in samples] == [("x", 1), ("x", 3), ("z", 1)]
    both = {"path": str(clips / "both.mp4")}
    assert samples[0] == {
        "prompt": [
            {
                "role": "user",
                "name": "Ann",
                "content": [{"type": "audio", **both}, {"type": "video", **both}, {"type": "text", "text": "Zero."}],
            }
        ],
        "reply": "One.", "emotion": "sad", "reply_emotion": "happy", "corpus": "folder", "split": "train",
        "dialogue_id": "x", "turn": 1, "utterance_id": "x_1",
    }  # fmt: skip
    # Cleo replies to Ben: all others are users; earlier turns have no media.
    prompt = samples[1]["prompt"]
    assert [(m["role"], m["name"]) for m in prompt] == [("user", "Ann"), ("user", "Ben"), ("user", "Ben")]
    assert [[part["type"] for part in m["content"]] for m in prompt] == [["text"]] * 3
    assert samples[1]["reply"] == "Three." and samples[1]["emotion"] == "angry"


def test_who_replied_before_is_the_assistant():
    rows = [
        {"corpus": "c", "split": "train", "dialogue_id": "d", "turn": k, "utterance_id": str(k), "speaker": "AB"[k % 2],
         "text": f"t{k}", "emotion": None, "audio": None, "video": {"path": f"{k}.mp4", "bytes": b"v"}}
        for k in range(4)
    ]  # fmt: skip
    last = list(dialogue_samples(rows))[-1]
    assert [m["role"] for m in last["prompt"]] == ["user", "assistant", "user"]
    assert last["prompt"][2]["content"][0] == {"type": "video", "path": "2.mp4", "bytes": b"v"}
    assert [len(m["content"]) for m in last["prompt"]] == [1, 1, 2]


def test_samples_by_number_equal_the_stream(talk):
    samples = DialogueSamples(talk)
    assert len(samples) == 3 and [samples[i] for i in range(3)] == list(dialogue_samples(talk))
    assert samples[-1] == samples[2]
    with pytest.raises(IndexError):
        samples[3]


def test_other_views(talk):
    assert [(row["dialogue_id"], row["turn"]) for row in emotion_clips(talk)] == [("x", 0), ("x", 1), ("y", 0)]
    assert next(iter(emotion_clips(talk)))["video"]["path"].endswith("both.mp4")
    clips = EmotionClips(talk)
    assert len(clips) == 3 and [clips[i] for i in range(3)] == list(emotion_clips(talk))
    part = talk.select([6, 5, 1])
    assert [row["text"] for row in map(EmotionClips(part).__getitem__, range(2))] == ["Alone.", "One."]
    spoken = list(utterances(talk))
    assert [u["text"] for u in spoken] == ["Zero.", "One.", "Two.", "Three.", "Alone.", "Hi.", "Ho."]
    assert spoken[1]["speaker"] == "Ben" and "audio" not in spoken[1]
    talks = list(conversations(talk))
    assert [(t["dialogue_id"], len(t["turns"])) for t in talks] == [("x", 5), ("y", 1), ("z", 2)]
    assert talks[0]["turns"][3] == {
        "turn": 3, "utterance_id": "x_3", "speaker": "Cleo", "text": "Three.", "emotion": None,
    }  # fmt: skip


def test_views_are_lazy(talk):
    def endless():
        rows = list(talk)
        yield from rows
        for number in range(10**9):
            yield {**rows[0], "dialogue_id": f"more{number}"}

    stream = dialogue_samples(endless())
    assert [next(stream)["turn"] for _ in range(3)] == [1, 3, 1]


def test_dialogues_never_cross_splits(talk):
    rows = list(talk)
    moved = [{**row, "split": "test"} if row["dialogue_id"] == "z" and row["turn"] == 1 else row for row in rows]
    with pytest.raises(ValueError, match=r"\('folder', 'test', 'z'\) has turn 1 where turn 0 was expected"):
        list(dialogue_samples(moved))
    # Equal ids in two splits are two dialogues.
    twice = rows + [{**row, "split": "test"} for row in rows]
    assert len(list(dialogue_samples(twice))) == 6


def test_scattered_rows_are_refused(talk):
    rows = list(talk)
    for scattered in (rows[5:6] + rows[:5] + rows[5:6], rows[:2] + rows[3:5], rows[::-1]):
        with pytest.raises(ValueError, match=r"are not contiguous|was expected"):
            list(conversations(scattered))
    with pytest.raises(ValueError, match=r"are not contiguous|was expected"):
        DialogueSamples(talk.select([4, 3, 2, 1, 0]))


def test_two_data_sets_in_folders_of_the_same_name_are_not_mixed_up(tmp_path):
    for place, text in (("one", "hello"), ("two", "howdy")):
        raw = tmp_path / place / "raw"
        raw.mkdir(parents=True)
        line = {"dialogue_id": "d", "turn": 0, "speaker": "a", "text": text, "split": "train"}
        (raw / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        prepare_folder(raw, tmp_path / place / "data", progress=False)
        assert load_dataset(str(tmp_path / place / "data"), split="train")[0]["text"] == text


def test_replies_of_chosen_speakers(tmp_path):
    lines = [
        {"dialogue_id": "d", "turn": turn, "speaker": "ab"[turn % 2], "text": f"t{turn}", "split": "train"}
        for turn in range(5)
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_folder(tmp_path, tmp_path / "out", progress=False)
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert [sample["reply"] for sample in DialogueSamples(rows)] == ["t1", "t2", "t3", "t4"]
    assert [sample["reply"] for sample in DialogueSamples(rows, ["b"])] == ["t1", "t3"]
    with pytest.raises(ValueError, match=r"None of \['c'\] replies in this dataset; its speakers are \['a', 'b'\]"):
        DialogueSamples(rows, ["c"])
