"""Accuracy of named emotions as a module of `evaluate`; the README beside it defines it."""

import datasets
import evaluate

from .checked_texts import CheckedRows
from .confusion import accuracy

_DESCRIPTION = """\
Accuracy of named emotions, the recall of each emotion, their mean (UAR), and the confusion; 0 to 1, higher is better.
"""
_INPUTS = """
Args:
    predictions: what was named, a list of strings; case and white space around it do not count.
    references: the true emotions, as `labels` spells them.
    labels: all emotions; by default those among the references.
    allow_empty: whether an empty prediction is wrong instead of being an error (no).
Returns:
    accuracy: the share that is right.
    recall: of each label the share that is right, None for one that no reference has.
    mean_recall: over the labels that occur (UAR).
    confusion: of each true label how often what was named for it; what is no label counts as "other".
    labels: the labels.
"""


class EmotionAccuracy(CheckedRows, evaluate.Metric):
    """See the module's README."""

    several_references = False

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, labels=None, allow_empty=False):
        labels = list(labels) if labels is not None else sorted(set(references))
        return {**accuracy(predictions, references, labels, allow_empty), "labels": labels}
