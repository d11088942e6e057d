"""Report section: the human evaluation (Sec. 5.2)."""

from collections.abc import Mapping

from ..study.report import SCALE, parts
from .parts import Part
from .plots import scores_plot


def study_parts(result: Mapping) -> list[Part]:
    """Report analysis.json of `empathic study analyze`, after a plot of the mean scores."""
    names = [question["name"] for question in result["questions"]]
    systems: dict[str, dict] = {system: {} for system in result["systems"]}
    for name in names:
        for system, row in result["scores"][name].items():
            if row["mean"] is not None:
                low, high = row["interval"] or (None, None)
                systems[system][name] = {"mean": row["mean"], "low": low, "high": high}
    confidence = f"{result['settings']['confidence']:.0%}"
    caption = f"Mean scores of the raters, with {confidence} intervals over conversations."
    axes = {name: f"{name}\n({SCALE})" for name in names}
    return [scores_plot(caption, axes, systems), *parts(result)]
