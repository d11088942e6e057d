"""The files for contributors: the paths, commands and names in them exist."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
BUG_REPORT = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml"
YAML_FILES = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])

# Paths in CONTRIBUTING.md that are not in the repository: made by its commands, or named as files of a new folder.
MADE = (".venv", "runs/")
NEW_FILES = {"__init__.py", "app.py", "requirements.txt"}


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.MULTILINE))


def code_in(markdown):
    """The inline code and the lines of code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```\w*\n.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", prose) + [line for block in blocks for line in block.splitlines()]


def paths_in(markdown):
    """Code that is a path of the repository. Of a path with a placeholder, such as `<name>.py`, the part before it."""
    found = set()
    for code in code_in(markdown):
        for word in code.split():
            suffix = re.search(r"\.(py|cfg|toml|md|ya?ml|cff|txt)$", word)
            is_path = re.fullmatch(r"[\w.*<>/-]+", word) and ("/" in word.rstrip("/") or suffix or word.endswith("/"))
            if is_path and word not in NEW_FILES and not word.startswith((*MADE, "..", "<")):
                found.add(word.split("<")[0].rpartition("/")[0] + "/" if "<" in word else word)
    return found


def run_commands(workflow):
    """Each command of a workflow, once for each value of the job's matrix."""
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for command in (step["run"] for step in job["steps"] if "run" in step):
            names = re.findall(r"\$\{\{ matrix\.([\w-]+) \}\}", command)
            assert len(names) <= 1
            for value in matrix[names[0]] if names else [""]:
                yield re.sub(r"\$\{\{ matrix\.[\w-]+ \}\}", value, command)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_yaml_files_parse(path):
    assert isinstance(load(path), dict)


def test_the_paths_in_contributing_exist():
    paths = paths_in(CONTRIBUTING)
    assert len(paths) > 50
    assert {"trainers/losses.py", "data_prep/corpora/", "evaluation/modules/", "setup.cfg", "*_empathic.py"} <= paths
    assert [path for path in paths if not list(ROOT.glob(path))] == []


def test_the_make_targets_in_contributing_exist():
    targets = {target for code in code_in(CONTRIBUTING) for target in re.findall(r"\bmake ([\w-]+)", code)}
    assert {"install", "lint", "test", "test-distributed", "test-oldest", "test-slow", "quickstart"} <= targets
    assert targets <= make_targets()


def test_the_names_in_contributing_are_in_the_files_beside_them():
    pairs = re.findall(r"`(\w+)`\s+(?:in|to|of|from)\s+`([\w/]+\.(?:py|cfg))`", CONTRIBUTING)
    assert ("CORPORA", "data_prep/prepare.py") in pairs and len(pairs) > 20
    for name, path in pairs:
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{path} has no {name}"


def test_the_layers_in_contributing_are_those_that_are_checked():
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    value = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "LAYERS")
    layers = [name for name, _ in ast.literal_eval(value)]
    table = CONTRIBUTING.partition("| layer | modules |\n")[2].partition("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[1:]] == layers


def test_the_workflow_runs_make_targets_that_exist():
    commands = list(run_commands(load(WORKFLOW)))
    targets = {command.removeprefix("make ") for command in commands if command.startswith("make ")}
    assert {"lint", "test", "test-distributed", "test-oldest", "test-versions"} <= targets
    assert targets <= make_targets()
    # The site needs no environment of `make install`.
    others = {command.split()[0] for command in commands if not command.startswith("make ")}
    assert others <= {"pip", "mkdocs"} and (ROOT / "mkdocs.yml").is_file()


def test_the_workflow_can_only_read_and_pins_its_actions():
    workflow = load(WORKFLOW)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert actions and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in actions)


def test_the_release_workflow_tries_the_package_before_it_may_publish_it():
    workflow = load(RELEASE)
    tried, published = workflow["jobs"]["wheel"], workflow["jobs"]["publish"]
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in tried
    assert published["needs"] == "wheel" and published["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert published["permissions"] == {"contents": "write", "id-token": "write"}  # of a trusted publisher: no token
    assert "secrets." not in RELEASE.read_text(encoding="utf-8")
    for job in (tried, published):
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert actions and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in actions)
    commands = [step["run"] for job in (tried, published) for step in job["steps"] if "run" in step]
    targets = {command.removeprefix("make ") for command in commands if command.startswith("make ")}
    assert targets == {"test-wheel", "dist"} <= make_targets()
    scripts = {word for command in commands for word in command.split() if word.endswith(".py")}
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    pattern = workflow[True]["pull_request"]["paths"]  # YAML reads the key `on` as true
    assert all((ROOT / path).is_file() for path in pattern)


def test_the_command_of_the_bug_report_prints_versions():
    versions = next(field for field in load(BUG_REPORT)["body"] if field.get("id") == "versions")
    command = re.search(r'^python -c "(.*)"$', versions["attributes"]["description"], flags=re.MULTILINE)[1]
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=60)
    printed = dict(map(ast.literal_eval, done.stdout.splitlines()))
    assert {"python", "empathic", "torch", "transformers", "trl", "peft"} <= printed.keys()
    assert printed["empathic"] is not None


def test_the_citation_has_what_the_format_requires_and_the_packages_version():
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("authors", "message", "title"))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert citation["version"] == setup["metadata"]["version"]
    assert citation["license"] == setup["metadata"]["license"]
    [paper] = citation["references"]
    assert all(paper[key] for key in ("authors", "title", "type"))
    assert [author["family-names"] for author in paper["authors"]] == ["Kim", "Park", "Ro"]
