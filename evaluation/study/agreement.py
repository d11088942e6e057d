"""Krippendorff's alpha of ordered or unordered categories, with missing ratings."""

import numpy as np

LEVELS = ("ordinal", "nominal")


def coincidences(scores: list[list[int]], values: tuple[int, ...]) -> np.ndarray:
    """
    The coincidence matrix of units: each ordered pair of ratings of a unit counts 1 / (its ratings - 1).

    Args:
        scores: the ratings that each unit got, missing ones left out; a unit with one rating says nothing.
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
    Krippendorff's alpha: 1 is full agreement, 0 that of chance, below 0 is systematic disagreement.

    K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). An ordinal difference between two categories
    is the number of ratings between them, those of the two counted half.

    Args:
        matrix: (..., values, values) coincidence matrices.
        level: `ordinal` or `nominal`.

    Returns:
        (...) floats; NaN where all ratings are the same, or there are none: then nothing can be told.
    """
    if level not in LEVELS:
        raise ValueError(f"There is no level {level!r}: take one of {', '.join(LEVELS)}.")
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
