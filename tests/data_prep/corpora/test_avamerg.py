"""The AvaMERG adapter on files in the layout of its download, with known defects and real clips."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from empathic.cli import main
from empathic.data_prep.corpora.base import LayoutError
from empathic.data_prep.prepare import prepare_corpus


def said(index, role, utterance):
    return {"index": index, "role": role, "utterance": utterance}


def entry(history, response, emotion="anxious", **more):
    chain = {"speaker_emotion": emotion, "event_scenario": "x", "emotion_cause": "y", "goal_to_response": "z"}
    return {
        "turn_id": 0,
        "context": "c",
        "dialogue_history": history,
        "response": response,
        "chain_of_empathy": chain,
        **more,
    }


def conversation(number, *turns, **more):
    about = {"speaker_profile": {"ID": 37, "age": "young"}, "listener_profile": {"ID": 5, "age": "old"}}
    return {"conversation_id": number, "topic": "work", **about, "turns": list(turns), **more}


FIRST = [said(0, "speaker", "I have an exam.")]
SECOND = [*FIRST, said(1, "listener", "You can do it."), said(2, "speaker", "I hope so.")]


@pytest.fixture
def raw(tmp_path, write_media, grey_frames, tone):
    folder = tmp_path / "AvaMERG"
    for place in ("train_audio/audio_v5_0", "train_video/video_v5_0", "test/audio"):
        (folder / place).mkdir(parents=True)

    def clip(name, number=0):
        if name.endswith(".wav"):
            sound = tone(0.3, frequency=200 + 100 * number)
            write_media(folder / name, samples=sound, audio_codec="pcm_s16le")
        else:
            write_media(folder / name, frames=grey_frames(3) + number)

    for number, (index, profile) in enumerate(((0, 37), (1, 5), (2, 37), (3, 5))):
        clip(f"train_audio/audio_v5_0/dia00012utt{index}_{profile}.wav", number)
        if index != 2:
            clip(f"train_video/video_v5_0/dia00012utt{index}_{profile}.mp4", number)
    clip("train_video/video_v5_0/dia00012utt2_99.mp4")  # of another profile
    clip("train_audio/audio_v5_0/dia00077utt0_37.wav")  # of no conversation
    clip("test/audio/dia12utt0.wav", 7)  # the older names, of the test's own conversation 12
    train = [
        conversation("00012", entry(FIRST, "You can do it."), entry(SECOND, "I am sure.", "hopeful")),
        conversation(
            13,
            entry([said(0, "speaker", "It  smelled.")], "Ugh.", "disgusted"),
            entry([said(0, "speaker", "It smelled bad."), said(1, "nobody", "x"), said(3, "speaker", " ")], None, "?"),
            {"turn_id": 2},
        ),
        conversation("00012", entry(FIRST, "Again.")),
        {"conversation_id": "x", "turns": []},
        conversation("14"),
    ]
    test = [conversation("00012", entry([said(0, "Speaker", "I won.")], "Great!", "joyful"), speaker_profile={})]
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps(test))
    (folder / "train_audio.zip").write_bytes(b"PK")
    (folder / "readme.txt").write_text("hello")
    return folder


def test_every_utterance_is_a_row_once_with_its_clips(raw, tmp_path):
    report = prepare_corpus("avamerg", raw, tmp_path / "out", progress=False)
    data = load_dataset(str(tmp_path / "out"))
    names = ("dialogue_id", "turn", "speaker", "text", "emotion")
    assert [tuple(row[name] for name in names) for row in data["train"]] == [
        ("12", 0, "speaker", "I have an exam.", "fearful"),  # of the entry that answers it
        ("12", 1, "listener", "You can do it.", None),
        ("12", 2, "speaker", "I hope so.", "happy"),
        ("12", 3, "listener", "I am sure.", None),
        ("13", 0, "speaker", "It smelled.", "disgust"),
        ("13", 1, "listener", "Ugh.", None),
    ]
    assert [tuple(row[name] for name in names) for row in data["test"]] == [
        ("12", 0, "speaker", "I won.", "happy"),
        ("12", 1, "listener", "Great!", None),
    ]
    paths = [{kind: row[kind] and Path(row[kind]["path"]).name for kind in ("audio", "video")} for row in data["train"]]
    assert paths[0] == {"audio": "dia00012utt0_37.wav", "video": "dia00012utt0_37.mp4"}
    assert paths[2] == {"audio": "dia00012utt2_37.wav", "video": None} and paths[4] == {"audio": None, "video": None}
    assert Path(data["test"][0]["audio"]["path"]).name == "dia12utt0.wav"  # not the training clip of this number
    assert report["found"] == report["rows"] + len(report["left_out"]) == 9


def test_every_defect_is_reported(raw, tmp_path):
    report = prepare_corpus("avamerg", raw, tmp_path / "out", progress=False)

    def told(kind):
        return {entry["item"]: entry["reason"] for entry in report[kind]}

    assert told("left_out") == {"train.json:13:3": "its utterance is empty."}
    ignored = told("ignored")
    assert "is in train.json:0 already" in ignored["train.json:2"]
    assert "\"conversation_id\" is 'x'" in ignored["train.json:3"]
    assert "\"role\" is 'nobody', not one of speaker, listener" in ignored["train.json:13:turn 1:1"]
    assert '"response" is None' in ignored["train.json:13:turn 1:response"]
    assert 'no list "dialogue_history"' in ignored["train.json:13:turn 2"]
    assert "unpack it in its folder" in ignored["train_audio.zip"] and "by its name" in ignored["readme.txt"]
    assert "2 such clips belong to no utterance" in "".join(ignored.values())
    repaired = [(entry["item"], entry["reason"]) for entry in report["repaired"]]
    assert any(item == "train.json:13:turn 1:0" and "differs from an earlier one" in why for item, why in repaired)
    assert any("'?'" in why for _, why in repaired)
    assert any(item == "train.json:13" and "utterance 2 is missing" in why for item, why in repaired)
    lacking = [entry["reason"] for entry in report["without_media"]]
    assert any("dia00012utt2_99.mp4 is of another profile than 37" in reason for reason in lacking)
    assert any("there is no dia00013utt0_37.wav" in reason for reason in lacking)
    assert any("there is no dia00012utt0.mp4" in reason for reason in lacking)  # the test's speaker has no profile


def test_the_tables_alone_work_on_the_command_line(raw, tmp_path, capsys):
    assert (
        main(["prepare", "avamerg", str(raw), str(tmp_path / "out"), "--text_only", "--emotion_map", "hopeful="]) == 0
    )
    shown = capsys.readouterr().out
    assert "8 turns are in" in shown and "because only the text is wanted" in shown
    train = load_dataset(str(tmp_path / "out"), split="train")
    assert train["emotion"][:4] == ["fearful", None, None, None] and train["audio"][0] is None


def test_what_is_not_this_corpus_is_an_error(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(LayoutError, match=r"expected train\.json, valid\.json or test\.json, but found nothing"):
        prepare_corpus("avamerg", raw, tmp_path / "out", progress=False)
    for content, message in (
        ("{}", "is a dict, not a list"),
        ("[", "is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "LFS"),
    ):
        (raw / "test.json").write_text(content)
        with pytest.raises(LayoutError, match=message):
            prepare_corpus("avamerg", raw, tmp_path / "out", progress=False)
