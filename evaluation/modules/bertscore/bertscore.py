"""BERTScore as a module of `evaluate`; the README beside it defines it."""

from functools import lru_cache

import datasets
import evaluate

from .bert_similarity import BertScore
from .checked_texts import CheckedRows

_DESCRIPTION = """\
BERTScore: how well the tokens of a text and of its reference match by the vectors that a BERT gives them; up to 1,
higher is better. Computed by the package bert-score, without idf weights and without a baseline.
"""
_INPUTS = """
Args:
    predictions: the texts, a list of strings.
    references: of each the true text, or a list of them of which the best one counts.
    model: Hub id or folder of a model with its tokenizer (roberta-large).
    layer: whose vectors are compared; by default the one that bert-score proposes for a model that it knows.
    device: where to run; a GPU if there is one by default.
    batch_size: texts at once (64).
    allow_empty: whether an empty prediction scores 0 instead of being an error (no).
Returns:
    precision, recall, f1: the means.
    scores: F1 of each row.
    settings: version, model and layer, to be printed beside the score.
"""
_CITATION = """\
@inproceedings{zhang2020bertscore,
  title={BERTScore: Evaluating Text Generation with BERT},
  author={Zhang, Tianyi and Kishore, Varsha and Wu, Felix and Weinberger, Kilian Q. and Artzi, Yoav},
  booktitle={International Conference on Learning Representations},
  year={2020}
}
"""


@lru_cache(maxsize=1)
def _loaded(model: str, layer: int | None, device: str | None, batch_size: int) -> BertScore:
    """The model, which stays loaded until another one is asked for."""
    return BertScore(model, layer, device, batch_size)


class Bertscore(CheckedRows, evaluate.Metric):  # `evaluate` takes the metric's name, bertscore, from the class
    """See the module's README."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://github.com/Tiiiger/bert_score"],
        )

    def _compute(
        self,
        predictions,
        references,
        model="roberta-large",
        layer=None,
        device=None,
        batch_size=64,
        allow_empty=False,
    ):
        scorer = _loaded(str(model), layer, device, batch_size)
        values = scorer.scores(predictions, references, allow_empty)
        means = {name: float(rows.mean()) for name, rows in values.items()}
        return {**means, "scores": values["f1"].tolist(), "settings": scorer.description}
