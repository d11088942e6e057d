"""Tests of the sweep of EPO's settings: real runs on a small folder, resuming, the summary, and bad options."""

import json

import pytest
from datasets import load_dataset

from empathic.benchmarks import epo_sweep
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.views import DialogueSamples
from empathic.tiny.corpus import write_corpus
from empathic.tiny.dialogues import ASSISTANT
from empathic.tiny.emotion_classifier import train_emotion_classifier
from empathic.trainers import train

FEW = ["--steps", "2", "--samples", "6", "--seeds", "0", "1", "--gamma", "--nll_weight"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, base_folder):
    """The parts of a quickstart's folder that the sweep reads, each made with its own program."""
    root = tmp_path_factory.mktemp("quickstart")
    write_corpus(root / "recordings", num_dialogues={"train": 2, "test": 4})
    prepare_folder(root / "recordings", root / "data", progress=False)
    (root / "pairs").mkdir()
    for split in ("train", "test"):
        rows = [
            {
                "prompt": sample["prompt"],
                "chosen": [{"role": "assistant", "content": sample["reply"]}],
                "rejected": [{"role": "assistant", "content": "what did he say"}],
            }
            for sample in DialogueSamples(load_dataset(str(root / "data"), split=split), [ASSISTANT])
        ]
        lines = [json.dumps(row) + "\n" for row in rows[:8]]
        (root / "pairs" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_emotion_classifier(
        root / "parts" / "emotion_classifier", ["a b", "c d"], ["happy", "sad"], steps=1, progress=False
    )
    arguments = ["--config", str(epo_sweep.RECIPES / "dialogue.yaml"), "--model_name_or_path", base_folder]
    arguments += ["--dataset_name", str(root / "data"), "--output_dir", str(root / "dialogue"), "--max_steps", "1"]
    train.main([*arguments, "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"])
    return root


def sweep(quickstart, output, *options):
    return epo_sweep.main(["--quickstart", str(quickstart), "--output", str(output), *FEW, *options])


def test_runs_are_measured_summarized_and_resumed(quickstart, tmp_path, capsys, monkeypatch):
    output = tmp_path / "sweep.json"
    small = ["--learning_rate", "2e-4", "1e-2", "--beta"]
    result = sweep(quickstart, output, *small)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    names = ["before EPO", "default", "control", "learning_rate 0.01"]
    assert [(row["setting"], row["seed"]) for row in result["runs"]] == [
        ("before EPO", 0),
        *((name, seed) for name in names[1:] for seed in (0, 1)),
    ]
    by_name = {(row["setting"], row["seed"]): row["metrics"] for row in result["runs"]}
    assert all(set(epo_sweep.METRICS) <= set(row) for row in by_name.values())
    # A higher learning rate goes further, the seed changes the run, and so does the preference loss.
    start = by_name["before EPO", 0]["margin"]
    moved = {key: abs(row["margin"] - start) for key, row in by_name.items()}
    assert moved["learning_rate 0.01", 0] > 3 * moved["default", 0] > 0
    assert by_name["default", 0]["margin"] != by_name["default", 1]["margin"]
    assert by_name["default", 0]["margin"] != by_name["control", 0]["margin"]
    assert result["summary"]["default"]["metrics"]["margin"]["mean"] == pytest.approx(
        (by_name["default", 0]["margin"] + by_name["default", 1]["margin"]) / 2
    )
    assert epo_sweep.markdown(result["summary"]) in capsys.readouterr().out
    assert "<svg" in output.with_suffix(".svg").read_text()

    # What is done is not done again; a new value is added to the same file.
    run, called = epo_sweep.run, []

    def counted(root, setting, seed, *rest):
        called.append((setting.name, seed))
        return run(root, setting, seed, *rest)

    monkeypatch.setattr(epo_sweep, "run", counted)
    again = sweep(quickstart, output, *small, "8")
    assert called == [("beta 8", 0), ("beta 8", 1)]
    assert [row for row in again["runs"] if row["setting"] != "beta 8"] == result["runs"]
    with pytest.raises(ValueError, match="has runs with steps 2, but now steps is 3"):
        sweep(quickstart, output, *small, "--steps", "3")


def test_a_diverged_run_is_a_result(quickstart, tmp_path, monkeypatch):
    def diverge(arguments):
        raise FloatingPointError("The loss is NaN.")

    monkeypatch.setattr(epo_sweep.train, "main", diverge)
    result = sweep(quickstart, tmp_path / "sweep.json", "--learning_rate", "--beta")
    assert [row["failed"] for row in result["runs"] if "failed" in row] == ["The loss is NaN."] * 4
    assert result["summary"]["default"] == {"seeds": 0, "failed": 2, "metrics": {}}
    assert "| default | diverged |" in epo_sweep.markdown(result["summary"])


def test_the_defaults_are_the_recipes():
    assert epo_sweep.defaults() == {"learning_rate": 2e-4, "beta": 2.0, "gamma": 0.5, "nll_weight": 1.0}
    for name, values in epo_sweep.FACTORS.items():
        assert epo_sweep.defaults()[name] in values
    names = [setting.name for setting in epo_sweep.settings_of({"beta": (0.5, 2.0)})]
    assert names == ["default", "control", "beta 0.5"]


def test_the_summary_has_the_spread_over_seeds():
    rows = [{"setting": "one", "metrics": dict.fromkeys(epo_sweep.METRICS, value)} for value in (1.0, 2.0, 3.0)]
    rows += [{"setting": "two", "metrics": dict.fromkeys(epo_sweep.METRICS, 0.25)}, {"setting": "two", "failed": "x"}]
    found = epo_sweep.summarize(rows)
    assert found["one"]["metrics"]["margin"] == {"mean": 2.0, "sd": 1.0} and found["one"]["seeds"] == 3
    assert found["two"]["metrics"]["margin"] == {"mean": 0.25, "sd": None}
    table = epo_sweep.markdown(found).splitlines()
    assert table[2].startswith("| one | 2.000 ± 1.000 |") and table[3].startswith("| two (1 diverged) | 0.250 |")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--beta", "-1"], "--beta: beta must be a finite number above 0"),
        (["--quickstart", "nowhere"], "has no dialogue, pairs, data, parts"),
    ],
)
def test_bad_options_are_named(options, message, quickstart, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep(quickstart, tmp_path / "sweep.json", *options)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
