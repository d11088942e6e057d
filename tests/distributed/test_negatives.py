"""Several rejected replies and the preference over the clip under every strategy, in two processes, beside one."""

import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset

from empathic.data_prep.views import DialogueSamples
from empathic.trainers import train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QFORMER = ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32", "--qformer_dropout", "0"]
NAMES = ("loss", "grad_norm", "rewards/margins", "rewards/rejected", "rewards/clip_margins")


@pytest.fixture(scope="module")
def pairs(recordings, tmp_path_factory):
    """Nine rows with 0 to 2 further rejected replies, some of which are too long, and some without a clip."""
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation"):
        rows = []
        for number, sample in enumerate(DialogueSamples(load_dataset(recordings.data, split=split))):
            replies = ["the old dog", "hello", "what did he say " * (20 if number == 5 else 1)][: number % 3 + 1]
            replies = [[{"role": "assistant", "content": reply}] for reply in replies]
            row = {"prompt": sample["prompt"], "emotion": sample["emotion"], "corpus": sample["corpus"]}
            row |= {"chosen": [{"role": "assistant", "content": sample["reply"]}], "rejected": replies[0]}
            rows.append({**row, "negatives": replies[1:]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def arguments(stage, data, base, output, batch, *more):
    found = ["--stage", stage, "--dataset_name", data, "--output_dir", str(output), "--report_to", "none"]
    found += ["--per_device_train_batch_size", str(batch), "--per_device_eval_batch_size", str(batch)]
    found += ["--learning_rate", "1e-2", "--disable_tqdm", "True", "--logging_steps", "1", "--log_samples", "0"]
    found += ["--frame_draws", "0", "--use_cpu", "True"]
    return [*found, *base, *map(str, more)]


def epo(pairs, root, output, batch, *more):
    base = ["--model_name_or_path", str(root / "base"), "--lora_r", "4", "--num_train_epochs", "2"]
    base += ["--negatives", "all", "--negatives_loss", "listwise", "--clip_negatives", "--max_length", "190"]
    return arguments("epo", pairs, base, output, batch, "--eval_strategy", "epoch", *more)


@pytest.fixture(scope="module")
def alone(recordings, pairs, parts, tmp_path_factory):
    """A base, and the run on it in this process."""
    root = tmp_path_factory.mktemp("alone")
    names = [option for name, path in parts.items() for option in (f"--{name}", path)]
    sizes = ["--num_query_tokens", "4", "--num_frames", "2", *QFORMER, "--max_steps", "1"]
    train.main(arguments("emotion", recordings.data, [*names, *sizes], root / "base", 2, "--eval_strategy", "no"))
    train.main(epo(pairs, root, root / "epo", 4))
    return root


def log(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    found = [entry[name] for entry in history for name in NAMES if "loss" in entry and name in entry]
    evaluated = [entry[f"eval_{name}"] for entry in history for name in NAMES if f"eval_{name}" in entry]
    return torch.tensor(found + evaluated), history[-1]


@pytest.mark.parametrize("strategy", ["cpu", "zero2", "zero3", "fsdp2"])
def test_losses_are_those_of_one_process(alone, pairs, start, tmp_path, strategy):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="make test-distributed installs it")
    patch = str(Path(__file__).with_name("stays_packed.py"))
    plain, frozen = epo(pairs, alone, tmp_path / "plain", 2), epo(pairs, alone, tmp_path / "frozen", 2)
    cached = {"arguments": [*frozen, "--cache_frozen_gib", "1"], "patch": patch}
    start(strategy, [{"arguments": plain, "patch": None}, cached])
    expected, last = log(alone / "epo")
    assert len(expected) > 30
    for name in ("plain", "frozen"):
        found, summary = log(tmp_path / name)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-3)
        assert summary.get("left_out_negatives") == last.get("left_out_negatives")
