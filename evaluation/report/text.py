"""Write a report as Markdown, and its tables as LaTeX. All text is escaped."""

import html
import re
import unicodedata

from .parts import ClipContrast, Exchange, Missing, Part, Plot, Section, Table

_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|~#$]")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "†": r"\dag{}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "[": "{[}",  # after a line break, LaTeX would read brackets or a star as its options
    "]": "{]}",
    "*": "{*}",
}
# Characters that pdfLaTeX prints with its default fonts: ASCII, and most Latin letters and signs.
_KNOWN = {chr(code) for code in (*range(32, 127), *range(0xA1, 0x180))} | set("‘’“”‡•‰€™←→")
_KNOWN -= set("«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ\xad")
_SCRIPTS = {"<sub>": "_", "<super>": "^"}
_MINUS = re.compile(r"-(?=\d)")
HEADER = 12  # maximum letters of a column name on one line in LaTeX
FLOATS = 40  # tables between two \\clearpage; LaTeX fails at 52 unplaced floats


def markdown_text(text: str) -> str:
    """Escape text for Markdown and HTML, on one line."""
    line = " ".join(text.split())
    return _MARKDOWN.sub(lambda mark: f"&#{ord(mark[0])};", html.escape(line, quote=False))


def latex_text(text: str) -> str:
    """
    Escape text for LaTeX, on one line.

    A character that pdfLaTeX cannot print appears as its code point, such as U+6A21; LuaLaTeX and XeLaTeX print it.
    """
    line = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(map(_latex_letter, line, f" {line}"))


def latex_number(text: str) -> str:
    """Escape text as `latex_text` does, with hyphens before digits as minus signs."""
    return latex_text(_MINUS.sub("−", text))


def _latex_letter(letter: str, before: str) -> str:
    if letter == before == "-":  # LaTeX would print two hyphens as a dash
        return "{}-"
    if letter in _LATEX or letter in _KNOWN:
        return _LATEX.get(letter, letter)
    script, _, codes = unicodedata.decomposition(letter).partition(" ")
    if script in _SCRIPTS and codes and " " not in codes and chr(int(codes, 16)).isalnum() and int(codes, 16) < 128:
        return f"${_SCRIPTS[script]}{{{chr(int(codes, 16))}}}$"
    number = f"U+{ord(letter):04X}"
    if unicodedata.category(letter) == "Cc":  # no TeX engine accepts control characters
        return f"{{{number}}}"
    return rf"\ifdefined\Umathchar {letter}\else {{{number}}}\fi{{}}"


def _named(table: Table, escape, escape_number) -> list[list[str]]:
    """The escaped rows; rows from the paper are marked as published."""
    rows = []
    for place, (name, *cells) in enumerate(table.rows):
        marked = escape(name) + (" (published)" if table.is_published(place) else "")
        rows.append([marked, *((escape if at < table.names else escape_number)(c) for at, c in enumerate(cells, 1))])
    return rows


def markdown_table(table: Table) -> str:
    """Format a heading, a Markdown table and its notes."""
    marks = ["---"] * table.names + ["---:"] * (len(table.header) - table.names)
    lines = [list(map(markdown_text, table.header)), marks, *_named(table, markdown_text, html.escape)]
    parts = [f"### {markdown_text(table.title)}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join([*parts, *map(markdown_text, table.notes)])


def _latex_header(name: str, side: str) -> str:
    """Format the name of a column, on two lines if it is long."""
    spaces = [place for place, letter in enumerate(name) if letter == " "]
    if len(name) <= HEADER or not spaces:
        return latex_text(name)
    middle = min(spaces, key=lambda place: abs(place - len(name) / 2))
    return rf"\shortstack[{side}]{{{latex_text(name[:middle])}\\{latex_text(name[middle:])}}}"


def latex_table(table: Table) -> str:
    """Format a `table` with a `tabular`, scaled down to the width of the text. Needs booktabs and graphicx."""
    columns = "l" * table.names + "r" * (len(table.header) - table.names)
    rows = [" & ".join(row) + r" \\" for row in _named(table, latex_text, latex_number)]
    ours = len(rows) - table.published
    lines = [
        r"\begin{table}",
        r"\centering\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(table.title)}}}\par\smallskip",
        r"\sbox2{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_latex_header, table.header, columns)) + r" \\",
        r"\midrule",
        *rows[:ours],
        *([r"\midrule"] if 0 < ours < len(rows) else []),
        *rows[ours:],
        r"\bottomrule",
        r"\end{tabular}}%",
        r"\ifdim\wd2>\linewidth\resizebox{\linewidth}{!}{\usebox2}\else\usebox2\fi",
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
        case Plot() | Exchange() | ClipContrast():
            return None
    return markdown_text(part)


def markdown(title: str, about: list[Part], sections: list[Section]) -> str:
    """Write a report as Markdown, without plots and conversations."""
    lines = [f"# {markdown_text(title)}", *map(_part, about)]
    for section in sections:
        parts = [part for part in map(_part, section.parts) if part is not None]
        if parts:
            lines += [f"## {markdown_text(section.title)}", *parts]
    return "\n\n".join(lines) + "\n"


def latex(sections: list[Section]) -> str:
    """Write all tables of numbers as LaTeX, for \\input into a document."""
    found = [part for section in sections if not section.folded for part in section.parts if isinstance(part, Table)]
    tables = [latex_table(table) for table in found if not table.prose]
    for place in range(FLOATS, len(tables), FLOATS):
        tables[place] = "\\clearpage\n" + tables[place]
    head = (
        "% In the preamble: \\usepackage{booktabs,graphicx}. Then \\input this file, or copy single tables from it.\n"
        "% pdfLaTeX prints unknown characters as code points, such as U+6A21; LuaLaTeX and XeLaTeX print them as is.\n"
    )
    return "\n\n".join([head, *tables]) + "\n"
