"""The MultiDialog adapter on a miniature corpus in the layout of the Hub copy."""

import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from empathic.data_prep.corpora import multidialog
from empathic.data_prep.corpora.base import LayoutError, Options, Report
from empathic.data_prep.corpora.multidialog import SPLITS, read
from empathic.data_prep.prepare import prepare_corpus
from empathic.media_empathic import load_audio

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def wav_bytes(seconds=0.2, frequency=440.0):
    """A 16 kHz, 16-bit wav."""
    time = np.arange(round(16000 * seconds)) / 16000
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes((10000 * np.sin(2 * np.pi * frequency * time)).astype("<i2").tobytes())
    return buffer.getvalue()


WAV = wav_bytes()


def line(conv_id, n, /, speaker=None, emotion="Neutral", text=None, actor=None, split="train", **changes):
    """A line of the metadata; a change to `...` removes the key."""
    speaker = speaker or ("gpt" if n % 2 == 0 else "human")
    actor = actor or ("a" if n % 2 == 0 else "k")
    name = f"{conv_id}/{conv_id}_{n}{actor}.wav"
    row = {
        "conv_id": conv_id,
        "utterance_id": n,
        "from": speaker,
        "value": text or f"Line {n} of {conv_id}.",
        "emotion": emotion,
        "file_name": name,
        "original_full_path": f"{split}/{name}",
        **changes,
    }
    return {key: value for key, value in row.items() if value is not ...}


def write_table(raw, split, lines, shard=0):
    path = raw / "metadata" / split / f"{split}_metadata_{shard:04}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [part if isinstance(part, bytes) else json.dumps(part, ensure_ascii=False).encode() for part in lines]
    path.write_bytes(b"\n".join(parts) + b"\n")
    return path


def write_tar(raw, split, names, shard=0, content=WAV):
    path = raw / "data" / split / f"{split}_chunks_{shard:04}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_loose(folder, names, content=WAV):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def wavs(lines):
    return [row["file_name"] for row in lines if isinstance(row, dict) and "file_name" in row]


class Result:
    """The result of `read`, with the report as item -> reason."""

    def __init__(self, raw, unpacked, **options):
        report = Report("multidialog")
        self.dialogues = list(read(raw, report, Options(unpacked, **options)))
        self.turns = [turn for dialogue in self.dialogues for turn in dialogue.turns]
        self.left_out, self.repaired, self.without_media, self.ignored = (
            {entry["item"]: entry["reason"] for entry in entries}
            for entries in (report.left_out, report.repaired, report.without_media, report.ignored)
        )
        self.report = report
        assert report.found == len(self.turns) + len(report.left_out)

    def texts(self):
        return [turn.text for turn in self.turns]

    def clips(self):
        return [turn.audio[0].path.stem if turn.audio else None for turn in self.turns]


@pytest.fixture
def result(tmp_path):
    """A function (options) -> the result of the adapter on the folder `raw`."""
    return lambda **options: Result(tmp_path / "raw", tmp_path / "out" / "unpacked", **options)


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def snapshot(raw):
    """All five splits, two dialogues each; those of train are spread over two tables and two archives."""
    for split in SPLITS:
        lines = [line(f"t_{split}-{k}", n, split=split) for k in range(2) for n in range(4)]
        if split == "train":
            write_table(raw, split, [lines[6], lines[1], lines[0]], shard=0)
            write_table(raw, split, [lines[2], lines[7], lines[3], lines[5], lines[4]], shard=1)
            write_tar(raw, split, wavs(lines)[::2], shard=0)
            write_tar(raw, split, wavs(lines)[1::2], shard=1)
        else:
            write_table(raw, split, lines)
            write_tar(raw, split, wavs(lines))
    (raw / "README.md").write_text("The card.")
    return raw


# The layout ----------------------------------------------------------------------------------------------------------


def test_the_hub_copy(snapshot, result):
    found = result()
    assert [(d.split, d.dialogue_id) for d in found.dialogues] == [
        (split, f"t_{split}-{k}") for split in SPLITS for k in ((1, 0) if split == "train" else (0, 1))
    ]
    assert found.report.found == 40
    assert found.left_out == found.repaired == found.without_media == found.ignored == {}
    turn = found.dialogues[1].turns[1]
    assert (turn.where, turn.utterance_id) == ("metadata/train/train_metadata_0000.jsonl:2", "t_train-0_1k")
    assert (turn.speaker, turn.text, turn.emotion) == ("human", "Line 1 of t_train-0.", "neutral")
    assert turn.video == () and not turn.needs_media
    (clip,) = turn.audio
    assert clip.name == "data/train/train_chunks_0001.tar.gz/t_train-0/t_train-0_1k.wav" and clip.is_whole
    assert clip.path.read_bytes() == WAV
    for dialogue in found.dialogues:  # whatever table or archive they were in
        assert [turn.utterance_id for turn in dialogue.turns] == [
            f"{dialogue.dialogue_id}_{n}{'ak'[n % 2]}" for n in range(4)
        ]
        assert all(turn.audio[0].path.stem == turn.utterance_id for turn in dialogue.turns)


def test_any_of_the_splits_will_do(snapshot, result):
    for split in ("train", "valid_rare", "test_rare"):
        for path in (snapshot / "metadata" / split).iterdir():
            path.unlink()
    found = result()
    assert {dialogue.split for dialogue in found.dialogues} == {"valid_freq", "test_freq"}
    assert found.ignored["train"].startswith(
        "there is no metadata of this split, such as metadata/train/train_metadata_0000.jsonl"
    )
    assert "it was not unpacked" in found.ignored["data/train/train_chunks_0001.tar.gz"]
    assert not any("train" in path.name for path in (snapshot.parent / "out" / "unpacked").iterdir())


def test_a_folder_that_is_none(raw, result):
    with pytest.raises(
        LayoutError, match=r"metadata/<split>/<split>_metadata_0000\.jsonl .*but nothing\. .*hf download"
    ):
        result()
    (raw / "train.csv").write_text("x")
    (raw / "notes.jsonl").write_text("{}")
    with pytest.raises(LayoutError, match=r"but notes\.jsonl, train\.csv"):
        result()
    raw.joinpath("notes.jsonl").unlink(), raw.joinpath("train.csv").unlink(), raw.rmdir()
    with pytest.raises(LayoutError, match="there is no such folder"):
        result()


def test_files_of_no_split_are_named(snapshot, result):
    write_loose(snapshot / "data" / "extra", ["extra.jsonl", "more.tar.gz"])
    ignored = result().ignored
    assert list(ignored) == ["data/extra/extra.jsonl", "data/extra/more.tar.gz"]
    assert "neither its folder nor its name gives its split: train, valid_freq" in ignored["data/extra/extra.jsonl"]


def test_a_snapshot_inside_of_another_folder(snapshot, result, tmp_path):
    inner = snapshot / "datasets--IVLLab--MultiDialog" / "snapshots" / "4f1e"
    inner.mkdir(parents=True)
    for name in ("data", "metadata"):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (snapshot / name).rename(tmp_path / "blobs" / name)
        (inner / name).symlink_to(tmp_path / "blobs" / name)  # the Hub cache consists of symlinks
    (tmp_path / "blobs" / "data" / "loop").symlink_to(tmp_path / "blobs" / "data")
    assert len(result().turns) == 40
    # A second revision: equal files are accepted, different content is an error.
    table = "metadata/test_freq/test_freq_metadata_0000.jsonl"
    other = inner.parent / "9a00" / table
    other.parent.mkdir(parents=True)
    other.write_bytes((inner / table).read_bytes())
    found = result()
    assert len(found.turns) == 40 and list(found.ignored.values()) == [
        f"it is a copy of datasets--IVLLab--MultiDialog/snapshots/4f1e/{table}."
    ]
    other.write_bytes(b"{}\n")
    with pytest.raises(LayoutError, match="two snapshots of MultiDialog: give the folder of one of them"):
        result()


def test_the_folder_says_of_which_split_a_file_is(raw, result):
    lines = [line("t_a", 0), line("t_b", 0)]
    for place, (split, row) in enumerate(zip(("test_rare", "train"), lines, strict=True)):
        write_table(raw, split, [row]).rename(raw / "metadata" / split / f"{place}.jsonl")
        write_tar(raw, split, wavs([row])).rename(raw / "data" / split / f"{place}.tar.gz")
    found = result()
    assert [(d.split, d.dialogue_id) for d in found.dialogues] == [("train", "t_b"), ("test_rare", "t_a")]
    assert found.clips() == ["t_b_0a", "t_a_0a"]


def test_flat_files(raw, result):
    lines = [line("t_a", n) for n in range(3)] + [line("t_a-b", n) for n in range(2)]
    (raw / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_loose(raw / "audio", [Path(name).name for name in wavs(lines)])
    found = result()
    assert found.clips() == ["t_a_0a", "t_a_1k", "t_a_2a", "t_a-b_0a", "t_a-b_1k"] and found.ignored["test_rare"]


@pytest.mark.parametrize("place", ["data/train", "data/train/train_chunks_0000", "data", "wavs"])
def test_unpacked_wavs_are_not_unpacked_again(raw, result, place):
    lines = [line("t_a", n) for n in range(3)] + [line("t_b", n) for n in range(2)]
    write_table(raw, "train", lines)
    write_tar(raw, "train", wavs(lines))
    write_loose(raw / place, wavs(lines))
    found = result()
    assert all(turn.audio[0].path.is_relative_to(raw / place) and len(turn.audio) == 1 for turn in found.turns)
    assert "are already unpacked in raw" in found.ignored["data/train/train_chunks_0000.tar.gz"]
    assert not (raw.parent / "out").exists()


def test_half_unpacked(raw, result):
    """The archive is unpacked if a dialogue is missing; a second copy of a wav file is a further candidate."""
    lines = [line("t_a", n) for n in range(2)] + [line("t_b", n) for n in range(2)]
    write_table(raw, "train", lines)
    write_tar(raw, "train", wavs(lines))
    write_loose(raw / "data" / "train", wavs(lines)[:2], content=b"broken")
    found = result()
    assert found.clips() == ["t_a_0a", "t_a_1k", "t_b_0a", "t_b_1k"]
    assert [[clip.name.split("/")[2] for clip in turn.audio] for turn in found.turns] == [
        ["t_a", "train_chunks_0000.tar.gz"], ["t_a", "train_chunks_0000.tar.gz"],
        ["train_chunks_0000.tar.gz"], ["train_chunks_0000.tar.gz"],
    ]  # fmt: skip
    assert "train" not in " ".join(found.ignored.values()) or list(found.ignored) == list(SPLITS[1:])


def test_git_lfs_pointers(snapshot, result):
    for path in (snapshot / "data").glob("*/*.tar.gz"):
        if path.name != "train_chunks_0000.tar.gz":
            path.write_bytes(POINTER)
    (snapshot / "metadata/test_freq/test_freq_metadata_0000.jsonl").write_bytes(POINTER)
    found = result()
    assert {dialogue.split for dialogue in found.dialogues} == set(SPLITS) - {"test_freq"}
    pointer = found.ignored["metadata/test_freq/test_freq_metadata_0000.jsonl"]
    assert "Git-LFS pointer" in pointer and "git lfs pull" in pointer and "hf download IVLLab/MultiDialog" in pointer
    assert sum("Git-LFS pointer" in reason for reason in found.ignored.values()) == 6
    # Half of the wav files of train are missing, and all of three other splits: there, one entry per dialogue.
    gone = "there is no wav of this dialogue, for utterances 0, 1, 2, 3."
    assert found.without_media["metadata/valid_freq/valid_freq_metadata_0000.jsonl:1, dialogue t_valid_freq-0"] == gone
    assert sum(reason == gone for reason in found.without_media.values()) == 6 == len(found.without_media) - 4


def test_nothing_but_pointers(snapshot, result):
    archives = sorted((snapshot / "data").glob("*/*.tar.gz"))
    for path in archives:
        path.write_bytes(POINTER)
    with pytest.raises(LayoutError, match=r"test_freq_chunks_0000\.tar\.gz: is a Git-LFS pointer.*git lfs pull"):
        result()
    for path in (snapshot / "metadata").glob("*/*.jsonl"):
        path.write_bytes(POINTER)
    with pytest.raises(LayoutError, match=r"metadata_0000\.jsonl: is a Git-LFS pointer.*hf download"):
        result()


def test_mac_files(snapshot, result):
    write_loose(
        snapshot / "data" / "train", ["._train_chunks_0000.tar.gz", "__MACOSX/t_x/t_x_0a.wav", ".cache/x.jsonl"]
    )
    write_loose(snapshot / "metadata" / "train", ["._train_metadata_0000.jsonl"])
    found = result()
    assert found.ignored == {"._*": "2 files of macOS, not part of the corpus."} and len(found.turns) == 40


# The lines -----------------------------------------------------------------------------------------------------------


def test_labels(raw, result):
    labels = ["Neutral", "HAPPY", "fear", "Angry", "Disgusting", "surprising", "Sad", "Curious to dive deeper", "Bored"]
    lines = [line("t_a", n, emotion=label) for n, label in enumerate([*labels, ...])]
    write_table(raw, "train", lines)
    write_tar(raw, "train", wavs(lines))
    expected = ["neutral", "happy", "fearful", "angry", "disgust", "surprise", "sad", "neutral", None, None]
    found = result()
    assert [turn.emotion for turn in found.turns] == expected
    (item,) = found.repaired.items()
    assert item[0].endswith(":9") and "'Bored' is not one of" in item[1]
    found = result(emotion_map={"bored": "sad", "neutral": None})
    assert [found.turns[place].emotion for place in (0, 7, 8)] == [None, "neutral", "sad"] and not found.repaired


def test_order_and_gaps(raw, result):
    lines = [line("t_a", n) for n in (10, 2, 9, 4, 3)]
    lines[0]["utterance_id"], lines[2]["utterance_id"] = "10", 9.0
    write_table(raw, "train", lines)
    write_tar(raw, "train", wavs(lines))
    found = result()
    assert [turn.utterance_id for turn in found.turns] == ["t_a_2a", "t_a_3k", "t_a_4a", "t_a_9k", "t_a_10a"]
    assert found.repaired == {
        "dialogue t_a of train": "utterance 0-1, 5-8 is missing. The turns were renumbered from 0."
    }
    write_table(raw, "train", [line("t_a", n) for n in (0, 2)])
    assert "utterance 1 is missing" in result().repaired["dialogue t_a of train"]


def test_speakers(raw, result):
    lines = [
        line("t_a", 0, "gpt", actor="b"),  # the assistant may begin
        line("t_a", 1, " Human ", actor="k"),
        line("t_a", 2, actor="b", **{"from": ...}),
        line("t_a", 3, actor="z", **{"from": None}),
        line("t_b", 0, "human", actor="b"),
    ]
    write_table(raw, "train", lines)
    write_tar(raw, "train", wavs(lines))
    found = result()
    assert [turn.speaker for turn in found.turns] == ["gpt", "human", "gpt", "human"]
    table = "metadata/train/train_metadata_0000.jsonl"
    assert found.repaired[f"{table}:3"] == '"from" is missing. Actor b is gpt elsewhere in the dialogue.'
    assert list(found.left_out) == [f"{table}:4"] and '"from" is missing' in found.left_out[f"{table}:4"]


def test_lines_that_are_no_turn(raw, result):
    bad = [
        b"{broken",
        b"[1]",
        '{"conv_id": "t_a", "value": "Jörg"}'.encode("latin-1"),
        line("t_a", 2, value=...),
        line("t_a", 3, conv_id=..., file_name=..., original_full_path=...),
        line("t_a", 4, utterance_id="four", file_name=..., original_full_path=...),
        line("t_a", 0, text="Once more."),
    ]
    lines = [line("t_a", 0), b"", *bad, line("t_a", 1, text="Grüße\x92s")]
    write_table(raw, "train", lines)
    write_table(raw, "train", [line("t_a", 1, text="In the next file.")], shard=1)
    write_tar(raw, "train", wavs(lines))
    found = result()
    assert found.texts() == ["Line 0 of t_a.", "Grüße’s"] and found.report.found == 10
    table = "metadata/train/train_metadata_0000.jsonl"
    messages = {
        3: "not JSON", 4: "is a list", 5: "not UTF-8", 6: '"value" is None', 7: '"conv_id" is None',
        8: "\"utterance_id\" is 'four'", 9: f"utterance 0 of t_a is in {table}:1 already",
    }  # fmt: skip
    other = found.left_out.pop("metadata/train/train_metadata_0001.jsonl:1")
    assert other == f"utterance 1 of t_a is in {table}:10 already."
    assert sorted(found.left_out) == sorted(f"{table}:{number}" for number in messages)
    for number, message in messages.items():
        assert message in found.left_out[f"{table}:{number}"]
    assert found.repaired == {f"{table}:10": "U+0092 was meant as ’."}
    # A table with Windows line ends and a byte order mark.
    first, *others = (json.dumps(line("t_b", n)).encode() for n in range(3))
    write_table(raw, "train", [b"\xef\xbb\xbf" + first + b"\r", b"  \r", *(other + b" \r" for other in others)])
    assert result().texts() == [*(f"Line {n} of t_b." for n in range(3)), "In the next file."]


def test_keys_that_are_missing(raw, result):
    names = [f"t_a/t_a_{n}a.wav" for n in (10, 11, 2, 3)]  # the first two not of the number of their lines
    lines = [
        line("t_a", 0, actor="a", original_full_path=..., file_name=..., audpath=f"/home/x/{names[0]}"),
        line("t_a", 1, actor="a", original_full_path=..., file_name=..., audpath="C:\\x\\t_a_11a.wav"),
        line("t_a", 2, actor="a", original_full_path=..., conv_id=..., utterance_id=...),
        line("t_a", 3, actor="a", original_full_path=..., file_name=...),
    ]
    write_table(raw, "train", lines)
    write_tar(raw, "train", names)
    found = result()
    assert found.clips() == ["t_a_10a", "t_a_11a", "t_a_2a", "t_a_3a"] == [turn.utterance_id for turn in found.turns]
    assert found.repaired == {
        "metadata/train/train_metadata_0000.jsonl:3": '"utterance_id" is None. The number in the name of its wav file '
        "is used: 2."
    }


def test_the_name_wins_over_the_number(raw, result):
    lines = [
        line("t_a", 0, original_full_path=..., file_name=...),  # number 0, which line 2 names
        line("t_a", 1, original_full_path="train/t_a/t_a_0a.wav"),
        line("t_a", 2, original_full_path="x/none.wav"),  # file_name leads to it
        line("t_a", 3, original_full_path=..., file_name="t_a/t_a_9z.wav"),  # neither the name nor one of its number
        line("t_a", 4, original_full_path=..., file_name=...),  # two of its number
        line("t_a", 5, original_full_path="t_a/t_a_2a.wav", file_name=...),  # named already
        line("a", 6, original_full_path="x.wav", file_name=...),  # the id without t_
        line("a", 7, file_name="t_b/t_b_1a.wav", original_full_path=...),  # of another folder
    ]
    names = ["t_a_0a", "t_a_2a", "t_a_4a", "t_a_4k", "t_a_6a", "t_b_1a", "t_b_2a", "t_b_3a", "odd"]
    write_table(raw, "train", lines)
    write_tar(raw, "train", [f"{name[:3]}/{name}.wav" for name in names])
    found = result()
    assert found.clips() == [None, "t_a_0a", "t_a_2a", None, None, None, "t_a_6a", "t_b_1a"]
    assert [turn.utterance_id for turn in found.turns] == [
        "t_a_0", "t_a_0a", "t_a_2a", "t_a_3", "t_a_4", "t_a_5", "t_a_6a", "t_b_1a",
    ]  # fmt: skip
    assert [turn.text for turn in found.turns][:6] == [f"Line {n} of t_a." for n in range(6)]
    table = "metadata/train/train_metadata_0000.jsonl"
    assert found.without_media == {
        f"{table}:1": "t_a_0.wav: there is no such file, or another line uses it.",
        f"{table}:4": "t_a_3.wav: there is no such file, or another line uses it.",
        f"{table}:5": "several wav files have its number 4: t_a_4a, t_a_4k.",
        f"{table}:6": "t_a_5.wav: there is no such file, or another line uses it.",
    }
    # Unused wav files: one entry per folder and dialogue.
    archive = "data/train/train_chunks_0000.tar.gz"
    unnamed = {item: reason for item, reason in found.ignored.items() if item not in SPLITS}
    assert unnamed == {
        f"{archive}/t_a/t_a{{_4a.wav,_4k.wav}}": "2 wav files that no line of the metadata uses.",
        f"{archive}/t_b/t_b{{_2a.wav,_3a.wav}}": "2 wav files that no line of the metadata uses.",
        f"{archive}/odd/odd{{.wav}}": "a wav file that no line of the metadata uses.",
    }


def test_rows_without_a_wav_are_kept(raw, result):
    lines = [line(f"t_{name}", n) for name in "ab" for n in range(3)]
    write_table(raw, "train", lines)
    found = result()  # no archive at all: a corpus of text
    assert found.clips() == [None] * 6 and len(found.without_media) == 2
    write_tar(raw, "train", wavs(lines)[:4])
    found = result()
    assert [turn.audio != () for turn in found.turns] == [True] * 4 + [False] * 2
    assert list(found.without_media) == [f"metadata/train/train_metadata_0000.jsonl:{number}" for number in (5, 6)]


def test_a_dialogue_of_two_splits_stays_in_the_last(raw, result):
    for split in ("train", "valid_freq", "test_freq"):
        write_table(raw, split, [line("t_a", n, split=split) for n in range(2)] + [line(f"t_{split}", 0)])
    found = result()
    assert [(d.split, d.dialogue_id) for d in found.dialogues] == [
        ("train", "t_train"), ("valid_freq", "t_valid_freq"), ("test_freq", "t_a"), ("test_freq", "t_test_freq"),
    ]  # fmt: skip
    assert found.left_out == {
        f"metadata/{split}/{split}_metadata_0000.jsonl:{n}": "dialogue t_a is in test_freq as well, and is kept there."
        for split in ("train", "valid_freq")
        for n in (1, 2)
    }


# Video ---------------------------------------------------------------------------------------------------------------


def test_videos(raw, result):
    lines = [line("t_a", n) for n in range(3)] + [line("t_b", n) for n in range(2)]
    write_table(raw, "train", lines)
    write_tar(raw, "train", wavs(lines))
    write_loose(raw / "video", ["train/t_a/00a/t_a_0a.mp4", "train/t_a/01k/t_a_1k.mp4"])
    found = result()
    assert "2 files: give a video pattern" in found.ignored["videos"] and found.turns[0].video == ()
    found = result(video_pattern="video/{split}/{conv_id}/{n:02d}{actor}/{stem}.mp4")
    assert [turn.video[0].name if turn.video else None for turn in found.turns] == [
        "video/train/t_a/00a/t_a_0a.mp4", "video/train/t_a/01k/t_a_1k.mp4", None, None, None,
    ]  # fmt: skip
    assert found.turns[0].video[0].path.is_file() and "videos" not in found.ignored
    table = "metadata/train/train_metadata_0000.jsonl"
    assert found.without_media == {
        f"{table}:3": "video/train/t_a/02a/t_a_2a.mp4: there is no such video.",
        f"{table}:4, dialogue t_b": "there is no video of this dialogue, for utterances 0, 1.",
    }


def test_a_video_by_the_name_of_a_wav_that_no_line_names(raw, result):
    lines = [line("t_a", n, file_name=..., original_full_path=...) for n in range(2)]
    write_table(raw, "train", lines)
    write_tar(raw, "train", ["t_a/t_a_0a.wav", "t_a/t_a_1k.wav"])
    write_loose(raw / "video", ["t_a_0a.mp4", "k/t_a_1k.mp4"])
    assert [len(turn.video) for turn in result(video_pattern="video/{stem}.mp4").turns] == [1, 0]
    assert [len(turn.video) for turn in result(video_pattern="video/{actor}/{stem}.mp4").turns] == [0, 1]


def test_video_patterns_that_cannot_be_used(raw, result):
    write_table(raw, "train", [line("t_a", 0)])
    for pattern in ("{id}.mp4", "{}.mp4", "{stem.mp4", "{stem:03d}.mp4", "{stem.upper}.mp4"):
        with pytest.raises(ValueError, match=r"the video pattern .* cannot be used.*\{split\}, \{conv_id\}"):
            result(video_pattern=pattern)
    with pytest.raises(LayoutError, match=r"leads to no video: expected .*raw/video/t_a_0a\.mp4 for metadata/train"):
        result(video_pattern="video/{stem}.mp4")


# All of it -----------------------------------------------------------------------------------------------------------


def test_what_is_held_does_not_grow_with_the_text(raw, result, monkeypatch):
    """No line's values outlive their dialogue."""
    text = "x" * 1000
    for shard in range(2):  # every dialogue is in both tables
        write_table(raw, "train", [line(f"t_{k}", n, text=text) for n in (shard, shard + 2) for k in range(50)], shard)
    alive, most = [0], [0]

    class Counted(multidialog._Line):
        def __init__(self, *args):
            super().__init__(*args)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    monkeypatch.setattr(multidialog, "_Line", Counted)
    sizes = [len(d.turns) for d in read(raw, Report("multidialog"), Options(raw / "unpacked"))]
    assert sizes == [4] * 50 and most[0] <= 8


def test_end_to_end(snapshot, tmp_path, write_media, grey_frames):
    (snapshot / "video").mkdir()
    for n in range(2):
        write_media(snapshot / "video" / f"t_test_freq-0_{n}{'ak'[n]}.mp4", frames=grey_frames(5))
    out = tmp_path / "out"
    options = {"progress": False, "embed": True, "video_pattern": "video/{stem}.mp4"}
    report = prepare_corpus("multidialog", snapshot, out, **options)
    assert (report["found"], report["rows"], report["left_out"]) == (40, 40, [])
    assert {name: counts["rows"] for name, counts in report["splits"].items()} == dict.fromkeys(SPLITS, 8)
    assert sum(counts["with_audio"] for counts in report["splits"].values()) == 40
    assert report["splits"]["test_freq"]["with_video"] == 2
    data = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert sorted(data) == sorted(SPLITS)
    row = data["test_freq"][1]
    assert [row[key] for key in ("corpus", "split", "dialogue_id", "turn", "utterance_id", "speaker")] == [
        "multidialog", "test_freq", "t_test_freq-0", 1, "t_test_freq-0_1k", "human",
    ]  # fmt: skip
    assert len(load_audio(row["audio"])) == 3200 and row["video"]["bytes"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card and "151,645" in card.replace("151645", "151,645")


def test_about():
    about = multidialog.ABOUT
    assert about.license == "other" and not about.redistributable and "cc" in about.license_note
    assert list(about.published) == list(SPLITS)
    assert sum(counts["rows"] for counts in about.published.values()) == 187859
    assert sum(counts["dialogues"] for counts in about.published.values()) == 8733
