"""Monitoring of a run: speed, memory, a time estimate, and replies to sample prompts at each evaluation."""

import json
import os
import random
import re
import weakref
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..files import write_text
from ..sampling import plain_decoding
from ..thoughts import WrittenDecoder
from .losses import IGNORE_INDEX

logger = logging.get_logger(__name__)

MEASURED_STEPS = 3  # used for the time estimate; the slow first step does not count
SAMPLES_FILE = "samples.jsonl"
SHOWN_FIELDS = ("prompt", "history", "target", "reply")


def say(text: str) -> None:
    """Print without breaking the progress bars."""
    tqdm.write(text)


def duration(seconds: float) -> str:
    """Format a duration as `45 s`, `12 min`, `3 h 20 min` or `2 d 3 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def memory_gib(device: torch.device) -> float:
    """Memory of this process in GiB: the peak on a CUDA device (maximum over devices), elsewhere its main memory."""
    if device.type == "cuda":
        held = max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    else:
        held = psutil.Process().memory_info().rss
    return held / 2**30


@contextmanager
def kept_random_state():
    """A context that restores the random states at its end, so that draws inside it do not affect later draws."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """A context with the model in evaluation mode; it restores the mode of each module at its end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def add_samples(path: Path, samples: list[dict]) -> None:
    """
    Add the samples of a step to a JSONL file. Samples from this step on are replaced: they are of a run that was killed
    and resumed from an earlier step, or of other weights at the same step.
    """
    if not samples:
        return
    step, kept = samples[0]["step"], []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass  # the end of the file, or a line that a killed run did not finish
    lines = [*kept, *(json.dumps(sample, ensure_ascii=False) for sample in samples)]
    write_text(path, "".join(f"{line}\n" for line in lines))


class StepMeter(TrainerCallback):
    """
    Measures optimizer steps, from fetching their batches to the end of the update. Evaluation and saving are between
    the steps and are not measured.

    `step_seconds` has the times of the first few steps after the start; the very first step is slow.
    """

    def __init__(self):
        self.on_train_begin()

    def on_train_begin(self, *args, **kwargs):
        self.step_seconds: list[float] = []
        self._reset()

    def _reset(self) -> None:
        self._tokens, self._samples, self._seconds = 0, 0, 0.0

    def begin_step(self) -> None:
        self._start = perf_counter()

    def count(self, batch: dict) -> None:
        """Count the tokens and samples of a batch of either collator; `rates` describes what is counted."""
        is_sample = (batch["labels"] != IGNORE_INDEX).any(1)
        # Counts stay on the batch's device and are read only at the next log, to avoid synchronization.
        self._tokens = self._tokens + (batch["attention_mask"].sum(1) * is_sample).sum()
        samples = len(batch.get("row_ids", is_sample))  # the first sequences of pairs are the chosen replies
        self._samples = self._samples + is_sample[:samples].sum()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = perf_counter() - self._start
        self._seconds += seconds
        if len(self.step_seconds) > MEASURED_STEPS:
            return
        self.step_seconds.append(seconds)
        left = state.max_steps - state.global_step
        if len(self.step_seconds) > MEASURED_STEPS and left > 0 and state.is_world_process_zero:
            time = duration(left * sum(self.step_seconds[1:]) / MEASURED_STEPS)
            say(f"about {time} for the {left:,} remaining steps, without evaluation and saving")

    def rates(self, accelerator, device: torch.device) -> dict[str, float]:
        """
        Compute averages since the last call, over all ranks. Every rank must call it.

        Returns:
            `tokens_per_second`: input positions of the language model (text tokens, audio and video queries, and memory
            vectors) of prompts and replies, for a pair those of all its sequences, without padding.
            `samples_per_second`: samples or pairs. Both rates count only samples with a target, not those left out.
            `memory_gib`: see the function; the maximum over the ranks.
        """
        values = [float(value) for value in (self._tokens, self._samples, self._seconds, memory_gib(device))]
        self._reset()
        ranks = torch.tensor([values], dtype=torch.float64)
        if accelerator.num_processes > 1:
            ranks = accelerator.gather(ranks.to(device)).cpu()  # (ranks, 4)
        tokens, samples = ranks[:, :2].sum(0).tolist()
        seconds, memory = ranks[:, 2:].amax(0).tolist()
        if seconds == 0:
            return {"memory_gib": memory}
        return {"tokens_per_second": tokens / seconds, "samples_per_second": samples / seconds, "memory_gib": memory}


class Monitor:
    """
    Shows the progress of a trainer that uses the batches of `StageCollator` or `PreferenceCollator`.

    Every training log has the averages of `Meter.rates`, a time estimate is printed once, and each evaluation ends with
    greedy replies to a few fixed samples. The replies are printed, appended to `samples.jsonl` in the output folder,
    and reported to TensorBoard, Weights & Biases and Trackio if these are enabled.

    Args:
        trainer: the `PackedTrainer` that owns the monitor.
        samples: the number of samples that get a reply; 0 for none.
        tokens: the maximum length of a reply in tokens.
    """

    def __init__(self, trainer, samples: int = 0, tokens: int = 64):
        self.trainer = weakref.proxy(trainer)
        self.samples, self.tokens = samples, tokens
        self.meter = StepMeter()
        trainer.add_callback(self.meter)
        self.begin_step, self.count = self.meter.begin_step, self.meter.count
        self._shown: list[tuple[dict, str]] | None = None
        self._last_step: int | None = None

    def rates(self) -> dict[str, float]:
        """See `Meter.rates`."""
        return self.meter.rates(self.trainer.accelerator, self.trainer.args.device)

    # ---- Replies ----

    def show_replies(self) -> None:
        """Reply to the fixed samples of the evaluation set, and show the replies. Every rank must call it."""
        trainer, step = self.trainer, self.trainer.state.global_step
        # The evaluation after the last step repeats the one at this step, unless the best weights were loaded between.
        if self.samples <= 0 or (step == self._last_step and not trainer.args.load_best_model_at_end):
            return
        self._last_step = step
        if self._shown is None:  # the same samples each time, spread over the set; their clips are decoded once
            rows = trainer.eval_dataset
            number = min(self.samples, len(rows))
            found = (trainer.data_collator.prompt_and_target(rows[i * len(rows) // number]) for i in range(number))
            self._shown = [sample for sample in found if sample is not None]
        replies = self._replies([prompt for prompt, _ in self._shown])
        if not trainer.is_world_process_zero():
            return
        samples = []
        for number, ((prompt, target), reply) in enumerate(zip(self._shown, replies, strict=True), start=1):
            texts = dict(zip(SHOWN_FIELDS, (*self._texts(prompt), target, reply), strict=True))
            samples.append({"step": step, "sample": number, **texts})
        os.makedirs(trainer.args.output_dir, exist_ok=True)
        add_samples(Path(trainer.args.output_dir, SAMPLES_FILE), samples)
        for sample in samples:
            lines = [f"step {sample['step']}, sample {sample['sample']}"]
            say("\n  ".join([*lines, *(f"{name}: {sample[name]}" for name in SHOWN_FIELDS if sample[name])]))
        self._report(samples)

    @torch.no_grad()
    def _replies(self, prompts: list[dict]) -> list[str]:
        """Generate greedy replies. Every rank replies to all samples, because sharded weights need all ranks."""
        trainer, replies = self.trainer, []
        decode = WrittenDecoder(trainer.processing_class.tokenizer)
        processor, size = trainer.processing_class, trainer.args.per_device_eval_batch_size
        sharded = is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled
        with evaluation_mode(trainer.model), trainer.accelerator.autocast():
            for start in range(0, len(prompts), size):
                inputs = dict(processor.pad(prompts[start : start + size], padding_side="left"))
                inputs = trainer._prepare_inputs(inputs)
                output = trainer.model.generate(
                    **inputs,
                    **plain_decoding(max_new_tokens=self.tokens),
                    synced_gpus=sharded and trainer.accelerator.num_processes > 1,
                )
                new = output[:, inputs["input_ids"].shape[1] :]
                replies += [decode(ids).reply for ids in new.tolist()]
        return replies

    def _texts(self, prompt: dict) -> tuple[str, str]:
        """Return the text of a prompt, with runs of a placeholder shortened to `<...> x32`, and of its memory."""
        processor = self.trainer.processing_class
        text = processor.tokenizer.decode(prompt["input_ids"])
        for token in (processor.video_token, processor.audio_token):
            text = re.sub(f"(?:{re.escape(token)}){{2,}}", lambda run, t=token: f"{t} x{len(run[0]) // len(t)}", text)
        return text.strip(), processor.memory_tokenizer.decode(prompt["memory_input_ids"])

    def _report(self, samples: list[dict]) -> None:
        columns = ["step", "sample", *SHOWN_FIELDS]
        rows = [[sample[column] for column in columns] for sample in samples]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for sample in samples:
                    text = "\n\n".join(f"**{name}**: {sample[name]}" for name in SHOWN_FIELDS if sample[name])
                    callback.tb_writer.add_text(f"samples/{sample['sample']}", text, sample["step"])
                callback.tb_writer.flush()
            elif isinstance(callback, WandbCallback):
                import wandb

                table = wandb.Table(columns=columns, data=rows)
                wandb.log({"samples": table, "train/global_step": self.trainer.state.global_step})
            elif isinstance(callback, TrackioCallback):
                import trackio

                table = trackio.Table(columns=columns, data=rows)
                trackio.log({"samples": table, "train/global_step": self.trainer.state.global_step})
