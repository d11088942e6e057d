"""
A 4-bit language model under LoRA (QLoRA, Dettmers et al. 2023): `--load_in_4bit`.

Only the linear layers of the language model are quantized, after the model was composed in the usual way. The encoders,
Q-formers, projectors, memory, token embeddings and head keep their precision. The folder of a stage has no quantized
weights: it has only the adapter and the name of the base, in full precision.
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

from ..composition_empathic import ADAPTER_CONFIG, find_file
from .checkpoints.stage_folder import base_of_adapter, load_model

PROBE_WIDTH = 64  # width of the layer that tests whether bitsandbytes runs; one quantization block


def quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """
    Build the quantization config from `--load_in_4bit` and related options; None without `--load_in_4bit`.

    Raises:
        ValueError: for `--load_in_8bit`, or if `--dtype` does not name the dtype in which 4-bit layers compute.
        ImportError: if bitsandbytes is missing or too old.
    """
    if model_args.load_in_8bit:
        raise ValueError("load_in_8bit is not supported: use --load_in_4bit, or train without quantization.")
    if not model_args.load_in_4bit:
        return None
    if model_args.dtype in (None, "auto"):
        raise ValueError(f"load_in_4bit needs --dtype for its computation, got {model_args.dtype!r}: use bfloat16.")
    if not is_bitsandbytes_available():
        raise ImportError(
            "load_in_4bit needs bitsandbytes, which is not installed or too old: pip install -U bitsandbytes. "
            "Otherwise leave load_in_4bit out."
        )
    return get_quantization_config(model_args)


def check_not_sharded(args: TrainingArguments) -> None:
    """Raise a ValueError under ZeRO-3 and FSDP, which would split a layer's blocks of 4-bit numbers."""
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"load_in_4bit does not work with {'FSDP' if fsdp else 'ZeRO-3'}, which shards the frozen weights over the "
            "processes. Start with accelerate_configs/multi_gpu.yaml or zero2.yaml, or leave load_in_4bit out."
        )


def _quantized_linear(layer: nn.Linear, config: BitsAndBytesConfig, device: torch.device) -> nn.Module:
    """Return a 4-bit copy of the layer, on `device`."""
    import bitsandbytes as bnb

    storage = {
        "compress_statistics": config.bnb_4bit_use_double_quant,
        "quant_type": config.bnb_4bit_quant_type,
        "quant_storage": config.bnb_4bit_quant_storage,
    }
    quantized = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=config.bnb_4bit_compute_dtype,
        device="meta",
        **storage,
    )
    quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=quantized, **storage)
    quantized.bias = layer.bias
    return quantized.to(device)  # moving the layer quantizes it


def _probe(config: BitsAndBytesConfig, device: torch.device) -> None:
    """Raise a RuntimeError if a 4-bit layer cannot be made, run and differentiated on the device."""
    dtype = config.bnb_4bit_compute_dtype
    try:
        layer = _quantized_linear(nn.Linear(PROBE_WIDTH, PROBE_WIDTH, dtype=dtype), config, device)
        inputs = torch.ones(1, PROBE_WIDTH, dtype=dtype, device=device, requires_grad=True)
        layer(inputs).sum().backward()
    except Exception as error:  # a missing kernel can raise many types of errors
        raise RuntimeError(
            f"bitsandbytes is installed but cannot run 4-bit layers on {device} in {dtype} "
            f"({type(error).__name__}: {error}). Leave load_in_4bit out, or see its notes on supported devices."
        ) from error


def quantize_language_model(model, config: BitsAndBytesConfig, device: torch.device | None = None):
    """
    Quantize the language model's linear layers to 4 bits, in place, and move the whole model to the device.

    Args:
        model: an `EmpathicForConditionalGeneration` without an adapter.
        config: the result of `quantization_config`.
        device: the device for training; None for this process's device.

    Raises:
        RuntimeError: if bitsandbytes does not run on the device.
    """
    device = PartialState().device if device is None else torch.device(device)
    _probe(config, device)
    body = model.base_model.language_model
    for name, layer in list(body.named_modules()):
        if type(layer) is nn.Linear:
            body.set_submodule(name, _quantized_linear(layer, config, device))
    # PEFT and the Trainer check this attribute. `hf_quantizer` stays unset: the config that a stage saves must not say
    # 4 bit, and stages without an adapter may train their parts through the quantized layers.
    model.is_loaded_in_4bit = True
    return model.to(device)


def load_quantized_model(path: str, config: BitsAndBytesConfig, trainable: bool = False, device=None, **kwargs):
    """
    Load a model like `checkpoints.load_model`, but with a 4-bit language model (under the adapter, if it has one).

    Args:
        path: folder or Hub id of a whole model or a stage.
        config, device: as for `quantize_language_model`.
        trainable: whether the adapter is trained further.
        kwargs: arguments of `from_pretrained`, such as `dtype` and `revision`.
    """
    own = {"revision": kwargs.pop("revision")} if kwargs.get("revision") is not None else {}
    if find_file(path, ADAPTER_CONFIG, **own) is None:
        return quantize_language_model(load_model(path, **own, **kwargs), config, device)
    base, revision = base_of_adapter(path, **own)
    model = load_quantized_model(base, config, device=device, revision=revision, **kwargs)
    return PeftModel.from_pretrained(model, path, is_trainable=trainable, **own)
