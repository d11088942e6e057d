"""
Time of Whisper's encoder for a clip: whole windows of 30 seconds beside the clip alone (`audio_window`).

    python -m empathic.benchmarks.audio_window --output runs/benchmarks/audio_window.json

The encoder has the size of Whisper tiny and random weights: speed does not depend on the weights. CPU time, one thread.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..configuration_empathic import AUDIO_WINDOWS
from ..files import write_json
from ..modeling_empathic import encode_sound
from .machine import describe_machine

SECONDS = (1.0, 3.5, 10.0, 30.0)  # 3.5 s is the mean length of RAVDESS's and MELD's utterances
FRAMES_PER_SECOND = 100  # of Whisper's log-mel features


def measure(seconds: float, repeats: int, tower: WhisperEncoder) -> dict[str, float]:
    """Return the median CPU seconds of each window for one clip."""
    time_steps = 2 * tower.config.max_source_positions
    features = torch.randn(1, tower.config.num_mel_bins, time_steps)
    mask = (torch.arange(time_steps) < round(seconds * FRAMES_PER_SECOND)).long()[None]
    found: dict[str, list[float]] = {window: [] for window in AUDIO_WINDOWS}
    with torch.no_grad():
        for _ in range(repeats + 1):  # the first call allocates memory
            for window in AUDIO_WINDOWS:
                start = time.process_time()
                encode_sound(tower, features, mask, window)
                found[window].append(time.process_time() - start)
    return {window: sorted(times[1:])[len(times[1:]) // 2] for window, times in found.items()}


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write the results; return them."""
    parser = argparse.ArgumentParser(
        description="Time of Whisper's encoder for a clip: whole windows of 30 seconds beside the clip alone.",
        epilog="example:\n  python -m empathic.benchmarks.audio_window --output runs/benchmarks/audio_window.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="runs/benchmarks/audio_window.json", help="JSON file (%(default)s)")
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS, help="lengths of the clips (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each kind (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    tower = WhisperEncoder(config).eval()
    result: dict = {"clips": []}
    for seconds in options.seconds:
        found = measure(seconds, options.repeats, tower)
        result["clips"].append({"seconds": seconds, **found, "ratio": found["full"] / found["clip"]})
        print(f"{seconds:g} s: full {1000 * found['full']:.0f} ms, clip {1000 * found['clip']:.0f} ms, "
              f"ratio {found['full'] / found['clip']:.1f}")  # fmt: skip
    result["machine"] = describe_machine()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    return result


if __name__ == "__main__":
    main()
