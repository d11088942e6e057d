"""Load the transformers models that ours is compared with, and choose the target modules of their adapters."""

import re

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers.pytorch_utils import Conv1D


def load_processor(kind: str, target: str, revision: str | None = None):
    """
    Load the tokenizer of a `chat` model, or the processor of an `audio` or `video` model.

    Args:
        kind: one of `prompts.BASELINE_KINDS`.
        target: Hub id or folder.
        revision: revision of a Hub id; None for the newest.

    Raises:
        ImportError: if a video processor needs torchvision, which is not installed; the message has the remedy.
    """
    if kind == "chat":
        return AutoTokenizer.from_pretrained(target, revision=revision)
    try:
        return AutoProcessor.from_pretrained(target, revision=revision)
    except ImportError as error:
        raise ImportError(
            f"{target}: its processor needs a package that is not installed. For video this is torchvision: run "
            "`pip install torchvision`, with the same build as torch; or use a model that reads images, such as "
            f"llava-hf/llava-v1.6-mistral-7b-hf. The cause: {error}"
        ) from error


def load_baseline(kind: str, target: str, **options):
    """Load a model; `options` are arguments of `from_pretrained`."""
    auto = AutoModelForCausalLM if kind == "chat" else AutoModelForMultimodalLM
    return auto.from_pretrained(target, **options)


def longest_input(model) -> int | None:
    """The maximum number of tokens that the model reads; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # not every architecture has it


def baseline_lora_targets(model: nn.Module, chosen: list[str] | None = None) -> str:
    """
    Return a regex for the target modules of LoRA: the linear layers of the language model, as in our stage `dialogue`,
    without the layers of audio or vision encoders and without the output layer.

    Args:
        model: a causal LM, or a model that contains a causal LM.
        chosen: last parts of module names, such as `q_proj`; None for all.

    Raises:
        ValueError: if no module matches.
    """
    chosen = [chosen] if isinstance(chosen, str) else chosen  # TRL's ModelConfig unpacks a list of one name
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    found = {n.rpartition(".")[2] for n, module in decoder.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    names = found if not chosen else found & set(chosen)
    if not names:
        raise ValueError(f"The language model has no linear layer {chosen}; choose from {', '.join(sorted(found))}.")
    start = rf"{re.escape(prefix)}\." if prefix else ""
    return rf"{start}(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"
