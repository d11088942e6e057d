"""Pretrain the tiny preset's vision and audio encoders, the stand-ins for CLIP and Whisper.

The outputs of frozen random encoders have too little information: CLIP and Whisper are pretrained on millions of images
and hours of speech, so the stand-ins need pretraining too. They learn to predict the parameters of a rendering: the
shapes of facial features, position of the head and colors of an image; the voice features of a sound, and its pitch and
amplitude at each moment. All parameters are uniformly random, the corpus uses none of these renderings, and no emotion
is drawn or used as a label.

A Q-former reads all positions of an encoder, not a pooled vector, so each position must predict all parameters.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from .clips import random_picture, random_sound
from .corpus import SECONDS

IMAGE_SIZE = 32  # pixels
WINDOW = 1  # seconds of audio per window of Whisper's encoder
CHUNK = 250  # renderings that are preprocessed at once


def vision_config():
    """Return the config of a CLIP vision tower with two small layers over 16 patches."""
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        initializer_range=0.1,  # the default 0.02 is for wide layers and long training
    )


def audio_config():
    """Return the config of a Whisper whose encoder has two small layers over one second; its decoder is unused."""
    return WhisperConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_source_positions=50 * WINDOW,
        init_std=0.1,
        max_target_positions=32,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )


def image_processor():
    """Return CLIP's image processor for `IMAGE_SIZE`."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def feature_extractor():
    """Return Whisper's feature extractor for windows of `WINDOW` seconds."""
    return WhisperFeatureExtractor(chunk_length=WINDOW)


def _render(count, seed, draw, preprocess, name, progress):
    """Make `count` renderings: the encoder's inputs (count, ...) and the parameters to predict (count, ...)."""
    rng = np.random.default_rng([seed, *name.encode()])
    inputs, targets = [], []
    with tqdm(total=count, desc=f"{name}s", unit=name, disable=not progress) as bar:
        for start in range(0, count, CHUNK):
            drawn, made = zip(*(draw(rng) for _ in range(min(CHUNK, count - start))), strict=True)
            inputs.append(preprocess(list(drawn)))
            targets.append(torch.from_numpy(np.stack(made)))
            bar.update(len(drawn))
    return torch.cat(inputs), torch.cat(targets)


def pictures(count, seed=0, progress=False):
    """Make random images: pixel values (count, 3, IMAGE_SIZE, IMAGE_SIZE) and parameters (count, parameters)."""
    processor = image_processor()
    return _render(
        count,
        seed,
        random_picture,
        lambda images: processor(images, return_tensors="pt")["pixel_values"],
        "picture",
        progress,
    )


def sounds(count, seed=0, progress=False):
    """Make random sounds: log-mel features (count, 80, 100) and parameters (count, moments, parameters)."""
    extractor = feature_extractor()
    rate = extractor.sampling_rate
    return _render(
        count,
        seed,
        lambda rng: random_sound(rng, SECONDS, hop=2 * extractor.hop_length),
        lambda samples: extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"],
        "sound",
        progress,
    )


def fit_encoder(encode, parameters, inputs, targets, *, steps, batch_size, learning_rate, seed, name, progress):
    """Train an encoder, with a temporary linear head, to predict `targets` from `inputs` at each position.

    Args:
        encode: inputs (batch, ...) -> outputs (batch, positions, width).
        parameters: parameters of the encoder.
        inputs: (count, ...).
        targets: (count, parameters) for all positions, or (count, positions, parameters); further positions of the
            encoder are ignored.
        steps, batch_size, learning_rate: options of AdamW; the learning rate warms up over a tenth of the steps and
            decays to zero.
        seed: seed of the head and the batches.

    Returns:
        The loss of each step: the squared error relative to the variance of the targets.
    """
    torch.manual_seed(seed)
    if targets.ndim == 2:
        targets = targets[:, None]
    mean, spread = targets.mean((0, 1)), targets.std((0, 1)) + 1e-6
    with torch.no_grad():
        width = encode(inputs[:1]).shape[-1]
    head = nn.Linear(width, targets.shape[-1])
    parameters = [*parameters, *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order = torch.cat([torch.randperm(len(inputs)) for _ in range(-(-steps * batch_size // len(inputs)))])
    losses = []
    bar = tqdm(range(steps), desc=name, unit="step", disable=not progress)
    for step in bar:
        rows = order[step * batch_size : (step + 1) * batch_size]
        outputs = encode(inputs[rows])
        wanted = (targets[rows] - mean) / spread
        told = head(outputs if wanted.shape[1] == 1 else outputs[:, : wanted.shape[1]])
        loss = (told - wanted).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def pretrain_encoders(
    output_dir,
    *,
    vision_steps=320,
    audio_steps=200,
    batch_size=32,
    learning_rate=6e-3,
    num_pictures=6000,
    num_sounds=2000,
    seed=0,
    progress=True,
):
    """Pretrain both encoders and save each as an ordinary Hugging Face folder, with its preprocessor.

    Args:
        output_dir: folder for `vision` (a `CLIPVisionModel`) and `audio` (a `WhisperForConditionalGeneration`).
        vision_steps, audio_steps: training steps of each encoder.
        batch_size, learning_rate: options for both encoders.
        num_pictures, num_sounds: numbers of training renderings; the corpus has none of these.
        seed: seed of the weights and of the renderings.
        progress: whether to show progress bars.

    Returns:
        `{"vision", "audio"}`: the loss of each step, the squared error relative to the variance of the parameters.
    """
    options = {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, "progress": progress}
    output_dir = Path(output_dir)
    losses = {}

    torch.manual_seed(seed)
    vision = CLIPVisionModel(vision_config())
    losses["vision"] = fit_encoder(
        lambda batch: vision(batch).last_hidden_state,
        vision.parameters(),
        *pictures(num_pictures, seed, progress),
        steps=vision_steps,
        name="vision encoder",
        **options,
    )
    vision.save_pretrained(output_dir / "vision")
    image_processor().save_pretrained(output_dir / "vision")

    torch.manual_seed(seed)
    audio = WhisperForConditionalGeneration(audio_config())
    encoder = audio.get_encoder()
    losses["audio"] = fit_encoder(
        lambda batch: encoder(batch).last_hidden_state,
        [parameter for parameter in encoder.parameters() if parameter.requires_grad],
        *sounds(num_sounds, seed, progress),
        steps=audio_steps,
        name="audio encoder",
        **options,
    )
    audio.save_pretrained(output_dir / "audio")
    feature_extractor().save_pretrained(output_dir / "audio")
    return losses
