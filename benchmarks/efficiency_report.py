"""The efficiency benchmark's results as Markdown tables and as plots."""

from pathlib import Path

from empathic.benchmarks.efficiency_arms import ARMS, QUERIES
from empathic.evaluation.published import TABLE_3

TITLES = {
    "text": "full text",
    "text_reuse": "full text, prefix kept",
    "compressed": "compressed (the paper)",
    "streaming": "streaming",
}
MIB = 2**20


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio_table(rows: list[dict]) -> str:
    """What is wanted, and whether it holds."""
    cells = []
    for row in rows:
        wanted = "" if row["wanted"] is None else f"{row['bound']} {row['wanted']:g}"
        holds = "" if row["holds"] is None else "yes" if row["holds"] else "**no**"
        cells.append([row["what"], f"{row['measured']:.3g}", wanted, holds])
    return table(["what", "measured", "wanted", "holds"], cells)


def history_tables(histories: dict[str, dict]) -> str:
    """Positions, seconds and memory by the history's length."""
    parts = []
    rows = [
        [
            turns,
            *(str(entry["positions"][kind][key]) for key in ("history", "whole", "with_media") for kind in WAYS),
            str(entry["arms"]["text_reuse"]["new_positions"]) if entry["arms"] else "",
            str(entry["arms"]["streaming"]["new_positions"]) if entry["arms"] else "",
        ]
        for turns, entry in histories.items()
    ]
    names = ("history alone", "whole prompt", "with media")
    header = ["utterances", *(f"{name}, {kind}" for name in names for kind in WAYS)]
    header += ["processed: text, prefix kept", "processed: streaming"]
    parts.append("Input positions of the language model:\n\n" + table(header, rows))
    measured = {turns: entry["arms"] for turns, entry in histories.items() if entry["arms"]}
    for title, key, scale in (
        ("Prompt processing, milliseconds", "seconds", 1e3),
        ("Peak memory beside the weights, MiB, logits of the last position only", "peak_bytes", 1 / MIB),
        ("The same with the logits of all processed positions, MiB", "peak_bytes_all_logits", 1 / MIB),
    ):
        rows = [[turns, *(number(arms[arm][key] * scale) for arm in ARMS)] for turns, arms in measured.items()]
        if rows:
            parts.append(f"{title}:\n\n" + table(["utterances", *TITLES.values()], rows))
    return "\n\n".join(parts)


WAYS = ("text", "memory")


def turn_table(turns: dict[str, dict]) -> str:
    """Whole turns."""
    rows = [
        [
            count,
            str(row["new_positions"]),
            *(number(1e3 * row[key]) for key in ("streaming", "anew", "encoding", "reading")),
        ]
        for count, row in turns.items()
    ]
    header = ["utterances before", "positions processed", "streaming turn", "turn of a new session"]
    header += ["encoding the history alone", "reading two utterances alone"]
    return "Whole turns with a reply, milliseconds:\n\n" + table(header, rows)


def paper_table(paper: dict) -> str:
    """Averages over dialogues, beside Table 3."""
    rows = []
    for arm in ARMS:
        means, base = paper["means"][arm], paper["means"]["text"]
        cells = [TITLES[arm]]
        for key, scale in (
            ("positions", 1),
            ("total_bytes", 1e-9),
            ("total_bytes_all_logits", 1e-9),
            ("peak_bytes", 1 / MIB),
            ("seconds", 1e3),
        ):
            change = "" if arm == "text" else f" ({means[key] / base[key] - 1:+.1%})"
            cells.append(number(means[key] * scale) + change if scale != 1e-9 else f"{means[key] * scale:.4g}{change}")
        rows.append(cells)
    for arm in ("text", "compressed"):
        row, base = TABLE_3[arm], TABLE_3["text"]
        cells = [f"{TITLES[arm].split(' (')[0]}, published"]
        for key, scale in (("positions", 1), ("memory_gb", 1), (None, 1), (None, 1), ("seconds", 1e3)):
            if key is None:
                cells.append("")
                continue
            change = "" if arm == "text" else f" ({row[key] / base[key] - 1:+.1%})"
            cells.append(f"{row[key] * scale:g}{change}")
        rows.append(cells)
    header = [
        "history", "input positions", "memory with the weights, GB", "the same with all logits, GB",
        "beside the weights, MiB", "prompt processing, ms",
    ]  # fmt: skip
    return table(header, rows)


def markdown(results: dict, plots: list[str]) -> str:
    """The whole report."""
    settings, machine = results["settings"], results["machine"]
    clock = "CUDA events" if settings["device"] == "cuda" else "the processor's time of one thread"
    lines = [
        "# Cost of the conversation's history (paper's Table 3)",
        f"`{results['command']}`",
        f"{results['name']}, {settings['dtype']}, {machine['device']}, torch {machine['versions']['torch']}; "
        f"time: {clock}, median of {settings['repeats']} runs in turn. {results['text']}",
    ]
    if results.get("ratios"):
        lines += ["## Ratios", ratio_table(results["ratios"])]
    if results.get("paper"):
        lines += ["## The paper's setting", results["paper"]["about"], paper_table(results["paper"])]
    if results.get("histories"):
        lines += ["## By the length of the history", history_tables(results["histories"])]
    if results.get("turns"):
        lines += [turn_table(results["turns"])]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    lines += ["## What is counted", COUNTED]
    if results.get("not_measured"):
        lines += [results["not_measured"]]
    return "\n\n".join(lines) + "\n"


COUNTED = f"""\
- Positions: the whole prompt as the processor writes it, system prompt and template included. *History alone* is what a
  prompt has more than that of the same turn without a history: text with the roles and ends of its turns, or one vector
  an utterance and the line that introduces them. *With media*: a clip's sound and picture, {QUERIES} vectors each in
  the presets (as in the paper), and the words before them. The presets' tokenizers have a word or a mark a token.
- Prompt processing: the model's forward passes up to the scores of the first token, memory encoder included;
  tokenizing and media are not in it. Nothing is generated.
- *Prefix kept* reuses the keys and values of the previous prompt as far as the two prompts begin alike. A past sentence
  of the user stands in the history otherwise than it stood in its own turn, so the last exchange is processed anew.
- Memory beside the weights: the largest number of bytes of tensors at one moment, with what was kept from the turn
  before. On a CPU buffers inside a kernel are not seen.
- *Whole turns* are calls of `ChatSession.reply`, tokenizing, generation and remembering included."""


def plot(results: dict, folder: Path) -> list[str]:
    """Writes one PNG a quantity, both axes logarithmic; returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    histories = {int(turns): entry["arms"] for turns, entry in results["histories"].items() if entry["arms"]}
    names = []
    for name, key, scale, label in (
        ("positions", "new_positions", 1, "positions that the language model processes"),
        ("seconds", "seconds", 1e3, "prompt processing (ms)"),
        ("memory", "peak_bytes", 1 / MIB, "peak memory beside the weights (MiB)"),
        ("memory_all_logits", "peak_bytes_all_logits", 1 / MIB, "peak memory, all logits (MiB)"),
    ):
        if not histories:
            break
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for arm, marker, style in zip(ARMS, "os^D", ("-", "--", "-", "-"), strict=True):
            values = [arms[arm][key] * scale for arms in histories.values()]
            axes.plot(list(histories), values, marker=marker, linestyle=style, label=TITLES[arm])
        axes.set(xscale="log", yscale="log", xlabel="utterances in the history", ylabel=label)
        axes.set_xticks(list(histories), labels=[f"{turns:,}" for turns in histories])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"{name}.png", dpi=150)
        pyplot.close(figure)
        names.append(f"{name}.png")
    return names
