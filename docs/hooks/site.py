"""MkDocs hooks of this site: package sources for the API pages, option tables, and links between docstrings."""

import ast
import configparser
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "build" / "docs-src"

# A line of a page that is replaced by a table of a dataclass's fields: <!-- options: module.Class -->
OPTIONS = re.compile(r"^<!-- options: (?P<path>[\w.]+) -->$", re.MULTILINE)
# The form that docstrings of transformers have for links: [`Class`] or [`Class.method`].
DOCSTRING_LINK = re.compile(r"\[<code>(?P<name>[\w.]+)</code>\]")
DIRECTIVE = re.compile(r"^::: (?P<path>[\w.]+)$", re.MULTILINE)


def on_startup(**_):
    """
    Lay out the sources as a package, before mkdocstrings looks for its paths.

    The root of the repository is the package `empathic` (`package_dir` in setup.cfg), so no folder of that name exists
    for mkdocstrings to read. Symbolic links make one, without anything that is not part of the package.
    """
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    shutil.rmtree(SOURCES, ignore_errors=True)
    for package in setup["options"]["packages"].split():
        source = ROOT.joinpath(*package.split(".")[1:])
        target = SOURCES.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for file in source.glob("*.py"):
            (target / file.name).symlink_to(file)
        if not (target / "__init__.py").exists():  # the root and the metrics have none
            (target / "__init__.py").touch()


def on_page_markdown(markdown, **_):
    """Fill in the option tables."""
    return OPTIONS.sub(lambda match: option_table(match["path"]), markdown)


def option_table(path: str) -> str:
    """
    The fields of a dataclass as a Markdown table: name, default, and the help of the command line.

    Args:
        path: the class, such as `empathic.trainers.stages.StageConfig`.

    Raises:
        ValueError: the module has no such class.
    """
    module, _, name = path.rpartition(".")
    file = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    if not found:
        raise ValueError(f"{path} is named in the docs, but {file} has no class {name}.")
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for node in found[0].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        arguments = {keyword.arg: keyword.value for keyword in node.value.keywords}
        metadata = ast.literal_eval(arguments["metadata"]) if "metadata" in arguments else {}
        default = arguments.get("default", arguments.get("default_factory"))
        default = default.body if isinstance(default, ast.Lambda) else default
        value = "required" if default is None else f"`{ast.unparse(default)}`"
        meaning = metadata.get("help", "").replace("|", "\\|")
        lines.append(f"| `{node.target.id}` | {value} | {meaning} |")
    return "\n".join(lines)


def on_page_content(html, config, **_):
    """Turn the links of docstrings into links to the API pages (a name without a page stays code), and name sources."""
    html = html.replace("build/docs-src/empathic/", "")
    known = documented_names(Path(config["docs_dir"]))

    def link(match):
        name, *rest = match["name"].removeprefix("empathic.").split(".")
        code = f"<code>{match['name']}</code>"
        if name not in known:
            return code
        return f'<autoref identifier="{".".join([known[name], *rest])}" optional>{code}</autoref>'

    return DOCSTRING_LINK.sub(link, html)


def documented_names(docs: Path) -> dict[str, str]:
    """The full path of each object that the API pages show, by its name."""
    pages = (page.read_text(encoding="utf-8") for page in (docs / "api").glob("*.md"))
    paths = [match["path"] for page in pages for match in DIRECTIVE.finditer(page)]
    return {path.rpartition(".")[2]: path for path in paths}
