"""
Score the replies of quickstart: save them in the format of `empathic evaluate dialogue`, for the report, and compare
EPO with its control over several seeds.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data_prep.messages import message_text, sample_id
from .metrics import emotion_scores, word_recall
from .published import SOURCE, TABLE_1
from .replies import conversation_of
from .results import versions, write_results
from .scores import Scoring, score_replies
from .statistics_of_replies import compare_means


def write_scored_replies(
    folder: str | Path,
    samples: Sequence[dict],
    replies: Mapping[str, Sequence[str]],
    scoring: Scoring,
    *,
    settings: Mapping,
    systems: Mapping[str, Mapping],
    baseline: str,
) -> dict:
    """
    Write dialogue.json, and dialogue/NUMBER.jsonl with the replies of each system.

    Args:
        folder: output folder; created if needed.
        samples: items of `DialogueSamples`.
        replies: {system: one text per sample}.
        scoring: the metrics and their options.
        settings: settings of all systems: `data` and `split`, and all else that affects the replies.
        systems: {system: its settings}.
        baseline: system that the others are compared with.

    Returns:
        The content of dialogue.json.
    """
    folder = Path(folder)
    (folder / "dialogue").mkdir(parents=True, exist_ok=True)
    rows, files = {}, {}
    for number, (name, texts) in enumerate(replies.items()):
        rows[name] = [_row(sample, text) for sample, text in zip(samples, texts, strict=True)]
        files[name] = f"dialogue/{number}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name])
        (folder / files[name]).write_text(lines, encoding="utf-8")
    found = score_replies(rows, scoring, [(name, baseline) for name in replies if name != baseline])
    for name, system in found["systems"].items():
        system |= {"settings": dict(systems[name]), "replies": files[name]}
    corpora = dict(Counter(sample["corpus"] for sample in samples))
    results = {
        "table": "dialogue",
        **found,
        "baseline": baseline,
        "settings": {
            **settings,
            "corpora": corpora,
            "seed": scoring.seed,
            "confidence": scoring.confidence,
            "resamples": scoring.resamples,
            "interval": "bootstrap over conversations (BCa)",
        },
        "versions": versions(),
        "published": {"source": SOURCE, "rows": {name: rows for name, rows in TABLE_1.items() if name in corpora}},
    }
    write_results(folder / "dialogue.json", results)
    return results


def compare_seeds(
    epo: Sequence[Mapping], control: Sequence[Mapping], samples: Sequence[dict], words: Sequence[list[str]], features
) -> dict[str, dict]:
    """
    Compare EPO with its control by the replies of several seeds each.

    Args:
        epo, control: an outcome per seed, with `row` (its metrics), and `replies` and `sampled` (a text per sample).
        samples: items of `DialogueSamples`.
        words: for each sample, the words that only the history tells; possibly none.
        features: the emotion features of EmotionScore.

    Returns:
        {metric: the mean and the standard deviation over the seeds of both, `epo`, `control`}. EmotionScores and recall
        also have the `difference` with the ends of its 95% interval, and `p_value`: each sample counts with its mean
        over the seeds, and the interval and the paired permutation test draw conversations.
    """
    conversations = [conversation_of({"id": sample_id(sample)}) for sample in samples]
    references = [sample["reply"] for sample in samples]
    asked = [place for place, wanted in enumerate(words) if wanted]

    def scores(outcomes: Sequence[Mapping]) -> dict[str, np.ndarray]:
        replies = [outcome["replies"] for outcome in outcomes]
        recalled = [[word_recall([texts[place]], [words[place]]) for place in asked] for texts in replies]
        felt = {
            key: [emotion_scores(outcome[key], references, features, allow_empty=True) for outcome in outcomes]
            for key in ("replies", "sampled")
        }
        return {
            "emotion_score": np.mean(felt["replies"], axis=0),
            "emotion_score_sampled": np.mean(felt["sampled"], axis=0),
            "recall": np.mean(recalled, axis=0),
        }

    def over_seeds(outcomes: Sequence[Mapping], name: str) -> dict[str, float]:
        values = [outcome["row"][name] for outcome in outcomes]
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}

    found = {name: {"epo": over_seeds(epo, name), "control": over_seeds(control, name)} for name in epo[0]["row"]}
    a, b = scores(epo), scores(control)
    groups = dict.fromkeys(("emotion_score", "emotion_score_sampled"), conversations)
    for name, who in {**groups, "recall": [conversations[place] for place in asked]}.items():
        found[name] |= paired_difference(a[name], b[name], who)
    return found


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, conversations) -> dict:
    """`difference` of the means with the ends of its 95% interval, and `p_value`; arguments as of `compare_means`."""
    compared = compare_means(a, b, conversations)
    difference = {key: getattr(compared.difference, key) for key in ("value", "low", "high")}
    return {"difference": difference, "p_value": compared.p_value}


def seed_cells(row: Mapping) -> list:
    """The cells of a metric of `compare_seeds`: EPO, control, difference, and its interval and p-value, if any."""
    epo, control = row["epo"], row["control"]
    means = [f"{side['mean']:.3f} ± {side['sd']:.3f}" for side in (epo, control)]
    if "difference" not in row:
        return [*means, epo["mean"] - control["mean"], "", ""]
    ends = row["difference"]
    return [*means, ends["value"], f"[{ends['low']:.3f}, {ends['high']:.3f}]", f"{row['p_value']:.4f}"]


def _row(sample: Mapping, text: str) -> dict:
    *earlier, last = sample["prompt"]
    prompt = [{**message, "content": message_text(message)} for message in earlier]
    clips = [{"type": part["type"], "path": part["path"]} for part in _parts(last) if part.get("path")]
    prompt.append({**last, "content": [*clips, {"type": "text", "text": message_text(last)}]})
    about = {"reply": text, "reference": sample["reply"], "emotion": sample["emotion"]}
    return {"id": sample_id(sample), "prompt": prompt, **about}


def _parts(message: Mapping) -> list[Mapping]:
    return [] if isinstance(message["content"], str) else message["content"]
