"""Dist-n as a module of `evaluate`; the README beside it defines it."""

import datasets
import evaluate
import numpy as np

from .checked_texts import CheckedRows
from .diversity import corpus_dist_n, dist_n_scores, mean_dist_n

_DESCRIPTION = """\
Dist-n: how many of the n-grams are different ones, reply by reply and over all replies together; above 0, to 1, higher
is more diverse.
"""
_INPUTS = """
Args:
    predictions: the replies, a list of strings.
    n: tokens of an n-gram (1).
    allow_empty: whether an empty reply scores 0, and adds nothing to the corpus, instead of being an error (no).
Returns:
    dist_n: the mean over replies.
    corpus_dist_n: that of all replies together.
    scores: that of each reply; None for one of less than n tokens, which the mean leaves out.
    settings: n and the tokens.
"""
_CITATION = """\
@inproceedings{li2016diversity,
  title={A Diversity-Promoting Objective Function for Neural Conversation Models},
  author={Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle={Proceedings of NAACL-HLT},
  year={2016}
}
"""


class DistN(CheckedRows, evaluate.Metric):
    """See the module's README."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://aclanthology.org/N16-1014"],
        )

    def _compute(self, predictions, n=1, allow_empty=False):
        scores = dist_n_scores(predictions, n, allow_empty)
        return {
            "dist_n": mean_dist_n(predictions, n, allow_empty),
            "corpus_dist_n": corpus_dist_n(predictions, n, allow_empty),
            "scores": [None if np.isnan(score) else float(score) for score in scores],
            "settings": f"n {n}, lower-case words and single marks",
        }
