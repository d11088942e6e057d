"""The quickstart's own parts; the whole of it is a slow test."""

import json
import operator
import os
import subprocess
import sys
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
    assert "beside it: b" in capsys.readouterr().out and (tmp_path / "logs" / "b.log").exists()
    with pytest.raises(TypeError):
        steps.together(("d", operator.add, 1, 2), ("e", operator.add, 1, "x"))
    assert "d" in q.Steps(tmp_path).done and "e" not in q.Steps(tmp_path).done


def test_every_preset_has_a_recipe_a_stage():
    presets = {path.parent.name for path in RECIPES}
    assert presets == {"tiny", "qwen2.5-0.5b", "qwen2.5-7b"}
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_shows_the_paper_work(tmp_path):
    """Everything from nothing, interrupted once, with the scores that the preset is built to show."""
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
    assert dialogue["epo"]["emotion_score"] >= dialogue["control"]["emotion_score"] - 0.02
    files = {path.name for path in Path(tmp_path / "run" / "model").iterdir()}
    assert {"model.safetensors", "config.json", "modeling_empathic.py", "processor_config.json"} <= files
