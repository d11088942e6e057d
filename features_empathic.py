"""What the frozen encoders make of clips: CLIP's patches of frames and Whisper's positions of sound."""

import torch
from torch import nn


def encode_frames(vision_tower: nn.Module, pixels: torch.FloatTensor) -> torch.FloatTensor:
    """What the vision tower sees at each patch of frames `(frames, 3, height, width)`: `(frames, patches, width)`."""
    return vision_tower(pixels.to(vision_tower.dtype)).last_hidden_state


def encode_sound(audio_tower: nn.Module, input_features: torch.FloatTensor) -> torch.FloatTensor:
    """
    What the audio tower hears at each position, two mel frames long: `(batch, positions, width)`.

    Args:
        audio_tower: Whisper's encoder.
        input_features: `(batch, mel, time)`; `time` is a whole number of Whisper windows, which are encoded one by one.

    Raises:
        ValueError: for another number of time steps.
    """
    batch, mel, time = input_features.shape
    window = 2 * audio_tower.config.max_source_positions
    if time % window:
        raise ValueError(f"input_features has {time} time steps, not a whole number of windows of {window}.")
    windows = input_features.reshape(batch, mel, -1, window).transpose(1, 2).flatten(0, 1)
    hidden = audio_tower(windows.to(audio_tower.dtype)).last_hidden_state
    return hidden.reshape(batch, time // 2, -1)


def audio_position_mask(input_features_mask: torch.LongTensor) -> torch.BoolTensor:
    """Mask `(..., time / 2)` of the encoder's positions within a clip: its second convolution halves time."""
    return input_features_mask.bool()[..., ::2]


def check_exclusive(first: str, first_value, second: str, second_value) -> None:
    """Raises a ValueError unless exactly one of the two inputs is given."""
    if (first_value is None) == (second_value is None):
        raise ValueError(f"Give exactly one of {first} and {second}.")


def first_given(first_value, second_value):
    """The one of two inputs that is given, or None."""
    return second_value if first_value is None else first_value
