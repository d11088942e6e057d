"""
Seconds per step of stage `emotion` of the tiny preset, from media and from the feature cache, with one thread.

    python -m empathic.benchmarks.feature_cache --output runs/benchmarks/feature_cache.json

The encoders and the language model have the preset's sizes and random weights: speed does not depend on the weights.
There are two kinds of clips: those of the tiny corpus (64 x 64 pixels, 10 frames per second, 0.96 s, 16 kHz mono),
which are cheap to decode, and the same clips in MELD's format (1280 x 720, 24000/1001 frames per second, 3.6 s, 48 kHz
stereo). Clips are decoded in the training process; with spare cores, data loader workers would hide part of this time.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    TrainerCallback,
    WhisperForConditionalGeneration,
    set_seed,
)
from transformers.utils import logging

from ..data_prep.corpora.folder import prepare_folder
from ..media_empathic import read_audio, read_video
from ..tiny.corpus import write_corpus
from ..tiny.encoders import audio_config, feature_extractor, image_processor, vision_config
from ..tiny.language_model import prompt_texts, tiny_text_config
from ..tiny.memory_encoder import write_memory_encoder
from ..tiny.vocabulary import build_memory_tokenizer, build_text_tokenizer
from ..trainers import prepare_features, train
from ..trainers.stages import freeze_for_stage
from .machine import describe_machine

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny" / "emotion.yaml"
WARM_UP = 3  # steps that are not timed, because first calls allocate memory
CLIPS = ("tiny", "film")
# Most clips of MELD have this size, frame rate and sampling rate; 3.6 s is the mean length of its utterances.
FILM_SIZE, FILM_RATE, FILM_SECONDS, FILM_SOUND = (1280, 720), Fraction(24000, 1001), 3.6, 48000


class StepTimes(TrainerCallback):
    """
    Measures seconds from the end of a step to the end of the next step (loading the batch, forward, backward, update):
    wall-clock time, and CPU time, which other processes disturb less.
    """

    def __init__(self):
        self.ends: dict[str, list[float]] = {"clock": [], "processor": []}

    def on_step_end(self, args, state, control, **kwargs):
        self.ends["clock"].append(time.perf_counter())
        self.ends["processor"].append(time.process_time())

    def medians(self) -> dict[str, float]:
        """Median seconds of the steps after the warm-up."""
        return {
            name: statistics.median(end - start for start, end in itertools.pairwise(ends[WARM_UP:]))
            for name, ends in self.ends.items()
        }


def as_film(path: Path) -> None:
    """Replace a clip of the tiny corpus by a clip in MELD's format that loops it, with added noise."""
    grain = np.random.default_rng(0).normal(0, 2, (10, FILM_SIZE[1], FILM_SIZE[0], 1))
    large = np.stack([Image.fromarray(frame).resize(FILM_SIZE) for frame in read_video(path, num_frames=len(grain))])
    pictures = (large + grain).clip(0, 255).astype(np.uint8)
    sound = np.resize(read_audio(path, FILM_SOUND), round(FILM_SECONDS * FILM_SOUND))
    film = path.with_suffix(".film.mp4")
    with av.open(str(film), "w") as container:
        video = container.add_stream("libx264", rate=FILM_RATE, options={"preset": "ultrafast", "threads": "1"})
        video.width, video.height, video.pix_fmt, video.bit_rate = *FILM_SIZE, "yuv420p", 1_500_000
        audio = container.add_stream("aac", rate=FILM_SOUND, layout="stereo")
        for picture in islice(cycle(pictures), round(FILM_SECONDS * FILM_RATE)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        for start in range(0, len(sound), 1024):
            samples = np.stack([sound[start : start + 1024]] * 2).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = FILM_SOUND, start, Fraction(1, FILM_SOUND)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    film.replace(path)


def write_inputs(root: Path, dialogues: int, clips: str) -> None:
    """Write a corpus of clips to `root/data`, and the four parts of a model to `root/parts`."""
    write_corpus(root / "recordings", num_dialogues={"train": dialogues, "validation": 2, "test": 2}, progress=False)
    if clips == "film":
        for path in tqdm(sorted((root / "recordings" / "clips").glob("*.mp4")), "films", unit="film"):
            as_film(path)
    prepare_folder(root / "recordings", root / "data", progress=False)
    write_parts(root / "parts")


def write_parts(parts: Path) -> PreTrainedTokenizerBase:
    """Write the four parts of a model of the tiny preset with random weights, and return the text tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_text_tokenizer(prompt_texts())
    for name, model, preprocessor in (
        ("text", Qwen2ForCausalLM(tiny_text_config(tokenizer)), tokenizer),
        ("vision", CLIPVisionModel(vision_config()), image_processor()),
        ("audio", WhisperForConditionalGeneration(audio_config()), feature_extractor()),
    ):
        model.save_pretrained(parts / name)
        preprocessor.save_pretrained(parts / name)
    write_memory_encoder(build_memory_tokenizer(prompt_texts()), parts / "memory")
    return tokenizer


def recipe(root: Path, steps: int) -> list[str]:
    """Return the training arguments for stage `emotion` of the tiny preset, with the inputs in `root`."""
    arguments = ["--config", str(RECIPE), "--dataset_name", str(root / "data"), "--output_dir", str(root / "run")]
    for part in train.PART_NAMES:
        arguments += [f"--{part}", str(root / "parts" / part)]
    arguments += ["--max_steps", str(steps + WARM_UP + 1), "--dataloader_num_workers", "0", "--use_cpu", "True"]
    return [*arguments, "--disable_tqdm", "True", "--logging_steps", "1", "--eval_strategy", "no"]


def train_stage(arguments: list[str]) -> tuple[dict[str, float], list[float]]:
    """Train stage `emotion`; return the median seconds per step and all losses."""
    script, args, model_args = train.parse(arguments)
    set_seed(args.seed)
    model, processor, _ = train.build_model(script, model_args)
    freeze_for_stage(model, script.stage)
    trainer = train.supervised_trainer(script, args, train.supervised_data(script, args), model, processor)
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.medians(), [log["loss"] for log in trainer.state.log_history if "loss" in log]


def measure(root: Path, steps: int, dialogues: int, draws: int, clips: str) -> dict:
    """Train from media and then from the cache, on one kind of clips."""
    write_inputs(root, dialogues, clips)
    arguments = [*recipe(root, steps), "--frame_draws", str(draws)]
    cache = ["--feature_cache", str(root / "features")]
    start = time.perf_counter()
    report = prepare_features.main([*arguments, *cache])
    preparing = time.perf_counter() - start
    seconds, losses = {}, {}
    for name, more in (("media", []), ("cache", cache)):
        seconds[name], losses[name] = train_stage([*arguments, *more])
    return {
        "seconds_a_step": seconds,
        "ratio": {name: seconds["media"][name] / seconds["cache"][name] for name in ("clock", "processor")},
        "largest_difference_of_a_loss": max(abs(a - b) for a, b in zip(losses["media"], losses["cache"], strict=True)),
        "steps": steps,
        "clips": report["cached"],
        "frame_draws": draws,
        "seconds_to_fill_the_cache": preparing,
        "cache_bytes": sum(path.stat().st_size for path in (root / "features").glob("*.safetensors")),
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write the results; return them."""
    parser = argparse.ArgumentParser(
        description="Stage emotion of the tiny preset: seconds per step from media and from the feature cache.",
        epilog="example:\n  python -m empathic.benchmarks.feature_cache --output runs/benchmarks/feature_cache.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="runs/benchmarks/feature_cache.json", help="JSON file (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each run (%(default)s)")
    parser.add_argument("--dialogues", type=int, default=12, help="dialogues, with about 3 clips each (%(default)s)")
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=CLIPS, help="kinds of clips (default: both)")
    parser.add_argument("--draws", type=int, default=4, help="random frame draws per clip (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    result = {}
    for clips in options.clips:
        with tempfile.TemporaryDirectory() as root, redirect_stdout(sys.stderr):
            result[clips] = measure(Path(root), options.steps, options.dialogues, options.draws, clips)
    result["machine"] = describe_machine()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for clips in options.clips:
        for name, value in result[clips]["seconds_a_step"].items():
            milliseconds = {kind: f"{1000 * seconds:.0f} ms" for kind, seconds in value.items()}
            print(f"{clips}, {name}: {milliseconds['clock']} per step, {milliseconds['processor']} of CPU time")
        ratio = result[clips]["ratio"]
        print(f"{clips}: ratio {ratio['clock']:.1f}, in CPU time {ratio['processor']:.1f}")
    print(f"All results are in {options.output}.")
    return result


if __name__ == "__main__":
    main()
