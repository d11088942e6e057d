"""
All results of an evaluation as one report: a page to read, Markdown, and LaTeX tables.

    empathic evaluate report runs/evaluation

Reads what `empathic quickstart`, `counter`, `study analyse` and the other commands of `evaluate` wrote into the folders
and into the folders right below them, and writes report.html, report.md and tables.tex. What is not there is named.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from empathic.evaluation.report_costs import counter_parts, efficiency_parts, reconstruction_parts
from empathic.evaluation.report_exchanges import Clips, exchanges
from empathic.evaluation.report_html import page
from empathic.evaluation.report_parts import Missing, Part, Section, Table
from empathic.evaluation.report_scores import emotion_parts, quickstart_parts, reply_parts, short_name
from empathic.evaluation.report_study import study_parts
from empathic.evaluation.report_text import latex, markdown
from empathic.evaluation.study.build import KEY
from empathic.evaluation.study.report import ANALYSIS

TITLE = "empathic: evaluation report"
HTML, MARKDOWN, LATEX = "report.html", "report.md", "tables.tex"
SAMPLES = 6  # conversations of each data set


@dataclass(frozen=True)
class Kind:
    """A file of results: its name, keys that tell it from others of that name, and what is missing without it."""

    name: str
    keys: tuple[str, ...]
    title: str
    command: str


KINDS = {
    "quickstart": Kind("results.json", ("emotion", "reconstruction", "dialogue"), "Quickstart", "empathic quickstart"),
    "dialogue": Kind("dialogue.json", ("systems", "comparisons"), "Replies", "empathic evaluate dialogue"),
    "ablation": Kind("ablation.json", ("systems", "comparisons"), "Ablation", "empathic evaluate ablation"),
    "study": Kind(ANALYSIS, ("scores", "agreement", "raters"), "Human evaluation", "empathic study analyse"),
    "emotion": Kind("emotion.json", ("systems", "comparisons"), "Emotions", "empathic evaluate emotion"),
    "reconstruction": Kind("reconstruction.json", ("scores", "runs"), "Memory", "empathic evaluate reconstruction"),
    "efficiency": Kind("efficiency.json", ("machine", "histories"), "Costs", "empathic evaluate efficiency"),
    "counter": Kind("report.json", ("settings", "pairs", "splits"), "Counter-emotional replies", "empathic counter"),
}
TABLES = {
    "dialogue": "Table 1 (replies)",
    "ablation": "Table 2 (ablation)",
    "study": "Human evaluation (Sec. 5.2)",
    "emotion": "Fig. 6 (emotions, confusion)",
    "reconstruction": "Table 8 (rebuilt utterances)",
    "efficiency": "Table 3 (costs of the history)",
}


@dataclass(frozen=True)
class Found:
    """A file of results that was read."""

    kind: str
    path: Path
    results: Mapping


def find_results(folders: Sequence[str | os.PathLike]) -> list[Found]:
    """
    The files of results in folders and in those right below them, by kind.

    Raises:
        ValueError: for a folder that is not there or holds none, and for a file that cannot be read.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: is no folder. Give one that an `empathic evaluate` command has written.")
        for kind, about in KINDS.items():
            for path in [folder / about.name, *sorted(folder.glob(f"*/{about.name}"))]:
                if path.is_file():
                    results = _read(path)
                    if isinstance(results, dict) and all(key in results for key in about.keys):
                        found[path.resolve()] = Found(kind, path, results)
    if not found:
        names = ", ".join(kind.name for kind in KINDS.values())
        raise ValueError(f"{', '.join(map(str, folders))}: no results are there, nor right below. Looked for: {names}.")
    order = list(KINDS)
    return sorted(found.values(), key=lambda each: order.index(each.kind))


def _read(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). Run the command again that wrote it.") from None


def _lines(path: Path) -> list[dict]:
    """The objects of a JSONL file; none where it is not there."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"{path}: has a line that is no JSON ({error}). Run the command again that wrote it."
        ) from None


def _sections(found: Found, output: Path, clips: Clips, samples: int) -> list[Section]:
    """What is shown of a file."""
    results, title = found.results, KINDS[found.kind].title
    try:
        if found.kind in ("dialogue", "ablation"):
            data = short_name(results["settings"]["data"])
            sources = {name: found.path.parent / each["replies"] for name, each in results["systems"].items()}
            shown = exchanges(sources, samples, clips) if samples else []
            sections = [Section(f"{title}: {data}", reply_parts(results))]
            return [*sections, Section(f"{title}, conversations: {data}", shown)] if shown else sections
        if found.kind == "study":
            return [Section(f"{title}: {found.path.resolve().parent.name}", study_parts(results))]
        if found.kind == "emotion":
            return [Section(f"{title}: {short_name(results['settings']['data'])}", emotion_parts(results))]
        if found.kind == "reconstruction":
            written = _lines(found.path.with_suffix(".jsonl"))
            return [Section(f"{title}: {short_name(results['data'])}", reconstruction_parts(results, written))]
        if found.kind == "efficiency":
            return [Section(f"{title}: {results['name']}", efficiency_parts(results))]
        if found.kind == "counter":
            audit = found.path.with_name("audit.html")
            link = Path(os.path.relpath(audit, output)) if audit.is_file() else None
            return [Section(title, counter_parts(results, link))]
        return [Section(title, quickstart_parts(results))]
    except KeyError as error:
        raise ValueError(
            f"{found.path}: has no {error}. It was written by another version: run `{KINDS[found.kind].command}` again."
        ) from None


def _missing(found: Sequence[Found], folders: Sequence[Path]) -> list[Part]:
    there = {each.kind for each in found}
    commands = {kind: f"{about.command}, see its --help" for kind, about in KINDS.items()}
    studies = [path.parent for folder in folders for path in (folder / KEY, *sorted(folder.glob(f"*/{KEY}")))]
    built = next((study for study in studies if (study / KEY).is_file()), None)
    commands["study"] = f"{KINDS['study'].command} {built}" if built else "empathic study, see its --help"
    return [
        Missing(f"{title}: run {commands[kind]}.")
        for kind, title in TABLES.items()
        if kind not in there and not (kind == "reconstruction" and "quickstart" in there)
    ]


# ------------------------------------------------------------------------------------------------------------- settings

ABOUT = ("settings", "versions", "machine", "command", "computed_by", "seconds", "baseline", "bertscore")


def _flat(content, name: str) -> list[list[str]]:
    """(name, value) of all that a nested dict holds."""
    if isinstance(content, Mapping):
        return [row for key, value in content.items() for row in _flat(value, f"{name}.{key}" if name else str(key))]
    return [[name, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)]]


def _settings_table(found: Found) -> Table:
    """All that decided the results, with versions and seeds."""
    results = found.results
    rows = [row for name in ABOUT if name in results for row in _flat(results[name], name)]
    for name, system in results["systems"].items() if found.kind in ("dialogue", "ablation", "emotion") else ():
        rows += _flat(system["settings"], f"systems.{name}")
    if not rows:
        rows = [["settings", "the file holds none"]]
    return Table(f"{found.path.as_posix()}", ["setting", "value"], rows, names=2, prose=True)


# --------------------------------------------------------------------------------------------------------------- report


def write_report(
    folders: Sequence[str | os.PathLike], output: str | os.PathLike | None = None, samples: int = SAMPLES
) -> Path:
    """
    Writes report.html, report.md and tables.tex.

    Args:
        folders: with results, see the module.
        output: folder to write; the first of `folders` by default.
        samples: conversations shown of each data set.

    Returns:
        the path of report.html.

    Raises:
        ValueError: for folders without results, or files that do not hold what they should.
    """
    found = find_results(folders)
    output = Path(folders[0] if output is None else output)
    output.mkdir(parents=True, exist_ok=True)
    clips = Clips(output)
    sections = [section for each in found for section in _sections(each, output, clips, samples)]
    missing = _missing(found, list(map(Path, folders)))
    if missing:
        sections.append(Section("Not in this report", missing))
    sections.append(Section("Settings, versions and seeds", [_settings_table(each) for each in found], folded=True))
    about: list[Part] = [
        "Our results beside those that the paper published. Scores lie between 0 and 1 unless a table says otherwise; "
        "more is better, except for costs."
    ]
    for name, content in (
        (HTML, page(TITLE, about, sections)),
        (MARKDOWN, markdown(TITLE, [*about, f"Plots and sample conversations: {HTML}."], sections)),
        (LATEX, latex(sections)),
    ):
        (output / name).write_text(content, encoding="utf-8")
    return output / HTML
