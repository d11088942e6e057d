"""Write a report as one self-contained HTML page. All text is escaped."""

import html
import re

from .parts import ClipContrast, Exchange, Missing, Part, Plot, ReportClip, Section, Table

# Scripts are forbidden; inline styles are needed by the plots.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data: 'self' file:; base-uri 'none'; "
    "form-action 'none'"
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #f1f3f6; --line: #ccd1d8; --faint: #59626d;
  --accent: #1f5fbf; --bad: #b3261e; --published: #f7f0e3; --shade: #0004; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --soft: #22262c; --line: #3b424c; --faint: #a2abb7; --accent: #8ab4f8;
    --bad: #ff8a80; --published: #2d281d; --shade: #fff5; }
}
* { box-sizing: border-box; }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 64rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; }
a { color: var(--accent); }
nav ul { columns: 18rem; padding-left: 1.2rem; margin: 0; }
nav li { break-inside: avoid; }
nav a { display: inline-block; padding: .25rem 0; }
/* A shade at the side to which a table can be scrolled: the paper over it moves with the table. */
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem;
  background: linear-gradient(90deg, var(--paper) 30%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(270deg, var(--paper) 30%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(90deg, var(--shade), transparent) left / 1rem 100% no-repeat,
    linear-gradient(270deg, var(--shade), transparent) right / 1rem 100% no-repeat; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
thead th { background: var(--soft); font-size: .85rem; vertical-align: bottom; overflow-wrap: normal; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; min-width: 8rem; max-width: 22rem; }
.number { text-align: right; overflow-wrap: normal; }
td.number { white-space: nowrap; }
td.text { min-width: 9.5rem; }
.wide tbody th { position: sticky; left: 0; background: var(--paper); }
.wide thead th:first-child { position: sticky; left: 0; }
.wide tbody tr.published th { background: var(--published); }
tr.published > * { background: var(--published); }
.tag { font-size: .75rem; border: 1px solid var(--faint); border-radius: .6rem; padding: 0 .45rem; color: var(--faint);
  white-space: nowrap; }
.interval { color: var(--faint); font-size: .85em; }
.note, figcaption { color: var(--faint); font-size: .9rem; margin: .35rem 0; }
.missing { border-left: .3rem solid var(--bad); background: var(--soft); padding: .5rem 1rem; margin: .6rem 0; }
figure { margin: 1.25rem 0; overflow-x: auto; }
svg { color: var(--ink); display: block; width: 100%; min-width: 20rem; max-width: 38rem; height: auto; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; margin: 0 0 1rem; }
article h3 { margin: 0 0 .5rem; font-size: .85rem; font-weight: 500; color: var(--faint); }
.said { background: var(--soft); border-radius: .6rem; padding: .4rem .8rem; margin: 0 0 .5rem; max-width: 44rem; }
.who { display: block; font-size: .8rem; color: var(--faint); }
.words { white-space: pre-wrap; }
.empty { font-style: italic; color: var(--faint); }
video { display: block; width: 100%; max-width: 28rem; max-height: 20rem; background: #000; border-radius: .4rem;
  margin: .4rem 0; }
audio { display: block; width: 100%; max-width: 28rem; margin: .4rem 0; }
dl { display: grid; grid-template-columns: minmax(6rem, 14rem) minmax(0, 1fr); gap: .4rem 1rem; margin: .6rem 0 0; }
dt { color: var(--faint); } dd { margin: 0; } dt.true, dd.true { font-weight: 600; color: var(--ink); }
@media (max-width: 34rem) { dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .6rem; } }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .6rem 1.2rem; }
.side { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .8rem; min-width: 0; }
.side h4 { margin: 0; font-size: 1rem; } .side dl { grid-template-columns: minmax(5rem, 8rem) minmax(0, 1fr); }
details { margin: .6rem 0; } summary { cursor: pointer; padding: .3rem 0; }
"""
_INTERVAL = re.compile(r"(.*[\d%]) (\[.*\])")


def _escape(text: str) -> str:
    return html.escape(text)


def _number(text: str) -> str:
    """Format a number, with its interval in a smaller font."""
    found = _INTERVAL.fullmatch(text)
    if found is None:
        return _escape(text)
    return f'{_escape(found[1])} <span class="interval">{_escape(found[2])}</span>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_class(place, table)}>{_escape(name)}</th>' for place, name in enumerate(table.header)
    )
    body = []
    for place, row in enumerate(table.rows):
        published = table.is_published(place)
        tag = ' <span class="tag">published</span>' if published else ""
        first = f'<th scope="row">{_escape(row[0])}{tag}</th>'
        others = "".join(
            f'<td class="text">{_escape(cell)}</td>' if at < table.names else f'<td class="number">{_number(cell)}</td>'
            for at, cell in enumerate(row[1:], 1)
        )
        body.append(f"<tr{' class=published' if published else ''}>{first}{others}</tr>")
    notes = "".join(f'<p class="note">{_escape(note)}</p>\n' for note in table.notes)
    wide = " wide" if len(table.header) > 3 else ""
    return (
        f"<h3>{_escape(table.title)}</h3>\n"
        f'<div class="scroll{wide}" tabindex="0" role="group" aria-label="{_escape(table.title)}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + f"\n</tbody>\n</table>\n</div>\n{notes}"
    )


def _class(place: int, table: Table) -> str:
    return "" if place < table.names else ' class="number"'


def _clip(clip: ReportClip) -> str:
    note = f'<p class="note">{_escape(clip.note)}</p>' if clip.note else ""
    if clip.source is None:
        return note
    return f'<{clip.kind} controls preload="metadata" src="{_escape(clip.source)}"></{clip.kind}>{note}'


def _words(text: str) -> str:
    if not text.strip():
        return '<span class="empty">(empty)</span>'
    return f'<span class="words">{_escape(text)}</span>'


def _exchange(exchange: Exchange) -> str:
    said = [f'<span class="who">{_escape(who)}</span>{_words(text)}' for who, text in exchange.messages]
    if said and exchange.clip is not None:
        said[-1] += _clip(exchange.clip)
    feeling = f" · {exchange.emotion}" if exchange.emotion else ""
    replies = "".join(
        f"<dt{_true(place)}>{_escape(who)}</dt><dd{_true(place)}>{_words(text)}</dd>\n"
        for place, (who, text) in enumerate(exchange.replies)
    )
    messages = "\n".join(f'<div class="said">{each}</div>' for each in said)
    return f"<article>\n<h3>{_escape(exchange.id + feeling)}</h3>\n{messages}\n<dl>\n{replies}</dl>\n</article>"


def _contrast(contrast: ClipContrast) -> str:
    said = "\n".join(
        f'<div class="said"><span class="who">{_escape(who)}</span>{_words(text)}</div>'
        for who, text in contrast.messages
    )
    sides = []
    for place, (title, clip) in enumerate(contrast.clips):
        replies = "".join(
            f"<dt>{_escape(who)}</dt><dd>{'–' if texts[place] is None else _words(texts[place])}</dd>\n"
            for who, texts in contrast.replies
        )
        shown = "" if clip is None else _clip(clip)
        sides.append(f'<div class="side"><h4>{_escape(title)}</h4>\n{shown}\n<dl>\n{replies}</dl></div>')
    columns = "\n".join(sides)
    return f'<article>\n<h3>{_escape(contrast.id)}</h3>\n{said}\n<div class="sides">\n{columns}\n</div>\n</article>'


def _true(place: int) -> str:
    return ' class="true"' if place == 0 else ""


def _part(part: Part) -> str:
    match part:
        case Table():
            return _table(part)
        case Plot():
            name = _escape(part.caption)
            svg = part.svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
            return f'<figure tabindex="0">{svg}<figcaption>{name}</figcaption></figure>'
        case Exchange():
            return _exchange(part)
        case ClipContrast():
            return _contrast(part)
        case Missing():
            return f'<p class="missing"><b>Missing:</b> {_escape(part.text)}</p>'
    return f"<p>{_escape(part)}</p>"


def _section(number: int, section: Section) -> str:
    content = "\n".join(map(_part, section.parts))
    if section.folded:
        content = f"<details>\n<summary>Show</summary>\n{content}\n</details>"
    return f'<section id="s{number}">\n<h2>{_escape(section.title)}</h2>\n{content}\n</section>'


def page(title: str, about: list[Part], sections: list[Section]) -> str:
    """
    Return the report as an HTML page.

    Args:
        title: title of the page.
        about: parts before the first section.
        sections: the sections in order.
    """
    links = "".join(f'<li><a href="#s{place}">{_escape(each.title)}</a></li>' for place, each in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_escape(title)}</h1>
{chr(10).join(map(_part, about))}
</header>
<nav aria-label="Contents"><h2>Contents</h2><ul>{links}</ul></nav>
<main>
{chr(10).join(_section(place, each) for place, each in enumerate(sections))}
</main>
</body>
</html>
"""
