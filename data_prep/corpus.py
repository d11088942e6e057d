"""What an adapter says of its corpus: dialogues of turns, where their clips lie, and what was wrong.

An adapter is a module with `ABOUT` (a `CorpusInfo`) and `read(raw, report, options)`, an iterator of `Dialogue`. It
only reads names, tables and transcripts; the clips are opened, cut and cropped by `pipeline`, in parallel.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


class LayoutError(ValueError):
    """A folder not laid out as its corpus is. The message says what was expected, what is there, and the mend."""


@dataclass(frozen=True)
class Clip:
    """
    Where the sound or the picture of a turn lies.

    Args:
        path: the file.
        name: how the report calls it, relative to the raw folder.
        start, end: seconds in the file that are the turn; the whole file by default.
        crop: `left` or `right`: the half of the picture that is kept.
    """

    path: Path
    name: str
    start: float | None = None
    end: float | None = None
    crop: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the file is the turn as it lies there."""
        return self.start is None and self.end is None and self.crop is None


@dataclass
class Turn:
    """
    One turn, its place in the dialogue being its place in the list.

    Args:
        where: how the report calls it: the file and line, or the file, where its user finds it.
        audio, video: where its sound and picture may lie, the best first: the first that can be read is taken.
        needs_media: a turn of which no clip can be read is left out; else it is kept for the sake of its dialogue.
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
    The choices of `empathic prepare` that adapters read; each reads its own.

    Args:
        unpacked: folder in which archives may be unpacked.
        split_seed: of the splits that a corpus does not publish.
        emotion_map: what the corpus's own labels mean, lower case, over the adapter's own mapping; None drops a label.
        keep_calm: RAVDESS: calm counts as neutral.
        crowd_labels: CREMA-D: the crowd's vote instead of the label of the file name.
        crop: IEMOCAP: the half of the picture that shows the speaker.
        video_pattern: MultiDialog: path of a turn's video below RAW, with `{split}`, `{conv_id}`, `{n}`, `{actor}`,
            `{stem}` in it.
    """

    unpacked: Path
    split_seed: int = 0
    emotion_map: dict[str, str | None] = field(default_factory=dict)
    keep_calm: bool = False
    crowd_labels: bool = False
    crop: bool = True
    video_pattern: str | None = None


@dataclass(frozen=True)
class CorpusInfo:
    """
    What the card of a prepared corpus says of it.

    Args:
        name: the value of the column `corpus`, and of the command.
        title, description: for the card.
        license: the identifier of the Hub's cards, such as `cc-by-nc-sa-4.0`; `other` where it has none.
        license_note: the terms in a sentence.
        redistributable: whether the licence allows to publish the clips.
        homepage: where the corpus is had.
        published: counts that its authors gave, by split (`all` where it publishes no splits): `rows`, `dialogues` and
            the emotions, in this project's names, `none` for turns without one.
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
    What became of each row of a corpus. Nothing vanishes silently: rows found = rows written + rows left out.

    Args:
        corpus: its name.
    """

    corpus: str
    found: int = 0
    left_out: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)
    without_media: list[dict] = field(default_factory=list)
    ignored: list[dict] = field(default_factory=list)

    def find(self, rows: int = 1) -> None:
        """Counts rows that the corpus holds; each is then written or left out."""
        self.found += rows

    def leave_out(self, item: str, reason: str) -> None:
        """Notes that one row that was found, `item` as its user would look for it, is not in the output."""
        self.left_out.append({"item": item, "reason": reason})

    def repair(self, item: str, reason: str) -> None:
        """Notes that `item` is in the output, but not as it came."""
        self.repaired.append({"item": item, "reason": reason})

    def lack_media(self, item: str, reason: str) -> None:
        """Notes that a row is in the output without a clip that it should have."""
        self.without_media.append({"item": item, "reason": reason})

    def ignore(self, item: str, reason: str) -> None:
        """Notes a file or line that is no row, such as a clip that no table names."""
        self.ignored.append({"item": item, "reason": reason})


def hash_split(name: str, seed: int = 0) -> str:
    """The split of a dialogue by the hash of its name: 80 % train, 10 % validation, 10 % test, on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    part = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if part < 0.8 else "validation" if part < 0.9 else "test"


def divide(names: Iterable[str], shares: dict[str, float], seed: int = 0) -> dict[str, str]:
    """
    The split of each name (a speaker, a dialogue), in exact shares.

    Args:
        names: in any order.
        shares: of each split, adding up to 1; the last takes what rounding leaves.
        seed: of the shuffling.

    Example: 24 actors under {"train": 0.8, "validation": 0.1, "test": 0.1} give 19, 3 and 2.
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
