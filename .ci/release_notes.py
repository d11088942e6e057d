"""
Prints the section of CHANGELOG.md for a tag, which must be the version in setup.cfg:

    python .ci/release_notes.py v0.1.0
"""

import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str) -> str:
    """Return the section; ValueError if the tag is not the version, or the section is missing or still unreleased."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    version = setup["metadata"]["version"]
    if tag != f"v{version}":
        raise ValueError(f"The tag is {tag}, but setup.cfg has the version {version}. Tag v{version}, or change it.")
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for section in sections:
        title, _, text = section.partition("\n")
        if title.split()[0] == version:
            if "unreleased" in title:
                raise ValueError(f"CHANGELOG.md says {title!r}. Give the date of the release in place of it.")
            return text.strip()
    raise ValueError(f"CHANGELOG.md has no section of {version}. Add one.")


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1]))
    except ValueError as problem:
        sys.exit(str(problem))
