"""Statistics on the samples and candidates of `empathic counter`, for report.json and as an HTML page."""

import hashlib
import heapq
import html
import io
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ...configuration_empathic import EMOTIONS
from ...evaluation.emotion_features import POOLINGS
from ..messages import message_text
from .pairs import sample_name, select, select_all

FEW = 0.05  # warn about a smaller share of pairs and about a larger share of unfinished candidates
BINS = [round(-1 + i / 20, 2) for i in range(41)]  # edges of the histograms
EXAMPLES = 12  # of each kind on the page
UNLABELED = "none"
TRUE = (*EMOTIONS, UNLABELED)

Example = tuple[dict, Sequence[dict], Sequence[int]]  # sample, candidates, indices of the rejected candidates


@dataclass
class Audit:
    """
    Statistics of one split, updated one sample at a time. Only a few numbers per sample and some examples are kept.

    Args:
        emotions: emotions that candidates were written for.
        pooling, threshold: pooling and threshold of the selection.
        limit: largest number of rejected replies of a row; None for no limit.
    """

    emotions: Sequence[str]
    pooling: str
    threshold: float
    limit: int | None = 1
    samples: int = 0
    pairs: int = 0
    written: int = 0
    unfinished: int = 0
    distinct: int = 0  # candidates that are not dropped
    left_out: list[dict] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    passed: Counter = field(default_factory=Counter)  # {pooling: samples}
    chosen: Counter = field(default_factory=Counter)  # {(true emotion, emotion of the rejected reply): pairs}
    replies: Counter = field(default_factory=Counter)  # {number of rejected replies of a row: pairs}
    replies_by_emotion: Counter = field(default_factory=Counter)  # {emotion: rejected replies}
    all_bins: list[int] = field(default_factory=lambda: [0] * (len(BINS) - 1))
    lowest_bins: list[int] = field(default_factory=lambda: [0] * (len(BINS) - 1))
    lowest: dict[str, array] = field(default_factory=lambda: {pooling: array("f") for pooling in POOLINGS})
    _examples: list[tuple] = field(default_factory=list)
    _misses: list[tuple] = field(default_factory=list)

    def leave_out(self, sample: dict, reason: str) -> None:
        """Count a sample without a pair."""
        self.samples += 1
        self.left_out.append({"item": sample_name(sample), "reason": reason})

    def add(self, sample: dict, candidates: Sequence[dict]) -> list[int]:
        """
        Count a sample with candidates; returns the indices of its rejected candidates, the least similar first, or none
        if there is no pair.
        """
        self.written += len(candidates)
        self.unfinished += sum(not candidate["finished"] for candidate in candidates)
        self.dropped.update(candidate["dropped"] for candidate in candidates if candidate["dropped"])
        kept = [candidate for candidate in candidates if candidate["dropped"] is None]
        self.distinct += len(kept)
        if not kept:
            self.leave_out(sample, "every candidate is empty, or a duplicate or near duplicate of the true reply")
            return []
        for pooling in POOLINGS:
            index, lowest = select(candidates, pooling, self.threshold)
            self.passed[pooling] += index is not None
            self.lowest[pooling].append(lowest)
        for candidate in kept:
            self.all_bins[_bin(candidate["similarities"][self.pooling])] += 1
        index, lowest = select(candidates, self.pooling, self.threshold)
        self.lowest_bins[_bin(lowest)] += 1
        name = sample_name(sample)
        if index is None:
            reason = f"no candidate is below the threshold {self.threshold}: the lowest similarity is {lowest:.3f}"
            self.leave_out(sample, reason)
            _keep(self._misses, (-lowest, -self.samples), (sample, candidates, []))  # the nearest misses
            return []
        self.samples += 1
        self.pairs += 1
        self.chosen[sample["emotion"] or UNLABELED, candidates[index]["emotion"]] += 1
        rejected = select_all(candidates, self.pooling, self.threshold, self.limit)
        self.replies[len(rejected)] += 1
        self.replies_by_emotion.update(candidates[place]["emotion"] for place in rejected)
        # A random choice that does not depend on the order: the samples whose names have the smallest hashes.
        draw = -int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        _keep(self._examples, (draw, -self.samples), (sample, candidates, rejected))
        return rejected

    @property
    def scored(self) -> int:
        """Number of samples with a candidate that is not dropped."""
        return len(self.lowest[self.pooling])

    def warnings(self) -> list[str]:
        """Warnings about few pairs, unfinished candidates and similar candidates."""
        said = []
        if self.samples and not self.scored:
            said.append(f"None of the {self.samples} samples has a usable candidate; see `left_out` for the reasons.")
        if self.scored and self.pairs / self.scored < FEW:
            others = ", ".join(f"{name} {_share(self.passed[name], self.scored)}" for name in POOLINGS)
            said.append(
                f"Only {self.pairs} of {self.scored} samples ({self.pairs / self.scored:.1%}) have a candidate below "
                f"the threshold {self.threshold} under the pooling {self.pooling}; their median lowest similarity is "
                f"{np.median(self.lowest[self.pooling]):.3f}. Shares below the threshold by pooling: {others}. Choose "
                "another pooling or raise the threshold; both reuse the candidates."
            )
        if self.unfinished > FEW * self.written:
            said.append(
                f"{self.unfinished} of {self.written} candidates were cut off before their end. Raise max_new_tokens."
            )
        answered = self.written // len(self.emotions)
        if answered and self.distinct < 2 * answered and len(self.emotions) > 1:
            said.append(
                f"A sample has {self.distinct / answered:.1f} different candidates of {len(self.emotions)} on average: "
                "the model ignores the given emotion."
            )
        return said

    def report(self) -> dict:
        """The part of report.json on this split."""
        return {
            "samples": self.samples,
            "pairs": self.pairs,
            "scored": self.scored,
            "passed_threshold": {
                pooling: self.passed[pooling] / self.scored if self.scored else None for pooling in POOLINGS
            },
            "lowest_similarity": {
                pooling: {
                    name: round(float(np.quantile(self.lowest[pooling], share)), 6) if self.scored else None
                    for name, share in (("least", 0.0), ("median", 0.5), ("greatest", 1.0))
                }
                for pooling in POOLINGS
            },
            "similarities": {
                "bin_edges": BINS,
                "all_candidates": self.all_bins,
                "lowest_of_each_sample": self.lowest_bins,
            },
            "rejected_emotions": {
                true: {emotion: self.chosen[true, emotion] for emotion in self.emotions}
                for true in TRUE
                if any(self.chosen[true, emotion] for emotion in self.emotions)
            },
            **({} if self.limit == 1 else {"negatives": self.negatives()}),
            "candidates": {
                "written": self.written,
                "kept": self.distinct,
                "dropped": dict(sorted(self.dropped.items())),
                "unfinished": self.unfinished,
            },
            "warnings": self.warnings(),
            "left_out": self.left_out,
        }

    def negatives(self) -> dict:
        """The numbers of rejected replies: in all, of the pairs, and by the emotion that they were written for."""
        return {
            "replies": self.replies_by_emotion.total(),
            "of_pairs": {str(count): self.replies[count] for count in sorted(self.replies)},
            "emotions": {emotion: self.replies_by_emotion[emotion] for emotion in self.emotions},
        }

    def examples(self) -> tuple[list[Example], list[Example]]:
        """Some pairs, and the nearest misses."""
        pairs, misses = ([kept[-1] for kept in sorted(heap, reverse=True)] for heap in (self._examples, self._misses))
        return pairs, misses


def _bin(value: float) -> int:
    return min(max(bisect_right(BINS, value) - 1, 0), len(BINS) - 2)


def _keep(heap: list, key: tuple, example: tuple) -> None:
    """Keep the `EXAMPLES` examples with the largest keys, which are unique."""
    sample, candidates, rejected = example
    light = {  # no clips
        **{name: sample[name] for name in ("corpus", "split", "dialogue_id", "turn", "emotion", "reply")},
        "prompt": [{**message, "content": message_text(message)} for message in sample["prompt"][-3:]],
    }
    (heapq.heappush if len(heap) < EXAMPLES else heapq.heappushpop)(heap, (*key, (light, candidates, rejected)))


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"


# ---------------------------------------------------------------------------------------------------------- plots

# Text and lines of the plots have the page's color, light or dark: INK is replaced with currentColor in the SVG.
INK = "#123456"
SERIES_COLORS = {"all": "#8aa4c8", "lowest": "#d08a3c", "line": "#c0392b"}


def _svg(figure: Figure, salt: str) -> str:
    """Convert a figure to an <svg> element, reproducibly."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _axes(width: float, height: float):
    """Create a figure and its axes in the color `INK`; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)
    return figure, axes


def plot_similarities(audit: Audit, salt: str) -> str:
    """Plot histograms of all similarities and of the lowest similarity of each sample, with the threshold."""
    figure, axes = _axes(7, 3.2)
    width = BINS[1] - BINS[0]
    for counts, name, label in (
        (audit.all_bins, "all", "all candidates"),
        (audit.lowest_bins, "lowest", "lowest of each sample"),
    ):
        total = max(sum(counts), 1)
        shares = [count / total for count in counts]
        axes.bar(BINS[:-1], shares, width, align="edge", color=SERIES_COLORS[name], alpha=0.75, label=label)
    axes.axvline(audit.threshold, color=SERIES_COLORS["line"], linestyle="--", label=f"threshold {audit.threshold}")
    axes.set_xlim(-1, 1)
    axes.set_xlabel(f"similarity to the true reply (cosine, pooling {audit.pooling})")
    axes.set_ylabel("share of each histogram")
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, f"{salt} similarities")


def plot_emotions(audit: Audit, salt: str) -> str:
    """Plot the matrix of pair counts: emotion of the sentence by emotion of the rejected reply."""
    counts = np.array([[audit.chosen[true, emotion] for emotion in audit.emotions] for true in TRUE])
    rows = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = _axes(7, 4)
    for (i, j), count in np.ndenumerate(counts):
        axes.fill(
            [j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=SERIES_COLORS["lowest"], alpha=0.85 * rows[i, j], lw=0
        )
        axes.text(j + 0.5, i + 0.5, str(count), ha="center", va="center", color=INK)
    axes.set_xlim(0, counts.shape[1])
    axes.set_ylim(counts.shape[0], 0)
    axes.set_xticks(np.arange(counts.shape[1]) + 0.5, audit.emotions)
    axes.set_yticks(np.arange(counts.shape[0]) + 0.5, [*EMOTIONS, "unlabeled"])
    axes.set_xlabel("emotion for which the rejected reply was written (pairs)")
    axes.set_ylabel("true emotion of the sentence")
    return _svg(figure, f"{salt} emotions")


def plot_poolings(audit: Audit, salt: str) -> str:
    """Plot the share of samples with a candidate below the threshold, by pooling."""
    shares = [100 * audit.passed[pooling] / max(audit.scored, 1) for pooling in POOLINGS]
    figure, axes = _axes(7, 2.2)
    colours = [SERIES_COLORS["lowest"] if pooling == audit.pooling else SERIES_COLORS["all"] for pooling in POOLINGS]
    bars = axes.barh(range(len(POOLINGS)), shares, color=colours)
    axes.bar_label(bars, [f" {share:.1f} %" for share in shares], color=INK)
    axes.axvline(100 * FEW, color=SERIES_COLORS["line"], linestyle=":", label=f"{FEW:.0%}: warning below this")
    names = [f"{pooling} (used)" if pooling == audit.pooling else pooling for pooling in POOLINGS]
    axes.set_yticks(range(len(POOLINGS)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel(f"samples with a candidate below {audit.threshold} (%)")
    axes.legend(frameon=False, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 1))
    return _svg(figure, f"{salt} poolings")


# ----------------------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #f1f3f6; --line: #ccd1d8; --bad: #b3261e;
  --accent: #1f5fbf; --faint: #59626d; --shade: #0004; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --soft: #22262c; --line: #3b424c; --bad: #ff8a80;
    --accent: #8ab4f8; --faint: #a2abb7; --shade: #fff5; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
a { color: var(--accent); }
nav ul { columns: 16rem; padding-left: 1.2rem; margin: 0; }
nav li { break-inside: avoid; }
nav a { display: inline-block; padding: .25rem 0; }
svg { color: var(--ink); display: block; width: 100%; min-width: 24rem; max-width: 46rem; height: auto; }
/* A shade at the side to which a table can be scrolled: the paper over it moves with the table. */
.scroll, figure { overflow-x: auto;
  background: linear-gradient(90deg, var(--paper) 30%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(270deg, var(--paper) 30%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(90deg, var(--shade), transparent) left / 1rem 100% no-repeat,
    linear-gradient(270deg, var(--shade), transparent) right / 1rem 100% no-repeat; }
.scroll { margin: 0 0 1.5rem; }
:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; min-width: 4rem; }
td:first-child { min-width: 9rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
tr.rejected { background: var(--soft); font-weight: 600; }
tr.dropped { color: var(--faint); }
.candidates td:nth-child(2) { width: 60%; }
h3 { margin: 1.5rem 0 .5rem; }
h4 { margin: 0 0 .5rem; font-size: .85rem; font-weight: 500; color: var(--faint); }
@media (max-width: 34rem) {  /* a candidate's cells one below the other */
  .candidates thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .candidates tr { display: grid; grid-template-columns: minmax(0, 1fr) auto; border-bottom: 1px solid var(--line);
    padding: .4rem 0; }
  .candidates td, .candidates td:nth-child(2) { width: auto; border: 0; padding: 0 .3rem; min-width: 0; }
  .candidates td:nth-child(1) { font-size: .85rem; color: var(--faint); }
  .candidates td:nth-child(2) { grid-area: 2 / 1 / 3 / 3; }
  .candidates td:nth-child(3) { grid-area: 1 / 2; font-size: .85rem; }
  .candidates td:nth-child(4) { grid-area: 3 / 1 / 4 / 3; font-size: .85rem; color: var(--faint); }
}
.warning { border-left: .3rem solid var(--bad); background: var(--soft); padding: .5rem 1rem; color: var(--bad); }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem 1rem; margin: 0 0 1rem; }
figure { margin: 1rem 0; }
"""


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Render an HTML table; every cell is escaped."""
    head = "".join(f'<th scope="col">{html.escape(str(cell))}</th>' for cell in header)
    body = ""
    for row in rows:
        cells = "".join(
            f"<td class=number>{cell}</td>" if isinstance(cell, int) else f"<td>{html.escape(str(cell))}</td>"
            for cell in row
        )
        body += f"<tr>{cells}</tr>\n"
    name = html.escape(f"{header[0]} and {header[1]}")
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="Table: {name}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>"
    )


def _figure(svg: str, title: str) -> str:
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
    return f'<figure tabindex="0" aria-label="{html.escape(title)}">{svg}</figure>'


def _example(sample: dict, candidates: Sequence[dict], rejected: Sequence[int], pooling: str) -> str:
    lines = [
        f"<b>{html.escape(message.get('name') or message['role'])}:</b> {html.escape(message['content'])}"
        for message in sample["prompt"]
    ]
    rows = ""
    for place, candidate in enumerate(candidates):
        kind = "rejected" if place in rejected else "dropped" if candidate["dropped"] else ""
        value = candidate["similarities"][pooling]
        note = candidate["dropped"] or ""
        if place in rejected:
            note = "rejected" if place == rejected[0] else f"also rejected, place {rejected.index(place) + 1}"
        rows += (
            f'<tr class="{kind}"><td>{html.escape(candidate["emotion"])}</td><td>{html.escape(candidate["text"])}</td>'
            f"<td class=number>{'' if value is None else f'{value:.3f}'}</td><td>{html.escape(note)}</td></tr>\n"
        )
    emotion = html.escape(sample["emotion"] or "unlabeled")
    return (
        f"<article>\n<h4>{html.escape(sample_name(sample))}</h4>\n<p>{'<br>'.join(lines)} <i>({emotion})</i><br>"
        f"<b>True reply:</b> {html.escape(sample['reply'])}</p>\n<table class=candidates>\n<thead><tr>"
        '<th scope="col">emotion</th><th scope="col">candidate</th><th scope="col">similarity</th>'
        f'<th scope="col">outcome</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</article>'
    )


EMOTIONS_TITLE = "Emotions of the rejected replies, by the true emotion"
CONTENTS = {
    "poolings": "samples by pooling",
    "similarities": "similarities",
    "emotions": "emotions",
    "pairs": "pairs",
    "misses": "nearest misses",
}


def _salt(split: str) -> str:
    """A name of a split for element ids; it begins with a letter."""
    return f"s{hashlib.sha256(split.encode()).hexdigest()[:8]}"


def _links(split: str) -> str:
    """The entry of a split in the contents list."""
    parts = ", ".join(f'<a href="#{_salt(split)}-{part}">{name}</a>' for part, name in CONTENTS.items())
    return f'<li><a href="#{_salt(split)}">Split {html.escape(split)}</a>: {parts}</li>'


def _section(split: str, audit: Audit) -> str:
    salt, name = _salt(split), html.escape(split)
    said = "\n".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in audit.warnings())
    reasons = Counter(item["reason"].split(": the lowest similarity")[0] for item in audit.left_out)
    numbers = [
        ("samples", audit.samples),
        ("samples with a candidate that is not dropped", audit.scored),
        ("pairs written", audit.pairs),
        ("candidates written", audit.written),
        *((f"candidates dropped: {reason}", count) for reason, count in sorted(audit.dropped.items())),
        ("candidates cut off at the maximum length", audit.unfinished),
        *((f"samples left out: {reason}", count) for reason, count in reasons.most_common(EXAMPLES)),
    ]
    negatives = ""
    if audit.limit != 1:
        counts = audit.negatives()
        numbers.append(("rejected replies of the pairs", counts["replies"]))
        by_pairs = [(f"pairs with {number} rejected replies", count) for number, count in counts["of_pairs"].items()]
        by_emotion = [(f"rejected replies written for {name}", count) for name, count in counts["emotions"].items()]
        negatives = f"<h3>Rejected replies of a pair</h3>\n{_table(('item', 'count'), [*by_pairs, *by_emotion])}\n"
    poolings = [
        (name, audit.passed[name], _share(audit.passed[name], audit.scored), *_quantiles(audit.lowest[name]))
        for name in POOLINGS
    ]
    pairs, misses = audit.examples()
    below, similar, emotions = "Samples below the threshold, by pooling", "Similarities", EMOTIONS_TITLE
    return f"""
<section>
<h2 id="{salt}">Split {name}</h2>
{said}
{_table(("item", "count"), numbers)}
<h3 id="{salt}-poolings">{below}</h3>
{_figure(plot_poolings(audit, salt), below)}
{_table(("pooling", "samples below", "share", "lowest similarity: minimum", "median", "maximum"), poolings)}
<h3 id="{salt}-similarities">{similar}</h3>
{_figure(plot_similarities(audit, salt), similar)}
{negatives}<h3 id="{salt}-emotions">{emotions}</h3>
{_figure(plot_emotions(audit, salt), emotions)}
<h3 id="{salt}-pairs">Examples of pairs</h3>
{"".join(_example(*example, audit.pooling) for example in pairs) or "<p>No pairs.</p>"}
<h3 id="{salt}-misses">Nearest misses</h3>
{"".join(_example(*example, audit.pooling) for example in misses) or "<p>No misses.</p>"}
</section>"""


def _quantiles(lowest: array) -> list[str]:
    return [f"{np.quantile(lowest, share):.3f}" if len(lowest) else "-" for share in (0.0, 0.5, 1.0)]


def page(audits: dict[str, Audit], settings: dict) -> str:
    """
    Render the audit as a self-contained HTML page with numbers, plots and examples. All texts are escaped.

    Args:
        audits: split -> audit.
        settings: name -> value, for a table.
    """
    sections = "\n".join(_section(split, audit) for split, audit in audits.items())
    links = "".join(map(_links, audits))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Counter-emotional replies: audit</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Counter-emotional replies: audit</h1>
<p>For each sample, one candidate reply was written per emotion. The true reply is chosen. The rejected reply is the
candidate whose emotion is least similar to that of the true reply, if the similarity is below the threshold.</p>
</header>
<nav aria-label="Contents"><h2>Contents</h2><ul>{links}<li><a href="#settings">Settings</a></li></ul></nav>
<main>
{sections}
<h2 id="settings">Settings</h2>
{_table(("setting", "value"), [(name, str(value)) for name, value in settings.items()])}
</main>
</body>
</html>
"""
