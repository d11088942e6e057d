"""Tests of the comparison of EPO, its control and EPO with all negatives: real runs on a small text corpus."""

import json

import pytest
from datasets import load_dataset

from empathic.benchmarks import epo_arms
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.views import DialogueSamples
from empathic.tiny.corpus import write_corpus
from empathic.tiny.emotion_classifier import train_emotion_classifier


def reply(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def inputs(tmp_path):
    """The options for a corpus, its pairs and a classifier."""
    write_corpus(tmp_path / "texts", num_dialogues={"train": 3, "validation": 2, "test": 3}, with_clips=False)
    prepare_folder(tmp_path / "texts", tmp_path / "data", progress=False)
    (tmp_path / "pairs").mkdir()
    for split in ("train", "validation"):
        rows = [
            {
                "prompt": s["prompt"],
                "chosen": reply(s["reply"]),
                "rejected": reply("the dog"),
                "negatives": [reply("no")],
            }
            for s in DialogueSamples(load_dataset(str(tmp_path / "data"), split=split))
        ]
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    train_emotion_classifier(tmp_path / "classifier", ["a b", "c d"], ["happy", "sad"], steps=1, progress=False)
    return [
        *("--pairs", str(tmp_path / "pairs"), "--data", str(tmp_path / "data")),
        *("--classifier", str(tmp_path / "classifier"), "--recipe", "recipes/tiny/epo.yaml"),
    ]


def test_all_arms_are_compared_and_nothing_is_done_twice(inputs, base_folder, tmp_path, capsys, monkeypatch):
    options = [str(tmp_path / "out"), "--base", base_folder, *inputs, "--seeds", "0", "1", "--samples", "5"]
    options += ["--steps", "9", "--max_new_tokens", "4", "--history", "text", "--per_device_train_batch_size", "2"]
    options += ["--learning_rate", "1e-2", "--disable_tqdm", "True", "--save_strategy", "no"]
    results = epo_arms.main(options)
    assert results == json.loads(json.dumps(results))
    assert {arm: len(runs) for arm, runs in results["arms"].items()} == {
        **{"base": 1, "lowest": 2, "listwise": 2, "control": 2}
    }
    tokens = results["tokens_of_a_row"]
    assert tokens["all"] > tokens["lowest"] and results["steps"]["listwise"] <= results["steps"]["lowest"] == 9
    margins = {arm: runs[0]["margin"] for arm, runs in results["arms"].items()}
    assert margins["lowest"] > margins["control"] and margins["lowest"] > margins["base"]
    assert set(results["comparisons"]) == {
        f"{a} - {b}, {way}" for a, b in epo_arms.COMPARED for way in ("greedy", "sampled")
    }
    printed = capsys.readouterr().out
    assert "| listwise |" in printed and "lowest - control, sampled: " in printed
    monkeypatch.setattr(epo_arms.train, "main", lambda *arguments: pytest.fail("trained twice"))
    monkeypatch.setattr(epo_arms, "Judge", lambda *arguments: pytest.fail("evaluated twice"))
    assert epo_arms.main(options)["arms"] == results["arms"]


def test_steps_that_see_as_many_tokens():
    assert epo_arms.equal_steps({"prompt": 70, "chosen": 10, "lowest": 20, "all": 120}, 100) == 50
