"""
Judge saved replies by a rubric, with a model that hears or sees the clip.

    empathic evaluate judge openai:gpt-audio,media=audio ours=runs/tables/dialogue/ours.jsonl \\
        base=runs/tables/dialogue/base.jsonl --study study --output runs/tables

OUT/judge.json holds the table, OUT/judge/NAME.jsonl every prompt and answer (those asked again after a malformed answer
in NAME.again1.jsonl), and OUT/judge/NAME.scores.jsonl the scores and reasons. A stopped run continues.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from ...files import write_text
from ..dialogue import SIGNIFICANT
from ..results import held_table, versions, write_results
from ..statistics_of_replies import ADJUSTED, Draws, add_adjusted, compare_means, mean_interval
from ..study.replies import media_of, read_replies, spoken
from ..systems.endpoint import EndpointSystem
from ..systems.open import open_system
from ..tables import table, with_interval
from .people import agreement, people_scores
from .requests import Asked, ask, plan_requests
from .rubric import CRITERIA, SCORES

UNKNOWN = "agreement unknown"
TOTAL = "total"
METRICS = (*CRITERIA, TOTAL)
OUTCOMES = ("valid", "refused", "malformed", "failed")


@dataclass(frozen=True)
class JudgeOptions:
    """
    The options of the judge.

    Args:
        max_conversations: maximum number of conversations; None for all.
        attempts: maximum number of answers to a request; a malformed answer is asked for again.
        reference: also judge the true replies, as the system `reference`.
        study: a study folder with people's ratings of the same replies; None for no comparison with people.
        confidence, resamples, seed: options of the intervals and tests.

    Raises:
        ValueError: if an option is out of range.
    """

    max_conversations: int | None = 50
    attempts: int = 2
    reference: bool = False
    study: str | None = None
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self):
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; give 1 or more.")
        if self.max_conversations is not None and self.max_conversations < 1:
            raise ValueError(f"max_conversations is {self.max_conversations}; give 1 or more.")
        Draws(self.confidence, self.resamples, self.seed)


def evaluate_judge(
    judge: str,
    replies: Sequence[str],
    output: str | Path,
    options: JudgeOptions | None = None,
    *,
    baseline: str | None = None,
    progress: bool = True,
    **common,
) -> dict:
    """
    Ask the judge, and write all results (see the module).

    Args:
        judge: spec of an `openai` system, see `open_system`; its `media` says what the judge gets of the clip.
        replies: files of saved replies, `FILE` or `NAME=FILE`; all systems must have answered the same prompts.
        output: output folder.
        options: see `JudgeOptions`.
        baseline: name of the system that the others are compared with; the first by default.
        progress: whether to show a progress bar.
        common: arguments of `evaluation.systems.base.Common`.

    Returns:
        The results, as in the JSON file.

    Raises:
        ValueError: if the judge is no endpoint, or a file, the study or an option is invalid.
        EndpointError: for an error that every request would meet.
    """
    options, output = JudgeOptions() if options is None else options, Path(output)
    system = open_system(judge, **common)
    if not isinstance(system, EndpointSystem):
        raise ValueError(f"{judge} is no judge. Write openai:MODEL@BASE_URL, with media=audio, frames or both.")
    conversations, unanswered = read_replies(list(replies), options.reference)
    systems = list(conversations[0].replies)
    baseline = systems[0] if baseline is None else baseline
    if baseline not in systems:
        raise ValueError(f"The baseline {baseline!r} is not one of the systems {', '.join(systems)}.")
    people = None if options.study is None else people_scores(options.study)
    requests, left_out = plan_requests(conversations, systems, options.max_conversations)
    if not requests:
        raise ValueError(f"No conversation can be judged; the first is left out: {left_out[0]['reason']}.")
    sent = ask(system, requests, output / "judge", attempts=options.attempts, seed=options.seed, progress=progress)
    _write_scores(output / "judge" / f"{system.name}.scores.jsonl", requests)
    results = {
        "table": "judge",
        **_scores(requests, systems, baseline, Draws(options.confidence, options.resamples, options.seed)),
        "answers": _answers(requests, sent),
        "agreement": _agreement(requests, systems, people, options),
        "rubric": {name: {"question": question, "meaning": meaning} for name, (question, meaning) in CRITERIA.items()},
        "baseline": baseline,
        "judge": system.settings,
        "judgements": f"judge/{system.name}.scores.jsonl",
        "left_out": [*unanswered, *left_out],
        "settings": {
            "replies": list(replies),
            "conversations": len(requests) // 2,
            "with_clip": sum(bool(media_of(spoken(each.conversation.prompt)[-1])) for each in requests) // 2,
            "max_conversations": options.max_conversations,
            "attempts": options.attempts,
            "reference": options.reference,
            "study": options.study,
            "seed": options.seed,
            "confidence": options.confidence,
            "resamples": options.resamples,
            "interval": "bootstrap over dialogues (BCa)",
            "test": f"paired permutation test over dialogues, two-sided, {ADJUSTED}",
            "cluster": "dialogue",
        },
        "versions": versions(),
    }
    write_results(output / "judge.json", results)
    return results


def _write_scores(path: Path, requests: Sequence[Asked]) -> None:
    lines = []
    for each in requests:
        about = {"id": each.conversation.id, "direction": each.direction, "systems": each.systems}
        about |= {"outcome": each.outcome, "problem": each.problem, "answers": len(each.rows)}
        about["judgements"] = {
            name: {"scores": dict(found.scores), "reasons": dict(found.reasons)}
            for name, found in each.judgements.items()
        }
        lines.append(json.dumps(about, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def _scores(requests: Sequence[Asked], systems: Sequence[str], baseline: str, draws: Draws) -> dict:
    """The scores of the systems and their comparisons, over the conversations with a judgement in both orders."""
    both = [pair for pair in zip(requests[::2], requests[1::2], strict=True) if all(each.judgements for each in pair)]
    dialogues = [forward.conversation.id.rpartition("/")[0] or forward.conversation.id for forward, _ in both]
    # {system: {metric: (conversations, 2) scores in both orders}}
    values = {name: {metric: np.array([[_score(each, name, metric) for each in pair] for pair in both], dtype=float)
                     for metric in METRICS} for name in systems}  # fmt: skip
    several = len(set(dialogues)) > 1
    rows = {}
    for name in systems:
        metrics = {}
        for metric, scores in values[name].items():
            metrics[metric] = {"mean": float(scores.mean()) if len(both) else None, "low": None, "high": None}
            if several:
                interval = mean_interval(scores.mean(1), dialogues, draws)
                metrics[metric] |= {"low": interval.low, "high": interval.high}
        rows[name] = {"metrics": metrics, "count": len(both)}
    comparisons = []
    for name in systems if several else ():
        for metric in METRICS if name != baseline else ():
            found = compare_means(values[name][metric].mean(1), values[baseline][metric].mean(1), dialogues, draws)
            difference = found.difference
            about = {"difference": difference.value, "low": difference.low, "high": difference.high}
            comparisons.append({"a": name, "b": baseline, "metric": metric, **about, "p": found.p_value})
    add_adjusted(comparisons)
    return {
        "systems": rows,
        "comparisons": comparisons,
        "preferences": [_preference(values, one, other) for one, other in combinations(systems, 2)] if both else [],
        "orders": _orders(both, values) if both else {},
    }


def _score(asked: Asked, name: str, metric: str) -> float:
    scores = asked.judgements[name].scores
    return float(sum(scores.values())) if metric == TOTAL else float(scores[metric])


def _preference(values: dict, one: str, other: str) -> dict:
    """How often a system's reply has the higher total, the same, or the lower, as a mean over both orders."""
    difference = values[one][TOTAL].mean(1) - values[other][TOTAL].mean(1)
    counts = {"better": int((difference > 0).sum()), "tie": int((difference == 0).sum())}
    return {"systems": [one, other], **counts, "worse": int((difference < 0).sum())}


def _orders(both: Sequence[tuple[Asked, Asked]], values: dict) -> dict:
    """Whether the place of a reply changes its scores: how often both orders agree, and the mean total by place."""
    count = len(both[0][0].systems)
    totals: list[list[float]] = [[] for _ in range(count)]
    for pair in both:
        for each in pair:
            for place, name in enumerate(each.systems):
                totals[place].append(_score(each, name, TOTAL))
    same = {}
    for metric in METRICS:
        scores = np.concatenate([found[metric] for found in values.values()])
        same[metric] = {
            "same": float((scores[:, 0] == scores[:, 1]).mean()),
            "mean_difference": float(np.abs(scores[:, 0] - scores[:, 1]).mean()),
        }
    return {"consistency": same, "total_by_place": [float(np.mean(found)) for found in totals]}


def _answers(requests: Sequence[Asked], sent: Counter) -> dict:
    """What became of the requests, and what they cost."""
    outcomes = Counter(each.outcome for each in requests)
    rows = [row for each in requests for row in each.rows]

    def total(name: str):
        found = [row[name] for row in rows if row.get(name) is not None]
        return sum(found) if found else None

    examples = {}
    for outcome in OUTCOMES[1:]:
        found = next((each for each in requests if each.outcome == outcome), None)
        if found is not None:
            examples[outcome] = {"id": found.name, "problem": found.problem}
    return {
        "requests": len(requests),
        "asked_again": sum(sent.values()) - len(requests),
        **{outcome: outcomes[outcome] for outcome in OUTCOMES},
        "unpaired": sum(
            bool(forward.judgements) != bool(backward.judgements)
            for forward, backward in zip(requests[::2], requests[1::2], strict=True)
        ),
        "examples": examples,
        "prompt_tokens": total("prompt_tokens"),
        "tokens": total("tokens"),
        "cost": total("cost"),
        "seconds": total("seconds"),
        "notes": [{"id": row["id"], "note": row["note"]} for row in rows if row.get("note")],
    }


def _agreement(requests: Sequence[Asked], systems: Sequence[str], people, options: JudgeOptions) -> dict | None:
    if people is None:
        return None
    scores, raters = people
    judged: dict[str, dict] = {name: {} for name in CRITERIA}
    for each in requests:
        for name, found in each.judgements.items():
            cell = (each.conversation.id, name, each.conversation.replies[name])
            for criterion, score in found.scores.items():
                judged[criterion].setdefault(cell, []).append(score)
    compared = agreement(judged, scores, max(10, options.resamples // 10), options.confidence, options.seed)
    return {"raters": raters, "criteria": compared} if any(row["replies"] for row in compared.values()) else None


# -------------------------------------------------------------------------------------------------------------- shown


def agreement_lines(results: Mapping) -> list[str]:
    """How far the judge agrees with people, or that this is unknown."""
    found = results["agreement"]
    if found is None:
        if results["settings"]["study"] is None:
            return [f"{UNKNOWN}: no person rated these replies; build a study of them, and give it with --study."]
        return [f"{UNKNOWN}: the people of {results['settings']['study']} rated other replies."]
    lines = []
    for criterion, row in found["criteria"].items():
        lines.append(
            f"{criterion} and the people's {row['question']}, {row['replies']} replies, {row['ratings']} ratings of "
            f"{found['raters']} raters: weighted kappa {_value(row['kappa'])}; Krippendorff's alpha of the raters and "
            f"the judge {_value(row['alpha'])}, of the raters alone {_value(row['alpha_people'])}."
        )
    return lines


def _value(row: dict) -> str:
    if row["value"] is None:
        return "undefined"
    ends = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['value']:.2f}{ends}"


def answer_lines(results: Mapping) -> list[str]:
    """What became of the requests, what they cost, and whether the order of the replies matters."""
    answers, settings = results["answers"], results["settings"]
    counts = ", ".join(f"{answers[outcome]} {outcome}" for outcome in OUTCOMES)
    lines = [
        f"{answers['requests']} requests for {settings['conversations']} conversations, each in two orders: {counts}; "
        f"{answers['asked_again']} asked again. {answers['unpaired']} conversations have a judgement in one order only "
        "and do not count."
    ]
    for outcome, example in answers["examples"].items():
        lines.append(f"The first {outcome}: {example['id']}: {example['problem']}")
    if answers["tokens"] is not None:
        cost = "" if answers["cost"] is None else f", cost {answers['cost']:.4f}"
        lines.append(f"Tokens: {answers['prompt_tokens']:,} in prompts, {answers['tokens']:,} in answers{cost}.")
    for row in results["preferences"]:
        one, other = row["systems"]
        lines.append(f"{one} beside {other}: better {row['better']}, tie {row['tie']}, worse {row['worse']}.")
    if results["orders"]:
        same = results["orders"]["consistency"]
        shown = ", ".join(f"{name} {same[name]['same']:.0%}" for name in CRITERIA)
        places = ", ".join(f"{mean:.2f}" for mean in results["orders"]["total_by_place"])
        lines.append(f"The same score in both orders: {shown}. Mean total by place in the list: {places}.")
    media = results["judge"]["media"]
    if media == "none":
        lines.append("The judge got no clip (media=none): it cannot know how the words were said.")
    else:
        lines.append(f"The judge got {media} of the clips of {settings['with_clip']} conversations.")
    if results["left_out"]:
        first = results["left_out"][0]
        lines.append(
            f"{len(results['left_out'])} conversations are left out, such as {first['id']}: {first['reason']}."
        )
    return lines


def show(results: dict) -> str:
    """Format the table as text."""
    settings = results["settings"]
    significant = {(row["a"], row["metric"]) for row in results["comparisons"] if row["p_holm"] < SIGNIFICANT}
    rows = []
    for name, system in results["systems"].items():
        cells = [
            "" if row["mean"] is None else with_interval(row, " *" if (name, metric) in significant else "")
            for metric, row in system["metrics"].items()
        ]
        rows.append([name, system["count"], *cells])
    return "\n".join(
        [
            f"Judged by {results['judge']['target']}, {SCORES[0]} to {SCORES[-1]} each:",
            table(["system", "conversations", *METRICS], rows),
            *agreement_lines(results),
            f"[{settings['confidence']:.0%} interval]: {settings['interval']}.",
            f"*: differs from {results['baseline']}, p < {SIGNIFICANT}; {settings['test']}.",
            *answer_lines(results),
        ]
    )


# ------------------------------------------------------------------------------------------------------------ command


def run(options: argparse.Namespace) -> int:
    """Run `empathic evaluate judge`; return 0 if there is a judgement, else 1."""
    with held_table(options.output, "judge"):
        results = evaluate_judge(
            options.judge,
            options.replies,
            options.output,
            JudgeOptions(
                max_conversations=options.max_conversations or None,
                attempts=options.attempts,
                reference=options.reference,
                study=options.study,
                confidence=options.confidence,
                resamples=options.resamples,
                seed=options.seed,
            ),
            baseline=options.baseline,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
    print(f"{show(results)}\nResults are in {options.output}.")
    return 0 if results["answers"]["valid"] else 1
