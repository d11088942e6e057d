"""What all corpora share on their way out: the report, the parquet files and the card for `datasets.load_dataset`."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from empathic.data_prep.schema import row_features

# A row group is what a reader holds at once: closed at this many rows, or bytes of embedded media, whichever is first.
GROUP_ROWS = 1000
GROUP_BYTES = 64 * 2**20


@dataclass
class Report:
    """What was left out of a corpus or repaired in it, and why: nothing vanishes silently."""

    corpus: str
    left_out: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)
    splits: dict[str, dict] = field(default_factory=dict)

    def leave_out(self, item: str, reason: str) -> None:
        """Notes that `item` (a row, file or dialogue, as the user would look for it) is not in the output."""
        self.left_out.append({"item": item, "reason": reason})

    def repair(self, item: str, reason: str) -> None:
        """Notes that `item` is in the output, but not as it came."""
        self.repaired.append({"item": item, "reason": reason})

    def count(self, row: dict) -> None:
        """Counts a row that is written."""
        counts = self.splits.setdefault(
            row["split"], {"rows": 0, "dialogues": 0, "with_audio": 0, "with_video": 0, "emotions": Counter()}
        )
        counts["rows"] += 1
        counts["dialogues"] += row["turn"] == 0
        counts["with_audio"] += row["audio"] is not None
        counts["with_video"] += row["video"] is not None
        counts["emotions"][row["emotion"] or "none"] += 1

    def as_dict(self) -> dict:
        """The content of report.json."""
        splits = {
            name: {**counts, "emotions": dict(sorted(counts["emotions"].items()))}
            for name, counts in self.splits.items()
        }
        return {
            "corpus": self.corpus,
            "rows": sum(counts["rows"] for counts in splits.values()),
            "splits": splits,
            "left_out": self.left_out,
            "repaired": self.repaired,
        }


def hash_split(dialogue_id: str, seed: int = 0) -> str:
    """The split of a dialogue by the hash of its name: 80 % train, 10 % validation, 10 % test, on every machine."""
    digest = hashlib.sha256(f"{seed}:{dialogue_id}".encode()).digest()
    part = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if part < 0.8 else "validation" if part < 0.9 else "test"


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


def publish_parquet(data: Path, splits: list[str]) -> dict[str, str]:
    """
    Gives the finished `data/{split}.part` files their names, and removes the parquet files of an earlier run.

    Only then do they take the place of an earlier run's: one that was interrupted leaves these whole. A name carries a
    digest of its content, because `load_dataset` caches a folder by its name and its card: without it, another data set
    of the same shape in a folder of the same name would be read from the cache.

    Returns:
        The file name of each split; nothing is removed if there is none.
    """
    names = {}
    for split in splits:
        with open(data / f"{split}.part", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        names[split] = f"{split}-00000-of-00001-{digest}.parquet"
    if names:
        for old in data.glob("*-?????-of-?????*.parquet"):
            old.unlink()
    for split, name in names.items():
        os.replace(data / f"{split}.part", data / name)
    return names


def write_corpus(rows: Iterable[dict], out: str | os.PathLike, report: Report, description: str) -> dict:
    """Writes a prepared corpus: OUT/data/{split}-00000-of-00001-{digest}.parquet, README.md and report.json.

    `datasets.load_dataset(OUT)` reads it. Parquet files of an earlier run are replaced; other files in OUT stay.

    Args:
        rows: rows of the schema, the turns of a dialogue together and in order. Held a few at a time.
        out: the folder to write to.
        report: filled by the adapter; the counts are added here.
        description: what the corpus is, in a sentence or two of Markdown for the card.

    Returns:
        The content of report.json. `rows` in it is 0 if there was nothing to write; then only report.json is written.
    """
    out = Path(out)
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    schema = row_features().arrow_schema
    writers: dict[str, pq.ParquetWriter] = {}
    try:
        for group in _groups(rows):
            for split in dict.fromkeys(row["split"] for row in group):
                if split not in writers:
                    writers[split] = pq.ParquetWriter(data / f"{split}.part", schema)
                part = [row for row in group if row["split"] == split]
                writers[split].write_table(pa.Table.from_pylist(part, schema=schema))
            for row in group:
                report.count(row)
    finally:
        for writer in writers.values():
            writer.close()
    content = report.as_dict()
    names = publish_parquet(data, list(writers))
    (out / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if content["rows"]:
        (out / "README.md").write_text(_card(content, description, names), encoding="utf-8")
    return content


def card_header(names: dict[str, str]) -> str:
    """The card's metadata, by which `load_dataset` finds the file of each split."""
    files = "\n".join(f"  - split: {split}\n    path: data/{name}" for split, name in names.items())
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n"


def _card(report: dict, description: str, names: dict[str, str]) -> str:
    order = {"train": 0, "validation": 1, "test": 2}
    splits = sorted(report["splits"], key=lambda name: (order.get(name, 3), name))
    table = ""
    for name in splits:
        counts = report["splits"][name]
        labelled = counts["rows"] - counts["emotions"].get("none", 0)
        columns = (name, counts["dialogues"], counts["rows"], counts["with_audio"], counts["with_video"], labelled)
        table += "| " + " | ".join(map(str, columns)) + " |\n"
    return f"""{card_header({name: names[name] for name in splits})}
# {report["corpus"]}

{description}

One row is one turn of a conversation: `corpus, split, dialogue_id, turn, utterance_id, speaker, text, emotion, audio,
video, start, end`. `audio` and `video` hold the path or the bytes of the clip of exactly that turn, or null.

| split | dialogues | turns | with audio | with video | with emotion |
|---|---|---|---|---|---|
{table}
{len(report["left_out"])} items were left out and {len(report["repaired"])} repaired: `report.json` names each, and why.
"""
