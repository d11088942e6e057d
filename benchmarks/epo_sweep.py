"""
Vary the settings of EPO one at a time on the tiny corpus: learning rate, beta, gamma and the weight of the
autoregressive loss, several seeds each.

    python -m empathic.benchmarks.epo_sweep --quickstart runs/quickstart --output runs/benchmarks/epo_sweep.json

The folder of a quickstart gives the model before stage `epo`, the preference pairs, the held-out conversations and the
emotion classifier. Each run trains with the recipe `recipes/tiny/epo.yaml`, in which one setting is changed, and is
evaluated like the quickstart's dialogue models: on replies to held-out conversations and on held-out pairs. Two more
rows are the model before the stage, and the control (`epo_weight` 0), which trains on the autoregressive loss alone.

The results are written after each run; the same command goes on with the runs that are missing. The plot has the same
name with .svg.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from datasets import load_dataset
from tqdm import tqdm

from ..data_prep.counter.build import identity_of
from ..data_prep.views import DialogueSamples
from ..evaluation.emotion_features import EmotionFeatures
from ..evaluation.generation import generate_texts
from ..evaluation.metrics import bleu, word_recall, words_of
from ..evaluation.tables import preference_metrics, reply_row
from ..files import fingerprint, held_folder, write_json
from ..processing_empathic import EmpathicProcessor
from ..quickstart import POOLING, RECIPES, pick, recall_words
from ..tiny.dialogues import ASSISTANT
from ..trainers import train
from ..trainers.checkpoints.stage_folder import load_model
from ..trainers.epo_config import EPOConfig
from ..trainers.samples import dialogue_sample
from .machine import describe_machine

RECIPE = RECIPES / "epo.yaml"
FACTORS = {
    "learning_rate": (5e-5, 2e-4, 8e-4, 3.2e-3),
    "beta": (0.5, 2.0, 8.0),
    "gamma": (0.0, 0.5, 2.0, 8.0),
    "nll_weight": (0.0, 1.0, 4.0),
}
BASE, CONTROL, DEFAULT = "before EPO", "control", "default"
# Metric -> (heading, digits after the point). Rewards are computed with the default beta in all runs, so that the
# margins of all runs have the same unit.
METRICS = {
    "emotion_score": ("EmotionScore", 3),
    "reward_accuracy": ("reward accuracy", 3),
    "margin": ("margin", 2),
    "chosen_logp": ("log p, chosen", 2),
    "rejected_logp": ("log p, rejected", 2),
    "words": ("words a reply", 2),
    "bleu1": ("BLEU-1", 3),
    "recall": ("recall of history", 3),
    "dist1": ("Dist-1", 3),
}


@dataclass(frozen=True)
class Setting:
    """What a run changes in the recipe: `options` (name, value), which are empty for the default."""

    name: str
    options: tuple[tuple[str, float], ...] = ()


def defaults() -> dict[str, float]:
    """Return the value of each factor in the tiny recipe."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    fields = EPOConfig.__dataclass_fields__
    return {name: float(recipe.get(name, fields[name].default)) for name in FACTORS}


def settings_of(factors: dict[str, tuple[float, ...]]) -> list[Setting]:
    """Return the default, the control, and one setting for each other value of each factor."""
    usual = defaults()
    found = [Setting(DEFAULT), Setting(CONTROL, (("epo_weight", 0.0),))]
    for name, values in factors.items():
        found += [Setting(f"{name} {value:g}", ((name, value),)) for value in values if value != usual[name]]
    return found


class Judge:
    """
    Evaluates dialogue models on the held-out data of a quickstart.

    Args:
        root: the folder of a quickstart that has run at least to its stage `dialogue` and its pairs.
        samples: number of held-out conversations.
    """

    def __init__(self, root: Path, samples: int):
        data = DialogueSamples(load_dataset(str(root / "data"), split="test"), [ASSISTANT])
        self.samples = pick(data, samples)
        self.pairs = list(load_dataset(str(root / "pairs"), split="test"))
        self.features = EmotionFeatures(str(root / "parts" / "emotion_classifier"), pooling=POOLING)

    def __call__(self, folder: Path, scratch: Path) -> dict[str, float]:
        """Return the metrics of a model's folder by the names in `METRICS`, and `reference_words`."""
        model, processor = load_model(str(folder)), EmpathicProcessor.from_pretrained(str(folder))
        prompts = [dialogue_sample(sample, "memory", True)["messages"] for sample in self.samples]
        replies = generate_texts(model, processor, prompts)
        references = [sample["reply"] for sample in self.samples]
        found = preference_metrics(model, processor, self.pairs, scratch)
        row = reply_row(replies, references, self.features)
        return row | {
            "reward_accuracy": found["eval_rewards/accuracies"],
            "margin": found["eval_rewards/margins"],
            "chosen_logp": found["eval_logps/chosen"],
            "rejected_logp": found["eval_logps/rejected"],
            "words": statistics.fmean(len(words_of(reply)) for reply in replies),
            "reference_words": statistics.fmean(len(words_of(reply)) for reply in references),
            "bleu1": bleu(replies, references, 1),
            "recall": word_recall(replies, [sorted(recall_words(sample)) for sample in self.samples]),
            "example": replies[0],
        }


def run(root: Path, setting: Setting, seed: int, steps: int, judge: Judge) -> dict:
    """Train and evaluate one setting; the model is deleted."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["--config", str(RECIPE), "--output_dir", f"{scratch}/model", "--disable_tqdm", "True"]
        arguments += ["--model_name_or_path", str(root / "dialogue"), "--dataset_name", str(root / "pairs")]
        # The encoders are frozen, so each row's clip is encoded once for all its epochs.
        arguments += ["--max_steps", str(steps), "--seed", str(seed), "--cache_frozen_gib", "1"]
        for name, value in setting.options:
            arguments += [f"--{name}", str(value)]
        start = time.process_time()
        failure = None
        try:
            train.main(arguments)
        except FloatingPointError as error:  # a setting under which the training diverges is a result
            failure = str(error)
        seconds = time.process_time() - start
        gc.collect()
        row = {"setting": setting.name, "options": dict(setting.options), "seed": seed, "train_seconds": seconds}
        return row | ({"failed": failure} if failure else {"metrics": judge(Path(scratch, "model"), Path(scratch))})


def summarize(runs: list[dict]) -> dict[str, dict]:
    """
    Return, for each setting, the mean and the sample standard deviation of each metric over seeds, the number of seeds,
    and the number of runs that failed. A single seed has no deviation (None).
    """
    found = {}
    for setting in dict.fromkeys(row["setting"] for row in runs):
        rows = [row for row in runs if row["setting"] == setting]
        measured = [row["metrics"] for row in rows if "metrics" in row]
        summary = {"seeds": len(measured), "failed": len(rows) - len(measured), "metrics": {}}
        for name in METRICS if measured else ():
            values = [row[name] for row in measured]
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary["metrics"][name] = {"mean": statistics.fmean(values), "sd": spread}
        found[setting] = summary
    return found


def markdown(summary: dict[str, dict]) -> str:
    """Format the summary as a Markdown table, mean ± standard deviation."""
    text = ["| setting | " + " | ".join(title for title, _ in METRICS.values()) + " |"]
    text.append("|---" * (1 + len(METRICS)) + "|")
    for setting, found in summary.items():
        cells = []
        for name, (_, digits) in METRICS.items():
            value = found["metrics"].get(name)
            spread = "" if value is None or value["sd"] is None else f" ± {value['sd']:.{digits}f}"
            cells.append("diverged" if value is None else f"{value['mean']:.{digits}f}{spread}")
        failed = f" ({found['failed']} diverged)" if found["failed"] and found["seeds"] else ""
        text.append(f"| {setting}{failed} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def plot(summary: dict[str, dict], factors: dict[str, tuple[float, ...]], path: Path) -> None:
    """Plot metrics (rows) by factors (columns): mean and standard deviation over seeds, with the control as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = ("emotion_score", "margin", "rejected_logp", "words", "bleu1")
    usual = defaults()
    size = (2.6 * len(factors) + 0.6, 1.75 * len(shown))
    figure, panels = pyplot.subplots(
        len(shown), len(factors), figsize=size, sharey="row", squeeze=False, layout="constrained"
    )
    for column, (factor, values) in enumerate(factors.items()):
        ordered = sorted({*values, usual[factor]})
        names = [DEFAULT if value == usual[factor] else f"{factor} {value:g}" for value in ordered]
        for line, metric in enumerate(shown):
            panel = panels[line][column]
            found = [summary.get(name, {"metrics": {}})["metrics"].get(metric) for name in names]
            drawn = [(place, one) for place, one in enumerate(found) if one is not None]
            panel.errorbar(
                [place for place, _ in drawn],
                [one["mean"] for _, one in drawn],
                [one["sd"] or 0.0 for _, one in drawn],
                marker="o",
                capsize=3,
            )
            control = summary.get(CONTROL, {"metrics": {}})["metrics"].get(metric)
            if control is not None:
                panel.axhline(control["mean"], color="grey", linewidth=0.9, linestyle="--")
            panel.set_xticks(range(len(ordered)), [f"{value:g}" for value in ordered])
            panel.set_xlim(-0.4, len(ordered) - 0.6)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(METRICS[metric][0])
            if line == len(shown) - 1:
                panel.set_xlabel(factor)
    with pyplot.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog="python -m empathic.benchmarks.epo_sweep",
        description="Vary the settings of EPO one at a time on the tiny corpus, several seeds each.",
    )
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="Folder (%(default)s).")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/epo_sweep.json"), help="JSON (%(default)s)."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of each setting (%(default)s).")
    parser.add_argument("--steps", type=int, default=80, help="Steps of each run (%(default)s).")
    parser.add_argument("--samples", type=int, default=140, help="Held-out conversations (%(default)s).")
    for name, values in FACTORS.items():
        parser.add_argument(
            f"--{name}", type=float, nargs="*", default=list(values), help="Values; none: not varied (%(default)s)."
        )
    options = parser.parse_args(argv)
    for name in ("steps", "samples"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    for name in FACTORS:
        try:
            for value in getattr(options, name):
                EPOConfig(output_dir=tempfile.gettempdir(), **{name: value})
        except ValueError as error:
            parser.error(f"--{name}: {error}")
    missing = [part for part in ("dialogue", "pairs", "data", "parts") if not (options.quickstart / part).is_dir()]
    if missing:
        parser.error(
            f"--quickstart {options.quickstart} has no {', '.join(missing)}. Run `empathic quickstart --output "
            f"{options.quickstart}` first."
        )
    return options


def read_runs(output: Path, about: dict) -> list[dict]:
    """
    Return the runs of an earlier call with the same output.

    Raises:
        ValueError: if that call had other settings or another base model.
    """
    if not output.exists():
        return []
    before = json.loads(output.read_text(encoding="utf-8"))
    for name, value in about.items():
        former = before.get("about", {}).get(name)
        if former != value:
            raise ValueError(
                f"{output} has runs with {name} {former!r}, but now {name} is {value!r}. Give another --output, or the "
                "former settings."
            )
    return before["runs"]


def main(argv: list[str] | None = None) -> dict:
    """Run what is missing of the sweep, print the table, and return and write all results."""
    options = parse(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    factors = {name: tuple(getattr(options, name)) for name in FACTORS if getattr(options, name)}
    about = {
        "steps": options.steps,
        "samples": options.samples,
        "base": fingerprint([identity_of(str(options.quickstart / name)) for name in ("dialogue", "pairs")]),
        "defaults": defaults(),
    }
    with held_folder(options.output.parent, "epo_sweep", f".{options.output.stem}.lock"):
        runs = read_runs(options.output, about)
        result: dict = {"command": " ".join(["python -m empathic.benchmarks.epo_sweep", *(argv or sys.argv[1:])])}
        result |= {"about": about, "machine": describe_machine(), "runs": runs, "summary": summarize(runs)}
        done = {(row["setting"], row["seed"]) for row in runs}
        wanted = [Setting(BASE), *settings_of(factors)]
        waiting = [
            (setting, seed)
            for seed in options.seeds
            for setting in wanted
            if (setting.name, seed) not in done and not (setting.name == BASE and seed != options.seeds[0])
        ]
        if waiting:
            judge = Judge(options.quickstart, options.samples)
        for setting, seed in tqdm(waiting, desc="runs", initial=len(done), total=len(done) + len(waiting)):
            with redirect_stdout(sys.stderr):
                if setting.name == BASE:
                    with tempfile.TemporaryDirectory() as scratch:
                        row = {"setting": BASE, "options": {}, "seed": seed}
                        row["metrics"] = judge(options.quickstart / "dialogue", Path(scratch))
                else:
                    row = run(options.quickstart, setting, seed, options.steps, judge)
            runs.append(row)
            order = [one.name for one in wanted]
            runs.sort(key=lambda one: order.index(one["setting"]) if one["setting"] in order else len(order))
            result["summary"] = summarize(runs)
            write_json(options.output, result)
        if factors:
            plot(result["summary"], factors, options.output.with_suffix(".svg"))
    print(markdown(result["summary"]))
    return result


if __name__ == "__main__":
    main()
