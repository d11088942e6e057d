"""Measures the means and deviations with which a model standardizes the outputs of its frozen encoders."""

from collections.abc import Callable
from typing import Any

import torch

SAMPLES, BATCH = 256, 16  # samples that are measured, of which each shows one or two clips
# The inputs of the model that hold the clips of each modality.
CLIP_INPUTS = {
    "video": ("pixel_values_videos", "video_mask", "video_encoder_states"),
    "audio": ("input_features", "input_features_mask", "audio_encoder_states", "audio_encoder_mask"),
}
LOWEST = 0.01  # a deviation is at least this share of the mean deviation: a channel may hardly vary


@torch.no_grad()
def measure_standardizers(model, collator: Callable[[list[dict]], dict], samples: Any) -> None:
    """
    Set the standardizers of a model to the mean and the deviation, per channel, of the clips of the first samples.

    A clip counts once, with the mean of its encoder's outputs: what tells clips apart has deviation 1 then. A modality
    with fewer than two clips keeps its standardizer.

    Args:
        model: an `EmpathicForConditionalGeneration` with `standardize_features`.
        collator: gives the batch of some samples, as in training.
        samples: the samples of the training, a sequence.
    """
    body = model.base_model
    device, training, means = body.audio_query_tokens.device, model.training, {"video": [], "audio": []}
    model.eval()
    for start in range(0, min(SAMPLES, len(samples)), BATCH):
        batch = collator([samples[number] for number in range(start, min(start + BATCH, SAMPLES, len(samples)))])
        batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        for kind, keys in CLIP_INPUTS.items():
            encode = getattr(body, f"encode_{kind}")
            states, mask = encode(**{key: batch[key] for key in keys if key in batch})
            there = mask.any(dim=1)
            weights = mask[there].float()
            total = torch.einsum("bp,bpw->bw", weights, states[there].float())
            means[kind].append(total / weights.sum(dim=1, keepdim=True))
    model.train(training)
    for kind, standardizer in (("video", body.video_standardizer), ("audio", body.audio_standardizer)):
        clips = torch.cat(means[kind])  # (clips, width)
        if len(clips) < 2:
            continue
        deviation = clips.std(dim=0)
        if deviation.any():
            standardizer.mean.copy_(clips.mean(dim=0))
            standardizer.deviation.copy_(deviation.clamp(min=LOWEST * deviation.mean()))
