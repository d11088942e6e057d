"""Markdown tables and plots of the efficiency benchmark's results."""

from pathlib import Path

from ..evaluation.published import TABLE_3
from .efficiency_arms import ARMS, QUERIES

TITLES = {
    "text": "full text",
    "text_reuse": "full text, prefix kept",
    "compressed": "compressed (the paper)",
    "streaming": "streaming",
}
MIB = 2**20


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Format a number with three significant digits, or all integer digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio_table(rows: list[dict]) -> str:
    """Format the ratios with their required bounds and whether the bounds hold."""
    cells = []
    for row in rows:
        wanted = "" if row["wanted"] is None else f"{row['bound']} {row['wanted']:g}"
        holds = "" if row["holds"] is None else "yes" if row["holds"] else "**no**"
        cells.append([row["what"], f"{row['measured']:.3g}", wanted, holds])
    return table(["ratio", "measured", "required", "holds"], cells)


def history_tables(histories: dict[str, dict]) -> str:
    """Format tables of positions, time and memory by the length of the history."""
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
        ("Peak memory without the weights, logits of the last position only, MiB", "peak_bytes", 1 / MIB),
        ("Peak memory without the weights, logits of all processed positions, MiB", "peak_bytes_all_logits", 1 / MIB),
    ):
        rows = [[turns, *(number(arms[arm][key] * scale) for arm in ARMS)] for turns, arms in measured.items()]
        if rows:
            parts.append(f"{title}:\n\n" + table(["utterances", *TITLES.values()], rows))
    return "\n\n".join(parts)


WAYS = ("text", "memory")


def turn_table(turns: dict[str, dict]) -> str:
    """Format the table of whole turns."""
    rows = [
        [
            count,
            str(row["new_positions"]),
            *(number(1e3 * row[key]) for key in ("streaming", "anew", "encoding", "reading")),
        ]
        for count, row in turns.items()
    ]
    header = ["utterances before", "positions processed", "streaming turn", "turn of a new session"]
    header += ["memory encoder: whole history", "memory encoder: last two utterances"]
    return "Whole turns with a reply, milliseconds:\n\n" + table(header, rows)


def paper_table(paper: dict) -> str:
    """Format the averages over dialogues, with the published rows of Table 3."""
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
        "history", "input positions", "memory with the weights, GB", "memory with the weights and all logits, GB",
        "memory without the weights, MiB", "prompt processing, ms",
    ]  # fmt: skip
    return table(header, rows)


def markdown(results: dict, plots: list[str]) -> str:
    """Format the whole report."""
    settings, machine = results["settings"], results["machine"]
    clock = "CUDA events" if settings["device"] == "cuda" else "CPU time of one thread"
    lines = [
        "# Cost of the conversation's history (paper's Table 3)",
        f"`{results['command']}`",
        f"{results['name']}, {settings['dtype']}, {machine['device']}, torch {machine['versions']['torch']}; "
        f"time: {clock}, median of {settings['repeats']} alternating runs. {results['text']}",
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
- Positions: the whole prompt from the processor, including system prompt and template. *History alone*: the whole
  prompt minus the prompt of the same turn without a history, that is, text with the roles and markers of its turns, or
  the memory vectors and the line that introduces them. *With media*: a clip's audio and video,
  {QUERIES} vectors each in the presets (as in the paper), and the words before them. In the presets' tokenizers a token
  is a word or a punctuation mark.
- Prompt processing: the model's forward passes up to the logits of the first token, including the memory encoder, but
  without tokenization and media. Nothing is generated.
- *Prefix kept* reuses the KV cache of the previous prompt for the common prefix of the two prompts. In the history a
  user's sentence is formatted differently than in its own turn, so the last exchange is processed again.
- Memory without the weights: the peak bytes of tensors, including tensors cached from the previous turn. On a CPU,
  buffers inside a kernel are not counted.
- *Whole turns* are calls of `ChatSession.reply`, including tokenization, generation and remembering the turn."""


def plot(results: dict, folder: Path) -> list[str]:
    """Write a PNG for each quantity, with logarithmic axes; return the file names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    histories = {int(turns): entry["arms"] for turns, entry in results["histories"].items() if entry["arms"]}
    names = []
    for name, key, scale, label in (
        ("positions", "new_positions", 1, "positions processed by the language model"),
        ("seconds", "seconds", 1e3, "prompt processing (ms)"),
        ("memory", "peak_bytes", 1 / MIB, "peak memory without the weights (MiB)"),
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
