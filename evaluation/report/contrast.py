"""Report sections: the contrast evaluation, with examples that show two clips of the same words side by side."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..contrast.conditions import FULL
from ..contrast.scores import METRICS
from ..contrast.table import pair_source, warnings
from ..saved_clips import order_of, saved_clips
from ..tables import with_interval
from .exchanges import ReportClips
from .parts import ClipContrast, Missing, Part, Table
from .plots import confusion_plot, scores_plot
from .scores import about_samples, comparison_table, difference, p_value, short_name

AXES = {
    "changed": "replies that change\n(share, 0 to 1)",
    "movement": "movement towards the clip\n(probability, -1 to 1)",
    "matched": "matched pairs\n(share; chance 0.5)",
    "likelihood": "likelihood contrast\n(nats per reply; chance 0)",
}
PARTS = "Silence and gray frames, in place of the sound and the picture, are the same for all clips of an utterance."
CONFUSED = 2  # systems whose confusion matrix is shown
EARLIER = 4  # messages shown before the words of an example


def contrast_parts(results: Mapping) -> list[Part]:
    """Report contrast.json."""
    systems, settings = results["systems"], results["settings"]
    data, confidence = short_name(settings["data"]), f"{settings['confidence']:.0%}"
    full = {name: system["conditions"][FULL] for name, system in systems.items()}
    names = [name for name in METRICS if any(name in found for found in full.values())]
    titles = {name: results["metrics"][name]["title"] for name in names}
    rows = [[name, *(_cell(found, metric) for metric in names)] for name, found in full.items()]
    rows.append(["chance", *("–" if METRICS[name][1] is None else f"{METRICS[name][1]:.3f}" for name in names)])
    notes = [f"In brackets: {confidence} intervals, {settings['interval']}."]
    notes += [f"{titles[name][0].upper()}{titles[name][1:]}: {results['metrics'][name]['meaning']}." for name in names]
    if settings["likelihood"] != "none":
        which = "the true replies" if settings["likelihood"] == "reference" else "those of the table below"
        notes.append(f"Fitting replies of the likelihood contrast: {which}.")
    notes += [f"{count:,} turns are left out: {reason}." for reason, count in settings["left_out"].items()]
    notes += [line.removeprefix("WARNING: ") for line in warnings(results)]
    parts: list[Part] = [
        f"Does the reply follow the voice and the face? {about_samples(results)} {settings['utterances']:,} utterances "
        f"with {settings['clips']:,} clips in {settings['clip_pairs']:,} pairs: {pair_source(settings)}.",
        Table("Replies to the same words with different clips", ["system", *titles.values()], rows, notes=notes),
        scores_plot(
            f"Whether the reply follows the clip, with {confidence} intervals: {data}.",
            {name: AXES[name] for name in names if name in AXES},
            full,
        ),
        *_against_chance(full, titles),
        *comparison_table(results, titles),
        *_conditions(results, names, titles, data),
        _emotions(systems, titles),
    ]
    for name, system in list(systems.items())[:CONFUSED]:
        caption = f"{name}: emotion of the clip, and the emotion that the reply fits best. {data}."
        parts.append(confusion_plot(caption, system["confusion"]))
    return [*parts, *_table_of_fits(results["appropriateness"])]


def _cell(found: Mapping, metric: str) -> str:
    return with_interval(found[metric]) if metric in found else "–"


def _against_chance(full: Mapping, titles: Mapping[str, str]) -> list[Part]:
    rows = [
        [name, titles[metric], with_interval(row), f"{METRICS[metric][1]:g}", p_value(row["p"])]
        for name, found in full.items()
        for metric, row in found.items()
        if row["p"] is not None
    ]
    if not rows:
        return [Missing("Tests against chance: there is only one utterance.")]
    notes = ["p: two-sided permutation test over utterances that the value is that of chance; not adjusted."]
    header = ["system", "metric", "value", "chance", "p"]
    return [Table("Do the replies follow the clip more than by chance?", header, rows, names=2, notes=notes)]


def _conditions(results: Mapping, names: list[str], titles: Mapping[str, str], data: str) -> list[Part]:
    """What the systems make of a part of the clip."""
    found = {
        f"{name}: {results['conditions'][condition]}": row
        for name, system in results["systems"].items()
        for condition, row in system["conditions"].items()
        if len(system["conditions"]) > 1
    }
    if not found:
        return []
    rows = [[*line.rsplit(": ", 1), *(_cell(row, metric) for metric in names)] for line, row in found.items()]
    p_values = {(row["system"], row["condition"], row["metric"]): row["p_holm"] for row in results["ablations"]}
    tested = [
        [row["system"], results["conditions"][row["condition"]], titles[row["metric"]], difference(row),
         p_value(p_values[row["system"], row["condition"], row["metric"]])]
        for row in results["ablations"]
        if row["metric"] in ("movement", "matched", "likelihood")
    ]  # fmt: skip
    parts: list[Part] = [
        scores_plot(
            f"What each modality adds, with intervals: {data}.",
            {name: AXES[name] for name in ("movement", "matched") if name in names},
            found,
        ),
        Table("Parts of the clip", ["system", "given", *titles.values()], rows, names=2, notes=[PARTS]),
    ]
    if tested:
        header = ["system", "given", "metric", "whole clip - given", "adjusted p"]
        parts.append(Table("Does the rest of the clip matter?", header, tested, names=3))
    return parts


def _emotions(systems: Mapping, titles: Mapping[str, str]) -> Table:
    rows = []
    for name, system in systems.items():
        for emotion, found in system["by_emotion"].items():
            shown = [f"{found[metric]['mean']:.3f}" if metric in found else "–" for metric in ("movement", "matched")]
            rows.append([name, emotion, f"{found['changed']['pairs']:,}", *shown])
    header = [
        "system",
        "emotion of the clip",
        "pairs",
        titles.get("movement", "movement"),
        titles.get("matched", "matched"),
    ]
    return Table("By the emotion of the clip", header, rows, names=2)


def _table_of_fits(table: Mapping) -> list[Part]:
    rows = []
    for emotion, labels in table["fits"].items():
        shown = ", ".join(label if weight == 1 else f"{label} ({weight:g})" for label, weight in labels.items())
        rows.append([emotion, shown, " / ".join(table["replies"].get(emotion, []))])
    notes = [f"{table['source']}; classifier: {table['classifier']}. --appropriateness gives another table."]
    header = ["clip", "labels of a fitting reply", "fitting replies, if the data set has none"]
    return [Table("Which reply fits which clip", header, rows, names=3, notes=notes, prose=True)]


def contrast_examples(results: Mapping, folder: Path, count: int, clips: ReportClips) -> list[Part]:
    """
    Choose utterances and two clips of each, reproducibly, and show both clips with every system's replies.

    Args:
        results: the content of contrast.json.
        folder: its folder.
        count: number of utterances.
        clips: prepares the clips.
    """
    path = folder / results["utterances"]
    if not path.is_file():
        return [Missing(f"Examples: {path} is not found. Copy it next to the results.")]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    saved = saved_clips(path)
    chosen = sorted(lines, key=lambda line: order_of(line["id"]))[:count]
    return [_example(line, results, clips, saved) for line in chosen]


def _example(line: Mapping, results: Mapping, clips: ReportClips, saved: Mapping[str, Path]) -> ClipContrast:
    fits, places = results["appropriateness"]["fits"], range(len(line["clips"]))
    emotions = [clip["emotion"] for clip in line["clips"]]
    right, wrong = min(
        ((a, b) for a in places if line["clips"][a]["recorded"] for b in places if a != b),
        key=lambda pair: (
            fits[emotions[pair[0]]] == fits[emotions[pair[1]]],  # clips that ask for different replies
            order_of(f"{line['id']} {pair}"),
        ),
    )
    shown = [(message["name"], message["text"]) for message in line["messages"][-EARLIER - 1 :]]
    if len(line["messages"]) > len(shown):
        shown.insert(0, ("", f"… {len(line['messages']) - len(shown)} earlier utterances are omitted …"))
    sides, replies = [], [("true reply", [line["clips"][at]["reference"] or None for at in (right, wrong)])]
    for at in (right, wrong):
        clip = line["clips"][at]
        title = clip["emotion"] if clip["recorded"] else f"{clip['emotion']} (swapped: other words)"
        sides.append((title, clips.show(_message(clip["media"], saved))))
    for name, conditions in line["systems"].items():
        replies.append((name, [conditions[FULL][at]["reply"] for at in (right, wrong)]))
    if not any(replies[0][1]):
        replies.pop(0)
    return ClipContrast(line["id"], shown, sides, replies)


def _message(media: Mapping[str, Mapping], saved: Mapping[str, Path]) -> dict:
    """The clip as a message, for `ReportClips`."""
    content = []
    for kind, item in media.items():
        path = saved.get(item.get("digest", ""), item.get("path"))
        content.append({"type": kind, **item, **({"path": str(path)} if path else {})})
    return {"role": "user", "content": content}
