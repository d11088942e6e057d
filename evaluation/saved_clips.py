"""
Clips that a data set holds inside itself, as files beside the replies that were given to them.

    OUT/NAME.jsonl            names such a clip by the SHA-256 of its bytes, its `digest`
    OUT/clips/DIGEST.SUFFIX   the clip, once for all systems
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

FOLDER = "clips"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


def digest_of(content: bytes) -> str:
    """The name of a clip: 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def order_of(name: str) -> bytes:
    """Samples sorted by this stand in an order that has nothing to do with their contents, and is always the same."""
    return hashlib.sha256(name.encode()).digest()


def saved_clips(replies: str | os.PathLike) -> dict[str, Path]:
    """The clips beside a file of replies, by their digests."""
    folder = Path(replies).parent / FOLDER
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.stem: file for file in files if _DIGEST.fullmatch(file.stem)}


def parts_of(prompt: Sequence[dict]) -> list[dict]:
    """What the messages hold, other than plain strings."""
    return [part for message in prompt if not isinstance(message["content"], str) for part in message["content"]]


def save_clips(replies: str | os.PathLike, rows: Sequence[dict], samples: Sequence[dict], count: int) -> None:
    """
    Writes the clips of some samples beside a file of replies, each whole or not at all. What is there stays.

    Args:
        replies: the file, which need not be there yet.
        rows: its lines.
        samples: what was replied to, in the same order; only those whose clips are missing are read.
        count: of the samples with such clips, those so many that come first by `order_of`.
    """
    digests = [{part["digest"] for part in parts_of(row["prompt"]) if part.get("digest")} for row in rows]
    places = sorted((place for place in range(len(rows)) if digests[place]), key=lambda at: order_of(rows[at]["id"]))
    there = set(saved_clips(replies))
    for place in places[:count]:
        if not digests[place] <= there:
            for part in parts_of(samples[place]["prompt"]):
                if part.get("bytes") is not None:
                    there.add(_write(part["bytes"], part.get("path"), Path(replies).parent / FOLDER))


def _write(content: bytes, name: str | None, folder: Path) -> str:
    digest, suffix = digest_of(content), Path(name or "").suffix.lower()
    target = folder / f"{digest}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{target.name}.{os.getpid()}.tmp"
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    return digest
