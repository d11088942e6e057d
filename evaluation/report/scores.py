"""Report sections: scored replies (Tables 1 and 2), emotion accuracy (Fig. 6), and results of quickstart."""

from collections.abc import Mapping

from ..published import FIGURE_6, TABLE_1
from ..quickstart_results import seed_cells
from ..reconstruction import PUBLISHED, SCORE_COLUMNS
from ..scores import METRICS
from ..statistics_of_replies import ADJUSTED, holm
from ..tables import with_interval
from .parts import Missing, Part, Table
from .plots import accuracy_plot, confusion_plot, histogram_plot, scores_plot

CORPUS_NAMES = {"multidialog": "MultiDialog", "meld": "MELD", "iemocap": "IEMOCAP"}
# Rows of Table 2: finetuned, MambaCompressor, audio-visual emotion extractor, EPO.
ROWS = {
    "base": "not finetuned",
    "text": "FT (history as text)",
    "memory": "FT + MC",
    "memory_av": "FT + MC + AV",
    "epo": "FT + MC + AV + EPO",
}
# Units on the axes of the plots.
AXES = {
    "bertscore": "BERTScore\n(F1, 0 to 1)",
    "emotion_score": "EmotionScore\n(cosine, -1 to 1)",
    "reply_emotion": "Response-emotion accuracy\n(share, 0 to 1)",
    "dist1": "Dist-1\n(share, 0 to 1)",
    "corpus_dist1": "Dist-1, corpus\n(share, 0 to 1)",
    "bleu1": "BLEU-1\n(0 to 1)",
    "bleu4": "BLEU-4\n(0 to 1)",
}
CONFUSED = ("A+V+T", "T")  # inputs whose confusion matrix is shown
QUICKSTART_ROWS = {
    "text": "no memory, no media",
    "memory": "+ memory",
    "memory_av": "+ audio and video",
    "epo": "+ EPO",
    "control": "control: same steps, no EPO",
}
QUICKSTART_COLUMNS = {
    "emotion_score": "EmotionScore",
    "emotion_score_sampled": "sampled",
    "dist1": "Dist-1",
    "recall": "recall of the history",
    "reward_accuracy": "reward accuracy",
    "margin": "margin",
}
QUICKSTART_SEEDS = {
    "emotion_score": "EmotionScore, greedy replies",
    "emotion_score_sampled": "EmotionScore, replies sampled at temperature 1",
    **{name: title for name, title in QUICKSTART_COLUMNS.items() if not name.startswith("emotion_score")},
}
QUICKSTART_INPUTS = {"T": "T", "AT": "A+T", "VT": "V+T", "AVT": "A+V+T"}


def short_name(data: str) -> str:
    """The last part of a path or Hub id."""
    return data.rstrip("/").rpartition("/")[2]


def _value(row: Mapping, name: str) -> str:
    return f"{row[name]:.3f}" if row.get(name) is not None else "–"


def about_samples(results: Mapping) -> str:
    """The data set of the results, its split, and the number of samples of each corpus."""
    settings = results["settings"]
    corpora = ", ".join(f"{CORPUS_NAMES.get(name, name)} {count:,}" for name, count in settings["corpora"].items())
    return f"{settings['data']}, split {settings['split']} (samples: {corpora})."


def p_value(value: float) -> str:
    """Format a p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def comparison_table(results: Mapping, titles: Mapping[str, str]) -> list[Part]:
    """The paired comparisons of systems; `titles` are those of the metrics."""
    if not results["comparisons"]:
        return [Missing("Comparisons of two systems: there is only one system, or only one conversation.")]
    p_values = [row["p"] for row in results["comparisons"]]
    rows = [
        [row["a"], row["b"], titles.get(row["metric"], row["metric"]), difference(row), *map(p_value, both)]
        for row, *both in zip(results["comparisons"], p_values, holm(p_values), strict=True)
    ]
    confidence = f"{results['settings']['confidence']:.0%}"
    drawn = f"{results['settings'].get('cluster', 'conversation')}s"
    notes = [
        f"Difference (system - beside) with its {confidence} interval, bootstrap over {drawn}. p: two-sided "
        f"paired permutation test over {drawn}. Adjusted p: {ADJUSTED}; the interval is not adjusted."
    ]
    header = ["system", "beside", "metric", "difference", "p", "adjusted p"]
    return [Table("Do two systems differ?", header, rows, names=3, notes=notes)]


def difference(row: Mapping) -> str:
    """Format the difference of a comparison with its interval."""
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


# -------------------------------------------------------------------------------------------------------------- replies


def reply_parts(results: Mapping) -> list[Part]:
    """Report Table 1 or 2 with plots and comparisons, from dialogue.json or ablation.json."""
    ablation, systems = results["table"] == "ablation", results["systems"]
    metrics = list(next(iter(systems.values()))["metrics"])
    titles = {name: ROWS.get(name, name) if ablation else name for name in systems}
    rows = [
        [titles[name], f"{system['count']:,}", *(with_interval(system["metrics"][metric]) for metric in metrics)]
        for name, system in systems.items()
    ]
    published = results["published"]["rows"]
    several = len(published) > 1 or ablation
    for corpus, models in published.items():
        for model, values in models.items():
            name = ROWS.get(model, model) if ablation else model
            where = f", {CORPUS_NAMES.get(corpus, corpus)}" if several else ""
            rows.append([f"{name}{where}", "–", *(_value(values, metric) for metric in metrics)])
    title = "What each part adds (Table 2)" if ablation else "Generated replies (Table 1)"
    header = ["system", "replies", *(METRICS[metric] for metric in metrics)]
    count = sum(map(len, published.values()))
    notes = [*(["FT finetuned, MC MambaCompressor, AV audio-visual."] if ablation else []), *_reply_notes(results)]
    parts: list[Part] = [about_samples(results), Table(title, header, rows, published=count, notes=notes)]
    if not count:
        parts.append(published_table_1(metrics))
    if systems:
        data, confidence = short_name(results["settings"]["data"]), f"{results['settings']['confidence']:.0%}"
        caption = f"Scores with their {confidence} intervals: {data}."
        if any(all(system["metrics"][name]["low"] is None for system in systems.values()) for name in metrics):
            caption += " A score without a bar has no interval."
        axes = {name: AXES.get(name, name) for name in metrics}
        parts.append(scores_plot(caption, axes, {titles[name]: each["metrics"] for name, each in systems.items()}))
    parts += [_similarity_plot(results, titles), *comparison_table(results, METRICS)]
    return parts


def _reply_notes(results: Mapping) -> list[str]:
    settings = results["settings"]
    notes = [f"In brackets: {settings['confidence']:.0%} intervals, {settings['interval']}."]
    notes += [f"{METRICS[metric]}: {by}." for metric, by in results["computed_by"].items()]
    notes += [f"{METRICS[metric]} is missing: {reason}." for metric, reason in results["skipped"].items()]
    empty = {name: system["empty"] for name, system in results["systems"].items() if system["empty"]}
    if empty:
        counts = ", ".join(f"{name} {count:,}" for name, count in empty.items())
        notes.append(f"Empty replies, which score 0: {counts}.")
    for name, system in results["systems"].items():
        if system["notes"]:
            first = system["notes"][0]
            notes.append(f"{len(system['notes']):,} replies of {name} have a note: {first['id']}: {first['note']}")
    if results["left_out"]:
        first = results["left_out"][0]
        notes.append(f"{len(results['left_out']):,} samples are left out, such as {first['id']}: {first['reason']}.")
    return notes


def published_table_1(metrics: list[str]) -> Table:
    """The whole of Table 1, shown if the paper has no rows for the evaluated corpus."""
    models = next(iter(TABLE_1.values()))
    shown = [metric for metric in next(iter(models.values())) if metric in metrics] or list(METRICS)[:3]
    header = ["model", *(f"{CORPUS_NAMES[corpus]} {METRICS[metric]}" for corpus in TABLE_1 for metric in shown)]
    rows = [[model, *(f"{TABLE_1[c][model][metric]:.3f}" for c in TABLE_1 for metric in shown)] for model in models]
    notes = ["The paper has no row for this corpus; these rows are for its own. †: finetuned on the training data."]
    return Table("Table 1 of the paper", header, rows, published=len(rows), notes=notes)


def _similarity_plot(results: Mapping, titles: Mapping[str, str]) -> Part:
    found = {
        titles[name]: system["histograms"]["emotion_score"]
        for name, system in results["systems"].items()
        if "emotion_score" in system.get("histograms", {})
    }
    if not found:
        return Missing("Histograms of EmotionScore: it was not computed, or an earlier version wrote the file.")
    edges = next(iter(found.values()))["edges"]
    counts = {name: each["counts"] for name, each in found.items()}
    caption = f"Emotional similarity of each reply to the true reply: {short_name(results['settings']['data'])}."
    return histogram_plot(caption, "EmotionScore of a reply (cosine, -1 to 1)", edges, counts, "replies")


# ------------------------------------------------------------------------------------------------------------- emotions


def emotion_parts(results: Mapping) -> list[Part]:
    """Report Fig. 6, the recall of each emotion and the confusion matrices, from emotion.json."""
    systems, settings = results["systems"], results["settings"]
    data = short_name(settings["data"])
    emotions = list(next(iter(systems.values()))["recall"])
    rows = [
        [name, f"{system['count']:,}", *(with_interval(system["metrics"][m]) for m in ("accuracy", "mean_recall"))]
        for name, system in systems.items()
    ]
    notes = [f"In brackets: {settings['confidence']:.0%} intervals, bootstrap over conversations.", FIGURE_6]
    if settings["left_out"]:
        notes.append(f"{settings['left_out']:,} labeled clips are left out: they lack an input of a row.")
    if not settings["trained_with_text"] and any("T" in name for name in systems):
        notes.append("The model was trained without the sentence, but gets it in the rows with T.")
    notes += [
        f"{name}: {len(system['notes']):,} notes, such as {system['notes'][0]['id']}: {system['notes'][0]['note']}"
        for name, system in systems.items()
        if system["notes"]
    ]
    header = ["input", "clips", "accuracy", "mean recall"]
    recall = [[name, *(_value(system["recall"], emotion) for emotion in emotions)] for name, system in systems.items()]
    parts: list[Part] = [
        f"{settings['model']} on {about_samples(results)}",
        accuracy_plot(
            f"Accuracy by modality, with {settings['confidence']:.0%} intervals (Fig. 6): {data}.",
            {name: system["metrics"]["accuracy"] for name, system in systems.items()},
        ),
        Table("Emotion accuracy (Fig. 6)", header, rows, notes=notes),
        Table("Recall of each emotion", ["input", *emotions], recall),
    ]
    for name in CONFUSED:
        if name in systems:
            caption = f"Confusion with the input {name}: shade is the share of the row. {data}."
            parts.append(confusion_plot(caption, systems[name]["confusion"]))
    return parts + comparison_table(results, {"accuracy": "accuracy"})


# ----------------------------------------------------------------------------------------------------------- quickstart


def _seeds_table(found: Mapping) -> Table:
    """EPO and its control, trained with several seeds."""
    rows = []
    for name, title in QUICKSTART_SEEDS.items():
        epo, control, difference, interval, p_value = seed_cells(found[name])
        rows.append([title, epo, control, f"{difference:.3f} {interval}" if interval else "", p_value])
    return Table(
        "EPO and its control over several seeds, in quickstart",
        ["metric", QUICKSTART_ROWS["epo"], QUICKSTART_ROWS["control"], "difference", "p"],
        rows,
        notes=[
            "Mean ± standard deviation over the seeds. The difference with its 95% interval, and the p-value of a "
            "paired permutation test, are over conversations; each reply counts with its mean over the seeds."
        ],
    )


def quickstart_parts(results: Mapping) -> list[Part]:
    """Report results.json of quickstart."""
    arms = results["dialogue"]
    rows = [
        [QUICKSTART_ROWS.get(arm, arm), *(_value(row, name) for name in QUICKSTART_COLUMNS)]
        for arm, row in arms.items()
    ]
    columns = [name for name in SCORE_COLUMNS if any(name in row for row in results["reconstruction"].values())]
    rebuilt = [
        [f"{count} at once", *(_value(row, name) for name in columns)]
        for count, row in results["reconstruction"].items()
    ]
    rebuilt.append([PUBLISHED["dataset"], *(_value(PUBLISHED, name) for name in columns)])
    accuracies = {
        QUICKSTART_INPUTS.get(name, name): {"mean": value, "low": None, "high": None}
        for name, value in results["emotion"].items()
    }
    named = [[name, f"{row['mean']:.3f}"] for name, row in accuracies.items()]
    tiny = (
        "A tiny model on a synthetic corpus: it shows that each stage trains as intended, not how good the method is."
    )
    seeds = []
    if "seeds" in results:
        seeds = [_seeds_table(results["seeds"])]
    notes = ["Margin: mean difference of the rewards (Eq. 1) of the true and the counter-emotional reply."]
    return [
        tiny,
        Table("Dialogue models of quickstart", ["model", *QUICKSTART_COLUMNS.values()], rows, notes=notes),
        *seeds,
        accuracy_plot("Accuracy by modality in quickstart (the paper's Fig. 6).", accuracies),
        Table("Emotion accuracy in quickstart", ["input", "accuracy"], named, notes=[FIGURE_6]),
        Table(
            "Utterances rebuilt in quickstart (Table 8)",
            ["utterances", *(SCORE_COLUMNS[name] for name in columns)],
            rebuilt,
            published=1,
            notes=["Content words are those of the corpus's grammar. BERTScore is not computed."],
        ),
    ]  # fmt: skip
