"""BLEU-1 and BLEU-4 as a module of `evaluate`; the README beside it defines them."""

import datasets
import evaluate
import sacrebleu

from .checked_texts import CheckedRows
from .ngram_overlap import OPTIONS, bleu_counts, bleu_of_counts, brevity_penalty

_DESCRIPTION = """\
BLEU-1 and BLEU-4 of a corpus by sacrebleu: which n-grams of the predictions stand in the references; 0 to 1, higher is
better.
"""
_INPUTS = """
Args:
    predictions: the texts, a list of strings.
    references: of each the true text, or a list of them; sacrebleu counts an n-gram as often as it stands in the one
        that has it most often, and takes the length of the one whose length is nearest.
    allow_empty: whether an empty prediction matches nothing instead of being an error (no).
Returns:
    bleu_1, bleu_4: of the whole corpus.
    brevity_penalty: the factor, the same in both, by which predictions that are too short lower them.
    settings: sacrebleu's version and options.
"""
_CITATION = """\
@inproceedings{papineni2002bleu,
  title={BLEU: a Method for Automatic Evaluation of Machine Translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={Proceedings of ACL},
  year={2002}
}
@inproceedings{post2018call,
  title={A Call for Clarity in Reporting BLEU Scores},
  author={Post, Matt},
  booktitle={Proceedings of WMT},
  year={2018}
}
"""


class Bleu(CheckedRows, evaluate.Metric):
    """See the module's README."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://github.com/mjpost/sacrebleu"],
        )

    def _compute(self, predictions, references, allow_empty=False):
        scores = {}
        for order in (1, 4):
            counts = bleu_counts(predictions, references, order, allow_empty).sum(0)
            scores[f"bleu_{order}"] = bleu_of_counts(counts)
        options = ", ".join(f"{name} {value}" for name, value in OPTIONS.items())
        settings = f"sacrebleu {sacrebleu.__version__}, {options}"
        return {**scores, "brevity_penalty": brevity_penalty(counts), "settings": settings}
