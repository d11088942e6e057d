"""The models of transformers that ours is compared with: how they are loaded, and where their adapters go."""

import re

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers.pytorch_utils import Conv1D


def load_processor(kind: str, target: str):
    """
    The tokenizer of a `chat` model, the processor of an `audio` or `video` model.

    Args:
        kind: as in `baseline_prompts`.
        target: Hub id or folder.

    Raises:
        ImportError: for a processor of videos where torchvision is not installed, with the mend.
    """
    if kind == "chat":
        return AutoTokenizer.from_pretrained(target)
    try:
        return AutoProcessor.from_pretrained(target)
    except ImportError as error:
        raise ImportError(
            f"{target}: its processor needs a package that is not installed. For videos that is torchvision: "
            "`pip install torchvision`, of the same build as torch; or take a model that reads images, such as "
            f"llava-hf/llava-v1.6-mistral-7b-hf. The cause: {error}"
        ) from error


def load_baseline(kind: str, target: str, **options):
    """The model of a kind; `options` are those of `from_pretrained`."""
    auto = AutoModelForCausalLM if kind == "chat" else AutoModelForMultimodalLM
    return auto.from_pretrained(target, **options)


def longest_input(model) -> int | None:
    """Tokens that the model reads at most; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # not every architecture has it


def baseline_lora_targets(model: nn.Module, chosen: list[str] | None = None) -> str:
    """
    A pattern of the modules that a LoRA adapter goes to: the linear layers of the language model, as in our stage
    `dialogue`; never those of an encoder of sound or pictures, nor the output layer.

    Args:
        model: a causal LM, or a model that has one inside.
        chosen: last parts of their names, such as `q_proj`; None: all.

    Raises:
        ValueError: if there is none of them.
    """
    chosen = [chosen] if isinstance(chosen, str) else chosen  # TRL's ModelConfig takes one out of its list
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    found = {n.rpartition(".")[2] for n, module in decoder.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    names = found if not chosen else found & set(chosen)
    if not names:
        raise ValueError(f"The language model has no linear layer {chosen}; it has {', '.join(sorted(found))}.")
    start = rf"{re.escape(prefix)}\." if prefix else ""
    return rf"{start}(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"
