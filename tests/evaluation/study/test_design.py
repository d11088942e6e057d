"""The human evaluation: its balanced design, and Krippendorff's alpha."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from empathic.evaluation.study.agreement import alpha, coincidences
from empathic.evaluation.study.design import DESIGNS, plan, williams

# ------------------------------------------------------------------------------------------------------------ design


@pytest.mark.parametrize("systems", range(1, 8))
def test_a_williams_square_is_balanced(systems):
    rows = williams(systems)
    places = Counter((place, item) for row in rows for place, item in enumerate(row))
    follows = Counter(pair for row in rows for pair in pairwise(row))
    assert len(places) == systems**2 and len(set(places.values())) == 1
    assert len(follows) == systems * (systems - 1) and len(set(follows.values())) <= 1


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    "conversations, systems, raters, ratings",
    [(10, 6, 12, 2), (7, 3, 9, 2), (20, 6, 24, 4), (13, 5, 11, 2), (9, 1, 4, 3)],
)
def test_a_plan_is_balanced(design, conversations, systems, raters, ratings):
    for seed in range(3):
        plans = plan(conversations, systems, raters, ratings, design, 1, seed)
        replies = [[item for item in theirs if item.expected is None] for theirs in plans]
        cells = Counter((item.conversation, item.system) for theirs in replies for item in theirs)
        assert len(cells) == conversations * systems and set(cells.values()) == {ratings}
        loads = [len({item.conversation for item in theirs}) for theirs in replies]
        assert len(plans) == raters and max(loads) - min(loads) <= 1
        for theirs in replies:
            assert len(set(theirs)) == len(theirs)
            seen = Counter(item.system for item in theirs)
            assert max(seen.values()) - min(seen[system] for system in range(systems)) <= (design == "between")
            if design == "between":
                assert len({item.conversation for item in theirs}) == len(theirs)
            else:  # the replies to one conversation come in a row
                shown = [item.conversation for item in theirs]
                assert shown == [each for each in dict.fromkeys(shown) for _ in range(systems)]
        if design == "within":
            places = Counter((at % systems, item.system) for theirs in replies for at, item in enumerate(theirs))
            blocks, rows = sum(loads), len(williams(systems))
            spread = max(places.values()) - min(places.values())
            assert spread == 0 if blocks % rows == 0 else spread <= 2


def test_orders_differ_between_raters_and_come_from_the_seed():
    one, same, other = (plan(10, 4, 10, 10, "within", 2, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len({tuple(item.conversation for item in theirs) for theirs in one}) == 10


def test_checks_stand_beside_a_reply_to_the_same_conversation():
    for design in DESIGNS:
        for theirs in plan(12, 2, 8, 2, design, 3, 0):
            checks = [place for place, item in enumerate(theirs) if item.expected]
            assert {theirs[place].expected for place in checks} == {1, 2, 3}
            for place in checks:
                near = [theirs[at].conversation for at in (place - 1, place + 1) if 0 <= at < len(theirs)]
                assert theirs[place].conversation in near


@pytest.mark.parametrize(
    "numbers, words",
    [
        ((5, 2, 3, 4, "within", 0), "only 3"),
        ((5, 2, 3, 2, "between", 0), "must be seen by 4 raters"),
        ((2, 2, 9, 2, "within", 0), "are too few for"),
        ((2, 2, 2, 2, "within", 3), "3 checks do not fit into the 2"),
        ((0, 2, 2, 2, "within", 0), "conversations is 0"),
        ((2, 2, 2, 2, "across", 0), "'across'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, words):
    with pytest.raises(ValueError, match=words):
        plan(*numbers, seed=0)


# ------------------------------------------------------------------------------------------------------------- alpha

OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def _by_definition(scores, values, level):
    """Alpha from pairs of ratings, as it is defined."""
    units = [ratings for ratings in scores if len(ratings) > 1]
    everything = [rating for ratings in units for rating in ratings]
    count = Counter(everything)

    def difference(a, b):
        if level == "nominal":
            return float(a != b)
        low, high = min(a, b), max(a, b)
        return (sum(count[v] for v in values if low <= v <= high) - (count[a] + count[b]) / 2) ** 2

    observed = sum(
        difference(a, b) / (len(ratings) - 1)
        for ratings in units
        for i, a in enumerate(ratings)
        for j, b in enumerate(ratings)
        if i != j
    ) / len(everything)
    expected = sum(difference(a, b) for i, a in enumerate(everything) for j, b in enumerate(everything) if i != j) / (
        len(everything) * (len(everything) - 1)
    )
    return 1 - observed / expected


def test_alpha_is_the_published_one():
    units = [[int(row[unit]) for row in OBSERVERS if row[unit] != "."] for unit in range(12)]
    matrix = coincidences(units, (1, 2, 3, 4, 5))
    assert matrix.sum() == pytest.approx(40)  # values that can be paired
    assert alpha(matrix, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert alpha(matrix, "ordinal") == pytest.approx(0.815, abs=5e-4)


def test_alpha_is_that_of_its_definition():
    draw = random.Random(0)
    for _ in range(30):
        units = [[draw.choice((1, 2, 2, 3)) for _ in range(draw.randrange(5))] for _ in range(12)]
        for level in ("nominal", "ordinal"):
            assert alpha(coincidences(units, (1, 2, 3)), level) == pytest.approx(
                _by_definition(units, (1, 2, 3), level), abs=1e-12
            )


def test_alpha_of_agreement_chance_and_nothing():
    assert alpha(coincidences([[1, 1], [2, 2], [3, 3]], (1, 2, 3))) == 1
    assert np.isnan(alpha(coincidences([[2, 2], [2, 2]], (1, 2, 3)))) and np.isnan(alpha(np.zeros((3, 3))))
    assert alpha(coincidences([[1, 3], [3, 1]], (1, 2, 3))) < 0
