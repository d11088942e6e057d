"""What every evaluation writes beside its numbers."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    """Python's and the packages' versions; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_results(path: Path, results: dict) -> None:
    """Writes the whole JSON file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
