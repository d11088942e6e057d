"""The metrics of the paper's Sec. 4.4 and Table 8, and those that keep them honest.

Each is a pure function of two lists, row by row. Every score lies between 0 and 1, except `emotion_score` (-1 to 1),
and more is better. A reply that is empty or no string has no emotion and no words: `emotion_score`, `dist_1` and
`corpus_dist_1` raise a ValueError that names its row, unless `allow_empty` says that it scores 0. The other metrics
count an empty prediction as wrong.

Those that are modules of `evaluate` too are computed in `modules/`, beside their definition.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from empathic.configuration_empathic import EMOTIONS
from empathic.evaluation.modules.bleu.ngram_overlap import bleu, bleu_counts, bleu_of_counts
from empathic.evaluation.modules.checked_texts import check_lengths, check_pairs, check_texts
from empathic.evaluation.modules.dist_n.diversity import (
    corpus_dist_n,
    dist_n_scores,
    mean_dist_n,
    tokens_of,
)
from empathic.evaluation.modules.emotion_accuracy import confusion
from empathic.evaluation.modules.emotion_score.emotion_similarity import cosine, emotion_scores

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

    The paper does not say which features it takes; print `features.description` beside the score.

    Example: features (1, 0) and (0.6, 0.8) for the replies, (1, 0) and (1, 0) for the references: (1 + 0.6) / 2 = 0.8.
    """
    return float(emotion_scores(predictions, references, features, allow_empty).mean())


def dist_1(predictions: Sequence[str], allow_empty: bool = False) -> float:
    """
    Dist-1 as the paper reports it (Sec. 4.4; Li et al., 2016): unique 1-grams / 1-grams of each reply, averaged.

    The paper's values (Table 1) are possible a reply at a time only: over a whole corpus words repeat. Short replies
    score high: compare it at similar lengths. See `dist_n_scores`.

    Example: "no, no, no!" has the tokens no , no , no ! of which 3 of 6 are unique; "i see" has 2 of 2. Together 0.75.
    """
    return mean_dist_n(predictions, 1, allow_empty)


def corpus_dist_1(predictions: Sequence[str], allow_empty: bool = False) -> float:
    """Dist-1 of all replies taken together; see `corpus_dist_n`."""
    return corpus_dist_n(predictions, 1, allow_empty)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """One reference a row; an empty prediction is wrong rather than an error."""
    check_texts(predictions, "predictions", allow_empty=True)
    check_texts(references, "references")
    check_lengths(predictions, references)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def word_recall(predictions: Sequence[str], words: Sequence[Sequence[str]]) -> float:
    """
    The share of the wanted words that are said: each row has its own list of them.

    Use it for what only the history could tell: a name, a city. The words of all rows count alike; a word that is
    wanted twice has to be said twice. Case does not count.

    Args:
        predictions: the texts.
        words: for each text the words that it should say, possibly none.

    Returns:
        0 to 1.

    Raises:
        ValueError: if no row wants a word.

    Example: "you are clara" wants clara, "in rome" wants oslo and rome: 2 of 3 words, 0.667.
    """
    check_texts(predictions, "predictions", allow_empty=True)
    if len(words) != len(predictions):
        raise ValueError(f"There are {len(predictions)} predictions but {len(words)} lists of words.")
    hits = total = 0
    for row, (text, wanted) in enumerate(zip(predictions, words, strict=True)):
        if isinstance(wanted, str):
            raise ValueError(f"words, row {row}: {wanted!r} is a string; give a list of words.")
        needed = Counter(word.lower() for word in wanted)
        hits += (needed & Counter(words_of(text))).total()
        total += needed.total()
    if total == 0:
        raise ValueError("No row wants a word, so there is nothing to recall.")
    return hits / total


def content_recall(predictions: Sequence[str], references: Sequence[str], content_words: Collection[str]) -> float:
    """
    The share of the references' content words that the predictions say (beside BLEU for rebuilt conversations).

    BLEU is high for sentences of the right pattern with the wrong names: two random utterances of a small grammar share
    a third of their words. This counts what carries the content.

    Args:
        predictions: the texts; an empty one recalls nothing.
        references: one a text.
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
    The share of predictions that equal their reference, runs of white space taken as one space. Case counts.

    Returns:
        0 to 1.

    Example: "i  see." for "i see." and "ok" for "OK": 1 of 2, 0.5.
    """
    _check_pairs(predictions, references)
    return float(np.mean([p.split() == r.split() for p, r in zip(predictions, references, strict=True)]))


def accuracy(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] = EMOTIONS) -> dict:
    """
    Accuracy of named emotions (Fig. 6), with each class's recall and the confusion.

    As `modules/emotion_accuracy/confusion.py` has it, with the seven emotions as labels; an empty prediction is wrong.
    """
    return confusion.accuracy(predictions, references, labels)
