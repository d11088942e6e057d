"""Report section: the scores of a judge, always with its agreement with people."""

from collections.abc import Mapping

from ..judge.rubric import CRITERIA
from ..judge.table import METRICS, agreement_lines, answer_lines
from ..tables import with_interval
from .parts import Missing, Part, Table
from .plots import scores_plot
from .scores import comparison_table


def judge_parts(results: Mapping) -> list[Part]:
    """Report judge.json."""
    settings, confidence = results["settings"], f"{results['settings']['confidence']:.0%}"
    systems = results["systems"]
    rows = [
        [
            name,
            f"{each['count']:,}",
            *("–" if row["mean"] is None else with_interval(row) for row in each["metrics"].values()),
        ]
        for name, each in systems.items()
    ]
    notes = [f"In brackets: {confidence} intervals, {settings['interval']}.", *answer_lines(results)]
    parts: list[Part] = [
        f"Replies judged by {results['judge']['target']}, each in two orders, from 0 to 2 by each criterion.",
        Table(
            "Scores of the judge", ["system", "conversations", *METRICS], rows, notes=agreement_lines(results) + notes
        ),
    ]
    if any(each["count"] for each in systems.values()):
        axes = {name: f"{name}\n(0 to 2)" for name in CRITERIA}
        shown = {name: {metric: each["metrics"][metric] for metric in CRITERIA} for name, each in systems.items()}
        parts += [
            scores_plot(f"Scores of the judge, with {confidence} intervals.", axes, shown),
            *comparison_table(results, {name: name for name in METRICS}),
        ]
    else:
        parts.append(Missing("Scores: no conversation has a valid answer in both orders."))
    rubric = [[name, row["question"], *row["meaning"]] for name, row in results["rubric"].items()]
    parts.append(Table("Rubric", ["criterion", "question", "0", "1", "2"], rubric, names=5, prose=True))
    return parts
