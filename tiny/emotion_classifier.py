"""A tiny text emotion classifier, the stand-in for the GoEmotions RoBERTa in the tiny preset.

It has the same format (a RoBERTa with a classification head and a RoBERTa tokenizer) and is trained on sentences of the
tiny grammar that reveal their emotion in words. It works on sentences of this grammar only.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizer

from ..configuration_empathic import EMOTIONS

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MAX_LENGTH = 128
VOCABULARY_SIZE = 1200
BATCH_SIZE = 64
LEARNING_RATE = 1e-3


def build_tokenizer(sentences: Sequence[str]) -> RobertaTokenizer:
    """Train a byte-level BPE tokenizer in RoBERTa's format on the sentences; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_LENGTH)


def _config(tokenizer: RobertaTokenizer) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH + 2,  # RoBERTa counts positions from the padding id + 1
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        id2label=dict(enumerate(EMOTIONS)),
        label2id={emotion: index for index, emotion in enumerate(EMOTIONS)},
        problem_type="single_label_classification",
    )


def train_emotion_classifier(
    output_dir: str | Path,
    sentences: Sequence[str],
    labels: Sequence[str],
    *,
    steps: int = 300,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """
    Train the classifier and save it with its tokenizer, as a folder for `EmotionFeatures`.

    Args:
        output_dir: folder to write.
        sentences: sentences from `tiny.dialogues.emotion_sentences`.
        labels: the emotion of each sentence, one of the seven emotions.
        steps: optimizer steps, with 64 sentences each.
        seed: seed of the weights and of the batches; the caller's random state is unchanged.
        progress: whether to show a progress bar.

    Returns:
        the loss of each step.

    Raises:
        ValueError: if a label is not one of the seven emotions; the message names its row.
    """
    if len(sentences) != len(labels):
        raise ValueError(f"There are {len(sentences)} sentences but {len(labels)} labels; give one label per sentence.")
    for row, label in enumerate(labels):
        if label not in EMOTIONS:
            raise ValueError(f"labels, row {row}: {label!r} is not one of {', '.join(EMOTIONS)}.")
    tokenizer = build_tokenizer(sentences)
    inputs = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    targets = torch.tensor([EMOTIONS.index(label) for label in labels])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RobertaForSequenceClassification(_config(tokenizer)).train()
        losses = _train(model, inputs["input_ids"], inputs["attention_mask"], targets, steps, progress)
    model.eval().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return losses


def _train(model, input_ids, attention_mask, targets, steps, progress) -> list[float]:
    """Train on input_ids and attention_mask (sentences, length) and targets (sentences,)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    losses, order = [], torch.empty(0, dtype=torch.long)
    for _ in tqdm(range(steps), desc="emotion classifier", disable=not progress):
        if len(order) < min(BATCH_SIZE, len(targets)):
            order = torch.randperm(len(targets))
        rows, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        length = int(attention_mask[rows].sum(1).max())
        logits = model(input_ids=input_ids[rows, :length], attention_mask=attention_mask[rows, :length]).logits
        loss = F.cross_entropy(logits, targets[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses
