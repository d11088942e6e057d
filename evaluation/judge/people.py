"""Agreement of a judge with the people who rated the same replies in a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low

import numpy as np

from ..study.agreement import alpha, coincidences, weighted_kappa
from ..study.analysis import counted_ratings
from .rubric import SCORES

# criterion of the judge -> question of the study that asks about it
QUESTION_OF = {"understanding": "empathy", "strategy": "empathy", "coherence": "semantics"}
LEAST = 1  # lowest score of a study, which is 0 for the judge


def people_scores(folder: str | Path) -> tuple[dict[str, dict[tuple[str, str, str], list[int]]], int]:
    """
    The scores that people gave in a study, on the judge's scale.

    Args:
        folder: a study folder with answers.

    Returns:
        {question: {(conversation, system, reply): scores from 0 to 2}}, and the number of raters who count.

    Raises:
        StudyError: if the folder is not a study, or no rater counts.
    """
    found = counted_ratings(Path(folder))
    replies = {name: each["replies"] for name, each in found.key["conversations"].items()}
    scores = {
        question: {
            (conversation, system, replies[conversation][system]): [score - LEAST for score in ratings.values()]
            for (conversation, system), ratings in cells.items()
        }
        for question, cells in found.ratings.items()
    }
    return scores, sum(row["started"] and not row["reasons"] for row in found.raters)


def agreement(
    judged: Mapping[str, Mapping[tuple[str, str, str], Sequence[int]]],
    people: Mapping[str, Mapping[tuple[str, str, str], Sequence[int]]],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict]:
    """
    Compare a judge with people, for each criterion.

    Args:
        judged: {criterion: {(conversation, system, reply): the judge's scores in both orders}}.
        people: {question: {(conversation, system, reply): the scores of the raters}}; a reply counts if both have it.
        resamples, confidence, seed: options of the bootstrap over conversations (percentiles).

    Returns:
        {criterion: `question`, `replies`, `ratings`, and {`kappa`, `alpha`, `alpha_people`}: {`value`, `low`, `high`}}.
        `kappa`: quadratic weighted kappa of the judge's scores and the median (of two, the lower) of the raters'.
        `alpha`: Krippendorff's ordinal alpha of the raters and the judge (its lower score if the orders differ);
        `alpha_people`: of the raters alone. None where it is undefined.
    """
    found = {}
    for criterion, cells in judged.items():
        question = QUESTION_OF[criterion]
        those = people.get(question, {})
        shared = [cell for cell in cells if cells[cell] and those.get(cell)]
        conversations = list(dict.fromkeys(cell[0] for cell in shared))
        place = {name: number for number, name in enumerate(conversations)}
        size = (len(conversations), len(SCORES), len(SCORES))
        matrices = {name: np.zeros(size) for name in ("kappa", "alpha", "alpha_people")}
        for cell in shared:
            at = place[cell[0]]
            for score in cells[cell]:
                matrices["kappa"][at][score, median_low(those[cell])] += 1
            matrices["alpha"][at] += coincidences([[*those[cell], median_low(cells[cell])]], SCORES)
            matrices["alpha_people"][at] += coincidences([list(those[cell])], SCORES)
        row = {"question": question, "replies": len(shared), "ratings": sum(len(those[cell]) for cell in shared)}
        for name, matrix in matrices.items():
            row[name] = _with_interval(
                weighted_kappa if name == "kappa" else alpha, matrix, resamples, confidence, seed
            )
        found[criterion] = row
    return found


def _with_interval(statistic, matrices: np.ndarray, resamples: int, confidence: float, seed: int) -> dict:
    """A statistic of summed matrices (conversations, scores, scores), with a percentile interval."""
    nothing = {"value": None, "low": None, "high": None}
    if not len(matrices):
        return nothing
    value = float(statistic(matrices.sum(0)))
    if not np.isfinite(value):
        return nothing
    chosen = np.random.default_rng(seed).integers(0, len(matrices), (resamples, len(matrices)))
    weights = np.stack([np.bincount(row, minlength=len(matrices)) for row in chosen]).astype(float)
    drawn = statistic(np.tensordot(weights, matrices, 1))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, (50 * (1 - confidence), 50 * (1 + confidence))) if len(drawn) else (None, None)
    return {"value": value, "low": None if low is None else float(low), "high": None if high is None else float(high)}
