"""
Which emotion of a reply fits which emotion of a clip: a stated table, which a file can replace.

A reply's *fit* with an emotion is the sum of a text classifier's probabilities of the labels that fit the emotion,
each times its weight. The tables below are choices: comfort answers sadness and fear, shared joy answers joy, and so
on. The results contain the table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...configuration_empathic import EMOTIONS

# For the 28 labels of GoEmotions.
GO_EMOTIONS_FITS = {
    "angry": ("anger", "annoyance", "disapproval", "disappointment"),
    "disgust": ("disgust", "disapproval", "annoyance", "embarrassment"),
    "fearful": ("caring", "fear", "nervousness", "optimism", "relief"),
    "happy": ("joy", "excitement", "admiration", "amusement", "gratitude", "love", "pride", "optimism", "relief"),
    "neutral": ("neutral", "approval"),
    "sad": ("caring", "sadness", "remorse", "grief", "disappointment"),
    "surprise": ("surprise", "curiosity", "confusion", "realization", "excitement"),
}
# For classifiers of about seven emotions: the reply shares the emotion. Names that such classifiers use.
SYNONYMS = {
    "angry": ("angry", "anger"),
    "disgust": ("disgust", "disgusted"),
    "fearful": ("fearful", "fear", "afraid", "scared"),
    "happy": ("happy", "joy", "happiness", "joyful"),
    "neutral": ("neutral", "others"),
    "sad": ("sad", "sadness"),
    "surprise": ("surprise", "surprised", "surprising"),
}
# Replies whose likelihood is compared if the data set has no true replies.
PROBES = {
    "angry": ("That is so unfair. I would be furious too.", "You have every right to be angry about that."),
    "disgust": ("Ugh, that is disgusting.", "How gross, I would want to get away from that."),
    "fearful": ("Don't be afraid, I am here with you.", "That sounds scary. Take a deep breath, you are safe."),
    "happy": ("That is wonderful, I am so happy for you!", "How great! Your joy is contagious."),
    "neutral": ("All right, thanks for telling me.", "I see. Is there anything else?"),
    "sad": ("I am so sorry. That must hurt.", "I'm sorry you feel so down. Do you want to talk about it?"),
    "surprise": ("Wow, really? I did not expect that!", "No way! How did that happen?"),
}


@dataclass(frozen=True)
class Appropriateness:
    """
    Which labels of a classifier fit an emotion, and replies that fit it.

    Args:
        fits: {emotion: {label: weight}}.
        replies: {emotion: replies that fit it}.
        source: where the table comes from.
    """

    fits: Mapping[str, Mapping[str, float]]
    replies: Mapping[str, Sequence[str]]
    source: str

    def weights(self, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """
        The weight of each label of a classifier, (labels,), for each emotion of the table.

        Raises:
            ValueError: if the table names a label that the classifier does not have.
        """
        places = {label.lower(): place for place, label in enumerate(labels)}
        found = {}
        for emotion, those in self.fits.items():
            found[emotion] = np.zeros(len(labels))
            for label, weight in those.items():
                if label.lower() not in places:
                    raise ValueError(
                        f"{self.source}: {emotion}: {label!r} is no label of the classifier, whose labels are "
                        f"{', '.join(labels)}. Name these in the table."
                    )
                found[emotion][places[label.lower()]] = weight
        return found

    def differs(self, one: str, other: str) -> bool:
        """Whether something else fits one emotion than fits the other."""
        return dict(self.fits[one]) != dict(self.fits[other])

    def as_json(self) -> dict:
        """The table for the results."""
        return {
            "source": self.source,
            "fits": {emotion: dict(those) for emotion, those in self.fits.items()},
            "replies": {emotion: list(those) for emotion, those in self.replies.items()},
        }


def read_appropriateness(path: str | Path | None, labels: Sequence[str]) -> Appropriateness:
    """
    Read the table from a JSON file, or choose the default table for the labels of a classifier.

    Args:
        path: a file `{"fits": {emotion: [labels] or {label: weight}}, "replies": {emotion: [texts]}}`, in which
            `replies` may be left out; None for the default.
        labels: the labels of the classifier.

    Raises:
        ValueError: if the file cannot be used, or there is no default for these labels.
    """
    if path is None:
        return _default(labels)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). Give a table of `fits`, see the docs.") from None
    if not isinstance(content, dict) or not isinstance(content.get("fits"), dict):
        raise ValueError(f'{path}: has no "fits". Write {{"fits": {{"happy": ["joy"], ...}}}}.')
    fits = {emotion: _weights(path, emotion, those) for emotion, those in content["fits"].items()}
    replies = content.get("replies", PROBES)
    for emotion in (*fits, *replies):
        if emotion not in EMOTIONS:
            raise ValueError(f"{path}: {emotion!r} is no emotion of a clip; these are {', '.join(EMOTIONS)}.")
    for emotion, texts in replies.items():
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}: the replies for {emotion} are {texts!r}; give a list of texts.")
    missing = [emotion for emotion in EMOTIONS if emotion not in fits]
    if missing:
        raise ValueError(f"{path}: nothing fits {', '.join(missing)}. Give each of the seven emotions its labels.")
    table = Appropriateness(fits, {**PROBES, **replies}, str(path))
    table.weights(labels)
    return table


def _weights(path, emotion: str, those) -> dict[str, float]:
    if isinstance(those, list):
        those = dict.fromkeys(those, 1.0) if all(isinstance(label, str) for label in those) else None
    if (
        not isinstance(those, dict)
        or not those
        or not all(isinstance(weight, int | float) and 0 <= weight <= 1 for weight in those.values())
        or not any(those.values())
    ):
        raise ValueError(
            f"{path}: {emotion}: give a list of labels, or weights from 0 to 1 of labels, of which one is above 0."
        )
    return {label: float(weight) for label, weight in those.items()}


def _default(labels: Sequence[str]) -> Appropriateness:
    names = [label.lower() for label in labels]
    if {label for those in GO_EMOTIONS_FITS.values() for label in those} <= set(names):
        fits = {emotion: dict.fromkeys(those, 1.0) for emotion, those in GO_EMOTIONS_FITS.items()}
        return Appropriateness(fits, PROBES, "default table for GoEmotions")
    fits = {emotion: {label: 1.0 for label in names if label in those} for emotion, those in SYNONYMS.items()}
    missing = [emotion for emotion, those in fits.items() if not those]
    if missing:
        raise ValueError(
            f"There is no default table for a classifier with the labels {', '.join(labels)}: no label is known to fit "
            f"{', '.join(missing)}. Give a table with --appropriateness FILE."
        )
    return Appropriateness(fits, PROBES, "default table: the reply shares the emotion of the clip")
