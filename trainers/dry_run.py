"""`--dry_run`: run a few steps without writing results, and print the time and memory that a run needs."""

import tempfile

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .monitor import duration, say

STEPS = 2  # the first is slow, the second is measured
# The rows of the table, with substrings of their parameter names; the first match counts.
PARTS = {
    "adapter": (".lora_",),
    "vision": ("vision_tower.",),
    "audio": ("audio_tower.",),
    "Q-formers": ("_qformer.", "_query_tokens", "video_projector.", "audio_projector."),
    "memory": ("model.memory.",),
    "LLM": ("",),
}


class _StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= STEPS


def leave_no_trace(args) -> None:
    """Change `TrainingArguments` in place so that a trainer writes no files and reports to no service."""
    args.output_dir = tempfile.gettempdir()  # the Trainer creates its folder; this one exists
    args.report_to = []
    args.push_to_hub = False
    args.load_best_model_at_end = False
    args.save_strategy = SaveStrategy.NO


def count_parameters(model: nn.Module) -> dict[str, dict]:
    """
    Count the parameters of a model that is not sharded yet. Tied tensors count once.

    Returns:
        {part: {"trained", "frozen": numbers of parameters, "dtypes": their names}}.
    """
    table = {part: {"trained": 0, "frozen": 0, "dtypes": set()} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, marks in PARTS.items() if any(mark in name for mark in marks))
        table[part]["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
        table[part]["dtypes"].add(str(parameter.dtype).removeprefix("torch."))
    return table


def format_table(table: dict[str, dict]) -> str:
    """Format the counts, and their sums, as text."""
    lines = [("part", "trained", "frozen", "dtype")]
    for part, row in table.items():
        if row["dtypes"]:
            lines.append((part, f"{row['trained']:,}", f"{row['frozen']:,}", ", ".join(sorted(row["dtypes"]))))
    sums = (sum(row[column] for row in table.values()) for column in ("trained", "frozen"))
    lines.append(("all", *(f"{total:,}" for total in sums), ""))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{part:<{widths[0]}}  {trained:>{widths[1]}}  {frozen:>{widths[2]}}  {dtype}".rstrip()
        for part, trained, frozen, dtype in lines
    )


def dry_run(trainer) -> dict[str, float]:
    """
    Run two optimizer steps and print the trained parameters, the memory, and the time of the whole run.

    Args:
        trainer: a trainer with a monitor, built with the arguments of `leave_no_trace`.

    Returns:
        `seconds_per_step`, `memory_gib` (the maximum over the ranks) and `steps` of the whole run.
    """
    table = format_table(count_parameters(trainer.model))
    trainer.args.eval_strategy = IntervalStrategy.NO
    trainer.args.eval_on_start = False
    trainer.add_callback(_StopAfter)
    trainer.train()
    steps, seconds = trainer.state.max_steps, trainer.monitor.meter.step_seconds[-1]
    memory = trainer.monitor.rates()["memory_gib"]
    if trainer.is_world_process_zero():
        kind = "peak on a GPU" if trainer.args.device.type == "cuda" else "main memory of a process"
        say(f"\n{table}\n")
        say(f"memory     {memory:.2f} GiB ({kind})")
        say(f"a step     {seconds:.3g} s")
        say(f"whole run  about {duration(steps * seconds)} for {steps:,} steps, without evaluation and saving")
    return {"seconds_per_step": seconds, "memory_gib": memory, "steps": steps}
