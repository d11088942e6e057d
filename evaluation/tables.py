"""Tables of text, and the rows of the quickstart: replies and rewards (Table 2)."""

from pathlib import Path

from empathic.evaluation.metrics import dist_1, emotion_score
from empathic.trainers.epo_config import EPOConfig
from empathic.trainers.epo_trainer import EPOTrainer


def table(header: list[str], rows: list[list]) -> str:
    """A plain text table; numbers with three places."""
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
    """`{"mean", "low", "high"}` as text, the ends where there are any: `0.412 [0.398, 0.430]`."""
    ends = "" if values["low"] is None else f" [{values['low']:.3f}, {values['high']:.3f}]"
    return f"{values['mean']:.3f}{ends}{mark}"


def reply_row(replies: list[str], references: list[str], features) -> dict[str, float]:
    """EmotionScore and Dist-1 of replies (Sec. 4.4); a reply that is empty scores 0 in both."""
    return {
        "emotion_score": emotion_score(replies, references, features, allow_empty=True),
        "dist1": dist_1(replies, allow_empty=True),
    }


def reward_row(model, processor, pairs, output_dir: str | Path, batch_size: int = 16) -> dict[str, float]:
    """
    How often, and by how much, the reward of Eq. 1 prefers the true reply of preference rows.

    Args:
        pairs: preference rows of held-out conversations.
        output_dir: scratch folder of the trainer.
    """
    arguments = EPOConfig(
        output_dir=str(output_dir), per_device_eval_batch_size=batch_size, report_to="none", disable_tqdm=True
    )
    trainer = EPOTrainer(model=model, args=arguments, eval_dataset=pairs, processing_class=processor)
    metrics = trainer.evaluate()
    return {"reward_accuracy": metrics["eval_rewards/accuracies"], "margin": metrics["eval_rewards/margins"]}
