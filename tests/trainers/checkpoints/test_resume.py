"""Runs that are killed and resumed: the same losses as uninterrupted runs, and no incomplete checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from empathic.composition_empathic import ADAPTER_FILE, PARTS_FILE, STAGE_FILE
from empathic.hub.model_card import read_record
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.trainers import train
from empathic.trainers.checkpoints.saving import COMPLETE_FILE, StageSaving, checkpoint_to_resume, last_checkpoint
from empathic.trainers.checkpoints.stage_folder import UNFINISHED, load_model, merge

# What could make a resumed run differ: workers, accumulated batches, evaluations in between, new epochs, dropout.
HARD = ["--dataloader_num_workers", "1", "--gradient_accumulation_steps", "2", "--eval_strategy", "steps"]
HARD += ["--eval_steps", "1", "--log_samples", "1", "--log_samples_tokens", "3"]
OPTIONS = {
    "emotion": [*HARD, "--max_steps", "4", "--save_steps", "1"],
    "dialogue": [*HARD, "--max_steps", "4", "--save_steps", "2", "--lora_dropout", "0.3", "--lora_r", "4"],
    "epo": ["--num_train_epochs", "3", "--save_steps", "1", "--disable_dropout", "False", "--lora_dropout", "0.3"],
}
BROKEN_AFTER = {"emotion": 3, "dialogue": 2, "epo": 7}  # steps; an epoch of epo has five


def arguments(stage, recordings, base, output, *more):
    data = recordings.pairs if stage == "epo" else recordings.data
    found = ["--stage", stage, "--dataset_name", data, "--model_name_or_path", base, "--output_dir", str(output)]
    found += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--report_to", "none", "--seed", "3"]
    found += ["--logging_steps", "1", "--disable_tqdm", "True", "--use_cpu", "True", "--log_samples", "0"]
    return [*found, *OPTIONS.get(stage, []), *more]


def history(folder):
    """The logs of each step, without times."""
    state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
    kept = ("loss", "grad_norm", "learning_rate", "step", "epoch", "eval_loss", "rewards/margins")
    return [{k: entry[k] for k in kept if k in entry} for entry in state["log_history"]]


@pytest.fixture(scope="module")
def unbroken(recordings, base_folder, tmp_path_factory):
    """A function of a stage that returns the folder of its uninterrupted run, with all checkpoints."""
    folders = {}

    def run(stage):
        if stage not in folders:
            folders[stage] = tmp_path_factory.mktemp(f"unbroken_{stage}")
            train.main(arguments(stage, recordings, base_folder, folders[stage]))
        return folders[stage]

    return run


def tensors(folder):
    file = Path(folder, ADAPTER_FILE)
    return load_file(file if file.exists() else Path(folder, PARTS_FILE))


@pytest.mark.parametrize("stage", OPTIONS)
def test_a_resumed_run_is_as_the_unbroken_one(stage, unbroken, recordings, base_folder, tmp_path):
    checkpoint = f"checkpoint-{BROKEN_AFTER[stage]}"
    shutil.copytree(unbroken(stage) / checkpoint, tmp_path / checkpoint)
    options = ["--resume_from_checkpoint", "auto", "--save_total_limit", "1"]
    train.main(arguments(stage, recordings, base_folder, tmp_path, *options))
    assert history(tmp_path) == history(unbroken(stage))
    for name, tensor in tensors(unbroken(stage)).items():
        assert torch.equal(tensor, tensors(tmp_path)[name]), name
    last = json.loads((tmp_path / "trainer_state.json").read_text())["global_step"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last}"]


KILLED = """
import os, signal, sys
import torch
from empathic.trainers import train

save, calls = torch.save, []

def save_and_die(value, file, *args, **kwargs):  # in the middle of saving the second checkpoint
    calls.append(file)
    save(value, file, *args, **kwargs)
    if "checkpoint-2" in str(file) and len(calls) > 5:
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_and_die
train.main(sys.argv[1:])
"""


def test_a_killed_process_goes_on_from_the_last_whole_checkpoint(unbroken, recordings, base_folder, tmp_path):
    command = [sys.executable, "-c", KILLED, *arguments("emotion", recordings, base_folder, tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert (tmp_path / f"{UNFINISHED}checkpoint-2").is_dir()  # it was killed there
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    train.main(arguments("emotion", recordings, base_folder, tmp_path, "--resume_from_checkpoint", "auto"))
    assert history(tmp_path) == history(unbroken("emotion"))
    assert not list(tmp_path.glob(f"{UNFINISHED}*"))


class Killed(BaseException):
    """Simulates a kill."""


@pytest.fixture(scope="module")
def kill_at():
    """A function of `folder` and a number: file changes under `folder` fail from this number on; None: none fails."""
    state = {"folder": None, "left": 0}
    changes = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def watch(event, args):
        if state["folder"] is None or event not in changes:
            return
        path = str(args[0])
        if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # named within an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
        if not path.startswith(state["folder"]):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if state["left"] == 0:
            state["folder"] = None
            raise Killed
        state["left"] -= 1

    sys.addaudithook(watch)

    def arm(folder, number):
        state.update(folder=None if folder is None else str(folder), left=number)

    return arm


def test_wherever_saving_is_cut_off_no_half_checkpoint_is_left(recordings, base_folder, tmp_path, kill_at, monkeypatch):
    save, cuts = StageSaving._save_checkpoint, []

    def save_cut_off(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 1:
            return
        whole = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "checkpoint-2").rglob("*"))
        for number in range(1000):
            shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
            shutil.copytree(tmp_path / "kept", tmp_path / "checkpoint-1", dirs_exist_ok=True)
            kill_at(tmp_path, number)
            try:
                save(self, model, trial)
            except Killed:
                cuts.append(number)
            else:
                kill_at(None, 0)
                return
            found = last_checkpoint(tmp_path)
            for path in tmp_path.glob("checkpoint-*"):  # each is complete
                names = sorted(str(p.relative_to(tmp_path)) for p in path.rglob("*"))
                assert [name.replace(path.name, "checkpoint-2") for name in names] == whole, (number, path)
            assert found is not None and checkpoint_to_resume("auto", tmp_path) == found

    def keep_first(self, model, trial):
        save_cut_off(self, model, trial)
        if self.state.global_step == 1:
            shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "kept")

    monkeypatch.setattr(StageSaving, "_save_checkpoint", keep_first)
    options = ["--max_steps", "2", "--save_steps", "1", "--save_total_limit", "1"]
    train.main(arguments("memory_single", recordings, base_folder, tmp_path, *options))
    assert len(cuts) > 10


def test_what_is_no_whole_checkpoint_is_named(unbroken, tmp_path):
    folder = unbroken("emotion")
    assert checkpoint_to_resume(None, folder) is checkpoint_to_resume("none", folder) is None
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert checkpoint_to_resume("auto", folder) == str(folder / "checkpoint-4")
    cut = shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    (cut / COMPLETE_FILE).unlink()
    assert checkpoint_to_resume("auto", folder) == str(folder / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-9 is not a complete checkpoint.*complete one is .*checkpoint-4"):
        checkpoint_to_resume(str(cut), folder)
    shutil.rmtree(cut)


@pytest.fixture(scope="module")
def trainer(recordings, base_folder, tmp_path_factory):
    """The trainer of another run of stage emotion, about to start."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self, **kwargs: found.append(self) or exit())
        with pytest.raises(SystemExit):
            train.main(arguments("emotion", recordings, base_folder, tmp_path_factory.mktemp("other")))
    return found[0]


def resume(trainer, checkpoint):
    trainer._check_checkpoint(str(checkpoint))
    trainer._load_trained(str(checkpoint))


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: edit_json(c / STAGE_FILE, stage="memory_multi"), "of stage memory_multi, but this run trains"),
        (lambda c: edit_json(c / COMPLETE_FILE, seed=4), "seed was 4 and now is 3"),
        (lambda c: edit_json(c / COMPLETE_FILE, samples_per_step=8), "samples_per_step was 8 and now is 4"),
        (lambda c: edit_json(c / COMPLETE_FILE, strategy="zero3", world_size=2), "world_size was 2 and now is 1"),
        (lambda c: edit_json(c / COMPLETE_FILE, resumable=False), "save_only_model"),
        (lambda c: edit_parts(c, lambda t: t.pop("model.video_query_tokens")), r"missing: model\.video_query_tokens\)"),
        (lambda c: edit_parts(c, lambda t: t.update(a=torch.zeros(1))), r"unexpected: a\)"),
        (
            lambda c: edit_parts(c, lambda t: t.update({"model.video_query_tokens": torch.zeros(5, 32)})),
            r"of another shape: model\.video_query_tokens\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message, unbroken, trainer, tmp_path):
    checkpoint = shutil.copytree(unbroken("emotion") / "checkpoint-2", tmp_path / "checkpoint-2")
    resume(trainer, checkpoint)
    change(checkpoint)
    with pytest.raises(ValueError, match=message):
        resume(trainer, checkpoint)


def test_a_run_does_not_start_from_a_checkpoint_of_another_stage(unbroken, recordings, base_folder, tmp_path):
    checkpoint = str(unbroken("emotion") / "checkpoint-2")
    options = ["--max_steps", "1", "--resume_from_checkpoint", checkpoint]
    with pytest.raises(ValueError, match="is a checkpoint of stage emotion, but this run trains stage memory_single"):
        train.main(arguments("memory_single", recordings, base_folder, tmp_path, *options))


def test_a_checkpoint_of_another_base_is_refused(unbroken, recordings, base_folder, tmp_path):
    other, checkpoint = str(tmp_path / "other"), str(unbroken("emotion") / "checkpoint-2")
    shutil.copytree(base_folder, other)
    options = ["--resume_from_checkpoint", checkpoint]
    with pytest.raises(ValueError, match=r"the base was .*base0 and now is .*other \(the trained weights fit"):
        train.main(arguments("emotion", recordings, other, tmp_path / "out", *options))


def test_other_settings_are_named_once(unbroken, recordings, base_folder, tmp_path, caplog):
    checkpoint = unbroken("emotion") / "checkpoint-2"
    options = ["--resume_from_checkpoint", str(checkpoint), "--learning_rate", "1e-4", "--weight_decay", "0.5"]
    with caplog.at_level("WARNING"):
        train.main(arguments("emotion", recordings, base_folder, tmp_path, *options))
    found = [text for text in caplog.messages if "other settings" in text]
    assert (
        len(found) == 1 and "learning_rate was 0.01 and now is 0.0001; weight_decay was 0.0 and now is 0.5" in found[0]
    )
    rates = [log["learning_rate"] for log in history(tmp_path) if "learning_rate" in log]
    assert rates == [log["learning_rate"] for log in history(unbroken("emotion")) if "learning_rate" in log]
    assert read_record(tmp_path)["runs"][-1]["learning_rate"] == 0.01  # what it was trained with


def test_a_finished_run_that_is_started_again_keeps_its_results(unbroken, recordings, base_folder, tmp_path):
    folder = shutil.copytree(unbroken("emotion"), tmp_path / "again")
    before = read_record(folder)["runs"][-1]["metrics"], (folder / "train_results.json").read_text()
    assert before[0]["train_loss"] > 0
    metrics = train.main(arguments("emotion", recordings, base_folder, folder, "--resume_from_checkpoint", "auto"))
    assert (read_record(folder)["runs"][-1]["metrics"], (folder / "train_results.json").read_text()) == before
    assert "train_loss" not in metrics and metrics["eval_loss"] == before[0]["eval_loss"]


def edit_parts(folder, change, name=PARTS_FILE):
    found = load_file(folder / name)
    change(found)
    save_file(found, folder / name)


def rename(found, old, new):
    found.update({key.replace(old, new): found.pop(key) for key in list(found) if old in key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: rename(t, "layers.1", "layers.7"), r"missing: model.*layers\.1\..*unexpected: model.*layers\.7\."),
        (lambda t: t.update({key: value[..., :5].clone() for key, value in t.items()}), "another shape: .*lora_A"),
    ],
)
def test_an_adapter_of_another_base_names_its_keys(change, message, unbroken, tmp_path):
    folder = shutil.copytree(unbroken("epo") / "checkpoint-1", tmp_path / "adapter")
    edit_json(
        folder / STAGE_FILE,
        base=os.path.abspath(unbroken("epo") / json.loads((unbroken("epo") / STAGE_FILE).read_text())["base"]),
    )
    load_model(str(folder))
    edit_parts(folder, change, ADAPTER_FILE)
    for load in (load_model, EmpathicForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_in_either_precision(dtype, unbroken, tmp_path, kill_at):
    folder, output = str(unbroken("epo")), tmp_path / "whole"
    apart = load_model(folder, dtype=dtype).eval()
    for number in (0, 3, 9):  # interrupted
        kill_at(tmp_path, number)
        with pytest.raises(Killed):
            merge(folder, str(output), dtype=dtype)
        kill_at(None, 0)
        assert not output.exists()
    merge(folder, str(output), dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    whole, info = EmpathicForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {p.dtype for p in whole.parameters()} == {getattr(torch, dtype)}
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits.float() for model in (apart, whole.eval())]
    assert torch.allclose(*logits, atol=1e-4 if dtype == "float32" else 0.1)
    with pytest.raises(FileExistsError, match="already exists"):
        merge(folder, str(output))
