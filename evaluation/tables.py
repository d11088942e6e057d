"""What the stages taught: emotion accuracy (Fig. 6), replies and rewards (Table 2)."""

from pathlib import Path

from empathic.evaluation.generation import generate_texts
from empathic.evaluation.metrics import accuracy, dist_1, emotion_score
from empathic.trainers.epo_config import EPOConfig
from empathic.trainers.epo_trainer import EPOTrainer
from empathic.trainers.samples import clip_message

# Rows of Fig. 6: text always, media on top.
EMOTION_SETTINGS = {"T": (), "AT": ("audio",), "VT": ("video",), "AVT": ("audio", "video")}


def emotion_table(model, processor, rows, batch_size: int = 64) -> dict[str, float]:
    """
    Accuracy of the emotion named for labelled turn rows, from the sentence alone and with sound, picture or both.

    Args:
        rows: turn rows with an emotion, a sentence, sound and picture.
    """
    expected = [row["emotion"] for row in rows]
    table = {}
    for setting, modalities in EMOTION_SETTINGS.items():
        conversations = [[clip_message(row, modalities)] for row in rows]
        answers = generate_texts(
            model, processor, conversations, "emotion", max_new_tokens=8, batch_size=batch_size, description=setting
        )
        table[setting] = accuracy(answers, expected)["accuracy"]
    return table


def reply_row(replies: list[str], references: list[str], features) -> dict[str, float]:
    """EmotionScore and Dist-1 of replies (Sec. 4.4); a reply that is empty scores 0 in both."""
    given = [(reply, reference) for reply, reference in zip(replies, references, strict=True) if reply]
    if not given:
        return {"emotion_score": 0.0, "dist1": 0.0}
    share = len(given) / len(replies)
    said, expected = map(list, zip(*given, strict=True))
    return {"emotion_score": share * emotion_score(said, expected, features), "dist1": share * dist_1(said)}


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
