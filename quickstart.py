"""
The whole paper on a model small enough for a laptop, from nothing and without a network:

    empathic quickstart --output runs/quickstart

A synthetic audio-visual corpus is written and read back as a user's own recordings would be, the pretrained parts get
small stand-ins, the five stages are trained by the recipes in `recipes/tiny`, and a table shows what each taught. A run
that was stopped goes on with the step it was in.
"""

import json
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import load_dataset

from empathic.data_prep.candidates import EmpathicGenerator, message_text
from empathic.data_prep.counter import counter_pairs, identity_of
from empathic.data_prep.folder import prepare_folder
from empathic.data_prep.views import DialogueSamples, conversations, utterances
from empathic.evaluation import emotion as figure_6
from empathic.evaluation.emotion_features import EmotionFeatures
from empathic.evaluation.generation import generate_texts
from empathic.evaluation.metrics import word_recall
from empathic.evaluation.quickstart_results import write_scored_replies
from empathic.evaluation.reconstruction import reconstruction_row
from empathic.evaluation.report import write_report
from empathic.evaluation.scores import Scoring
from empathic.evaluation.tables import reply_row, reward_row, table
from empathic.processing_empathic import EmpathicProcessor
from empathic.sampling import Sampling
from empathic.tiny.corpus import write_corpus
from empathic.tiny.dialogues import ASSISTANT, CONTENT_WORDS, emotion_sentences, make_dialogues, words_of
from empathic.tiny.emotion_classifier import train_emotion_classifier
from empathic.tiny.encoders import pretrain_encoders
from empathic.tiny.language_model import pretrain_language_model, prompt_texts
from empathic.tiny.memory_encoder import write_memory_encoder
from empathic.tiny.vocabulary import build_memory_tokenizer, build_text_tokenizer
from empathic.trainers import train
from empathic.trainers.checkpoint import load_model, merge
from empathic.trainers.model_card import read_record, write_card, write_record
from empathic.trainers.samples import dialogue_sample

RECIPES = Path(__file__).parent / "recipes" / "tiny"

# What the stages train on, where it is not the recordings.
MEMORY_DATA = ("data", "text_data")
DATA_SETS = {"memory_single": MEMORY_DATA, "memory_multi": MEMORY_DATA, "epo": ("pairs",)}

# The dialogue models of the table, and what each gets to see: folder -> (history, media).
ARMS = {
    "text": ("none", False),
    "memory": ("memory", False),
    "memory_av": ("memory", True),
    "epo": ("memory", True),
    "control": ("memory", True),
}
ARM_FOLDERS = {"text": "dialogue_text", "memory": "dialogue_memory", "memory_av": "dialogue"}
ARM_TITLES = {
    "text": "no memory, no media",
    "memory": "+ memory",
    "memory_av": "+ audio and video",
    "epo": "+ EPO",
    "control": "control: same steps, no EPO",
}
# Which similarity of emotion features selects and scores, and the paper's threshold (Sec. 8).
POOLING, THRESHOLD = "probabilities", 0.1
# Conversations without clips, for the memory stages beside the recorded ones.
MORE_TEXT = {"train": 2700}
TRAIN_PAIRS, TEST_PAIRS, TEST_SAMPLES, TEST_RUNS = 210, 140, 280, 100

STAND_INS = (
    "In this preset, made from nothing in minutes, small things stand in for large ones",
    [
        ["language model", "a Qwen2 of a million parameters, pretrained here", "Qwen2.5-7B-Instruct"],
        ["encoders", "CLIP and Whisper, pretrained here on drawing parameters", "CLIP ViT-B/32, Whisper tiny"],
        ["memory encoder", "a Mamba of 2 layers, from random weights", "Mamba-370M"],
        ["emotion features", "a small classifier of the grammar's sentences", "the GoEmotions RoBERTa"],
        ["corpus", "drawn faces, synthetic voices, a grammar", "five corpora of people"],
    ],
)


class Steps:
    """Runs named steps once; what they returned, and how long they took, is kept in `steps.json`."""

    def __init__(self, folder: Path):
        self.file, self.logs = folder / "steps.json", folder / "logs"
        self.done = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def run(self, name: str, work, *args):
        """The result of `work(*args)`, which must be JSON, from this run or an earlier one."""
        return self.together((name, work, *args))[0]

    def together(self, *steps: tuple) -> list:
        """
        Results of steps (name, work, *args) that do not need one another.

        The first runs here; the others one by one in a second process, with their output in `logs/`: the models are so
        small that two processes of one thread each do more than one process of two threads.
        """
        waiting = [step for step in steps if step[0] not in self.done]
        for name in (step[0] for step in steps if step not in waiting):
            print(f"- {name}: done before")
        if not waiting:
            return [self.done[step[0]]["result"] for step in steps]
        here, *others = waiting
        print(f"- {here[0]}" + "".join(f"; beside it: {name}" for name, *_ in others), flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            started = {pool.submit(_timed_to_log, self.logs / f"{step[0]}.log", *step[1:]): step[0] for step in others}
            self._finish(here[0], *_timed(*here[1:]))
            for job in as_completed(started):
                self._finish(started[job], *job.result())
        return [self.done[step[0]]["result"] for step in steps]

    def _finish(self, name: str, seconds: float, result) -> None:
        self.done[name] = {"seconds": round(seconds, 1), "result": result}
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(self.done, indent=2), encoding="utf-8")
        partial.replace(self.file)
        print(f"  {name}: {seconds:.0f} s", flush=True)


def _timed(work, *args) -> tuple[float, object]:
    torch.set_num_threads(1)  # two threads gain little here, and lose much as soon as another process is busy
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def _timed_to_log(log: Path, work, *args) -> tuple[float, object]:
    log.parent.mkdir(exist_ok=True)
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        return _timed(work, *args)


def write_recordings(root: Path) -> int:
    """The corpus of clips, read back as a user's own recordings would be; returns its turns."""
    write_corpus(root / "recordings")
    return prepare_folder(root / "recordings", root / "data", num_workers=2)["rows"]


def write_texts(root: Path) -> int:
    """More conversations, without clips."""
    write_corpus(root / "texts", num_dialogues=MORE_TEXT, seed=1, with_clips=False)
    return prepare_folder(root / "texts", root / "text_data")["rows"]


def write_encoders(root: Path) -> None:
    """The stand-ins for CLIP, Whisper, Mamba and the emotion classifier, and the texts for the memory."""
    write_texts(root)
    pretrain_encoders(root / "parts")
    write_memory_encoder(build_memory_tokenizer(prompt_texts()), root / "parts" / "memory")
    sentences, labels = zip(*emotion_sentences(4000, seed=7), strict=True)
    train_emotion_classifier(root / "parts" / "emotion_classifier", list(sentences), list(labels))


def write_language_model(root: Path) -> None:
    """The stand-in for Qwen2.5, pretrained on conversations of its own."""
    dialogues = make_dialogues(4000, seed=100, split="train")
    pretrain_language_model(build_text_tokenizer(prompt_texts()), dialogues, root / "parts" / "text")


def train_stage(root: Path, recipe: str, output: str, base: str | None = None, *options: str) -> dict:
    """Trains by a recipe of the preset, in and from the folders of this run."""
    arguments = ["--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(root / output)]
    arguments += ["--dataset_name", *(str(root / name) for name in DATA_SETS.get(recipe, ("data",)))]
    if base is None:
        for part in train.PARTS:
            arguments += [f"--{part}", str(root / "parts" / part)]
    else:
        arguments += ["--model_name_or_path", str(root / base)]
    return train.main([*arguments, *options])


def make_pairs(root: Path) -> dict:
    """Counter-emotional replies by the dialogue model with its adapter off, and the pairs they make (Sec. 3.3)."""
    folder, classifier = str(root / "dialogue"), str(root / "parts" / "emotion_classifier")
    data = load_dataset(str(root / "data"))
    counts = {"train": TRAIN_PAIRS, "test": TEST_PAIRS}
    samples = {split: pick(DialogueSamples(data[split], [ASSISTANT]), count) for split, count in counts.items()}
    # The tiny language model was pretrained to answer a sentence in a given feeling, not to look back as well.
    history, sampling = "none", Sampling(max_new_tokens=32, temperature=0.5)

    def generator() -> EmpathicGenerator:
        return EmpathicGenerator(
            load_model(folder), EmpathicProcessor.from_pretrained(folder), history, False, sampling
        )

    about = {"history": history, "sampling": vars(sampling), "identity": [identity_of(folder), identity_of(classifier)]}
    report = counter_pairs(
        samples,
        generator,
        lambda: EmotionFeatures(classifier),
        root / "pairs",
        about,
        pooling=POOLING,
        threshold=THRESHOLD,
    )
    return {split: counts["pairs"] for split, counts in report["splits"].items()}


def pick(items, count: int, seed: int = 0) -> list:
    """At most `count` items, drawn without repetition."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[i] for i in sorted(chosen)]


def recall_words(sample: dict) -> set[str]:
    """Content words of the true reply that the history holds and the sentence does not."""
    *earlier, last = [set(words_of(message_text(message))) for message in sample["prompt"]]
    return (set(words_of(sample["reply"])) & set(CONTENT_WORDS) & set().union(*earlier)) - last


def evaluate_arm(root: Path, arm: str) -> dict:
    """A dialogue model's row of the table, and its replies."""
    history, use_media = ARMS[arm]
    folder = str(root / ARM_FOLDERS.get(arm, arm))
    model, processor = load_model(folder), EmpathicProcessor.from_pretrained(folder)
    features = EmotionFeatures(str(root / "parts" / "emotion_classifier"), pooling=POOLING)
    samples = pick(DialogueSamples(load_dataset(str(root / "data"), split="test"), [ASSISTANT]), TEST_SAMPLES)

    def seen(prompt):
        return dialogue_sample({"prompt": prompt, "reply": ""}, history, use_media)["messages"]

    replies = generate_texts(model, processor, [seen(s["prompt"]) for s in samples], description=f"replies: {arm}")
    row = reply_row(replies, [sample["reply"] for sample in samples], features)
    row["recall"] = word_recall(replies, [sorted(recall_words(sample)) for sample in samples])
    pairs = [{**row, "prompt": seen(row["prompt"])} for row in load_dataset(str(root / "pairs"), split="test")]
    row |= reward_row(model, processor, pairs, root / "scratch")
    return {"row": row, "replies": replies}


def evaluate_memory(root: Path) -> dict:
    """Rebuilding of held-out utterances, one and five at a time."""
    folder = str(root / "memory_multi")
    model, processor = load_model(folder), EmpathicProcessor.from_pretrained(folder)
    trained_on = [load_dataset(str(root / name), split="train") for name in MEMORY_DATA]
    seen = {text for rows in trained_on for text in rows["text"]}
    test = load_dataset(str(root / "data"), split="test")
    single = [row for row in utterances(test) if row["text"] not in seen]
    runs = [c["turns"][:5] for c in conversations(test) if len(c["turns"]) >= 5]
    return {
        "1": reconstruction_row(model, processor, [[row] for row in pick(single, 2 * TEST_RUNS)], CONTENT_WORDS),
        "5": reconstruction_row(model, processor, pick(runs, TEST_RUNS), CONTENT_WORDS),
    }


def evaluate_emotion(root: Path) -> dict:
    """Emotion accuracy on the held-out clips; the confusion too, in `evaluation/emotion.json`."""
    model, data = str(root / "emotion"), str(root / "data")
    found = figure_6.evaluate_emotion(model, data, root / "evaluation", device="cpu", progress=False)["systems"]
    names = figure_6.QUICKSTART_SETTINGS
    return {name: found[setting]["metrics"]["accuracy"]["mean"] for name, setting in names.items()}


def write_evaluation(root: Path, samples: list[dict], replies: dict[str, list[str]]) -> Path:
    """Scores the models' replies with their intervals, and writes the report of it all; returns its path."""
    about = {
        ARM_TITLES[arm]: {"target": ARM_FOLDERS.get(arm, arm), "history": history, "media": media}
        for arm, (history, media) in ARMS.items()
    }
    classifier = str(root / "parts" / "emotion_classifier")
    metrics = ("emotion_score", "dist1", "corpus_dist1")
    write_scored_replies(
        root / "evaluation",
        samples,
        {ARM_TITLES[arm]: texts for arm, texts in replies.items()},
        Scoring(metrics=metrics, classifier=classifier, pooling=POOLING, device="cpu"),
        settings={"data": str(root / "data"), "split": "test", "samples": TEST_SAMPLES},
        systems=about,
        baseline=ARM_TITLES["memory_av"],
    )
    return write_report([root])


def report(results: dict, replies: dict[str, list[str]], samples: list[dict]) -> str:
    """All that the run shows at its end."""
    emotion, rebuilt, dialogue = results["emotion"], results["reconstruction"], results["dialogue"]
    titles = {"T": "T", "AT": "A+T", "VT": "V+T", "AVT": "A+V+T"}
    parts = [
        "Stage emotion: accuracy on held-out clips (seven emotions, half of the sentences do not tell)",
        table(["input", "accuracy"], [[titles[key], value] for key, value in emotion.items()]),
        "Stages memory_*: held-out utterances rebuilt from one vector each",
        table(
            ["utterances", "BLEU-1", "BLEU-4", "content words", "exact"],
            [[n, row["bleu1"], row["bleu4"], row["recall"], row["exact"]] for n, row in rebuilt.items()],
        ),
        f"Stages dialogue and epo: replies in held-out conversations (EmotionScore pooling: {POOLING})",
        table(
            ["model", "EmotionScore", "Dist-1", "recall of history", "reward accuracy", "margin"],
            [
                [ARM_TITLES[arm], r["emotion_score"], r["dist1"], r["recall"], r["reward_accuracy"], r["margin"]]
                for arm, r in dialogue.items()
            ],
        ),
        STAND_INS[0],
        table(["part", "here", "stands in for"], STAND_INS[1]),
        "Three held-out conversations",
    ]
    for number, sample in enumerate(samples):
        *earlier, last = sample["prompt"]
        lines = [f"  {m.get('name') or m['role']}: {message_text(m)}" for m in earlier]
        lines.append(f"  {last.get('name')}: {message_text(last)}   [clip: {sample['emotion']}]")
        lines += [f"      {ARM_TITLES[arm]:<28} {texts[number]}" for arm, texts in replies.items()]
        lines.append(f"      {'the true reply':<28} {sample['reply']}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def quickstart(output: str = "runs/quickstart") -> dict:
    """
    Trains and evaluates everything; writes `model/` (one whole checkpoint), `results.json` and `report.html`.

    Returns:
        The results, as in `results.json`.
    """
    root = Path(output)
    root.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the second process
    steps = Steps(root)
    steps.run("corpus", write_recordings, root)
    steps.together(("language model", write_language_model, root), ("encoders", write_encoders, root))

    steps.run("stage emotion", train_stage, root, "emotion", "emotion")
    steps.run("stage memory_single", train_stage, root, "memory_single", "memory_single", "emotion")
    steps.run("stage memory_multi", train_stage, root, "memory_multi", "memory_multi", "memory_single")
    arms = []
    for arm in ("memory_av", "memory", "text"):
        options = ("--history", ARMS[arm][0], "--use_media", str(ARMS[arm][1]))
        arms.append(
            (f"stage dialogue, {arm}", train_stage, root, "dialogue", ARM_FOLDERS[arm], "memory_multi", *options)
        )
    steps.together(*arms)
    steps.together(
        ("counter-emotional replies", make_pairs, root),
        ("evaluate rebuilding", evaluate_memory, root),
        ("evaluate emotion", evaluate_emotion, root),
    )
    steps.together(
        ("stage epo", train_stage, root, "epo", "epo", "dialogue"),
        ("control", train_stage, root, "epo", "control", "dialogue", "--epo_weight", "0"),
    )
    outcomes = steps.together(*((f"evaluate {arm}", evaluate_arm, root, arm) for arm in ARMS))
    steps.run("model", merge, str(root / "epo"), str(root / "model"))
    emotion, rebuilt = steps.done["evaluate emotion"]["result"], steps.done["evaluate rebuilding"]["result"]
    arms = dict(zip(ARMS, outcomes, strict=True))

    results = {
        "emotion": emotion,
        "reconstruction": rebuilt,
        "dialogue": {arm: outcome["row"] for arm, outcome in arms.items()},
        "seconds": {name: step["seconds"] for name, step in steps.done.items()},
    }
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_record(root / "model", {**read_record(str(root / "model")), "results": results})
    write_card(root / "model")
    samples = pick(DialogueSamples(load_dataset(str(root / "data"), split="test"), [ASSISTANT]), TEST_SAMPLES)
    shown = [i for i, sample in enumerate(samples) if recall_words(sample)][:3]
    replies = {arm: [outcome["replies"][i] for i in shown] for arm, outcome in arms.items()}
    text = report(results, replies, [samples[i] for i in shown])
    (root / "report.txt").write_text(text + "\n", encoding="utf-8")
    page = write_evaluation(root, samples, {arm: outcome["replies"] for arm, outcome in arms.items()})
    print(f"\n{text}\n\nWith plots, intervals and clips: {page}")
    print(f"The checkpoint is {root / 'model'}; talk to it with: empathic chat {root / 'model'}")
    return results
