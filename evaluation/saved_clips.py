"""
Save the clips that a data set stores as bytes as files next to the replies.

    OUT/NAME.jsonl            refers to a clip by its `digest`, the SHA-256 of its bytes
    OUT/clips/DIGEST.SUFFIX   the clip, saved once for all systems
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..data_prep.clip_digests import Digests
from ..files import atomic_path
from ..media_empathic import MediaError

FOLDER = "clips"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


def digest_of(content: bytes) -> str:
    """The SHA-256 of a clip's bytes, 64 hexadecimal digits; names the clip."""
    return hashlib.sha256(content).hexdigest()


def order_of(name: str) -> bytes:
    """A sort key that gives a reproducible pseudorandom order of samples."""
    return hashlib.sha256(name.encode()).digest()


def saved_clips(replies: str | os.PathLike) -> dict[str, Path]:
    """The saved clips next to a file of replies: digest -> path."""
    folder = Path(replies).parent / FOLDER
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.stem: file for file in files if _DIGEST.fullmatch(file.stem)}


def parts_of(prompt: Sequence[dict]) -> list[dict]:
    """All content items of the messages; messages with a plain string as content have none."""
    return [part for message in prompt if not isinstance(message["content"], str) for part in message["content"]]


def changed_clip(prompt: Sequence[dict], rows: Sequence[dict]) -> str | None:
    """
    Find a clip file that was replaced after a system replied to it.

    Args:
        prompt: the messages of a sample.
        rows: the rows of the systems' replies to it, see `replies.write_replies`.

    Returns:
        The path of the file; None if there is no such file, or the rows do not say what the systems got.
    """
    digests = Digests(new_hash=hashlib.sha256)
    for part in parts_of(prompt[-1:]):
        got = {digest for row in rows if (digest := (row.get("clips") or {}).get(part.get("type")))}
        if got and part.get("path") and not part.get("digest"):
            try:
                if got != {digests.of({"path": part["path"]})}:
                    return part["path"]
            except MediaError:
                pass  # who opens the clip reports it
    return None


def save_clips(replies: str | os.PathLike, rows: Sequence[dict], samples: Sequence[dict], count: int) -> None:
    """
    Write the clips of some samples next to a file of replies. Each clip is written atomically; existing files stay.

    Args:
        replies: the file of replies, which need not exist yet.
        rows: the rows of that file.
        samples: the samples in the same order; only samples with missing clips are read.
        count: number of samples with such clips to save: the first by `order_of`.
    """
    digests = [{part["digest"] for part in parts_of(row["prompt"]) if part.get("digest")} for row in rows]
    places = sorted((place for place in range(len(rows)) if digests[place]), key=lambda at: order_of(rows[at]["id"]))
    there = set(saved_clips(replies))
    for place in places[:count]:
        if not digests[place] <= there:
            for part in parts_of(samples[place]["prompt"]):
                if part.get("bytes") is not None:
                    there.add(save_clip(part["bytes"], part.get("path"), Path(replies).parent / FOLDER))


def save_clip(content: bytes, name: str | None, folder: Path) -> str:
    """Write a clip to a folder, named by its digest, unless it is there; return the digest."""
    digest, suffix = digest_of(content), Path(name or "").suffix.lower()
    target = folder / f"{digest}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial, open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return digest
