"""EmotionScore: do a reply and the true reply carry the same emotion?"""

from collections.abc import Sequence

import numpy as np

from .checked_texts import check_pairs


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row cosine (n,) of vectors `a` and `b` (n, dim) of length 1, such as `EmotionFeatures.encode` gives."""
    return np.clip(np.einsum("nd,nd->n", a, b, dtype=np.float64), -1.0, 1.0)


def emotion_scores(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    features,
    allow_empty: bool = False,
) -> np.ndarray:
    """
    EmotionScore of each reply (paper's Sec. 4.4): the cosine of its features and its reference's.

    Args:
        predictions: the replies.
        references: of each row the true reply, or a list of replies any of which would be right: the most similar one
            counts.
        features: an `EmotionFeatures`, or any object whose `encode(texts)` gives rows of length 1.
        allow_empty: takes empty replies, which score 0.

    Returns:
        `(len(predictions),)`, each from -1 to 1.

    Raises:
        ValueError: for a row that is empty or no string, naming it.

    Example: features (0.6, 0.8) of the reply, (1, 0) and (0, 1) of its two references: the cosines are 0.6 and 0.8, so
    0.8.
    """
    lists = check_pairs(predictions, references, allow_empty)
    said = [row for row, text in enumerate(predictions) if text.strip()]
    scores = np.zeros(len(predictions))
    if not said:
        return scores
    counts = [len(lists[row]) for row in said]
    starts = np.cumsum([0, *counts[:-1]])
    vectors = features.encode([*(predictions[row] for row in said), *(text for row in said for text in lists[row])])
    replies = np.repeat(vectors[: len(said)], counts, axis=0)  # (references, dim)
    scores[said] = np.maximum.reduceat(cosine(replies, vectors[len(said) :]), starts)
    return scores
