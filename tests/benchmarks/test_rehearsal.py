"""Tests of the full-size rehearsal: its plan against real tensors, and a whole run on a small model."""

import argparse
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from empathic.benchmarks import memory_plan, rehearsal
from empathic.benchmarks.flops import SCAN_OPERATIONS, model_flops, peak_tflops
from empathic.benchmarks.shapes import Shapes, build, make_batch, prepare, preset_config
from empathic.benchmarks.step_costs import CPU_ATTENTION
from empathic.trainers.compat import enable_activation_checkpointing

LORA = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
SHAPES = Shapes(batch_size=2, turns=3, sentence=5, reply=7, prompt=9, queries=4, frames=2)


def counts(preset, stage="dialogue"):
    recipe = rehearsal.read_recipe(preset, stage)
    return memory_plan.parameters_by_part(prepare(build(preset_config(preset), torch.bfloat16, "meta"), stage, recipe))


def test_the_presets_have_the_sizes_of_the_public_models():
    large, small = counts("qwen2.5-7b"), counts("qwen2.5-0.5b")
    frozen = {part: count["frozen"] for part, count in large.items()}
    assert frozen["language model"] + frozen["head"] == 7_615_616_512  # the Hub's count for Qwen2.5-7B-Instruct
    assert small["language model"]["frozen"] == 494_032_768 and "head" not in small  # Qwen2.5-0.5B ties its table
    assert frozen["vision"] == 87_456_000 and frozen["audio"] == 8_208_384
    assert frozen["memory"] == 371_516_416 + 1024 + (1024 + 1) * 3584 + 1  # Mamba-370M, <MEM>, the projector
    ranks = 28 * 128 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert large["adapter"] == {"trained": ranks, "frozen": 0}
    assert all(count["trained"] == 0 for part, count in large.items() if part != "adapter")


@pytest.mark.parametrize("stage", rehearsal.STAGES)
def test_weights_gradients_and_optimizer_are_those_of_real_tensors(stage):
    config = preset_config("tiny")
    planned = memory_plan.plan(prepare(build(config, torch.bfloat16, "meta"), stage, LORA), stage, SHAPES, False)
    model = prepare(build(config, torch.bfloat16, "cpu"), stage, LORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    assert planned.weights == sum(storages.values())
    assert planned.gradients == sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    states = [value for entry in optimizer.state.values() for value in entry.values()]
    assert planned.optimizer == sum(value.untyped_storage().nbytes() for value in states)


def trainer_of(model, stage, folder):
    """Build the rehearsal's trainer, which computes the losses."""
    options = argparse.Namespace(dtype="float32", activation_checkpointing={stage: False}, device="cpu", steps=1)
    return rehearsal.make_trainer(model, stage, {"learning_rate": "1e-4"}, options, SHAPES, str(folder))


@pytest.mark.parametrize("stage", rehearsal.STAGES)
def test_model_flops_are_those_that_torch_counts(stage, tmp_path):
    config = preset_config("tiny")
    model = prepare(build(config, torch.float32, "cpu"), stage, LORA).train()
    body = (model if stage == "memory_multi" else model.get_base_model()).model
    body.language_model.embed_tokens.register_forward_hook(lambda module, given, output: output.requires_grad_(True))
    trainer, batch = trainer_of(model, stage, tmp_path), make_batch(config, stage, SHAPES)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        trainer.compute_loss(model, batch).backward()
    flops = model_flops(model, stage, SHAPES)
    mamba, tokens = config.memory_config, SHAPES.rows(stage) * SHAPES.memory_length
    scan = (SCAN_OPERATIONS * mamba.state_size + 2 * mamba.conv_kernel) * mamba.intermediate_size * tokens
    unseen = scan * mamba.num_hidden_layers * (3 if stage == "memory_multi" else 1)
    # torch also counts the scan's small products and the rotary frequencies.
    assert counter.get_total_flops() == pytest.approx(sum(flops.values()) - unseen, rel=0.03)


@pytest.mark.parametrize("stage", rehearsal.STAGES)
def test_the_estimate_is_that_of_live_tensors_in_bf16_with_checkpoints(stage, tmp_path):
    config, shapes = preset_config("tiny"), Shapes(batch_size=4, turns=2, sentence=20, prompt=160, queries=4)
    model = prepare(build(config, torch.bfloat16, "cpu"), stage, LORA | {"lora_dropout": 0.05}).train()
    enable_activation_checkpointing(model)
    body = (model if stage == "memory_multi" else model.get_base_model()).model
    body.language_model.embed_tokens.register_forward_hook(lambda module, given, output: output.requires_grad_(True))
    batch = make_batch(config, stage, shapes)
    held = [*model.parameters(), *model.buffers(), *(value for value in batch.values() if torch.is_tensor(value))]
    trainer = trainer_of(model, stage, tmp_path)
    with memory_plan.LiveMemory(held) as live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainer.compute_loss(model, batch)
        loss.backward()
    planned = memory_plan.plan(model, stage, shapes, checkpointing=True, device="cpu")
    assert 1 / 1.3 < (planned.total - planned.optimizer) / live.peak < 1.3


def test_gradients_reach_no_frozen_part_under_activation_checkpointing():
    config = preset_config("tiny")
    model = prepare(build(config, torch.float32, "cpu"), "dialogue", LORA).train()
    model.enable_input_require_grads()
    body, reached = model.get_base_model().model, set()
    for name in ("vision_tower", "audio_tower", "video_qformer", "audio_qformer"):
        body.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: reached.add(name) if output[0].requires_grad else None
        )
    body.memory.register_forward_hook(lambda module, given, out: reached.add("memory") if out.requires_grad else None)
    model(**make_batch(config, "dialogue", SHAPES))
    assert not reached, "their activations would be kept for a backward pass that nothing needs"


def test_without_a_gpu_the_plan_is_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rehearsal.main(["--stages", "memory_multi", "epo", "--output", str(tmp_path / "plan.json")])
    out = capsys.readouterr().out
    assert "there is no GPU here" in out and "| `memory_multi` | as loaded |" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["measured"] == {} and list(written["plan"]) == ["memory_multi", "epo"]
    total = {stage: planned["estimated_gib"]["total"] for stage, planned in written["plan"].items()}
    assert all(16 < size < 60 for size in total.values())
    for planned in written["plan"].values():
        assert planned["estimated_gib_4bit"]["total"] < planned["estimated_gib"]["total"] - 5
        assert list(planned["largest_batch"]["recipe"].values()) == sorted(planned["largest_batch"]["recipe"].values())


def test_a_small_model_takes_the_whole_path(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "WARM_UP", 1)
    options = ["--preset", "tiny", "--device", "cpu", "--steps", "1", "--batch_size", "2", "--turns", "2"]
    options += ["--sentence", "6", "--reply", "6", "--peak_tflops", "1", "--output", str(tmp_path / "out.json")]
    results = rehearsal.main(options)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    for stage in rehearsal.STAGES:
        planned, measured = results["plan"][stage], results["measured"][stage]
        assert len(measured["step_seconds"]) == 2
        # log(1000) of untrained weights; epo adds -log sigmoid(-gamma) to about the same
        assert 5 < measured["training_loss"] < 10
        positions = rehearsal.shapes_of(stage, rehearsal.parse(options)).positions(stage)
        assert measured["tokens_per_second"] * measured["seconds_per_step"] == pytest.approx(positions)
        assert measured["mfu"] * measured["seconds_per_step"] == pytest.approx(measured["model_tflops_per_step"])
        assert 0.7 < measured["counted_tflops_per_step"] / measured["model_tflops_per_step"] < 1.1
        ratio = planned["estimated_gib"]["total"] / measured["peak_memory_gib"]
        assert 1 / 1.5 < ratio < 1.5, (stage, ratio)


def test_too_little_memory_is_a_result(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(rehearsal, "measure", fail)
    results = rehearsal.main(["--preset", "tiny", "--device", "cpu", "--stages", "epo"])
    assert results["measured"] == {"epo": {"out_of_memory": "CUDA out of memory. Tried to allocate 2 GiB."}}


def test_peaks_are_found_by_the_device_name():
    assert peak_tflops("NVIDIA H200") == 989.0 and peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA L40S") == 362.0 and peak_tflops("NVIDIA L4") == 121.0
    assert peak_tflops("NVIDIA A10G") == 70.0 and peak_tflops("Some other card") is None
