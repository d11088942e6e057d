"""Report sections: cost of the history (Table 3), reconstruction (Table 8), and counter-emotional replies."""

from collections.abc import Mapping
from pathlib import Path

from ..memory_rates import RATE_SCORES
from ..published import TABLE_3
from ..reconstruction import SCORE_COLUMNS
from .parts import Missing, Part, Table
from .plots import cost_plot, histogram_plot

ARMS = {
    "text": "full text",
    "text_reuse": "full text, prefix kept",
    "compressed": "compressed (the paper)",
    "streaming": "streaming",
}
WAYS = {"text": "text", "memory": "memory"}
MIB = 2**20
COSTS = (  # (key in an arm, scale, quantity and unit)
    ("new_positions", 1, "positions processed by the model"),
    ("seconds", 1e3, "prompt processing (ms)"),
    ("peak_bytes", 1 / MIB, "peak memory without the weights (MiB)"),
)
EXAMPLES = 3  # rebuilt runs shown per length


def number(value: float | None) -> str:
    """Format a number with three significant digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def efficiency_parts(results: Mapping) -> list[Part]:
    """Report Table 3 and the costs by history length, from efficiency.json."""
    settings, machine = results["settings"], results["machine"]
    clock = "CUDA events" if settings["device"] == "cuda" else "processor time of one thread"
    parts: list[Part] = [
        f"{results['name']}, {settings['dtype']}, on {machine['device']}; time: {clock}, median of "
        f"{settings['repeats']} runs in turn. {results['text']}"
    ]
    if results.get("not_measured"):
        parts.append(Missing(f"Costs. {results['not_measured']} Run the command on a machine with a GPU."))
    if results.get("paper"):
        parts.append(_paper_table(results["paper"]))
    else:
        parts.append(Missing("Table 3's own setting: run empathic evaluate efficiency --paper."))
    histories = {int(length): entry for length, entry in results["histories"].items()}
    measured = {length: entry["arms"] for length, entry in histories.items() if entry["arms"]}
    if histories:
        parts.append(_positions_table(histories))
    for key, scale, quantity in COSTS if measured else ():
        lines = {
            title: {length: arms[arm][key] * scale for length, arms in measured.items()} for arm, title in ARMS.items()
        }
        parts.append(cost_plot(f"Cost of a history by its length: {quantity}.", quantity, lines))
        rows = [[f"{length:,}", *(number(line[length]) for line in lines.values())] for length in measured]
        parts.append(Table(f"{quantity[0].upper()}{quantity[1:]}", ["utterances", *lines], rows))
    if results.get("ratios"):
        parts.append(_ratio_table(results["ratios"]))
    return parts


def _paper_table(paper: Mapping) -> Table:
    rows, base = [], paper["means"]["text"]
    for arm, title in ARMS.items():
        means = paper["means"][arm]
        cells = []
        for key, scale in (("positions", 1), ("total_bytes", 1e-9), ("seconds", 1e3)):
            change = "" if arm == "text" else f" ({means[key] / base[key] - 1:+.1%})"
            cells.append(f"{means[key] * scale:,.4g}{change}")
        rows.append([title, *cells, "–"])
    for arm, row in TABLE_3.items():
        cells = []
        for key, scale in (("positions", 1), ("memory_gb", 1), ("seconds", 1e3)):
            change = "" if arm == "text" else f" ({row[key] / TABLE_3['text'][key] - 1:+.1%})"
            cells.append(f"{row[key] * scale:g}{change}")
        rows.append([ARMS[arm].split(" (")[0], *cells, f"{row['bertscore']:.3f}"])
    header = ["history", "input positions", "memory with the weights (GB)", "prompt processing (ms)", "BERTScore"]
    notes = [paper["about"], "This command does not compute BERTScore: see the tables of replies."]
    return Table("Cost of a long history (Table 3)", header, rows, published=len(TABLE_3), notes=notes)


def _positions_table(histories: Mapping[int, Mapping]) -> Table:
    names = {"history": "history alone", "whole": "whole prompt", "with_media": "with media"}
    header = ["utterances", *(f"{name}, {way}" for name in names.values() for way in WAYS.values())]
    rows = [
        [f"{length:,}", *(f"{entry['positions'][way][key]:,}" for key in names for way in WAYS)]
        for length, entry in histories.items()
    ]
    return Table("Input positions of the language model", header, rows)


def _ratio_table(ratios: list[Mapping]) -> Table:
    rows = []
    for row in ratios:
        wanted = "–" if row["wanted"] is None else f"{row['bound']} {row['wanted']:g}"
        holds = "–" if row["holds"] is None else "yes" if row["holds"] else "no"
        rows.append([row["what"], number(row["measured"]), wanted, holds])
    return Table("Ratios, measured in one run", ["what", "measured", "wanted", "holds"], rows)


# ------------------------------------------------------------------------------------------------------ reconstruction


def reconstruction_parts(results: Mapping, written: list[Mapping]) -> list[Part]:
    """
    Report Table 8, from reconstruction.json, with examples.

    Args:
        results: content of the file.
        written: rows of reconstruction.jsonl, may be empty.
    """
    columns = [name for name in SCORE_COLUMNS if any(name in row for row in results["scores"].values())]
    rows = [
        [f"{length} at once", f"{results['runs'][length]:,}", *(_score(row, name) for name in columns)]
        for length, row in results["scores"].items()
    ]
    published = results["published"]
    rows.append([published["dataset"], "–", *(_score(published, name) for name in columns)])
    notes = [
        f"BERTScore: {results['bertscore']}.",
        "BLEU: sacrebleu, cased, tokenization 13a. Content words: all but function words of English. The paper does "
        "not say how many utterances its row rebuilds at once.",
    ]
    if results["without"]:
        notes.append(f"No conversation is long enough for: {', '.join(map(str, results['without']))} at once.")
    header = ["utterances rebuilt", "runs", *(SCORE_COLUMNS[name] for name in columns)]
    parts: list[Part] = [
        f"{results['model']} on {results['data']}, split {results['split']}.",
        Table("Utterances rebuilt from their memory vectors (Table 8)", header, rows, published=1, notes=notes),
    ]
    if results.get("rates"):
        parts.append(_rate_table(results["rates"]))
    if not written:
        parts.append(
            Missing("Examples of rebuilt utterances: reconstruction.jsonl is not next to reconstruction.json.")
        )
    for length in results["scores"]:
        for entry in [entry for entry in written if str(entry["utterances"]) == length][:EXAMPLES]:
            parts.append(_example(length, entry))
    return parts


def _rate_table(rates: list[Mapping]) -> Table:
    names = [name for name in RATE_SCORES if any(name in row for row in rates)]
    rows = [
        [
            f"all {row['utterances']:,}" if row is rates[0] else f"{row['utterances']:,}",
            f"{row['tokens']:.1f}",
            f"{row['vectors']:.2f}",
            f"{row['vectors_per_token']:.3f}",
            *(_score(row, name) for name in names),
        ]
        for row in rates
    ]
    header = ["utterances", "tokens", "vectors", "vectors per token", *(RATE_SCORES[name] for name in names)]
    notes = ["Names and numbers: words with a digit, number words, and words capitalized within a sentence."]
    return Table("Utterances rebuilt alone, by memory vectors per token", header, rows, notes=notes)


# ------------------------------------------------------------------------------------------------- long conversations


def memory_parts(results: Mapping) -> list[Part]:
    """Report the answers to questions about long conversations, from memory.json."""
    arms = results["arms"]
    counts = next(iter(arms.values()))["questions"]
    columns = ["all", *sorted(name for name in counts if name != "all")]
    header = ["the prompt has", *(f"{name} ({counts[name]:,})" for name in columns)]

    def table(title: str, key: str) -> Table:
        shares = {arm: [row[key][name] for name in columns] for arm, row in arms.items()}
        rows = [[arm, *("–" if value is None else f"{value:.3f}" for value in row)] for arm, row in shares.items()]
        return Table(title, header, rows)

    costs = [
        [
            arm,
            *(number(row[name]) for name in ("positions", "new_positions", "seconds", "reading_seconds")),
            number(row["held_bytes"] / 2**20),
        ]
        for arm, row in arms.items()
    ]
    names = ["positions", "processed for a question", "seconds a question", "seconds to read a conversation"]
    return [
        f"{results['model']} on {results['data']}: {counts['all']:,} of {results['all_questions']:,} questions about "
        f"{results['conversations']:,} conversations. Retrieval: {results['retriever']}.",
        table("F1 of the answers, as the benchmark defines it", "f1"),
        table("Share of the evidence that is in the prompt", "evidence_recall"),
        Table("Costs of an answer", ["the prompt has", *names, "held (MiB)"], costs),
    ]


def _score(row: Mapping, name: str) -> str:
    return f"{row[name]:.3f}" if name in row else "–"


def _example(length: str, entry: Mapping) -> Table:
    original, rebuilt = entry["original"].split("\n"), entry["rebuilt"].split("\n")
    height = max(len(original), len(rebuilt))
    original += [""] * (height - len(original))
    rebuilt += [""] * (height - len(rebuilt))
    pairs = [list(pair) for pair in zip(original, rebuilt, strict=True)]
    return Table(f"Rebuilt, {length} at once: {entry['id']}", ["original", "rebuilt"], pairs, names=2, prose=True)


# ------------------------------------------------------------------------------------------------------ counter replies


def counter_parts(report: Mapping, page: Path | None) -> list[Part]:
    """
    Report the pairs that `empathic counter` chose, from its report.json.

    Args:
        report: content of the file.
        page: path of audit.html, if it exists.
    """
    settings, rows, parts = report["settings"], [], []
    for split, counts in report["splits"].items():
        lowest = counts["lowest_similarity"][settings["pooling"]]
        cells = [counts["samples"], counts["scored"], counts["pairs"]]
        shares = [
            f"{lowest[name]:.3f}" if lowest[name] is not None else "–" for name in ("least", "median", "greatest")
        ]
        rows.append([split, *(f"{cell:,}" for cell in cells), *shares])
    header = ["split", "samples", "with candidates", "pairs", "lowest similarity: least", "median", "greatest"]
    notes = [f"Pooling {settings['pooling']}, threshold {settings['threshold']}."]
    if page is not None:
        notes.append(f"Candidates to read: {page.as_posix()}.")
    parts.append(Table("Pairs of true and counter-emotional replies (Sec. 3.3)", header, rows, notes=notes))
    for split, counts in report["splits"].items():
        bins = counts["similarities"]
        shown = {"all candidates": bins["all_candidates"], "lowest of each sample": bins["lowest_of_each_sample"]}
        if any(map(any, shown.values())):
            label = f"similarity to the true reply (cosine, pooling {settings['pooling']})"
            caption = f"Candidates' emotional similarity to the true reply, split {split}."
            parts.append(histogram_plot(caption, label, bins["bin_edges"], shown, "each histogram"))
    return parts
