"""The emotion of a reply, named by a text classifier as one of the seven emotions."""

from collections.abc import Sequence

from .contrast.appropriateness import SYNONYMS

# GoEmotions' own grouping of its labels by Ekman's emotions (Demszky et al., 2020), under this project's names.
GO_EMOTIONS_GROUPS = {
    "angry": ("anger", "annoyance", "disapproval"),
    "disgust": ("disgust",),
    "fearful": ("fear", "nervousness"),
    "happy": (
        *("joy", "amusement", "approval", "excitement", "gratitude", "love", "optimism", "relief", "pride"),
        *("admiration", "desire", "caring"),
    ),
    "neutral": ("neutral",),
    "sad": ("sadness", "disappointment", "embarrassment", "grief", "remorse"),
    "surprise": ("surprise", "realization", "confusion", "curiosity"),
}


def emotion_of_labels(labels: Sequence[str]) -> list[str | None]:
    """
    The emotion of each label of a classifier; None for a label of no emotion.

    Raises:
        ValueError: if one of the seven emotions has no label.
    """
    names = [label.lower() for label in labels]
    groups = GO_EMOTIONS_GROUPS if {"annoyance", "grief"} <= set(names) else SYNONYMS
    emotion_of = {label: emotion for emotion, those in groups.items() for label in those}
    found = [emotion_of.get(name) for name in names]
    missing = [emotion for emotion in groups if emotion not in found]
    if missing:
        raise ValueError(
            f"the classifier's labels, {', '.join(labels)}, do not name {', '.join(missing)}; use one of emotions"
        )
    return found


def name_reply_emotions(replies: Sequence[str], features) -> list[str | None]:
    """
    Name the emotion of each reply: that of the classifier's most probable label.

    Args:
        replies: the replies; an empty one has no emotion.
        features: an `EmotionFeatures`.

    Raises:
        ValueError: as `emotion_of_labels`.
    """
    emotions = emotion_of_labels(features.labels)
    said = [text for text in dict.fromkeys(replies) if text.strip()]
    if not said:
        return [None] * len(replies)
    best = features.with_pooling("probabilities").encode(said).argmax(axis=1)
    named = {text: emotions[place] for text, place in zip(said, best.tolist(), strict=True)}
    return [named.get(text) for text in replies]
