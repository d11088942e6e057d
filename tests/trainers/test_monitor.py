"""Monitoring of a run: rates, the time estimate, replies at evaluations, reporters, and the dry run."""

import itertools
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from transformers.integrations import WandbCallback

from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.views import DialogueSamples
from empathic.evaluation.generation import generate_texts
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import monitor, train
from empathic.trainers.checkpoints.stage_folder import load_model
from empathic.trainers.dry_run import PARTS, count_parameters
from empathic.trainers.monitor import Monitor, StepMeter, add_samples, duration, evaluation_mode
from empathic.trainers.preference_collator import PairRows, PreferenceCollator
from empathic.trainers.samples import SampleStream, StageCollator


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_media, grey_frames, tone):
    """Two dialogues in each split; every other turn has a clip, and another speaker answers."""
    raw = tmp_path_factory.mktemp("recordings")
    lines = []
    for name, emotion in itertools.product(("train", "validation"), ("happy", "sad")):
        clip = f"{name}_{emotion}.mp4"
        write_media(raw / clip, frames=grey_frames(6), samples=tone(0.6))
        for turn, text in enumerate(("hello there", "how are you", "i am fine thanks", "what did he say")):
            line = {"dialogue_id": clip, "turn": turn, "speaker": ("clara", "bot")[turn % 2], "text": text}
            lines.append(line | {"split": name})
            if turn % 2 == 0:
                lines[-1] |= {"emotion": emotion, "file_name": clip}
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path_factory.mktemp("data")
    prepare_folder(raw, out, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, data):
    """Preference rows of both splits."""
    out = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation"):
        rows = [
            {
                "prompt": sample["prompt"],
                "chosen": [{"role": "assistant", "content": sample["reply"]}],
                "rejected": [{"role": "assistant", "content": "the old dog"}],
            }
            for sample in DialogueSamples(load_dataset(data, split=split))
        ]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(out)


def options(stage, data, base_folder, output, *more):
    common = ["--stage", stage, "--dataset_name", data, "--output_dir", str(output), "--max_steps", "2"]
    common += ["--model_name_or_path", base_folder, "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
    common += ["--save_strategy", "no", "--disable_tqdm", "True", "--seed", "3", "--logging_steps", "1"]
    lora = ["--lora_r", "2", "--lora_alpha", "4"] if stage in ("dialogue", "epo") else []
    return [*common, *lora, "--use_cpu", "True", *more]


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


EVALUATE = ["--eval_strategy", "steps", "--eval_steps", "1", "--log_samples_tokens", "5"]


@pytest.fixture
def a_second_a_step(monkeypatch):
    """A clock that is read twice per step."""
    monkeypatch.setattr(monitor, "perf_counter", itertools.count().__next__)


def test_rates_of_a_supervised_stage(data, base_folder, processor, tmp_path, a_second_a_step):
    argv = options("dialogue", data, base_folder, tmp_path, "--gradient_accumulation_steps", "2", *EVALUATE)
    script, args, _ = train.parse(argv)
    train.main(argv)
    stream = SampleStream(train.stage_sources(script, args, train.load_splits([data], ["train"])), 8, args.seed)
    collator = StageCollator(processor)
    logs = [log for log in history(tmp_path) if "loss" in log]
    assert len(logs) == 2
    for step, log in enumerate(logs):
        batches = [collator([stream[4 * step + i] for i in range(start, start + 2)]) for start in (0, 2)]
        # The language model also reads one position per audio query, video query and memory vector.
        assert log["tokens_per_second"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert log["samples_per_second"] == 4 and log["memory_gib"] > 0


def test_rates_of_pairs_over_two_steps(pairs, base_folder, processor, tmp_path, a_second_a_step):
    rows = load_dataset(pairs, split="train")
    collator = PreferenceCollator(processor)
    lengths = [int(collator([rows[i]])["attention_mask"].sum()) for i in range(len(rows))]
    # Two of six rows are longer than this, one in each epoch of three batches.
    longest = sorted(max(collator([rows[i]])["attention_mask"].sum(1).tolist()) for i in range(len(rows)))[3]
    kept = [
        length for i, length in enumerate(lengths) if int(collator([rows[i]])["attention_mask"].sum(1).max()) <= longest
    ]
    more = ["--max_steps", "3", "--logging_steps", "3", "--max_length", str(longest)]
    train.main(options("epo", pairs, base_folder, tmp_path, *more))
    log = next(log for log in history(tmp_path) if "loss" in log)
    assert len(rows) == 6 and len(kept) < 6
    assert log["tokens_per_second"] == pytest.approx(sum(kept) / 3)
    assert log["samples_per_second"] == pytest.approx(len(kept) / 3)


def test_the_estimate_comes_once_and_without_the_first_step(monkeypatch, capsys):
    times = iter([0, 100, 200, 212, 300, 310, 400, 414, 500, 999, 1000, 1999])
    monkeypatch.setattr(monitor, "perf_counter", lambda: next(times))
    meter = StepMeter()
    state = SimpleNamespace(max_steps=1004, global_step=0, is_world_process_zero=True)
    printed = []
    for step in range(1, 7):
        meter.begin_step()
        state.global_step = step
        meter.on_step_end(None, state, None)
        printed.append(capsys.readouterr().out)
    estimate = "about 3 h 20 min for the 1,000 remaining steps, without evaluation and saving\n"
    assert printed == ["", "", "", estimate, "", ""]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(44.7, "45 s"), (90, "2 min"), (3599, "1 h 0 min"), (12000, "3 h 20 min"), (183600, "2 d 3 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_an_evaluated_run_has_the_same_losses(data, base_folder, tmp_path):
    """Stage emotion has dropout; evaluation and replies come between its steps."""
    losses = {}
    for name, more in (("without", ["--eval_strategy", "no"]), ("with", EVALUATE)):
        argv = options("emotion", data, base_folder, tmp_path / name, "--max_steps", "3", "--report_to", "none", *more)
        train.main(argv)
        losses[name] = [log["loss"] for log in history(tmp_path / name) if "loss" in log]
    assert len(losses["with"]) == 3 and losses["with"] == losses["without"]
    lines = (tmp_path / "with" / "samples.jsonl").read_text().splitlines()
    # Two labeled clips per dialogue and two dialogues; the evaluation at the end is of the last step once more.
    assert [(line["step"], line["sample"]) for line in map(json.loads, lines)] == [
        (step, sample) for step in (1, 2, 3) for sample in (1, 2, 3, 4)
    ]
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_the_samples_of_a_step_replace_those_of_a_run_that_was_killed(tmp_path):
    path = tmp_path / "samples.jsonl"

    def add(step, reply):
        add_samples(path, [{"step": step, "sample": number, "reply": reply} for number in (1, 2)])

    for step in (10, 20, 30):
        add(step, "before")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 40, "sam')  # killed while writing
    add(20, "resumed")  # from the checkpoint of step 10
    add(30, "resumed\u2028")
    add_samples(path, [])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(line["step"], line["reply"]) for line in lines[::2]] == [
        (10, "before"),
        (20, "resumed"),
        (30, "resumed\u2028"),
    ]
    assert len(lines) == 6


def test_modes_are_restored_module_by_module(model):
    model.train()
    model.model.memory.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


@pytest.mark.parametrize("stage", ["dialogue", "epo"])
def test_the_replies_are_those_of_the_saved_model(stage, data, pairs, base_folder, tmp_path, capsys):
    rebuild = ["--rebuild_ratio", "0"] if stage == "dialogue" else []
    name = pairs if stage == "epo" else data
    argv = options(stage, name, base_folder, tmp_path, *EVALUATE, "--log_samples", "2", *rebuild)
    train.main(argv)
    last = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()][-2:]
    if stage == "epo":
        rows = load_dataset(pairs, split="validation")
        shown = [(rows[i]["prompt"], rows[i]["chosen"][0]["content"]) for i in (0, 3)]
        shown = [(json.loads(json.dumps(prompt)), target) for prompt, target in shown]
    else:
        script, args, _ = train.parse(argv)
        sources = train.stage_sources(script, args, train.load_splits([data], ["validation"]))
        stream = SampleStream(sources, 6, args.seed + 1, random_frames=False)
        shown = [(stream[i]["messages"], stream[i]["target"]) for i in (0, 3)]
    model, processor = load_model(str(tmp_path)), EmpathicProcessor.from_pretrained(tmp_path)
    replies = generate_texts(model, processor, [messages for messages, _ in shown], max_new_tokens=5)
    assert [sample["reply"] for sample in last] == replies and any(replies)
    assert [sample["target"] for sample in last] == [target for _, target in shown]
    printed = capsys.readouterr().out
    for sample, (messages, _) in zip(last, shown, strict=True):
        assert sample["step"] == 2
        content = {item["type"]: item for item in messages[-1]["content"]}
        assert content["text"]["text"] in sample["prompt"]
        assert (f"{processor.video_token} x4" in sample["prompt"]) == ("video" in content)
        for message in messages[:-1]:
            assert message["content"][0]["text"] in sample["history"]
        assert f"reply: {sample['reply']}" in printed


def test_unreadable_and_no_samples(data, base_folder, tmp_path):
    train.main(options("memory_multi", data, base_folder, tmp_path, *EVALUATE, "--log_samples", "0"))
    assert not (tmp_path / "samples.jsonl").exists()


def test_tensorboard_has_scalars_and_replies(data, base_folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = options("memory_multi", data, base_folder, tmp_path, "--report_to", "tensorboard", *EVALUATE)
    train.main(argv)
    found = {"scalars": {}, "texts": {}}
    for folder, _, files in os.walk(tmp_path / "runs"):
        if files:
            events = EventAccumulator(folder).Reload()
            for tag in events.Tags()["scalars"]:
                found["scalars"].setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
            for tag in events.Tags()["tensors"]:
                found["texts"].setdefault(tag, []).extend(
                    e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)
                )
    logs = [log for log in history(tmp_path) if "loss" in log]
    for key in ("loss", "tokens_per_second", "samples_per_second", "memory_gib"):
        assert found["scalars"][f"train/{key}"] == [(log["step"], pytest.approx(log[key], rel=1e-5)) for log in logs]
    assert "eval/loss" in found["scalars"]
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert any(first["target"] in text for text in found["texts"]["samples/1/text_summary"])


def test_trackio_has_scalars_and_replies(data, base_folder, tmp_path):
    pytest.importorskip("trackio")
    argv = options("memory_multi", data, base_folder, tmp_path, "--report_to", "trackio", *EVALUATE)
    # In a separate process: trackio reads its folder when it is first imported.
    subprocess.run(
        [sys.executable, "-m", "empathic.trainers.train", *argv, "--run_name", "one", "--project", "monitor"],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    with sqlite3.connect(tmp_path / "trackio" / "monitor.db") as file:
        rows = [json.loads(row) for (row,) in file.execute("SELECT metrics FROM metrics ORDER BY id")]
    wanted = [log["tokens_per_second"] for log in history(tmp_path) if "loss" in log]
    assert [row["train/tokens_per_second"] for row in rows if "train/loss" in row] == pytest.approx(wanted)
    tables = [row["samples"]["_value"] for row in rows if "samples" in row]
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert tables and [sample for table in tables for sample in table] == shown


def test_wandb_has_replies(data, base_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    train.main(options("memory_multi", data, base_folder, tmp_path, "--report_to", "wandb", *EVALUATE))
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json"))
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    logged = []
    for table in map(json.loads, (path.read_text() for path in tables)):
        logged += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert shown and sorted(logged, key=str) == sorted(shown, key=str)


def test_wandb_gets_a_table(monkeypatch):
    logged = []
    wandb = ModuleType("wandb")
    wandb.Table, wandb.log = (lambda columns, data: (columns, data)), logged.append
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trainer = SimpleNamespace()
    trainer.callback_handler = SimpleNamespace(callbacks=[WandbCallback.__new__(WandbCallback)])
    trainer.state = SimpleNamespace(global_step=7)
    sample = {"step": 7, "sample": 1, "prompt": "p", "history": "", "target": "t", "reply": "r"}
    monitor = Monitor.__new__(Monitor)
    monitor.trainer = trainer
    monitor._report([sample])
    assert logged == [{"samples": (list(sample), [list(sample.values())]), "train/global_step": 7}]


@pytest.mark.parametrize("stage", ["memory_single", "epo"])
def test_a_dry_run_leaves_nothing_behind(stage, data, pairs, base_folder, tmp_path, capsys, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    output = tmp_path / "out"
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(step(self, *args)))
    name = pairs if stage == "epo" else data
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--report_to", "tensorboard", "--push_to_hub", "True"]
    argv = options(stage, name, base_folder, output, "--max_steps", "5000", *EVALUATE, *saving, "--dry_run", "True")
    result = train.main([*argv, "--resume_from_checkpoint", "auto"])
    assert len(steps) == 2 and result["steps"] == 5000
    assert os.listdir(tmp_path) == ["scratch"] and not os.listdir(scratch)
    printed = capsys.readouterr().out
    model = load_model(base_folder)
    whole = sum(parameter.numel() for parameter in model.parameters())
    memory = sum(parameter.numel() for parameter in model.model.memory.parameters())
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    if stage == "epo":
        assert rows["memory"][:1] != ["0"] and int(rows["adapter"][0].replace(",", "")) > 0
        assert rows["all"] == [rows["adapter"][0], f"{whole:,}"]
    else:
        assert f"memory     {memory:,}" in " ".join(printed.split("  ")) or f"{memory:,}" in printed
        assert rows["all"] == [f"{memory:,}", f"{whole - memory:,}"] and "adapter" not in rows
    assert "GiB (main memory of a process)" in printed and "for 5,000 steps, without evaluation" in printed


def test_every_parameter_has_its_part(model):
    table = count_parameters(model)
    body = model.model
    parts = {
        "vision": [body.vision_tower],
        "audio": [body.audio_tower],
        "Q-formers": [body.video_qformer, body.audio_qformer, body.video_projector, body.audio_projector],
        "memory": [body.memory],
        "LLM": [body.language_model],  # the head is tied
        "adapter": [],
    }
    sizes = {part: sum(p.numel() for module in modules for p in module.parameters()) for part, modules in parts.items()}
    sizes["Q-formers"] += body.video_query_tokens.numel() + body.audio_query_tokens.numel()
    assert {part: row["trained"] + row["frozen"] for part, row in table.items()} == sizes
    assert set(table) == set(PARTS) and table["LLM"]["dtypes"] == {"float32"}


def test_shown_prompts_of_rows_without_a_readable_clip(processor, pairs, tmp_path):
    rows = PairRows(load_dataset(pairs, split="validation"), "eval")
    prompt, target = PreferenceCollator(processor).prompt_and_target(rows[0])
    assert target == "how are you" and processor.prepare(rows.rows[0]["prompt"])["input_ids"] == prompt["input_ids"]
    row = {**rows[0], "prompt": [{"role": "user", "content": [{"type": "video", "path": str(tmp_path / "no.mp4")}]}]}
    assert PreferenceCollator(processor).prompt_and_target(row) is None
