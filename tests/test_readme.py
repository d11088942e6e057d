"""The README tells the truth about the tree, and its links and options exist."""

import re
from pathlib import Path

from empathic.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> set[str]:
    """The paths that the section `Files` names."""
    section = README.split("## Files")[1].split("\n## ")[0]
    paths, folder = set(), ""
    for line in section.splitlines():
        match = re.match(r"( {4}| {8})(\S+)", line)
        if match is None:
            continue
        indent, name = match.groups()
        if len(indent) == 4:
            folder = name if name.endswith("/") else ""
        paths.add(name if len(indent) == 4 else folder + name)
    return paths


def test_every_path_of_the_tree_exists():
    assert len(tree()) > 30
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_every_module_is_in_the_tree():
    folders = ("data_prep", "trainers", "evaluation", "benchmarks", "demo", "tiny")
    modules = {path.name for path in ROOT.glob("*.py")}
    modules |= {f"{name}/{path.name}" for name in folders for path in (ROOT / name).glob("*.py")}
    assert {m for m in modules if not m.endswith("__init__.py")} <= tree()


def test_the_commands_are_the_command_lines():
    commands = re.findall(r"^\s*(?:\.venv/bin/)?empathic (.+)$", README, flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        known, rest = build_parser().parse_known_args(command.split())
        assert not rest or known.command in ("train", "prepare-features")


def test_no_placeholder_is_left():
    assert set(re.findall(r"\b[A-Z]{2,}_[A-Z_]+\b", README)) <= {"HF_TOKEN"}
