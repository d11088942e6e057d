"""
How well utterances are rebuilt from their memory vectors (paper's Table 8 and its Sec. 10).

    empathic evaluate reconstruction runs/quickstart/model runs/quickstart/data

Conversations of a held-out split are cut into runs of so many utterances, which do not overlap; each run is rebuilt at
once. BLEU and BERTScore compare whole runs, with the speakers' names, as the model is trained to write them.
"""

import html
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from empathic.data_prep.views import conversations
from empathic.evaluation.generation import generate_texts
from empathic.evaluation.metrics import bleu, content_recall, exact_match, words_of
from empathic.evaluation.modules.bertscore.bert_similarity import BertScore
from empathic.evaluation.results import versions, write_results
from empathic.trainers.samples import rebuild_sample

PUBLISHED = {"dataset": "MultiDialog, test_freq", "bleu1": 0.848, "bleu4": 0.679, "bertscore": 0.969}  # Table 8
COLUMNS = {
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
    "bertscore": "BERTScore",
    "recall": "content words",
    "exact": "exact runs",
    "exact_utterances": "exact utterances",
}
# English words that carry no content of their own; all others count for the recall. Words as `words_of` gives them.
FUNCTION_WORDS = frozenset(
    """a an the this that these those some any no every each all both either neither such
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    ourselves they them their theirs themselves who whom whose which what one someone something anyone anything
    everyone everything nobody nothing there here
    am is are was were be been being do does did doing have has had having will would shall should can could may might
    must let gonna wanna
    and or but nor so if then than because as while when where why how though although until unless whether
    of in on at by for with without to from into onto about over under after before between through during against
    up down out off again
    not yes yeah yep okay ok oh well um uh hmm hey hi hello
    very too also just only even still yet already really quite rather much many more most less least few
    i'm you're he's she's it's we're they're that's there's what's who's let's i've you've we've they've i'd you'd he'd
    she'd we'd they'd i'll you'll he'll she'll it'll we'll they'll isn't aren't wasn't weren't don't doesn't didn't
    haven't hasn't hadn't won't wouldn't shan't shouldn't can't cannot couldn't mustn't""".split()
)


@dataclass
class ReconstructionOptions:
    """
    What `evaluate_reconstruction` measures.

    Args:
        utterances: how many are rebuilt at once, one row of the table each.
        split: of the data set.
        max_runs: at most so many runs a row, drawn by the seed; None: all.
        batch_size: runs at once.
        seed: of the draw.
        device: where to run; a GPU if there is one by default.
        bertscore_model: Hub id or folder of BERTScore's model; None: no BERTScore.
        bertscore_layer: its layer; by default the one that bert-score proposes for a model that it knows.
        examples: runs of each row that the report shows.
    """

    utterances: list[int] = field(default_factory=lambda: [1, 5, 10, 20])
    split: str = "test"
    max_runs: int | None = 200
    batch_size: int = 32
    seed: int = 0
    device: str | None = None
    bertscore_model: str | None = "roberta-large"
    bertscore_layer: int | None = None
    examples: int = 3

    def __post_init__(self):
        if not self.utterances or min(self.utterances) < 1:
            raise ValueError(f"utterances is {self.utterances}; give numbers from 1 up, such as 1 5 10 20.")
        for name in ("max_runs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def runs_of(rows, length: int) -> list[list[dict]]:
    """
    The runs of `length` utterances that follow one another, from each conversation's start on; what is left over at an
    end, and runs with a turn that says nothing, are left out.

    Args:
        rows: turn rows of the schema.
    """
    runs = []
    for conversation in conversations(rows):
        turns = conversation["turns"]
        # As the memory's training does, the sample is called by its dialogue.
        names = {name: conversation[name] for name in ("corpus", "split", "dialogue_id")}
        for start in range(0, len(turns) - length + 1, length):
            run = turns[start : start + length]
            if all(turn["text"] for turn in run):
                runs.append([{**names, **turn} for turn in run])
    return runs


def rebuild(model, processor, runs: list[list[dict]], batch_size: int = 64) -> tuple[list[str], list[str]]:
    """
    Rebuilds runs of utterances from their vectors, each run at once, by greedy decoding.

    Args:
        runs: lists of turn rows.

    Returns:
        what the model wrote, and what was said: `name: text` lines, a run each.
    """
    samples = [rebuild_sample(run) for run in runs]
    expected = [sample["target"] for sample in samples]
    answers = generate_texts(
        model,
        processor,
        [sample["messages"] for sample in samples],
        "memory",
        max_new_tokens=max(len(processor.encode_reply(text)) for text in expected) + 8,
        batch_size=batch_size,
        description=f"rebuild {max(map(len, runs))}",
    )
    return answers, expected


def reconstruction_row(model, processor, runs, content_words, batch_size: int = 64) -> dict[str, float]:
    """
    How well runs of utterances are rebuilt from their memory vectors (Table 8).

    Args:
        runs: lists of turn rows, each rebuilt at once.
        content_words: the words whose recall is measured.

    Returns:
        `bleu1`, `bleu4`, `recall` of the content words, and `exact`: the share of runs that came back letter by letter.
    """
    return scores(*rebuild(model, processor, runs, batch_size), content_words)


def scores(answers: list[str], expected: list[str], content_words) -> dict[str, float]:
    """`bleu1`, `bleu4`, `recall` and `exact` of rebuilt runs, each from 0 to 1."""
    return {
        "bleu1": bleu(answers, expected, 1),
        "bleu4": bleu(answers, expected, 4),
        "recall": content_recall(answers, expected, content_words),
        "exact": exact_match(answers, expected),
    }


def exact_utterances(answers: list[str], runs: list[list[dict]]) -> float:
    """
    The share of utterances that came back letter by letter in their own place, runs of white space taken as one space.

    Example: "a: hi\nb: no" for a run of "a: hi" and "b: yes": 1 of 2, 0.5.
    """
    hits = total = 0
    for answer, run in zip(answers, runs, strict=True):
        lines = answer.split("\n")
        for place, turn in enumerate(run):
            total += 1
            hits += place < len(lines) and lines[place].split() == f"{turn['speaker']}: {turn['text']}".split()
    return hits / total


def content_words_of(texts: list[str]) -> set[str]:
    """The words of the texts that are none of `FUNCTION_WORDS`."""
    words = {word for text in texts for word in words_of(text)}
    return {word for word in words if word.replace("’", "'") not in FUNCTION_WORDS}


def evaluate_reconstruction(model, processor, rows, options: ReconstructionOptions) -> tuple[dict, list[dict]]:
    """
    The rows of the table, and every rebuilt run.

    Args:
        model, processor: an `EmpathicForConditionalGeneration`, or a PEFT model of one, and its `EmpathicProcessor`.
        rows: turn rows of held-out conversations.

    Returns:
        `{"scores": {utterances: {...}}, "runs": {utterances: count}, "bertscore": what computed it, or why it is not
        there, "without": lengths that no conversation has}`, and `{"utterances", "id", "original", "rebuilt"}` rows.

    Raises:
        ValueError: if no conversation has a run of any of the lengths.
    """
    scorer, about = None, "not asked for"
    if options.bertscore_model is not None:
        try:
            scorer = BertScore(options.bertscore_model, options.bertscore_layer, options.device, options.batch_size)
            about = scorer.description
        except RuntimeError as error:
            about = f"skipped: {error}"
    table, counts, without, written = {}, {}, [], []
    for length in sorted(set(options.utterances)):
        runs = runs_of(rows, length)
        if options.max_runs is not None and len(runs) > options.max_runs:
            chosen = sorted(random.Random(options.seed).sample(range(len(runs)), options.max_runs))
            runs = [runs[place] for place in chosen]
        if not runs:
            without.append(length)
            continue
        answers, expected = rebuild(model, processor, runs, options.batch_size)
        table[str(length)] = {
            **scores(answers, expected, content_words_of([turn["text"] for run in runs for turn in run])),
            "exact_utterances": exact_utterances(answers, runs),
        }
        if scorer is not None:
            table[str(length)]["bertscore"] = scorer.score(answers, expected)
        counts[str(length)] = len(runs)
        written += [
            {"utterances": length, "id": rebuild_sample(run)["id"], "original": original, "rebuilt": answer}
            for run, original, answer in zip(runs, expected, answers, strict=True)
        ]
    if not table:
        raise ValueError(f"No conversation has {min(options.utterances)} utterances: give a smaller number.")
    return {"scores": table, "runs": counts, "bertscore": about, "without": without}, written


def markdown(results: dict, written: list[dict], examples: int) -> str:
    """The table beside the published row, and examples side by side."""
    columns = [name for name in COLUMNS if any(name in row for row in results["scores"].values())]
    lines = [
        "# Rebuilding utterances from their memory vectors (paper's Table 8)",
        f"{results['model']} on {results['data']}, split {results['split']}.",
        "| utterances | runs | " + " | ".join(COLUMNS[name] for name in columns) + " |\n"
        + "| ---: | ---: |" + " ---: |" * len(columns) + "\n"
        + "".join(
            f"| {length} | {results['runs'][length]} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |\n"
            for length, row in results["scores"].items()
        )
        + f"| published ({PUBLISHED['dataset']}) | | "
        + " | ".join(f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else "" for name in columns) + " |",
        f"BERTScore: {results['bertscore']}. BLEU: sacrebleu, cased, tokenization 13a. Content words: all but function "
        "words of English. The paper does not say how many utterances its published row rebuilds at once.",
    ]  # fmt: skip
    if results["without"]:
        lines.append(f"No conversation is long enough for: {', '.join(map(str, results['without']))}.")
    for length in results["scores"]:
        shown = [entry for entry in written if str(entry["utterances"]) == length][:examples]
        for entry in shown:
            original, rebuilt = entry["original"].split("\n"), entry["rebuilt"].split("\n")
            height = max(len(original), len(rebuilt))
            pairs = zip(
                original + [""] * (height - len(original)), rebuilt + [""] * (height - len(rebuilt)), strict=True
            )
            rows = "\n".join(f"| {_cell(said)} | {_cell(again)} |" for said, again in pairs)
            heading = f"### {length} at once: {_cell(entry['id'])}"
            lines.append(f"{heading}\n\n| original | rebuilt |\n| --- | --- |\n{rows}")
    return "\n\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text from corpora and models as text: nothing in it is markup."""
    text = html.escape(text)
    for mark in "\\|`*_[]~":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text


def run(model: str, data: str, output: str | Path, options: ReconstructionOptions) -> dict:
    """
    Evaluates a checkpoint on a data set; writes `reconstruction.json`, `reconstruction.md` and `reconstruction.jsonl`.

    Args:
        model: whole checkpoint, stage's folder or Hub id.
        data: a prepared data set, a folder or Hub id.
        output: folder to write.

    Returns:
        The results, as in the JSON file.
    """
    from datasets import load_dataset

    from empathic.processing_empathic import EmpathicProcessor
    from empathic.trainers.checkpoint import load_model

    rows = load_dataset(data, split=options.split)
    loaded, processor = load_model(model).to(options.device), EmpathicProcessor.from_pretrained(model)
    found, written = evaluate_reconstruction(loaded, processor, rows, options)
    results = {
        "model": model,
        "data": data,
        "split": options.split,
        **found,
        "published": PUBLISHED,
        "settings": asdict(options),
        "versions": versions(),
    }
    folder = Path(output)
    write_results(folder / "reconstruction.json", results)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in written)
    (folder / "reconstruction.jsonl").write_text(lines, encoding="utf-8")
    (folder / "reconstruction.md").write_text(markdown(results, written, options.examples), encoding="utf-8")
    return results
