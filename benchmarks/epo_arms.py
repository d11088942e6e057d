"""
EPO with the lowest negative of a row and with all of them, and the control, several seeds each, on pairs of your own.

    python -m empathic.benchmarks.epo_arms runs/epo_arms --base runs/dialogue --pairs data/pairs --data data/meld \
        --recipe recipes/smollm2-135m/epo.yaml --classifier SamLowe/roberta-base-go_emotions --bf16 True

The arms are `lowest` (EPO as it is by default), `listwise` (EPO with all negatives and the listwise loss; fewer steps,
so that all arms see as many tokens) and `control` (the autoregressive loss alone, `epo_weight` 0). Further options go
to each training. Each model answers held-out turns, with the most likely tokens and sampled at temperature 1, and
scores held-out pairs. Finished trainings and evaluations are kept; the same command goes on with the missing ones.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset

from ..data_prep.messages import sample_id
from ..data_prep.views import DialogueSamples
from ..evaluation.emotion_features import EmotionFeatures
from ..evaluation.generation import generate_texts
from ..evaluation.metrics import dist_1, emotion_scores, words_of
from ..evaluation.quickstart_results import paired_difference
from ..evaluation.replies import conversation_of
from ..evaluation.statistics_of_replies import mean_interval
from ..evaluation.tables import reward_row
from ..files import held_folder, write_json
from ..processing_empathic import EmpathicProcessor
from ..quickstart import pick
from ..trainers import train
from ..trainers.checkpoints.stage_folder import load_model
from ..trainers.samples import dialogue_sample
from .efficiency_options import positive
from .efficiency_report import table
from .machine import describe_machine

BASE = "base"
ARMS = {
    "lowest": (),
    "listwise": ("--negatives", "all", "--negatives_loss", "listwise"),
    "control": ("--epo_weight", "0"),
}
WAYS = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}}
COMPARED = (("lowest", "control"), ("listwise", "control"), ("listwise", "lowest"))


def tokens_of_a_row(processor, rows: Sequence[dict], history: str) -> dict[str, float]:
    """The mean number of tokens of a row's prompt, its chosen reply, its lowest negative and all its negatives."""
    counts: dict[str, list[int]] = {"prompt": [], "chosen": [], "lowest": [], "all": []}
    for row in rows:
        lengths = [len(processor.encode_reply(row[side][0]["content"])) for side in ("chosen", "rejected")]
        further = [len(processor.encode_reply(reply[0]["content"])) for reply in row.get("negatives") or []]
        counts["prompt"].append(len(processor.prepare(row["prompt"], history=history)["input_ids"]))
        counts["chosen"].append(lengths[0])
        counts["lowest"].append(lengths[1])
        counts["all"].append(lengths[1] + sum(further))
    return {name: statistics.mean(values) for name, values in counts.items()}


def equal_steps(tokens: dict[str, float], steps: int) -> int:
    """The steps with all negatives that see as many tokens as `steps` with the lowest."""
    rest = tokens["prompt"] + tokens["chosen"]
    return round(steps * (rest + tokens["lowest"]) / (rest + tokens["all"]))


class Judge:
    """
    Evaluates a model.

    Args:
        options: the options of the command line.
        samples: the held-out turns to answer, items of `DialogueSamples`.
    """

    def __init__(self, options: argparse.Namespace, samples: Sequence[dict]):
        self.options, self.samples = options, samples
        self.pairs = list(load_dataset(options.pairs, split="validation"))
        self.references = [sample["reply"] for sample in samples]
        self.features = EmotionFeatures(options.classifier, pooling=options.pooling)

    def __call__(self, folder: str, seed: int, scratch: Path) -> dict:
        """Return the rewards of the pairs, and the replies with their scores, each way."""
        options = self.options
        model, processor = load_model(folder).to(torch.bfloat16), EmpathicProcessor.from_pretrained(folder)
        found = reward_row(model, processor, self.pairs, scratch, batch_size=8, history=options.history)
        prompts = [dialogue_sample(sample, options.history, True)["messages"] for sample in self.samples]
        for way, how in WAYS.items():
            torch.manual_seed(seed)
            limits = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
            replies = generate_texts(
                model, processor, prompts, history=options.history, description=way, **limits, **how
            )
            scores = emotion_scores(replies, self.references, self.features, allow_empty=True)
            found[way] = {
                "replies": replies,
                "scores": [float(score) for score in scores],
                "emotion_score": statistics.mean(map(float, scores)),
                "dist1": dist_1(replies, allow_empty=True),
                "words": statistics.mean(len(words_of(reply)) for reply in replies),
            }
        return found


def compare(results: dict[str, list[dict]], conversations: list) -> dict:
    """For each two arms and each way, the difference of EmotionScore, with each reply's mean over the seeds."""
    found = {}
    for first, second in COMPARED:
        for way in WAYS:
            compared = paired_difference(_means(results[first], way), _means(results[second], way), conversations)
            found[f"{first} - {second}, {way}"] = {**compared["difference"], "p_value": compared["p_value"]}
    return found


def _means(runs: list[dict], way: str) -> np.ndarray:
    """The EmotionScore of each reply, the mean over the seeds."""
    return np.mean([run[way]["scores"] for run in runs], axis=0)


def report(results: dict[str, list[dict]], comparisons: dict) -> str:
    """The means over the seeds, and the comparisons, as Markdown."""
    rows = []
    for arm, runs in results.items():
        columns = [[run[way]["emotion_score"] for run in runs] for way in WAYS]
        columns += [[run["reward_accuracy"] for run in runs], [run["margin"] for run in runs]]
        columns += [[run["greedy"]["dist1"] for run in runs], [run["greedy"]["words"] for run in runs]]
        rows.append([arm, *(_spread(values) for values in columns)])
    header = ["arm", *(f"EmotionScore, {way}" for way in WAYS), "reward accuracy", "margin", "Dist-1", "words a reply"]
    lines = [
        f"{name}: {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], p {row['p_value']:.4f}"
        for name, row in comparisons.items()
    ]
    return table(header, rows) + "\n\n" + "\n".join(lines)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def run(options: argparse.Namespace, further: list[str]) -> dict:
    """Train and evaluate all arms; return all results."""
    root, base = options.output, str(options.base)
    processor = EmpathicProcessor.from_pretrained(base)
    tokens = tokens_of_a_row(processor, list(load_dataset(options.pairs, split="train")), options.history)
    steps = dict.fromkeys(ARMS, options.steps) | {"listwise": equal_steps(tokens, options.steps)}
    samples = pick(DialogueSamples(load_dataset(options.data, split="test")), options.samples)
    conversations = [conversation_of({"id": sample_id(sample)}) for sample in samples]
    judge, results = None, {}
    for arm in (BASE, *ARMS):
        results[arm] = []
        for seed in options.seeds if arm != BASE else options.seeds[:1]:
            folder = base if arm == BASE else str(root / f"{arm}_{seed}")
            if arm != BASE and not Path(folder, "all_results.json").is_file():
                arguments = ["--config", options.recipe, "--model_name_or_path", base, "--dataset_name", options.pairs]
                arguments += ["--output_dir", folder, "--history", options.history, "--max_steps", str(steps[arm])]
                train.main([*arguments, "--seed", str(seed), *ARMS[arm], *further])
            file = root / f"{arm}_{seed}.json"
            if not file.is_file():
                judge = judge or Judge(options, samples)
                write_json(file, judge(folder, seed, root / "scratch"))
            results[arm].append(json.loads(file.read_text(encoding="utf-8")))
    comparisons = compare(results, conversations)
    print(report(results, comparisons))
    short = {arm: [_without_texts(run) for run in runs] for arm, runs in results.items()}
    intervals = {}
    for arm, runs in results.items():
        for way in WAYS:
            interval = mean_interval(_means(runs, way), conversations)
            intervals[f"{arm}, {way}"] = {key: getattr(interval, key) for key in ("value", "low", "high")}
    return {
        "tokens_of_a_row": tokens,
        "steps": steps,
        "seeds": options.seeds,
        "samples": len(samples),
        "arms": short,
        "intervals": intervals,
        "comparisons": comparisons,
        "settings": {name: str(value) for name, value in vars(options).items()} | {"further": further},
        "machine": describe_machine(),
    }


def _without_texts(run: dict) -> dict:
    kept = {way: {key: value for key, value in run[way].items() if key not in ("replies", "scores")} for way in WAYS}
    return {**run, **kept, "examples": run["greedy"]["replies"][:5]}


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark, print its tables, and write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--base", required=True, help="folder of a model after stage dialogue")
    parser.add_argument("--pairs", required=True, help="preference rows with the splits train and validation")
    parser.add_argument("--data", required=True, help="prepared data set with the split test")
    parser.add_argument("--recipe", required=True, help="recipe of stage epo")
    parser.add_argument("--classifier", default="SamLowe/roberta-base-go_emotions", help="classifier of EmotionScore")
    parser.add_argument("--pooling", default="mean", help="its pooling (mean)")
    parser.add_argument("--history", default="memory", help="memory or text (memory)")
    parser.add_argument("--steps", type=positive, default=60, help="steps of each training (60)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--samples", type=positive, default=100, help="held-out turns to answer (100)")
    parser.add_argument("--max_new_tokens", type=positive, default=64, help="maximum length of a reply (64)")
    parser.add_argument("--batch_size", type=positive, default=16, help="replies per batch (16)")
    options, further = parser.parse_known_args(argv)
    with held_folder(options.output, "empathic.benchmarks.epo_arms"):
        results = run(options, further)
        write_json(options.output / "results.json", results)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
