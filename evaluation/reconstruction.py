"""
Reconstruction of utterances from their memory vectors (paper's Table 8 and Sec. 10).

    empathic evaluate reconstruction runs/quickstart/model runs/quickstart/data

Conversations of a held-out split are divided into non-overlapping runs of consecutive utterances, and each run is
rebuilt at once. BLEU and BERTScore compare whole runs, including the speakers' names, as in training.
"""

import html
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..data_prep.views import conversations
from ..trainers.samples import rebuild_sample
from .generation import generate_texts
from .memory_likelihood import likelihood
from .memory_rates import names_and_numbers, plot_rates, rate_rows, rate_table
from .metrics import bleu, content_recall, exact_match, words_of
from .modules.bertscore.bert_similarity import BertScore
from .results import held_table, versions, write_results

PLOT = "reconstruction.png"
PUBLISHED = {"dataset": "MultiDialog, test_freq", "bleu1": 0.848, "bleu4": 0.679, "bertscore": 0.969}  # Table 8
SCORE_COLUMNS = {
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
    "bertscore": "BERTScore",
    "recall": "content words",
    "names": "names, numbers",
    "exact": "exact runs",
    "exact_utterances": "exact utterances",
}
# English function words; all other words count as content words for the recall. Spelled as returned by `words_of`.
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
    The options of `evaluate_reconstruction`.

    Args:
        utterances: run lengths: how many utterances are rebuilt at once. The table has one row per length.
        split: split of the data set.
        max_runs: maximum number of runs per row, chosen at random by `seed`; None for all.
        batch_size: number of runs per batch.
        seed: seed for the choice of runs.
        device: device; by default a GPU if there is one.
        bertscore_model: Hub id or folder of BERTScore's model; None for no BERTScore.
        bertscore_layer: layer of that model; by default the layer that bert-score recommends for known models.
        examples: number of runs per row shown in the report.
        compare: output folders of this command for other checkpoints, which are drawn in the same plot.
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
    compare: list[str] = field(default_factory=list)

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
    Divide each conversation, from its start, into runs of `length` consecutive utterances. The rest at the end of a
    conversation, and runs with an empty turn, are left out.

    Args:
        rows: turn rows of the schema.
    """
    runs = []
    for conversation in conversations(rows):
        turns = conversation["turns"]
        # As in the training of the memory, the id of the sample names its dialogue.
        names = {name: conversation[name] for name in ("corpus", "split", "dialogue_id")}
        for start in range(0, len(turns) - length + 1, length):
            run = turns[start : start + length]
            if all(turn["text"] for turn in run):
                runs.append([{**names, **turn} for turn in run])
    return runs


def rebuild(model, processor, runs: list[list[dict]], batch_size: int = 64) -> tuple[list[str], list[str]]:
    """
    Rebuild runs of utterances from their memory vectors, each run at once, by greedy decoding.

    Args:
        runs: lists of turn rows.

    Returns:
        The rebuilt texts and the original texts, one text of `name: text` lines per run.
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
    Rebuild runs of utterances from their memory vectors, and score the result (Table 8).

    Args:
        runs: lists of turn rows, each rebuilt at once.
        content_words: the words whose recall is measured.

    Returns:
        `bleu1`, `bleu4`, `recall` of the content words, and `exact`: the share of runs that are rebuilt exactly.
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
    The share of utterances that are rebuilt exactly and in their position, up to white space.

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
    """The words of the texts that are not in `FUNCTION_WORDS`."""
    words = {word for text in texts for word in words_of(text)}
    return {word for word in words if word.replace("’", "'") not in FUNCTION_WORDS}


def evaluate_reconstruction(model, processor, rows, options: ReconstructionOptions) -> tuple[dict, list[dict]]:
    """
    Compute the rows of the table, and return them with all rebuilt runs.

    Args:
        model, processor: an `EmpathicForConditionalGeneration`, or a PEFT model around it, and its `EmpathicProcessor`.
        rows: turn rows of held-out conversations.

    Returns:
        `{"scores": {utterances: {...}}, "runs": {utterances: count}, "bertscore": description of the metric, or why it
        is missing, "without": lengths without a run, "rates": rows of `rate_rows` for utterances rebuilt alone,
        "likelihood": {utterances: result of `likelihood`}}`, and `{"utterances", "id", "original", "rebuilt"}` rows.

    Raises:
        ValueError: if there is no run of any of the lengths.
    """
    scorer, about = None, "not requested"
    if options.bertscore_model is not None:
        try:
            scorer = BertScore(options.bertscore_model, options.bertscore_layer, options.device, options.batch_size)
            about = scorer.description
        except RuntimeError as error:
            about = f"skipped: {error}"
    table, counts, without, written, rates, likelihoods = {}, {}, [], [], [], {}
    for length in sorted(set(options.utterances)):
        runs = runs_of(rows, length)
        if options.max_runs is not None and len(runs) > options.max_runs:
            chosen = sorted(random.Random(options.seed).sample(range(len(runs)), options.max_runs))
            runs = [runs[place] for place in chosen]
        if not runs:
            without.append(length)
            continue
        answers, expected = rebuild(model, processor, runs, options.batch_size)
        texts = [turn["text"] for run in runs for turn in run]
        content, names = content_words_of(texts), names_and_numbers(texts)
        table[str(length)] = {
            **scores(answers, expected, content),
            **({"names": content_recall(answers, expected, names)} if names else {}),
            "exact_utterances": exact_utterances(answers, runs),
        }
        if length == 1:
            rates = rate_rows(processor, [run[0] for run in runs], answers, expected, content, names)
        if scorer is not None:
            table[str(length)]["bertscore"] = scorer.score(answers, expected)
        counts[str(length)] = len(runs)
        likelihoods[str(length)] = likelihood(model, processor, runs, options.batch_size)
        written += [
            {"utterances": length, "id": rebuild_sample(run)["id"], "original": original, "rebuilt": answer}
            for run, original, answer in zip(runs, expected, answers, strict=True)
        ]
    if not table:
        raise ValueError(f"No conversation has {min(options.utterances)} utterances; give a smaller number.")
    found = {"scores": table, "runs": counts, "bertscore": about, "without": without, "rates": rates}
    return {**found, "likelihood": likelihoods}, written


def markdown(results: dict, written: list[dict], examples: int) -> str:
    """Format the table, with the published row, and examples with original and rebuilt text side by side."""
    columns = [name for name in SCORE_COLUMNS if any(name in row for row in results["scores"].values())]
    lines = [
        "# Rebuilding utterances from their memory vectors (paper's Table 8)",
        f"{results['model']} on {results['data']}, split {results['split']}.",
        "| utterances | runs | " + " | ".join(SCORE_COLUMNS[name] for name in columns) + " |\n"
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
    if nats := {length: row for length, row in results.get("likelihood", {}).items() if row}:
        lines.append(
            "What the vectors tell: nats per token of the original texts, given their own vectors and given those of "
            "another run.\n\n| utterances | own | another's | difference |\n| ---: | ---: | ---: | ---: |\n"
            + "\n".join(
                f"| {length} | {row['own']:.3f} | {row['other']:.3f} | {row['other'] - row['own']:.3f} |"
                for length, row in nats.items()
            )
        )
    if results.get("rates"):
        lines.append(
            "Utterances rebuilt alone, by the number of memory vectors for each token of the language model. Names and "
            "numbers: words with a digit, number words, and words capitalized within a sentence.\n\n"
            f"{rate_table(results['rates'])}\n\n![By vectors per token]({PLOT})"
        )
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
    """Escape untrusted text for a Markdown table cell."""
    text = html.escape(text)
    for mark in "\\|`*_[]~":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text


def _earlier_rates(folder: str) -> dict[str, list[dict]]:
    """Read the rates that an earlier run has written, by the name of its checkpoint."""
    file = Path(folder, "reconstruction.json")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        return {results["model"]: results["rates"]}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} has no rates to compare with ({type(error).__name__}: {error}). Name the output folder of "
            "`empathic evaluate reconstruction` with 1 among its --utterances."
        ) from None


def run(model: str, data: str, output: str | Path, options: ReconstructionOptions) -> dict:
    """
    Evaluate a checkpoint on a data set; write `reconstruction.json`, `reconstruction.md`, `reconstruction.jsonl` and,
    if utterances were rebuilt alone, `reconstruction.png`.

    Args:
        model: whole checkpoint, stage folder or Hub id.
        data: prepared data set, folder or Hub id.
        output: output folder.

    Returns:
        The results, as in the JSON file.
    """
    from ..data_prep.loading import load_prepared
    from ..processing_empathic import EmpathicProcessor
    from ..trainers.checkpoints.stage_folder import load_model

    others = {name: rows for folder in options.compare for name, rows in _earlier_rates(folder).items()}
    with held_table(output, "reconstruction"):
        rows = load_prepared(data, options.split)
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
        folder.mkdir(parents=True, exist_ok=True)
        if found["rates"]:
            plot_rates({model: found["rates"], **others}, folder / PLOT)
        write_results(folder / "reconstruction.json", results)
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in written)
        (folder / "reconstruction.jsonl").write_text(lines, encoding="utf-8")
        (folder / "reconstruction.md").write_text(markdown(results, written, options.examples), encoding="utf-8")
        return results
