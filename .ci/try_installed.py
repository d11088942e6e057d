"""
Tries the installed package, without the repository:

    cd / && .venv-wheel/bin/python .ci/try_installed.py

Every command shows its help; the files that come with the package are there and can be read; a stage of the tiny preset
starts from a recipe by its name.
"""

import argparse
import configparser
import io
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path

from empathic import cli

# Folders of the repository whose files, with these endings, belong to the package.
DATA = {
    "accelerate_configs": ("yaml", "slurm"),
    "chat_templates": ("jinja",),
    "demo": ("css", "js"),
    "evaluation/modules": ("md", "txt"),
    "evaluation/study": ("html", "css", "js"),
    "recipes": ("yaml",),
}
ROOT = Path(__file__).parents[1]


def run(*words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "empathic.cli", *words], capture_output=True, text=True, cwd="/", timeout=600
    )
    if done.returncode != status:
        raise SystemExit(f"empathic {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    package = Path(cli.__file__).resolve().parent
    if package.is_relative_to(ROOT) and "site-packages" not in package.parts:
        raise SystemExit(f"{package} is the repository: run this with the Python of another environment.")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = setup["metadata"]["version"]
    if (version("empathic"), run("--version").strip()) != (wanted, f"empathic {wanted}"):
        raise SystemExit(f"{version('empathic')} is installed, but setup.cfg has {wanted}.")

    folders = [
        ROOT / name.removeprefix("empathic").replace(".", "/").lstrip("/")
        for name in setup["options"]["packages"].split()
    ]
    modules = [path for folder in folders for path in folder.glob("*.py")]
    data = [path for folder, kinds in DATA.items() for kind in kinds for path in (ROOT / folder).rglob(f"*.{kind}")]
    missing = [path for path in (*modules, *data) if not (package / path.relative_to(ROOT)).is_file()]
    if missing or len(data) < 50:
        raise SystemExit(f"The installed package lacks {len(missing)} files, such as {missing[:3] or 'data'}.")

    commands = next(
        action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    for command in commands:
        shown = io.StringIO()
        with redirect_stdout(shown), suppress(SystemExit):
            cli.main([command, "--help"])
        if f"usage: empathic {command}" not in shown.getvalue():
            raise SystemExit(f"empathic {command} --help shows no help.")
    # The recipe and the launcher's file are found by their names in the package; the data set does not exist.
    shown = run("train", "--config", "recipes/tiny/emotion.yaml", "--accelerate_config", "accelerate_configs/cpu.yaml",
                "--dataset_name", "no-such-folder/at-all", "--output_dir", "/dev/null/out", status=1)  # fmt: skip
    if "recipes" in shown or "/dev/null/out" not in shown:
        raise SystemExit(f"The recipe of the package did not start:\n{shown}")
    print(f"empathic {wanted}: {len(modules)} modules, {len(data)} data files and {len(commands)} commands are there.")


if __name__ == "__main__":
    main()
