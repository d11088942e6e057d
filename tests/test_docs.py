"""What README.md and the pages of docs/ name exists: commands, options, recipes, paths, links and imports."""

import argparse
import ast
import dataclasses
import functools
import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

from empathic.cli import build_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
README_LINES = 250

BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?empathic (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)\s]*)\)")
IMPORT = re.compile(r"from (empathic[\w.]*) import (\w+(?:, \w+)*)")
# Folders and files of the repository; what a path in another folder names, such as runs/ or data/, is the reader's.
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._")
FOLDERS = [name for name in FOLDERS if name not in ("runs", "data", "build", "dist", "site")]
REPOSITORY_PATH = re.compile(rf"(?<![\w./:-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*")
# These take the options of the training script beside their own.
TRAINING_COMMANDS = ("train", "prepare-features", "rounds")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, lines that end in a backslash joined with the next."""
    found = [match for match in BLOCK.finditer(text_of(page)) if match["language"] == language]
    return [textwrap.dedent(match["code"]).replace("\\\n", " ") for match in found]


@functools.cache
def training_options() -> frozenset[str]:
    """The options that a recipe, or the command line of a stage, may set."""
    from trl import ModelConfig

    from empathic.trainers.epo_config import EPOConfig
    from empathic.trainers.stages import StageConfig
    from empathic.trainers.train import ScriptArguments

    classes = (ScriptArguments, StageConfig, EPOConfig, ModelConfig)
    return frozenset(field.name for config in classes for field in dataclasses.fields(config))


def command_options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of all commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(command_options, action.choices.values()))
    return found


@functools.cache
def known_options() -> frozenset[str]:
    """All options that a page may name: of commands, of training, of benchmarks, and of launchers."""
    benchmarks = "".join(text_of(file) for file in (ROOT / "benchmarks").glob("*.py"))
    literal = set(re.findall(r'"(--\w[\w-]*)"', benchmarks))
    fields = set(re.findall(r"^    (\w+): .*field\(", benchmarks, flags=re.MULTILINE))
    launchers = {"--config_file", "--num_processes", "--config", "--nodes"}
    options = {f"--{name}" for name in training_options() | fields}
    return frozenset(options | literal | launchers | command_options(build_parser()))


def resolve(path: str):
    """The object of a dotted path, which is a module or lies in one."""
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def anchors(page: Path) -> set[str]:
    """The anchors that MkDocs makes of the headings of a page."""
    without_code = BLOCK.sub("", text_of(page))
    titles = re.findall(r"^#+ (.+)$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@by_page
def test_every_command_parses(page):
    for block in blocks(page, "bash"):
        for command in COMMAND.findall(block):
            words = shlex.split(command, comments=True)
            known, rest = build_parser().parse_known_args(words)
            if known.command not in TRAINING_COMMANDS:
                assert not rest, command
            unknown = {word for word in rest if word.startswith("--")} - {f"--{name}" for name in training_options()}
            assert not unknown, command


def test_the_readme_shows_the_main_commands():
    shown = {command.split()[0] for block in blocks(ROOT / "README.md", "bash") for command in COMMAND.findall(block)}
    assert {"chat", "demo", "prepare", "train", "counter", "merge", "push", "evaluate"} <= shown


@by_page
def test_every_option_exists(page):
    named = set(re.findall(r"(?<![\w-])--\w[\w-]*", text_of(page))) - {"--8"}  # --8<-- includes a file
    other_programs = "\n".join(
        line for block in blocks(page, "bash") for line in block.splitlines() if not COMMAND.match(line)
    )
    named -= set(re.findall(r"--\w[\w-]*", other_programs))
    assert named <= known_options()


@by_page
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    named = re.findall(r"`make ([\w-]+)`", text_of(page))
    named += [target for block in blocks(page, "bash") for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE)]
    assert set(named) <= targets


@by_page
def test_every_module_that_is_run_exists(page):
    for module in re.findall(r"-m (empathic[\w.]+)", text_of(page)):
        assert ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py").is_file(), module


@by_page
def test_every_option_of_a_recipe_exists(page):
    for block in blocks(page, "yaml"):
        assert set(yaml.safe_load(block)) <= training_options()


def test_the_table_of_training_options_names_options():
    table = text_of(DOCS / "train.md").partition("## Options")[2].partition("##")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", table, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 10 and named <= training_options()


@by_page
def test_every_path_of_the_repository_exists(page):
    for path in REPOSITORY_PATH.findall(text_of(page)):
        name = path.rstrip(".")
        inside_docs = page.parent / name  # a link between pages
        assert (ROOT / name).exists() or inside_docs.exists(), path


@by_page
def test_every_relative_link_leads_somewhere(page):
    for target in LINK.findall(BLOCK.sub("", text_of(page))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_file(), target
        assert not anchor or anchor in anchors(there), target


@by_page
def test_every_python_block_compiles(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@by_page
def test_every_import_of_the_package_works(page):
    for module, names in IMPORT.findall(text_of(page)):
        for name in names.split(", "):
            assert resolve(f"{module}.{name}") is not None


@by_page
def test_every_object_of_the_api_pages_exists(page):
    directives = re.findall(r"^::: ([\w.]+)$", text_of(page), flags=re.MULTILINE)
    tables = re.findall(r"^<!-- options: ([\w.]+) -->$", text_of(page), flags=re.MULTILINE)
    for path in directives + tables:
        assert resolve(path) is not None


def test_every_included_file_exists():
    included = [name for page in PAGES for name in re.findall(r'^--8<-- "(.+)"$', text_of(page), flags=re.MULTILINE)]
    assert included
    assert all((ROOT / name).is_file() for name in included)


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= README_LINES


@by_page
def test_no_placeholder_is_left(page):
    of_programs = {"ATEN_CPU_CAPABILITY", "HF_TOKEN", "HF_HUB_OFFLINE", "USE_HUB_KERNELS"}
    known = of_programs | {"LORA_TARGET", "EMPATHIC_API_KEY", "VLLM_API_KEY", "GPU_PYTHON"}
    assert set(re.findall(r"\b[A-Z]{2,}_[A-Z_]+\b", text_of(page))) <= known


def nav_pages(nav) -> list[str]:
    """The files that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in nav_pages(entry)]


def test_the_navigation_names_every_page_once():
    site = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    assert sorted(nav_pages(site["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
