"""Tests of the quickstart's functions, and a slow test of the whole quickstart."""

import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from empathic import quickstart as q
from empathic.trainers import train

RECIPES = sorted(p for p in q.RECIPES.parent.glob("*/*.yaml") if p.parent.name != "baselines")
ABLATION = {"dialogue_ft", "dialogue_mc", "dialogue_mc_av"}  # of stage `dialogue`


def add(x, y):
    print("adding")
    return {"sum": x + y, "process": os.getpid()}


def fail():
    raise ZeroDivisionError


def test_a_step_runs_once(tmp_path):
    first = q.Steps(tmp_path).run("one", add, 1, 2)
    assert first["sum"] == 3 and first["process"] == os.getpid()
    assert q.Steps(tmp_path).run("one", fail) == first
    with pytest.raises(ZeroDivisionError):
        q.Steps(tmp_path).run("two", fail)
    assert set(q.Steps(tmp_path).done) == {"one"}


def test_steps_beside_each_other(tmp_path, capsys):
    steps = q.Steps(tmp_path)
    results = steps.together(("a", operator.add, 1, 2), ("b", operator.add, 3, 4), ("c", operator.add, 5, 6))
    assert results == [3, 7, 11] and set(q.Steps(tmp_path).done) == {"a", "b", "c"}
    assert "in parallel: b" in capsys.readouterr().out and (tmp_path / "logs" / "b.log").exists()
    with pytest.raises(TypeError):
        steps.together(("d", operator.add, 1, 2), ("e", operator.add, 1, "x"))
    assert "d" in q.Steps(tmp_path).done and "e" not in q.Steps(tmp_path).done


def test_every_preset_has_a_recipe_a_stage():
    presets = {path.parent.name for path in RECIPES}
    assert presets == {"tiny", "smollm2-135m", "qwen2.5-0.5b", "qwen2.5-7b"}
    for preset in presets:
        assert {p.stem for p in RECIPES if p.parent.name == preset} == {*train.STAGES, *ABLATION}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_are_read(path, tmp_path):
    script, args, model_args = train.parse(["--config", str(path), "--bf16", "False", "--output_dir", str(tmp_path)])
    assert script.stage == ("dialogue" if path.stem in ABLATION else path.stem)
    if path.parent.name == "qwen2.5-7b" and script.stage == "dialogue":
        assert (model_args.lora_r, model_args.lora_alpha) == (128, 256)  # Sec. 4.2
    if path.parent.name == "qwen2.5-7b" and script.stage == "epo":
        assert (args.beta, args.gamma, args.learning_rate, args.nll_weight) == (2.0, 0.5, 1e-6, 1.0)
    if path.parent.name == "qwen2.5-7b" and script.stage == "emotion":
        assert (script.text, script.vision) == ("Qwen/Qwen2.5-7B-Instruct", "openai/clip-vit-base-patch32")
        assert (script.audio, script.memory) == ("openai/whisper-tiny", "state-spaces/mamba-370m-hf")
        assert (script.num_query_tokens, script.num_frames) == (32, 8)
        assert (script.qformer_layers, script.qformer_heads, script.with_text) == (6, 8, False)


def test_words_that_only_the_history_tells():
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "i have a dog called rex."}]},
        {"role": "assistant", "content": "how lovely!"},
        {
            "role": "user",
            "content": [{"type": "video", "path": "x"}, {"type": "text", "text": "what is my dog called?"}],
        },
    ]
    assert q.recall_words({"prompt": prompt, "reply": "your dog is called rex."}) == {"rex"}


def test_table():
    lines = q.table(["model", "x"], [["a", 0.5], ["long name", 1]]).splitlines()
    assert lines[0] == "model          x" and lines[2] == "a          0.500" and lines[3] == "long name      1"


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_processes_train_as_one(base_folder, recordings, tmp_path, monkeypatch):
    """Each has half of a batch, so the losses are those of one process with the whole batch."""
    for name in q.MEMORY_DATA:
        (tmp_path / name).symlink_to(recordings.data)
    (tmp_path / "base").symlink_to(base_folder)
    more = ["--max_steps", "3", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--warmup_steps", "0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    losses = {}
    for train_it in (q.train_stage, q.train_stage_together):
        output = train_it.__name__
        metrics = train_it(tmp_path, "memory_single", output, "base", *more, "--use_cpu", "True")
        history = json.loads((tmp_path / output / "trainer_state.json").read_text())["log_history"]
        losses[output] = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses[output]) == 3 and metrics["train_loss"] > 0
    assert losses["train_stage_together"] == pytest.approx(losses["train_stage"], rel=1e-3)
    record = json.loads((tmp_path / "train_stage_together" / "empathic_runs.json").read_text())["runs"][-1]
    assert (record["processes"], record["samples_per_step"]) == (2, 4)


def test_steps_of_other_code_are_not_mixed_with_new_ones(tmp_path, monkeypatch):
    q.check_code(tmp_path)
    (tmp_path / "steps.json").write_text("{}")
    q.check_code(tmp_path)  # the same code goes on
    recipes = tmp_path / "recipes"
    shutil.copytree(q.RECIPES, recipes)
    monkeypatch.setattr(q, "RECIPES", recipes)
    q.check_code(tmp_path)
    (recipes / "epo.yaml").write_text("max_steps: 7\n")
    with pytest.raises(ValueError, match=r"other code or recipes.*Choose another --output"):
        q.check_code(tmp_path)
    (tmp_path / "code.json").unlink()  # as left by versions without this check
    with pytest.raises(ValueError, match="other code or recipes"):
        q.check_code(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_shows_the_paper_work(tmp_path):
    """A full run, interrupted once, reaches the scores that the preset is built to show."""
    command = [sys.executable, "-m", "empathic.cli", "quickstart", "--output", str(tmp_path / "run")]
    steps = tmp_path / "run" / "steps.json"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (steps.exists() and "corpus" in json.loads(steps.read_text())):
        try:
            first.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    first.kill()
    first.wait()
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "corpus: done before" in run.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    emotion = results["emotion"]
    assert emotion["AVT"] >= 0.85
    assert emotion["AVT"] > max(emotion["AT"], emotion["VT"])
    assert min(emotion["AT"], emotion["VT"]) > emotion["T"]
    assert results["reconstruction"]["1"]["bleu1"] >= 0.90
    assert results["reconstruction"]["5"]["bleu1"] >= 0.80
    dialogue = results["dialogue"]
    assert dialogue["memory"]["recall"] > dialogue["text"]["recall"] + 0.2
    assert dialogue["epo"]["margin"] > dialogue["control"]["margin"] + 0.1
    score, recall = results["seeds"]["emotion_score_sampled"], results["seeds"]["recall"]
    assert score["difference"]["value"] >= 0.03 and score["p_value"] < 0.05
    assert recall["difference"]["high"] >= 0
    assert 0.45 <= emotion["T"] <= 0.6
    contrast = results["contrast"]
    text, seen = contrast["arms"]["text"], contrast["arms"]["memory_av"]
    assert [text[name]["mean"] for name in q.CONTRAST_METRICS] == [0, 0, 0.5, 0]
    assert seen["matched"]["low"] > 0.8 and seen["movement"]["low"] > 0.5 and seen["likelihood"]["low"] > 1
    assert contrast["epo_control"]["likelihood"]["low"] > 0
    files = {path.name for path in Path(tmp_path / "run" / "model").iterdir()}
    assert {"model.safetensors", "config.json", "modeling_empathic.py", "processor_config.json"} <= files


TOGETHER = """
import sys, time
from pathlib import Path
from empathic.errors import run_program
from empathic.quickstart import Steps

if __name__ == "__main__":
    steps = Steps(Path(sys.argv[1]))
    sys.exit(run_program("quickstart", lambda: steps.together(("a", time.sleep, 90), ("b", time.sleep, 91))))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_second_process_ends_with_the_first(signum, tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    process = subprocess.Popen([sys.executable, str(tmp_path / "together.py"), str(tmp_path)], stderr=subprocess.PIPE)
    try:
        log = tmp_path / "logs" / "b.log"
        while process.poll() is None and not log.exists():  # the second process works
            time.sleep(0.1)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signum)
        assert process.wait(timeout=20) == (143 if signum == signal.SIGTERM else -9)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(children) >= 1 and not any(Path(f"/proc/{pid}").exists() for pid in children)
    finally:
        process.kill()
