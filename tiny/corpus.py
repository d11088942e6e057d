"""Write the tiny preset's corpus in the format of a user's own recordings.

    folder/metadata.jsonl      one line per turn
    folder/clips/*.mp4         the clips of the user's turns; the assistant's turns are text only

`empathic prepare folder` reads it like any folder of recordings.
"""

import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..configuration_empathic import EMOTIONS
from .clips import write_clip
from .dialogues import ASSISTANT, SPLITS, USER, contrast_sentences, make_dialogues, reply_for

# About three clips per conversation: 1,440 clips, written in about 20 seconds on one core. The test split has about 300
# labeled clips, so that a measured accuracy of 0.9 has a standard error of 0.017.
NUM_DIALOGUES = {"train": 340, "validation": 40, "test": 100}
# A whole number of AAC frames (15 of 1,024 samples): the codec would pad a full second to a little more than a second,
# which would need a second Whisper window.
SECONDS = 0.96
# Share of the assistant's replies in the training split that answer another emotion than the user's, drawn at random:
# people, too, do not always find the right tone. The likelihood alone teaches a model to err as often. The other splits
# have none.
MISFIT_SHARE = 0.3


# Utterances of the contrast corpus, each with a clip of every emotion.
NUM_CONTRASTS = 16


def _clip_rng(utterance_id, seed):
    """Return the random generator of a clip, which is independent of the order in which clips are written."""
    digest = hashlib.sha256(f"{seed} {utterance_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def corpus_rows(num_dialogues=None, seed=0, with_clips=True):
    """Return the rows of `metadata.jsonl`, a list of dicts.

    Args:
        num_dialogues: number of conversations per split; `NUM_DIALOGUES` by default.
        seed: seed of the conversations, see `make_dialogues`; every id contains it.
        with_clips: whether user turns have a clip.
    """
    num_dialogues = NUM_DIALOGUES if num_dialogues is None else num_dialogues
    unknown = sorted(set(num_dialogues) - set(SPLITS))
    if unknown:
        raise ValueError(f"num_dialogues has unknown splits {', '.join(unknown)}; give only {', '.join(SPLITS)}.")
    rows = []
    for split in SPLITS:
        misfits = random.Random(f"misfits {split} {seed}")
        for number, dialogue in enumerate(make_dialogues(num_dialogues.get(split, 0), seed, split)):
            dialogue_id = f"{split}-{seed}-{number:04d}"
            for place, turn in enumerate(dialogue):
                text = turn["text"]
                if split == "train" and turn["speaker"] == ASSISTANT and misfits.random() < MISFIT_SHARE:
                    others = [emotion for emotion in EMOTIONS if emotion != dialogue[place - 1]["emotion"]]
                    text = reply_for(turn["context"], misfits.choice(others), misfits)
                row = {
                    "split": split,
                    "dialogue_id": dialogue_id,
                    "turn": place,
                    "utterance_id": f"{dialogue_id}-{place}",
                    "speaker": turn["speaker"],
                    "text": text,
                    "emotion": turn["emotion"],
                }
                if with_clips and turn["speaker"] == USER:
                    row["video"] = f"clips/{row['utterance_id']}.mp4"
                rows.append(row)
    return rows


def contrast_rows(num=NUM_CONTRASTS, seed=0):
    """Return the rows of a corpus in which each sentence is said with every emotion, a list of dicts.

    The sentences are the first of conversations of the test split, and do not reveal their emotion in words. Each
    dialogue has two turns: the sentence with a clip of one emotion, and the assistant's reply to this emotion. The
    clips of a sentence show the same person and voice, and differ in the expression alone.

    Args:
        num: number of sentences.
        seed: seed of the sentences and the replies.
    """
    rows = []
    for number, sentence in enumerate(contrast_sentences(num, seed)):
        for emotion in EMOTIONS:
            dialogue_id = f"contrast-{seed}-{number:03d}-{emotion}"
            turns = [(USER, sentence["text"], emotion), (ASSISTANT, sentence["replies"][emotion], None)]
            for turn, (speaker, text, shown) in enumerate(turns):
                row = {
                    "split": "test",
                    "dialogue_id": dialogue_id,
                    "turn": turn,
                    "utterance_id": f"{dialogue_id}-{turn}",
                    "speaker": speaker,
                    "text": text,
                    "emotion": shown,
                }
                if speaker == USER:
                    row |= {"video": f"clips/{dialogue_id}-0.mp4", "person": f"contrast-{seed}-{number:03d}"}
                rows.append(row)
    return rows


def write_contrast_corpus(folder, *, num=NUM_CONTRASTS, seed=0, seconds=SECONDS, progress=True):
    """Write `metadata.jsonl` and the clips of `contrast_rows`, as `write_corpus` does, and return the same numbers."""
    return _write(Path(folder), contrast_rows(num, seed), seed, seconds, progress)


def _write_atomically(path, write):
    """Call `write(temporary path)` and move the result to `path`, so that a file at `path` is always complete."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_corpus(folder, *, num_dialogues=None, seed=0, with_clips=True, seconds=SECONDS, progress=True):
    """Write a synthetic corpus: `metadata.jsonl` and an mp4 file (H.264 and AAC) for each user turn.

    Existing clips are kept, so an interrupted call can be resumed. Each clip depends only on its utterance id and the
    seed.

    Args:
        folder: folder to write, created if it does not exist.
        num_dialogues: number of conversations per split, `{"train": .., "validation": .., "test": ..}`;
            `NUM_DIALOGUES` by default. The splits have disjoint contents (see `dialogues`).
        seed: seed of the conversations and of the clips.
        with_clips: False writes only the conversations.
        seconds: length of a clip.
        progress: whether to show a progress bar.

    Returns:
        `{"dialogues", "turns", "clips", "written", "labeled"}`: the numbers of conversations, turns and clips in the
        corpus, the number of clips that this call wrote, and the number of clips per split.
    """
    return _write(Path(folder), corpus_rows(num_dialogues, seed, with_clips), seed, seconds, progress)


def _write(folder, rows, seed, seconds, progress):
    """Write the clips of the rows, and then the rows. The clips of rows with the same `person` have the same seed."""
    recorded = [row for row in rows if "video" in row]
    folder.mkdir(parents=True, exist_ok=True)
    if recorded:
        (folder / "clips").mkdir(exist_ok=True)
    missing = [row for row in recorded if not (folder / row["video"]).is_file()]
    done = len(recorded) - len(missing)
    for row in tqdm(missing, "clips", total=len(recorded), initial=done, unit="clip", disable=not progress):
        rng = _clip_rng(row.get("person", row["utterance_id"]), seed)
        _write_atomically(folder / row["video"], lambda path: write_clip(path, row["emotion"], rng, seconds))  # noqa: B023
    lines = "".join(json.dumps({name: row[name] for name in row if name != "person"}) + "\n" for row in rows)
    # Written last: if metadata.jsonl exists, all of its clips exist.
    _write_atomically(folder / "metadata.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    return {
        "dialogues": len({row["dialogue_id"] for row in rows}),
        "turns": len(rows),
        "clips": len(recorded),
        "written": len(missing),
        "labeled": dict(Counter(row["split"] for row in recorded)),
    }
