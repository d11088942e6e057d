"""Write results as JSON, with the versions of the packages."""

import platform
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..files import held_folder, write_json

PACKAGES = (
    "empathic",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "sentence-transformers",
    "bert-score",
    "sacrebleu",
)


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages; None if a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def held_table(output: str | Path, table: str, state=None) -> AbstractContextManager:
    """
    Hold the output folder for one table; the commands for other tables may write to it at the same time. Of the
    processes of a launch, `state` of `accelerate`, the main process holds it.
    """
    if state is not None and not state.is_main_process:
        return nullcontext()
    return held_folder(output, f"empathic evaluate {table}", f".{table}.lock")


def write_results(path: Path, results: dict) -> None:
    """Write the JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results, ensure_ascii=False, allow_nan=False)
