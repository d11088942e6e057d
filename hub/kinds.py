"""Detect the kind of a folder to push."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .client import PushError, read_json

REPORT = "report.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def kind_of(folder: str | os.PathLike) -> str:
    """
    Return the kind of a folder: `dataset` (from `empathic prepare`), `pairs` (from `empathic counter`), `stage` or
    `model`.

    Raises:
        PushError: if the folder is none of these kinds.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PushError(f"{folder}: there is no such folder. Check the path.")
    files = sorted((folder / "data").glob("*.parquet"))
    if files or (folder / REPORT).is_file():
        return "pairs" if files and "prompt" in open_parquet(files[0]).schema_arrow.names else "dataset"
    kind = model_kind(folder)
    if kind is None:
        raise PushError(
            f"{folder}: is neither a data set of `empathic prepare` or `empathic counter`, nor a model or stage "
            f"folder. It has no {REPORT}, no stage file and no config.json of the type empathic."
        )
    return kind


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise PushError(f"{path}: is not a complete parquet file ({error}). Prepare the data set again.") from error


def model_kind(folder: Path) -> str | None:
    """Return `stage` (even for an incomplete stage folder), `model`, or None."""
    from ..composition_empathic import ADAPTER_CONFIG, PARTS_FILE, STAGE_FILE  # slow import, not needed for data sets

    there = set(os.listdir(folder))
    if {STAGE_FILE, PARTS_FILE} & there or (ADAPTER_CONFIG in there and not {WEIGHTS, WEIGHTS_INDEX} & there):
        return "stage"
    config = folder / "config.json"
    return "model" if config.is_file() and read_json(config).get("model_type") == "empathic" else None
