"""The metrics of the paper's Sec. 4.4 and Table 8, and complementary metrics.

Each metric is a pure function of two lists, row by row. Scores are between 0 and 1, `emotion_score` between -1 and 1;
higher is better. An empty reply has no emotion and no words: `emotion_score`, `dist_1` and `corpus_dist_1` raise a
ValueError with its row, unless `allow_empty` is true; then it scores 0. A value that is not a string also raises it.
The other metrics count an empty prediction as wrong.

Metrics that are also modules of `evaluate` are computed in `modules/`, next to the module.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from ..configuration_empathic import EMOTIONS
from .modules.bleu.ngram_overlap import bleu, bleu_counts, bleu_of_counts
from .modules.checked_texts import check_lengths, check_pairs, check_texts
from .modules.dist_n.diversity import corpus_dist_n, dist_n_scores, mean_dist_n, tokens_of
from .modules.emotion_accuracy import confusion
from .modules.emotion_score.emotion_similarity import cosine, emotion_scores

__all__ = [
    "accuracy",
    "bleu",
    "bleu_counts",
    "bleu_of_counts",
    "check_pairs",
    "check_texts",
    "content_recall",
    "corpus_dist_1",
    "corpus_dist_n",
    "cosine",
    "dist_1",
    "dist_n_scores",
    "emotion_score",
    "emotion_scores",
    "exact_match",
    "mean_dist_n",
    "tokens_of",
    "word_recall",
    "words_of",
]

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


def emotion_score(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], features, allow_empty: bool = False
) -> float:
    """
    EmotionScore (Sec. 4.4): the mean of `emotion_scores`.

    The paper does not say which features it uses; report `features.description` with the score.

    Example: features (1, 0) and (0.6, 0.8) for the replies, (1, 0) and (1, 0) for the references: (1 + 0.6) / 2 = 0.8.
    """
    return float(emotion_scores(predictions, references, features, allow_empty).mean())


def dist_1(predictions: Sequence[str], allow_empty: bool = False) -> float:
    """
    Dist-1 as the paper reports it (Sec. 4.4; Li et al., 2016): unique 1-grams / 1-grams of each reply, averaged.

    The paper's values (Table 1) are only possible per reply: over a whole corpus words repeat. Short replies score
    high, so compare replies of similar length. See `dist_n_scores`.

    Example: "no, no, no!" has the tokens no , no , no ! of which 3 of 6 are unique; "i see" has 2 of 2. The mean: 0.75.
    """
    return mean_dist_n(predictions, 1, allow_empty)


def corpus_dist_1(predictions: Sequence[str], allow_empty: bool = False) -> float:
    """Dist-1 of all replies concatenated; see `corpus_dist_n`."""
    return corpus_dist_n(predictions, 1, allow_empty)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Check the texts: one reference per row; an empty prediction is allowed, and counts as wrong."""
    check_texts(predictions, "predictions", allow_empty=True)
    check_texts(references, "references")
    check_lengths(predictions, references)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def word_recall(predictions: Sequence[str], words: Sequence[Sequence[str]]) -> float:
    """
    The share of expected words that the predictions contain; each row has its own list of expected words.

    Use it for facts that only the history gives, such as a name or a city. The words of all rows have equal weight; a
    word that is listed twice must occur twice. Case is ignored.

    Args:
        predictions: the texts.
        words: the expected words of each text, possibly none.

    Returns:
        0 to 1.

    Raises:
        ValueError: if no row has an expected word.

    Example: "you are clara" should say clara, "in rome" should say oslo and rome: 2 of 3 words, 0.667.
    """
    check_texts(predictions, "predictions", allow_empty=True)
    if len(words) != len(predictions):
        raise ValueError(
            f"There are {len(predictions)} predictions but {len(words)} lists of words; give one list per prediction."
        )
    hits = total = 0
    for row, (text, wanted) in enumerate(zip(predictions, words, strict=True)):
        if isinstance(wanted, str):
            raise ValueError(f"words, row {row}: {wanted!r} is a string; give a list of words.")
        needed = Counter(word.lower() for word in wanted)
        hits += (needed & Counter(words_of(text))).total()
        total += needed.total()
    if total == 0:
        raise ValueError("No row has an expected word, so there is nothing to recall.")
    return hits / total


def content_recall(predictions: Sequence[str], references: Sequence[str], content_words: Collection[str]) -> float:
    """
    The share of the references' content words that the predictions contain; complements BLEU for reconstructions.

    BLEU is high for sentences of the right pattern with the wrong names: two random utterances of a small grammar share
    a third of their words. This metric counts only the words that carry the content.

    Args:
        predictions: the texts; an empty text recalls nothing.
        references: one reference per text.
        content_words: the words that count, in lower case.

    Returns:
        0 to 1, see `word_recall`.

    Example: content words clara, dog, oslo; "clara has a cat" for "clara has a dog": 1 of 2, 0.5.
    """
    _check_pairs(predictions, references)
    content = frozenset(content_words)
    return word_recall(predictions, [[word for word in words_of(text) if word in content] for text in references])


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    The share of predictions that equal their reference up to white space. Case matters.

    Returns:
        0 to 1.

    Example: "i  see." for "i see." and "ok" for "OK": 1 of 2, 0.5.
    """
    _check_pairs(predictions, references)
    return float(np.mean([p.split() == r.split() for p, r in zip(predictions, references, strict=True)]))


def accuracy(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] = EMOTIONS) -> dict:
    """
    Emotion accuracy (Fig. 6), with the recall of each class and the confusion matrix.

    See `modules/emotion_accuracy/confusion.py`. The labels default to the seven emotions. An empty prediction is wrong.
    """
    return confusion.accuracy(predictions, references, labels)
