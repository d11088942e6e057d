"""Intervals and p-values against scipy, against numbers worked by hand, and against what they promise."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from empathic.evaluation.metrics import bleu, bleu_counts, bleu_of_counts, corpus_dist_1, dist_n_scores
from empathic.evaluation.statistics_of_replies import (
    Draws,
    compare_means,
    compare_metric,
    holm,
    mean_interval,
    metric_interval,
)


@pytest.fixture
def replies():
    """Scores of 300 replies of 40 conversations, in no order."""
    rng = np.random.default_rng(3)
    return rng.gamma(2.0, 1.0, 300), [f"dialogue{number}" for number in rng.integers(0, 40, 300)]


def mean_of(scores, rows):
    return scores[rows].mean()


def ratio_of_sums(scores, conversations):
    """As scipy wants it: sums and counts of each conversation, in the order in which they come."""
    names = list(dict.fromkeys(conversations))
    places = np.array([names.index(name) for name in conversations])
    return np.bincount(places, scores), np.bincount(places)


@pytest.mark.parametrize(("method", "name"), [("bca", "BCa"), ("percentile", "percentile")])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_equal_scipys_over_the_same_draws(replies, method, name, confidence):
    scores, conversations = replies
    expected = stats.bootstrap(
        ratio_of_sums(scores, conversations),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        confidence_level=confidence,
        method=name,
        rng=np.random.default_rng(7),
    ).confidence_interval
    draws = Draws(confidence, resamples=2000, seed=7, method=method)
    found = mean_interval(scores, conversations, draws)
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (found.rows, found.conversations, found.draws) == (300, 40, draws)
    slow = metric_interval(partial(mean_of, scores), 300, conversations, draws)
    assert (slow.value, slow.low, slow.high) == pytest.approx((found.value, found.low, found.high), abs=1e-12)


def test_what_a_draw_can_give_worked_by_hand():
    """Two conversations, of 2 replies and of 1: both twice, or each once: means 1/2, 2/3 (in half of the draws), 1."""
    found = mean_interval([0, 1, 1], ["x", "x", "y"], Draws(0.9, method="percentile"))
    assert (found.value, found.low, found.high) == (pytest.approx(2 / 3), 0.5, 1.0)
    assert mean_interval([0, 1, 1], ["x", "x", "y"], Draws(0.4, method="percentile")).low == pytest.approx(2 / 3)
    assert str(found) == "0.667 [0.500, 1.000]"


def test_draws_in_parts_are_the_same_draws(replies, monkeypatch):
    from empathic.evaluation import statistics_of_replies

    whole = mean_interval(*replies), compare_means(replies[0], replies[0][::-1], replies[1])
    monkeypatch.setattr(statistics_of_replies, "AT_ONCE", 999)
    parts = mean_interval(*replies), compare_means(replies[0], replies[0][::-1], replies[1])
    assert parts == whole


def test_seeds(replies):
    assert mean_interval(*replies, Draws(seed=1)) == mean_interval(*replies, Draws(seed=1))
    assert mean_interval(*replies, Draws(seed=1)).low != mean_interval(*replies, Draws(seed=2)).low


def test_scores_that_do_not_differ_have_an_interval_of_no_width():
    for method in ("bca", "percentile"):
        found = mean_interval([0.5] * 9, draws=Draws(method=method))
        assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)
    comparison = compare_means([0.5, 0.7], [0.5, 0.7])
    assert comparison.p_value == 1.0 and comparison.difference.low == comparison.difference.high == 0.0


def test_95_percent_intervals_hold_the_truth_as_often_as_they_say():
    """200 corpora of 60 conversations with 5 replies, whose scores a conversation shifts as a whole."""
    rng, held = np.random.default_rng(0), {"conversations": 0, "replies": 0}
    names = np.repeat(np.arange(60), 5).tolist()
    for _ in range(200):
        scores = np.repeat(rng.normal(0, 1, 60), 5) + rng.normal(0, 0.3, 300)
        for kind, ids in (("conversations", names), ("replies", None)):
            found = mean_interval(scores, ids, draws=Draws(resamples=200))
            held[kind] += found.low <= 0 <= found.high
    assert 0.91 <= held["conversations"] / 200 <= 0.99
    assert held["replies"] / 200 < 0.75  # as if the replies of a conversation told nothing of each other


def test_the_exact_p_value_equals_scipys():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.3, 0.6):
        a, b = rng.random(10) + shift, rng.random(10)
        expected = stats.permutation_test(
            (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True, n_resamples=1024
        )
        found = compare_means(a, b)
        assert found.exact and found.permutations == 1024
        assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)
        both = np.concatenate([a, b])
        slow = compare_metric(partial(mean_of, both), 10, draws=Draws(resamples=1024))
        assert slow.exact and slow.p_value == found.p_value
        assert (slow.a, slow.b) == pytest.approx((a.mean(), b.mean()))


def test_p_values_worked_by_hand():
    assert compare_means([1, 1], [0, 0]).p_value == 0.5  # 2 of 4 exchanges: none, both
    assert compare_means([1, 1, 1], [0, 0, 0]).p_value == 0.25  # 2 of 8
    # Whole conversations change places: sums 2 and 1, of which 2 + 1 and -2 - 1 are as large as 3: 2 of 4.
    assert compare_means([1, 1, 1], [0, 0, 0], ["x", "x", "y"]).p_value == 0.5


def test_the_drawn_p_value_comes_near_the_exact_one_and_is_never_0():
    rng = np.random.default_rng(2)
    a, b = rng.random(14) + 0.2, rng.random(14)
    exact, drawn = compare_means(a, b, draws=Draws(resamples=2**14)), compare_means(a, b, draws=Draws(resamples=10_000))
    assert exact.exact and not drawn.exact
    assert drawn.p_value == pytest.approx(exact.p_value, abs=4 * np.sqrt(exact.p_value / 10_000))
    certain = compare_means(np.ones(50), np.zeros(50), draws=Draws(resamples=99))
    assert certain.p_value == 1 / 100


def test_equal_systems_are_called_different_as_often_as_chance_allows():
    rng = np.random.default_rng(4)
    shared = [rng.normal(0, 1, (2, 40)).repeat(3, axis=1) for _ in range(200)]
    names = np.repeat(np.arange(40), 3).tolist()
    values = [compare_means(*pair, names, draws=Draws(resamples=200)).p_value for pair in shared]
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.09
    alone = [compare_means(*pair, draws=Draws(resamples=200)).p_value for pair in shared]
    assert np.mean(np.array(alone) <= 0.05) > 0.15  # replies of one conversation taken for independent


def closed_test(p_values):
    """The closed testing procedure with Bonferroni's test of each set of hypotheses, which Holm's is a shortcut of."""
    places = range(len(p_values))
    sets = [chosen for size in places for chosen in combinations(places, size + 1)]
    of_set = {chosen: min(1, len(chosen) * min(p_values[place] for place in chosen)) for chosen in sets}
    return [max(value for chosen, value in of_set.items() if place in chosen) for place in places]


def test_adjusted_p_values_are_those_of_the_closed_test():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.5, 0.5, 0.9]) == [1, 1, 1]
    rng = np.random.default_rng(0)
    for count in range(1, 9):
        for p_values in (rng.random(count) ** 4, rng.integers(1, 4, count) / 50):  # the latter with ties
            assert holm(p_values.tolist()) == pytest.approx(closed_test(p_values))


def test_metrics_of_a_corpus():
    ours = ["the old dog of clara", "my sister sold the piano", "a cat", "we met in rome last year"]
    theirs = ["a cat", "the dog", "a cat of clara", "we met in oslo"]
    references = ["the old dog of clara", "my sister sold the old piano", "a cat of rome", "we met in rome last year"]
    counts = bleu_counts([*ours, *theirs], [*references, *references], order=2)
    found = compare_metric(lambda rows: bleu_of_counts(counts[rows].sum(0)), 4, draws=Draws(resamples=50))
    assert found.a == bleu(ours, references, 2) and found.b == bleu(theirs, references, 2)
    assert found.difference.value == pytest.approx(found.a - found.b)
    # Some exchange of the 16 by hand, over the texts themselves.
    gaps = []
    for number in range(16):
        swapped = [number >> row & 1 for row in range(4)]
        first = [(ours, theirs)[other][row] for row, other in enumerate(swapped)]
        second = [(theirs, ours)[other][row] for row, other in enumerate(swapped)]
        gaps.append(abs(bleu(first, references, 2) - bleu(second, references, 2)))
    assert found.exact and found.p_value == np.mean(np.array(gaps) >= gaps[0] - 1e-9)
    corpus = metric_interval(lambda rows: corpus_dist_1([ours[row] for row in rows]), 4, draws=Draws(resamples=100))
    assert corpus.value == corpus_dist_1(ours) and corpus.low < corpus.value <= corpus.high
    assert mean_interval(dist_n_scores(ours)).value == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0, float("nan")]), r"scores, row 1: nan is not a finite number"),
        (lambda: mean_interval([[1.0], [2.0]]), r"scores has the shape \(2, 1\)"),
        (lambda: mean_interval([1.0, 2.0], ["x"]), "2 rows but 1 conversation ids"),
        (lambda: mean_interval([1.0, 2.0], ["x", "x"]), "The number of conversations is 1"),
        (lambda: Draws(method="t"), "'t' is not one of bca, percentile"),
        (lambda: Draws(confidence=95), "confidence is 95"),
        (lambda: Draws(resamples=0), "resamples is 0"),
        (lambda: compare_means([1.0, 2.0], [1.0]), "2 scores of a but 1 of b"),
        (lambda: metric_interval(lambda rows: float("nan"), 3), "metric is nan for 3 rows"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
