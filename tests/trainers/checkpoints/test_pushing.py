"""Stages that push themselves: real training against a server on this machine that implements the Hub's protocol."""

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, ModelCard

from empathic.cli import main
from empathic.composition_empathic import ADAPTER_CONFIG, PART_NAMES, PARTS_FILE, STAGE_FILE
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.hub import PushError
from empathic.hub.model_card import RUNS_FILE, is_ours
from empathic.hub.models import PROCESSOR_FILES, push_model
from empathic.trainers import train
from empathic.trainers.checkpoints import pushing

OPTIONS = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--report_to", "none"]
OPTIONS += ["--disable_tqdm", "True", "--seed", "3", "--push_to_hub", "True", "--eval_strategy", "no"]
COMMON = {*PROCESSOR_FILES, "config.json", "generation_config.json", STAGE_FILE, RUNS_FILE, "README.md"}
QFORMER = ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32"]
TINY_LORA = ["--lora_r", "2", "--lora_alpha", "4"]

# A process without this package and its training dependencies, except for PEFT.
ELSEWHERE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("empathic", "trl", "datasets", "evaluate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in ("empathic", "trl", "datasets", "evaluate") else find_spec(name, package)
)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_media, grey_frames, tone):
    """Two dialogues in each split: the first turn has a clip, and another speaker answers."""
    raw = tmp_path_factory.mktemp("recordings")
    write_media(raw / "clip.mp4", frames=grey_frames(4), samples=tone(0.4))
    lines = [
        {"dialogue_id": f"{split}{number}", "turn": turn, "speaker": ("clara", "bot")[turn], "text": text}
        | {"split": split, **({} if turn else {"emotion": "happy", "file_name": "clip.mp4"})}
        for split in ("train", "validation")
        for number in range(2)
        for turn, text in enumerate(("hello there", "how are you"))
    ]
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path_factory.mktemp("data")
    prepare_folder(raw, out, progress=False)
    return str(out)


def arguments(stage, data, output, *options):
    return ["--stage", stage, "--dataset_name", str(data), "--output_dir", str(output), *OPTIONS, *options]


def in_process(*command, cwd):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_snippets(hub, names, clip, folder):
    """Run the Python code of each card unchanged, next to a clip with the name that the code uses."""
    folder.mkdir()
    os.link(clip, folder / "clip.mp4")
    code = [ELSEWHERE]
    for name in names:
        code += re.findall(r"```python\n(.*?)```", hub.files(name)["README.md"].decode(), re.DOTALL)
        code.append("assert 1 <= len(output) <= 64")
    assert len(code) == 1 + 2 * len(names)
    in_process("-c", "\n".join(code), cwd=folder)


def commits(hub, name):
    return [commit.title for commit in hub.repositories["model", name].history("main")]


def test_stages_are_pushed_as_they_train_and_load_elsewhere(hub, parts, data, clip, tmp_path):
    for name in PART_NAMES:
        HfApi().create_repo(f"me/{name}", private=True)
        HfApi().upload_folder(repo_id=f"me/{name}", folder_path=parts[name])
    composed = [option for name in PART_NAMES for option in (f"--{name}", f"me/{name}")]
    options = [*composed, *QFORMER, "--num_query_tokens", "4", "--num_frames", "2", "--hub_model_id", "me/emotion"]
    options += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]
    options += ["--eval_strategy", "epoch", "--hub_strategy", "checkpoint", "--hub_always_push", "True"]
    in_process(
        "-m", "empathic.trainers.train", *arguments("emotion", data, tmp_path / "emotion", *options), cwd=tmp_path
    )

    # The files that `empathic push` pushes, and the last checkpoint.
    assert hub.repositories["model", "me/emotion"].private
    assert len(commits(hub, "me/emotion")) == 4  # the first, after each step, at the end
    there = hub.files("me/emotion")
    last = {name.removeprefix("last-checkpoint/") for name in there if name.startswith("last-checkpoint/")}
    (checkpoint,) = (tmp_path / "emotion").glob("checkpoint-*")
    here = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert checkpoint.name == "checkpoint-2" and {"optimizer.pt", "scheduler.pt", "trainer_state.json"} <= here
    assert last == here - {"training_args.bin", "README.md"}
    assert json.loads(there["last-checkpoint/trainer_state.json"])["global_step"] == 2
    code = {name for name in there if re.fullmatch(r"\w+_empathic\.py", name)}
    model = {name: content for name, content in there.items() if "last-checkpoint" not in name}
    assert set(model) == COMMON | code | {PARTS_FILE} and len(code) == 10
    push_model(tmp_path / "emotion", "me/again")
    again = hub.files("me/again")
    again["README.md"] = ModelCard(again["README.md"].decode().replace("me/again", "me/emotion")).text.encode()
    assert model | {"README.md": b""} == again | {"README.md": b""}
    for name, content in there.items():
        assert str(tmp_path).encode() not in content and parts["text"].encode() not in content, name

    card = there["README.md"].decode()
    facts = ModelCard(card).data
    assert is_ours(card) and set(facts.base_model) == {f"me/{name}" for name in PART_NAMES}
    metrics = {result.metric_name: result.metric_value for result in facts.eval_results}
    assert set(metrics) == {"train_loss, stage emotion", "eval_loss, stage emotion"} and facts.model_name == "emotion"
    assert json.loads(there[RUNS_FILE])["runs"][0]["steps"] == 2

    # A stage with an adapter, starting from the model on the Hub.
    options = ["--model_name_or_path", "me/emotion", *TINY_LORA, "--hub_model_id", "dialogue", "--hub_strategy", "end"]
    train.main(arguments("dialogue", data, tmp_path / "dialogue", *options))
    there = hub.files("me/dialogue")
    assert set(there) == COMMON | code | {ADAPTER_CONFIG, "adapter_model.safetensors"}
    assert json.loads(there[ADAPTER_CONFIG])["base_model_name_or_path"] == "me/emotion"
    facts = ModelCard(there["README.md"].decode()).data
    assert facts.base_model[0] == "me/emotion" and facts.base_model_relation == "adapter"
    assert [run["stage"] for run in json.loads(there[RUNS_FILE])["runs"]] == ["emotion", "dialogue"]

    run_snippets(hub, ["me/emotion", "me/dialogue"], clip, tmp_path / "elsewhere")


def dialogue(data, folder, base_folder, name, *options):
    options = ["--model_name_or_path", base_folder, "--hub_model_id", name, *TINY_LORA, *options]
    return train.main(arguments("dialogue", data, folder, "--save_strategy", "no", *options))


def test_what_could_not_be_pushed_is_not_trained(hub, base_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.SupervisedRun, "train", lambda *a, **k: pytest.fail("it was trained"), raising=False)
    with pytest.raises(ValueError, match=rf"starts from {re.escape(base_folder)}.*--hub_base ID.*empathic merge"):
        dialogue(data, tmp_path / "a", base_folder, "me/a")
    with pytest.raises(PushError, match="me/nothing"):
        dialogue(data, tmp_path / "a", base_folder, "me/a", "--hub_base", "me/nothing")
    assert not hub.repositories
    push_model(base_folder, "me/base")
    HfApi().create_repo("me/public", private=False)
    with pytest.raises(PushError, match="is public"):
        dialogue(data, tmp_path / "a", base_folder, "me/public", "--hub_base", "me/base")
    with pytest.raises(PushError, match="cannot write"):
        dialogue(data, tmp_path / "a", base_folder, "them/a", "--hub_base", "me/base")


def test_a_push_that_is_cut_off_is_repeated(hub, base_folder, data, tmp_path):
    """The last push breaks off at its commit; the stage is saved, and the command that the error names pushes it."""
    push_model(base_folder, "me/base")
    before = len(hub.requests)
    dialogue(data, tmp_path / "whole", base_folder, "me/whole", "--hub_base", "me/base")
    whole, count = hub.files("me/whole"), len(hub.requests) - before
    assert any(name.endswith("me/whole/commit/main") for name in hub.requests[-2:])
    hub.objects.clear()
    hub.fail_after(requests=count - 2)
    with pytest.raises(PushError, match=r"interrupted.*\n.*is trained") as error:
        dialogue(data, tmp_path / "cut", base_folder, "me/cut", "--hub_base", "me/base")
    assert set(hub.files("me/cut")) == set() and any("PUT" in request for request in hub.requests[-8:])
    hub.heal()
    command = str(error.value).partition("empathic push ")[2].split()
    assert command == [str(tmp_path / "cut"), "me/cut", "--base", "me/base"]
    assert main(["push", *command]) == 0
    there = hub.files("me/cut")
    assert set(there) == set(whole) and json.loads(there[STAGE_FILE])["base"] == "me/base"
    assert there["adapter_model.safetensors"] == whole["adapter_model.safetensors"]


def test_training_goes_on_where_a_checkpoint_cannot_be_pushed(hub, base_folder, data, tmp_path, monkeypatch):
    push_model(base_folder, "me/base")
    pushed = []

    def fails_first(folder, *args, **options):
        pushed.append((os.path.basename(folder), options["commit_message"], list(options["checkpoints"])))
        if len(pushed) == 1:
            raise PushError("cut off")
        return push_model(folder, *args, **options)

    monkeypatch.setattr(pushing, "push_model", fails_first)
    options = ["--hub_base", "me/base", "--hub_strategy", "all_checkpoints", "--hub_always_push", "True"]
    options += ["--save_strategy", "steps", "--save_steps", "1"]
    dialogue(data, tmp_path / "out", base_folder, "me/stage", *options)
    both = ["checkpoint-1", "checkpoint-2"]
    step = "Training in progress, step"
    assert pushed == [
        (both[0], f"{step} 1", both[:1]),
        (both[1], f"{step} 2", both[1:]),
        ("out", "End of training", both),
    ]
    optimizers = {f"{name}/optimizer.pt" for name in both}
    assert optimizers <= set(hub.files("me/stage")) and len(commits(hub, "me/stage")) == 3
