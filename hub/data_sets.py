"""Push data sets and preference pairs to the Hub."""

import os
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import DatasetCard

from .client import CARD, Patterns, PushError, push_files, read_json, select_files
from .kinds import REPORT, kind_of, open_parquet

WORK, DONE = ".work", "done.json"  # a run's intermediate files; `empathic counter` writes DONE there when it finishes
ROWS_AT_ONCE = 64

# Files that are pushed in addition to the parquet files that the card names, and files that a push removes unless it
# contains them.
DATASET_FILES: Patterns = {"": (CARD, REPORT, "audit.html")}
DATASET_STALE: Patterns = {"": ("audit.html",), "data": ("*.parquet",)}


def push_dataset(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    i_may_redistribute: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """
    Push the output of `empathic prepare` or `empathic counter`; `datasets.load_dataset(repo_id)` reads it.

    Only the card, the report, the audit page and the parquet files that the card names are pushed.

    Args:
        folder: the output folder, with the media embedded.
        repo_id: `owner/name` of the data set on the Hub; created if it does not exist.
        private: whether the repository is private. An existing repository must have the same visibility.
        i_may_redistribute: confirms the right to redistribute corpora whose license does not allow it to everyone.
        token: the Hub token; by default HF_TOKEN, or the token of `hf auth login`.
        revision: the branch; created if it does not exist.
        commit_message: the message of the commit.

    Returns:
        The URL of the data set.

    Raises:
        PushError: if the folder is not finished, media is not embedded, the license does not allow redistribution, or
            the Hub rejects the push.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    if kind not in ("dataset", "pairs"):
        raise PushError(f"{folder}: holds a {kind}, not a data set. Push it with `hub.models.push_model`.")
    names = _finished_files(folder)
    corpora = set()
    for name in names:
        if name.endswith(".parquet"):
            corpora |= _check_rows(folder / name, kind)
    if not i_may_redistribute:
        _check_license(folder, corpora)
    return push_files(
        {name: folder / name for name in names},
        DATASET_STALE,
        repo_id,
        repo_type="dataset",
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message or f"Push {'preference pairs' if kind == 'pairs' else 'data set'}",
    )


def _finished_files(folder: Path) -> list[str]:
    """Check that a data set is finished and return its files, relative to its folder."""
    missing = [name for name in (REPORT, CARD) if not (folder / name).is_file()]
    working = (folder / WORK).exists() and not (folder / WORK / DONE).is_file()
    if working or any((folder / "data").glob("*.part")):
        raise PushError(
            f"{folder}: is not finished. Run the command that wrote it again: it continues where it stopped."
        )
    if missing:
        raise PushError(f"{folder}: is not finished: it has no {' and no '.join(missing)}. Prepare it again.")
    read_json(folder / REPORT)
    named = []
    for config in DatasetCard.load(folder / CARD).data.get("configs") or []:
        for entry in config["data_files"]:
            named += [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
    absent = [name for name in named if not (folder / name).is_file()]
    if absent or not named:
        what = f"there is no {absent[0]}, which its {CARD} names" if named else f"its {CARD} names no data files"
        raise PushError(f"{folder}: is not complete: {what}. Prepare it again.")
    return sorted({*named, *select_files(folder, DATASET_FILES)})


def _check_rows(path: Path, kind: str) -> set[str]:
    """Raise a PushError for a clip that is not embedded; return the corpora of the rows."""
    corpora = set()
    file = open_parquet(path)
    columns = ["corpus", "dialogue_id", "turn", *(("prompt",) if kind == "pairs" else ("audio", "video"))]
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            corpora.update(pc.unique(batch["corpus"]).to_pylist())
            for clips in _clips(batch, kind):
                paths, content = pc.struct_field(clips, "path"), pc.struct_field(clips, "bytes")
                local = pc.and_(paths.is_valid(), content.is_null())
                if pc.any(local).as_py():
                    raise PushError(_local_media(path, paths.filter(local)[0].as_py(), kind))
    except (pa.ArrowInvalid, OSError) as error:
        raise PushError(f"{path}: cannot be read ({error}). Prepare the data set again.") from error
    return corpora


def _clips(batch: pa.RecordBatch, kind: str) -> list[pa.StructArray]:
    """Return the structs of a batch that can have `path` and `bytes`."""
    if kind == "dataset":
        return [batch["audio"], batch["video"]]
    content = pc.struct_field(pc.list_flatten(batch["prompt"]), "content")
    return [] if pa.types.is_string(content.type) else [content.flatten()]  # string contents have no clips


def _local_media(path: Path, clip: str, kind: str) -> str:
    remedy = "Prepare it again with --embed"
    if kind == "pairs":
        remedy = "Prepare the corpus again with --embed, and make the pairs from it"
    return f"{path}: refers to local files, such as {clip}, which are not on the Hub. {remedy}."


def about(corpus: str):
    """Return the `CorpusInfo` of a corpus, by its value in the column `corpus`; None for an unknown corpus."""
    from ..data_prep.prepare import CORPORA

    return import_module(f"empathic.data_prep.corpora.{corpus.replace('-', '_')}").ABOUT if corpus in CORPORA else None


def _check_license(folder: Path, corpora: set[str]) -> None:
    """Raise a PushError for corpora whose license does not allow redistribution or is unknown."""
    for corpus in sorted(corpora):
        info = about(corpus)
        if info is None or not info.redistributable:
            terms = "is not known here." if info is None else f"does not allow redistribution: {info.license_note}"
            raise PushError(
                f"{folder}: holds text or clips of {corpus}, whose license {terms} If you have the right to "
                "redistribute them, confirm it with --i_may_redistribute (`i_may_redistribute=True`)."
            )
