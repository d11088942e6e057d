"""
Find utterances with clips of several emotions in a prepared data set.

- `same`: clips in which the same speaker says the same words, after the same history, with different emotions, as in
  RAVDESS and CREMA-D. The takes of a sentence are numbered in the order of their ids; take n of each emotion belongs to
  one utterance.
- `swap`: any other corpus. The clip of a turn is replaced by clips of other emotions of the same speaker. Here the
  words were spoken in one of the clips only.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ...configuration_empathic import EMOTIONS
from ...data_prep.clip_digests import MEDIA_KINDS
from ...data_prep.messages import clip_message, sample_id
from ...data_prep.views import DialogueSamples, EmotionClips, is_there
from ..saved_clips import order_of

SOURCES = ("auto", "same", "swap")


@dataclass(frozen=True)
class ContrastClip:
    """
    A clip of an utterance.

    Args:
        row: row of the data set that has the clip.
        name: the corpus's id of that row.
        emotion: emotion of the clip.
        recorded: whether the words of the utterance are spoken in the clip.
        reply: true reply to the words in this clip; empty if unknown.
    """

    row: int
    name: str
    emotion: str
    recorded: bool
    reply: str


@dataclass(frozen=True)
class ContrastUtterance:
    """
    Words with clips of different emotions.

    Args:
        name: `corpus/split/dialogue/turn` of the first clip.
        sample: place in the samples of the prompt with the words and their history.
        speaker: who speaks.
        kinds: kinds of all clips, of `audio` and `video`.
        clips: the clips, at least two, each of another emotion; the first is recorded.
    """

    name: str
    sample: int
    speaker: str
    kinds: tuple[str, ...]
    clips: tuple[ContrastClip, ...]

    def pairs(self) -> list[tuple[int, int]]:
        """The ordered pairs of clips (right, wrong): the words are spoken in the first, the emotions differ."""
        places = range(len(self.clips))
        return [(right, wrong) for right in places if self.clips[right].recorded for wrong in places if wrong != right]


@dataclass(frozen=True)
class _Turn:
    """A labeled turn with a clip: its place in the samples, its row, and what identifies it."""

    sample: int
    row: int
    words: tuple
    kinds: tuple[str, ...]


class ContrastPrompts:
    """
    The turns of a data set that have an emotion and a clip, and their prompts.

    If a turn of the data set answers another, the turns that are answered count (`DialogueSamples`). Otherwise each
    labeled clip is a conversation of its own, without a true reply (`EmotionClips`).

    Args:
        dataset: rows of the schema.
        reply_speakers: speakers whose replies count; all by default.
    """

    def __init__(self, dataset: Dataset, reply_speakers: Sequence[str] | None = None):
        self.dataset = dataset
        replies = DialogueSamples(dataset, reply_speakers)
        self.has_replies = len(replies) > 0
        self.samples = replies if self.has_replies else EmotionClips(dataset)
        places = self.samples.places
        # (samples, 3): first row of the dialogue, row of the turn with the clip, row of the reply or -1
        self.rows = np.stack(
            [places[:, 0], places[:, 1] - 1, places[:, 1]] if self.has_replies else [places, places, 0 * places - 1],
            axis=1,
        )
        names = ("corpus", "split", "dialogue_id", "turn", "utterance_id", "speaker", "text", "emotion")
        self.columns = {name: dataset.with_format(None)[name][:] for name in names}
        self.has = {kind: is_there(dataset, kind) for kind in MEDIA_KINDS}

    def turns(self) -> tuple[list[_Turn], int]:
        """The turns with an emotion and a clip, and the number of further turns that could be answered."""
        found = []
        for sample, (first, row, _) in enumerate(self.rows.tolist()):
            kinds = tuple(kind for kind in MEDIA_KINDS if self.has[kind][row])
            if kinds and self.columns["emotion"][row] is not None:
                found.append(_Turn(sample, row, self._words(first, row), kinds))
        return found, len(self.rows) - len(found)

    def _words(self, first: int, row: int) -> tuple:
        """The words of a turn after their history, and who says them."""
        said = [(self.columns["speaker"][at], self.columns["text"][at].strip().lower()) for at in range(first, row + 1)]
        return (self.columns["corpus"][row], self.columns["split"][row], *said)

    def speaker(self, row: int) -> tuple[str, str, str]:
        """The corpus, the split and the speaker of a row; names of speakers are unique in a corpus only."""
        return tuple(self.columns[name][row] for name in ("corpus", "split", "speaker"))

    def clip(self, turn: _Turn, recorded: bool = True) -> ContrastClip:
        """The clip of a turn, with the true reply if the words of the utterance are spoken in it."""
        reply = int(self.rows[turn.sample][2])
        return ContrastClip(
            turn.row,
            self.columns["utterance_id"][turn.row],
            self.columns["emotion"][turn.row],
            recorded,
            self.columns["text"][reply] if recorded and reply >= 0 else "",
        )

    def utterance(self, turns: Sequence[_Turn], recorded: int) -> ContrastUtterance:
        """An utterance with the words of the first turn; the first `recorded` turns are recordings of these words."""
        base = turns[0]
        clips = tuple(self.clip(turn, place < recorded) for place, turn in enumerate(turns))
        return ContrastUtterance(self.name_of(base.row), base.sample, self.speaker(base.row)[2], base.kinds, clips)

    def name_of(self, row: int) -> str:
        """`corpus/split/dialogue/turn` of a row."""
        return sample_id({name: self.columns[name][row] for name in ("corpus", "split", "dialogue_id", "turn")})

    def prompt(self, utterance: ContrastUtterance) -> list[dict]:
        """The messages of an utterance with the clip of its first turn."""
        if self.has_replies:
            return self.samples[utterance.sample]["prompt"]
        return [clip_message(self.samples[utterance.sample], MEDIA_KINDS)]

    def media(self, row: int, kind: str) -> dict:
        """The audio or video of a row as a content item."""
        item = self.samples.dataset[row][kind]
        return {"type": kind, **{name: item[name] for name in ("path", "bytes") if item.get(name) is not None}}


def find_utterances(
    prompts: ContrastPrompts,
    source: str = "auto",
    swaps: int = 2,
    limit: int | None = None,
) -> tuple[list[ContrastUtterance], dict]:
    """
    Find the utterances of a data set.

    Args:
        prompts: the data set.
        source: `same`, `swap`, or `auto`: `same` if at least half of the labeled clips have a recording of the same
            words with another emotion.
        swaps: maximum number of swapped clips of an utterance, each of another emotion.
        limit: maximum number of utterances, chosen reproducibly; None for no limit.

    Returns:
        The utterances in the order of the data set, and what was found: `source`, `clips` (labeled clips), `utterances`
        (before the limit), and `left_out`: {reason: number of labeled clips}.

    Raises:
        ValueError: if the source is unknown, or there is no utterance.
    """
    if source not in SOURCES:
        raise ValueError(f"The source of the pairs is {source!r}; it is one of {', '.join(SOURCES)}.")
    turns, unlabeled = prompts.turns()
    left_out: Counter = Counter()
    if unlabeled:
        left_out["it has no emotion or no clip"] = unlabeled
    same, alone = _same_words(prompts, turns)
    if source == "auto":
        source = "same" if 2 * alone <= len(turns) and same else "swap"
    if source == "same":
        found = same
        left_out["no clip of the same words has another emotion"] = alone
    else:
        found, alone = _swapped(prompts, turns, swaps)
        left_out["the speaker has no clip of another emotion"] = alone
    if not found:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.items() if count)
        raise ValueError(
            f"No utterance has clips of two emotions ({len(turns)} labeled clips; {reasons or 'no labeled clip'}). "
            "Choose another split or another data set."
        )
    about = {"source": source, "clips": len(turns), "utterances": len(found)}
    if limit is not None and limit < len(found):
        chosen = sorted(found, key=lambda utterance: order_of(utterance.name))[:limit]
        found = sorted(chosen, key=lambda utterance: utterance.sample)
    return found, {**about, "left_out": {reason: count for reason, count in left_out.items() if count}}


def _same_words(prompts: ContrastPrompts, turns: Sequence[_Turn]) -> tuple[list[ContrastUtterance], int]:
    """The utterances of `same`, and the number of clips without an utterance."""
    takes: dict[tuple, dict[str, list[_Turn]]] = defaultdict(lambda: defaultdict(list))
    for turn in turns:
        if turn.words[-1][1]:  # no words are not the same words
            takes[turn.words, turn.kinds][prompts.columns["emotion"][turn.row]].append(turn)
    found, used = [], 0
    for by_emotion in takes.values():
        if len(by_emotion) < 2:
            continue
        for those in by_emotion.values():
            those.sort(key=lambda turn: prompts.columns["utterance_id"][turn.row])
        for number in range(max(map(len, by_emotion.values()))):
            chosen = [
                by_emotion[emotion][number]
                for emotion in EMOTIONS
                if emotion in by_emotion and number < len(by_emotion[emotion])
            ]
            if len(chosen) > 1:
                used += len(chosen)
                found.append(prompts.utterance(chosen, len(chosen)))
    return sorted(found, key=lambda utterance: utterance.sample), len(turns) - used


def _swapped(prompts: ContrastPrompts, turns: Sequence[_Turn], swaps: int) -> tuple[list[ContrastUtterance], int]:
    """The utterances of `swap`, and the number of clips without another emotion of the same speaker."""
    spoken: dict[tuple, dict[str, list[_Turn]]] = defaultdict(lambda: defaultdict(list))
    for turn in turns:
        spoken[prompts.speaker(turn.row), turn.kinds][prompts.columns["emotion"][turn.row]].append(turn)
    found = []
    for turn in turns:
        name, emotion = prompts.name_of(turn.row), prompts.columns["emotion"][turn.row]
        there = spoken[prompts.speaker(turn.row), turn.kinds]
        others = sorted((other for other in there if other != emotion), key=lambda other: order_of(f"{name} {other}"))
        chosen = [
            there[other][int.from_bytes(order_of(f"{name} {other} clip")[:8], "big") % len(there[other])]
            for other in others[:swaps]
        ]
        if chosen:
            found.append(prompts.utterance([turn, *chosen], 1))
    return found, len(turns) - len(found)
