"""
Estimate the device memory of a stage's training step from the model's sizes.

Weights, gradients and AdamW's states are counted exactly, from the tensors of the model (on the meta device, where
tensors have no storage). Activations are estimated from the tensors that a layer saves for its backward pass, with
constants that were derived from the layers' code and checked against the live tensors of small models on a CPU.
"""

from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..trainers.packing.log_probabilities import CHUNK_BYTES
from .shapes import Shapes

GIB = 2**30
SIZES = {"24 GB": 24, "48 GB": 48, "80 GB": 80, "141 GB": 140}  # GPU memory as marketed -> GiB
CONTEXT = 1.0  # GiB that CUDA and its libraries need in addition to the tensors
USABLE = 0.95  # usable share of the memory; the rest is lost to fragmentation
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MAMBA_KEPT, MAMBA_WORK = 40, 30  # bytes per token and inner channel: saved for backward, and temporary
SCAN_BLOCK = {"cuda": 2**25, "cpu": 2**19}  # elements of a block of the scan, as in scan_empathic
NF4_BITS = 4 + 32 / 64  # bits per 4-bit weight: the weight itself, and its share of the scale of its block


@dataclass
class MemoryPlan:
    """
    Estimated bytes of a training step. `total` is the maximum over three phases: the loss, the language model's
    backward pass, and the memory encoder.
    """

    weights: int
    gradients: int
    optimizer: int
    batch: int
    casts: int
    checkpoints: int
    layer: int
    logits: int
    memory: int
    memory_layer: int

    @property
    def total(self) -> int:
        at_loss = self.checkpoints + self.memory + self.logits
        in_layers = self.checkpoints + self.memory + self.layer + self.gradients
        in_memory = self.memory + self.memory_layer + (self.gradients if self.memory else 0)
        return self.weights + self.optimizer + self.batch + self.casts + max(at_loss, in_layers, in_memory)

    def fits(self, gib: float) -> bool:
        """Whether the step fits on a GPU with this many GiB."""
        return self.total + CONTEXT * GIB <= USABLE * gib * GIB

    def record(self) -> dict[str, float]:
        """Return the plan in GiB, for JSON."""
        return {name: round(value / GIB, 4) for name, value in {**asdict(self), "total": self.total}.items()}


def weight_bytes(model: nn.Module, in_4bit: bool = False) -> int:
    """Bytes of parameters (tied ones once) and buffers; `in_4bit`: with the language model's linear layers in NF4."""
    quantised = set()
    if in_4bit:
        for name, module in model.named_modules():
            is_base = "language_model" in name and isinstance(module, nn.Linear) and ".lora_" not in name
            quantised |= {module.weight} if is_base else set()
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for parameter in model.parameters():
        bytes_each = NF4_BITS / 8 if parameter in quantised else parameter.element_size()
        total += int(parameter.numel() * bytes_each)
    return total


def trained_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of gradients and of AdamW's states: per parameter two moments in its dtype, and a step count."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return gradients, 2 * gradients + 4 * len(trained)


def layer_bytes(model: nn.Module, width: int) -> tuple[float, float]:
    """
    Bytes per position that a Qwen-like layer saves for its backward pass, and temporary bytes per position.

    Args:
        model: the model, prepared for its stage.
        width: bytes of an activation: 2 under bf16 autocast, 4 in fp32.
    """
    config = cast(PreTrainedConfig, model.config).text_config
    hidden, inner = config.hidden_size, config.intermediate_size
    # Saved: by two norms their fp32 inputs; by attention its query, key, value (repeated for the query heads) and
    # output; by the gated MLP its gate, the gate's activation and the other factor. Frozen linear layers save nothing.
    kept = 2 * 4 * hidden + 4 * width * hidden + 3 * width * inner
    work = 4 * width * hidden + 3 * width * inner
    first = next((name for name, _ in model.named_modules() if name.endswith("language_model.layers.0")), None)
    layer = model.get_submodule(first) if first is not None else nn.Module()
    for name, module in layer.named_modules():
        if not name.endswith(".lora_A.default"):
            continue
        # The adapter casts its input to fp32 (temporary); the input of its first matrix and the dropout mask are saved.
        dropout = layer.get_submodule(name.replace("lora_A", "lora_dropout"))
        share = 1.0 if width == 2 or isinstance(dropout, nn.Dropout) else 0.5  # targets share fp32 inputs
        kept += share * width * module.in_features + width * module.out_features
        kept += module.in_features if isinstance(dropout, nn.Dropout) else 0
        work = max(work, 4 * width * hidden + (3 * width + (12 if width == 2 else 4)) * module.in_features)
    return kept, work


def plan(
    model: nn.Module,
    stage: str,
    shapes: Shapes,
    checkpointing: bool,
    in_4bit: bool = False,
    width: int = 2,
    device: str = "cuda",
) -> MemoryPlan:
    """
    Estimate the memory of a training step on one device.

    Args:
        model: an `EmpathicForConditionalGeneration`, or its PEFT model, prepared for the stage; on any device.
        stage: the stage of the batch.
        shapes: the shapes of the batch.
        checkpointing: whether layers are recomputed in the backward pass (`activation_checkpointing`).
        in_4bit: whether the language model is quantized, as with `--load_in_4bit`.
        width: bytes of an activation: 2 under bf16 autocast, 4 in fp32.
        device: `cuda` or `cpu`; the memory encoder's scan uses larger blocks on a GPU.
    """
    config = cast(PreTrainedConfig, model.config)
    text, mamba = config.text_config, config.memory_config
    positions, tokens = shapes.positions(stage), shapes.batch_size * shapes.memory_length
    gradients, optimizer = trained_bytes(model)

    kept, work = layer_bytes(model, width)
    layers = text.num_hidden_layers
    checkpoints = positions * layers * (width * text.hidden_size if checkpointing else kept)
    layer = positions * (work + (kept if checkpointing else 0))
    if in_4bit:  # the widest layer, dequantized for its product
        layer += 2 * width * text.hidden_size * text.intermediate_size

    # The memory encoder saves activations only if it trains; else its layers' tensors are temporary.
    inner, trains = mamba.intermediate_size, stage.startswith("memory")
    block = min(SCAN_BLOCK[device], tokens * inner * mamba.state_size)
    memory_layer = tokens * inner * (MAMBA_KEPT + (MAMBA_WORK if trains else 0))
    memory_layer += 4 * block * (4 if trains else 2)  # fp32 states and decays; in backward also their gradients
    each = 4 * mamba.hidden_size if checkpointing else MAMBA_KEPT * inner
    memory = tokens * mamba.num_hidden_layers * each if trains else 0

    # A chunk of logits in their dtype and in fp32, and the gradient of each target's hidden state.
    targets = shapes.logits(stage)
    chunk = min(targets, max(8, CHUNK_BYTES[device] // (4 * text.vocab_size)))
    logits = chunk * text.vocab_size * (4 if width == 4 else 4 + width) + targets * text.hidden_size * width

    frames = shapes.rows(stage) * shapes.frames * 3 * config.vision_config.image_size**2
    sound = shapes.rows(stage) * config.audio_config.num_mel_bins * 2 * config.audio_config.max_source_positions
    return MemoryPlan(
        weights=weight_bytes(model, in_4bit),
        gradients=gradients,
        optimizer=optimizer,
        batch=4 * (frames + sound) + 8 * (3 * shapes.rows(stage) * shapes.length(stage) + 2 * tokens),
        casts=gradients // 2 if width == 2 else 0,  # autocast's bf16 copies of the trained fp32 weights
        checkpoints=int(checkpoints),
        layer=int(layer),
        logits=int(logits),
        memory=int(memory),
        memory_layer=int(memory_layer),
    )


def largest_batches(model: nn.Module, stage: str, shapes: Shapes, **options) -> dict[str, int]:
    """The largest batch size of `BATCHES` that fits on each of `SIZES`, 0 if none fits. `options`: passed to `plan`."""
    plans = {size: plan(model, stage, replace(shapes, batch_size=size), **options) for size in BATCHES}
    return {
        name: max((size for size, estimate in plans.items() if estimate.fits(gib)), default=0)
        for name, gib in SIZES.items()
    }


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, int]]:
    """Count parameters: {part: {"trained", "frozen"}}; tied parameters count once."""
    parts = ("language_model", "lm_head", "vision_tower", "audio_tower", "memory", "video_", "audio_")
    labels = ("language model", "head", "vision", "audio", "memory", "Q-formers", "Q-formers")
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        label = next(label for part, label in zip(parts, labels, strict=True) if part in name)
        label = "adapter" if ".lora_" in name else label
        count = counts.setdefault(label, {"trained": 0, "frozen": 0})
        count["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


class LiveMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """
    Records the peak bytes of live tensors while the mode is active, as a CPU counterpart of
    `torch.cuda.max_memory_allocated`. Buffers inside a kernel are not counted.

    Args:
        held: tensors that are in memory from the start.
    """

    def __init__(self, held):
        super().__init__()
        import weakref

        self._finalize = weakref.finalize
        self._seen: dict[int, int] = {}
        self.live = self.peak = 0
        for tensor in held:
            self._hold(tensor)

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.live += self._seen[key]
            self.peak = max(self.peak, self.live)
            self._finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._hold(value)
        return result
