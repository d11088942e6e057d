"""
Replies of a system to many samples, saved one a line beside their prompts.

The samples are cut into batches by their places in the whole list. A batch is made at once by one process, so a reply
depends on neither the number of processes nor on where a run was stopped, and the file is the same to the byte.

    OUT/NAME.jsonl     the replies in the order of the samples, once all are there
    OUT/NAME.parts/    what each process wrote, as it went; a run that is started again takes them from there
    OUT/clips/         clips that the data set holds inside itself, see `saved_clips`
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging

from empathic.data_prep.candidates import message_text
from empathic.data_prep.views import DialogueSamples, EmotionClips
from empathic.evaluation.saved_clips import digest_of, save_clips
from empathic.evaluation.systems import System
from empathic.trainers.samples import sample_id

__all__ = ["conversation_of", "read_replies", "sample_id", "seed_of", "write_replies"]

logger = logging.get_logger(__name__)

COLUMNS = ("corpus", "split", "dialogue_id", "turn", "utterance_id", "speaker", "text", "emotion")


def conversation_of(row: dict) -> str:
    """The id of the conversation that a saved reply stands in: its own without the turn."""
    return row["id"].rpartition("/")[0]


def seed_of(seed: int, name: str) -> int:
    """The seed of a sample, 31 bits, from that of the run and the sample's id."""
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
    Writes OUT/NAME.jsonl, one line a reply, in the order of the samples: `id`, `prompt` (messages; a clip as its
    `path`, or as the `digest` of its bytes), `reply`, `reference`, `emotion` (of the turn answered, may be null), and
    what else the system says of it.

    Every process of `accelerate launch` calls it alike; all return once the file is whole. Replies that are there
    already, made under the same settings, seed and data, are not made again; a batch that a stop cut through is, and
    those that an endpoint failed to give are asked for again.
    A clip that changed in its place is not noticed: give a new folder then.

    Args:
        system: what replies.
        samples: such as `DialogueSamples`.
        out: a folder; made if it is not there.
        seed: with a sample's id it decides what is sampled.
        clips: of so many samples the clips that the data set holds inside itself become files in OUT/clips; reports and
            studies take them from there.
        accelerator: an `Accelerator` or `PartialState`; None: this process alone.
        progress: shows a bar.

    Returns:
        the path of the file.

    Raises:
        ValueError: for two samples of one id.
    """
    out = Path(out)
    path, parts = out / f"{system.name}.jsonl", out / f"{system.name}.parts"
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    is_main = rank == 0
    run = _digest([system.settings, seed, _rows_digest(samples)])[:12]
    batches = list(_batches(samples, system.batch_size))
    parts.mkdir(parents=True, exist_ok=True)
    before = _read_parts(parts, run)
    if is_main and not before and any(parts.glob("*.jsonl")):
        logger.warning(f"{parts} holds replies of other settings or data: they are not used, and all are made anew.")
    _wait(accelerator)  # all have read the same parts, and divide what is left alike
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
                made = _reply(system, [samples[batch.start + place] for place in again], seed)
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
    The lines of a file of `write_replies`.

    Raises:
        ValueError: for a line that is no reply, naming it.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["id"], row["reply"], row["reference"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: is no saved reply ({error!r}). Write the file again.") from None
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------- one reply


def _reply(system: System, samples: list[dict], seed: int) -> list[dict]:
    names = [sample_id(sample) for sample in samples]
    replies = system.reply(samples, [seed_of(seed, name) for name in names])
    return [
        {
            "id": name,
            "prompt": [_plain_message(message) for message in sample["prompt"]],
            "reply": reply.text,
            "reference": sample["reply"],
            "emotion": sample.get("emotion"),
            **reply.extra,
        }
        for name, sample, reply in zip(names, samples, replies, strict=True)
    ]


def _plain_message(message: dict) -> dict:
    """A message as JSON: bytes as their digest."""
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


class _Batch:
    """Samples `start` to `end`; `key` names them by their ids and texts."""

    def __init__(self, start: int, end: int, key: str):
        self.start, self.end, self.key = start, end, key


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rows_digest(samples: Sequence[dict]) -> str:
    """Of all texts of the data set that the samples are taken from. No clip is read."""
    if not isinstance(samples, DialogueSamples | EmotionClips):
        return ""  # a list: the batches' keys tell all
    digest = hashlib.sha256()
    for batch in samples.dataset.select_columns(list(COLUMNS)).iter(1000):
        digest.update(json.dumps([batch[name] for name in COLUMNS]).encode())
    return digest.hexdigest()


def _batches(samples: Sequence[dict], size: int) -> Iterator[_Batch]:
    """By place in the list, so that a longer list of samples begins with the same batches."""
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
                    raise ValueError(f"Two samples are called {name}: give each turn one name.")
                names.add(name)
                content.append([name, sample["reply"], [[m.get("name"), message_text(m)] for m in sample["prompt"]]])
        yield _Batch(start, end, _digest([start, content])[:16])


# ------------------------------------------------------------------------------------------------------------- parts


def _wait(accelerator) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()


def _failed(rows: list[dict | None]) -> list[int]:
    """Which of a batch's replies an endpoint failed to give."""
    return [place for place, row in enumerate(rows) if row is not None and row.get("finish_reason") == "failed"]


def _new_part(parts: Path, run: str, rank: int):
    """A new file of this process; those of earlier runs, which may end in half a line, stay as they are."""
    number = 0
    while True:
        try:
            return open(parts / f"{run}-{rank}-{number}.jsonl", "x", encoding="utf-8")
        except FileExistsError:
            number += 1


def _read_parts(parts: Path, run: str) -> dict[str, list[dict]]:
    """The rows of each whole batch, by its key. A line that a stop cut off is dropped, and with it its batch."""
    found: dict[str, list[dict]] = {}
    sizes: dict[str, int] = {}
    for file in sorted(parts.glob(f"{run}-*.jsonl")):
        mine: dict[str, list[dict]] = {}
        for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last line break is no line
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
    """Writes the whole file or nothing."""
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
