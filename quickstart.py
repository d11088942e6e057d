"""
The whole paper on a model small enough for a laptop, trained from scratch and without a network:

    empathic quickstart --output runs/quickstart

The quickstart writes a synthetic audio-visual corpus and prepares it like a user's own recordings, pretrains small
stand-ins for the pretrained parts, trains the five stages with the recipes in `recipes/tiny`, and shows the effect of
each stage in a table. A stopped run resumes with the step that was interrupted.
"""

import json
import os
import random
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from datasets import load_dataset

from .data_prep.corpora.folder import prepare_folder
from .data_prep.counter.build import counter_pairs, identity_of
from .data_prep.counter.generators import EmpathicGenerator
from .data_prep.messages import message_text
from .data_prep.views import DialogueSamples, conversations, utterances
from .evaluation import emotion as figure_6
from .evaluation.contrast.table import ContrastOptions, evaluate_contrast
from .evaluation.emotion_features import EmotionFeatures
from .evaluation.generation import generate_texts
from .evaluation.metrics import emotion_score, word_recall
from .evaluation.quickstart_results import compare_seeds, seed_cells, write_scored_replies
from .evaluation.reconstruction import reconstruction_row
from .evaluation.report.build import write_report
from .evaluation.scores import Scoring
from .evaluation.tables import reply_row, reward_row, table, with_interval
from .files import fingerprint, held_folder, write_json
from .hub.model_card import read_record, write_card, write_record
from .processes import end_with_launcher, launch
from .processing_empathic import EmpathicProcessor
from .sampling import Sampling
from .tiny.corpus import write_contrast_corpus, write_corpus
from .tiny.dialogues import ASSISTANT, CONTENT_WORDS, emotion_sentences, make_dialogues, words_of
from .tiny.emotion_classifier import train_emotion_classifier
from .tiny.encoders import pretrain_encoders
from .tiny.language_model import pretrain_language_model, prompt_texts
from .tiny.memory_encoder import write_memory_encoder
from .tiny.vocabulary import build_memory_tokenizer, build_text_tokenizer
from .trainers import train
from .trainers.checkpoints.stage_folder import load_model, merge
from .trainers.samples import dialogue_sample

RECIPES = Path(__file__).parent / "recipes" / "tiny"

# Of one thread each: the models are so small that these are faster than one process with two threads.
PROCESSES = 2
# Training data of the stages that do not train on the recordings alone.
MEMORY_DATA = ("data", "text_data")
DATA_SETS = {"memory_single": MEMORY_DATA, "memory_multi": MEMORY_DATA, "epo": ("pairs",)}

# The dialogue models of the table and their inputs: arm -> (history, media).
ARMS = {
    "text": ("none", False),
    "memory": ("memory", False),
    "memory_av": ("memory", True),
    "epo": ("memory", True),
    "control": ("memory", True),
}
ARM_FOLDERS = {"text": "dialogue_text", "memory": "dialogue_memory", "memory_av": "dialogue"}
SEEDS = (0, 1, 2)  # of EPO and of its control; the model is that of the first
ARM_TITLES = {
    "text": "no memory, no media",
    "memory": "+ memory",
    "memory_av": "+ audio and video",
    "epo": "+ EPO",
    "control": "control: same steps, no EPO",
}
# What is trained with several seeds, and its options: EPO, and the same steps with the autoregressive loss alone.
SEEDS_ARMS = {"epo": (), "control": ("--epo_weight", "0")}
# Sampling from the distribution that was trained: how often a reply is wrong. Greedy decoding shows only which reply is
# the most likely one.
AS_TRAINED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
DIALOGUE_METRICS = {
    "emotion_score": "EmotionScore",
    "emotion_score_sampled": "sampled",
    "dist1": "Dist-1",
    "recall": "recall of history",
    "reward_accuracy": "reward accuracy",
    "margin": "margin",
}
SEEDS_HEADER = ["metric", "EPO", "control", "difference", "95% interval", "p"]
SEEDS_METRICS = {
    "emotion_score": "EmotionScore, greedy replies",
    "emotion_score_sampled": "EmotionScore, sampled replies",
    "recall": "recall of history",
    "reward_accuracy": "reward accuracy",
    "margin": "margin",
}
# Emotion features for selecting pairs and scoring replies, and the paper's similarity threshold (Sec. 8).
POOLING, THRESHOLD = "probabilities", 0.1
# Further conversations, without clips, for the memory stages.
MORE_TEXT = {"train": 2700}
TRAIN_PAIRS, TEST_PAIRS, TEST_SAMPLES, TEST_RUNS = 300, 140, 280, 100
# The models that get the same words with clips of different emotions, and what they get of each clip.
CONTRAST_ARMS, CONTRAST_CONDITIONS = ("control", "epo", "memory_av", "text"), ("full", "absent", "audio", "video")
CONTRAST_METRICS = ("changed", "movement", "matched", "likelihood")

STAND_INS = (
    "This preset is trained from scratch in minutes, with small stand-ins for the paper's parts",
    [
        ["language model", "a Qwen2 with a million parameters, pretrained here", "Qwen2.5-7B-Instruct"],
        ["encoders", "CLIP and Whisper, pretrained here on synthetic clips", "CLIP ViT-B/32, Whisper tiny"],
        ["memory encoder", "a Mamba with 2 layers, from random weights", "Mamba-370M"],
        ["emotion features", "a small classifier of the grammar's sentences", "the GoEmotions RoBERTa"],
        ["corpus", "drawn faces, synthetic voices, a grammar", "five corpora of real people"],
    ],
)


class Steps:
    """Run each named step once; save its result and duration in `steps.json`."""

    def __init__(self, folder: Path):
        self.file, self.logs = folder / "steps.json", folder / "logs"
        self.done = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def run(self, name: str, work, *args):
        """Return the result of `work(*args)` from this run or an earlier run. It must be JSON-serializable."""
        return self.together((name, work, *args))[0]

    def together(self, *steps: tuple) -> list:
        """
        Return the results of independent steps (name, work, *args).

        The first step runs in this process; the others run one by one in a second process, with their output in
        `logs/`. The models are so small that two processes with one thread each are faster than one process with two
        threads.
        """
        waiting = [step for step in steps if step[0] not in self.done]
        for name in (step[0] for step in steps if step not in waiting):
            print(f"- {name}: done before")
        if not waiting:
            return [self.done[step[0]]["result"] for step in steps]
        here, *others = waiting
        print(f"- {here[0]}" + "".join(f"; in parallel: {name}" for name, *_ in others), flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
            started = {pool.submit(_timed_to_log, self.logs / f"{step[0]}.log", *step[1:]): step[0] for step in others}
            try:
                self._finish(here[0], *_timed(*here[1:]))
                for job in as_completed(started):
                    self._finish(started[job], *job.result())
            except BaseException:  # leaving the pool would wait for its work, which nobody needs now
                for process in active_children():
                    process.terminate()
                raise
        return [self.done[step[0]]["result"] for step in steps]

    def _finish(self, name: str, seconds: float, result) -> None:
        self.done[name] = {"seconds": round(seconds, 1), "result": result}
        write_json(self.file, self.done)
        print(f"  {name}: {seconds:.0f} s", flush=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets the Ctrl-C too, and ends this one
    end_with_launcher()


def _timed(work, *args) -> tuple[float, object]:
    torch.set_num_threads(1)  # a second thread gains little, and slows both down when another process is busy
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def _timed_to_log(log: Path, work, *args) -> tuple[float, object]:
    log.parent.mkdir(exist_ok=True)
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        return _timed(work, *args)


def write_recordings(root: Path) -> int:
    """Write the corpus of clips and prepare it like a user's own recordings; return the number of turns."""
    write_corpus(root / "recordings")
    return prepare_folder(root / "recordings", root / "data", num_workers=2)["rows"]


def write_contrasts(root: Path) -> int:
    """Write sentences that are said with every emotion, and prepare them; return the number of turns."""
    write_contrast_corpus(root / "contrast_recordings")
    return prepare_folder(root / "contrast_recordings", root / "contrast_data")["rows"]


def write_texts(root: Path) -> int:
    """Write further conversations, without clips; return the number of turns."""
    write_corpus(root / "texts", num_dialogues=MORE_TEXT, seed=1, with_clips=False)
    return prepare_folder(root / "texts", root / "text_data")["rows"]


def write_encoders(root: Path) -> None:
    """Write the stand-ins for CLIP, Whisper, Mamba and the emotion classifier, and the texts for the memory."""
    write_texts(root)
    pretrain_encoders(root / "parts")
    write_memory_encoder(build_memory_tokenizer(prompt_texts()), root / "parts" / "memory")
    sentences, labels = zip(*emotion_sentences(4000, seed=7), strict=True)
    train_emotion_classifier(root / "parts" / "emotion_classifier", list(sentences), list(labels))


def write_language_model(root: Path) -> None:
    """Write the stand-in for Qwen2.5, pretrained on separate conversations."""
    dialogues = make_dialogues(4000, seed=100, split="train")
    tokenizer = build_text_tokenizer(prompt_texts())
    pretrain_language_model(tokenizer, dialogues, root / "parts" / "text", processes=PROCESSES)


def stage_arguments(root: Path, recipe: str, output: str, base: str | None, *options: str) -> list[str]:
    """The command line of a training with a recipe of the preset and the folders of this run."""
    arguments = ["--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(root / output)]
    arguments += ["--dataset_name", *(str(root / name) for name in DATA_SETS.get(recipe, ("data",)))]
    if base is None:
        for part in train.PART_NAMES:
            arguments += [f"--{part}", str(root / "parts" / part)]
    else:
        arguments += ["--model_name_or_path", str(root / base)]
    return [*arguments, *options]


def train_stage(root: Path, recipe: str, output: str, base: str | None = None, *options: str) -> dict:
    """Train with a recipe in this process."""
    return train.main(stage_arguments(root, recipe, output, base, *options))


def train_stage_together(root: Path, recipe: str, output: str, base: str, *options: str) -> dict:
    """Train with a recipe in the processes of `accelerate launch`, which divide each batch; on a GPU, in this one."""
    if torch.accelerator.is_available():
        return train_stage(root, recipe, output, base, *options)
    arguments = stage_arguments(root, recipe, output, base, "--use_cpu", "True", *options)
    arguments += ["--ddp_find_unused_parameters", "False"]  # these stages use all that they train in every step
    batch = train.parse(arguments)[1].per_device_train_batch_size // PROCESSES
    arguments += ["--per_device_train_batch_size", str(batch)]
    status = launch("empathic.trainers.train", arguments, cpu_processes=PROCESSES)
    if status:
        raise RuntimeError(f"The training in {root / output} ended with exit status {status}; see the error above.")
    return json.loads((root / output / "all_results.json").read_text(encoding="utf-8"))


def make_pairs(root: Path) -> dict:
    """Generate counter-emotional replies with the base of the dialogue model and select the pairs (Sec. 3.3)."""
    folder, classifier = str(root / "dialogue"), str(root / "parts" / "emotion_classifier")
    data = load_dataset(str(root / "data"))
    counts = {"train": TRAIN_PAIRS, "test": TEST_PAIRS}
    samples = {split: pick(DialogueSamples(data[split], [ASSISTANT]), count) for split, count in counts.items()}
    # The tiny language model was pretrained to answer a sentence with a given emotion, without a history.
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
        fitting_only=True,
    )
    return {split: counts["pairs"] for split, counts in report["splits"].items()}


def pick(items, count: int, seed: int = 0) -> list:
    """Draw at most `count` items without replacement, in their original order."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[i] for i in sorted(chosen)]


def recall_words(sample: dict) -> set[str]:
    """Content words of the true reply that occur in the history but not in the last sentence."""
    *earlier, last = [set(words_of(message_text(message))) for message in sample["prompt"]]
    return (set(words_of(sample["reply"])) & set(CONTENT_WORDS) & set().union(*earlier)) - last


def folder_of(arm: str, seed: int = 0) -> str:
    """The folder of a dialogue model in the folder of the run."""
    return ARM_FOLDERS.get(arm, arm) + (f"_seed{seed}" if seed else "")


def evaluate_arm(root: Path, arm: str, seed: int = 0) -> dict:
    """Compute a dialogue model's row of the table, and its replies."""
    history, use_media = ARMS[arm]
    folder = str(root / folder_of(arm, seed))
    model, processor = load_model(folder), EmpathicProcessor.from_pretrained(folder)
    features = EmotionFeatures(str(root / "parts" / "emotion_classifier"), pooling=POOLING)
    samples = pick(DialogueSamples(load_dataset(str(root / "data"), split="test"), [ASSISTANT]), TEST_SAMPLES)

    def seen(prompt):
        return dialogue_sample({"prompt": prompt, "reply": ""}, history, use_media)["messages"]

    prompts, references = [seen(sample["prompt"]) for sample in samples], [sample["reply"] for sample in samples]
    replies = generate_texts(model, processor, prompts, description=f"replies: {arm}")
    row = reply_row(replies, references, features)
    row["recall"] = word_recall(replies, [sorted(recall_words(sample)) for sample in samples])
    pairs = [{**row, "prompt": seen(row["prompt"])} for row in load_dataset(str(root / "pairs"), split="test")]
    row |= reward_row(model, processor, pairs, root / "scratch" / folder_of(arm, seed))
    torch.manual_seed(seed)
    sampled = generate_texts(model, processor, prompts, description=f"sampled: {arm}", **AS_TRAINED)
    row["emotion_score_sampled"] = emotion_score(sampled, references, features, allow_empty=True)
    return {"row": row, "replies": replies, "sampled": sampled}


def evaluate_memory(root: Path) -> dict:
    """Evaluate the reconstruction of held-out utterances, one and five at a time."""
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
    """Evaluate emotion accuracy on held-out clips; `evaluation/emotion.json` also has the confusion matrix."""
    model, data = str(root / "emotion"), str(root / "data")
    found = figure_6.evaluate_emotion(model, data, root / "evaluation", device="cpu", progress=False)["systems"]
    names = figure_6.QUICKSTART_SETTINGS
    return {name: found[setting]["metrics"]["accuracy"]["mean"] for name, setting in names.items()}


def evaluate_contrasts(root: Path) -> dict:
    """
    Compare the replies to the same words with clips of different emotions; `evaluation/contrast.json` has more.

    Returns:
        `arms` {arm: {metric: `mean`, `low`, `high`}}, and `epo_control`: the differences of EPO and its control.
    """
    specs = [
        f"{arm}=empathic:{root / folder_of(arm)},history={ARMS[arm][0]},media={str(ARMS[arm][1]).lower()}"
        for arm in CONTRAST_ARMS
    ]
    options = ContrastOptions(
        conditions=CONTRAST_CONDITIONS,
        reply_speakers=[ASSISTANT],
        classifier=str(root / "parts" / "emotion_classifier"),
    )
    data = str(root / "contrast_data")
    found = evaluate_contrast(specs, [data], root / "evaluation", options, progress=False, device="cpu", batch_size=32)[
        data
    ]
    arms = {name: system["conditions"]["full"] for name, system in found["systems"].items()}
    return {
        "arms": {
            name: {metric: {end: row[metric][end] for end in ("mean", "low", "high")} for metric in CONTRAST_METRICS}
            for name, row in arms.items()
        },
        "epo_control": {
            row["metric"]: {name: row[name] for name in ("difference", "low", "high", "p")}
            for row in found["comparisons"]
            if row["a"] == "epo" and row["metric"] in CONTRAST_METRICS
        },
    }


def contrast_table(contrast: dict) -> str:
    """Format the results of `evaluate_contrasts`."""
    header = ["model", "replies that change", "movement", "matched pairs", "likelihood contrast"]
    rows = [
        [ARM_TITLES[arm], *(with_interval(row[metric]) for metric in CONTRAST_METRICS)]
        for arm, row in contrast["arms"].items()
    ]
    difference = [
        f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" for row in contrast["epo_control"].values()
    ]
    return table(header, [*rows, ["EPO - control", *difference], ["chance", "0.000", "0.000", "0.500", "0.000"]])


def write_evaluation(root: Path, samples: list[dict], replies: dict[str, list[str]]) -> Path:
    """Score the models' replies with confidence intervals and write the report; return its path."""
    about = {
        ARM_TITLES[arm]: {"target": folder_of(arm), "history": history, "media": media}
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
    """Format the summary that is printed at the end of the run."""
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
            ["model", *DIALOGUE_METRICS.values()],
            [[ARM_TITLES[arm], *(row[name] for name in DIALOGUE_METRICS)] for arm, row in dialogue.items()],
        ),
        f"EPO and its control, mean ± standard deviation over {len(SEEDS)} seeds (paired test over conversations)",
        table(SEEDS_HEADER, [[title, *seed_cells(results["seeds"][name])] for name, title in SEEDS_METRICS.items()]),
        STAND_INS[0],
        table(["part", "here", "stands in for"], STAND_INS[1]),
        "The same words with clips of different emotions (in brackets: 95% intervals over utterances)",
        contrast_table(results["contrast"]),
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


def check_code(root: Path) -> None:
    """
    Record what decides the results: this module, the tiny preset and its recipes.

    Raises:
        ValueError: if `root` has steps of a run with other contents, whose results would be mixed with new ones.
    """
    here = Path(__file__).parent
    sources = [Path(__file__), *sorted((here / "tiny").glob("*.py")), *sorted(RECIPES.glob("*.yaml"))]
    code, file = fingerprint([source.read_text(encoding="utf-8") for source in sources]), root / "code.json"
    if (root / "steps.json").exists() and (not file.exists() or json.loads(file.read_text(encoding="utf-8")) != code):
        raise ValueError(
            f"{root} has steps of a quickstart with other code or recipes, whose results would be mixed with those of "
            "this one. Choose another --output, or delete the folder."
        )
    write_json(file, code)


def quickstart(output: str = "runs/quickstart") -> dict:
    """
    Train and evaluate everything; write `model/` (a whole checkpoint), `results.json` and `report.html`.

    Returns:
        The results, as in `results.json`.
    """
    with held_folder(output, "empathic quickstart"):
        return _quickstart(Path(output))


def _quickstart(root: Path) -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the second process
    check_code(root)
    steps = Steps(root)
    steps.run("corpus", write_recordings, root)
    steps.together(
        ("language model", write_language_model, root),
        ("encoders", write_encoders, root),
        ("contrast corpus", write_contrasts, root),
    )

    steps.run("stage emotion", train_stage, root, "emotion", "emotion")
    steps.run("stage memory_single", train_stage_together, root, "memory_single", "memory_single", "emotion")
    steps.run("stage memory_multi", train_stage_together, root, "memory_multi", "memory_multi", "memory_single")
    arms = []
    for arm in ("memory_av", "memory", "text"):
        options = ("--history", ARMS[arm][0], "--use_media", str(ARMS[arm][1]))
        arms.append((f"stage dialogue, {arm}", train_stage, root, "dialogue", folder_of(arm), "memory_multi", *options))
    steps.together(*arms)
    steps.together(
        ("counter-emotional replies", make_pairs, root),
        ("evaluate rebuilding", evaluate_memory, root),
        ("evaluate emotion", evaluate_emotion, root),
    )
    works = [(arm, seed) for seed in SEEDS for arm in SEEDS_ARMS]
    steps.together(*(
        (f"stage {folder_of(arm, seed)}", train_stage, root, "epo", folder_of(arm, seed), "dialogue",
         "--seed", str(seed), *SEEDS_ARMS[arm])
        for arm, seed in works
    ))  # fmt: skip
    works = [*((arm, 0) for arm in ARMS if arm not in SEEDS_ARMS), *works]
    contrast, *outcomes = steps.together(
        ("evaluate contrast", evaluate_contrasts, root),
        *((f"evaluate {folder_of(*work)}", evaluate_arm, root, *work) for work in works),
    )
    outcome_of = dict(zip(works, outcomes, strict=True))
    steps.run("model", merge, str(root / "epo"), str(root / "model"))
    emotion, rebuilt = steps.done["evaluate emotion"]["result"], steps.done["evaluate rebuilding"]["result"]
    arms = {arm: outcome_of[arm, 0] for arm in ARMS}
    samples = pick(DialogueSamples(load_dataset(str(root / "data"), split="test"), [ASSISTANT]), TEST_SAMPLES)
    words = [sorted(recall_words(sample)) for sample in samples]
    features = EmotionFeatures(str(root / "parts" / "emotion_classifier"), pooling=POOLING)
    epo, control = ([outcome_of[arm, seed] for seed in SEEDS] for arm in SEEDS_ARMS)

    results = {
        "emotion": emotion,
        "reconstruction": rebuilt,
        "dialogue": {arm: outcome["row"] for arm, outcome in arms.items()},
        "seeds": compare_seeds(epo, control, samples, words, features),
        "contrast": contrast,
        "seconds": {name: step["seconds"] for name, step in steps.done.items()},
    }
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_record(root / "model", {**read_record(str(root / "model")), "results": results})
    write_card(root / "model")
    shown = [i for i, wanted in enumerate(words) if wanted][:3]
    replies = {arm: [outcome["replies"][i] for i in shown] for arm, outcome in arms.items()}
    text = report(results, replies, [samples[i] for i in shown])
    (root / "report.txt").write_text(text + "\n", encoding="utf-8")
    page = write_evaluation(root, samples, {arm: outcome["replies"] for arm, outcome in arms.items()})
    print(f"\n{text}\n\nReport with plots, intervals and clips: {page}")
    print(f"The checkpoint is {root / 'model'}; talk to it with: empathic chat {root / 'model'}")
    return results
