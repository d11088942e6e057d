"""
Emotion accuracy on clips, from text, audio and video (paper's Fig. 6).

    empathic evaluate emotion runs/quickstart/emotion --data runs/quickstart/data --output runs/tables

OUT/emotion.json holds the accuracy, the recall of each emotion and the confusion matrix of every row,
OUT/emotion/ROW.jsonl the answers. All rows use the same clips: those that have the inputs of every row. By default the
rows are those of Fig. 6 whose inputs the data set has; `--inputs` chooses them.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..configuration_empathic import EMOTIONS
from ..data_prep.loading import load_prepared
from ..data_prep.messages import clip_message
from ..data_prep.views import EmotionClips, is_there, says_something
from .dialogue import open_process
from .generation import answer, prepare_readable
from .metrics import accuracy
from .published import FIGURE_6
from .replies import conversation_of, read_replies, write_replies
from .results import held_table, versions, write_results
from .statistics_of_replies import ADJUSTED, Draws, add_adjusted, compare_means, mean_interval, metric_interval
from .systems.base import ALWAYS, Common, Reply
from .systems.ours import LazyCheckpoint
from .tables import table, with_interval

# The rows: the media that the model gets, and whether it also gets the sentence. Fig. 6 has all but A+V.
SETTINGS = {
    "T": ((), True),
    "A": (("audio",), False),
    "V": (("video",), False),
    "A+V": (("audio", "video"), False),
    "A+T": (("audio",), True),
    "V+T": (("video",), True),
    "A+V+T": (("audio", "video"), True),
}
QUICKSTART_SETTINGS = {"T": "T", "AT": "A+T", "VT": "V+T", "AVT": "A+V+T"}  # names in results.json -> rows
MAX_NEW_TOKENS = 8  # an emotion is one word


def inputs_of(setting: str) -> set[str]:
    """Return the inputs of a row of `SETTINGS`: a subset of text, audio and video."""
    modalities, with_text = SETTINGS[setting]
    return {*modalities, *(["text"] if with_text else [])}


def default_settings(counts: dict[str, int]) -> list[str]:
    """
    Return the rows to evaluate by default: those of Fig. 6 whose inputs exist; A+V only where there is no text.

    Args:
        counts: number of labeled clips with each input.
    """
    there = {name for name, count in counts.items() if count}
    return [name for name in SETTINGS if inputs_of(name) <= there and (name != "A+V" or "text" not in there)]


class EmotionSamples(EmotionClips):
    """
    The labeled clips that have all inputs of some rows, as samples: `prompt` (one message with these inputs), `reply`
    (the emotion), `emotion`, and the ids of the turn.

    Args:
        dataset: rows of the schema.
        settings: the rows of `SETTINGS`; by default `default_settings`.

    Attributes:
        counts: number of labeled clips with each input: `text`, `audio` and `video`.
        needed: the inputs of the rows.
        left_out: number of labeled clips that lack one of the inputs.
    """

    def __init__(self, dataset: Dataset, settings: Sequence[str] | None = None):
        super().__init__(dataset)
        has = {kind: is_there(dataset, kind)[self.places] for kind in ("audio", "video")}
        has["text"] = says_something(dataset)[self.places]
        self.counts = {name: int(there.sum()) for name, there in has.items()}
        self.settings = default_settings(self.counts) if settings is None else list(settings)
        self.needed = set().union(*map(inputs_of, self.settings))
        labeled = len(self.places)
        whole = np.ones(labeled, dtype=bool)
        for name in self.needed:
            whole &= has[name]
        self.places = self.places[whole]
        self.left_out = labeled - len(self.places)

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        return {
            "prompt": [clip_message(row, tuple(kind for kind in ("audio", "video") if kind in self.needed))],
            "reply": row["emotion"],
            "emotion": row["emotion"],
            **{name: row[name] for name in ("corpus", "split", "dialogue_id", "turn")},
        }


class EmotionNamer:
    """
    A `System` whose replies are the emotions of clips.

    Args:
        name: a row of `SETTINGS`.
        checkpoint: a trained model. In the rows with T it gets the sentence, even if it was trained without the
            sentence (`with_text` of its processor).
        batch_size: number of clips per batch.
    """

    def __init__(self, name: str, checkpoint: LazyCheckpoint, batch_size: int = 64):
        self.name, self.checkpoint, self.batch_size = name, checkpoint, batch_size
        self.modalities, self.with_text = SETTINGS[name]
        self.clip_kinds = self.modalities

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
            **ALWAYS,
        }

    def reply(self, samples: Sequence[dict], seeds: Sequence[int]) -> list[Reply]:
        """See `System`. A clip that cannot be read is left out, with a note; if nothing is left, the reply is empty."""
        answers = name_emotions(self.checkpoint.model, self.checkpoint.processor, samples, self.name)
        return [Reply(text, {"note": note} if note else {}) for text, note in answers]


def name_emotions(model, processor, samples: Sequence[dict], setting: str) -> list[tuple[str, str | None]]:
    """
    Generate the emotion of each sample in a batch, with a note if a clip could not be read.

    Args:
        samples: items of `EmotionSamples`.
        setting: a row of `SETTINGS`: the inputs of the model.
    """
    shown, (_, with_text) = inputs_of(setting), SETTINGS[setting]
    prepared = []
    for sample in samples:
        (message,) = sample["prompt"]
        seen = {**message, "content": [item for item in message["content"] if item["type"] in shown]}
        prepared.append(prepare_readable(processor, [seen], task="emotion", with_text=with_text))
    there = [inputs for inputs, _ in prepared if inputs is not None]
    answers = iter(answer(model, processor, there, MAX_NEW_TOKENS) if there else [])
    named = []
    for inputs, note in prepared:
        found = None if inputs is None else next(answers)
        notes = [part for part in (note, found and found.note) if part]
        named.append(("" if found is None else found.text, " ".join(notes) or None))
    return named


def score_answers(rows: list[dict], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> dict:
    """
    Compute accuracy and mean recall with their intervals, the recall of each emotion, and the confusion matrix.

    Args:
        rows: rows of `read_replies`: `reply` is the predicted emotion, `reference` the true emotion.
        confidence, resamples, seed: options of the bootstrap over conversations; the mean recall uses a tenth of the
            draws.
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
    """Whether each answer is correct: (rows,) of 0 and 1."""
    return np.array([float(row["reply"].strip().lower() == row["reference"]) for row in rows])


def evaluate_emotion(
    model: str,
    data: str,
    output: str | Path,
    *,
    split: str = "test",
    inputs: Sequence[str] | None = None,
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
    Compute Fig. 6 for a checkpoint on a data set, and write the files named in the module. A stopped run is resumed.

    Args:
        model: whole checkpoint, stage folder or Hub id.
        data: prepared data set, folder or Hub id.
        output: output folder.
        split, max_samples: split, and maximum number of clips.
        inputs: rows of `SETTINGS`; by default those of Fig. 6 whose inputs the data set has.
        batch_size: number of clips per batch.
        seed, confidence, resamples: options of the bootstrap.
        device, dtype: see `Common`.
        accelerator, progress: see `write_replies`.

    Returns:
        The results, as in the JSON file; {} on all but the main process.

    Raises:
        ValueError: if a row is unknown, or no clip has an emotion and the inputs of all rows.
    """
    folder = Path(output)
    unknown = sorted(set(inputs or ()) - SETTINGS.keys())
    if unknown:
        raise ValueError(f"inputs: {', '.join(unknown)} is no row; the rows are {', '.join(SETTINGS)}.")
    samples = EmotionSamples(load_prepared(data, split), inputs)
    if max_samples is not None:
        samples.places = samples.places[:max_samples]
    if not len(samples):
        wanted = " and ".join(sorted(samples.needed)) or "a clip"
        counts = ", ".join(f"{count} have {name}" for name, count in samples.counts.items())
        raise ValueError(
            f"{data}: no row of its split {split} has an emotion and {wanted}. Of its labeled clips, {counts}. Choose "
            "other inputs (`--inputs`) or another split."
        )
    checkpoint = LazyCheckpoint(model, Common(batch_size=batch_size, device=device, dtype=dtype))
    namers = [EmotionNamer(name, checkpoint, batch_size) for name in samples.settings]
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
    best = max(samples.settings, key=lambda name: len(inputs_of(name)))
    comparisons = []
    conversations = [conversation_of(row) for row in rows[best]]
    for name in samples.settings if len(set(conversations)) > 1 else ():
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
            "inputs": samples.settings,
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
    """Format the table as text."""
    settings = results["settings"]
    p_values = {found["b"]: found["p_holm"] for found in results["comparisons"]}
    rows = []
    for name, system in results["systems"].items():
        recall = ["-" if value is None else f"{value:.2f}" for value in system["recall"].values()]
        both = [with_interval(system["metrics"][metric]) for metric in ("accuracy", "mean_recall")]
        rows.append([name, *both, *recall, f"{p_values[name]:.4f}" if name in p_values else ""])
    best = next((found["a"] for found in results["comparisons"]), None)
    header = ["shown", "accuracy", "mean recall", *EMOTIONS, "p"]
    lines = [
        f"{settings['data']}, split {settings['split']}: {next(iter(results['systems'].values()))['count']} clips",
        table(header, rows),
        f"[{settings['confidence']:.0%} interval], bootstrap over conversations"
        + (f"; p: accuracy differs from {best}; paired permutation test, {ADJUSTED}." if best else "."),
        results["published"],
    ]
    if settings["left_out"]:
        lines.append(f"{settings['left_out']} labeled clips are left out: they lack an input of a row.")
    if not settings["trained_with_text"] and any("T" in name for name in results["systems"]):
        lines.append("WARNING: the model was trained without the sentence, but gets it in the rows with T.")
    for name, system in results["systems"].items():
        if system["notes"]:
            found = system["notes"][0]
            lines.append(f"WARNING: {name}: {len(system['notes'])} notes, such as {found['id']}: {found['note']}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Run `empathic evaluate emotion` in each process; return the exit status."""
    with open_process(options.device) as (state, device), held_table(options.output, "emotion", state):
        results = evaluate_emotion(
            options.model,
            options.data,
            options.output,
            split=options.split,
            inputs=options.inputs,
            max_samples=options.max_samples,
            batch_size=options.batch_size,
            seed=options.seed,
            confidence=options.confidence,
            resamples=options.resamples,
            device=device,
            dtype=options.dtype,
            accelerator=state,
        )
    if results:
        print(f"{show(results)}\nResults are in {options.output}.")
    return 0
