"""A report as Markdown, and its tables as LaTeX. Every text is escaped."""

import html
import re

from empathic.evaluation.report_parts import Exchange, Missing, Part, Plot, Section, Table

_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|~#$]")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "†": r"\dag{}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "[": "{[}",  # these would be taken for options of the line break before them
    "]": "{]}",
    "*": "{*}",
}


def markdown_text(text: str) -> str:
    """Text of which nothing is taken for Markdown or HTML, on one line."""
    line = " ".join(text.split())
    return _MARKDOWN.sub(lambda mark: f"&#{ord(mark[0])};", html.escape(line, quote=False))


def latex_text(text: str) -> str:
    """Text of which nothing is taken for a command, on one line."""
    return "".join(_LATEX.get(mark, mark) for mark in " ".join(text.split()))


def _named(table: Table, escape, escape_number) -> list[list[str]]:
    """Escaped rows; the paper's say so."""
    rows = []
    for place, (name, *cells) in enumerate(table.rows):
        marked = escape(name) + (" (published)" if table.is_published(place) else "")
        rows.append([marked, *((escape if at < table.names else escape_number)(c) for at, c in enumerate(cells, 1))])
    return rows


def markdown_table(table: Table) -> str:
    """A heading, a Markdown table and its notes."""
    marks = ["---"] * table.names + ["---:"] * (len(table.header) - table.names)
    lines = [list(map(markdown_text, table.header)), marks, *_named(table, markdown_text, html.escape)]
    parts = [f"### {markdown_text(table.title)}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join([*parts, *map(markdown_text, table.notes)])


def latex_table(table: Table) -> str:
    """A `table` with a `tabular` in it, which needs no package."""
    columns = "l" * table.names + "r" * (len(table.header) - table.names)
    ours, published = (
        [" & ".join(row) + r" \\" for row in _named(table, latex_text, latex_text)[part]]
        for part in (
            slice(0, len(table.rows) - table.published),
            slice(len(table.rows) - table.published, len(table.rows)),
        )
    )
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        " & ".join(map(latex_text, table.header)) + r" \\",
        r"\hline",
        *ours,
        *([r"\hline"] if ours and published else []),
        *published,
        r"\hline",
        r"\end{tabular}",
        *([rf"\par\footnotesize {' '.join(map(latex_text, table.notes))}"] if table.notes else []),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _part(part: Part) -> str | None:
    match part:
        case Table():
            return markdown_table(part)
        case Missing():
            return f"**Missing:** {markdown_text(part.text)}"
        case Plot() | Exchange():
            return None
    return markdown_text(part)


def markdown(title: str, about: list[Part], sections: list[Section]) -> str:
    """A report without its plots and conversations."""
    lines = [f"# {markdown_text(title)}", *map(_part, about)]
    for section in sections:
        parts = [part for part in map(_part, section.parts) if part is not None]
        if parts:
            lines += [f"## {markdown_text(section.title)}", *parts]
    return "\n\n".join(lines) + "\n"


def latex(sections: list[Section]) -> str:
    """All tables of numbers, one after the other, to be taken into a document with \\input."""
    tables = [part for section in sections if not section.folded for part in section.parts if isinstance(part, Table)]
    head = "% Plain tabulars: no package is needed. Names in other scripts than Latin need LuaLaTeX or XeLaTeX.\n"
    return head + "\n" + "\n\n".join(latex_table(table) for table in tables if not table.prose) + "\n"
