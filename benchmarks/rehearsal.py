"""
Full-size rehearsal: stages `memory_multi`, `dialogue` and `epo` on random weights of the public models' sizes.

    python -m empathic.benchmarks.rehearsal --preset qwen2.5-7b --output runs/benchmarks/rehearsal.json

Each stage runs optimizer steps of its real trainer, with the recipe's freezing, LoRA, batch size and activation
checkpointing, on random batches of given shapes. The report has the peak of the allocated memory, seconds per step,
tokens per second and model FLOPs utilization. Without a GPU, or with --plan, the rehearsal only prints its plan: the
trained parameters, the estimated memory, and the largest batch for each size of GPU.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, TrainerCallback, set_seed

from ..trainers.epo_config import EPOConfig
from ..trainers.epo_trainer import EPOTrainer
from ..trainers.stage_trainer import StageTrainer
from ..trainers.stages import LORA_STAGES, StageConfig
from .flops import model_flops, peak_tflops
from .machine import describe_machine
from .memory_plan import GIB, SIZES, LiveMemory, largest_batches, parameters_by_part, plan
from .shapes import Shapes, build, make_batch, prepare, preset_config
from .step_costs import CPU_ATTENTION

RECIPES = Path(__file__).parent.parent / "recipes"
STAGES = ("memory_multi", "dialogue", "epo")
WARM_UP = 2  # steps that are not timed, because first calls allocate memory and select kernels
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}  # placeholder for a preference row; the tensors are random


def read_recipe(preset: str, stage: str) -> dict:
    """Read the stage's recipe, with defaults filled in."""
    recipe = yaml.safe_load((RECIPES / preset / f"{stage}.yaml").read_text(encoding="utf-8"))
    if stage == "epo":  # it continues with the adapter of the dialogue stage
        dialogue = read_recipe(preset, "dialogue")
        recipe |= {key: value for key, value in dialogue.items() if key.startswith("lora_")}
    return {"activation_checkpointing": False, "bf16": False, "dtype": "float32", **recipe}


class Numbers(Dataset):
    """Placeholder data set of row numbers: the collator makes the batch."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {**PAIR, "number": index}


class StepMeter(TrainerCallback):
    """
    Measures the seconds of each step, forward to update, with the device synchronized before and after. One further
    step counts operations, and on a CPU another step records live tensors. These are separate steps because the hooks
    of the operation counter keep tensors that checkpointing would free.
    """

    def __init__(self, model, steps: int):
        self.model, self.steps = model, steps
        self.seconds: list[float] = []
        self.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        self.live: LiveMemory | None = None
        self._start = 0.0

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self._wait()
        if state.global_step == self.steps:
            self.counter.__enter__()
        elif state.global_step > self.steps and self.model.device.type == "cpu":
            held = [*self.model.parameters(), *self.model.buffers()]
            states = [value for entry in optimizer.state.values() for value in entry.values()]
            self.live = LiveMemory([*held, *(value for value in states if torch.is_tensor(value))])
            self.live.__enter__()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._wait()
        if state.global_step <= self.steps:
            self.seconds.append(time.perf_counter() - self._start)
        elif state.global_step == self.steps + 1:
            self.counter.__exit__(None, None, None)
        elif self.live is not None:
            self.live.__exit__(None, None, None)


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """Build a minimal tokenizer, because EPOTrainer requires one; the random batches do not use it."""
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="x", pad_token="x")


def make_trainer(model, stage: str, recipe: dict, options: argparse.Namespace, shapes: Shapes, folder: str):
    """Build the stage's trainer on random batches."""
    steps = WARM_UP + options.steps + 2  # the last two steps count operations and live tensors, and are slower
    kind, trainer = (EPOConfig, EPOTrainer) if stage == "epo" else (StageConfig, StageTrainer)
    args = kind(
        output_dir=folder,
        per_device_train_batch_size=shapes.batch_size,
        max_steps=steps,
        learning_rate=float(recipe["learning_rate"]),
        bf16=options.dtype == "bfloat16",
        activation_checkpointing=options.activation_checkpointing[stage],
        use_cpu=options.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=options.device != "cpu",
    )
    if args.activation_checkpointing and stage in LORA_STAGES:
        model.enable_input_require_grads()
    config = model.config

    def collate(rows: list[dict]) -> dict:
        return make_batch(config, stage, shapes, seed=rows[0]["row_id"] if "row_id" in rows[0] else rows[0]["number"])

    more = {"processing_class": stand_in_tokenizer()} if stage == "epo" else {}
    numbers = Numbers(steps * shapes.batch_size)
    return trainer(model=model, args=args, train_dataset=numbers, data_collator=collate, **more)


def measure(stage: str, recipe: dict, options: argparse.Namespace, shapes: Shapes) -> dict:
    """Build the model on the device, train it for some steps, and return the measurements."""
    set_seed(0)
    is_cuda = options.device != "cpu"
    model = prepare(build(options.config, getattr(torch, options.dtype), options.device), stage, recipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, stage, recipe, options, shapes, folder)
        meter = StepMeter(model, WARM_UP + options.steps)
        trainer.add_callback(meter)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        loss = trainer.train().training_loss
    seconds = statistics.median(meter.seconds[WARM_UP:])
    needed = sum(model_flops(model, stage, shapes).values())
    peak = options.peak_tflops or (peak_tflops(torch.cuda.get_device_name()) if is_cuda else None)
    return {
        "training_loss": loss,
        "seconds_per_step": seconds,
        "step_seconds": meter.seconds,
        "tokens_per_second": shapes.positions(stage) / seconds,
        "target_tokens_per_second": shapes.rows(stage) * shapes.target(stage) / seconds,
        "peak_memory_gib": (torch.cuda.max_memory_allocated() if is_cuda else meter.live.peak) / GIB,
        "reserved_memory_gib": torch.cuda.max_memory_reserved() / GIB if is_cuda else None,
        "model_tflops_per_step": needed / 1e12,
        "counted_tflops_per_step": meter.counter.get_total_flops() / 1e12,
        "peak_tflops": peak,
        "mfu": None if peak is None else needed / seconds / (peak * 1e12),
    }


def try_to_measure(stage: str, recipe: dict, options: argparse.Namespace, shapes: Shapes) -> dict:
    """Measure a stage; running out of memory is returned as a result."""
    try:
        return measure(stage, recipe, options, shapes)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    finally:
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the options; add `config`, `recipes` and `activation_checkpointing` by stage."""
    parser = argparse.ArgumentParser(prog="python -m empathic.benchmarks.rehearsal", description=__doc__.split("\n")[1])
    parser.add_argument("--preset", choices=("qwen2.5-7b", "qwen2.5-0.5b", "tiny"), default="qwen2.5-7b")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch_size", type=int, help="Samples, or pairs in stage epo (default: the recipe's).")
    parser.add_argument("--turns", type=int, default=20, help="Earlier utterances per sample.")
    parser.add_argument("--sentence", type=int, default=30, help="Tokens of an utterance.")
    parser.add_argument("--reply", type=int, default=40, help="Tokens of a reply.")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="Dtype of the frozen weights (default: the recipe's)."
    )
    parser.add_argument("--steps", type=int, default=5, help="Timed steps.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="Checkpoint activations (default: the recipe's)."
    )
    parser.add_argument("--peak_tflops", type=float, help="The device's dense bf16 peak, if it is unknown.")
    parser.add_argument("--plan", action="store_true", help="Only print the plan.")
    parser.add_argument("--output", type=Path, help="JSON file for the results.")
    options = parser.parse_args(argv)
    for name in ("turns", "sentence", "reply", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.batch_size is not None and options.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {options.batch_size}")
    options.config = preset_config(options.preset)
    options.recipes = {stage: read_recipe(options.preset, stage) for stage in options.stages}
    asked = options.checkpointing
    options.activation_checkpointing = {
        stage: recipe["activation_checkpointing"] if asked is None else asked
        for stage, recipe in options.recipes.items()
    }
    options.dtype = options.dtype or next(iter(options.recipes.values()))["dtype"]
    return options


def shapes_of(stage: str, options: argparse.Namespace) -> Shapes:
    """The shapes of the stage's batch; the default batch size is the recipe's."""
    size = options.batch_size or options.recipes[stage]["per_device_train_batch_size"]
    config = options.config
    return Shapes(
        size,
        turns=options.turns,
        sentence=options.sentence,
        reply=options.reply,
        queries=config.num_query_tokens,
        frames=config.num_frames,
    )


def plan_stage(stage: str, options: argparse.Namespace) -> dict:
    """Compute parameters by part, estimated memory and largest batches, from a model without storage."""
    model = prepare(build(options.config, getattr(torch, options.dtype), "meta"), stage, options.recipes[stage])
    shapes, width = shapes_of(stage, options), 2 if options.dtype == "bfloat16" else 4
    checkpointing = options.activation_checkpointing[stage]
    how = {"checkpointing": checkpointing, "width": width, "device": options.device}
    fits = {
        "recipe": largest_batches(model, stage, shapes, **how),
        "4-bit": largest_batches(model, stage, shapes, **how, in_4bit=True),
    }
    return {
        "batch_size": shapes.batch_size,
        "rows": shapes.rows(stage),
        "length": shapes.length(stage),
        "memory_length": shapes.memory_length,
        "targets_per_row": shapes.target(stage),
        "activation_checkpointing": checkpointing,
        "parameters": parameters_by_part(model),
        "estimated_gib": plan(model, stage, shapes, **how).record(),
        "estimated_gib_4bit": plan(model, stage, shapes, **how, in_4bit=True).record(),
        "largest_batch": fits,
        "model_tflops_per_step": sum(model_flops(model, stage, shapes).values()) / 1e12,
    }


def describe(stage: str, planned: dict) -> str:
    """Describe the plan of a stage."""
    lines = [
        f"{stage}: {planned['rows']} rows of {planned['length']} positions ({planned['targets_per_row']} targets), "
        f"{planned['memory_length']} memory tokens each; activation checkpointing "
        f"{'on' if planned['activation_checkpointing'] else 'off'}; "
        f"{planned['model_tflops_per_step']:.3g} model TFLOPs per step"
    ]
    for part, count in planned["parameters"].items():
        lines.append(f"  {part:15} trained {count['trained']:>13,}   frozen {count['frozen']:>13,}")
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in planned["estimated_gib"].items())
    lines.append(f"  estimated GiB: {parts}; with a 4-bit language model {planned['estimated_gib_4bit']['total']:.2f}")
    return "\n".join(lines)


def table(stages: dict[str, dict]) -> str:
    """Format a Markdown table of the largest batch that fits, by stage and size of GPU."""
    lines = ["| stage | language model | " + " | ".join(SIZES) + " |", "|" + "---|" * (2 + len(SIZES))]
    for stage, planned in stages.items():
        for kind, label in (("recipe", "as loaded"), ("4-bit", "4-bit")):
            cells = [str(size) if size else "no" for size in planned["largest_batch"][kind].values()]
            lines.append(f"| `{stage}` | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Print the plan, measure if possible, and return and write both."""
    options = parse(argv)
    results = {
        "command": " ".join(["python -m empathic.benchmarks.rehearsal", *(sys.argv[1:] if argv is None else argv)]),
        "preset": options.preset,
        "settings": {
            **{name: getattr(options, name) for name in ("turns", "sentence", "reply", "dtype", "steps", "device")},
            "lora": {key: value for key, value in read_recipe(options.preset, "dialogue").items() if "lora" in key},
        },
        "machine": describe_machine(options.device),
        "plan": {stage: plan_stage(stage, options) for stage in options.stages},
        "measured": {},
    }
    print(f"Plan of preset {options.preset}; all figures except the numbers of parameters are estimates.\n")
    print("\n".join(describe(stage, planned) for stage, planned in results["plan"].items()))
    print(f"\nLargest batch that should fit on {', '.join(SIZES)} (estimated):\n\n{table(results['plan'])}\n")

    has_device = options.device == "cpu" or torch.cuda.is_available()
    if options.plan or not has_device:
        print("Nothing was measured: " + ("--plan." if options.plan else "there is no GPU here."))
    else:
        for stage in options.stages:
            found = try_to_measure(stage, options.recipes[stage], options, shapes_of(stage, options))
            results["measured"][stage] = found
            if "out_of_memory" in found:
                print(f"{stage}: out of memory ({found['out_of_memory']})")
                continue
            mfu = "unknown (give --peak_tflops)" if found["mfu"] is None else f"{found['mfu']:.1%}"
            print(
                f"{stage}: measured peak {found['peak_memory_gib']:.2f} GiB, {found['seconds_per_step']:.3f} s/step, "
                f"{found['tokens_per_second']:.0f} tokens/s, model FLOPs utilization {mfu}"
            )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
