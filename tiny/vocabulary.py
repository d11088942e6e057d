"""Two small tokenizers for the tiny preset, in the formats of Qwen2.5's and GPT-NeoX's tokenizers.

Both are byte-level BPE, like the originals, so that any text can be encoded and decoded exactly. Their merges are
learned from a list of words, each with and without a leading space, until each word is a single token. So a token is a
word, and the tiny language model learns words instead of spelling.
"""

import json
import re

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPTNeoXTokenizer, Qwen2Tokenizer

# Qwen2.5's own special tokens, in its order.
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
NEOX_SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")
CHAT_WORDS = ("system", "user", "assistant")
MAX_LENGTH = 2048


def _words(texts):
    """Return the distinct words of the texts, without control tokens, sorted."""
    special = re.compile("|".join(re.escape(token) for token in {*QWEN_SPECIAL_TOKENS, *NEOX_SPECIAL_TOKENS}))
    words = set(CHAT_WORDS)
    for text in texts:
        words.update(re.findall(r"[^\W\d_]+", special.sub(" ", text)))
    return sorted(words)


def _learn_merges(texts, special_tokens=()):
    """Return the vocabulary (token -> id) and the merges with which each word of the texts is a single token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = _words(texts)
    # Merging continues until no pair is left; the vocabulary never needs more tokens than the words have letters.
    limit = 256 + len(special_tokens) + 2 * sum(len(word.encode()) + 1 for word in words)
    trainer = trainers.BpeTrainer(
        vocab_size=limit,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    tokenizer.train_from_iterator([form for word in words for form in (word, " " + word)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def build_text_tokenizer(texts):
    """Build a tokenizer in Qwen2.5's format in which every word of `texts` is one token, with or without a space.

    Args:
        texts: the texts or words of the language model's inputs, from the grammar and the templates.

    Returns:
        `Qwen2Tokenizer` with Qwen2.5's special tokens; the end of a turn is `<|im_end|>`, padding is `<|endoftext|>`.
    """
    vocab, merges = _learn_merges(texts)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(QWEN_SPECIAL_TOKENS),
        model_max_length=MAX_LENGTH,
    )


def build_memory_tokenizer(texts):
    """Build a tokenizer in GPT-NeoX's format (used by Mamba-370M) in which every word of `texts` is one token.

    It does not have `<MEM>` yet: the processor adds this token.

    Returns:
        `GPTNeoXTokenizer` with `<|endoftext|>` (id 0) and `<|padding|>` (id 1).
    """
    vocab, merges = _learn_merges(texts, NEOX_SPECIAL_TOKENS)
    return GPTNeoXTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
