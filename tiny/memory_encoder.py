"""The tiny preset's memory encoder: a Mamba with random weights, which the memory stages train from scratch."""

import torch
from transformers import MambaConfig, MambaModel, PreTrainedTokenizerBase


def write_memory_encoder(tokenizer: PreTrainedTokenizerBase, output_dir, seed: int = 0) -> None:
    """
    Save the encoder and its tokenizer in the format of a pretrained Mamba.

    Args:
        tokenizer: result of `build_memory_tokenizer`.
        output_dir: folder to write.
        seed: seed of the weights.
    """
    torch.manual_seed(seed)
    # One more row than the tokenizer has entries, because the processor adds `<MEM>`.
    config = MambaConfig(vocab_size=len(tokenizer) + 1, hidden_size=128, num_hidden_layers=2, state_size=16)
    MambaModel(config).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
