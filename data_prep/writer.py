"""What all data sets share on their way out: parquet files and the card by which `datasets.load_dataset` finds them."""

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

from empathic.data_prep.corpus import CorpusInfo
from empathic.data_prep.schema import row_features

# A row group is what a reader holds at once: closed at this many rows, or bytes of embedded media, whichever is first.
GROUP_ROWS = 1000
GROUP_BYTES = 64 * 2**20
# What `{split}-00000-of-00001-{digest}.parquet` ends on.
SHARD = re.compile(r"-\d{5}-of-\d{5}-([0-9a-f]{16})\.parquet")
SPLIT_ORDER = ("train", "validation", "test")
TASKS = ["audio-classification", "video-classification", "text-generation"]
TAGS = ["emotion-recognition", "dialogue", "audio-visual", "empathic"]
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
MOST_REASONS = 10  # of each kind in the card


# Parquet -------------------------------------------------------------------------------------------------------------


def media_struct(path: str | os.PathLike, name: str, embed: bool) -> dict:
    """The value of an `audio` or `video` column: the absolute path, or with `embed` the file's bytes under its name."""
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
    """Sixteen hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_rows(rows: Iterable[dict], path: Path) -> bool:
    """Writes rows of the schema, held a row group at a time, as one parquet file; no file if there is no row."""
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
    """The published parquet files of a folder by the digest in their name."""
    found = {}
    for path in data.glob("*.parquet"):
        match = SHARD.search(path.name)
        if match:
            found[match[1]] = path
    return found


def publish_shards(data: Path, shards: dict[str, list[tuple[Path, str]]]) -> dict[str, list[str]]:
    """
    Gives finished parquet files the names `data/{split}-{i}-of-{n}-{digest}.parquet`.

    A name carries a digest of its content, because `load_dataset` caches a folder by its name and its card: without it,
    another data set of the same shape in a folder of the same name would be read from the cache.

    Args:
        shards: (where it lies, digest) of each file of a split, in order.

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
    """Removes the parquet files of an earlier run. Last of all: a run that was interrupted leaves those whole."""
    kept = {name for files in names.values() for name in files}
    for path in data.glob("*-?????-of-?????*.parquet"):
        if path.name not in kept:
            path.unlink()


def publish_parquet(data: Path, splits: list[str]) -> dict[str, str]:
    """
    Gives the finished `data/{split}.part` files their names, and removes the parquet files of an earlier run.

    Returns:
        The file name of each split; nothing is removed if there is none.
    """
    parts = {split: data / f"{split}.part" for split in splits}
    names = publish_shards(data, {split: [(path, file_digest(path))] for split, path in parts.items()})
    if names:
        remove_other_shards(data, names)
    return {split: files[0] for split, files in names.items()}


# Report --------------------------------------------------------------------------------------------------------------


def to_json(content) -> str:
    """As report.json is written."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def replace_file(path: Path, text: str, work: Path) -> bool:
    """Writes a file at once or not at all; one that holds the text already is not touched. Returns if it was written.
    Half of a surrogate pair (a file name that is not UTF-8) is written as its escape."""
    data = text.encode("utf-8", "backslashreplace")
    if path.is_file() and path.read_bytes() == data:
        return False
    work.mkdir(parents=True, exist_ok=True)
    part = work / f"{path.name}.part"
    part.write_bytes(data)
    os.replace(part, path)
    return True


def add_counts(counts: dict, more: dict) -> None:
    """Adds counts, nested alike, to `counts`."""
    for key, value in more.items():
        if isinstance(value, dict):
            add_counts(counts.setdefault(key, {}), value)
        else:
            counts[key] = counts.get(key, 0) + value


def beside_published(about: CorpusInfo, splits: dict[str, dict]) -> dict:
    """The published counts beside those of this run; differences are listed."""
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
    """Train, validation and test first, then the names of the corpus's own."""
    order = {name: place for place, name in enumerate(SPLIT_ORDER)}
    return sorted(splits, key=lambda name: (order.get(name, len(order)), name))


def card_header(names: dict[str, str | list[str]], **metadata) -> str:
    """
    The card's YAML metadata, by which `load_dataset` finds the files of each split.

    Args:
        names: the file name of each split in `data/`, or several.
        metadata: more of it, such as `license`.
    """
    files = []
    for split, found in names.items():
        paths = [f"data/{name}" for name in ([found] if isinstance(found, str) else found)]
        files.append({"split": split, "path": paths if len(paths) > 1 else paths[0]})
    configs = [{"config_name": "default", "data_files": files}]
    return f"---\n{DatasetCardData(**metadata, configs=configs).to_yaml().rstrip()}\n---\n"


def kind_of(entry: dict) -> str:
    """The reason of an entry of the report without what is the entry's own: names of files, quotations and numbers."""
    reason = re.sub(r"^(?:[^\s:]*[/.][^:]*|" + re.escape(entry["item"]) + r"): ", "", entry["reason"])
    reason = re.sub(r"\"[^\"]*\"|'[^']*'|“[^”]*”|\[[^\]]*\]", "…", reason)
    reason = re.sub(r"\S*/\S*|\S+\.(?:mp4|avi|flv|wav|mp3|mkv|csv|txt|jsonl|zip|gz)\b", "…", reason)
    return re.sub(r"\d[\d.,:]*\d|\d", "#", reason)


def grouped(entries: list[dict]) -> list[tuple[str, list[dict]]]:
    """Entries of the report by the kind of their reason, the most frequent kind first."""
    kinds: dict[str, list[dict]] = {}
    for entry in entries:
        kinds.setdefault(kind_of(entry), []).append(entry)
    return sorted(kinds.items(), key=lambda kind: -len(kind[1]))


def _plain(text: str) -> str:
    """Text that means nothing to Markdown inside a line or a cell of a table."""
    return re.sub(r"([|<>`*_\[\]])", r"\\\1", " ".join(text.split()))


def _count_table(report: dict) -> str:
    """Every count of each split, and what the corpus's authors published beside it."""
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
    """What was left out, repaired and so on, by kind."""
    text = ""
    for key, title in (
        ("left_out", "Left out"),
        ("without_media", "Without a clip that they should have"),
        ("repaired", "Repaired"),
        ("ignored", "Files and lines that are no row"),
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
    The card of a prepared corpus, README.md.

    Args:
        report: the content of report.json.
        names: the parquet files of each split.
        embed: whether they hold the media themselves.
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
        media = "The bytes of the clips are in the data set; it needs no other file."
    else:
        media = "The clips are given by their absolute paths: they have to stay where they are."
    published = "" if not about.published else "\nWhere a count differs, the published one is beside it.\n"
    licence = about.license_note
    if not about.redistributable:
        licence += " It does not allow to publish the clips: keep this data set private."
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
video, start, end`. `audio` and `video` hold the path or the bytes of the clip of exactly that turn, or null. {media}

## Counts

{_count_table(report)}
{published}
Found: {report["found"]:,} rows. Written: {report["rows"]:,}. Left out: {len(report["left_out"]):,}.

## What was left out or changed

`report.json` names each item, and why.
{_reasons(report)}
## Licence

{licence}
"""
