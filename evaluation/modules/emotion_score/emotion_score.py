"""EmotionScore as a module of `evaluate`; the README beside it defines it."""

from functools import lru_cache

import datasets
import evaluate

from .checked_texts import CheckedRows
from .emotion_features import GO_EMOTIONS, EmotionFeatures
from .emotion_similarity import emotion_scores

_DESCRIPTION = """\
EmotionScore: do a reply and the true reply carry the same emotion? The cosine of their features by a RoBERTa that was
trained on GoEmotions, averaged over the replies; -1 to 1, higher is better.
"""
_INPUTS = """
Args:
    predictions: the replies, a list of strings.
    references: of each the true reply, or a list of replies of which the most similar one counts.
    model: Hub id or folder of a text emotion classifier (SamLowe/roberta-base-go_emotions).
    pooling: which features: `mean`, `cls`, `head` or `probabilities` (mean).
    device: where to run; a GPU if there is one by default.
    batch_size: texts at once (64).
    allow_empty: whether an empty reply scores 0 instead of being an error (no).
Returns:
    emotion_score: the mean.
    scores: that of each reply.
    settings: the model and the pooling, to be printed beside the score.
"""
_CITATION = """\
@inproceedings{demszky2020goemotions,
  title={GoEmotions: A Dataset of Fine-Grained Emotions},
  author={Demszky, Dorottya and Movshovitz-Attias, Dana and Ko, Jeongwoo and Cowen, Alan and Nemade, Gaurav and
    Ravi, Sujith},
  booktitle={Proceedings of ACL},
  year={2020}
}
"""


@lru_cache(maxsize=1)
def _loaded(model: str, device: str | None, batch_size: int) -> EmotionFeatures:
    """The classifier, which stays loaded until another one is asked for."""
    return EmotionFeatures(model, device=device, batch_size=batch_size)


class EmotionScore(CheckedRows, evaluate.Metric):
    """See the module's README."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://huggingface.co/SamLowe/roberta-base-go_emotions"],
        )

    def _compute(
        self,
        predictions,
        references,
        model=GO_EMOTIONS,
        pooling="mean",
        device=None,
        batch_size=64,
        allow_empty=False,
    ):
        features = _loaded(str(model), device, batch_size).with_pooling(pooling)
        scores = emotion_scores(predictions, references, features, allow_empty)
        return {"emotion_score": float(scores.mean()), "scores": scores.tolist(), "settings": features.description}
