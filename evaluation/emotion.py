"""
How often the emotion of a clip is named rightly, from text, sound and picture (paper's Fig. 6).

    empathic evaluate emotion runs/quickstart/emotion --data runs/quickstart/data --output runs/tables

OUT/emotion.json holds accuracy, each emotion's recall and the confusion of every row, OUT/emotion/ROW.jsonl the
answers. All rows are of the same clips: those that have a sentence, sound and picture.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.views import EmotionClips, is_there, says_something
from empathic.evaluation.dialogue import close_process, open_process
from empathic.evaluation.generation import answer, prepare_readable
from empathic.evaluation.metrics import accuracy
from empathic.evaluation.published import FIGURE_6
from empathic.evaluation.replies import conversation_of, read_replies, write_replies
from empathic.evaluation.results import versions, write_results
from empathic.evaluation.statistics_of_replies import (
    ADJUSTED,
    Draws,
    add_adjusted,
    compare_means,
    mean_interval,
    metric_interval,
)
from empathic.evaluation.systems import Checkpoint, Common, Reply
from empathic.evaluation.tables import table, with_interval
from empathic.trainers.samples import clip_message

# Rows of Fig. 6: the media that are shown, and whether the sentence is.
SETTINGS = {
    "T": ((), True),
    "A": (("audio",), False),
    "V": (("video",), False),
    "A+T": (("audio",), True),
    "V+T": (("video",), True),
    "A+V+T": (("audio", "video"), True),
}
QUICKSTART_SETTINGS = {"T": "T", "AT": "A+T", "VT": "V+T", "AVT": "A+V+T"}  # as results.json calls them
MAX_NEW_TOKENS = 8  # an emotion is one word


class EmotionSamples(EmotionClips):
    """
    The labelled clips that have a sentence, sound and picture, as samples: `prompt` (one message with all three),
    `reply` (the emotion), `emotion`, and the ids of the turn.

    Args:
        dataset: rows of the schema.

    `left_out` counts the labelled clips without one of the three.
    """

    def __init__(self, dataset: Dataset):
        super().__init__(dataset)
        labelled = len(self.places)
        whole = is_there(dataset, "audio") & is_there(dataset, "video") & says_something(dataset)
        self.places = self.places[whole[self.places]]
        self.left_out = labelled - len(self.places)

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        return {
            "prompt": [clip_message(row, ("audio", "video"))],
            "reply": row["emotion"],
            "emotion": row["emotion"],
            **{name: row[name] for name in ("corpus", "split", "dialogue_id", "turn")},
        }


class EmotionNamer:
    """
    Names the emotion of clips, as a `System` whose replies are the names.

    Args:
        name: of `SETTINGS`.
        checkpoint: a trained model. One that was trained without the sentence (`with_text` of its processor) is shown
            it all the same in the rows with T.
        batch_size: clips at once.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, batch_size: int = 64):
        self.name, self.checkpoint, self.batch_size = name, checkpoint, batch_size
        self.modalities, self.with_text = SETTINGS[name]

    @property
    def settings(self) -> dict:
        """See `System`."""
        return {
            "target": self.checkpoint.path,
            "identity": self.checkpoint.identity,
            "shown": [*self.modalities, *(["text"] if self.with_text else [])],
            "dtype": self.checkpoint.common.dtype,
            "batch_size": self.batch_size,
            "max_new_tokens": MAX_NEW_TOKENS,
        }

    def reply(self, samples: Sequence[dict], seeds: Sequence[int]) -> list[Reply]:
        """See `System`. A clip that cannot be read is left out, with a note; if nothing is left, no name is given."""
        answers = name_emotions(self.checkpoint.model, self.checkpoint.processor, samples, self.name)
        return [Reply(text, {"note": note} if note else {}) for text, note in answers]


def name_emotions(model, processor, samples: Sequence[dict], setting: str) -> list[tuple[str, str | None]]:
    """
    The emotion that the model names for each sample of one batch, and a note where a clip could not be read.

    Args:
        samples: of `EmotionSamples`.
        setting: of `SETTINGS`: what the model is shown.
    """
    modalities, with_text = SETTINGS[setting]
    shown = {*modalities, *(["text"] if with_text else [])}
    prepared = []
    for sample in samples:
        (message,) = sample["prompt"]
        seen = {**message, "content": [item for item in message["content"] if item["type"] in shown]}
        prepared.append(prepare_readable(processor, [seen], task="emotion", with_text=with_text))
    there = [inputs for inputs, _ in prepared if inputs is not None]
    texts = iter([found.text for found in answer(model, processor, there, MAX_NEW_TOKENS)] if there else [])
    return [("" if inputs is None else next(texts), note) for inputs, note in prepared]


def score_answers(rows: list[dict], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> dict:
    """
    Accuracy and mean recall with their intervals, each emotion's recall, and the confusion.

    Args:
        rows: of `read_replies`: `reply` is what was named, `reference` the true emotion.
        confidence, resamples, seed: of the bootstrap over conversations; the mean recall takes a tenth of the draws.
    """
    answers, expected = [row["reply"] for row in rows], [row["reference"] for row in rows]
    conversations = [conversation_of(row) for row in rows]
    found = accuracy(answers, expected)
    hits = _hits(rows)
    classes = np.array([EMOTIONS.index(emotion) for emotion in expected])

    def mean_recall(chosen: np.ndarray) -> float:
        total = np.bincount(classes[chosen], minlength=len(EMOTIONS))
        right = np.bincount(classes[chosen], weights=hits[chosen], minlength=len(EMOTIONS))
        return float((right[total > 0] / total[total > 0]).mean())

    metrics = {name: {"mean": found[name], "low": None, "high": None} for name in ("accuracy", "mean_recall")}
    if len(set(conversations)) > 1:
        many, few = Draws(confidence, resamples, seed), Draws(confidence, max(1, resamples // 10), seed)
        intervals = {
            "accuracy": mean_interval(hits, conversations, many),
            "mean_recall": metric_interval(mean_recall, len(rows), conversations, few),
        }
        for name, interval in intervals.items():
            metrics[name] |= {"low": interval.low, "high": interval.high}
    return {"metrics": metrics, "recall": found["recall"], "confusion": found["confusion"]}


def _hits(rows: list[dict]) -> np.ndarray:
    """Whether each answer is right, (rows,) of 0 and 1."""
    return np.array([float(row["reply"].strip().lower() == row["reference"]) for row in rows])


def evaluate_emotion(
    model: str,
    data: str,
    output: str | Path,
    *,
    split: str = "test",
    max_samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 10_000,
    device: str | None = None,
    dtype: str = "auto",
    accelerator=None,
    progress: bool = True,
) -> dict:
    """
    Fig. 6 of a checkpoint on a data set; writes what the module says. A run that was stopped goes on.

    Args:
        model: whole checkpoint, stage's folder or Hub id.
        data: prepared data set, folder or Hub id.
        output: folder to write.
        split, max_samples: the clips.
        batch_size: clips at once.
        seed, confidence, resamples: of the bootstrap.
        device, dtype: see `Common`.
        accelerator, progress: see `write_replies`.

    Returns:
        the results, as in the JSON file; on all but the main process {}.

    Raises:
        ValueError: where no clip has an emotion, a sentence, sound and picture.
    """
    folder = Path(output)
    samples = EmotionSamples(load_dataset(data, split=split))
    if max_samples is not None:
        samples.places = samples.places[:max_samples]
    if not len(samples):
        raise ValueError(
            f"{data}: no row of its split {split} has an emotion, a sentence, sound and picture; {samples.left_out} "
            "have an emotion and a clip."
        )
    checkpoint = Checkpoint(model, Common(batch_size=batch_size, device=device, dtype=dtype))
    namers = [EmotionNamer(name, checkpoint, batch_size) for name in SETTINGS]
    options = {"seed": seed, "accelerator": accelerator, "progress": progress}
    files = {namer.name: write_replies(namer, samples, folder / "emotion", **options) for namer in namers}
    if accelerator is not None and not accelerator.is_main_process:
        return {}
    rows = {name: read_replies(file) for name, file in files.items()}
    systems = {}
    for namer in namers:
        found = rows[namer.name]
        systems[namer.name] = {
            **score_answers(found, confidence, resamples, seed),
            "count": len(found),
            "notes": [{"id": row["id"], "note": row["note"]} for row in found if row.get("note")],
            "settings": namer.settings,
            "replies": files[namer.name].relative_to(folder).as_posix(),
        }
    best = "A+V+T"
    comparisons = []
    conversations = [conversation_of(row) for row in rows[best]]
    for name in SETTINGS if len(set(conversations)) > 1 else ():
        if name == best:
            continue
        draws = Draws(confidence, resamples, seed)
        both = compare_means(_hits(rows[best]), _hits(rows[name]), conversations, draws)
        about = {"difference": both.difference.value, "low": both.difference.low, "high": both.difference.high}
        comparisons.append({"a": best, "b": name, "metric": "accuracy", **about, "p": both.p_value})
    add_adjusted(comparisons)
    results = {
        "table": "emotion",
        "systems": systems,
        "comparisons": comparisons,
        "settings": {
            "model": model,
            "data": data,
            "split": split,
            "max_samples": max_samples,
            "corpora": dict(Counter(row["id"].partition("/")[0] for row in rows[best])),
            "left_out": samples.left_out,
            "trained_with_text": checkpoint.processor.with_text,
            "seed": seed,
            "confidence": confidence,
            "resamples": resamples,
        },
        "versions": versions(),
        "published": FIGURE_6,
    }
    write_results(folder / "emotion.json", results)
    return results


def show(results: dict) -> str:
    """The table as text."""
    settings = results["settings"]
    p_values = {found["b"]: found["p_holm"] for found in results["comparisons"]}
    rows = []
    for name, system in results["systems"].items():
        recall = ["-" if value is None else f"{value:.2f}" for value in system["recall"].values()]
        both = [with_interval(system["metrics"][metric]) for metric in ("accuracy", "mean_recall")]
        rows.append([name, *both, *recall, f"{p_values[name]:.4f}" if name in p_values else ""])
    header = ["shown", "accuracy", "mean recall", *EMOTIONS, "p (A+V+T)"]
    lines = [
        f"{settings['data']}, split {settings['split']}: {results['systems']['T']['count']} clips",
        table(header, rows),
        f"[{settings['confidence']:.0%} interval], bootstrap over conversations; p: A+V+T has another accuracy, paired "
        f"permutation test, {ADJUSTED}.",
        results["published"],
    ]
    if settings["left_out"]:
        lines.append(f"{settings['left_out']} labelled clips are left out: they lack a sentence, sound or picture.")
    if not settings["trained_with_text"]:
        lines.append("WARNING: the model was trained without the sentence; the rows with T show it all the same.")
    for name, system in results["systems"].items():
        if system["notes"]:
            found = system["notes"][0]
            lines.append(f"WARNING: {name}: {len(system['notes'])} notes, such as {found['id']}: {found['note']}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """What `empathic evaluate emotion` does on each process; returns the exit status."""
    state, device = open_process(options.device)
    try:
        results = evaluate_emotion(
            options.model,
            options.data,
            options.output,
            split=options.split,
            max_samples=options.max_samples,
            batch_size=options.batch_size,
            seed=options.seed,
            confidence=options.confidence,
            resamples=options.resamples,
            device=device,
            dtype=options.dtype,
            accelerator=state,
        )
    finally:
        close_process(state)
    if results:
        print(f"{show(results)}\nAll of it is in {options.output}.")
    return 0
