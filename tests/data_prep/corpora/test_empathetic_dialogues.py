"""The EmpatheticDialogues adapter on tables in the layout of its archive, with known defects."""

import tarfile

import pytest
from datasets import load_dataset

from empathic.cli import main
from empathic.data_prep.corpora.base import LayoutError
from empathic.data_prep.corpora.empathetic_dialogues import MAPPING
from empathic.data_prep.prepare import prepare_corpus

HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
TRAIN = """\
hit:0_conv:1,1,sentimental,I remember it,1,I remember the fireworks_comma_ with her.,5|5|5_2|2|5,
hit:0_conv:1,2,sentimental,I remember it,0,Was this a friend you were in love with?,5|5|5_2|2|5,
hit:1_conv:3,2,terrified,A dog,4, Oh no! ,5|5|5,
hit:1_conv:3,1,terrified,A dog,3,A dog ran at me.,5|5|5,
hit:1_conv:3,3,terrified,A dog,3,It was huge.,5|5|5,
hit:1_conv:3,3,terrified,A dog,3,It was huge.,5|5|5,
hit:2_conv:5,1,surprised,A party,7,They shouted,5
hit:2_conv:6,x,surprised,A party,7,They shouted.,5,
hit:2_conv:7,1,blissful,A party,7,They shouted.,5,
hit:2_conv:7,3,blissful,A party,7,,5,
hit:2_conv:7,4,blissful,A party,7,Again.,5,
"""
TEST = """\
hit:9_conv:1,1,guilty,I ate it,11,I ate the cake.,5|5,,one|two|three
hit:9_conv:1,2,guilty,I ate it,12,How was it?,5|5,,one|two|three
"""


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw" / "empatheticdialogues"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text(f"{HEADER}\n{TRAIN}", encoding="utf-8")
    (folder / "test.csv").write_text(f"{HEADER}\n{TEST}", encoding="utf-8")
    (folder / "._test.csv").write_text("x")
    return tmp_path / "raw"


def rows_of(out):
    data = load_dataset(str(out))
    names = ("dialogue_id", "turn", "speaker", "text", "emotion")
    return {split: [tuple(row[name] for name in names) for row in rows] for split, rows in data.items()}


def test_every_line_is_a_row_or_is_reported(raw, tmp_path):
    report = prepare_corpus("empathetic-dialogues", raw, tmp_path / "out", progress=False)
    rows = rows_of(tmp_path / "out")
    assert rows["train"] == [
        ("hit:0_conv:1", 0, "speaker", "I remember the fireworks, with her.", None),  # sentimental may be many things
        ("hit:0_conv:1", 1, "listener", "Was this a friend you were in love with?", None),
        ("hit:1_conv:3", 0, "speaker", "A dog ran at me.", "fearful"),
        ("hit:1_conv:3", 1, "listener", "Oh no!", None),
        ("hit:1_conv:3", 2, "speaker", "It was huge.", "fearful"),
        ("hit:2_conv:7", 0, "speaker", "They shouted.", None),
        ("hit:2_conv:7", 1, "speaker", "Again.", None),
    ]
    assert rows["test"] == [
        ("hit:9_conv:1", 0, "speaker", "I ate the cake.", "sad"),
        ("hit:9_conv:1", 1, "listener", "How was it?", None),
    ]
    assert report["found"] == report["rows"] + len(report["left_out"]) == 13
    left_out = {entry["item"].rpartition("/")[2]: entry["reason"] for entry in report["left_out"]}
    assert left_out == {
        "train.csv:7": "utterance 3 of hit:1_conv:3 is in empatheticdialogues/train.csv:6 already.",
        "train.csv:8": "the line has 7 columns, the table 8.",
        "train.csv:9": "conv_id is 'hit:2_conv:6', utterance_idx 'x': give a name and a number.",
        "train.csv:11": "its utterance is empty.",
    }
    repaired = [entry["reason"] for entry in report["repaired"]]
    assert any("'blissful'" in reason and "kept without it" in reason for reason in repaired)
    assert any("utterance 2, 3 is missing" in reason for reason in repaired)
    assert any("all of its utterances are by one person" in reason for reason in repaired)
    assert report["without_media"] == [] and any("hidden" in entry["reason"] for entry in report["ignored"])
    assert {entry["split"] for entry in report["published"]["differences"]} >= {"train", "test"}


def test_the_archive_works_on_the_command_line(raw, tmp_path, capsys):
    archive = tmp_path / "download" / "empatheticdialogues.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(raw / "empatheticdialogues", arcname="empatheticdialogues")
    line = ["prepare", "empathetic-dialogues", str(archive), str(tmp_path / "out"), "--emotion_map", "sentimental=sad"]
    assert main(line) == 0
    assert "9 turns are in" in capsys.readouterr().out
    assert rows_of(tmp_path / "out")["train"][0][4] == "sad"


def test_there_are_32_feelings_and_each_has_a_decision():
    assert len(MAPPING) == 32 and set(MAPPING.values()) == {
        "angry",
        "disgust",
        "fearful",
        "happy",
        "sad",
        "surprise",
        None,
    }


def test_what_is_not_this_corpus_is_an_error(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(LayoutError, match=r"expected empatheticdialogues\.tar\.gz, or train\.csv.*found nothing"):
        prepare_corpus("empathetic-dialogues", raw, tmp_path / "out", progress=False)
    (raw / "train.csv").write_text("conv_id,utterance\n")
    with pytest.raises(LayoutError, match=r"its first line lacks utterance_idx, context"):
        prepare_corpus("empathetic-dialogues", raw, tmp_path / "out", progress=False)
    (raw / "train.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(LayoutError, match=r"is a Git-LFS pointer"):
        prepare_corpus("empathetic-dialogues", raw, tmp_path / "out", progress=False)
