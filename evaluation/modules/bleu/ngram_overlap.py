"""BLEU of a corpus by sacrebleu, also from counts a row, which can be added up over any selection of the rows."""

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.bleu import BLEUScore

from .checked_texts import check_pairs

OPTIONS = {"tokenize": "13a", "smooth_method": "exp", "lowercase": False}  # of sacrebleu


def bleu(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], order: int = 4, allow_empty: bool = True
) -> float:
    """
    BLEU-1 to BLEU-4 of the corpus (paper's Table 8; Papineni et al., 2002), by sacrebleu.

    Cumulative with equal weights: BLEU-n is the geometric mean of the precisions of 1- to n-grams, times the brevity
    penalty. Case counts; tokenisation `13a`; exponential smoothing, which only plays a part where no n-gram of a length
    matches in the whole corpus.

    Args:
        predictions: the texts.
        references: of each row one text or a list of texts: an n-gram counts as often as it stands in the one that has
            it most often, and the brevity penalty takes the one whose length is nearest.
        order: the longest n-grams, 1 to 4.
        allow_empty: takes an empty prediction, which matches nothing.

    Returns:
        0 to 1 (sacrebleu prints 0 to 100).

    Raises:
        ValueError: for a row that is empty or no string, naming it, or another order.

    Example: order 1, "the old cat" for "the old dog": 2 of 3 words match, and it is not too short: 0.667.
    """
    return bleu_of_counts(bleu_counts(predictions, references, order, allow_empty).sum(0))


def bleu_counts(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], order: int = 4, allow_empty: bool = True
) -> np.ndarray:
    """
    What BLEU counts in each row; `bleu_of_counts` of their sum is `bleu` of the rows that were added up.

    Args:
        predictions, references, order, allow_empty: see `bleu`.

    Returns:
        `(rows, 2 + 2 * order)` int64: length of the prediction and of the reference nearest to it, matches of 1- to
        n-grams, and how many there are.
    """
    lists = check_pairs(predictions, references, allow_empty)
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order is {order!r}; BLEU is taken from 1 to 4.")
    # `effective_order` changes no count; without it sacrebleu warns about single sentences.
    metric = BLEU(max_ngram_order=order, effective_order=True, **OPTIONS)
    scores = [metric.sentence_score(text, row) for text, row in zip(predictions, lists, strict=True)]
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores], dtype=np.int64)


def _score(counts: np.ndarray) -> BLEUScore:
    order = (len(counts) - 2) // 2
    system, reference, *rest = map(int, counts)
    return BLEU.compute_bleu(
        correct=rest[:order],
        total=rest[order:],
        sys_len=system,
        ref_len=reference,
        smooth_method=OPTIONS["smooth_method"],
        max_ngram_order=order,
    )


def bleu_of_counts(counts: np.ndarray) -> float:
    """BLEU (0 to 1) of counts that were added up over rows, `(2 + 2 * order,)`; see `bleu_counts`."""
    return min(_score(counts).score / 100, 1.0)  # the geometric mean of ones may come out a rounding above one


def brevity_penalty(counts: np.ndarray) -> float:
    """The factor (0 to 1) by which BLEU is lower because the predictions are too short; counts as `bleu_of_counts`."""
    return _score(counts).bp
