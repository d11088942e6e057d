"""The voices benchmark on tiny models: folds of speakers, a run that is continued, the probe, the report."""

import json

import numpy as np
import pytest
import torch

from empathic.benchmarks import voices
from empathic.benchmarks.qformer_classifier import average_positions, pad, standardized
from empathic.data_prep.corpora.folder import prepare_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_media, tone):
    """Four clips of each of four speakers: the pitch tells the emotion."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data")
    lines = []
    for speaker in range(4):
        for number in range(4):
            name, emotion = f"{speaker}-{number}.wav", ("happy", "sad")[number % 2]
            pitch = (300, 2000)[number % 2] * (1 + speaker / 50)
            write_media(raw / name, samples=tone(0.4 + number / 20, frequency=pitch), audio_codec="pcm_s16le")
            line = {"dialogue_id": f"d{speaker}-{number}", "turn": 0, "speaker": f"actor{speaker}", "text": "hello"}
            split = ("train", "validation", "test", "train")[speaker]
            lines.append(line | {"file_name": name, "emotion": emotion, "split": split})
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare_folder(raw, out, progress=False)
    return str(out)


def test_each_speaker_is_tested_once_and_never_trained_on_in_its_fold():
    names = [f"actor{number:02d}" for number in range(24)]
    folds = voices.divide_speakers(names * 3, 6)
    assert sorted(name for fold in folds for name in fold["test"]) == names
    for fold in folds:
        assert (len(fold["train"]), len(fold["validation"]), len(fold["test"])) == (18, 2, 4)
        assert not {*fold["train"]} & {*fold["validation"], *fold["test"]}
        assert len({name for group in fold.values() for name in group}) == 24
    with pytest.raises(ValueError, match=r"24 speakers cannot be divided into 13 folds; choose from 2 to 12"):
        voices.divide_speakers(names, 13)


def test_a_run_is_continued_and_reported_beside_the_probe(data, parts, tmp_path, capsys, monkeypatch):
    config = tmp_path / "emotion.yaml"
    lines = [f"{name}: {path}" for name, path in parts.items()]
    lines += ["stage: emotion", "qformer_layers: 2", "qformer_heads: 2", "qformer_width: 32", "num_query_tokens: 4"]
    lines += ["dataset_name: [none]", "output_dir: none", "max_steps: 2", "per_device_train_batch_size: 2"]
    config.write_text("\n".join([*lines, "eval_strategy: 'no'", "save_steps: 1", "use_cpu: true"]))
    arguments = ["--data", data, "--config", str(config), "--output", str(tmp_path / "out"), "--folds", "2"]
    report = voices.main([*arguments, "--audio_window", "clip", "--learning_rate", "1e-3"])
    assert report == json.loads((tmp_path / "out" / "voices.json").read_text())
    assert report["clips"] == 16 and report["speakers"] == 4 and report["settings"]["audio_window"] == "clip"
    assert report["probe"]["mean"] == 1.0  # the pitch is in the mean of any features of the sound
    assert [len(fold["test"]) for fold in report["folds"]] == [1, 1]
    assert "16 test clips of 4 speakers" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("fold-*/seed-0/model/checkpoint-*"))

    def fail(argv):
        raise AssertionError("it trains again")

    monkeypatch.setattr(voices.train, "main", fail)
    again = voices.main([*arguments, "--audio_window", "clip", "--learning_rate", "1e-3"])
    assert again["folds"] == report["folds"]
    with pytest.raises(ValueError, match="of other training options"):
        voices.main([*arguments, "--audio_window", "clip", "--learning_rate", "2e-3"])


def test_the_folds_of_other_data_are_not_used(data, tmp_path):
    rows = voices.voices(data)
    folds = voices.divide_speakers(rows["speaker"], 2)
    voices.check_same_data(rows, folds, tmp_path / "out")
    voices.check_same_data(rows, folds, tmp_path / "out")
    for other in ((rows.select(range(8)), folds), (rows, folds[:1])):
        with pytest.raises(ValueError, match="folds of other data or another number of folds"):
            voices.check_same_data(*other, tmp_path / "out")


def test_a_linear_head_trains_on_the_same_folds_and_keeps_nothing(data, parts, tmp_path, capsys):
    config = tmp_path / "emotion.yaml"
    lines = [f"{name}: {path}" for name, path in parts.items()]
    lines += ["stage: emotion", "qformer_layers: 2", "qformer_heads: 2", "qformer_width: 32", "num_query_tokens: 4"]
    lines += ["dataset_name: [none]", "output_dir: none", "per_device_train_batch_size: 4", "learning_rate: 0.01"]
    config.write_text("\n".join([*lines, "use_cpu: true"]))
    arguments = ["--data", data, "--config", str(config), "--output", str(tmp_path / "out"), "--folds", "2"]
    arguments += ["--linear_head", "--standardize_features", "True"]
    with pytest.raises(ValueError, match=r"max_steps is -1; give --max_steps from 1 up with --linear_head"):
        voices.main(arguments)
    report = voices.main([*arguments, "--max_steps", "60", "--seeds", "0", "1"])
    assert report["settings"]["linear_head"] and report["settings"]["standardize_features"]
    assert report["accuracy"]["mean"] == 1.0  # the pitch tells the emotion
    assert [len(fold["test"]) for fold in report["folds"]] == [2, 2]
    earlier = tmp_path / "out" / "voices.json"
    again = voices.main([*arguments, "--max_steps", "60", "--seeds", "0", "1", "--against", str(earlier)])
    assert again["against"]["accuracy"]["mean"] == again["against"]["probe"]["mean"] == 0
    for one, other in zip(report["folds"], again["folds"], strict=True):
        assert one | {"seconds": None} == other | {"seconds": None}
    assert "validation: " in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("fold-*/seed-*"))


def test_positions_are_averaged_in_groups_and_clips_padded():
    clip = torch.arange(10.0).reshape(5, 2)
    short = average_positions(clip, 2)
    assert torch.equal(short, torch.tensor([[1.0, 2.0], [5.0, 6.0], [8.0, 9.0]]))
    features, mask = pad([short, clip])
    assert features.shape == (2, 5, 2) and torch.equal(features[1], clip) and not features[0, 3:].any()
    assert mask.sum(1).tolist() == [3, 5]
    scaled = standardized([clip, clip + 2, clip + 100], np.array([0, 1]))
    means = torch.stack([one.mean(0) for one in scaled[:2]])
    assert torch.allclose(means.mean(0), torch.zeros(2), atol=1e-6) and torch.allclose(means.std(0), torch.ones(2))


def test_the_summary_compares_by_speaker():
    results = [[{"hits": [1, 1, 0, 1]}, {"hits": [1, 0, 0, 1]}], [{"hits": [1, 1]}, {"hits": [1, 1]}]]
    probes = [{"hits": [0, 1, 0, 0]}, {"hits": [1, 0]}]
    found = voices.summarize(results, probes, [["a", "a", "b", "b"], ["c", "c"]])
    assert found["accuracy"]["mean"] == pytest.approx(np.mean([1, 0.5, 0, 1, 1, 1]))
    assert found["probe"]["mean"] == pytest.approx(2 / 6)
    assert found["difference"]["mean"] == pytest.approx(found["accuracy"]["mean"] - found["probe"]["mean"])
    assert found["clips"] == 6 and found["speakers"] == 3
    assert found["by_speaker"] == {
        "accuracy": {"a": 0.75, "b": 0.5, "c": 1.0},
        "probe": {"a": 0.5, "b": 0.0, "c": 0.5},
    }
    better = {"by_speaker": {**found["by_speaker"], "probe": {"a": 0.6, "b": 0.1, "c": 0.6}}}
    against = voices.compare(better, found)
    assert against["accuracy"]["mean"] == 0 and against["probe"]["mean"] == pytest.approx(0.1)
    own, probe = found["by_speaker"]["accuracy"], found["by_speaker"]["probe"]
    assert against["accuracy_probe"]["mean"] == pytest.approx(np.mean([own[name] - probe[name] for name in "abc"]))
    del better["by_speaker"]["probe"]["a"]
    with pytest.raises(ValueError, match="two reports tested different speakers"):
        voices.compare(better, found)
