"""The five stages under DDP, ZeRO-2, ZeRO-3 and FSDP2, in two processes each, beside the same in one."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load, load_file
from transformers import Trainer

from empathic.composition_empathic import ADAPTER_CONFIG, PARTS_FILE
from empathic.hub.models import push_model
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import train
from empathic.trainers.checkpoints.saving import ADAPTER_FILE
from empathic.trainers.checkpoints.stage_folder import load_model
from empathic.trainers.stages import STAGES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

STRATEGIES = ("cpu", "zero2", "zero3", "fsdp2")
# Steps, and the one that is resumed from. Epo's rows make epochs of three steps, of which the last is not full.
STEPS = {stage: (6, 4) if stage == "epo" else (4, 2) for stage in STAGES}
QFORMER = ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32"]
SIZES = [*QFORMER, "--num_query_tokens", "4", "--num_frames", "2"]


def arguments(stage, recordings, base, output, batch, *more):
    """The stage script's arguments. `base`: the folder of an earlier stage, or the parts as a dict."""
    data = recordings.pairs if stage == "epo" else recordings.data
    found = ["--stage", stage, "--dataset_name", data, "--output_dir", str(output), "--max_steps", str(STEPS[stage][0])]
    found += ["--per_device_train_batch_size", str(batch), "--per_device_eval_batch_size", str(batch)]
    found += ["--learning_rate", "1e-2", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1"]
    found += ["--lr_scheduler_type", "cosine", "--seed", "3", "--save_steps", str(STEPS[stage][1])]
    found += ["--eval_strategy", "steps", "--eval_steps", "3", "--log_samples", "0"]
    if isinstance(base, dict):
        found += [option for name, path in base.items() for option in (f"--{name}", path)]
        found += SIZES
    else:
        found += ["--model_name_or_path", str(base)]
    if stage == "dialogue":
        found += ["--lora_r", "4", "--lora_alpha", "8"]
    return [*found, *map(str, more)]


def log(folder, wanted=("loss", "grad_norm")):
    """Losses and norms of the gradients, step by step."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return torch.tensor([[entry[name] for name in wanted] for entry in history if "loss" in entry], dtype=torch.float64)


def trained(folder):
    file = folder / ADAPTER_FILE
    return load_file(file if file.exists() else folder / PARTS_FILE)


NO_DROPOUT = {"emotion": ["--qformer_dropout", "0"], "dialogue": ["--lora_dropout", "0"]}
SAMPLES = ["--log_samples", "1", "--log_samples_tokens", "3"]
# The other stages have none. Replies are generated too, for which the processes have to stay together.
DROPOUT = {
    "emotion": ["--qformer_dropout", "0.1", *SAMPLES, "--alignment_steps", "2", "--alignment_weight", "1"],
    "dialogue": ["--lora_dropout", "0.2", *SAMPLES],
}


# One step whose change of the weights is the gradient.
GRADIENT = ["--max_steps", "1", "--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0"]
GRADIENT += ["--lr_scheduler_type", "constant", "--eval_strategy", "no"]
SPLIT = str(Path(__file__).with_name("one_modality_a_rank.py"))
WITH_CLIPS = ("emotion", "dialogue", "epo")


def job(given, patch=None):
    return {"arguments": given, "patch": patch}


@pytest.fixture(scope="session")
def alone(recordings, parts, tmp_path_factory):
    """The folders of all five stages, trained in this one process on the joined batches, without dropout."""
    root, base = tmp_path_factory.mktemp("alone"), parts
    for stage in STAGES:
        train.main(arguments(stage, recordings, base, root / stage, 4, *NO_DROPOUT.get(stage, [])))
        base = root / stage
    return root


@pytest.fixture(scope="session", params=STRATEGIES)
def runs(request, alone, parts, recordings, start, tmp_path_factory):
    """
    One strategy's folders: `plain/STAGE` without dropout, `unbroken/STAGE` with it where the stage has any, and
    `resumed/STAGE`, which goes on from the latter's checkpoint in processes of its own.
    """
    strategy = request.param
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="make test-distributed installs it")
    root = tmp_path_factory.mktemp(strategy)
    first, second = [], []
    for before, stage in zip((None, *STAGES), STAGES, strict=False):
        base = parts if before is None else alone / before
        plain, dropout = NO_DROPOUT.get(stage, []), DROPOUT.get(stage, [])
        first.append(job(arguments(stage, recordings, base, root / "plain" / stage, 2, *plain)))
        if dropout:
            first.append(job(arguments(stage, recordings, base, root / "unbroken" / stage, 2, *dropout)))
        if stage in WITH_CLIPS:
            split = arguments(stage, recordings, base, root / "split" / stage, 2, *plain, *GRADIENT)
            first.append(job(split, SPLIT))
        resumed = arguments(stage, recordings, base, root / "resumed" / stage, 2, *dropout)
        second.append(job([*resumed, "--resume_from_checkpoint", "auto"]))
    start(strategy, first)
    for stage in STAGES:
        if stage not in DROPOUT:
            (root / "unbroken").mkdir(exist_ok=True)
            (root / "unbroken" / stage).symlink_to(root / "plain" / stage)
        checkpoint = f"checkpoint-{STEPS[stage][1]}"
        shutil.copytree(root / "unbroken" / stage / checkpoint, root / "resumed" / stage / checkpoint)
    start(strategy, second)
    return root


@pytest.fixture(scope="session")
def alone_split(alone, recordings, parts, tmp_path_factory):
    """What the three stages with clips make of the batch of which each process has other modalities, in this one."""
    root, start = tmp_path_factory.mktemp("alone_split"), Trainer.train

    def patched(self, *args, **kwargs):
        runpy.run_path(SPLIT)["prepare"](self)
        return start(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", patched)
        for stage in WITH_CLIPS:
            base = parts if stage == "emotion" else alone / STAGES[STAGES.index(stage) - 1]
            plain = NO_DROPOUT.get(stage, [])
            train.main(arguments(stage, recordings, base, root / stage, 4, *plain, *GRADIENT))
    return root


@pytest.mark.parametrize("stage", WITH_CLIPS)
def test_each_process_may_have_other_modalities(alone_split, runs, stage):
    assert torch.allclose(log(runs / "split" / stage), log(alone_split / stage), rtol=1e-4)
    ours, expected = trained(runs / "split" / stage), trained(alone_split / stage)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(ours[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_process(alone, runs, stage):
    ours, expected = log(runs / "plain" / stage), log(alone / stage)
    assert ours.shape == expected.shape == (STEPS[stage][0], 2)
    assert torch.allclose(ours, expected, rtol=2e-3), (ours, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_the_folder_is_the_model_of_one_process(alone, runs, stage, clip):
    ours, expected = trained(runs / "plain" / stage), trained(alone / stage)
    assert ours.keys() == expected.keys()
    whole, info = EmpathicForConditionalGeneration.from_pretrained(runs / "plain" / stage, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    reference = EmpathicForConditionalGeneration.from_pretrained(alone / stage)
    processor = EmpathicProcessor.from_pretrained(runs / "plain" / stage)
    messages = [
        {"role": "user", "content": "hello there"},
        {"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "how are you"}]},
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        logits = [model.eval()(**inputs).logits for model in (whole, reference)]
    assert torch.allclose(*logits, atol=1e-2), (logits[0] - logits[1]).abs().max()


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_is_as_unbroken(runs, stage):
    unbroken, resumed = log(runs / "unbroken" / stage), log(runs / "resumed" / stage)
    assert torch.equal(unbroken, resumed) or torch.allclose(unbroken, resumed, rtol=1e-6), (unbroken, resumed)
    for name, tensor in trained(runs / "unbroken" / stage).items():
        assert torch.allclose(tensor, trained(runs / "resumed" / stage)[name], atol=1e-6), name


def test_stage_epo_is_pushed_by_two_processes(hub, base_folder, recordings, start, tmp_path):
    push_model(base_folder, "me/base")
    train.main([*arguments("dialogue", recordings, base_folder, tmp_path / "dialogue", 4), "--max_steps", "1"])
    options = ["--push_to_hub", "True", "--hub_model_id", "me/epo", "--hub_base", "me/base"]
    options += ["--hub_always_push", "True"]
    epo = arguments("epo", recordings, tmp_path / "dialogue", tmp_path / "epo", 2, *options)
    start("fsdp2", [job(epo)], environment={"HF_HUB_OFFLINE": "0"})

    there = hub.files("me/epo")
    assert hub.repositories["model", "me/epo"].private
    titles = [commit.title for commit in hub.repositories["model", "me/epo"].history("main")]
    assert len(titles) == len(set(titles)) and len(titles) >= 3, titles  # the first, a checkpoint, the end; no twins
    assert {ADAPTER_CONFIG, ADAPTER_FILE, "README.md"} <= set(there)
    ours = load_file(tmp_path / "epo" / ADAPTER_FILE)
    pushed = load(there[ADAPTER_FILE])
    assert pushed.keys() == ours.keys() and all(pushed[name].equal(tensor) for name, tensor in ours.items())
    assert "2 processes" in there["README.md"].decode()
    HfApi().snapshot_download("me/epo", local_dir=tmp_path / "elsewhere")
    assert isinstance(load_model(str(tmp_path / "elsewhere")), PeftModel)
