"""Krippendorff's alpha for ordinal or nominal ratings, with missing ratings; weighted kappa of two raters."""

import numpy as np

LEVELS = ("ordinal", "nominal")


def coincidences(scores: list[list[int]], values: tuple[int, ...]) -> np.ndarray:
    """
    Compute the coincidence matrix: each ordered pair of ratings of a unit counts 1 / (ratings of the unit - 1).

    Args:
        scores: the ratings of each unit, without missing ratings; a unit with one rating is ignored.
        values: the categories, in order.

    Returns:
        (values, values) floats, symmetric.
    """
    matrix = np.zeros((len(values), len(values)))
    for ratings in scores:
        if len(ratings) > 1:
            counts = np.array([ratings.count(value) for value in values], dtype=float)
            matrix += (np.outer(counts, counts) - np.diag(counts)) / (len(ratings) - 1)
    return matrix


def alpha(matrix: np.ndarray, level: str = "ordinal") -> np.ndarray:
    """
    Compute Krippendorff's alpha: 1 is full agreement, 0 is chance level, below 0 is systematic disagreement.

    K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). The ordinal difference of two categories is
    the number of ratings between them, plus half of the ratings in the two categories.

    Args:
        matrix: (..., values, values) coincidence matrices.
        level: `ordinal` or `nominal`.

    Returns:
        (...) floats; NaN if all ratings are equal or there are no ratings, where alpha is undefined.
    """
    if level not in LEVELS:
        raise ValueError(f"Unknown level {level!r}; choose one of {', '.join(LEVELS)}.")
    totals = matrix.sum(-1)  # (..., values)
    if level == "nominal":
        difference = 1.0 - np.eye(matrix.shape[-1])
    else:
        middle = np.cumsum(totals, -1) - totals / 2
        difference = (middle[..., :, None] - middle[..., None, :]) ** 2
    observed = (matrix * difference).sum((-1, -2))
    expected = (totals[..., :, None] * totals[..., None, :] * difference).sum((-1, -2))
    number = totals.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (number - 1) * observed / expected, np.nan)


def weighted_kappa(matrix: np.ndarray) -> np.ndarray:
    """
    Compute quadratic weighted kappa (J. Cohen, 1968) of two raters: 1 is full agreement, 0 is chance level.

    Args:
        matrix: (..., values, values) counts: rows are the first rater's categories, columns the second's, in order.

    Returns:
        (...) floats; NaN if there are no counts, or both raters always give the same single category.
    """
    place = np.arange(matrix.shape[-1])
    difference = (place[:, None] - place) ** 2
    total = matrix.sum((-1, -2))
    expected = matrix.sum(-1)[..., :, None] * matrix.sum(-2)[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = (expected * difference).sum((-1, -2)) / total
        return np.where(chance > 0, 1 - (matrix * difference).sum((-1, -2)) / chance, np.nan)
