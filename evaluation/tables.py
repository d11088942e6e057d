"""Plain text tables, and the rows of the quickstart: replies and rewards (Table 2)."""

from collections.abc import Mapping
from pathlib import Path

from ..trainers.epo_config import EPOConfig
from ..trainers.epo_trainer import EPOTrainer
from .metrics import dist_1, emotion_score


def table(header: list[str], rows: list[list]) -> str:
    """Format a plain text table; floats have three decimal places."""
    cells = [header] + [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    numeric = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 or not numeric[i] else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def with_interval(values: dict, mark: str = "") -> str:
    """Format `{"mean", "low", "high"}` as `0.412 [0.398, 0.430]`, or as the mean alone if there is no interval."""
    ends = "" if values["low"] is None else f" [{values['low']:.3f}, {values['high']:.3f}]"
    return f"{values['mean']:.3f}{ends}{mark}"


def reply_row(replies: list[str], references: list[str], features) -> dict[str, float]:
    """EmotionScore and Dist-1 of replies (Sec. 4.4); an empty reply scores 0 in both."""
    return {
        "emotion_score": emotion_score(replies, references, features, allow_empty=True),
        "dist1": dist_1(replies, allow_empty=True),
    }


def preference_metrics(
    model, processor, pairs, output_dir: str | Path, batch_size: int = 16, history: str = "memory"
) -> dict[str, float]:
    """
    Evaluate preference rows with the default settings of EPO (`beta` 2); return the trainer's metrics, such as
    `eval_rewards/margins`, and `eval_logps/rejected` in nats per token.

    Args:
        pairs: preference rows of held-out conversations.
        output_dir: scratch folder for the trainer.
        history: how the prompts have the earlier turns, "memory" or "text".
    """
    arguments = EPOConfig(
        output_dir=str(output_dir),
        per_device_eval_batch_size=batch_size,
        history=history,
        report_to="none",
        disable_tqdm=True,
    )
    return EPOTrainer(model=model, args=arguments, eval_dataset=pairs, processing_class=processor).evaluate()


def reward_row(
    model, processor, pairs, output_dir: str | Path, batch_size: int = 16, history: str = "memory"
) -> dict[str, float]:
    """
    Compute how often, and by what margin, the reward of Eq. 1 prefers the true reply. Arguments as in
    `preference_metrics`.
    """
    metrics = preference_metrics(model, processor, pairs, output_dir, batch_size, history)
    return {"reward_accuracy": metrics["eval_rewards/accuracies"], "margin": metrics["eval_rewards/margins"]}


def reply_warnings(name: str, system: Mapping, effect: str) -> list[str]:
    """
    Return the warnings about a system's empty replies and notes.

    Args:
        name: the system's name.
        system: its results, with `empty` (a number) and `notes`.
        effect: what an empty reply means for the scores.
    """
    lines = []
    if system["empty"]:
        lines.append(f"WARNING: {system['empty']} replies of {name} are empty; {effect}.")
    if system["notes"]:
        found = system["notes"][0]
        lines.append(
            f"WARNING: {len(system['notes'])} replies of {name} have a note, such as {found['id']}: {found['note']}"
        )
    return lines
