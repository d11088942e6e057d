"""Score the replies to contrasted clips: per pair of clips, then means with intervals, and tests."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..statistics_of_replies import Draws, compare_means, mean_interval
from .appropriateness import Appropriateness
from .utterances import ContrastUtterance

# metric -> (title, value of a system that cannot tell the clips apart; None if it depends on the words)
METRICS = {
    "changed": ("replies that change", 0.0),
    "fit": ("fit with the clip", None),
    "movement": ("movement towards the clip", 0.0),
    "matched": ("matched pairs", 0.5),
    "likelihood": ("likelihood contrast", 0.0),
    "likelihood_matched": ("matched pairs, likelihood", 0.5),
}
MEANING = {
    "changed": "share of the pairs of clips whose replies differ",
    "fit": "probability that the classifier gives to what fits the clip, of the reply to it",
    "movement": "by how much this probability is higher in the reply to the clip than in the reply to the pair's other "
    "clip",
    "matched": "how often it is higher; a tie counts half",
    "likelihood": "log p(fitting reply | clip) - log p(the same reply | the other clip), nats per reply",
    "likelihood_matched": "how often this is above 0; a tie counts half",
}
EMPTY = "(empty)"


class ReplyFits:
    """
    The fit of replies with each emotion, see `appropriateness`.

    Args:
        features: `EmotionFeatures` with the pooling `probabilities`.
        table: the table.
    """

    def __init__(self, features, table: Appropriateness):
        self.features, self.table = features, table
        self.emotions = list(table.fits)
        self._weights = np.stack(list(table.weights(features.labels).values()), axis=1)  # (labels, emotions)
        self._known: dict[str, np.ndarray] = {}

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, emotions) fits from 0 to 1; an empty reply fits nothing."""
        new = [text for text in dict.fromkeys(texts) if text.strip() and text not in self._known]
        if new:
            shares = self.features.encode(new).astype(np.float64)
            shares /= shares.sum(axis=1, keepdims=True)  # of all labels 1, also for a multi-label classifier
            self._known |= dict(zip(new, shares @ self._weights, strict=True))
        nothing = np.zeros(len(self.emotions))
        return np.stack([self._known.get(text, nothing) for text in texts])


@dataclass
class PairScores:
    """
    The scores of a system in one condition, for every pair of clips.

    Args:
        values: {metric: (pairs,) floats, NaN where the metric does not apply to the pair}.
        confusion: {emotion of the clip: {emotion that the reply fits best: replies}}.
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)


def pair_scores(
    utterances: Sequence[ContrastUtterance],
    replies: Sequence[Sequence[str]],
    fits: ReplyFits,
    likelihoods: Sequence[Sequence[dict[str, float] | None]] | None = None,
) -> PairScores:
    """
    Score all ordered pairs (right clip, wrong clip) of all utterances, see `ContrastUtterance.pairs`.

    Args:
        utterances: the utterances.
        replies: the reply to each clip of each utterance.
        fits: the classifier and the table.
        likelihoods: for each clip of each utterance {emotion: log p of the replies that fit it, given the clip}; None
            for a clip without; None for a system without.
    """
    rows: dict[str, list[float]] = {name: [] for name in METRICS}
    place = {emotion: at for at, emotion in enumerate(fits.emotions)}
    confusion = {emotion: dict.fromkeys((*fits.emotions, EMPTY), 0) for emotion in fits.emotions}
    for number, (utterance, texts) in enumerate(zip(utterances, replies, strict=True)):
        found = fits.of(texts)  # (clips, emotions)
        said = [" ".join(text.split()) for text in texts]
        for clip, text, row in zip(utterance.clips, said, found, strict=True):
            if clip.recorded:
                confusion[clip.emotion][fits.emotions[int(row.argmax())] if text else EMPTY] += 1
        for right, wrong in utterance.pairs():
            emotion, other = utterance.clips[right].emotion, utterance.clips[wrong].emotion
            fit, fit_of_other = found[right, place[emotion]], found[wrong, place[emotion]]
            differs = fits.table.differs(emotion, other)
            rows["changed"].append(float(said[right] != said[wrong]))
            rows["fit"].append(fit)
            rows["movement"].append(fit - fit_of_other if differs else np.nan)
            rows["matched"].append(_above(fit, fit_of_other) if differs else np.nan)
            if likelihoods is not None:
                values = [likelihoods[number][clip] for clip in (right, wrong)]
                both = [np.nan if each is None else each.get(emotion, np.nan) for each in values]
                rows["likelihood"].append(both[0] - both[1])
                rows["likelihood_matched"].append(np.nan if np.isnan(both).any() else _above(*both))
    values = {name: np.array(row) for name, row in rows.items() if row and not np.isnan(row).all()}
    return PairScores(values, {emotion: row for emotion, row in confusion.items() if sum(row.values())})


def _above(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


@dataclass(frozen=True)
class ContrastStatistics:
    """
    The clusters of the pairs, and the draws.

    Args:
        clusters: the cluster of each pair: its utterance, or its speaker.
        draws: options of the bootstrap and of the tests.
    """

    clusters: list[str]
    draws: Draws

    def summary(self, scores: PairScores) -> dict[str, dict]:
        """{metric: `mean`, its interval `low` and `high` (None with one cluster), `pairs`, and `p` against chance}."""
        found = {}
        for name, values in scores.values.items():
            there, clusters = self._there(values)
            row = {"mean": float(values[there].mean()), "low": None, "high": None, "pairs": int(there.sum()), "p": None}
            if len(set(clusters)) > 1:
                interval = mean_interval(values[there], clusters, self.draws)
                row |= {"low": interval.low, "high": interval.high}
                chance = METRICS[name][1]
                if chance is not None and name != "changed":  # no reply can change less than never
                    same = np.full(int(there.sum()), chance)
                    row["p"] = compare_means(values[there], same, clusters, self.draws).p_value
            found[name] = row
        return found

    def comparisons(self, a: PairScores, b: PairScores) -> list[dict]:
        """Compare two systems, or two conditions, on the same pairs: rows with `metric`, `difference` and `p`."""
        rows = []
        for name in METRICS:
            if name not in a.values or name not in b.values:
                continue
            there, clusters = self._there(a.values[name] + b.values[name])
            if len(set(clusters)) < 2:
                continue
            both = compare_means(a.values[name][there], b.values[name][there], clusters, self.draws)
            difference = both.difference
            about = {"difference": difference.value, "low": difference.low, "high": difference.high}
            rows.append({"metric": name, **about, "p": both.p_value})
        return rows

    def _there(self, values: np.ndarray) -> tuple[np.ndarray, list[str]]:
        there = ~np.isnan(values)
        return there, [cluster for cluster, kept in zip(self.clusters, there, strict=True) if kept]


def by_emotion(utterances: Sequence[ContrastUtterance], scores: PairScores) -> dict[str, dict[str, dict]]:
    """{emotion of the right clip: {metric: `mean`, `pairs`}}."""
    emotions = np.array([each.clips[right].emotion for each in utterances for right, _ in each.pairs()])
    found: dict[str, dict[str, dict]] = {}
    for emotion in dict.fromkeys(emotions.tolist()):
        for name, values in scores.values.items():
            chosen = values[(emotions == emotion) & ~np.isnan(values)]
            if len(chosen):
                found.setdefault(emotion, {})[name] = {"mean": float(chosen.mean()), "pairs": len(chosen)}
    return found
