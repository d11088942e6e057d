"""
Emotion from voices alone, cross-validated over speakers: stage `emotion` beside a linear probe on the same folds.

    python -m empathic.benchmarks.voices --data data/ravdess --config recipes/smollm2-135m/emotion.yaml

The speakers are divided into folds, in the order of their names. Each fold is the test set of one training, the first
speakers of the next fold are its validation set, and all others are its training set. The probe is a logistic
regression on the mean of Whisper's outputs over a clip; its regularization is chosen on the validation speakers.
Further options go to the training, such as `--max_steps 400`. A stopped run is continued: what is in OUTPUT is kept.
With `--linear_head`, a linear head takes the place of the language model: a quick comparison of options, of which
nothing is kept but the report.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from tqdm import tqdm

from ..configuration_empathic import EMOTIONS, SOUND_OPTIONS
from ..data_prep.views import is_there
from ..evaluation.emotion import EmotionSamples, name_emotions
from ..evaluation.statistics_of_replies import Draws, compare_means, mean_interval
from ..files import fingerprint, packaged, write_json
from ..processing_empathic import EmpathicProcessor
from ..trainers import prepare_features, train
from ..trainers.checkpoints.stage_folder import load_model
from ..trainers.frozen.feature_cache import FeatureCache, describe
from .machine import describe_machine
from .qformer_classifier import average_positions, train_classifier

RECIPE = "recipes/smollm2-135m/emotion.yaml"
VALIDATION_SPEAKERS = 2
REGULARIZATION = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # scikit-learn's C
BATCH = 32


def voices(data: str) -> Dataset:
    """Return the labeled clips with audio of all splits of a prepared data set, without their pictures."""
    splits = load_dataset(data)
    rows = concatenate_datasets([splits[name] for name in sorted(splits)]).with_format(None)
    rows = rows.select(np.flatnonzero(is_there(rows, "audio") & is_there(rows, "emotion")))
    return rows.map(lambda row: {"video": None}, features=rows.features)


def divide_speakers(speakers: list[str], folds: int) -> list[dict[str, list[str]]]:
    """Return the speakers of `train`, `validation` and `test` of each fold."""
    names = sorted(set(speakers))
    if len(names) < 2 * folds or folds < 2:
        raise ValueError(
            f"{len(names)} speakers cannot be divided into {folds} folds; choose from 2 to {len(names) // 2}."
        )
    groups = [list(group) for group in np.array_split(names, folds)]
    divided = []
    for place, test in enumerate(groups):
        following = groups[(place + 1) % folds]
        validation = following[: min(VALIDATION_SPEAKERS, len(following) // 2)]
        rest = [name for name in names if name not in test and name not in validation]
        divided.append({"train": rest, "validation": validation, "test": test})
    return divided


def check_same_data(rows: Dataset, folds: list[dict[str, list[str]]], output: Path) -> None:
    """
    Raise a ValueError if OUTPUT has the folds of other rows or of another number of folds; otherwise note these.
    """
    columns = ("corpus", "dialogue_id", "turn", "speaker", "emotion")
    made_with, file = fingerprint([folds, *(list(rows[name]) for name in columns)]), output / "folds.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != made_with:
        raise ValueError(f"{output} has folds of other data or another number of folds. Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(file, made_with)


def write_fold(rows: Dataset, split_of: dict[str, list[str]], folder: Path) -> None:
    """Write the rows of a fold as a data set, unless it is there."""
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    speakers = np.array(rows["speaker"])
    for split, names in split_of.items():
        chosen = rows.select(np.flatnonzero(np.isin(speakers, names)))
        (part / "data").mkdir(parents=True, exist_ok=True)
        chosen.to_parquet(part / "data" / f"{split}-00000-of-00001.parquet")
    part.rename(folder)


def hits_of(model, processor, rows: Dataset) -> list[int]:
    """Whether the model names the emotion of each clip from the sound alone."""
    samples, hits = EmotionSamples(rows, ["A"]), []
    for start in range(0, len(samples), BATCH):
        batch = [samples[place] for place in range(start, min(start + BATCH, len(samples)))]
        answers = name_emotions(model, processor, batch, "A")
        hits += [int(text.lower() == one["emotion"]) for (text, _), one in zip(answers, batch, strict=True)]
    return hits


def probe(features: np.ndarray, emotions: np.ndarray, place: dict[str, np.ndarray]) -> dict:
    """Fit the linear probe of a fold. `place`: the clips of each split."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit(features[place["train"]]).transform(features)
    best: dict = {}
    for strength in REGULARIZATION:
        fitted = LogisticRegression(C=strength, max_iter=5000).fit(scaled[place["train"]], emotions[place["train"]])
        score = fitted.score(scaled[place["validation"]], emotions[place["validation"]])
        if not best or score > best["validation"]:
            hits = fitted.predict(scaled[place["test"]]) == emotions[place["test"]]
            best = {"C": strength, "validation": score, "hits": hits.astype(int).tolist()}
    return best


def clip_features(rows: Dataset, script, model_args, cache: Path) -> list[torch.Tensor]:
    """Whisper's outputs of each clip, from the feature cache: (positions, width)."""
    vision_tower, audio_tower, sound = prepare_features.load_towers(script, model_args)
    processor = train.build_processor(script, model_args)
    features = FeatureCache(cache, describe(vision_tower, audio_tower, processor, **sound))
    return [features.features("audio", dict(row)["audio"]).float() for row in rows]


def run_fold(options, training: list[str], rows: Dataset, fold: int, seed: int) -> dict:
    """Train and test one fold with one seed; the result is kept in OUTPUT, for the same options only."""
    folder = options.output / f"fold-{fold}" / f"seed-{seed}"
    file = folder / "result.json"
    made_with = {"training": training, "config": Path(options.config).read_text(encoding="utf-8")}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("made_with") != made_with:
            raise ValueError(
                f"{file} is the result of other training options or of another version. Give another --output, or "
                "delete this folder."
            )
        return found
    data = options.output / f"fold-{fold}" / "data"
    arguments = [
        "--config",
        options.config,
        *training,
        "--dataset_name",
        str(data),
        "--output_dir",
        str(folder / "model"),
    ]
    arguments += ["--seed", str(seed), "--feature_cache", str(options.output / "features"), "--report_to", "none"]
    metrics = train.main([*arguments, "--resume_from_checkpoint", "auto"])
    model, processor = load_model(str(folder / "model")).eval(), EmpathicProcessor.from_pretrained(folder / "model")
    splits = load_dataset(str(data))
    found = {split: hits_of(model, processor, splits[split]) for split in ("validation", "test")}
    result = {
        "train_loss": metrics.get("train_loss"),
        "seconds": metrics.get("train_runtime"),
        "validation": float(np.mean(found["validation"])),
        "test": float(np.mean(found["test"])),
        "hits": found["test"],
        "made_with": made_with,
    }
    for path in folder.glob("model/checkpoint-*"):
        shutil.rmtree(path)
    write_json(file, result)
    return result


def summarize(results: list[list[dict]], probes: list[dict], speakers: list[list[str]]) -> dict:
    """
    Accuracy over all test clips of the model (mean over seeds) and of the probe, with intervals over speakers.

    Args:
        results: per fold, the results of its seeds.
        probes: the probe of each fold.
        speakers: per fold, the speaker of each test clip.
    """
    who = [name for fold in speakers for name in fold]
    model_hits = np.concatenate([np.mean([one["hits"] for one in fold], axis=0) for fold in results])
    probe_hits = np.concatenate([np.array(one["hits"], dtype=float) for one in probes])
    draws = Draws(0.95, 10_000, 0)
    both = compare_means(model_hits.tolist(), probe_hits.tolist(), who, draws)

    def interval(values: np.ndarray) -> dict:
        found = mean_interval(values.tolist(), who, draws)
        return {"mean": float(values.mean()), "low": found.low, "high": found.high}

    def by_speaker(values: np.ndarray) -> dict[str, float]:
        return {name: float(values[np.array(who) == name].mean()) for name in sorted(set(who))}

    return {
        "accuracy": interval(model_hits),
        "probe": interval(probe_hits),
        "difference": {"mean": both.difference.value, "low": both.difference.low, "high": both.difference.high},
        "p": both.p_value,
        "clips": len(who),
        "speakers": len(set(who)),
        "by_speaker": {"accuracy": by_speaker(model_hits), "probe": by_speaker(probe_hits)},
    }


def compare(report: dict, other: dict) -> dict:
    """
    Compare two reports speaker by speaker, such as those of two audio windows: report - other.

    Returns:
        `mean`, `low`, `high` and `p` of the difference of the two `accuracy`, of the two `probe`, and of this accuracy
        and the other's probe (`accuracy_probe`).

    Raises:
        ValueError: if they tested different speakers.
    """
    found = {}
    sides = {
        "accuracy": ("accuracy", "accuracy"),
        "probe": ("probe", "probe"),
        "accuracy_probe": ("accuracy", "probe"),
    }
    for name, (own, others) in sides.items():
        first, second = report["by_speaker"][own], other["by_speaker"][others]
        if first.keys() != second.keys():
            raise ValueError("The two reports tested different speakers; run both on the same folds.")
        who = sorted(first)
        both = compare_means([first[one] for one in who], [second[one] for one in who], who, Draws(0.95, 10_000, 0))
        difference = both.difference
        found[name] = {"mean": difference.value, "low": difference.low, "high": difference.high, "p": both.p_value}
    return found


def main(argv: list[str] | None = None) -> dict:
    """Run all folds, print and write the results; return them."""
    parser = argparse.ArgumentParser(
        description="Emotion from voices alone, cross-validated over speakers, beside a linear probe.",
        epilog="example:\n  python -m empathic.benchmarks.voices --data data/ravdess --max_steps 400",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="prepared data set with speakers and emotions, such as RAVDESS")
    parser.add_argument("--config", default=RECIPE, help="YAML file of the stage (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/voices"), help="output folder (%(default)s)")
    parser.add_argument("--folds", type=int, default=6, help="number of folds (%(default)s)")
    parser.add_argument("--only", type=int, nargs="+", metavar="FOLD", help="run only these folds, from 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training (%(default)s)")
    parser.add_argument("--linear_head", action="store_true", help="a linear head in place of the language model")
    parser.add_argument(
        "--average", type=int, default=8, help="with --linear_head: average so many positions, of 20 ms (%(default)s)"
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this earlier voices.json")
    options, training = parser.parse_known_args(argv)
    options.config = packaged(options.config)
    other = None if options.against is None else json.loads(options.against.read_text(encoding="utf-8"))
    rows = voices(options.data)
    folds = divide_speakers(rows["speaker"], options.folds)
    check_same_data(rows, folds, options.output)
    for number, split_of in enumerate(folds):
        write_fold(rows, split_of, options.output / f"fold-{number}" / "data")
    write_fold(rows, {"train": sorted(set(rows["speaker"]))}, options.output / "all")
    cache = options.output / "features"
    features = ["--config", options.config, *training, "--dataset_name", str(options.output / "all")]
    features += ["--output_dir", str(options.output / "none"), "--eval_split", "train", "--feature_cache", str(cache)]
    prepare_features.main([*features, "--frame_draws", "0"])

    chosen = range(options.folds) if options.only is None else options.only
    script, args, model_args = train.parse([*features, "--report_to", "none"])
    if options.linear_head and args.max_steps < 1:
        raise ValueError(f"max_steps is {args.max_steps}; give --max_steps from 1 up with --linear_head.")
    clips = clip_features(rows, script, model_args, cache)
    emotions = np.array([EMOTIONS.index(emotion) for emotion in rows["emotion"]])
    names = np.array(rows["speaker"])
    places = [{split: np.flatnonzero(np.isin(names, who)) for split, who in folds[fold].items()} for fold in chosen]
    if options.linear_head:
        short = [average_positions(clip, options.average) for clip in clips]
        results = [
            [train_classifier(short, emotions, place, script, args, seed) for seed in options.seeds]
            for place in tqdm(places, "training", unit="fold")
        ]
    else:
        results = [[run_fold(options, training, rows, fold, seed) for seed in options.seeds] for fold in chosen]
    pooled = torch.stack([clip.mean(0) for clip in clips]).numpy()
    probes = [probe(pooled, emotions, place) for place in places]
    speakers = [names[place["test"]].tolist() for place in places]
    summary = summarize(results, probes, speakers)
    report = {
        **summary,
        "folds": [
            {
                "test": [one["test"] for one in fold],
                "validation": [one["validation"] for one in fold],
                "train_loss": [one["train_loss"] for one in fold],
                "seconds": [one.get("seconds") for one in fold],  # of training, since it was last continued
                "probe": {"test": float(np.mean(other["hits"])), "validation": other["validation"], "C": other["C"]},
            }
            for fold, other in zip(results, probes, strict=True)
        ],
        "settings": {
            "linear_head": options.linear_head,
            "folds": options.folds, "only": options.only, "seeds": options.seeds, "training": training,
            **{name: getattr(script, name) for name in SOUND_OPTIONS},
            "steps": args.max_steps, "learning_rate": args.learning_rate,
            "alignment_steps": args.alignment_steps, "alignment_weight": args.alignment_weight,
            "batch_size": args.per_device_train_batch_size, "queries": script.num_query_tokens,
            "qformer_layers": script.qformer_layers, "qformer_dropout": script.qformer_dropout,
            "standardize_features": script.standardize_features, "bf16": bool(args.bf16),
        },
        "machine": describe_machine(),
    }  # fmt: skip
    if other is not None:
        report["against"] = compare(report, other)
    write_json(options.output / "voices.json", report)
    validation = [(fold["validation"], fold["probe"]["validation"]) for fold in report["folds"]]
    means = np.mean([np.mean(own) for own, _ in validation]), np.mean([other for _, other in validation])
    print(f"validation: {means[0]:.3f}, probe {means[1]:.3f}")
    for name in ("accuracy", "probe", "difference"):
        print(f"{name}: {report[name]['mean']:.3f} [{report[name]['low']:.3f}, {report[name]['high']:.3f}]")
    for name, found in report.get("against", {}).items():
        text = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}], p {found['p']:.4f}"
        print(f"{name}, against {options.against}: {text}")
    print(
        f"{report['clips']} test clips of {report['speakers']} speakers; p {report['p']:.4f}; all in {options.output}."
    )
    return report


if __name__ == "__main__":
    main()
