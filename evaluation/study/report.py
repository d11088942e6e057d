"""Format the analysis of a study: a table for the terminal, parts of a report, Markdown and JSON."""

import json
from pathlib import Path

from ..report.parts import Part, Section, Table
from ..report.text import markdown as report_markdown

ANALYSIS = "analysis.json"
SCALE = "1 bad, 2 medium, 3 good"
AGREEMENT = (
    "Krippendorff's alpha: 1 is full agreement, 0 is chance level. Krippendorff recommends 0.8 or more, and 0.667 to "
    "0.8 only for tentative conclusions."
)
PAPER = (
    "The paper asked ten raters about ten conversations and six systems (Sec. 9). It plots the mean scores (Fig. 5), "
    "which are not copied here. Our questions have our own wording."
)


def _value(value: float | None, interval: list[float] | None, form: str = ".2f") -> str:
    if value is None:
        return "–"
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def score_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of mean scores, one row per system."""
    names = [question["name"] for question in result["questions"]]
    rows = []
    for system in result["systems"]:
        theirs = [result["scores"][name][system] for name in names]
        ratings = "/".join(dict.fromkeys(str(row["ratings"]) for row in theirs))
        rows.append([system, *(_value(row["mean"], row["interval"]) for row in theirs), ratings])
    return ["system", *names, "ratings"], rows


def text(result: dict) -> str:
    """Format mean scores, agreement and excluded raters for the terminal."""
    header, rows = score_rows(result)
    widths = [max(len(line[place]) for line in [header, *rows]) for place in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows]]
    lines.insert(1, "-" * len(lines[0]))
    percent = f"{result['settings']['confidence']:.0%}"
    lines.append(f"Mean scores ({SCALE}), with {percent} intervals over conversations.")
    for name, levels in result["agreement"].items():
        said = ", ".join(f"{level} {_value(row['alpha'], row['interval'])}" for level, row in levels.items())
        lines.append(f"Krippendorff's alpha, {name}: {said}")
    lines.append(raters_sentence(result))
    lines += [f"  rater {row['rater']} left out: {', '.join(row['reasons'])}" for row in _excluded(result)]
    lines += [f"  {problem}" for problem in result["problems"]]
    return "\n".join(lines)


def _excluded(result: dict) -> list[dict]:
    return [row for row in result["raters"] if row["reasons"]]


def raters_sentence(result: dict) -> str:
    """A sentence with the numbers of raters who are counted, and who started."""
    started = sum(row["started"] for row in result["raters"])
    return f"{result['kept_raters']} of {len(result['raters'])} raters are counted; {started} started."


def rules_sentence(result: dict) -> str:
    """A sentence with the exclusion rules, and whether they were stated before the study."""
    rules = result["settings"]["exclusion"]
    stated = (
        "as stated before the study" if result["settings"]["exclusion_as_stated_before"] else "CHANGED after the study"
    )
    return (
        f"Rules, {stated}: a rater is left out who gave less than {rules['complete']:.0%} of the answers, failed more "
        f"than {rules['failed_checks']} attention checks, took a median of less than {rules['median_seconds']:g} s per "
        f"reply, or played less than {rules['played']:.0%} of the clips."
    )


def parts(result: dict) -> list[Part]:
    """
    Return the whole analysis as parts of a report, without the codes of raters.

    Args:
        result: the result of `analysis.analyze`.
    """
    settings = result["settings"]
    header, rows = score_rows(result)
    notes = [
        *(f"{question['name']}: {question['text']}" for question in result["questions"]),
        f"{SCALE}. In brackets: {settings['confidence']:.0%} intervals, bootstrap over the "
        f"{settings['conversations']} conversations, {settings['resamples']:,} resamples, seed {settings['seed']}.",
        raters_sentence(result),
        rules_sentence(result),
        PAPER,
    ]
    alphas = [
        [name, *(_value(row["alpha"], row["interval"], ".3f") for row in levels.values())]
        for name, levels in result["agreement"].items()
    ]
    return [
        Table("Mean scores of the raters (Sec. 5.2)", header, rows, notes=notes),
        *_preferences(result),
        Table("Agreement of the raters", ["question", "ordinal alpha", "nominal alpha"], alphas, notes=[AGREEMENT]),
        _raters(result),
        *_problems(result),
    ]


def _preferences(result: dict) -> list[Table]:
    """Pairwise comparisons of systems, one table per question; no tables if there is only one system."""
    note = (
        "Compares each rater's scores of two replies to the same conversation."
        if result["settings"]["design"] == "within"
        else "Compares the mean scores of two replies to the same conversation; no rater saw both."
    )
    header = ["first", "second", "first better", "same", "second better", "comparisons", "difference of means"]
    tables = []
    for name in result["scores"]:
        rows = []
        for row, difference in zip(result["preferences"][name], result["differences"][name], strict=True):
            shares = [_value(row[side], row[f"{side}_interval"], ".0%") for side in ("better", "same", "worse")]
            change = _value(difference["mean"], difference["interval"], "+.2f")
            rows.append([*row["systems"], *shares, str(row["comparisons"]), change])
        if rows:
            notes = [note, "Intervals are not adjusted for multiple comparisons."]
            tables.append(Table(f"Which reply is preferred: {name}", header, rows, names=2, notes=notes))
    return tables


def _raters(result: dict) -> Table:
    rows = [
        [
            str(row["rater"]),
            ("left out: " + "; ".join(row["reasons"]))
            if row["reasons"]
            else ("counted" if row["started"] else "did not start"),
            f"{row['answers']} of {row['of']}",
            f"{row['failed_checks']} of {row['checks']}",
            f"{row['median_seconds']:.1f} s" if row["started"] else "–",
            f"{row['played']:.0%}" if row["started"] else "–",
        ]
        for row in result["raters"]
    ]
    header = ["rater", "outcome", "answers", "failed checks", "median time per reply", "clips played"]
    return Table("The raters, and who was left out", header, rows, names=2, prose=True)


def _problems(result: dict) -> list[Table]:
    lines = [[line] for line in result["problems"]]
    return [Table("Invalid lines in the answers", ["line"], lines, prose=True)] if lines else []


def markdown(result: dict) -> str:
    """Format the whole analysis as Markdown."""
    return report_markdown("Human evaluation", [], [Section("What the raters said", parts(result))])


def write(result: dict, folder: Path) -> tuple[Path, Path]:
    """Write `analysis.md` and `analysis.json` into a folder; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "analysis.md", folder / ANALYSIS
    page.write_text(markdown(result), encoding="utf-8")
    data.write_text(json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return page, data
