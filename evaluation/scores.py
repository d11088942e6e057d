"""Score the saved replies of several systems: metrics, confidence intervals and comparisons (Tables 1 and 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .emotion_features import GO_EMOTIONS, POOLINGS, EmotionFeatures
from .metrics import bleu_counts, bleu_of_counts, corpus_dist_n, dist_n_scores, emotion_scores
from .modules.bertscore.bert_similarity import BertScore
from .replies import conversation_of
from .reply_emotion import name_reply_emotions
from .statistics_of_replies import Draws, add_adjusted, compare_means, compare_metric, mean_interval, metric_interval

METRICS = {
    "bertscore": "BERTScore",
    "emotion_score": "EmotionScore",
    "reply_emotion": "Response-emotion accuracy",
    "dist1": "Dist-1",
    "corpus_dist1": "Dist-1, corpus",
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
}
DEFAULT_METRICS = ("bertscore", "emotion_score", "reply_emotion", "dist1", "corpus_dist1")


@dataclass(frozen=True)
class Scoring:
    """
    The options of `score_replies`.

    Args:
        metrics: names from `METRICS`.
        classifier, pooling: options of EmotionScore, see `EmotionFeatures`. The classifier also names the emotion of
            the replies for the response-emotion accuracy.
        bertscore_model, bertscore_layer: options of BERTScore, see `BertScore`.
        confidence: confidence level of the intervals, 0 to 1.
        resamples: number of bootstrap draws and of permutations for a mean; BLEU uses a tenth.
        seed: seed of the draws.
        device: device of the models behind the metrics; by default a GPU if there is one.
    """

    metrics: Sequence[str] = DEFAULT_METRICS
    classifier: str = GO_EMOTIONS
    pooling: str = "mean"
    bertscore_model: str = "roberta-large"
    bertscore_layer: int | None = None
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"Unknown metric {', '.join(unknown)!r}; choose from {', '.join(METRICS)}.")
        if self.pooling not in POOLINGS:
            raise ValueError(f"The pooling {self.pooling!r} is not one of {', '.join(POOLINGS)}.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; give a share between 0 and 1, such as 0.95.")
        if self.resamples < 10:
            raise ValueError(f"resamples is {self.resamples}; give 10 or more.")


@dataclass(frozen=True)
class _Sampling:
    """The conversation of each row, and the draws: `many` for means, `few` for metrics called once per draw."""

    conversations: list[str]
    many: Draws
    few: Draws

    @property
    def possible(self) -> bool:
        """Whether intervals can be computed: resampling needs at least two conversations."""
        return len(set(self.conversations)) > 1


class _MeanMetric:
    """A mean of scores per reply: `scores[name]` (replies,). NaN, for all systems alike, leaves a reply out."""

    def __init__(self, scores: dict[str, np.ndarray]):
        self.scores = scores
        self.there = ~np.isnan(next(iter(scores.values())))

    def value(self, name: str) -> float:
        return float(self.scores[name][self.there].mean())

    def _conversations(self, sampling: _Sampling) -> list[str] | None:
        """The conversations of the replies that count; None if there are too few to resample."""
        found = [name for name, kept in zip(sampling.conversations, self.there, strict=True) if kept]
        return found if len(set(found)) > 1 else None

    def interval(self, name: str, sampling: _Sampling):
        conversations = self._conversations(sampling)
        return conversations and mean_interval(self.scores[name][self.there], conversations, sampling.many)

    def compare(self, a: str, b: str, sampling: _Sampling):
        conversations = self._conversations(sampling)
        one, other = self.scores[a][self.there], self.scores[b][self.there]
        return conversations and compare_means(one, other, conversations, sampling.many)


class _BleuMetric:
    """Corpus BLEU, from the counts of each reply: `counts[name]` (replies, counts)."""

    def __init__(self, counts: dict[str, np.ndarray]):
        self.counts = counts

    def value(self, name: str) -> float:
        return bleu_of_counts(self.counts[name].sum(0))

    def interval(self, name: str, sampling: _Sampling):
        return metric_interval(
            lambda rows: bleu_of_counts(self.counts[name][rows].sum(0)),
            len(self.counts[name]),
            sampling.conversations,
            sampling.few,
        )

    def compare(self, a: str, b: str, sampling: _Sampling):
        both, conversations = np.concatenate([self.counts[a], self.counts[b]]), sampling.conversations
        return compare_metric(
            lambda chosen: bleu_of_counts(both[chosen].sum(0)), len(conversations), conversations, sampling.few
        )


class _CorpusDist:
    """
    Dist-1 of all replies together. It has no interval and no test: a conversation that is drawn twice lowers Dist-1 by
    construction, so the bootstrap is not valid for it.
    """

    def __init__(self, texts: dict[str, list[str]]):
        self.texts = texts

    def value(self, name: str) -> float:
        return corpus_dist_n(self.texts[name], 1, allow_empty=True) if any(self.texts[name]) else 0.0

    def interval(self, name: str, sampling: _Sampling):
        return None

    def compare(self, a: str, b: str, sampling: _Sampling):
        return None


def score_replies(replies: dict[str, list[dict]], scoring: Scoring, pairs: Sequence[tuple[str, str]]) -> dict:
    """
    Compute all metrics of all systems, and compare pairs of systems.

    An empty reply scores 0. A sample whose true reply is blank cannot be scored, and is left out for all systems.

    Args:
        replies: the replies of each system as returned by `read_replies`, for the same samples in the same order. A
            row may have `references`, further acceptable replies, for EmotionScore, and `reply_emotion`, the emotion of
            the true reply, for the response-emotion accuracy.
        scoring: the metrics and their options.
        pairs: the pairs of systems (a, b) to compare.

    Returns:
        `systems`: {name: `metrics`: {metric: `mean`, `low`, `high`}, `count`, `empty`: number of empty replies,
        `notes`: [{`id`, `note`}] of the systems, `histograms`: {metric: `edges`, `counts` of replies}};
        `comparisons`: [`a`, `b`, `metric`, `difference` (a - b), `low`, `high`, `p`, and `p_holm`, adjusted for all
        comparisons];
        `computed_by`: {metric: description}; `skipped`: {metric: reason}; `left_out`: [{`id`, `reason`}].

    Raises:
        ValueError: if the systems did not answer the same samples, or there is nothing to score.
    """
    first = next(iter(replies))
    ids = [row["id"] for row in replies[first]]
    for name, rows in replies.items():
        if [row["id"] for row in rows] != ids:
            raise ValueError(f"{name} and {first} did not answer the same samples: evaluate them in one command.")
    kept = [place for place, row in enumerate(replies[first]) if row["reference"].strip()]
    left_out = [
        {"id": row["id"], "reason": "the true reply is blank"} for row in replies[first] if not row["reference"].strip()
    ]
    if not kept:
        raise ValueError(f"None of the {len(ids)} samples has a true reply, so there is nothing to score.")
    texts = {name: [rows[place]["reply"] for place in kept] for name, rows in replies.items()}
    true = _TrueReplies([replies[first][place] for place in kept])
    conversations = [conversation_of(replies[first][place]) for place in kept]
    many = Draws(scoring.confidence, scoring.resamples, scoring.seed)
    sampling = _Sampling(conversations, many, replace(many, resamples=scoring.resamples // 10))
    found, computed_by, skipped = _metrics(texts, true, scoring)
    systems = {
        name: {
            "metrics": {metric: _with_interval(values, name, sampling) for metric, values in found.items()},
            "count": len(kept),
            "empty": sum(not text for text in texts[name]),
            "notes": [{"id": row["id"], "note": row["note"]} for row in rows if row.get("note")],
            "histograms": {
                metric: _histogram(values.scores[name])
                for metric, values in found.items()
                if isinstance(values, _MeanMetric) and metric != "reply_emotion"
            },
        }
        for name, rows in replies.items()
    }
    comparisons = []
    for a, b in pairs if sampling.possible else ():
        for metric, values in found.items():
            comparison = values.compare(a, b, sampling)
            if comparison is not None:
                difference = comparison.difference
                about = {"difference": difference.value, "low": difference.low, "high": difference.high}
                comparisons.append({"a": a, "b": b, "metric": metric, **about, "p": comparison.p_value})
    add_adjusted(comparisons)
    return {
        "systems": systems,
        "comparisons": comparisons,
        "computed_by": computed_by,
        "skipped": skipped,
        "left_out": left_out,
    }


def _histogram(scores: np.ndarray) -> dict[str, list]:
    """A histogram of scores between -1 and 1, with 40 bins."""
    counts, edges = np.histogram(np.clip(scores, -1, 1), bins=40, range=(-1, 1))
    return {"edges": [round(edge, 2) for edge in edges.tolist()], "counts": counts.tolist()}


def _with_interval(values, name: str, sampling: _Sampling) -> dict:
    interval = values.interval(name, sampling) if sampling.possible else None
    ends = (None, None) if interval is None else (interval.low, interval.high)
    return {"mean": values.value(name), "low": ends[0], "high": ends[1]}


class _TrueReplies:
    """What is known of the true replies: their texts, further acceptable replies, and their emotions."""

    def __init__(self, rows: list[dict]):
        self.texts = [row["reference"] for row in rows]
        self.several = [
            [row["reference"], *(text for text in row.get("references") or () if text.strip())] for row in rows
        ]
        self.emotions = [row.get("reply_emotion") for row in rows]


def _metrics(texts: dict[str, list[str]], true: _TrueReplies, scoring: Scoring) -> tuple[dict, dict, dict]:
    """Return (metric -> values of all systems, metric -> description, skipped metric -> reason), in table order."""
    found, computed_by, skipped, references = {}, {}, {}, true.texts
    features = None
    device = scoring.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for metric in METRICS:
        if metric not in scoring.metrics:
            continue
        if metric == "bertscore":
            try:
                scorer = BertScore(scoring.bertscore_model, scoring.bertscore_layer, device)
            except RuntimeError as error:
                skipped[metric] = str(error)
                continue
            computed_by[metric] = scorer.description
            values = {name: scorer.scores(said, references, allow_empty=True)["f1"] for name, said in texts.items()}
            found[metric] = _MeanMetric(values)
        elif metric in ("emotion_score", "reply_emotion"):
            if metric == "reply_emotion" and not any(true.emotions):
                skipped[metric] = "no true reply has an emotion label"
                continue
            try:
                features = features or EmotionFeatures(scoring.classifier, scoring.pooling, device)
                if metric == "reply_emotion":
                    found[metric], computed_by[metric] = _reply_emotion(texts, true, features)
                    continue
            except OSError as error:
                skipped[metric] = f"the classifier {scoring.classifier} cannot be loaded ({str(error).splitlines()[0]})"
                continue
            except ValueError as error:
                if metric != "reply_emotion":
                    raise
                skipped[metric] = str(error)
                continue
            most = max(map(len, true.several))
            several = f", the most similar of up to {most} acceptable replies" if most > 1 else ""
            computed_by[metric] = features.description + several
            values = {name: emotion_scores(said, true.several, features, True) for name, said in texts.items()}
            found[metric] = _MeanMetric(values)
        elif metric == "dist1":
            computed_by[metric] = "unique words / words of each reply, averaged"
            # Only an empty reply has the score nan; the table also shows the number of empty replies.
            found[metric] = _MeanMetric({n: np.nan_to_num(dist_n_scores(said, 1, True)) for n, said in texts.items()})
        elif metric == "corpus_dist1":
            computed_by[metric] = "unique words / words of all replies together; falls with their number"
            found[metric] = _CorpusDist(texts)
        else:
            computed_by[metric] = "sacrebleu, corpus, cased, tokenization 13a"
            order = int(metric[-1])
            found[metric] = _BleuMetric({name: bleu_counts(said, references, order) for name, said in texts.items()})
    return found, computed_by, skipped


def _reply_emotion(texts: dict[str, list[str]], true: _TrueReplies, features) -> tuple[_MeanMetric, str]:
    """Whether each reply has the labeled emotion of the true reply, and what the classifier says of the true ones."""
    labels = np.array([label or "" for label in true.emotions])

    def hits(said: list[str]) -> np.ndarray:
        named = np.array([name or "-" for name in name_reply_emotions(said, features)])
        return np.where(labels == "", np.nan, (named == labels).astype(float))

    ceiling, count = float(np.nanmean(hits(true.texts))), int((labels != "").sum())
    about = (
        f"share of {count} labeled replies whose emotion, named by {features.model_name}, is the label of the true "
        f"reply; for the true replies themselves it is {ceiling:.3f}"
    )
    return _MeanMetric({name: hits(said) for name, said in texts.items()}), about
