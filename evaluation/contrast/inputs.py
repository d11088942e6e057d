"""The distinct inputs of a system: clips that it cannot tell apart are answered once."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...data_prep.clip_digests import MEDIA_KINDS
from ...data_prep.messages import message_text
from .conditions import OWN, Blanks, distinct_conditions, treatment
from .utterances import ContrastPrompts, ContrastUtterance


@dataclass(frozen=True)
class Given:
    """What a system is given of one kind: the `audio` or `video` of a row, or a blank file (then `row` is -1)."""

    kind: str
    row: int
    name: str
    blank: str = ""


@dataclass(frozen=True)
class ContrastInput:
    """An utterance with what a system is given of a clip: nothing, or a `Given` of each kind."""

    utterance: int
    given: tuple[Given, ...]
    emotion: str | None

    @property
    def name(self) -> str:
        """Names the clip in the id of a reply."""
        return ",".join(f"{given.kind}={given.name}" for given in self.given) or "no clip"


class ContrastInputs(Sequence):
    """
    The inputs of a system as samples for `write_replies`.

    Two clips of an utterance are one input if the system is given the same of both: a system without clips has one
    input per utterance, and so gives one reply, however its replies are computed or sampled. All inputs of an utterance
    are sampled with the same seed.

    Args:
        prompts: the data set.
        utterances: the utterances.
        conditions: names from `CONDITIONS`.
        clip_kinds: the kinds of clips that the system gets.
        blanks: makes the blanks.
        candidates: for each utterance the replies whose likelihood is computed; None to generate replies.

    Attributes:
        conditions: the conditions that differ for this system.
        inputs: the distinct inputs.
        places: {condition: [place of the input of each clip, for each utterance]}.
    """

    def __init__(
        self,
        prompts: ContrastPrompts,
        utterances: Sequence[ContrastUtterance],
        conditions: Sequence[str],
        clip_kinds: Sequence[str],
        blanks: Blanks,
        candidates: Sequence[Sequence[str]] | None = None,
    ):
        self.prompts, self.utterances, self.candidates = prompts, utterances, candidates
        there = {kind for utterance in utterances for kind in utterance.kinds}
        kinds = tuple(kind for kind in MEDIA_KINDS if kind in there and kind in clip_kinds)
        self.conditions = distinct_conditions(list(conditions), kinds)
        known: dict[ContrastInput, int] = {}
        self.places: dict[str, list[list[int]]] = {}
        for condition in self.conditions:
            given = dict(treatment(condition, kinds))
            self.places[condition] = [
                [
                    known.setdefault(self._input(number, clip, given, blanks), len(known))
                    for clip in range(len(utterance.clips))
                ]
                for number, utterance in enumerate(utterances)
            ]
        # In the order of the utterances, so that a batch has inputs of similar length.
        self.inputs = sorted(known, key=lambda each: (each.utterance, known[each]))
        moved = {known[each]: place for place, each in enumerate(self.inputs)}
        for places in self.places.values():
            places[:] = [[moved[place] for place in those] for those in places]

    def _input(self, number: int, place: int, given: dict[str, str], blanks: Blanks) -> ContrastInput:
        utterance = self.utterances[number]
        clip, found, own = utterance.clips[place], [], False
        for kind in utterance.kinds:
            if given.get(kind) == OWN:
                found.append(Given(kind, clip.row, clip.name))
                own = True
            elif kind in given:
                items = (self.prompts.media(each.row, kind) for each in utterance.clips)
                blank = blanks.of(utterance.name, kind, items)
                if blank is not None:
                    found.append(Given(kind, -1, "silence" if kind == "audio" else "gray", blank["path"]))
        return ContrastInput(number, tuple(found), clip.emotion if own else None)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> dict:
        each = self.inputs[place]
        utterance = self.utterances[each.utterance]
        *earlier, last = self.prompts.prompt(utterance)
        media = [
            {"type": given.kind, "path": given.blank} if given.blank else self.prompts.media(given.row, given.kind)
            for given in each.given
        ]
        text = [{"type": "text", "text": message_text(last)}] if message_text(last) else []
        corpus, split, dialogue, turn = self._ids(utterance)
        sample = {
            "prompt": [*earlier, {**last, "content": [*media, *text]}],
            "reply": self._reply(each),
            "emotion": each.emotion,
            "seeded_by": utterance.name,
            **{"corpus": corpus, "split": split, "dialogue_id": dialogue, "turn": f"{turn}/{each.name}"},
        }
        if self.candidates is not None:
            sample["candidates"] = list(self.candidates[each.utterance])
        return sample

    def _ids(self, utterance: ContrastUtterance) -> tuple[str, str, str, int]:
        row = utterance.clips[0].row
        return tuple(self.prompts.columns[name][row] for name in ("corpus", "split", "dialogue_id", "turn"))

    def _reply(self, each: ContrastInput) -> str:
        if self.candidates is not None:
            return "\n".join(self.candidates[each.utterance])
        clips = {clip.row: clip.reply for clip in self.utterances[each.utterance].clips}
        return next((clips[given.row] for given in each.given if given.row >= 0), "")
