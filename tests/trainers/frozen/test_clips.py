"""Stage `dialogue` with the vectors of its clips computed once: the same losses, and no clip is read again."""

import json

import pytest
import torch

from empathic import modeling_empathic
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import train

OPTIONS = ["--max_steps", "6", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--logging_steps", "1"]
OPTIONS += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True", "--seed", "3"]
OPTIONS += ["--eval_strategy", "steps", "--eval_steps", "3", "--log_samples", "0", "--frame_draws", "0"]


@pytest.fixture
def counts(monkeypatch):
    """Count how often clips are decoded and encoded."""
    found = {"decoded": 0, "encoded": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            found[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("frames", "sound"):
        monkeypatch.setattr(EmpathicProcessor, name, counted("decoded", getattr(EmpathicProcessor, name)))
    for name in ("encode_frames", "encode_sound"):
        monkeypatch.setattr(modeling_empathic, name, counted("encoded", getattr(modeling_empathic, name)))
    return found


def run(stage, recordings, base, folder, *options):
    options = [*options, "--lora_r", "4"] if stage == "dialogue" else options
    given = ["--stage", stage, "--dataset_name", recordings.data, "--output_dir", str(folder)]
    train.main([*given, "--model_name_or_path", str(base), *OPTIONS, *options])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def test_losses_are_those_of_the_clips_which_are_read_once(base_folder, recordings, tmp_path, counts):
    plain = run("dialogue", recordings, base_folder, tmp_path / "plain")
    before = dict(counts)
    kept = run("dialogue", recordings, base_folder, tmp_path / "kept", "--cache_frozen_gib", "1")
    longer = dict(counts)
    run("dialogue", recordings, base_folder, tmp_path / "longer", "--cache_frozen_gib", "1", "--max_steps", "12")
    assert len(plain) == len(kept) == 8  # six steps, two evaluations
    assert torch.allclose(torch.tensor(plain), torch.tensor(kept), rtol=1e-4)
    assert before["decoded"] > 0 and before["encoded"] > 0
    # Twice the steps and evaluations, with the same number of reads.
    assert longer["decoded"] - before["decoded"] == counts["decoded"] - longer["decoded"]
    assert longer["encoded"] - before["encoded"] == counts["encoded"] - longer["encoded"]


def test_too_little_room_and_stages_that_train_the_q_formers(base_folder, recordings, tmp_path):
    with pytest.raises(ValueError, match=r"more than\s+cache_frozen_gib=1e-07"):
        run("dialogue", recordings, base_folder, tmp_path, "--cache_frozen_gib", "1e-7")
    with pytest.raises(ValueError, match="stage memory_multi trains the parts whose outputs"):
        run("memory_multi", recordings, base_folder, tmp_path, "--cache_frozen_gib", "1")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        run("dialogue", recordings, base_folder, tmp_path, "--cache_frozen_gib", "-1")
