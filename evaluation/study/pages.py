"""The rater's page as HTML, for the server or as a standalone file."""

import base64
import hashlib
import html
import json
from importlib.resources import files

# Browsers differ in the meaning of 'self' for a page opened from disk, hence `file:`.
STATIC_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; media-src 'self' file:; "
    "img-src data:; base-uri 'none'; form-action 'none'"
)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; media-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def asset(name: str) -> str:
    """The text of `page.html`, `page.js` or `page.css`."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def _data(content: dict) -> str:
    """JSON that is safe inside a <script> element, whatever text it contains."""
    text = json.dumps(content, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _page(study: dict, head: str, script: str) -> str:
    template = asset("page.html")
    for name, value in (("title", html.escape(study["title"])), ("head", head), ("script", script)):
        template = template.replace(f"{{{{{name}}}}}", value)
    return template.replace("{{data}}", _data(study))  # last, so that placeholders in the data are not replaced


def served_page(study: dict, saved: dict[str, dict[str, int]]) -> str:
    """The page for `raters/CODE.json` that the server sends at /r/CODE, with the saved answers."""
    study = {**study, "media": "../media/", "saved": saved}
    return _page(study, '<link rel="stylesheet" href="../page.css">', '<script src="../page.js"></script>')


def static_page(study: dict) -> str:
    """A standalone page; its clips are in `media/` next to it. It offers the answers as a download."""
    script, style = asset("page.js"), asset("page.css")
    policy = STATIC_POLICY.format(script=_digest(script), style=_digest(style))
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    return _page({**study, "media": "media/", "saved": None}, head, f"<script>{script}</script>")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
