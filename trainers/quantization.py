"""
A 4-bit language model under LoRA (QLoRA, Dettmers et al. 2023): `--load_in_4bit`.

Only the linear layers of the language model are quantised, after the model was put together in the usual way. The
towers, Q-formers, projectors, the memory, the token table and the head keep their precision, and so do the folders that
a stage leaves: they hold the adapter alone and name the base as it is, in full precision.
"""

import os

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_quantization_config

from empathic.composition_empathic import ADAPTER_CONFIG, find_file, read_stage, resolve_base
from empathic.trainers.checkpoint import load_model

PROBE_WIDTH = 64  # of the layer that tells whether bitsandbytes runs at all; one of its blocks


def quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """
    What `--load_in_4bit` and its companions ask for; None where they do not.

    Raises:
        ValueError: for 8 bit, or a dtype in which 4-bit layers cannot compute.
        ImportError: if bitsandbytes is missing or too old.
    """
    if model_args.load_in_8bit:
        raise ValueError("load_in_8bit is not supported: the adapter trains on a 4-bit base, --load_in_4bit, or none.")
    if not model_args.load_in_4bit:
        return None
    if model_args.dtype in (None, "auto"):
        raise ValueError(f"load_in_4bit computes in --dtype: name it (bfloat16, say), got {model_args.dtype!r}.")
    if not is_bitsandbytes_available():
        raise ImportError(
            "load_in_4bit needs bitsandbytes, which is not installed here, or too old: pip install -U bitsandbytes. "
            "Without it leave load_in_4bit out."
        )
    return get_quantization_config(model_args)


def check_not_sharded(args: TrainingArguments) -> None:
    """Raises a ValueError under ZeRO-3 and FSDP, which would cut a layer's blocks of 4-bit numbers into pieces."""
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"load_in_4bit does not go with {'FSDP' if fsdp else 'ZeRO-3'}, which divides the frozen weights over the "
            "processes. Start with accelerate_configs/multi_gpu.yaml or zero2.yaml, or leave load_in_4bit out."
        )


def _quantised_linear(layer: nn.Linear, config: BitsAndBytesConfig, device: torch.device) -> nn.Module:
    """The layer in 4 bit, on `device`."""
    import bitsandbytes as bnb

    storage = {
        "compress_statistics": config.bnb_4bit_use_double_quant,
        "quant_type": config.bnb_4bit_quant_type,
        "quant_storage": config.bnb_4bit_quant_storage,
    }
    quantised = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=config.bnb_4bit_compute_dtype,
        device="meta",
        **storage,
    )
    quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=quantised, **storage)
    quantised.bias = layer.bias
    return quantised.to(device)  # the move is what quantises


def _probe(config: BitsAndBytesConfig, device: torch.device) -> None:
    """Raises a RuntimeError if a 4-bit layer cannot be made, run and differentiated on the device."""
    dtype = config.bnb_4bit_compute_dtype
    try:
        layer = _quantised_linear(nn.Linear(PROBE_WIDTH, PROBE_WIDTH, dtype=dtype), config, device)
        inputs = torch.ones(1, PROBE_WIDTH, dtype=dtype, device=device, requires_grad=True)
        layer(inputs).sum().backward()
    except Exception as error:  # a missing kernel shows as many kinds of error
        raise RuntimeError(
            f"bitsandbytes is installed but cannot run 4-bit layers on {device} in {dtype} "
            f"({type(error).__name__}: {error}). Leave load_in_4bit out, or see its notes on supported devices."
        ) from error


def quantize_language_model(model, config: BitsAndBytesConfig, device: torch.device | None = None):
    """
    Makes the language model's linear layers 4-bit ones, in place, and moves the whole model to the device.

    Args:
        model: an `EmpathicForConditionalGeneration` without an adapter.
        config: of `quantization_config`.
        device: where the model will train; this process's device if None.

    Raises:
        RuntimeError: if bitsandbytes does not run on the device.
    """
    device = PartialState().device if device is None else torch.device(device)
    _probe(config, device)
    body = model.base_model.language_model
    for name, layer in list(body.named_modules()):
        if type(layer) is nn.Linear:
            body.set_submodule(name, _quantised_linear(layer, config, device))
    # What PEFT and the Trainer look at. `hf_quantizer` stays unset: the config that a stage saves must not say 4 bit,
    # and stages without an adapter may train their parts through the quantised layers.
    model.is_loaded_in_4bit = True
    return model.to(device)


def load_quantized_model(path: str, config: BitsAndBytesConfig, trainable: bool = False, device=None, **kwargs):
    """
    As `checkpoint.load_model`, with a 4-bit language model under the adapter, where there is one.

    Args:
        path: folder or Hub id of a whole model or a stage.
        config, device: of `quantize_language_model`.
        trainable: whether the adapter goes on training.
        kwargs: of `from_pretrained`, such as `dtype`.
    """
    if find_file(path, ADAPTER_CONFIG) is None:
        return quantize_language_model(load_model(path, **kwargs), config, device)
    base = resolve_base(path, read_stage(path)["base"])
    model = load_quantized_model(base, config, device=device, **kwargs)
    return PeftModel.from_pretrained(model, path, is_trainable=trainable)
