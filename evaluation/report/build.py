"""
Build one report of all results: an HTML page, Markdown, and LaTeX tables.

    empathic evaluate report runs/evaluation

Reads the result files of `empathic quickstart`, `counter`, `study analyze` and the other `evaluate` commands in the
given folders and their direct subfolders, and writes report.html, report.md and tables.tex. Missing results are listed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..study.build import KEY
from ..study.report import ANALYSIS
from .contrast import contrast_examples, contrast_parts
from .costs import counter_parts, efficiency_parts, memory_parts, reconstruction_parts
from .exchanges import ReportClips, exchanges
from .html import page
from .judge import judge_parts
from .parts import Missing, Part, Section, Table
from .scores import emotion_parts, quickstart_parts, reply_parts, short_name
from .study import study_parts
from .text import latex, markdown

TITLE = "empathic: evaluation report"
HTML, MARKDOWN, LATEX = "report.html", "report.md", "tables.tex"
SAMPLES = 6  # sample conversations per data set


@dataclass(frozen=True)
class Kind:
    """A kind of result file: its name, the keys that identify it, the title of its section, and its command."""

    name: str
    keys: tuple[str, ...]
    title: str
    command: str


RESULT_KINDS = {
    "quickstart": Kind("results.json", ("emotion", "reconstruction", "dialogue"), "Quickstart", "empathic quickstart"),
    "dialogue": Kind("dialogue.json", ("systems", "comparisons"), "Replies", "empathic evaluate dialogue"),
    "ablation": Kind("ablation.json", ("systems", "comparisons"), "Ablation", "empathic evaluate ablation"),
    "study": Kind(ANALYSIS, ("scores", "agreement", "raters"), "Human evaluation", "empathic study analyze"),
    "contrast": Kind(
        "contrast.json", ("systems", "conditions", "appropriateness"), "Contrast", "empathic evaluate contrast"
    ),
    "judge": Kind("judge.json", ("systems", "answers", "rubric"), "Judge", "empathic evaluate judge"),
    "emotion": Kind("emotion.json", ("systems", "comparisons"), "Emotions", "empathic evaluate emotion"),
    "reconstruction": Kind("reconstruction.json", ("scores", "runs"), "Memory", "empathic evaluate reconstruction"),
    "memory": Kind("memory.json", ("benchmark", "arms"), "Long conversations", "empathic evaluate memory"),
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
    "contrast": "Contrast (does the reply follow the clip?)",
    "judge": "Judge (rubric, with the clip)",
}


@dataclass(frozen=True)
class Found:
    """A result file that was read."""

    kind: str
    path: Path
    results: Mapping


def find_results(folders: Sequence[str | os.PathLike]) -> list[Found]:
    """
    Find the result files in folders and their direct subfolders, sorted by kind.

    Raises:
        ValueError: if a folder does not exist, there are no result files, or a file cannot be read.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Give the output folder of an `empathic evaluate` command.")
        for kind, about in RESULT_KINDS.items():
            for path in [folder / about.name, *sorted(folder.glob(f"*/{about.name}"))]:
                if path.is_file():
                    results = _read(path)
                    if isinstance(results, dict) and all(key in results for key in about.keys):
                        found[path.resolve()] = Found(kind, path, results)
    if not found:
        names = ", ".join(kind.name for kind in RESULT_KINDS.values())
        raise ValueError(
            f"{', '.join(map(str, folders))}: no result files there or in direct subfolders. Looked for: {names}."
        )
    order = list(RESULT_KINDS)
    return sorted(found.values(), key=lambda each: order.index(each.kind))


def _read(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). Rerun the command that wrote it.") from None


def _lines(path: Path) -> list[dict]:
    """Read the objects of a JSONL file; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: has a line that is not JSON ({error}). Rerun the command that wrote it.") from None


def _sections(found: Found, output: Path, clips: ReportClips, samples: int) -> list[Section]:
    """The report sections for a result file."""
    results, title = found.results, RESULT_KINDS[found.kind].title
    try:
        if found.kind in ("dialogue", "ablation"):
            data = short_name(results["settings"]["data"])
            sources = {name: found.path.parent / each["replies"] for name, each in results["systems"].items()}
            shown = exchanges(sources, samples, clips) if samples else []
            sections = [Section(f"{title}: {data}", reply_parts(results))]
            return [*sections, Section(f"{title}, conversations: {data}", shown)] if shown else sections
        if found.kind == "study":
            return [Section(f"{title}: {found.path.resolve().parent.name}", study_parts(results))]
        if found.kind == "contrast":
            data = short_name(results["settings"]["data"])
            shown = contrast_examples(results, found.path.parent, samples, clips) if samples else []
            sections = [Section(f"{title}: {data}", contrast_parts(results))]
            return [*sections, Section(f"{title}, clips side by side: {data}", shown)] if shown else sections
        if found.kind == "judge":
            return [Section(f"{title}: {results['judge']['target']}", judge_parts(results))]
        if found.kind == "emotion":
            return [Section(f"{title}: {short_name(results['settings']['data'])}", emotion_parts(results))]
        if found.kind == "reconstruction":
            written = _lines(found.path.with_suffix(".jsonl"))
            return [Section(f"{title}: {short_name(results['data'])}", reconstruction_parts(results, written))]
        if found.kind == "memory":
            return [Section(f"{title}: {results['benchmark']}", memory_parts(results))]
        if found.kind == "efficiency":
            return [Section(f"{title}: {results['name']}", efficiency_parts(results))]
        if found.kind == "counter":
            audit = found.path.with_name("audit.html")
            link = Path(os.path.relpath(audit, output)) if audit.is_file() else None
            return [Section(title, counter_parts(results, link))]
        return [Section(title, quickstart_parts(results))]
    except KeyError as error:
        raise ValueError(
            f"{found.path}: has no {error}. Another version wrote it: rerun `{RESULT_KINDS[found.kind].command}`."
        ) from None


def _missing(found: Sequence[Found], folders: Sequence[Path]) -> list[Part]:
    there = {each.kind for each in found}
    commands = {kind: f"{about.command}, see its --help" for kind, about in RESULT_KINDS.items()}
    studies = [path.parent for folder in folders for path in (folder / KEY, *sorted(folder.glob(f"*/{KEY}")))]
    built = next((study for study in studies if (study / KEY).is_file()), None)
    commands["study"] = f"{RESULT_KINDS['study'].command} {built}" if built else "empathic study, see its --help"
    return [
        Missing(f"{title}: run {commands[kind]}.")
        for kind, title in TABLES.items()
        if kind not in there and not (kind == "reconstruction" and "quickstart" in there)
    ]


# ------------------------------------------------------------------------------------------------------------- settings

ABOUT = ("settings", "judge", "versions", "machine", "command", "computed_by", "seconds", "baseline", "bertscore")


WITH_SYSTEMS = ("dialogue", "ablation", "contrast", "emotion")  # their results have the settings of each system


def _flat(content, name: str) -> list[list[str]]:
    """Flatten a nested dict into rows of [dotted name, value]."""
    if isinstance(content, Mapping):
        return [row for key, value in content.items() for row in _flat(value, f"{name}.{key}" if name else str(key))]
    return [[name, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)]]


def _settings_table(found: Found) -> Table:
    """A table of all settings of the results, with versions and seeds."""
    results = found.results
    rows = [row for name in ABOUT if name in results for row in _flat(results[name], name)]
    for name, system in results["systems"].items() if found.kind in WITH_SYSTEMS else ():
        rows += _flat(system["settings"], f"systems.{name}")
    if not rows:
        rows = [["settings", "the file has none"]]
    return Table(f"{found.path.as_posix()}", ["setting", "value"], rows, names=2, prose=True)


# --------------------------------------------------------------------------------------------------------------- report


def write_report(
    folders: Sequence[str | os.PathLike], output: str | os.PathLike | None = None, samples: int = SAMPLES
) -> Path:
    """
    Write report.html, report.md and tables.tex.

    Args:
        folders: folders with results, see the module.
        output: output folder; the first of `folders` by default.
        samples: number of sample conversations per data set.

    Returns:
        The path of report.html.

    Raises:
        ValueError: if the folders have no results, or a file lacks expected content.
    """
    found = find_results(folders)
    output = Path(folders[0] if output is None else output)
    output.mkdir(parents=True, exist_ok=True)
    clips = ReportClips(output)
    sections = [section for each in found for section in _sections(each, output, clips, samples)]
    missing = _missing(found, list(map(Path, folders)))
    if missing:
        sections.append(Section("Not in this report", missing))
    sections.append(Section("Settings, versions and seeds", [_settings_table(each) for each in found], folded=True))
    about: list[Part] = [
        "Our results compared with those published in the paper. Scores are between 0 and 1 unless a table says "
        "otherwise; higher is better, except for costs."
    ]
    for name, content in (
        (HTML, page(TITLE, about, sections)),
        (MARKDOWN, markdown(TITLE, [*about, f"Plots and sample conversations: {HTML}."], sections)),
        (LATEX, latex(sections)),
    ):
        (output / name).write_text(content, encoding="utf-8")
    return output / HTML
