"""A training that is stopped by a signal, that shares its folder with another one, or that gets a token."""

import json
import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerCallback

from empathic.errors import run_program
from empathic.files import FolderInUseError, held_folder
from empathic.processes import Stopped
from empathic.trainers import train
from empathic.trainers.checkpoints.saving import last_checkpoint

TOKEN = "hf_MadeUpMadeUpMadeUp"


def arguments(recordings, base, output, *more, stage="emotion"):
    data = recordings.pairs if stage == "epo" else recordings.data
    found = ["--stage", stage, "--dataset_name", data, "--model_name_or_path", base, "--output_dir", str(output)]
    found += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--report_to", "none", "--seed", "3"]
    return [*found, "--disable_tqdm", "True", "--use_cpu", "True", "--log_samples", "0", "--max_steps", "5", *more]


@pytest.fixture
def signal_at_step(monkeypatch):
    """A function that sends this process, and the workers of its data loader, a signal at a step."""

    def at(step, signum):
        class Signal(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step - 1:
                    for worker in children():
                        os.kill(worker, signum)
                    os.kill(os.getpid(), signum)

        build = train.SupervisedRun.__init__

        def with_signal(self, *args, **kwargs):
            build(self, *args, **kwargs)
            self.add_callback(Signal())

        monkeypatch.setattr(train.SupervisedRun, "__init__", with_signal)

    return at


def children() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in found if "multiprocessing" not in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_training_with_a_checkpoint_to_go_on_from(
    signum, signal_at_step, recordings, base_folder, tmp_path, monkeypatch, capsys
):
    options = ["--save_strategy", "steps", "--save_steps", "100", "--dataloader_num_workers", "1"]
    with monkeypatch.context(), pytest.raises(Stopped) as stop:
        signal_at_step(2, signum)
        train.main(arguments(recordings, base_folder, tmp_path, *options))
    assert stop.value.code == 128 + signum and "--resume_from_checkpoint auto" in str(stop.value)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "empathic_stage.json").exists()  # not finished
    monkeypatch.undo()
    train.main(arguments(recordings, base_folder, tmp_path, *options, "--resume_from_checkpoint", "auto"))
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 5
    assert not list(tmp_path.glob("*.lock")) and not (tmp_path / ".lock").exists()


def test_without_checkpoints_a_signal_stops_at_once(signal_at_step, recordings, base_folder, tmp_path, capsys):
    signal_at_step(2, signal.SIGTERM)
    line = arguments(recordings, base_folder, tmp_path / "out", "--save_strategy", "no")
    assert run_program("empathic train", lambda: train.main(line), []) == 143
    assert "at step 2" in capsys.readouterr().err and not list((tmp_path / "out").glob("checkpoint-*"))


def test_two_trainings_do_not_write_to_one_folder(recordings, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build_model", None)  # found before
    with held_folder(tmp_path, "empathic train"), pytest.raises(FolderInUseError, match=str(os.getpid())):
        train.main(arguments(recordings, base_folder, tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset_name", "missing/data/folder"], "missing/data/folder"),
        (["--train_split", "nothing"], "its splits are"),
        (["--resume_from_checkpoint", "nowhere"], "not a complete checkpoint"),
        (["--max_steps", "-1", "--num_train_epochs", "0.001"], "num_train_epochs is 0.001.*Give num_train_epochs"),
        (["--max_eval_samples", "0"], "max_eval_samples must be at least 1.*--eval_strategy no"),
    ],
)
def test_what_needs_no_model_is_checked_before_one_is_loaded(
    more, message, recordings, base_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "build_model", None)
    with pytest.raises((ValueError, OSError), match=message):
        train.main(arguments(recordings, base_folder, tmp_path, *more))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["emotion", "epo"])
def test_no_file_of_a_training_has_the_token(stage, recordings, base_folder, tmp_path, capfd):
    options = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2", "--hub_token", TOKEN]
    options += ["--report_to", "tensorboard"] if has_tensorboard() else []
    train.main(arguments(recordings, base_folder, tmp_path, *options, stage=stage))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "training_args.bin" for path in files) == 3
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in "".join(capfd.readouterr())


def has_tensorboard() -> bool:
    from transformers.integrations import is_tensorboard_available

    return is_tensorboard_available()
