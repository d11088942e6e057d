"""The structure of the package: relative imports, no circles, nothing that a lower layer imports from a higher one."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module may import from its own layer and from lower ones.
LAYERS = (
    ("hub files", ("*_empathic", "sampling", "thoughts", "files", "errors", "processes")),
    ("metrics", ("evaluation.modules", "evaluation.metrics", "evaluation.emotion_features")),
    ("data", ("data_prep",)),
    ("Hub", ("hub",)),
    ("training", ("trainers", "baselines")),
    ("evaluation", ("evaluation",)),
    ("conversation", ("chat", "clip_limits", "decoding", "emotions", "hosts", "demo", "serve")),
    ("programs", ("quickstart", "tiny", "benchmarks", "recipes", "chat_templates")),
    ("commands", ("commands", "cli")),
)
# Former places of modules, kept for one release; nothing of ours imports them.
FORMER = {"hub_model", "trainers.checkpoint", "trainers.baseline"}

# Distributions whose name is not that of their module.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
# Installed by those who choose them (a logger, a loss to compare with), or with FastAPI, which fixes their version.
UNDECLARED = {"wandb", "liger-kernel", "starlette"}


def modules() -> dict[str, Path]:
    """The package's modules by their name below `empathic`. The metric modules travel by themselves."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        outside = parts[0].startswith(".") or parts[0] in ("tests", "build", "dist", "docs")
        if outside or parts[:2] == ("evaluation", "modules"):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        above = package.split(".") if package else []
        base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}".lstrip(".")
            found.add(whole if whole in MODULES else base)
    return {module for module in found if module in MODULES and module != name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def layer_of(name: str) -> int:
    best, place = "", -1
    for number, (_, prefixes) in enumerate(LAYERS):
        for prefix in prefixes:
            inside = name.endswith(prefix[1:]) if prefix.startswith("*") else f"{name}.".startswith(f"{prefix}.")
            if inside and len(prefix) > len(best):
                best, place = prefix, number
    assert place >= 0, f"{name} is in no layer: add it to LAYERS"
    return place


def test_every_import_inside_the_package_is_relative():
    absolute = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "empathic")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "empathic" for alias in node.names))
    ]
    assert len(MODULES) > 120 and not absolute


def test_no_imports_run_in_a_circle():
    done, path = set(), []

    def visit(name):
        if name in path:
            pytest.fail("a circle of imports: " + " -> ".join([*path[path.index(name) :], name]))
        if name in done:
            return
        path.append(name)
        for other in sorted(IMPORTS[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


def test_no_import_runs_from_a_lower_layer_to_a_higher_one():
    upward = {
        f"{name} -> {other}"
        for name in MODULES.keys() - FORMER
        for other in IMPORTS[name]
        if layer_of(other) > layer_of(name)
    }
    assert not upward


def test_nothing_imports_a_former_place():
    assert not {name for name, others in IMPORTS.items() if others & FORMER}


def test_every_package_says_what_is_in_it():
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert len(packages) >= 12
    assert all(ast.get_docstring(TREES[name]) for name in packages)


def test_every_package_that_is_imported_is_a_requirement():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    declared = {re.match(r"[\w-]*", line)[0].replace("_", "-") for line in "\n".join(lines).split("\n")}
    imported = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            for top in {module.split(".")[0] for module in found} - sys.stdlib_module_names:
                imported[DISTRIBUTIONS.get(top, top.replace("_", "-"))] = name
    assert imported.keys() & {"torch", "pyarrow", "psutil"}
    assert {name: where for name, where in imported.items() if name not in declared | UNDECLARED} == {}


def test_no_module_imports_a_private_name_of_another():
    private = [
        f"{name}:{node.lineno}: {alias.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []
