"""A 4-bit language model under the adapter, and clear errors if bitsandbytes is missing or does not run."""

import importlib.util

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from trl import ModelConfig

from empathic.composition_empathic import read_stage
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.trainers import quantization
from empathic.trainers.checkpoints.stage_folder import load_model

FOUR_BIT = ModelConfig(load_in_4bit=True, dtype="float32")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def test_nothing_is_quantised_unless_asked_for():
    assert quantization.quantization_config(ModelConfig()) is None


def test_a_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
        quantization.quantization_config(FOUR_BIT)


def test_what_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="load_in_8bit is not supported"):
        quantization.quantization_config(ModelConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match=r"needs --dtype .* got 'auto'"):
        quantization.quantization_config(ModelConfig(load_in_4bit=True, dtype="auto"))


def test_strategies_that_divide_the_weights_are_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    quantization.check_not_sharded(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"does not work with FSDP.*zero2\.yaml"):
        quantization.check_not_sharded(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setattr(quantization, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="does not work with ZeRO-3"):
        quantization.check_not_sharded(args)


@needs_bitsandbytes
def test_a_bitsandbytes_that_does_not_run_is_named(model, monkeypatch):
    import bitsandbytes

    def fail(*args, **kwargs):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", fail)
    with pytest.raises(RuntimeError, match=r"cannot run 4-bit layers on cpu .*no kernel"):
        quantization.quantize_language_model(model, quantization.quantization_config(FOUR_BIT), "cpu")


@needs_bitsandbytes
def test_only_the_language_models_linear_layers_are_quantised(model):
    before = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.detach().clone()
    quantization.quantize_language_model(model, quantization.quantization_config(FOUR_BIT), "cpu")
    after = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert before - after == {name for name in before if name.startswith("model.language_model.")} != set()
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == weight.numel() // 2
    given = torch.randn(3, weight.shape[1])
    wanted = given @ weight.T
    assert (layer(given) - wanted).norm() < 0.2 * wanted.norm()


@needs_bitsandbytes
def test_stage_dialogue_trains_an_adapter_on_a_4_bit_base(base_folder, tmp_path, write_media, grey_frames, tone):
    from empathic.data_prep.corpora.folder import prepare_folder
    from empathic.trainers import train

    raw = tmp_path / "raw"
    raw.mkdir()
    write_media(raw / "a.mp4", frames=grey_frames(6), samples=tone(0.6))
    lines = [
        '{"dialogue_id": "d", "turn": 0, "speaker": "clara", "text": "hello there", "file_name": "a.mp4"}',
        '{"dialogue_id": "d", "turn": 1, "speaker": "bot", "text": "how are you"}',
        '{"dialogue_id": "d", "turn": 2, "speaker": "clara", "text": "i am fine thanks", "file_name": "a.mp4"}',
        '{"dialogue_id": "d", "turn": 3, "speaker": "bot", "text": "what did he say"}',
    ]
    (raw / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare_folder(raw, tmp_path / "data", progress=False)
    out = tmp_path / "dialogue"
    options = ["--stage", "dialogue", "--model_name_or_path", base_folder, "--dataset_name", str(tmp_path / "data")]
    options += ["--output_dir", str(out), "--max_steps", "2", "--learning_rate", "1e-2", "--load_in_4bit", "True"]
    options += ["--lora_r", "4", "--per_device_train_batch_size", "2", "--report_to", "none", "--eval_strategy", "no"]
    train.main([*options, "--save_strategy", "no", "--disable_tqdm", "True", "--use_cpu", "True"])

    assert read_stage(str(out))["stage"] == "dialogue"
    # The folder is an ordinary adapter on the base in full precision, which loads with and without 4 bit.
    plain = EmpathicForConditionalGeneration.from_pretrained(str(out))
    assert not hasattr(plain.config, "quantization_config")
    assert plain.model.language_model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.float32
    config = quantization.quantization_config(FOUR_BIT)
    quantised = quantization.load_quantized_model(str(out), config, trainable=True, device="cpu", dtype="float32")
    assert isinstance(quantised, PeftModel)
    trained = {name: p for name, p in quantised.named_parameters() if p.requires_grad}
    saved = dict(load_model(str(out)).named_parameters())
    assert trained and all(torch.equal(tensor, saved[name]) for name, tensor in trained.items())
    assert any(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
    layer = quantised.get_base_model().model.language_model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8
