"""Load prepared data sets, from a folder or the Hub, and say what to give instead of other data."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..files import clean_path
from ..media_empathic import existing_path
from .corpora.folder import METADATA

TURN_COLUMNS = (
    "corpus",
    "split",
    "dialogue_id",
    "turn",
    "utterance_id",
    "speaker",
    "text",
    "emotion",
    "audio",
    "video",
)
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
NEGATIVES = "negatives"  # the column with a row's further rejected replies, after `rejected`


def negatives_limit(value: int | str | None) -> int | None:
    """
    The largest number of rejected replies of a row that an option allows: "lowest" is 1, "all" is None (no limit), and
    a number is itself, also as text.

    Raises:
        ValueError: for any other value.
    """
    if value == "all":
        return None
    text = "1" if value == "lowest" else str(value)
    if isinstance(value, bool) or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"negatives must be lowest, all or a whole number from 1, got {value!r}.")
    return int(text)


@overload
def load_prepared(name: str, split: None = None, columns: Sequence[str] = TURN_COLUMNS) -> DatasetDict: ...


@overload
def load_prepared(name: str, split: str, columns: Sequence[str] = TURN_COLUMNS) -> Dataset: ...


def load_prepared(name: str, split: str | None = None, columns: Sequence[str] = TURN_COLUMNS) -> DatasetDict | Dataset:
    """
    Load a data set written by `empathic prepare` or `empathic counter`, or another one with the same columns.

    Args:
        name: a folder or a Hub id. Without a network, an id that was downloaded as a whole (`hf download --repo-type
            dataset ID`) is loaded from the cache.
        split: the split to load; None for all.
        columns: the columns that the data set needs.

    Raises:
        ValueError: if the data set lacks one of the columns; the message says what to give.
        FileNotFoundError: if there is no such folder.
    """
    place = existing_path(clean_path(name))
    if not os.path.isdir(place) and (place.startswith((".", "/")) or place.count("/") > 1):
        raise FileNotFoundError(f"{name}: there is no such folder. Give a folder of `empathic prepare`, or a Hub id.")
    if (Path(place) / METADATA).is_file() and not (Path(place) / "data").is_dir():
        raise ValueError(
            f"{name} is a folder of recordings, not a prepared data set. Run `empathic prepare folder {name} OUT` and "
            "give OUT."
        )
    try:
        loaded = load_dataset(place, split=split)
    except ConnectionError as error:
        try:
            snapshot = snapshot_download(place, repo_type="dataset", local_files_only=True)
        except LocalEntryNotFoundError:
            raise ConnectionError(
                f"{error}. Without a network, download the data set first: `hf download --repo-type dataset {name}`."
            ) from error
        loaded = load_dataset(snapshot, split=split)
    for rows in [loaded] if split is not None else loaded.values():
        missing = [column for column in columns if column not in rows.column_names]
        if missing:
            raise ValueError(f"{name} has no column {missing[0]}; {_advice(rows.column_names, columns)}.")
    return loaded


def _advice(there: Sequence[str], wanted: Sequence[str]) -> str:
    if set(PAIR_COLUMNS) <= set(there):
        return "it has preference rows, which stage epo trains on; give a data set written by `empathic prepare`"
    if "chosen" in wanted:
        # PairRows explains rows with an implicit prompt.
        what = "it has turns, not preference rows; " if "dialogue_id" in there else ""
        return f"{what}give a data set written by `empathic counter`, or other rows with {', '.join(PAIR_COLUMNS)}"
    return "give a data set written by `empathic prepare`"
