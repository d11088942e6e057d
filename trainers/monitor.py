"""What can be seen of a run: its speed and memory, how long it will take, replies at each evaluation, bad samples."""

import json
import os
import random
import re
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, is_deepspeed_zero3_enabled
from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORE = -100  # the label of a token that is no target
MEASURED_STEPS = 3  # that the time estimate rests on; the step before them is slow and does not count
SAMPLES_FILE = "samples.jsonl"
SHOWN = ("prompt", "history", "target", "reply")


def say(text: str) -> None:
    """Prints past the progress bars."""
    tqdm.write(text)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min` or `2 d 3 h`."""
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
    """On CUDA the most that this process has held on one device, else what the process holds of main memory; in GiB."""
    if device.type == "cuda":
        held = max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    else:
        held = psutil.Process().memory_info().rss
    return held / 2**30


@contextmanager
def kept_random_state():
    """Whatever is drawn inside, the random numbers after it are those that would have come without it."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """The model in evaluation mode; afterwards each of its modules is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Meter(TrainerCallback):
    """
    Measures optimizer steps: from asking for their batches to the end of the update. Evaluation and saving lie between
    the steps and are not measured.

    `step_seconds` holds the first steps after the start, of which the first is slow.
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
        """Counts a batch of either collator: its tokens and samples, as `rates` describes them."""
        is_sample = (batch["labels"] != IGNORE).any(1)
        # On the batch's device and not read before the next log, so that nothing waits for it.
        self._tokens = self._tokens + (batch["attention_mask"].sum(1) * is_sample).sum()
        sequences = 2 if "row_ids" in batch else 1  # chosen and rejected of a pair
        self._samples = self._samples + is_sample.sum() / sequences

    def on_step_end(self, args, state, control, **kwargs):
        seconds = perf_counter() - self._start
        self._seconds += seconds
        if len(self.step_seconds) > MEASURED_STEPS:
            return
        self.step_seconds.append(seconds)
        left = state.max_steps - state.global_step
        if len(self.step_seconds) > MEASURED_STEPS and left > 0 and state.is_world_process_zero:
            time = duration(left * sum(self.step_seconds[1:]) / MEASURED_STEPS)
            say(f"about {time} for the {left:,} steps that are left, evaluation and saving not counted")

    def rates(self, accelerator, device: torch.device) -> dict[str, float]:
        """
        The averages since the last call, over all ranks; every rank calls it.

        Returns:
            `tokens_per_second`: positions of the language model's input, one for each piece of text, each audio and
            video query and each memory vector, of prompts and replies (of a pair both sequences); no padding.
            `samples_per_second`: samples, or pairs. Both count only what has a target, not what was left out.
            `memory_gib`: see the function; the largest of the ranks.
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


class Monitored:
    """
    Mixin over `Trainer`, before it and `EPOTrainer`, for the batches of `StageCollator` and `PreferenceCollator`.

    Every training log has the averages of `Meter.rates`; an estimate of the time is printed once; and each evaluation
    ends with greedy replies to a few fixed samples: printed, appended to `samples.jsonl` in the output folder, given to
    TensorBoard, Weights & Biases and Trackio where they are on. An evaluation leaves the random state as it was, so
    that a run with it has the same losses as a run without.

    Attributes:
        log_samples: how many samples are replied to; 0: none.
        log_samples_tokens: tokens of a reply at most.
    """

    log_samples = 0
    log_samples_tokens = 64

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = Meter()
        self.add_callback(self.meter)
        self._shown_samples: list[tuple[dict, str]] | None = None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.meter.begin_step()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.meter.count(batch)
        return batches, items

    def log(self, logs, start_time=None):
        if "loss" in logs:  # the training loop's own; all ranks come here together
            logs = {**logs, **self.meter.rates(self.accelerator, self.args.device)}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        with kept_random_state():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if eval_dataset is None and self.log_samples > 0:
                self._show_replies()
        return metrics

    # ---- Replies ----

    def _show_replies(self) -> None:
        if self._shown_samples is None:  # the same ones each time, spread over the set; their clips are decoded once
            rows = self.eval_dataset
            number = min(self.log_samples, len(rows))
            found = (self.data_collator.prompt_and_target(rows[i * len(rows) // number]) for i in range(number))
            self._shown_samples = [sample for sample in found if sample is not None]
        replies = self._replies([prompt for prompt, _ in self._shown_samples])
        if not self.is_world_process_zero():
            return
        samples = []
        for number, ((prompt, target), reply) in enumerate(zip(self._shown_samples, replies, strict=True), start=1):
            texts = dict(zip(SHOWN, (*self._texts(prompt), target, reply), strict=True))
            samples.append({"step": self.state.global_step, "sample": number, **texts})
        os.makedirs(self.args.output_dir, exist_ok=True)
        with open(Path(self.args.output_dir, SAMPLES_FILE), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        for sample in samples:
            lines = [f"step {sample['step']}, sample {sample['sample']}"]
            say("\n  ".join([*lines, *(f"{name}: {sample[name]}" for name in SHOWN if sample[name])]))
        self._report(samples)

    @torch.no_grad()
    def _replies(self, prompts: list[dict]) -> list[str]:
        """Greedy replies. Every rank replies to all samples: where weights are sharded, each needs the others."""
        processor, replies, size = self.processing_class, [], self.args.per_device_eval_batch_size
        sharded = is_deepspeed_zero3_enabled() or self.is_fsdp_enabled
        with evaluation_mode(self.model), self.accelerator.autocast():
            for start in range(0, len(prompts), size):
                inputs = self._prepare_inputs(dict(processor.pad(prompts[start : start + size], padding_side="left")))
                output = self.model.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.log_samples_tokens,
                    synced_gpus=sharded and self.accelerator.num_processes > 1,
                )
                new = output[:, inputs["input_ids"].shape[1] :]
                replies += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        return replies

    def _texts(self, prompt: dict) -> tuple[str, str]:
        """The text of a prompt, with runs of a placeholder written as `<...> x32`, and that of its memory."""
        processor = self.processing_class
        text = processor.tokenizer.decode(prompt["input_ids"])
        for token in (processor.video_token, processor.audio_token):
            text = re.sub(f"(?:{re.escape(token)}){{2,}}", lambda run, t=token: f"{t} x{len(run[0]) // len(t)}", text)
        return text.strip(), processor.memory_tokenizer.decode(prompt["memory_input_ids"])

    def _report(self, samples: list[dict]) -> None:
        columns = ["step", "sample", *SHOWN]
        rows = [[sample[column] for column in columns] for sample in samples]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for sample in samples:
                    text = "\n\n".join(f"**{name}**: {sample[name]}" for name in SHOWN if sample[name])
                    callback.tb_writer.add_text(f"samples/{sample['sample']}", text, sample["step"])
                callback.tb_writer.flush()
            elif isinstance(callback, WandbCallback):
                import wandb

                table = wandb.Table(columns=columns, data=rows)
                wandb.log({"samples": table, "train/global_step": self.state.global_step})
            elif isinstance(callback, TrackioCallback):
                import trackio

                table = trackio.Table(columns=columns, data=rows)
                trackio.log({"samples": table, "train/global_step": self.state.global_step})


class NamedSamples:
    """
    Mixin over `Trainer` for the batches of `StageCollator`, whose samples have names: a loss that is not finite stops
    the run with the names of its batch, and samples that were left out are reported.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._left_out: set[str] = set()
        self._trained_samples = 0

    def train(self, *args, **kwargs):
        """As in transformers."""
        self._left_out, self._trained_samples = set(), 0
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._trained_samples += len(batch["sample_ids"])
            for name, reason in batch["left_out"]:
                if name not in self._left_out:
                    logger.warning("%s is left out of training: %s", name, reason)
                    self._left_out.add(name)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        As in transformers; 0 for a batch without a target, all of whose samples were left out.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the step and the samples of the batch are named.
        """
        names = inputs["sample_ids"]
        inputs = {k: v for k, v in inputs.items() if k not in ("sample_ids", "sample_places", "left_out")}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not names:  # a mean over nothing
            loss = torch.nan_to_num(loss)
        if not torch.isfinite(loss.detach()).all():
            raise FloatingPointError(
                f"The loss is NaN or infinite at step {self.state.global_step}, in the batch of the samples "
                f"{', '.join(names)}; the cause is one of them or the weights. Look at these samples, lower the "
                "learning rate, or train in bf16 or fp32 instead of fp16."
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs or "train_loss" in logs:  # all ranks come here together
            left_out = set(gather_object(sorted(self._left_out)))
            if left_out and sum(gather_object([self._trained_samples])) == 0:
                raise ValueError(f"Every sample so far was left out, {len(left_out)} different ones; see the warnings.")
            # The summary at the end of training; here and not after it, because then the reporters have closed.
            if left_out and "train_loss" in logs:
                logs["left_out_samples"] = len(left_out)
                if self.is_world_process_zero():
                    logger.warning("%d different samples were left out of training.", len(left_out))
        super().log(logs, start_time)
