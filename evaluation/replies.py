"""
Generate and save the replies of a system to many samples, one JSON line per reply, with its prompt.

The samples are divided into batches by their index in the whole list, and each batch is computed by one process. So the
replies do not depend on the number of processes or on where a run was stopped, and the file is identical to the byte.

    OUT/NAME.jsonl     the replies in the order of the samples, written once all are complete
    OUT/NAME.parts/    partial results of each process; a restarted run reads them
    OUT/clips/         clips that the data set stores as bytes, see `saved_clips`
    OUT/files.json     content hashes of clip files, so that unchanged files are not read again
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers.utils import logging

from ..data_prep.clip_digests import MEDIA_KINDS, Digests
from ..data_prep.messages import clip_of, message_text, sample_id
from ..data_prep.views import DialogueSamples, EmotionClips
from ..files import fingerprint, write_json, write_text
from ..media_empathic import MediaError
from .saved_clips import digest_of, save_clips
from .systems.base import System

__all__ = ["conversation_of", "read_replies", "sample_id", "seed_of", "write_replies"]

logger = logging.get_logger(__name__)

FILES = "files.json"
ROW_COLUMNS = ("corpus", "split", "dialogue_id", "turn", "utterance_id", "speaker", "text", "emotion")


def conversation_of(row: dict) -> str:
    """The conversation id of a saved reply: the id of the reply without the turn."""
    return row["id"].rpartition("/")[0]


def seed_of(seed: int, name: str) -> int:
    """The 31-bit seed of a sample, derived from the seed of the run and the sample's id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big") >> 1


def write_replies(
    system: System,
    samples: Sequence[dict],
    out: str | os.PathLike,
    *,
    seed: int = 0,
    clips: int = 0,
    accelerator=None,
    progress: bool = True,
) -> Path:
    """
    Write OUT/NAME.jsonl, one line per reply, in the order of the samples: `id`, `prompt` (messages; a clip as its
    `path`, or as the `digest` of its bytes), `clips` (content hash of each clip that the system got), `reply`,
    `reference`, `emotion` (of the turn answered, may be null), and the `extra` values of the reply.

    Every process of `accelerate launch` must call this function; it returns once the file is complete. Saved replies
    with the same settings, seed and data, including the content of the clips, are reused. Incomplete batches, and
    replies that failed at an endpoint, are generated again.

    Args:
        system: the system that replies.
        samples: the samples, such as `DialogueSamples`. Samples with the same `seeded_by` are sampled with the same
            seed; by default each sample has its own.
        out: the output folder; created if needed.
        seed: the seed of the run; together with a sample's id it determines the sampling.
        clips: the number of samples whose clips, if the data set stores them as bytes, are written to OUT/clips, where
            reports and studies read them.
        accelerator: an `Accelerator` or `PartialState`; None for this process alone.
        progress: whether to show a progress bar.

    Returns:
        The path of the file.

    Raises:
        ValueError: if two samples have the same id.
    """
    out = Path(out)
    path, parts = out / f"{system.name}.jsonl", out / f"{system.name}.parts"
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    is_main = rank == 0
    run = fingerprint([system.settings, seed, _rows_digest(samples)])[:12]
    parts.mkdir(parents=True, exist_ok=True)
    if is_main:
        clips_seen = _clips_of(system, samples, out)
    _wait(accelerator)  # the other processes use the hashes of the first
    if not is_main:
        clips_seen = _clips_of(system, samples, out, writes=False)
    batches = list(_batches(samples, system.batch_size, clips_seen))
    before = _read_parts(parts, run)
    if is_main and not before and any(parts.glob("*.jsonl")):
        logger.warning(
            f"{parts} has replies for other settings or data. They are ignored, and all are generated again."
        )
    _wait(accelerator)  # all processes have read the same parts, so they divide the missing batches consistently
    missing = [batch for batch in batches if batch.key not in before or _failed(before[batch.key])]
    mine = missing[rank::world]
    if mine:
        bar = tqdm(
            total=sum(batch.end - batch.start for batch in mine),
            desc=f"replies of {system.name}",
            unit="reply",
            disable=not (progress and is_main),
        )
        with bar, _new_part(parts, run, rank) as file:
            for batch in mine:
                rows = before.get(batch.key) or [None] * (batch.end - batch.start)
                again = _failed(rows) or range(len(rows))
                places = [batch.start + place for place in again]
                made = _reply(
                    system, [samples[place] for place in places], [clips_seen[place] for place in places], seed
                )
                for place, row in zip(again, made, strict=True):
                    rows[place] = row
                lines = [json.dumps({"batch": batch.key, "of": len(rows), **row}, ensure_ascii=False) for row in rows]
                file.write("".join(f"{line}\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(rows))
    _wait(accelerator)
    if is_main:
        found = _read_parts(parts, run)
        rows = [row for batch in batches for row in found[batch.key]]
        save_clips(path, rows, samples, clips)
        _merge(path, rows)
    _wait(accelerator)
    return path


def read_replies(path: str | os.PathLike) -> list[dict]:
    """
    Read a file written by `write_replies`.

    Raises:
        ValueError: if a line is not a saved reply; the message has the line number.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["id"], row["reply"], row["reference"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a saved reply ({error!r}). Write the file again.") from None
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------- one reply


def _reply(system: System, samples: list[dict], clips: list["_Clips"], seed: int) -> list[dict]:
    names = [sample_id(sample) for sample in samples]
    seeds = [seed_of(seed, sample.get("seeded_by") or name) for sample, name in zip(samples, names, strict=True)]
    replies = system.reply(samples, seeds)
    return [
        {
            "id": name,
            "prompt": [_plain_message(message) for message in sample["prompt"]],
            **({"clips": seen.content} if seen.content else {}),
            "reply": reply.text,
            "reference": sample["reply"],
            "emotion": sample.get("emotion"),
            **reply.extra,
        }
        for name, sample, seen, reply in zip(names, samples, clips, replies, strict=True)
    ]


def _plain_message(message: dict) -> dict:
    """Return a message as JSON, with bytes replaced by their digest."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_plain_item(item) for item in message["content"]]}


def _plain_item(item: dict) -> dict:
    if item["type"] == "text":
        return item
    if item.get("bytes") is not None:
        return {"type": item["type"], "digest": digest_of(item["bytes"])}
    return {"type": item["type"], "path": item.get("path")}


# ----------------------------------------------------------------------------------------------------------- batches


class _Clips(NamedTuple):
    """
    The clips of a sample on which its line depends.

    Attributes:
        content: {kind: content hash, or None if the file cannot be read} of the clips that the system gets.
        others: the same of further clips, whose hashes are in the prompt because the data set stores them as bytes.
    """

    content: dict[str, str | None]
    others: dict[str, str | None]


def _clips_of(system: System, samples: Sequence[dict], out: Path, writes: bool = True) -> list[_Clips]:
    """Hash the clips of all samples, and with `writes` remember the hashes of files in OUT."""
    seen = getattr(system, "clip_kinds", MEDIA_KINDS)
    file = out / FILES
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    digests, found = Digests(before, hashlib.sha256), []
    for clips in _clips_in(samples):
        sets = _Clips({}, {})
        for kind, item in clips.items():
            if kind in seen or item.get("bytes") is not None:
                try:
                    digest = digests.of(item)
                except MediaError:
                    digest = None
                (sets.content if kind in seen else sets.others)[kind] = digest
        found.append(sets)
    if writes and digests.files != before:
        write_json(file, digests.files, indent=None)
    return found


def _clips_in(samples: Sequence[dict]) -> Iterator[dict[str, dict]]:
    """The clips {kind: item} of the last turn of each sample. For a data set, no text is read."""
    if isinstance(samples, DialogueSamples | EmotionClips):
        media = samples.dataset.select_columns(list(MEDIA_KINDS))
        rows = samples.places[:, 1] - 1 if isinstance(samples, DialogueSamples) else samples.places
        for row in rows.tolist():
            yield {kind: item for kind, item in media[row].items() if item is not None}
    else:
        for place in range(len(samples)):
            items = {kind: clip_of(samples[place]["prompt"], kind) for kind in MEDIA_KINDS}
            yield {kind: item for kind, item in items.items() if item is not None}


class _Batch:
    """The samples `start` to `end`; `key` is a fingerprint of their ids, texts and clips."""

    def __init__(self, start: int, end: int, key: str):
        self.start, self.end, self.key = start, end, key


def _rows_digest(samples: Sequence[dict]) -> str:
    """Digest of all texts of the data set behind the samples; for their clips see `_clips_of`."""
    if not isinstance(samples, DialogueSamples | EmotionClips):
        return ""  # for a list, the keys of the batches cover all texts
    digest = hashlib.sha256()
    for batch in samples.dataset.select_columns(list(ROW_COLUMNS)).iter(1000):
        digest.update(json.dumps([batch[name] for name in ROW_COLUMNS]).encode())
    return digest.hexdigest()


def _batches(samples: Sequence[dict], size: int, clips: list[_Clips]) -> Iterator[_Batch]:
    """Divide the samples by index, so that a longer list of samples begins with the same batches."""
    numbered, names = isinstance(samples, DialogueSamples | EmotionClips), set()
    for start in range(0, len(samples), size):
        end = min(start + size, len(samples))
        if numbered:
            content = samples.places[start:end].tolist()
        else:
            content = []
            for sample in (samples[place] for place in range(start, end)):
                name = sample_id(sample)
                if name in names:
                    raise ValueError(f"Two samples have the id {name}; each turn needs its own id.")
                names.add(name)
                content.append([name, sample["reply"], [[m.get("name"), message_text(m)] for m in sample["prompt"]]])
        yield _Batch(start, end, fingerprint([start, content, clips[start:end]])[:16])


# ------------------------------------------------------------------------------------------------------------- parts


def _wait(accelerator) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()


def _failed(rows: list[dict | None]) -> list[int]:
    """The indices of the replies in a batch that failed at an endpoint."""
    return [place for place, row in enumerate(rows) if row is not None and row.get("finish_reason") == "failed"]


def _new_part(parts: Path, run: str, rank: int):
    """Open a new file for this process. Files of earlier runs, which may end in half a line, are not changed."""
    number = 0
    while True:
        try:
            return open(parts / f"{run}-{rank}-{number}.jsonl", "x", encoding="utf-8")
        except FileExistsError:
            number += 1


def _read_parts(parts: Path, run: str) -> dict[str, list[dict]]:
    """The rows of each complete batch, by its key. A batch with a truncated line is dropped."""
    found: dict[str, list[dict]] = {}
    sizes: dict[str, int] = {}
    for file in sorted(parts.glob(f"{run}-*.jsonl")):
        mine: dict[str, list[dict]] = {}
        for line in file.read_bytes().split(b"\n")[:-1]:  # after the last line break there is no complete line
            try:
                row = json.loads(line)
            except ValueError:
                continue
            key = row.pop("batch")
            sizes[key] = row.pop("of")
            mine.setdefault(key, []).append(row)
        for key, rows in mine.items():
            is_whole = len(rows) == sizes[key]
            if is_whole and (key not in found or len(_failed(rows)) < len(_failed(found[key]))):
                found[key] = rows
    return found


def _merge(path: Path, rows: list[dict]) -> None:
    """Write the file atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
