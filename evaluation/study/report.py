"""The analysis of a study as a table in the terminal, and as Markdown and JSON."""

import json
from pathlib import Path

AGREEMENT = (
    "Krippendorff's alpha: 1 is full agreement, 0 that of chance; he asks for 0.8 and more, and takes 0.667 to 0.8 for "
    "tentative conclusions."
)


def _value(value: float | None, interval: list[float] | None, form: str = ".2f") -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def _cell(text) -> str:
    """A text in a Markdown table, as it is."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def score_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the mean scores: one row a system."""
    names = [question["name"] for question in result["questions"]]
    rows = []
    for system in result["systems"]:
        theirs = [result["scores"][name][system] for name in names]
        ratings = "/".join(dict.fromkeys(str(row["ratings"]) for row in theirs))
        rows.append([system, *(_value(row["mean"], row["interval"]) for row in theirs), ratings])
    return ["system", *names, "ratings"], rows


def text(result: dict) -> str:
    """What the terminal shows: mean scores, agreement, who was left out."""
    header, rows = score_rows(result)
    widths = [max(len(line[place]) for line in [header, *rows]) for place in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows]]
    lines.insert(1, "-" * len(lines[0]))
    percent = f"{result['settings']['confidence']:.0%}"
    lines.append(f"Mean scores from 1 (bad) to 3 (good), with {percent} intervals over conversations.")
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
    """How many raters there are, began, and are kept."""
    started = sum(row["started"] for row in result["raters"])
    return f"{result['kept_raters']} of {len(result['raters'])} raters are counted; {started} began."


def markdown(result: dict) -> str:
    """All of the analysis in Markdown."""
    settings = result["settings"]
    rules = settings["exclusion"]
    percent = f"{settings['confidence']:.0%}"
    parts = ["# Human evaluation", "## Questions"]
    parts.append("\n".join(f"- **{question['name']}**: {question['text']}" for question in result["questions"]))
    parts.append("Each is answered with bad (1), medium (2) or good (3).")
    parts += ["## Mean scores", _table(*score_rows(result))]
    parts.append(
        f"{percent} intervals: bootstrap over the {settings['conversations']} conversations, {settings['resamples']} "
        f"resamples, seed {settings['seed']}. {raters_sentence(result)}"
    )
    parts.append("## Preferences")
    parts.append(
        "Each rater's scores of two replies to the same conversation, compared."
        if settings["design"] == "within"
        else "The mean scores of two replies to the same conversation, compared: no rater saw both."
    )
    for name in result["scores"]:
        rows = []
        pairs = zip(result["preferences"][name], result["differences"][name], strict=True)
        for row, difference in pairs:
            shares = [_value(row[side], row[f"{side}_interval"], ".0%") for side in ("better", "same", "worse")]
            change = _value(difference["mean"], difference["interval"], "+.2f")
            rows.append([" / ".join(row["systems"]), *shares, row["comparisons"], change])
        header = ["first / second", "first better", "same", "second better", "comparisons", "difference of means"]
        parts += [f"### {name}", _table(header, rows) if rows else "There is one system only."]
    parts += ["## Agreement of the raters", AGREEMENT]
    rows = [
        [name, *(_value(row["alpha"], row["interval"], ".3f") for row in levels.values())]
        for name, levels in result["agreement"].items()
    ]
    parts.append(_table(["question", "ordinal", "nominal"], rows))
    parts.append("## Who was left out")
    stated = "as stated before the study" if settings["exclusion_as_stated_before"] else "CHANGED after the study"
    parts.append(
        f"Rules, {stated}: a rater is left out who gave less than {rules['complete']:.0%} of the answers, failed more "
        f"than {rules['failed_checks']} attention checks, took less than {rules['median_seconds']:g} s for a reply "
        f"(median), or played less than {rules['played']:.0%} of the clips."
    )
    rows = [
        [
            row["rater"],
            f"{row['answers']} of {row['of']}",
            f"{row['failed_checks']} of {row['checks']}",
            f"{row['median_seconds']:.1f} s" if row["started"] else "-",
            f"{row['played']:.0%}" if row["started"] else "-",
            ("left out: " + "; ".join(row["reasons"]))
            if row["reasons"]
            else ("counted" if row["started"] else "did not begin"),
        ]
        for row in result["raters"]
    ]
    parts.append(_table(["rater", "answers", "failed checks", "time for a reply", "clips played", ""], rows))
    if result["problems"]:
        parts += ["## Lines that are no answers", "\n".join(f"- {_cell(line)}" for line in result["problems"])]
    return "\n\n".join(parts) + "\n"


def write(result: dict, folder: Path) -> tuple[Path, Path]:
    """Writes `analysis.md` and `analysis.json` into a folder; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "analysis.md", folder / "analysis.json"
    page.write_text(markdown(result), encoding="utf-8")
    data.write_text(json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return page, data
