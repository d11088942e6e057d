"""Analyze the answers of a study: scores, agreement, preferences, and excluded raters."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from ..results import versions
from .agreement import LEVELS, alpha, coincidences
from .answers import read_answers
from .build import ANSWERS, KEY, Exclusion
from .design import SCORES
from .replies import StudyError

# question -> (conversation, system) -> {rater: score}
Ratings = dict[str, dict[tuple[str, str], dict[str, int]]]


@dataclass(frozen=True)
class CountedRatings:
    """
    The ratings of the raters who count.

    Args:
        key: the content of the study's key.json.
        ratings: {question: {(conversation, system): {rater: score}}}.
        raters: {"rater", "code", "started", "reasons", ...} of each rater; who has `reasons` is excluded.
        problems: a message for each unusable line of the answers.
        exclusion: the rules that were applied.
    """

    key: dict
    ratings: Ratings
    raters: list[dict]
    problems: list[str]
    exclusion: Exclusion


def counted_ratings(
    folder: Path, exclusion: Exclusion | None = None, answers: list[Path] | None = None
) -> CountedRatings:
    """
    Read the answers of a study and exclude raters by its rules; arguments and errors as in `analyze`.
    """
    folder = Path(folder)
    try:
        key = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{folder / KEY}: cannot be read ({error}). Give the folder of a study.") from None
    exclusion = exclusion or Exclusion(**key["settings"]["exclusion"])
    files = sorted((folder / ANSWERS).glob("*.jsonl")) if answers is None else [Path(file) for file in answers]
    given, problems = _latest(files, key)
    raters, ratings = [], {question["name"]: defaultdict(dict) for question in key["questions"]}
    for number, rater in enumerate(key["raters"], 1):
        state = _judge_rater(rater, given.get(rater, {}), key, exclusion)
        raters.append({"rater": number, "code": rater, **state})
        if state["started"] and not state["reasons"]:
            for item, answer in given[rater].items():
                about = key["items"][item]
                if "system" in about:
                    for question, line in answer.items():
                        ratings[question][about["conversation"], about["system"]][rater] = line["score"]
    if not any(row["started"] and not row["reasons"] for row in raters):
        started = [row for row in raters if row["started"]]
        reasons = "; ".join(f"rater {row['rater']}: {', '.join(row['reasons'])}" for row in started)
        raise StudyError(
            f"{folder}: none of {len(raters)} raters can be counted; {len(started)} started"
            + (f" ({reasons}). Relax the exclusion rules, and report that." if started else ".")
        )
    return CountedRatings(key, ratings, raters, problems, exclusion)


def analyze(
    folder: Path,
    exclusion: Exclusion | None = None,
    answers: list[Path] | None = None,
    resamples: int = 10000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict:
    """
    Analyze a study.

    Intervals are bootstrap percentiles: conversations are drawn with replacement, each with all its systems and raters.

    Args:
        folder: the study folder written by `build`.
        exclusion: exclusion rules; by default the study's own rules.
        answers: files of answers, such as downloads from static pages; by default the study's own folder of answers.
        resamples, confidence, seed: options of the bootstrap.

    Returns:
        {"scores", "differences", "preferences", "agreement", "raters", "settings", ...}, see `report.parts`.

    Raises:
        StudyError: if the folder is not a study, an option is out of range, or all raters are excluded.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise StudyError(
            f"resamples is {resamples} and confidence is {confidence}; give 1 or more, and a share between 0 and 1."
        )
    found = counted_ratings(folder, exclusion, answers)
    key, ratings, raters, exclusion = found.key, found.ratings, found.raters, found.exclusion
    kept = sum(row["started"] and not row["reasons"] for row in raters)
    conversations, systems = list(key["conversations"]), key["systems"]
    draw = np.random.default_rng(seed)
    chosen = draw.integers(0, len(conversations), (resamples, len(conversations)))
    weights = np.stack([np.bincount(row, minlength=len(conversations)) for row in chosen]).astype(float)
    ends = 50 * (1 - confidence), 50 * (1 + confidence)

    def interval(values: np.ndarray) -> list[float] | None:
        values = values[np.isfinite(values)]
        return [float(end) for end in np.percentile(values, ends)] if len(values) else None

    result = {
        "systems": systems,
        "questions": key["questions"],
        "kept_raters": kept,
        "raters": raters,
        "problems": found.problems,
        "scores": {},
        "differences": {},
        "preferences": {},
        "agreement": {},
    }
    for question, by_cell in ratings.items():
        means = {}  # system: (mean, means of the resamples)
        result["scores"][question] = {}
        for system in systems:
            theirs = [list(by_cell[conversation, system].values()) for conversation in conversations]
            sums, counts = np.array([[sum(scores), len(scores)] for scores in theirs], dtype=float).T
            with np.errstate(invalid="ignore"):
                means[system] = sums.sum() / counts.sum(), (weights @ sums) / (weights @ counts)
            result["scores"][question][system] = {
                "mean": _number(means[system][0]),
                "interval": interval(means[system][1]),
                "ratings": int(counts.sum()),
                "shares": {str(score): _share(theirs, score) for score in SCORES},
            }
        result["differences"][question] = [
            {
                "systems": [one, other],
                "mean": _number(means[one][0] - means[other][0]),
                "interval": interval(means[one][1] - means[other][1]),
            }
            for one, other in combinations(systems, 2)
        ]
        result["preferences"][question] = [
            _preference(by_cell, conversations, one, other, key["settings"]["design"], weights, interval)
            for one, other in combinations(systems, 2)
        ]
        matrices = np.stack(
            [
                coincidences([list(by_cell[conversation, system].values()) for system in systems], SCORES)
                for conversation in conversations
            ]
        )
        resampled = np.tensordot(weights, matrices, 1)
        result["agreement"][question] = {
            level: {
                "alpha": _number(alpha(matrices.sum(0), level)),
                "interval": interval(alpha(resampled, level)),
            }
            for level in LEVELS
        }
    result["settings"] = {
        "design": key["settings"]["design"],
        "conversations": len(conversations),
        "ratings_planned": key["settings"]["ratings"],
        "resamples": resamples,
        "confidence": confidence,
        "seed": seed,
        "exclusion": asdict(exclusion),
        "exclusion_as_stated_before": asdict(exclusion) == key["settings"]["exclusion"],
    }
    result["versions"] = versions()
    return result


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def _share(scores: list[list[int]], score: int) -> float | None:
    total = sum(map(len, scores))
    return sum(ratings.count(score) for ratings in scores) / total if total else None


def _latest(files: list[Path], key: dict) -> tuple[dict, list[str]]:
    """Return {rater: {item: {question: line}}} with the last answers, and problems such as lines of another study."""
    given, problems = {}, []
    questions = [question["name"] for question in key["questions"]]
    owner = {item: rater for rater, items in key["raters"].items() for item in items}
    for file in files:
        try:
            lines, bad = read_answers(file)
        except OSError as error:
            raise StudyError(f"{file}: cannot be read ({error}). Give files of answers.") from None
        problems += bad
        for line in lines:
            item, rater = str(line["item"]), line["rater"]
            if owner.get(item) != rater or line["question"] not in questions or line["score"] not in SCORES:
                problems.append(f"{file}: an answer does not belong to this study: {json.dumps(line)[:100]}")
            else:
                given.setdefault(rater, {}).setdefault(item, {})[line["question"]] = line
    return given, problems


def _judge_rater(rater: str, answers: dict, key: dict, rules: Exclusion) -> dict:
    """The statistics of a rater, and the reasons to exclude the rater."""
    items, questions = key["raters"][rater], [question["name"] for question in key["questions"]]
    wanted = len(items) * len(questions)
    count = sum(len(answer) for answer in answers.values())
    checks = [item for item in items if "check" in key["items"][item]]
    failed = sum(
        any(line["score"] != key["items"][item]["check"] for line in answers.get(item, {}).values()) for item in checks
    )
    # An answer records how long its reply had been shown, so the maximum over a reply's answers is the total time.
    times = [max(_seconds(line, "seconds") for line in answer.values()) for answer in answers.values()]
    median = float(np.median(times)) if times else 0.0
    clips = {key["items"][item]["conversation"] for item in answers}
    clips = {conversation for conversation in clips if key["conversations"][conversation]["clip"]}
    played = {
        key["items"][item]["conversation"]
        for item, answer in answers.items()
        if max(_seconds(line, "played") for line in answer.values()) >= 1
    }
    share_played = len(played & clips) / len(clips) if clips else 1.0
    reasons = []
    if answers:
        if count < rules.complete * wanted:
            reasons.append(f"answered {count} of {wanted} questions (fewer than {rules.complete:.0%})")
        if failed > rules.failed_checks:
            reasons.append(f"failed {failed} of {len(checks)} attention checks (more than {rules.failed_checks})")
        if median < rules.median_seconds:
            reasons.append(f"took a median of {median:.1f} s per reply (less than {rules.median_seconds:g} s)")
        if share_played < rules.played:
            reasons.append(f"played {share_played:.0%} of the clips (less than {rules.played:.0%})")
    return {
        "started": bool(answers),
        "answers": count,
        "of": wanted,
        "failed_checks": failed,
        "checks": len(checks),
        "median_seconds": median,
        "played": share_played,
        "reasons": reasons,
    }


def _seconds(line: dict, name: str) -> float:
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _preference(
    by_cell: dict, conversations: list[str], one: str, other: str, design: str, weights: np.ndarray, interval
) -> dict:
    """
    Compute how often one system's reply is scored higher than the other system's reply to the same conversation.

    `within`: one comparison for each rater who judged both replies. `between`: no rater judged both replies, so their
    mean scores are compared, one comparison per conversation.
    """
    counts = np.zeros((len(conversations), 3))  # better, the same, worse
    for place, conversation in enumerate(conversations):
        left, right = by_cell[conversation, one], by_cell[conversation, other]
        if design == "within":
            pairs = [(left[rater], right[rater]) for rater in left if rater in right]
        else:
            pairs = [tuple(np.mean(list(side.values())) for side in (left, right))] if left and right else []
        for a, b in pairs:
            counts[place, 0 if a > b else 1 if a == b else 2] += 1
    total = counts.sum()
    with np.errstate(invalid="ignore"):
        resampled = (weights @ counts) / (weights @ counts.sum(1))[:, None]
    row = {"systems": [one, other], "comparisons": int(total)}
    for place, name in enumerate(("better", "same", "worse")):
        row[name] = _number(counts[:, place].sum() / total) if total else None
        row[f"{name}_interval"] = interval(resampled[:, place])
    return row
