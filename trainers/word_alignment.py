"""
Aligns clips with the emotions' words: a loss of stage `emotion` that does not pass through the language model.

The stage's own loss reaches the Q-formers only through the whole frozen language model. Here a clip's vectors learn to
be near the language model's own token embedding of the clip's emotion, and nearer to it than to those of the other
emotions: before the stage, in steps without the language model (`alignment_steps`), and as a part of the stage's loss
(`alignment_weight`). This is a contrastive alignment, as in BLIP-2's first stage; the paper has none.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..configuration_empathic import EMOTIONS
from .frozen.standardize import CLIP_INPUTS

SHARPNESS = 20.0  # of the softmax over cosine similarities, which lie between -1 and 1
RECENT = 50  # steps whose accuracy is shown


def word_vectors(model, processor, words: tuple[str, ...] = EMOTIONS) -> torch.Tensor:
    """Return the language model's embedding of each word, (words, hidden size): the mean of its tokens."""
    embeddings, tokenizer = model.get_input_embeddings(), processor.tokenizer
    vectors = []
    for word in words:
        # With a space, as words are inside of a sentence, unless the tokenizer makes a token of the space alone.
        tokens = processor.encode_plain(f" {word}")
        ids = torch.tensor([token for token in tokens if tokenizer.decode([token]).strip()] or tokens)
        with torch.no_grad():
            vectors.append(embeddings(ids.to(embeddings.weight.device)).float().mean(0))
    return torch.stack(vectors)


def contrast(vectors: torch.Tensor, words: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Compute the cross-entropy of a softmax over the cosine similarities of each clip's mean vector to the words, and the
    number of clips that are nearest to their own word.

    Args:
        vectors: vectors of the clips, (clips, queries, hidden size).
        words: vectors of the words, (words, hidden size).
        labels: the word of each clip, (clips,).
    """
    logits = SHARPNESS * F.normalize(vectors.float().mean(1), dim=-1) @ F.normalize(words, dim=-1).T  # (clips, words)
    return F.cross_entropy(logits, labels), int((logits.argmax(1) == labels).sum())


def distance(vectors: torch.Tensor, words: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean of 1 - the cosine similarity of each vector to the word of its clip; see `contrast`."""
    similarity = F.normalize(vectors.float(), dim=-1) * F.normalize(words, dim=-1)[labels][:, None]
    return (1 - similarity.sum(-1)).mean()


def emotion_labels(batch: dict, device: torch.device) -> torch.Tensor:
    """Return the emotion of each row of a batch of stage `emotion`, (rows,), as its place in `EMOTIONS`."""
    return torch.tensor([EMOTIONS.index(target) for target in batch["targets"]], device=device)


def clips_of_rows(batch: dict) -> dict[str, torch.Tensor]:
    """Return which rows of a batch have a clip of each modality, (rows,)."""
    masks = {"video": ("video_mask",), "audio": ("input_features_mask", "audio_encoder_mask")}
    return {
        modality: next(batch[name] for name in names if name in batch).bool().any(dim=1)
        for modality, names in masks.items()
    }


def align_with_words(model, processor, collator: Callable[[list[dict]], dict], samples: Any, args) -> float:
    """
    Train the Q-formers, queries and projectors of a model, in place, without its language model.

    The loss of a clip is its `contrast`, which tells emotions apart, and the `distance` of its vectors, which brings
    them where the language model knows what they mean. A row with sound and pictures has two clips. Every process does
    the same work, so that no gradient is exchanged; the main process's weights are kept.

    Args:
        model: an `EmpathicForConditionalGeneration`, in which the parameters that the stage trains require a gradient.
        processor: its `EmpathicProcessor`.
        collator: gives the batch of some samples, as in training.
        samples: a batch of samples for each step, one after another; their `target` is the emotion.
        args: the `StageConfig`, with `alignment_steps`, the device, the batch size of a process, and the options of the
            optimizer.

    Returns:
        The share of the last clips that were nearest to the word of their emotion.

    Raises:
        FloatingPointError: if the loss is NaN or infinite.
        ValueError: if no sample has a clip.
    """
    body, size, training = model.base_model, args.per_device_train_batch_size, model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Under DeepSpeed and FSDP, the model is still on the CPU; the language model, which may be large, stays there.
    before = body.audio_query_tokens.device
    _move_encoders(body, args.device)
    words = word_vectors(model, processor).to(args.device)
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    steps = args.alignment_steps
    schedule = get_cosine_schedule_with_warmup(optimizer, args.get_warmup_steps(steps), steps)
    recent: deque[tuple[float, int, int]] = deque(maxlen=RECENT)
    model.train()
    bar = tqdm(range(steps), desc="alignment", disable=args.process_index > 0 or args.disable_tqdm)
    for step in bar:
        chosen = [samples[number] for number in range(step * size, (step + 1) * size)]
        batch = collator(chosen)
        if not batch["targets"]:  # every sample was left out; the collator reports them
            continue
        labels = emotion_labels(batch, args.device)
        batch = {key: value.to(args.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        losses, clips, right = [], 0, 0
        for modality, there in clips_of_rows(batch).items():
            if not there.any():
                continue
            query = getattr(body, f"get_{modality}_features")
            given = {name: batch[name][there] for name in CLIP_INPUTS[modality] if name in batch}
            vectors, own = query(**given).pooler_output, labels[there]
            loss, hits = contrast(vectors, words, own)
            losses.append(loss + distance(vectors, words, own))
            clips, right = clips + len(own), right + hits
        if not losses:
            continue
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of the alignment is NaN or infinite at step {step}. Lower the learning rate, or leave "
                "alignment_steps out."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        recent.append((loss.item(), clips, right))
        bar.set_postfix(loss=f"{recent[-1][0]:.3f}", accuracy=f"{_accuracy(recent):.3f}", refresh=False)
    if not recent:
        raise ValueError(f"None of the samples of {steps} steps of alignment has a clip that can be read.")
    for parameter in trained:
        parameter.data = broadcast(parameter.data)
        parameter.grad = None
    _move_encoders(body, before)
    model.train(training)
    return _accuracy(recent)


def _move_encoders(body, device: torch.device) -> None:
    """Move all that turns a clip into vectors; whole modules, and the queries, which are in none."""
    for name, part in body.named_children():
        if name.startswith(("video_", "audio_", "vision_tower")):
            part.to(device)
    for queries in (body.video_query_tokens, body.audio_query_tokens):
        queries.data = queries.data.to(device)


def _accuracy(recent: Iterable[tuple[float, int, int]]) -> float:
    return sum(right for _, _, right in recent) / sum(clips for _, clips, _ in recent)
