"""Pushing data sets and preference pairs to the Hub, and what pushing models (`hub_model`) shares with that.

A push is one commit. Large files go up before it, so one that is cut off leaves the repository as it was, and the same
call again goes on with the files that are not there yet.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path, PurePosixPath

import httpx2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

CARD, REPORT = "README.md", "report.json"
WORK, DONE = ".work", "done.json"  # what a run keeps for the next; `empathic counter` also notes there that it is done
ROWS_AT_ONCE = 64

# Patterns of names in a folder: what is pushed beside the parquet files that the card names, and what a push removes
# where it does not bring it.
Patterns = dict[str, tuple[str, ...]]
DATASET_FILES: Patterns = {"": (CARD, REPORT, "audit.html")}
DATASET_STALE: Patterns = {"": ("audit.html",), "data": ("*.parquet",)}


class PushError(ValueError):
    """What stands in the way of a push, and the mend."""


def read_json(path: Path) -> dict:
    """The content of a JSON file; `PushError` if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PushError(f"{path}: is not JSON ({error}).") from error


def kind_of(folder: str | os.PathLike) -> str:
    """
    What a folder holds: `dataset` or `pairs` (of `empathic prepare` and `empathic counter`), `stage` or `model`.

    Raises:
        PushError: if it is none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PushError(f"{folder}: there is no such folder.")
    files = sorted((folder / "data").glob("*.parquet"))
    if files or (folder / REPORT).is_file():
        return "pairs" if files and "prompt" in _parquet(files[0]).schema_arrow.names else "dataset"
    from empathic.hub_model import model_kind  # takes seconds to import, and data sets do without

    kind = model_kind(folder)
    if kind is None:
        raise PushError(
            f"{folder}: is neither a data set of `empathic prepare` or `empathic counter` nor a model or a stage's "
            f"folder. It has no {REPORT}, no stage file and no config.json of the type empathic."
        )
    return kind


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise PushError(f"{path}: is not a whole parquet file ({error}). Prepare the data set again.") from error


# --------------------------------------------------------------------------------------------------------- data sets


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
    Pushes what `empathic prepare` or `empathic counter` wrote; `datasets.load_dataset(repo_id)` reads it.

    Only the card, the report, the audit page and the parquet files that the card names are pushed.

    Args:
        folder: the output folder, with the media embedded.
        repo_id: `owner/name` of the data set on the Hub; made if it is not there.
        private: whether only its owner sees it. A repository that is there already must be as asked.
        i_may_redistribute: for corpora whose licence does not let everybody pass them on.
        token: of the Hub; by default HF_TOKEN, or the one of `hf auth login`.
        revision: the branch; made if it is not there.
        commit_message: of the one commit.

    Returns:
        The address of the data set.

    Raises:
        PushError: for a folder that is not finished, media that is not embedded, a licence that forbids it, or a Hub
            that does not take it.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    if kind not in ("dataset", "pairs"):
        raise PushError(f"{folder}: holds a {kind}, not a data set. Push it with `hub_model.push_model`.")
    names = _finished_files(folder)
    corpora = set()
    for name in names:
        if name.endswith(".parquet"):
            corpora |= _check_rows(folder / name, kind)
    if not i_may_redistribute:
        _check_licence(folder, corpora)
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
    """The files of a finished data set, below its folder."""
    missing = [name for name in (REPORT, CARD) if not (folder / name).is_file()]
    working = (folder / WORK).exists() and not (folder / WORK / DONE).is_file()
    if working or any((folder / "data").glob("*.part")):
        raise PushError(
            f"{folder}: is not finished. Run the command that writes it again: it goes on where it stopped."
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
        raise PushError(f"{folder}: is not whole: {what}. Prepare it again.")
    return sorted({*named, *select_files(folder, DATASET_FILES)})


def _check_rows(path: Path, kind: str) -> set[str]:
    """Raises for a clip that is not embedded; returns the corpora that the rows come from."""
    corpora = set()
    file = _parquet(path)
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
    """What may hold `path` and `bytes`."""
    if kind == "dataset":
        return [batch["audio"], batch["video"]]
    content = pc.struct_field(pc.list_flatten(batch["prompt"]), "content")
    return [] if pa.types.is_string(content.type) else [content.flatten()]  # strings: pairs without clips


def _local_media(path: Path, clip: str, kind: str) -> str:
    mend = "Prepare it again with --embed"
    if kind == "pairs":
        mend = "Prepare the corpus again with --embed, and make the pairs of that"
    return f"{path}: refers to files of this machine, such as {clip}, which are not on the Hub. {mend}."


def about(corpus: str):
    """The `CorpusInfo` of a corpus, by the value of the column `corpus`; None of one that is not known here."""
    from empathic.data_prep.prepare import CORPORA

    return import_module(f"empathic.data_prep.{corpus.replace('-', '_')}").ABOUT if corpus in CORPORA else None


def _check_licence(folder: Path, corpora: set[str]) -> None:
    """Raises for corpora that may not be passed on, or of which this is not known."""
    for corpus in sorted(corpora):
        info = about(corpus)
        if info is None or not info.redistributable:
            terms = (
                "is not known here." if info is None else f"does not let everybody pass them on: {info.license_note}"
            )
            raise PushError(
                f"{folder}: holds text or clips of {corpus}, whose licence {terms} If you have the right to, say so "
                "with --i-may-redistribute (`i_may_redistribute=True`)."
            )


# --------------------------------------------------------------------------------------------------------------- Hub


def _belongs(name: str, patterns: Patterns) -> bool:
    path = PurePosixPath(name)
    folder = "" if str(path.parent) == "." else str(path.parent)
    return any(fnmatchcase(path.name, pattern) for pattern in patterns.get(folder, ()))


def select_files(folder: Path, patterns: Patterns) -> list[str]:
    """The files below `folder` that the patterns name, sorted."""
    files = [path for place in patterns for path in (folder / place).glob("*") if path.is_file()]
    return sorted(name for file in files if _belongs(name := file.relative_to(folder).as_posix(), patterns))


def push_files(
    files: dict[str, Path | bytes],
    stale: Patterns,
    repo_id: str,
    *,
    repo_type: str,
    private: bool,
    token: str | None,
    revision: str | None,
    commit_message: str,
    needs: Sequence[str] = (),
) -> str:
    """
    Makes the repository if it is not there, and puts files into it in one commit.

    Args:
        files: by their path in the repository: where each lies, or its content.
        stale: what is removed in the same commit, where `files` does not bring it.
        repo_id, private, token, revision, commit_message: see `push_dataset`.
        repo_type: `dataset`, `model` or `space` (one that gradio runs).
        needs: ids of models that must be on the Hub before.

    Returns:
        The address of the repository.

    Raises:
        PushError: for a Hub that does not take it, or cannot be reached.
    """
    api = HfApi(token=token or get_token() or False)
    if not api.token:
        raise PushError(
            "There is no token to push with. Log in with `hf auth login`, or set HF_TOKEN. A token that may write is "
            f"made at {api.endpoint}/settings/tokens"
        )
    with _explained(api, repo_id):
        for name in needs:
            api.model_info(name)
        sdk = "gradio" if repo_type == "space" else None
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
        repo_id = url.repo_id
        info = api.repo_info(repo_id, repo_type=repo_type)
        if info.private is not private:
            state, option = ("private", "without --public") if info.private else ("public", "with --public")
            raise PushError(
                f"{repo_id} is there already and is {state}. Push {option} (`private={info.private}`), or change that "
                f"in its settings: {url}/settings"
            )
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
        left = [name for name in there if _belongs(name, stale) and name not in files]
        # Not `upload_folder`: it may spread a folder over several commits, and the first ones look complete.
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in left]
        api.create_commit(repo_id, operations, commit_message=commit_message, repo_type=repo_type, revision=revision)
    return str(url) if revision is None else f"{url}/tree/{revision}"


@contextmanager
def _explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the way to it, as a `PushError` that says what to do."""
    try:
        yield
    except PushError:
        raise
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        tokens = f"{api.endpoint}/settings/tokens"
        if status == 401:
            reason = f"The Hub does not know the token. Log in again (`hf auth login`) or set HF_TOKEN: {tokens}"
        elif status == 403:
            reason = f"The token may not write to {repo_id}. Take one that may, or an id under your own name: {tokens}"
        elif status is not None and status < 500:
            reason = f"The Hub refuses the push to {repo_id}: {cause}"
        else:
            reason = (
                f"The push to {repo_id} was cut off ({str(cause) or type(cause).__name__}). It is there as a whole or "
                "not at all. The same call again goes on with the files that are missing."
            )
        raise PushError(reason) from error
    except ValueError as error:  # an id that is none, a card that is not valid
        raise PushError(f"The push to {repo_id} is not possible: {error}") from error
