"""A report as Markdown, and its tables as LaTeX. Every text is escaped."""

import html
import re
import unicodedata

from empathic.evaluation.report_parts import Exchange, Missing, Part, Plot, Section, Table

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
    "[": "{[}",  # these would be taken for options of the line break before them
    "]": "{]}",
    "*": "{*}",
}
# What pdfLaTeX knows of itself, with its default fonts: ASCII, and Latin letters and signs but for some.
_KNOWN = {chr(code) for code in (*range(32, 127), *range(0xA1, 0x180))} | set("‘’“”‡•‰€™←→")
_KNOWN -= set("«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ\xad")
_SCRIPTS = {"<sub>": "_", "<super>": "^"}
_MINUS = re.compile(r"-(?=\d)")
HEADER = 12  # letters of a column's name that stand on one line in LaTeX
FLOATS = 40  # tables that LaTeX is left with at once; it gives up at 52


def markdown_text(text: str) -> str:
    """Text of which nothing is taken for Markdown or HTML, on one line."""
    line = " ".join(text.split())
    return _MARKDOWN.sub(lambda mark: f"&#{ord(mark[0])};", html.escape(line, quote=False))


def latex_text(text: str) -> str:
    """
    Text of which nothing is taken for a command, on one line.

    What pdfLaTeX has no letter for it prints as its number in Unicode, U+6A21; LuaLaTeX and XeLaTeX print the letter.
    """
    line = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(map(_latex_letter, line, f" {line}"))


def latex_number(text: str) -> str:
    """As `latex_text`, with minus signs."""
    return latex_text(_MINUS.sub("−", text))


def _latex_letter(letter: str, before: str) -> str:
    if letter == before == "-":  # two would become a dash
        return "{}-"
    if letter in _LATEX or letter in _KNOWN:
        return _LATEX.get(letter, letter)
    script, _, codes = unicodedata.decomposition(letter).partition(" ")
    if script in _SCRIPTS and codes and " " not in codes and chr(int(codes, 16)).isalnum() and int(codes, 16) < 128:
        return f"${_SCRIPTS[script]}{{{chr(int(codes, 16))}}}$"
    number = f"U+{ord(letter):04X}"
    if unicodedata.category(letter) == "Cc":  # which no TeX reads
        return f"{{{number}}}"
    return rf"\ifdefined\Umathchar {letter}\else {{{number}}}\fi{{}}"


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


def _latex_header(name: str, side: str) -> str:
    """A column's name, on two lines where it is long."""
    spaces = [place for place, letter in enumerate(name) if letter == " "]
    if len(name) <= HEADER or not spaces:
        return latex_text(name)
    middle = min(spaces, key=lambda place: abs(place - len(name) / 2))
    return rf"\shortstack[{side}]{{{latex_text(name[:middle])}\\{latex_text(name[middle:])}}}"


def latex_table(table: Table) -> str:
    """A `table` with a `tabular`, made smaller where it is wider than the text; it needs booktabs and graphicx."""
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
    found = [part for section in sections if not section.folded for part in section.parts if isinstance(part, Table)]
    tables = [latex_table(table) for table in found if not table.prose]
    for place in range(FLOATS, len(tables), FLOATS):
        tables[place] = "\\clearpage\n" + tables[place]
    head = (
        "% In the preamble: \\usepackage{booktabs,graphicx}. Then \\input this file, or copy single tables out of it.\n"
        "% What pdfLaTeX has no letter for is printed as its number, U+6A21; LuaLaTeX and XeLaTeX print it.\n"
    )
    return "\n\n".join([head, *tables]) + "\n"
