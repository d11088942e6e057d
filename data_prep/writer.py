"""Write datasets: parquet files, report and the dataset card by which `datasets.load_dataset` finds the files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from .corpora.base import CorpusInfo
from .schema import row_features

# A reader loads one row group at a time, so a group ends at this number of rows or of bytes of embedded media.
GROUP_ROWS = 1000
GROUP_BYTES = 64 * 2**20
# The end of the name `{split}-00000-of-00001-{digest}.parquet`.
SHARD = re.compile(r"-\d{5}-of-\d{5}-([0-9a-f]{16})\.parquet")
SPLIT_ORDER = ("train", "validation", "test")
TASKS = ["audio-classification", "video-classification", "text-generation"]
TAGS = ["emotion-recognition", "dialogue", "audio-visual", "empathic"]
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
MOST_REASONS = 10  # kinds of reasons per section of the card


# Parquet -------------------------------------------------------------------------------------------------------------


def media_struct(path: str | os.PathLike, name: str, embed: bool) -> dict:
    """Make the value of an `audio` or `video` column: the absolute path or, with `embed`, the name and the bytes."""
    if embed:
        return {"path": name, "bytes": Path(path).read_bytes()}
    return {"path": os.path.abspath(path), "bytes": None}


def _groups(rows: Iterable[dict]) -> Iterator[list[dict]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += sum(len(row[kind]["bytes"] or b"") for kind in ("audio", "video") if row[kind] is not None)
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_rows(rows: Iterable[dict], path: Path) -> bool:
    """Write schema rows to a parquet file, one row group at a time. Returns False and writes no file if empty."""
    schema = row_features().arrow_schema
    writer = None
    try:
        for group in _groups(rows):
            writer = writer or pq.ParquetWriter(path, schema)
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    finally:
        if writer is not None:
            writer.close()
    return writer is not None


def find_shards(data: Path) -> dict[str, Path]:
    """Find the published parquet files of a folder: digest in the name -> path."""
    found = {}
    for path in data.glob("*.parquet"):
        match = SHARD.search(path.name)
        if match:
            found[match[1]] = path
    return found


def publish_shards(data: Path, shards: dict[str, list[tuple[Path, str]]]) -> dict[str, list[str]]:
    """
    Rename finished parquet files to `data/{split}-{i}-of-{n}-{digest}.parquet`.

    The name has a digest of the content because `load_dataset` caches a folder by its name and its card: without the
    digest, another dataset of the same shape in a folder of the same name would be read from the cache.

    Args:
        data: the folder `data`.
        shards: split -> (current path, digest) of each file, in order.

    Returns:
        The file names of each split.
    """
    names: dict[str, list[str]] = {}
    for split, files in shards.items():
        for place, (path, digest) in enumerate(files):
            name = f"{split}-{place:05d}-of-{len(files):05d}-{digest}.parquet"
            if path != data / name:
                os.replace(path, data / name)
            names.setdefault(split, []).append(name)
    return names


def remove_other_shards(data: Path, names: dict[str, list[str]]) -> None:
    """Remove the parquet files of an earlier run. Call this last, so that an interrupted run leaves them complete."""
    kept = {name for files in names.values() for name in files}
    for path in data.glob("*-?????-of-?????*.parquet"):
        if path.name not in kept:
            path.unlink()


def publish_parquet(data: Path, splits: list[str]) -> dict[str, str]:
    """
    Rename the finished `data/{split}.part` files and remove the parquet files of an earlier run.

    Returns:
        The file name of each split. If `splits` is empty, nothing is removed.
    """
    parts = {split: data / f"{split}.part" for split in splits}
    names = publish_shards(data, {split: [(path, file_digest(path))] for split, path in parts.items()})
    if names:
        remove_other_shards(data, names)
    return {split: files[0] for split, files in names.items()}


# Report --------------------------------------------------------------------------------------------------------------


def to_json(content) -> str:
    """Serialize content in the format of report.json."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def replace_file(path: Path, text: str, work: Path) -> bool:
    """Write a file atomically unless it already has this content; returns whether it was written. Lone surrogates (from
    file names that are not UTF-8) are escaped."""
    data = text.encode("utf-8", "backslashreplace")
    if path.is_file() and path.read_bytes() == data:
        return False
    work.mkdir(parents=True, exist_ok=True)
    part = work / f"{path.name}.part"
    part.write_bytes(data)
    os.replace(part, path)
    return True


def add_counts(counts: dict, more: dict) -> None:
    """Add nested counts to `counts`, in place."""
    for key, value in more.items():
        if isinstance(value, dict):
            add_counts(counts.setdefault(key, {}), value)
        else:
            counts[key] = counts.get(key, 0) + value


def beside_published(about: CorpusInfo, splits: dict[str, dict]) -> dict:
    """Compare the published counts with those of this run and list the differences."""
    everything: dict = {}
    for counts in splits.values():
        add_counts(everything, counts)
    beside, differences = {}, []
    for split, published in about.published.items():
        counts = everything if split == "all" else splits.get(split, {})
        for key, number in published.items():
            here = counts.get(key, counts.get("emotions", {}).get(key, 0))
            beside.setdefault(split, {})[key] = {"published": number, "here": here}
            if here != number:
                differences.append({"split": split, "count": key, "published": number, "here": here})
    return {"splits": beside, "differences": differences}


# Card ----------------------------------------------------------------------------------------------------------------


def sorted_splits(splits: Iterable[str]) -> list[str]:
    """Sort split names: train, validation and test first, then the corpus's own names."""
    order = {name: place for place, name in enumerate(SPLIT_ORDER)}
    return sorted(splits, key=lambda name: (order.get(name, len(order)), name))


def card_header(names: dict[str, str | list[str]], **metadata) -> str:
    """
    The YAML metadata of a dataset card, by which `load_dataset` finds the files of each split.

    Args:
        names: split -> file name in `data/`, or a list of file names.
        metadata: further metadata, such as `license`.
    """
    files = []
    for split, found in names.items():
        paths = [f"data/{name}" for name in ([found] if isinstance(found, str) else found)]
        files.append({"split": split, "path": paths if len(paths) > 1 else paths[0]})
    configs = [{"config_name": "default", "data_files": files}]
    return f"---\n{DatasetCardData(**metadata, configs=configs).to_yaml().rstrip()}\n---\n"


def kind_of(entry: dict) -> str:
    """The kind of a report entry: its reason with file names, quotations and numbers replaced by placeholders."""
    reason = re.sub(r"^(?:[^\s:]*[/.][^:]*|" + re.escape(entry["item"]) + r"): ", "", entry["reason"])
    reason = re.sub(r"\"[^\"]*\"|'[^']*'|“[^”]*”|\[[^\]]*\]", "…", reason)
    reason = re.sub(r"\S*/\S*|\S+\.(?:mp4|avi|flv|wav|mp3|mkv|csv|txt|jsonl|zip|gz)\b", "…", reason)
    return re.sub(r"\d[\d.,:]*\d|\d", "#", reason)


def grouped(entries: list[dict]) -> list[tuple[str, list[dict]]]:
    """Group report entries by the kind of their reason, the most frequent kind first."""
    kinds: dict[str, list[dict]] = {}
    for entry in entries:
        kinds.setdefault(kind_of(entry), []).append(entry)
    return sorted(kinds.items(), key=lambda kind: -len(kind[1]))


def _plain(text: str) -> str:
    """Escape Markdown syntax in a text and put it on one line, for a list item or a table cell."""
    return re.sub(r"([|<>`*_\[\]])", r"\\\1", " ".join(text.split()))


def _count_table(report: dict) -> str:
    """The table of all counts per split, with the published counts where they differ."""
    published = report["published"]["splits"]
    splits = sorted_splits(report["splits"])
    shown = splits + [name for name in sorted_splits(published) if name not in splits]
    emotions = sorted({emotion for counts in report["splits"].values() for emotion in counts["emotions"]} - {"none"})
    emotions += ["none"]
    lines = ["| split | dialogues | turns | with audio | with video | " + " | ".join(emotions) + " |"]
    lines.append("|" + "---|" * (5 + len(emotions)))
    for split in shown:
        counts, beside = report["splits"].get(split), published.get(split, {})

        def cell(key: str, here: int | None, beside: dict = beside) -> str:
            own = "" if here is None else f"{here:,}"
            if key not in beside:
                return own
            given = beside[key]["published"]
            return own if here == given else f"{beside[key]['here']:,} (published: {given:,})"

        here = counts or {"dialogues": None, "rows": None, "with_audio": None, "with_video": None, "emotions": {}}
        cells = [split, cell("dialogues", here["dialogues"]), cell("rows", here["rows"])]
        cells += [cell("with_audio", here["with_audio"]), cell("with_video", here["with_video"])]
        cells += [cell(emotion, here["emotions"].get(emotion, 0) if counts else None) for emotion in emotions]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reasons(report: dict) -> str:
    """The lists of reasons why items were left out, repaired, without media or ignored, by kind."""
    text = ""
    for key, title in (
        ("left_out", "Left out"),
        ("without_media", "Rows with a missing clip"),
        ("repaired", "Repaired"),
        ("ignored", "Ignored files and lines"),
    ):
        kinds = grouped(report[key])
        if not kinds:
            continue
        text += f"\n{title}: {len(report[key]):,}\n\n"
        text += "".join(f"- {len(entries):,} × {_plain(kind)}\n" for kind, entries in kinds[:MOST_REASONS])
        if len(kinds) > MOST_REASONS:
            text += f"- {sum(len(entries) for _, entries in kinds[MOST_REASONS:]):,} of other kinds\n"
    return text


def corpus_card(about: CorpusInfo, report: dict, names: dict[str, list[str]], embed: bool) -> str:
    """
    The dataset card (README.md) of a prepared corpus.

    Args:
        about: facts about the corpus.
        report: the content of report.json.
        names: the parquet files of each split.
        embed: whether the parquet files contain the media.
    """
    size = next((size for limit, size in SIZES if report["rows"] < limit), "n>10M")
    header = card_header(
        {name: names[name] for name in sorted_splits(names)},
        license=about.license,
        pretty_name=about.title,
        task_categories=TASKS,
        tags=TAGS,
        size_categories=[size],
    )
    if embed:
        media = "The dataset contains the clips and needs no other file."
    else:
        media = "The clips are stored by absolute path and must not be moved."
    published = "" if not about.published else "\nWhere a count differs from the published count, both are shown.\n"
    licence = about.license_note
    if not about.redistributable:
        licence += " The license does not allow publishing the clips: keep this dataset private."
    homepage = f"\nSource: {about.homepage}\n" if about.homepage else ""
    return f"""{header}
# {about.title}

{about.description}
{homepage}
## Use

```python
from datasets import load_dataset

turns = load_dataset("path/of/this/folder")
```

One row is one turn of a conversation: `corpus, split, dialogue_id, turn, utterance_id, speaker, text, emotion, audio,
video, start, end`. `audio` and `video` contain the path or the bytes of the clip of exactly that turn, or null. {media}

## Counts

{_count_table(report)}
{published}
Found: {report["found"]:,} rows. Written: {report["rows"]:,}. Left out: {len(report["left_out"]):,}.

## Items left out or changed

`report.json` lists each item with the reason.
{_reasons(report)}
## License

{licence}
"""
