"""Writes the tiny preset's corpus the way a user's own recordings would lie in a folder.

    folder/metadata.jsonl      one line a turn
    folder/clips/*.mp4         what was recorded of the user's turns; the assistant only writes

It is read back by `empathic prepare folder`, as any folder of recordings is.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from empathic.tiny.clips import write_clip
from empathic.tiny.dialogues import SPLITS, USER, make_dialogues

# About three clips a conversation: 1,440 clips, written in some 20 seconds of one core. The test split has about 300
# labelled clips, so that a measured accuracy of 0.9 has a standard error of 0.017.
NUM_DIALOGUES = {"train": 340, "validation": 40, "test": 100}
# A whole number of AAC frames (15 of 1,024 samples): the codec would pad a full second to a little more, which needs
# a second Whisper window.
SECONDS = 0.96


def _clip_rng(utterance_id, seed):
    """The generator of one clip: the same wherever and in whatever order the clips are written."""
    digest = hashlib.sha256(f"{seed} {utterance_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def corpus_rows(num_dialogues=None, seed=0, with_clips=True):
    """The lines of `metadata.jsonl`, a list of dicts.

    Args:
        num_dialogues: conversations of each split; `NUM_DIALOGUES` by default.
        seed: of the conversations, see `make_dialogues`; a part of every id.
        with_clips: whether user turns name a clip.
    """
    num_dialogues = NUM_DIALOGUES if num_dialogues is None else num_dialogues
    unknown = sorted(set(num_dialogues) - set(SPLITS))
    if unknown:
        raise ValueError(f"num_dialogues names the splits {', '.join(unknown)}; there are {', '.join(SPLITS)}.")
    rows = []
    for split in SPLITS:
        for number, dialogue in enumerate(make_dialogues(num_dialogues.get(split, 0), seed, split)):
            dialogue_id = f"{split}-{seed}-{number:04d}"
            for place, turn in enumerate(dialogue):
                row = {
                    "split": split,
                    "dialogue_id": dialogue_id,
                    "turn": place,
                    "utterance_id": f"{dialogue_id}-{place}",
                    "speaker": turn["speaker"],
                    "text": turn["text"],
                    "emotion": turn["emotion"],
                }
                if with_clips and turn["speaker"] == USER:
                    row["video"] = f"clips/{row['utterance_id']}.mp4"
                rows.append(row)
    return rows


def _write_atomically(path, write):
    """Calls `write(temporary path)` and moves the result into place: a file under `path` is always complete."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_corpus(folder, *, num_dialogues=None, seed=0, with_clips=True, seconds=SECONDS, progress=True):
    """Writes a synthetic corpus: `metadata.jsonl` and one mp4 file (H.264 and AAC) for each turn of the user.

    A clip that is there already is kept, so an interrupted call goes on where it stopped. Every clip is determined by
    its utterance id and the seed alone.

    Args:
        folder: where to write; made if it is not there.
        num_dialogues: conversations of each split, `{"train": .., "validation": .., "test": ..}`; `NUM_DIALOGUES` by
            default. The splits are disjoint by content (see `dialogues`).
        seed: of the conversations and of the clips.
        with_clips: False writes the conversations alone.
        seconds: length of a clip.
        progress: shows a bar with the rate.

    Returns:
        `{"dialogues", "turns", "clips", "written", "labelled"}`: how many conversations, turns and clips the corpus
        has, how many clips this call wrote, and the clips of each split.
    """
    folder = Path(folder)
    rows = corpus_rows(num_dialogues, seed, with_clips)
    recorded = [row for row in rows if "video" in row]
    folder.mkdir(parents=True, exist_ok=True)
    if recorded:
        (folder / "clips").mkdir(exist_ok=True)
    missing = [row for row in recorded if not (folder / row["video"]).is_file()]
    done = len(recorded) - len(missing)
    for row in tqdm(missing, "clips", total=len(recorded), initial=done, unit="clip", disable=not progress):
        rng = _clip_rng(row["utterance_id"], seed)
        _write_atomically(folder / row["video"], lambda path: write_clip(path, row["emotion"], rng, seconds))  # noqa: B023
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # Written last: a folder with its list of turns has all clips that it names.
    _write_atomically(folder / "metadata.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    return {
        "dialogues": len({row["dialogue_id"] for row in rows}),
        "turns": len(rows),
        "clips": len(recorded),
        "written": len(missing),
        "labelled": dict(Counter(row["split"] for row in recorded)),
    }
