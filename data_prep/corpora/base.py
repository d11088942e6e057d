"""Data structures that corpus adapters return: dialogues of turns, the locations of their clips, and the report.

An adapter is a module with `ABOUT` (a `CorpusInfo`) and `read(raw, report, options)`, an iterator of `Dialogue`. It
reads only file names, tables and transcripts; `pipeline` opens, cuts and crops the clips in parallel.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


class LayoutError(ValueError):
    """A folder has an unexpected layout. The message gives what was expected, what was found and the remedy."""


@dataclass(frozen=True)
class Clip:
    """
    The location of the audio or video of a turn.

    Args:
        path: the file.
        name: the name of the file in the report, relative to the raw folder.
        start, end: the turn's range in the file, in seconds; the whole file by default.
        crop: `left` or `right`: the half of the video frame to keep.
    """

    path: Path
    name: str
    start: float | None = None
    end: float | None = None
    crop: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the turn is the whole file, neither cut nor cropped."""
        return self.start is None and self.end is None and self.crop is None


@dataclass
class Turn:
    """
    One turn of a dialogue. The order of the turns is their order in the list of the dialogue.

    Args:
        where: the location of the turn in the report: the file and line, or the file.
        audio, video: candidate clips for the audio and the video, best first; the first readable clip is used.
        needs_media: if True, a turn without a readable clip is left out; if False, it is kept to complete its dialogue.
    """

    where: str
    utterance_id: str
    speaker: str
    text: str
    emotion: str | None
    start: float | None = None
    end: float | None = None
    audio: tuple[Clip, ...] = ()
    video: tuple[Clip, ...] = ()
    needs_media: bool = False


@dataclass
class Dialogue:
    """The turns of a dialogue, in order. `dialogue_id` is unique in its split."""

    split: str
    dialogue_id: str
    turns: list[Turn]


@dataclass(frozen=True)
class Options:
    """
    Options of `empathic prepare` for the adapters. Each adapter reads only some of the options.

    Args:
        unpacked: folder to unpack archives into.
        split_seed: seed of the splits, for a corpus without published splits.
        emotion_map: maps the corpus's labels, in lower case, to emotions and overrides the adapter's own mapping; None
            drops a label.
        keep_calm: RAVDESS: map calm to neutral.
        crowd_labels: CREMA-D: use the crowd's vote instead of the label in the file name.
        crop: IEMOCAP: crop the video to the half that shows the speaker.
        video_pattern: MultiDialog: path of a turn's video below RAW, with the fields `{split}`, `{conv_id}`, `{n}`,
            `{actor}` and `{stem}`.
        text_only: MELD, AvaMERG: read the tables alone, without clips.
    """

    unpacked: Path
    split_seed: int = 0
    emotion_map: dict[str, str | None] = field(default_factory=dict)
    keep_calm: bool = False
    crowd_labels: bool = False
    crop: bool = True
    video_pattern: str | None = None
    text_only: bool = False


@dataclass(frozen=True)
class CorpusInfo:
    """
    Facts about a corpus for the card of the prepared corpus.

    Args:
        name: the name of the corpus in the column `corpus` and on the command line.
        title, description: title and description on the card.
        license: the license identifier of the Hub, such as `cc-by-nc-sa-4.0`; `other` if the Hub has no identifier.
        license_note: the license terms in a sentence.
        redistributable: whether the license allows publishing the clips.
        homepage: where to get the corpus.
        published: counts published by the authors, per split (`all` if there are no published splits): `rows`,
            `dialogues` and the emotions under this project's names, with `none` for turns without an emotion.
    """

    name: str
    title: str
    description: str
    license: str
    license_note: str
    redistributable: bool
    homepage: str
    published: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class Report:
    """
    Report on every row of a corpus. No row is dropped silently: rows found = rows written + rows left out.

    Args:
        corpus: the name of the corpus.
    """

    corpus: str
    found: int = 0
    left_out: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)
    without_media: list[dict] = field(default_factory=list)
    ignored: list[dict] = field(default_factory=list)

    def find(self, rows: int = 1) -> None:
        """Count rows found in the corpus; each is then written or left out."""
        self.found += rows

    def leave_out(self, item: str, reason: str) -> None:
        """Record that a row that was found is left out of the output; `item` is its location."""
        self.left_out.append({"item": item, "reason": reason})

    def repair(self, item: str, reason: str) -> None:
        """Record that `item` is in the output with a change."""
        self.repaired.append({"item": item, "reason": reason})

    def lack_media(self, item: str, reason: str) -> None:
        """Record that a row is in the output without a clip that it should have."""
        self.without_media.append({"item": item, "reason": reason})

    def ignore(self, item: str, reason: str) -> None:
        """Record a file or line that is not a row, such as a clip that is in no table."""
        self.ignored.append({"item": item, "reason": reason})


def hash_split(name: str, seed: int = 0) -> str:
    """Assign a dialogue to a split by the hash of its name: 80% train, 10% validation, 10% test, reproducibly."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    part = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if part < 0.8 else "validation" if part < 0.9 else "test"


def divide(names: Iterable[str], shares: dict[str, float], seed: int = 0) -> dict[str, str]:
    """
    Assign each name (a speaker or a dialogue) to a split, at random and in exact shares.

    Args:
        names: the names, in any order.
        shares: share of each split, with sum 1; the last split gets the rest after rounding.
        seed: seed of the shuffling.

    Example: 24 actors with {"train": 0.8, "validation": 0.1, "test": 0.1} give 19, 3 and 2.
    """
    shuffled = sorted(set(names))
    random.Random(seed).shuffle(shuffled)
    splits, start, total = {}, 0, 0.0
    for place, (split, share) in enumerate(shares.items()):
        total += share
        end = len(shuffled) if place == len(shares) - 1 else round(total * len(shuffled))
        splits.update(dict.fromkeys(shuffled[start:end], split))
        start = end
    return splits
