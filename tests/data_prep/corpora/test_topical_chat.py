"""The Topical-Chat adapter on files in the layout of its repository, with known defects."""

import json

import pytest
from datasets import load_dataset

from empathic.cli import main
from empathic.data_prep.corpora.base import LayoutError
from empathic.data_prep.prepare import prepare_corpus


def message(text, agent="agent_1", sentiment="Neutral", **more):
    return {"message": text, "agent": agent, "sentiment": sentiment, "knowledge_source": ["FS1"], **more}


def conversation(*messages):
    return {"article_url": "https://example.org", "config": "A", "content": list(messages), "conversation_rating": {}}


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "Topical-Chat"
    (folder / "conversations").mkdir(parents=True)
    splits = {
        "train": {
            "t_1": conversation(
                message("Do you like dogs?", sentiment="Curious to dive deeper"),
                message("Oh!  I love them ", agent="agent_2", sentiment="Surprised"),
                message("Mine is gone.", sentiment="Sad"),
            ),
            "t_2": conversation(message("This one is also in the test.")),
        },
        "test_freq": {
            "t_2": conversation(message("This one is also in the test.", sentiment="Fearful")),
            "t_3": conversation(message("Ugh.", sentiment="Disgusted"), message(None), message("Hm.", sentiment="?")),
            "t_4": {"content": None},
        },
    }
    for split, content in splits.items():
        (folder / "conversations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_every_message_is_a_row_or_is_reported(raw, tmp_path):
    report = prepare_corpus("topical-chat", raw, tmp_path / "out", progress=False)
    data = load_dataset(str(tmp_path / "out"))
    train = list(data["train"])
    assert [(row["dialogue_id"], row["turn"], row["speaker"], row["text"], row["emotion"]) for row in train] == [
        ("t_1", 0, "agent_1", "Do you like dogs?", "neutral"),
        ("t_1", 1, "agent_2", "Oh! I love them", "surprise"),
        ("t_1", 2, "agent_1", "Mine is gone.", "sad"),
    ]
    test = list(data["test_freq"])
    assert [(row["dialogue_id"], row["emotion"]) for row in test] == [
        ("t_2", "fearful"),
        ("t_3", "disgust"),
        ("t_3", None),
    ]
    assert all(row["audio"] is None and row["video"] is None for row in [*train, *test])
    assert report["found"] == report["rows"] + len(report["left_out"]) == 8
    reasons = {entry["item"]: entry["reason"] for entry in report["left_out"]}
    assert "test_freq.json already" in reasons["conversations/train.json:t_2:0"]
    assert '"message" is None' in reasons["conversations/test_freq.json:t_3:1"]
    assert report["without_media"] == []
    assert any("'?'" in entry["reason"] for entry in report["repaired"])
    assert any("t_4" in entry["item"] for entry in report["ignored"])


def test_the_conversations_folder_alone_works_on_the_command_line(raw, tmp_path, capsys):
    assert main(["prepare", "topical-chat", str(raw / "conversations"), str(tmp_path / "out")]) == 0
    assert "6 turns are in" in capsys.readouterr().out


def test_what_is_not_topical_chat_is_an_error(tmp_path):
    with pytest.raises(LayoutError, match=r"expected train\.json.*git clone"):
        prepare_corpus("topical-chat", tmp_path, tmp_path.parent / "out", progress=False)
    (tmp_path / "train.json").write_text("[1, 2]")
    with pytest.raises(LayoutError, match=r"is a list, not an object"):
        prepare_corpus("topical-chat", tmp_path, tmp_path.parent / "out", progress=False)
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(LayoutError, match=r"is not JSON"):
        prepare_corpus("topical-chat", tmp_path, tmp_path.parent / "out", progress=False)
