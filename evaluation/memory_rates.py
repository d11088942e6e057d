"""What is rebuilt of utterances, against the number of memory vectors for each of their tokens."""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from .metrics import bleu, content_recall, exact_match, words_of

# The scores of a rate and their titles.
RATE_SCORES = {
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
    "exact": "exact",
    "recall": "content words",
    "names": "names, numbers",
}
DRAWN = ("bleu1", "exact", "recall", "names")
NUMBER_WORDS = frozenset(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion first
    second third""".split()
)
# A capitalized word that follows a word or a comma, not the end of a sentence.
_NAME = re.compile(r"(?<=[\w,;'’\")] )[A-Z][\w'’\-]*")


def names_and_numbers(texts: Collection[str]) -> set[str]:
    """
    Return the names and numbers in texts, spelled as by `words_of`: words with a digit, number words, and words that
    are capitalized within a sentence. Names in lower case are not found; pass such words yourself.
    """
    found = set()
    for text in texts:
        found |= {word for word in words_of(text) if word in NUMBER_WORDS or any(map(str.isdigit, word))}
        found |= {word for name in _NAME.findall(text) for word in words_of(name)}
    return found - {"i", "i'm", "i’m", "i'll", "i’ll", "i've", "i’ve", "i'd", "i’d"}


def rate_scores(
    answers: Sequence[str], expected: Sequence[str], content_words: Collection[str], names: Collection[str]
) -> dict[str, float]:
    """The scores of `RATE_SCORES`, each from 0 to 1; without a recall of words that the texts do not have."""
    found = {
        "bleu1": bleu(answers, expected, 1),
        "bleu4": bleu(answers, expected, 4),
        "exact": exact_match(answers, expected),
    }
    said = {word for text in expected for word in words_of(text)}
    for name, words in (("recall", content_words), ("names", names)):
        if said & set(words):
            found[name] = content_recall(answers, expected, words)
    return found


def rate_rows(
    processor,
    turns: Sequence[Mapping],
    answers: Sequence[str],
    expected: Sequence[str],
    content_words: Collection[str],
    names: Collection[str],
    groups: int = 4,
) -> list[dict]:
    """
    Score rebuilt utterances, all of them and in groups of about equal size by their vectors per token.

    Args:
        processor: an `EmpathicProcessor`, which says how many vectors an utterance has.
        turns: turn rows, each rebuilt alone.
        answers, expected: the rebuilt and the original texts.
        content_words, names: the words whose recall is measured.
        groups: maximum number of groups.

    Returns:
        One row for all utterances, then one for each group from few to many vectors: `vectors_per_token` (memory
        vectors / tokens of the language model), `vectors` and `tokens` of an utterance, `utterances`, and the scores.
        With fewer than two different rates there is only the first row.
    """
    sizes = []
    for turn in turns:
        tokens = len(processor.encode_plain(f"{turn['speaker']}: {turn['text']}"))
        sizes.append((processor.count_memories(turn["speaker"], turn["text"]), tokens))
    order = sorted(range(len(turns)), key=lambda place: sizes[place][0] / sizes[place][1])
    groups = min(groups, len({vectors / tokens for vectors, tokens in sizes}))
    cuts = [round(len(order) * group / groups) for group in range(groups + 1)]
    parts = [order[start:end] for start, end in pairwise(cuts) if end > start]
    rows = []
    for part in [order, *(parts if groups > 1 else [])]:
        vectors, tokens = (sum(sizes[place][i] for place in part) for i in (0, 1))
        there, wanted = ([row[place] for place in part] for row in (answers, expected))
        rows.append(
            {
                "vectors_per_token": vectors / tokens,
                "vectors": vectors / len(part),
                "tokens": tokens / len(part),
                "utterances": len(part),
                **rate_scores(there, wanted, content_words, names),
            }
        )
    return rows


def rate_table(rows: Sequence[Mapping]) -> str:
    """Format the rows as a Markdown table."""
    columns = [name for name in RATE_SCORES if any(name in row for row in rows)]
    lines = [["utterances", "tokens", "vectors", "vectors per token", *(RATE_SCORES[name] for name in columns)]]
    lines.append(["---:"] * len(lines[0]))
    for place, row in enumerate(rows):
        about = f"all {row['utterances']}" if place == 0 else str(row["utterances"])
        scores = [f"{row[name]:.3f}" if name in row else "" for name in columns]
        lines.append(
            [about, f"{row['tokens']:.1f}", f"{row['vectors']:.2f}", f"{row['vectors_per_token']:.3f}", *scores]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_rates(rows: Mapping[str, Sequence[Mapping]], path: str | Path) -> None:
    """
    Draw the scores against vectors per token, a line for each checkpoint, with its mean as a larger mark.

    Args:
        rows: rows of `rate_rows` by the name of the checkpoint.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(8, 6), sharex=True, layout="constrained")
    for panel, name in zip(axes.flat, DRAWN, strict=True):
        for color, (checkpoint, found) in enumerate(rows.items()):
            points = [row for row in found if name in row]
            if not points:
                continue
            mean, *groups = points
            style = {"color": f"C{color % 10}"}
            panel.plot([r["vectors_per_token"] for r in groups], [r[name] for r in groups], marker=".", **style)
            panel.plot([mean["vectors_per_token"]], [mean[name]], marker="o", linestyle="", label=checkpoint, **style)
        panel.set(title=RATE_SCORES[name], ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    for panel in axes[1]:
        panel.set_xlabel("memory vectors per token")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
