"""Dist-n: how many of the words are different ones."""

import re
from collections.abc import Sequence

import numpy as np

from .checked_texts import check_texts

# A word with its apostrophes and hyphens, or else any single mark; an underscore is a mark.
_TOKEN = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|[^\s\w]|_")


def tokens_of(text: str) -> list[str]:
    """The 1-grams of Dist-1: lower-case words, and each punctuation mark by itself."""
    return _TOKEN.findall(text.lower())


def ngrams_of(text: str, n: int) -> list[tuple[str, ...]]:
    """The runs of `n` tokens of a text, in order; none if it is shorter."""
    tokens = tokens_of(text)
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def _check(predictions: Sequence[str], n: int, allow_empty: bool) -> None:
    check_texts(predictions, "predictions", allow_empty)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; Dist-n takes runs of 1 token or more.")


def dist_n_scores(predictions: Sequence[str], n: int = 1, allow_empty: bool = False) -> np.ndarray:
    """
    Dist-n of each reply: unique n-grams / n-grams (paper's Sec. 4.4 with n = 1; after Li et al., 2016).

    Args:
        predictions: the replies.
        n: tokens of an n-gram.
        allow_empty: takes empty replies, which score 0.

    Returns:
        `(len(predictions),)`, each above 0, to 1; NaN for a reply of 1 to n - 1 tokens, which has no n-gram.

    Raises:
        ValueError: for a reply that is empty or no string, naming its row, or an `n` under 1.

    Example: n = 1, "no, no, no!" has the tokens no , no , no ! of which 3 of 6 are unique: 0.5.
    """
    _check(predictions, n, allow_empty)
    replies = [ngrams_of(text, n) for text in predictions]
    without = [np.nan if text.strip() else 0.0 for text in predictions]
    return np.array([len(set(r)) / len(r) if r else none for r, none in zip(replies, without, strict=True)])


def mean_dist_n(predictions: Sequence[str], n: int = 1, allow_empty: bool = False) -> float:
    """
    The mean of `dist_n_scores` over the replies that have an n-gram.

    Raises:
        ValueError: as `dist_n_scores`, and if no reply has one.
    """
    scores = dist_n_scores(predictions, n, allow_empty)
    if np.isnan(scores).all():
        raise ValueError(f"No reply has {n} tokens, so there is no Dist-{n}.")
    return float(np.nanmean(scores))


def corpus_dist_n(predictions: Sequence[str], n: int = 1, allow_empty: bool = False) -> float:
    """
    Dist-n of all replies taken together: unique n-grams / n-grams of the whole list.

    N-grams do not reach from one reply into the next. The value falls as the list grows: compare lists of one size. Li
    et al. (2016) divide by the number of words; by that of n-grams, as here, 1 is reached for every n.

    Args:
        predictions, n: see `dist_n_scores`.
        allow_empty: takes empty replies, which add nothing.

    Returns:
        above 0, to 1.

    Raises:
        ValueError: as `dist_n_scores`, and if no reply has an n-gram.

    Example: "i see" twice: 2 unique of 4 tokens, 0.5 (where the mean over replies is 1).
    """
    _check(predictions, n, allow_empty)
    ngrams = [ngram for text in predictions for ngram in ngrams_of(text, n)]
    if not ngrams:
        raise ValueError(f"No reply has {n} tokens, so there is no Dist-{n}.")
    return len(set(ngrams)) / len(ngrams)
