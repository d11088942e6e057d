"""Two processes, killed, and started again by the command that users type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from empathic.composition_empathic import PARTS_FILE
from empathic.trainers.checkpoints.stage_folder import UNFINISHED

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def arguments(recordings, parts, output):
    """The tiny recipe, on other data and smaller."""
    found = ["--config", "recipes/tiny/emotion.yaml", "--dataset_name", recordings.data, "--output_dir", str(output)]
    found += [option for name, path in parts.items() for option in (f"--{name}", path)]
    found += ["--num_frames", "2", "--qformer_width", "32", "--qformer_dropout", "0.1", "--max_steps", "4"]
    found += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps", "1"]
    found += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1", "--disable_tqdm", "True"]
    return found


def log(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def test_two_killed_processes_go_on_as_unbroken(recordings, parts, start, tmp_path):
    kill = str(Path(__file__).with_name("killed_while_saving.py"))
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    runs = [
        {"arguments": arguments(recordings, parts, unbroken), "patch": None},
        {"arguments": arguments(recordings, parts, killed), "patch": kill},
    ]
    start("cpu", runs, succeeds=False)
    assert (killed / f"{UNFINISHED}checkpoint-2").is_dir()
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-1"]

    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    command += ["-m", "empathic.trainers.train", *arguments(recordings, parts, killed)]
    done = subprocess.run(
        [*command, "--resume_from_checkpoint", "auto"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert [path.name for path in killed.glob("*checkpoint-*")] == ["checkpoint-4"]
    assert json.loads((killed / "checkpoint-4" / "checkpoint_complete.json").read_text())["world_size"] == 2
    assert log(killed) == log(unbroken) and len(log(killed)) == 4
    expected = load_file(unbroken / PARTS_FILE)
    for name, tensor in load_file(killed / PARTS_FILE).items():
        assert torch.equal(tensor, expected[name]), name
