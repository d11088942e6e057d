"""
How many memory vectors an utterance needs: one, two, or one for every 16 tokens, on the tiny preset with long turns.

    python -m empathic.benchmarks.memory_vectors runs/memory_vectors --seeds 0 1 2

A turn joins one to three sentences of the tiny preset's grammar, so that it has about 10 to 45 tokens. The language
model is pretrained to read an utterance from one to four vectors, so that no number of vectors is new to it. Each arm
trains both memory stages for the same steps, from the same weights, and rebuilds turns of held-out conversations.

Finished parts of the work are kept in the output folder; the same command goes on with the missing ones.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

from datasets import load_dataset

from ..configuration_empathic import MEMORY_SIZE
from ..data_prep.corpora.folder import prepare_folder
from ..data_prep.views import conversations
from ..evaluation.memory_rates import rate_scores
from ..evaluation.reconstruction import rebuild
from ..files import held_folder, write_json, write_text
from ..modeling_empathic import EmpathicForConditionalGeneration
from ..processing_empathic import EmpathicProcessor
from ..quickstart import RECIPES, pick
from ..tiny.dialogues import CITIES, CONTENT_WORDS, NAMES, NUMBERS, PETS, make_dialogues
from ..tiny.language_model import pretrain_language_model
from ..trainers import train
from ..trainers.checkpoints.stage_folder import load_model
from .efficiency_options import positive
from .efficiency_report import table
from .feature_cache import write_parts
from .machine import describe_machine

ARMS = {"1 vector": (1, None), "2 vectors": (2, None), "1 for every 16 tokens": (1, 16)}
MOST_SENTENCES = 3
MOST_VECTORS = 4
SPLITS = {"train": 2000, "validation": 2, "test": 200}
STAGES = ("memory_single", "memory_multi")
UTTERANCES = (1, 3)
COLUMNS = {"names": "names, numbers", "recall": "content words", "bleu1": "BLEU-1", "exact": "exact"}
WORDS = {*NAMES, *CITIES, *PETS, *NUMBERS}


def long_dialogues(num: int, seed: int, split: str) -> list[list[dict]]:
    """Like `make_dialogues`; but some turns of each speaker join the sentences of up to `MOST_SENTENCES` turns."""
    rng, found = random.Random(seed), []
    for dialogue in make_dialogues(num, seed, split):
        pairs, joined = [dialogue[place : place + 2] for place in range(0, len(dialogue), 2)], []
        while pairs:
            count = rng.randint(1, MOST_SENTENCES)
            taken, pairs = pairs[:count], pairs[count:]
            for place in (0, 1):
                text = " ".join(pair[place]["text"] for pair in taken)
                joined.append({**taken[-1][place], "text": text, "recall": [], "pair": None})
        found.append(joined)
    return found


def write_data(root: Path) -> None:
    """Write the conversations of all splits, and prepare them."""
    rows = [
        {
            "split": split,
            "dialogue_id": f"{split}-{number}",
            "turn": place,
            "speaker": turn["speaker"],
            "text": turn["text"],
        }
        for split, count in SPLITS.items()
        for number, dialogue in enumerate(long_dialogues(count, 1, split))
        for place, turn in enumerate(dialogue)
    ]
    (root / "texts").mkdir(parents=True, exist_ok=True)
    write_text(root / "texts" / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prepare_folder(root / "texts", root / "data", progress=False)


def write_base(root: Path, seed: int, steps: int) -> None:
    """Pretrain a language model, and write the model with a memory of random weights to `root/base`."""
    parts = root / "parts"
    tokenizer = write_parts(parts)
    dialogues = long_dialogues(4000, 100, "train")
    pretrain_language_model(tokenizer, dialogues, parts / "text", steps, seed=seed, most_vectors=MOST_VECTORS)
    folders = {name: str(parts / name) for name in train.PART_NAMES}
    options, qformer = {"num_query_tokens": 4, "num_frames": 2}, {"num_hidden_layers": 1, "hidden_size": 48}
    model = EmpathicForConditionalGeneration.from_parts_pretrained(
        **folders, **options, video_qformer_config=qformer, audio_qformer_config=qformer
    )
    model.save_pretrained(root / "base")
    EmpathicProcessor.from_parts_pretrained(**folders, **options).save_pretrained(root / "base")


def train_arm(base: Path, data: Path, root: Path, size: tuple[int, int | None], steps: int, seed: int) -> Path:
    """Train both memory stages and return the folder of the last."""
    start = base
    for stage in STAGES:
        arguments = ["--config", str(RECIPES / f"{stage}.yaml"), "--dataset_name", str(data), "--use_cpu", "True"]
        arguments += ["--model_name_or_path", str(start), "--output_dir", str(root / stage), "--max_steps", str(steps)]
        arguments += ["--seed", str(seed), "--max_utterances", str(max(UTTERANCES)), "--dataloader_num_workers", "0"]
        if start is base:
            for option, value in zip(MEMORY_SIZE, size, strict=True):
                arguments += [] if value is None else [f"--{option}", str(value)]
        train.main(arguments)
        start = root / stage
    return start


def evaluate_arm(folder: Path, data: Path, runs: int) -> dict:
    """Rebuild held-out turns, one and several at a time; return the scores, and the vectors per turn."""
    model, processor = load_model(str(folder)).eval(), EmpathicProcessor.from_pretrained(folder)
    seen = set(load_dataset(str(data), split="train")["text"])
    dialogues = [conversation["turns"] for conversation in conversations(load_dataset(str(data), split="test"))]
    found = {}
    for count in UTTERANCES:
        chosen = [
            turns[start : start + count] for turns in dialogues for start in range(0, len(turns) - count + 1, count)
        ]
        chosen = pick([run for run in chosen if not seen & {turn["text"] for turn in run}], runs)
        answers, expected = rebuild(model, processor, chosen)
        found[str(count)] = rate_scores(answers, expected, CONTENT_WORDS, WORDS)
        vectors = (processor.count_memories(turn["speaker"], turn["text"]) for run in chosen for turn in run)
        found[str(count)]["vectors"] = statistics.mean(vectors)
    return found


def report(results: list[dict]) -> str:
    """The results of all seeds as Markdown: the mean, and the lowest and highest of the seeds."""
    rows = []
    for count in UTTERANCES:
        for arm in ARMS:
            those = [result["scores"][str(count)] for result in results if result["arm"] == arm]
            if those:
                cells = [_spread([scores[column] for scores in those]) for column in COLUMNS]
                rows.append([str(count), arm, f"{those[0]['vectors']:.2f}", *cells])
    return table(["turns rebuilt at once", "arm", "vectors of a turn", *COLUMNS.values()], rows)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def run(root: Path, seeds: list[int], steps: int, pretraining_steps: int, runs: int) -> list[dict]:
    """Train and evaluate every arm with every seed, and return the results."""
    if not (root / "data").is_dir():
        write_data(root)
    results = []
    for seed in seeds:
        own, settings = root / f"seed_{seed}", {"seed": seed, "steps": steps, "pretraining_steps": pretraining_steps}
        for number, (arm, size) in enumerate(ARMS.items()):
            file = own / f"arm_{number}.json"
            if not file.is_file():
                if not (own / "base" / "config.json").is_file():
                    write_base(own, seed, pretraining_steps)
                folder = train_arm(own / "base", root / "data", own / f"arm_{number}", size, steps, seed)
                write_json(file, {"arm": arm, **settings, "scores": evaluate_arm(folder, root / "data", runs)})
            result = json.loads(file.read_text(encoding="utf-8"))
            if any(result[name] != value for name, value in settings.items()):
                raise SystemExit(f"{file} is from another run, not from {settings}. Give a new folder.")
            results.append(result)
    return results


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the benchmark, print the table, and write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of all weights and samples (0)")
    parser.add_argument("--steps", type=positive, default=350, help="steps of each memory stage (350)")
    parser.add_argument("--pretraining_steps", type=positive, default=1200, help="steps of the language model (1200)")
    parser.add_argument("--runs", type=positive, default=200, help="held-out runs to rebuild (200)")
    arguments = parser.parse_args(argv)
    with held_folder(arguments.root, "empathic.benchmarks.memory_vectors"):
        results = run(*(getattr(arguments, name) for name in ("root", "seeds", "steps", "pretraining_steps", "runs")))
        print(report(results))
        write_json(arguments.root / "results.json", {"arms": results, "machine": describe_machine()})
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
