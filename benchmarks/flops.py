"""
Floating point operations of a training step, and peak operations per second of GPUs.

`model_flops` counts the operations that a step needs mathematically: each matrix product once in the forward pass, once
for the gradient of its input if that gradient is needed, and once for the gradient of its weight if the weight trains.
Recomputation by activation checkpointing is not counted, so the result is the numerator of model FLOPs utilization
(Chowdhery et al. 2022, appendix B). Attention is counted in full, not only its causal half, as in torch's counter.
"""

from torch import nn

from .shapes import Shapes

# Dense bf16 tensor core operations per second (10^12), from the vendor's data sheets (half of a figure with sparsity).
# The first name that is contained in the device's name is used.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 149.7,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
SCAN_OPERATIONS = 6  # of Mamba's scan per channel, state and token: decay, drive, sum, and the product with C


def peak_tflops(device_name: str) -> float | None:
    """The device's dense bf16 peak in 10^12 operations per second; None if the device is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def _products(modules, positions: int, gradient: bool) -> float:
    """Operations of linear layers over `positions`; `gradient`: whether their inputs need a gradient."""
    total = 0.0
    for module in modules:
        if isinstance(module, nn.Linear):
            passes = 1 + gradient + module.weight.requires_grad
            total += 2.0 * module.weight.numel() * positions * passes
    return total


def _qformer(qformer, queries: int, positions: int, clips: int) -> float:
    total = 0.0
    for name, module in qformer.named_modules():
        encoded = name.endswith(("crossattention.attention.key", "crossattention.attention.value"))
        total += _products([module], clips * (positions if encoded else queries), gradient=False)
    config, crossed = qformer.config, 0
    for name, _ in qformer.named_modules():
        crossed += name.endswith("crossattention.attention")
    return total + 4.0 * clips * queries * config.hidden_size * (
        config.num_hidden_layers * queries + crossed * positions
    )


def model_flops(model, stage: str, shapes: Shapes) -> dict[str, float]:
    """
    Count the operations of a step by part of the model, without recomputation.

    Args:
        model: an `EmpathicForConditionalGeneration`, or its PEFT model, prepared for the stage; it may be on the meta
            device.
        stage: the stage of the batch.
        shapes: the shapes of the batch.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, config = model.model, model.config
    text, samples, length = config.text_config, shapes.batch_size, shapes.length(stage)
    memory_trains = any(parameter.requires_grad for parameter in body.memory.parameters())

    width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    # In the packed row of a pair, attention of the second reply is computed over all positions.
    scores = samples * (length**2 + (shapes.reply * (length + shapes.reply) if stage == "epo" else 0))
    attention = 3 * 4.0 * scores * width * text.num_hidden_layers
    positions = shapes.positions(stage)
    flops = {"language model": _products(body.language_model.modules(), positions, gradient=True) + attention}
    flops["head"] = _products([model.lm_head], shapes.logits(stage), gradient=True)

    memory, tokens = body.memory, samples * shapes.memory_length
    flops["memory"] = _products(memory.mamba.modules(), tokens, gradient=memory_trains)
    flops["memory"] += _products(memory.projector.modules(), samples * shapes.turns, gradient=memory_trains)
    mamba = config.memory_config
    if mamba.model_type == "mamba":  # Mamba-2's scan is not counted
        scan = (SCAN_OPERATIONS * mamba.state_size + 2 * mamba.conv_kernel) * mamba.intermediate_size
        flops["memory"] += (3.0 if memory_trains else 1.0) * scan * mamba.num_hidden_layers * tokens

    clips, vision, audio = shapes.clips(stage), config.vision_config, config.audio_config
    patches = (vision.image_size // vision.patch_size) ** 2
    frames, seen = clips * shapes.frames, patches + 1
    patching = 2.0 * body.vision_tower.embeddings.patch_embedding.weight.numel() * patches * frames
    flops["vision"] = patching + _products(body.vision_tower.modules(), frames * seen, gradient=False)
    flops["vision"] += 4.0 * frames * seen**2 * vision.hidden_size * vision.num_hidden_layers
    heard = audio.max_source_positions
    mixing = 2.0 * (2 * body.audio_tower.conv1.weight.numel() + body.audio_tower.conv2.weight.numel()) * heard * clips
    flops["audio"] = mixing + _products(body.audio_tower.modules(), heard * clips, gradient=False)
    flops["audio"] += 4.0 * clips * heard**2 * audio.d_model * audio.encoder_layers
    queries = config.num_query_tokens
    flops["Q-formers"] = _qformer(body.video_qformer, queries, shapes.frames * seen, clips)
    flops["Q-formers"] += _qformer(body.audio_qformer, queries, heard, clips)
    for projector in (body.video_projector, body.audio_projector):
        flops["Q-formers"] += _products(projector.modules(), clips * queries, gradient=False)
    return flops
