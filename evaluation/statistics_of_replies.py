"""Bootstrap confidence intervals of metrics, and paired tests of whether two systems differ on the same prompts.

Replies within a conversation are correlated, so the bootstrap draws conversations, not replies; without conversation
ids, each reply counts as a conversation. A metric is either a mean of scores per reply (EmotionScore, Dist-1,
BERTScore, accuracy), computed for all draws at once, or any function of rows (BLEU, mean recall), called once per draw:

    mean_interval(scores, conversations)
    compare_means(ours, theirs, conversations)

    counts = bleu_counts(predictions, references)
    metric_interval(lambda rows: bleu_of_counts(counts[rows].sum(0)), len(predictions), conversations)

The interval is the bias-corrected and accelerated bootstrap (BCa; Efron, 1987), or plain percentiles. The p-value comes
from a two-sided paired permutation test: under the null hypothesis the two systems are exchangeable in every
conversation. Results are deterministic for a given seed. `holm` adjusts the p-values of several comparisons.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ADJUSTED = "adjusted for all comparisons of this table (Holm-Bonferroni)"
METHODS = ("bca", "percentile")
AT_ONCE = 2**22  # drawn numbers kept in memory at once
_NORMAL = NormalDist()

Metric = Callable[[np.ndarray], float]  # row indices (n,), maybe with repeats -> metric of these rows


@dataclass(frozen=True)
class Draws:
    """
    The options of the bootstrap and of the permutation test.

    Args:
        confidence: confidence level of an interval, 0 to 1.
        resamples: number of bootstrap draws; and number of random permutations, unless there are no more possible
            permutations than that: then all are tried, and the p-value is exact.
        seed: seed of the draws.
        method: `bca`, corrected for median bias and skewness, or `percentile`.

    Raises:
        ValueError: if an option is out of range.
    """

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0
    method: str = "bca"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"The method {self.method!r} is not one of {', '.join(METHODS)}.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"The confidence is {self.confidence}; give a share between 0 and 1, such as 0.95.")
        if self.resamples < 1:
            raise ValueError(f"The number of resamples is {self.resamples}; give 1 or more.")


MANY = Draws()
FEW = Draws(resamples=1000)  # for metrics that are called once per draw


@dataclass(frozen=True)
class Interval:
    """
    A metric with its confidence interval.

    Args:
        value: the metric of all rows.
        low, high: ends of the interval; both equal `value` if all draws do.
        rows, conversations: number of rows and of conversations.
        draws: options of the bootstrap.
    """

    value: float
    low: float
    high: float
    rows: int
    conversations: int
    draws: Draws

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """
    A comparison of two systems on the same prompts.

    Args:
        a, b: the metric of each system.
        difference: `a - b` with its confidence interval.
        p_value: probability of a difference at least as large, in either direction, when the systems are exchanged at
            random.
        permutations: number of permutations tried.
        exact: whether these were all possible permutations.
    """

    a: float
    b: float
    difference: Interval
    p_value: float
    permutations: int
    exact: bool

    def __str__(self) -> str:
        return f"{self.a:.3f} - {self.b:.3f} = {self.difference}, p = {self.p_value:.4f}"


# ------------------------------------------------------------------------------------------------------------ intervals


def mean_interval(
    scores: Sequence[float] | np.ndarray,
    conversations: Sequence[Hashable] | None = None,
    draws: Draws = MANY,
) -> Interval:
    """
    Compute the mean of scores with its confidence interval.

    Args:
        scores: the score of each reply.
        conversations: the conversation id of each reply; by default each reply counts as a conversation.
        draws: options of the bootstrap.

    Raises:
        ValueError: if a score is not finite (the message has its row), the lists have different lengths, or there are
            fewer than two conversations.

    Example: scores 0 and 1 in one conversation and 1 in another have the mean 2/3. A draw gives 1/2, 2/3 or 1.
    """
    scores = _check_scores(scores, "scores")
    groups = _groups(len(scores), conversations)
    sums = _sums(scores, groups)
    return _interval(lambda drawn: _mean_of(drawn, sums), len(scores), groups, draws)


def metric_interval(
    metric: Metric,
    rows: int,
    conversations: Sequence[Hashable] | None = None,
    draws: Draws = FEW,
) -> Interval:
    """
    Compute any metric of a corpus with its confidence interval.

    Args:
        metric: a function of an array of row indices, which may contain repeats.
        rows: number of rows.
        conversations, draws: as in `mean_interval`. The metric is called once per resample, and with `bca` also once
            per conversation.

    Raises:
        ValueError: as `mean_interval`, and if the metric is not finite.
    """
    groups = _groups(rows, conversations)
    return _interval(_over_rows(metric, groups), rows, groups, draws)


# ---------------------------------------------------------------------------------------------------------- two systems


def compare_means(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    conversations: Sequence[Hashable] | None = None,
    draws: Draws = MANY,
) -> Comparison:
    """
    Compare two systems by their mean scores on the same prompts, in the same order.

    Args:
        a, b: the score of each reply.
        conversations, draws: as in `mean_interval`.

    Raises:
        ValueError: as `mean_interval`.

    Example: a = (1, 1), b = (0, 0), two conversations: 2 of the 4 permutations give a difference of 1 or -1; p is 0.5.
    """
    a, b = _check_scores(a, "a"), _check_scores(b, "b")
    if len(a) != len(b):
        raise ValueError(f"There are {len(a)} scores of a but {len(b)} of b; compare replies to the same prompts.")
    difference = mean_interval(a - b, conversations, draws)
    sums = _sums(a - b, _groups(len(a), conversations))[0]

    def differences(swapped: np.ndarray) -> np.ndarray:  # (permutations, conversations) bool -> (permutations,)
        return np.where(swapped, -1.0, 1.0) @ sums / len(a)

    p_value, tried, exact = _permutation_test(differences, len(sums), draws)
    return Comparison(float(a.mean()), float(b.mean()), difference, p_value, tried, exact)


def compare_metric(
    metric: Metric,
    rows: int,
    conversations: Sequence[Hashable] | None = None,
    draws: Draws = FEW,
) -> Comparison:
    """
    Compare two systems by any metric of a corpus, on the same prompts in the same order.

    Args:
        metric: a function of row indices into the concatenated replies of both systems: row `i` is the first system's
            reply to prompt `i`, row `rows + i` the second system's reply.
        rows: number of prompts.
        conversations, draws: as in `mean_interval`. The metric is called twice per resample and twice per permutation.

    Raises:
        ValueError: as `mean_interval`, and if the metric is not finite.

    Example: `counts = bleu_counts([*ours, *theirs], [*references, *references])`, then
    `compare_metric(lambda rows: bleu_of_counts(counts[rows].sum(0)), len(ours))`.
    """
    groups = _groups(rows, conversations)
    checked = _finite(metric)

    def subtracted(chosen: np.ndarray) -> float:
        return checked(chosen) - checked(rows + chosen)

    difference = _interval(_over_rows(subtracted, groups), rows, groups, draws)
    every, group_of = np.arange(rows), np.empty(rows, dtype=np.int64)
    for group, members in enumerate(groups):
        group_of[members] = group

    def differences(swapped: np.ndarray) -> np.ndarray:
        result = []
        for row in swapped[:, group_of]:
            result.append(checked(every + rows * row) - checked(every + rows * ~row))
        return np.array(result)

    p_value, tried, exact = _permutation_test(differences, len(groups), draws)
    return Comparison(checked(every), checked(rows + every), difference, p_value, tried, exact)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Adjust the p-values of several tests by Holm's step-down method. If every adjusted value below 0.05 is called
    significant, the probability of any false positive is at most 5 %, however the tests depend on each other.

    S. Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Args:
        p_values: the p-values of all tests that are considered together, each 0 to 1.

    Returns:
        The adjusted p-values in the same order: the smallest of n p-values times n, the next times n - 1, and so on,
        each at least the previous adjusted value and at most 1.

    Example: 0.01, 0.04, 0.03 and 0.005 become 0.03, 0.06, 0.06 and 0.02.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def add_adjusted(comparisons: Sequence[dict]) -> None:
    """Add `p_holm`, the value of `p` adjusted by `holm`, to the rows of a table."""
    for row, adjusted in zip(comparisons, holm([row["p"] for row in comparisons]), strict=True):
        row["p_holm"] = adjusted


# --------------------------------------------------------------------------------------------------------------- checks


def _check_scores(scores: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} has the shape {values.shape}; give one number per reply.")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise ValueError(f"{name}, row {wrong[0]}: {values[wrong[0]]} is not a finite number; leave the row out.")
    return values


def _groups(rows: int, conversations: Sequence[Hashable] | None) -> list[np.ndarray]:
    """The rows of each conversation, in the order in which the conversations first appear."""
    if conversations is None:
        conversations = range(rows)
    if len(conversations) != rows:
        raise ValueError(f"There are {rows} rows but {len(conversations)} conversation ids; give one id per row.")
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(conversations):
        members.setdefault(name, []).append(row)
    if len(members) < 2:
        raise ValueError(f"The number of conversations is {len(members)}; resampling needs at least two.")
    return [np.array(found) for found in members.values()]


def _finite(metric: Metric) -> Metric:
    def checked(rows: np.ndarray) -> float:
        value = float(metric(rows))
        if not np.isfinite(value):
            raise ValueError(f"The metric is {value} for {len(rows)} rows; it must be finite for any choice of rows.")
        return value

    return checked


# ------------------------------------------------------------------------------------------------------------- the sums


def _sums(scores: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Return (2, conversations): the sum of the scores and the number of rows of each conversation."""
    return np.array([[scores[members].sum() for members in groups], [len(members) for members in groups]])


def _mean_of(drawn: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Map (draws, conversations) conversation indices to (draws,) means over their rows."""
    return sums[0][drawn].sum(-1) / sums[1][drawn].sum(-1)


def _over_rows(metric: Metric, groups: list[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    checked = _finite(metric)

    def over(drawn: np.ndarray) -> np.ndarray:
        return np.array([checked(np.concatenate([groups[number] for number in row])) for row in drawn])

    return over


def _interval(statistic, rows: int, groups, draws: Draws) -> Interval:
    """Bootstrap `statistic`, which maps (draws, conversations) conversation indices to (draws,) values."""
    number = len(groups)
    value = float(statistic(np.arange(number)[None])[0])
    rng, values = np.random.default_rng(draws.seed), []
    step = max(1, AT_ONCE // number)
    for start in range(0, draws.resamples, step):
        values.append(statistic(rng.integers(0, number, (min(step, draws.resamples - start), number))))
    values = np.concatenate(values)
    ends = ((1 - draws.confidence) / 2, (1 + draws.confidence) / 2)
    if draws.method == "bca":
        ends = _bca_ends(value, values, statistic, number, ends)
    low, high = np.quantile(values, ends)
    return Interval(value, float(low), float(high), rows, number, draws)


def _bca_ends(value, values, statistic, number, ends) -> tuple[float, float]:
    """The quantiles of the draws that bound the interval (Efron and Tibshirani, 1993, Eq. 14.10)."""
    below = (np.mean(values < value) + np.mean(values <= value)) / 2
    if not 0 < below < 1:  # all draws on one side: a bias that cannot be corrected, or no spread at all
        return ends
    without = []  # the value with each conversation left out
    step = max(1, AT_ONCE // number)
    for start in range(0, number, step):
        left_out = np.arange(start, min(start + step, number))[:, None]
        others = np.arange(number - 1)[None]
        without.append(statistic(others + (others >= left_out)))
    apart = np.mean(np.concatenate(without)) - np.concatenate(without)
    spread = (apart**2).sum() ** 1.5
    acceleration = (apart**3).sum() / (6 * spread) if spread > 0 else 0.0
    bias = _NORMAL.inv_cdf(below)
    shifted = [bias + _NORMAL.inv_cdf(end) for end in ends]
    low, high = (_NORMAL.cdf(bias + shift / (1 - acceleration * shift)) for shift in shifted)
    return low, high


def _permutation_test(differences, number: int, draws: Draws) -> tuple[float, int, bool]:
    """
    Compute a two-sided p-value.

    Args:
        differences: maps (permutations, conversations) bool, true where the systems are exchanged, to (permutations,).

    Returns:
        The p-value, the number of permutations tried, and whether these were all possible permutations.
    """
    observed = abs(differences(np.zeros((1, number), dtype=bool))[0])
    at_least = observed * (1 - 1e-9) - 1e-12  # tolerance for a different order of summation
    exact = number < 63 and 2**number <= draws.resamples
    tried = 2**number if exact else draws.resamples
    rng, hits = np.random.default_rng(draws.seed), 0
    step = max(1, AT_ONCE // number)
    for start in range(0, tried, step):
        stop = min(start + step, tried)
        if exact:
            swapped = (np.arange(start, stop)[:, None] >> np.arange(number)) & 1 == 1
        else:
            swapped = rng.random((stop - start, number)) < 0.5
        hits += int((np.abs(differences(swapped)) >= at_least).sum())
    # The observed assignment is itself a permutation: random draws count it too, so that no p-value is 0.
    return (hits / tried if exact else (hits + 1) / (tried + 1)), tried, exact
