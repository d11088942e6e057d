"""Vectors of clips and memory computed once for all epochs, by two processes together, beside the same in one."""

import json
from pathlib import Path

import pytest
import torch

from empathic.trainers import train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QFORMER = ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32", "--qformer_dropout", "0"]


def arguments(stage, data, base, output, batch, *more):
    found = ["--stage", stage, "--dataset_name", data, "--output_dir", str(output), "--report_to", "none"]
    found += ["--per_device_train_batch_size", str(batch), "--per_device_eval_batch_size", str(batch)]
    found += ["--learning_rate", "1e-2", "--disable_tqdm", "True", "--logging_steps", "1", "--log_samples", "0"]
    found += ["--frame_draws", "0"]  # the same frames in each epoch
    return [*found, *base, *map(str, more)]


def log(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return torch.tensor(losses + [entry["eval_loss"] for entry in history if "eval_loss" in entry])


@pytest.fixture(scope="module")
def alone(recordings, parts, tmp_path_factory):
    """A base, and the run on it in this process without kept vectors."""
    root = tmp_path_factory.mktemp("alone")
    names = [option for name, path in parts.items() for option in (f"--{name}", path)]
    sizes = ["--num_query_tokens", "4", "--num_frames", "2", *QFORMER, "--max_steps", "1"]
    train.main(arguments("emotion", recordings.data, [*names, *sizes], root / "base", 2, "--eval_strategy", "no"))
    train.main(epo(recordings, root, root / "epo", 4))
    return root


def epo(recordings, root, output, batch, *more):
    base = ["--model_name_or_path", str(root / "base"), "--lora_r", "4", "--num_train_epochs", "2"]
    return arguments("epo", recordings.pairs, base, output, batch, "--eval_strategy", "epoch", *more)


@pytest.mark.parametrize("strategy", ["cpu", "zero3", "fsdp2"])
def test_losses_are_those_of_one_process_without(alone, recordings, start, tmp_path, strategy):
    if strategy == "zero3":
        pytest.importorskip("deepspeed", reason="make test-distributed installs it")
    given = epo(recordings, alone, tmp_path, 2, "--cache_frozen_gib", "1")
    start(strategy, [{"arguments": given, "patch": str(Path(__file__).with_name("stays_packed.py"))}])
    expected = log(alone / "epo")
    assert len(expected) > 4
    torch.testing.assert_close(log(tmp_path), expected, rtol=2e-3, atol=0)
