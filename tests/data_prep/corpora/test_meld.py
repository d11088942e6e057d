"""The MELD adapter on a replica of the download, unpacked and as nested archives, with each known defect."""

import csv
import io
import json
import shutil
import tarfile
from collections import Counter

import pytest
from datasets import load_dataset

from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.corpora import meld
from empathic.data_prep.corpora.base import LayoutError, Options, Report
from empathic.data_prep.prepare import prepare_corpus

COLUMNS = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime".split(
    ","
)
FOLDERS = {
    "train": "train/train_splits",
    "dev": "dev/dev_splits_complete",
    "test": "test/output_repeated_splits_test",
}
TABLES = {"train": "train/train_sent_emo.csv", "dev": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}

# (dialogue, utterance, speaker, text, emotion) of each split, in the order of the table.
ROWS = {
    "train": [
        (0, 0, "Ross", "Hi, you.", "neutral"),
        (0, 1, "Rachel", 'He said "no", twice!', "anger"),
        (1, 1, "Joey", "Oh wow", "surprise"),
        (1, 10, "Joey", "Ten.", "joy"),
        (1, 2, "Monica", "Two.", "disgust"),
        (10, 0, "All", "", "fear"),
    ],
    "dev": [(0, 0, "Ross", "Another one.", "sadness")],
    "test": [(0, 0, "Phoebe", "Fine.", "joy"), (0, 1, "Ross", "Good.", "neutral")],
}


def line(dialogue, utterance, speaker="Ross", text="Yes.", emotion="joy", start="0:00:01,500", end="00:00:02,750"):
    """The values of one line of a table."""
    return [7, text, speaker, emotion, "positive", dialogue, utterance, 8, 21, start, end]


def write_table(path, lines, end="\n", header=COLUMNS, encoding="utf-8"):
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([header, *lines])
    path.write_bytes(text.getvalue().encode(encoding))


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory, write_media, grey_frames, tone):
    """A clip with video and audio."""
    path = tmp_path_factory.mktemp("short") / "clip.mp4"
    return write_media(
        path, frames=grey_frames(5), samples=tone(0.5, 48000, channels=2), sampling_rate=48000, layout="stereo"
    )


@pytest.fixture
def replica(tmp_path, short_clip):
    """MELD.Raw/ as unpacked from its archives."""
    root = tmp_path / "raw" / "MELD.Raw"
    for split, rows in ROWS.items():
        (root / FOLDERS[split]).mkdir(parents=True)
        write_table(root / TABLES[split], [line(*row) for row in rows], "\r\n" if split == "dev" else "\n")
        for dialogue, utterance, *_ in rows:
            shutil.copy(short_clip, root / FOLDERS[split] / f"dia{dialogue}_utt{utterance}.mp4")
    return root


def pack(root):
    """Pack the replica as published: an archive per split inside one archive, and remove all other files."""
    for split in FOLDERS:
        with tarfile.open(root / f"{split}.tar.gz", "w:gz", compresslevel=1) as archive:
            archive.add(root / split, arcname=split)
        shutil.rmtree(root / split)
    with tarfile.open(root.parent / "MELD.Raw.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(root, arcname="MELD.Raw")
    shutil.rmtree(root)
    return root.parent / "MELD.Raw.tar.gz"


def read(raw, unpacked=None, **options):
    """The dialogues by (split, dialogue_id), and the report; every line found is written or left out."""
    report = Report("meld")
    dialogues = list(meld.read(raw, report, Options(unpacked or raw.parent / "unpacked", **options)))
    assert report.found == sum(len(dialogue.turns) for dialogue in dialogues) + len(report.left_out)
    by_key = {(dialogue.split, dialogue.dialogue_id): dialogue.turns for dialogue in dialogues}
    assert len(by_key) == len(dialogues)
    return by_key, report


def values(dialogues):
    """The rows that a user gets, without the paths of the files."""
    return {
        key: [
            (
                turn.utterance_id,
                turn.speaker,
                turn.text,
                turn.emotion,
                turn.start,
                turn.end,
                [c.path.name for c in turn.video],
            )
            for turn in turns
        ]
        for key, turns in dialogues.items()
    }


def entries(notes):
    return [(note["item"], note["reason"]) for note in notes]


def test_the_replica_as_it_is_unpacked(replica):
    dialogues, report = read(replica.parent)
    times = (1.5, 2.75)
    assert list(dialogues) == [("train", "0"), ("train", "1"), ("train", "10"), ("validation", "0"), ("test", "0")]
    found = values(dialogues)
    assert found["train", "0"] == [
        ("dia0_utt0", "Ross", "Hi, you.", "neutral", *times, ["dia0_utt0.mp4"]),
        ("dia0_utt1", "Rachel", 'He said "no", twice!', "angry", *times, ["dia0_utt1.mp4"]),
    ]
    # By number, not as strings or as the table has them; dia1_utt1 is a prefix of dia1_utt10.
    assert found["train", "1"] == [
        ("dia1_utt1", "Joey", "Oh wow", "surprise", *times, ["dia1_utt1.mp4"]),
        ("dia1_utt2", "Monica", "Two.", "disgust", *times, ["dia1_utt2.mp4"]),
        ("dia1_utt10", "Joey", "Ten.", "happy", *times, ["dia1_utt10.mp4"]),
    ]
    assert found["train", "10"] == [("dia10_utt0", "All", "", "fearful", *times, ["dia10_utt0.mp4"])]
    # The ids restart in each split: each turn has its own clip.
    for (split, _), turns in dialogues.items():
        own = {"train": "train", "validation": "dev", "test": "test"}[split]
        for turn in turns:
            assert turn.audio == turn.video and turn.video[0].path.parent == replica / FOLDERS[own]
            assert turn.video[0].is_whole and not turn.needs_media
            assert turn.video[0].name == turn.video[0].path.relative_to(replica.parent).as_posix()
    assert found["validation", "0"][0][3] == "sad"
    assert report.found == 9 and not report.left_out and not report.without_media and not report.ignored
    assert entries(report.repaired) == [
        ("train dialogue 1", "utterance 0, 3, 4, 5, 6, 7, 8, 9 is missing. The turns were renumbered from 0.")
    ]


def test_the_archives_as_they_are_downloaded(replica, tmp_path):
    expected = values(read(replica.parent)[0])
    archive = pack(replica)
    unpacked = tmp_path / "work"
    dialogues, report = read(archive.parent, unpacked)
    assert values(dialogues) == expected
    assert not report.ignored and not report.without_media
    clips = [turn.video[0].path for turns in dialogues.values() for turn in turns]
    assert all(clip.is_file() and unpacked in clip.parents for clip in clips)
    assert archive.is_file() and list(archive.parent.iterdir()) == [archive]  # nothing is written into RAW

    written = [clip.stat().st_mtime_ns for clip in clips]
    again, report = read(archive, unpacked)  # the archive itself, and a second time
    assert values(again) == expected and not report.ignored
    assert [clip.stat().st_mtime_ns for clip in clips] == written


def test_archives_of_splits_beside_the_tables(replica, tmp_path):
    expected = values(read(replica)[0])
    with tarfile.open(pack(replica)) as archive:
        archive.extractall(tmp_path / "half", filter="data")
    raw = tmp_path / "half" / "MELD.Raw"
    assert (raw / "train.tar.gz").is_file() and not (raw / "train").exists()
    assert values(read(raw)[0]) == expected

    (raw / TABLES["dev"]).unlink()  # the table is in no archive: dev.tar.gz is not unpacked again to find it
    dialogues, report = read(raw)
    assert len(dialogues) == 4
    assert [(item, "; 1 clips" in reason) for item, reason in entries(report.ignored)] == [("dev_sent_emo.csv", True)]


def test_no_archive_is_unpacked_whose_folders_are_there(replica, tmp_path):
    (replica.parent / "MELD.Raw.tar.gz").write_bytes(b"no archive at all")
    (replica / "train.tar.gz").write_bytes(b"no archive at all")
    dialogues, report = read(replica.parent, tmp_path / "work")
    assert len(dialogues) == 5 and not (tmp_path / "work").exists()
    assert sorted(name for name, _ in entries(report.ignored)) == ["MELD.Raw.tar.gz", "MELD.Raw/train.tar.gz"]


@pytest.mark.parametrize("layout", ["inside", "flat", "under test", "tables in the folders of the splits"])
def test_folders_and_tables_may_lie_elsewhere(replica, layout):
    expected = values(read(replica.parent)[0])
    if layout == "flat":
        for split in FOLDERS:
            shutil.move(replica / FOLDERS[split], replica)
        shutil.move(replica / TABLES["train"], replica)
    if layout == "under test":  # the folder nearest to a clip determines its split
        inside = replica / "test" / "MELD.Raw"
        inside.mkdir()
        for entry in [entry for entry in replica.iterdir() if entry.name != "test"]:
            shutil.move(entry, inside)
    if layout == "tables in the folders of the splits":
        for split in ("dev", "test"):
            shutil.move(replica / TABLES[split], replica / split)
            for clip in (replica / FOLDERS[split]).iterdir():  # and the clips directly in them
                shutil.move(clip, replica / split)
    assert values(read(replica)[0]) == expected


def test_copies_nested_twice_are_one_clip(replica):
    folder = replica / FOLDERS["train"]
    shutil.copytree(folder, replica / "a" / "copy" / "train_splits")
    shutil.copytree(folder, folder / "train_splits")
    (folder / "dia10_utt0.mp4").unlink()
    shutil.copy(replica / TABLES["train"], replica / "train" / "train_splits")
    dialogues, report = read(replica.parent)
    assert len(dialogues["train", "0"]) == 2
    # The nearest first; if it cannot be read, the next one is tried.
    assert [clip.name for clip in dialogues["train", "0"][0].video] == [
        "MELD.Raw/train/train_splits/dia0_utt0.mp4",
        "MELD.Raw/a/copy/train_splits/dia0_utt0.mp4",
        "MELD.Raw/train/train_splits/train_splits/dia0_utt0.mp4",
    ]
    assert len(dialogues["train", "10"][0].video) == 2
    assert (
        "MELD.Raw/train/train_splits/train_sent_emo.csv",
        "the table of the split train is read from MELD.Raw/train/train_sent_emo.csv.",
    ) in entries(report.ignored)
    assert any("6 clips exist more than once" in reason for _, reason in entries(report.ignored))


def test_mis_decoded_punctuation_in_utterances_and_speakers(replica):
    lines = [line(0, 0, "Ross\x92s Mom", "It\x92s \x93ok\x94\x97no\x85"), line(0, 1, text="One\u2028two,\nthree\x00 ")]
    write_table(replica / TABLES["train"], lines)
    dialogues, report = read(replica)
    first, second = dialogues["train", "0"]
    assert (first.speaker, first.text) == ("Ross’s Mom", "It’s “ok”—no…")
    assert second.text == "One two, three"  # a quoted line break does not end the record
    reasons = entries(report.repaired)
    assert ("train/train_sent_emo.csv:2", "Speaker: U+0092 was meant as ’.") in reasons
    assert sum(item == "train/train_sent_emo.csv:2" for item, _ in reasons) == 6
    assert ("train/train_sent_emo.csv:3", "Utterance: U+0000 was removed.") in reasons


def test_a_table_in_another_encoding_or_with_a_byte_order_mark(replica):
    write_table(replica / TABLES["dev"], [line(0, 0, text="It’s Zoë")], encoding="cp1252")
    write_table(
        replica / TABLES["test"],
        [line(0, 0, text="It’s Zoë")],
        "\r\n",
        encoding="utf-8-sig",
        header=[*COLUMNS[1:], "Sr No."],
    )
    lines = (replica / TABLES["test"]).read_bytes().split(b"\r\n")
    lines[1] = lines[1].removeprefix(b"7,") + b",7"  # columns are found by name, not by position
    (replica / TABLES["test"]).write_bytes(b"\r\n".join(lines))
    dialogues, report = read(replica)
    for split in ("validation", "test"):
        assert dialogues[split, "0"][0].text == "It’s Zoë"
        assert dialogues[split, "0"][0].end == 2.75
    [(item, reason)] = [entry for entry in entries(report.repaired) if "not UTF-8" in entry[1]]
    assert item == "dev_sent_emo.csv:2" and reason.startswith("2 bytes")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_way(replica, end):
    write_table(replica / TABLES["dev"], [line(0, 0), line(0, 1, text="Last.")], end)
    dialogues, _ = read(replica)
    assert [turn.text for turn in dialogues["validation", "0"]] == ["Yes.", "Last."]
    assert [turn.end for turn in dialogues["validation", "0"]] == [2.75, 2.75]


@pytest.mark.parametrize(
    "start, end, expected, reported",
    [
        ("0:12:32,632", "00:12:33,1", (752.632, 753.1), None),
        (" 1:02:03,28 ", "1:02:04", (3723.28, 3724.0), None),
        ("0:0:1.5", "0:0:2.5", (1.5, 2.5), None),
        ("soon", "0:00:02,500", (None, 2.5), "StartTime is 'soon'"),
        ("", "", (None, None), None),
        ("0:00:02,000", "0:00:02,000", (None, None), "starts at 2.0 s and ends at 2.0 s"),
        ("0:00:03,000", "0:00:02,000", (None, None), "starts at 3.0 s and ends at 2.0 s"),
    ],
)
def test_times(replica, start, end, expected, reported):
    write_table(replica / TABLES["dev"], [line(0, 0, start=start, end=end)])
    dialogues, report = read(replica)
    [turn] = dialogues["validation", "0"]
    assert (turn.start, turn.end) == expected and len(turn.video) == 1
    notes = [reason for item, reason in entries(report.repaired) if item == "dev_sent_emo.csv:2"]
    assert len(notes) == (reported is not None)
    assert not notes or reported in notes[0]


def test_lines_that_are_no_turn_are_left_out_with_their_place(replica):
    table = replica / TABLES["dev"]
    write_table(
        table, [line(0, 0), line(0, 0, text="Again."), line("x", 1), line(0, ""), line("2.0", "3.0"), line(0, -1)]
    )
    with open(table, "a") as file:
        file.write('8,"Short, and no more",Ross\n\n9,One,comma,too,many,1,2,3,4,5,6,7,8\n')
    dialogues, report = read(replica)
    assert [key for key in dialogues if key[0] == "validation"] == [("validation", "0"), ("validation", "2")]
    assert [turn.text for turn in dialogues["validation", "0"]] == ["Yes."]  # the first of the two
    left_out = dict(entries(report.left_out))
    assert list(left_out) == [f"dev_sent_emo.csv:{number}" for number in (3, 4, 5, 7, 8, 10)]
    assert left_out["dev_sent_emo.csv:3"] == "utterance 0 of dialogue 0 is in dev_sent_emo.csv:2 already."
    assert "'x'" in left_out["dev_sent_emo.csv:4"] and "''" in left_out["dev_sent_emo.csv:5"]
    assert left_out["dev_sent_emo.csv:8"] == "the line has 3 columns, the table 11."
    assert "13 columns" in left_out["dev_sent_emo.csv:10"]


def test_a_stray_quote_costs_no_other_line(replica):
    good = "1,Yes.,Ross,joy,positive,{},0,8,21,0:00:01,5\n".replace("0:00:01,5", '"0:00:01,500","0:00:02,750"')
    lines = [good.format(number) for number in range(6)]
    lines[1] = lines[1].replace("Yes.", '"Yes.')  # opened, never closed
    lines[3] = lines[3].replace("Yes.", '"He said "hi" to me"')
    lines[4] = lines[4].replace("Yes.", '"Two\nlines, truly"')
    (replica / TABLES["dev"]).write_text(",".join(COLUMNS) + "\n" + "".join(lines))
    dialogues, report = read(replica)
    texts = {key[1]: turns[0].text for key, turns in dialogues.items() if key[0] == "validation"}
    assert texts == {"0": "Yes.", "2": "Yes.", "3": 'He said hi" to me"', "4": "Two lines, truly", "5": "Yes."}
    [(item, reason)] = entries(report.left_out)
    assert item == "dev_sent_emo.csv:3" and "quote" in reason
    assert ("dev_sent_emo.csv:5", "a quote in the middle of a value was read as part of the value.") in entries(
        report.repaired
    )


def test_a_quote_that_is_never_closed_costs_one_line_of_a_long_table(replica):
    rows = [f"1,{'Yes. ' * 40},Ross,joy,positive,{n},0,8,21,a,b\n" for n in range(1500)]  # over the limit of a field
    rows[0] = rows[0].replace("1,Yes.", '1,"Yes.')
    (replica / TABLES["dev"]).write_text(",".join(COLUMNS) + "\n" + "".join(rows))
    dialogues, report = read(replica)
    assert sum(key[0] == "validation" for key in dialogues) == 1499
    assert [item for item, _ in entries(report.left_out)] == ["dev_sent_emo.csv:2"]


def test_labels_speakers_and_the_map_of_the_user(replica):
    lines = [
        line(0, 0, emotion="Smug"),
        line(0, 1, emotion=""),
        line(0, 2, speaker=" \u200b"),
        line(0, 3, emotion=" JOY "),
    ]
    lines += [line(0, 4, emotion="fear"), line(0, 5, emotion="non-neutral")]
    write_table(replica / TABLES["dev"], lines)
    dialogues, report = read(replica, emotion_map={"non-neutral": None, "fear": "surprise"})
    turns = dialogues["validation", "0"]
    assert [turn.emotion for turn in turns] == [None, None, "happy", "happy", "surprise", None]
    assert [turn.speaker for turn in turns] == ["Ross", "Ross", "unknown", "Ross", "Ross", "Ross"]
    repaired = dict(entries(report.repaired))
    assert "'Smug'" in repaired["dev_sent_emo.csv:2"] and "Emotion is empty" in repaired["dev_sent_emo.csv:3"]
    assert "unknown" in repaired["dev_sent_emo.csv:4"]
    assert not {f"dev_sent_emo.csv:{number}" for number in (5, 6, 7)} & set(repaired)


def test_the_final_videos_of_test_replace_their_twins(replica, short_clip):
    folder = replica / FOLDERS["test"]
    shutil.copy(short_clip, folder / "final_videos_testdia0_utt1.mp4")
    shutil.copy(short_clip, folder / "final_videos_testdia9_utt9.mp4")
    dialogues, report = read(replica)
    assert [[clip.path.name for clip in turn.video] for turn in dialogues["test", "0"]] == [
        ["dia0_utt0.mp4"],
        ["final_videos_testdia0_utt1.mp4"],  # this clip only: the clip without prefix is wrong and never used instead
    ]
    path = FOLDERS["test"]
    assert entries(report.ignored) == [
        (f"{path}/dia0_utt1.mp4", f"{path}/final_videos_testdia0_utt1.mp4 is the correct clip of this utterance."),
        (f"{path}/final_videos_testdia9_utt9.mp4", "no line of test_sent_emo.csv names this clip."),
    ]


def test_clips_without_a_line_and_lines_without_a_clip(replica, short_clip):
    (replica / FOLDERS["train"] / "dia1_utt1.mp4").unlink()  # dia1_utt10.mp4 is another clip
    shutil.copy(short_clip, replica / FOLDERS["train"] / "dia3_utt0.mp4")
    shutil.copy(short_clip, replica / FOLDERS["train"] / "dia100_utt0.mp4")
    dialogues, report = read(replica)
    assert [len(turn.video) for turn in dialogues["train", "1"]] == [0, 1, 1]
    reason = "there is no dia1_utt1.mp4 in train_splits/. The turn is kept without it."
    assert entries(report.without_media) == [("train/train_sent_emo.csv:4", reason)]
    assert [item for item, _ in entries(report.ignored)] == [
        "train/train_splits/dia3_utt0.mp4",
        "train/train_splits/dia100_utt0.mp4",
    ]


def test_files_of_macos_and_others_are_counted(replica, short_clip):
    for name in ("._dia0_utt0.mp4", "._dia3_utt0.mp4"):
        (replica / FOLDERS["train"] / name).write_bytes(b"Mac OS X")
    (replica / "._train_sent_emo.csv").write_bytes(b"Mac OS X")
    (replica / "__MACOSX" / "train").mkdir(parents=True)
    shutil.copy(replica / TABLES["train"], replica / "__MACOSX" / "train")
    (replica / "notes.txt").write_text("mine")
    shutil.copy(short_clip, replica / "dia0_utt0.mp4")  # its split is unknown
    (replica / "train" / "up").symlink_to(replica, target_is_directory=True)  # a cycle
    dialogues, report = read(replica)
    assert len(dialogues["train", "0"][0].video) == 1
    ignored = [f"{item}: {reason}" for item, reason in entries(report.ignored)]
    assert len(ignored) == 3
    assert "dia0_utt0.mp4: a clip whose split is unknown" in ignored[0]
    assert ignored[1].startswith("4 files, the first ._train_sent_emo.csv: a file of macOS")
    assert ignored[2].startswith("notes.txt: ")


def test_a_missing_table_is_said(replica):
    (replica / TABLES["dev"]).unlink()
    dialogues, report = read(replica)
    assert {key[0] for key in dialogues} == {"train", "test"}
    [(item, reason)] = entries(report.ignored)
    assert item == "dev_sent_emo.csv" and "no split validation; 1 clips" in reason


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


@pytest.mark.parametrize(
    "case", ["empty", "absent", "other", "damaged", "pointer table", "pointer archive", "columns", "no line"]
)
def test_an_unexpected_layout_says_what_was_expected_and_seen(replica, tmp_path, case):
    raw, said = replica, ["git lfs pull"]
    if case == "pointer table":
        (raw / TABLES["test"]).write_bytes(POINTER)
    elif case == "pointer archive":
        raw = tmp_path / "hub"
        raw.mkdir()
        (raw / "MELD.Raw.tar.gz").write_bytes(POINTER)
    elif case == "columns":
        write_table(raw / TABLES["dev"], [line(0, 0)], header=["id", *COLUMNS[1:5], "Dialogue", *COLUMNS[6:]])
        said = [TABLES["dev"], "lacks Dialogue_ID", "id,Utterance"]
    elif case == "no line":
        (raw / TABLES["dev"]).write_bytes(b"")
        said = [TABLES["dev"], "lacks Utterance"]
    else:
        raw = tmp_path / case
        said = ["MELD.Raw.tar.gz", "train_splits", str(raw), "found nothing"]
        if case != "absent":
            raw.mkdir()
        if case == "damaged":
            (raw / "MELD.Raw.tar.gz").write_bytes(b"\x1f\x8b no more")
            said[-1] = "MELD.Raw.tar.gz: it is damaged or cut short"
        if case == "other":
            (raw / "Actor_01").mkdir()
            said[-1] = "found Actor_01"
    with pytest.raises(LayoutError) as error:
        read(raw)
    assert all(words in str(error.value) for words in said)


def test_what_is_published_adds_up():
    for split, rows in (("train", 9989), ("validation", 1109), ("test", 2610)):
        counts = meld.ABOUT.published[split]
        assert counts["rows"] == rows == sum(counts[emotion] for emotion in EMOTIONS)
    assert meld.ABOUT.name == "meld" and meld.ABOUT.license == "other" and not meld.ABOUT.redistributable


@pytest.mark.parametrize("packed", [False, True])
def test_prepare_writes_what_load_dataset_reads(replica, tmp_path, packed, write_media, grey_frames, tone):
    corrupt = replica / FOLDERS["train"] / "dia0_utt1.mp4"  # as train's dia125_utt3.mp4
    corrupt.write_bytes(corrupt.read_bytes()[:300])
    (replica / FOLDERS["dev"] / "dia0_utt0.mp4").unlink()  # as dev's dia110_utt7.mp4
    (replica / FOLDERS["train"] / "dia1_utt1.mp4").write_bytes(POINTER)
    surround = dict(samples=tone(0.5, 48000, channels=6), sampling_rate=48000, layout="5.1")
    write_media(replica / FOLDERS["train"] / "dia1_utt2.mp4", frames=grey_frames(5), **surround)
    with open(replica / TABLES["train"], "a") as file:
        file.write("no turn\n")
    raw = replica.parent
    if packed:
        pack(replica)
    out = tmp_path / "out"
    report = prepare_corpus("meld", raw, out, progress=False)
    assert report == json.loads((out / "report.json").read_text())
    assert (report["found"], report["rows"], len(report["left_out"])) == (10, 9, 1)

    data = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "validation": 1, "test": 2}
    train = list(data["train"])
    assert [(row["dialogue_id"], row["turn"], row["utterance_id"]) for row in train] == [
        ("0", 0, "dia0_utt0"),
        ("0", 1, "dia0_utt1"),
        ("1", 0, "dia1_utt1"),
        ("1", 1, "dia1_utt2"),
        ("1", 2, "dia1_utt10"),
        ("10", 0, "dia10_utt0"),
    ]
    assert [row["video"] is not None for row in train] == [True, False, False, True, True, True]
    assert all((row["audio"] is None) == (row["video"] is None) for rows in data.values() for row in rows)
    assert data["validation"][0]["video"] is None and data["validation"][0]["emotion"] == "sad"
    assert Counter(row["corpus"] for rows in data.values() for row in rows) == {"meld": 9}
    # Each turn without a clip is reported.
    assert len(report["without_media"]) >= 3
    said = json.dumps(report["without_media"])
    for name in ("dia0_utt1", "dia1_utt1", "dia0_utt0.mp4 in dev_splits_complete"):
        assert name in said


def test_the_tables_alone_make_a_text_corpus_without_a_complaint(replica, tmp_path):
    shutil.rmtree(replica / FOLDERS["train"])
    report = prepare_corpus("meld", replica, tmp_path / "out", progress=False, text_only=True)
    data = load_dataset(str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "validation": 1, "test": 2}
    assert all(row["video"] is None and row["audio"] is None for rows in data.values() for row in rows)
    assert report["without_media"] == []
    ignored = [entry for entry in report["ignored"] if "clips are not read" in entry["reason"]]
    assert [entry["item"].split("/")[-1] for entry in ignored] == [
        "dev_splits_complete",
        "output_repeated_splits_test",
    ]
