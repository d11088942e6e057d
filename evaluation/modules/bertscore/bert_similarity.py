"""BERTScore by the package bert-score, with its model kept loaded and texts cut to what the model has positions for."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

from .checked_texts import check_pairs


class BertScore:
    """
    BERTScore (Zhang et al., 2020; paper's Sec. 4.4 and Table 8), without idf weights and without a baseline.

    Args:
        model: Hub id or folder of a model with its tokenizer. The paper names none; `roberta-large` is what bert-score
            takes for English.
        layer: whose vectors are compared; by default the one that bert-score proposes for a model that it knows.
        device: where to run; a GPU if there is one by default.
        batch_size: texts at once.

    Raises:
        RuntimeError: where the package or the model is not to be had, with the reason.
    """

    def __init__(
        self,
        model: str = "roberta-large",
        layer: int | None = None,
        device: str | None = None,
        batch_size: int = 64,
    ):
        try:
            import bert_score
        except ImportError as error:
            raise RuntimeError(f"the package bert-score is not installed ({error}); pip install bert-score") from error
        if layer is None:
            layer = bert_score.utils.model2layers.get(model)
        if layer is None:
            raise RuntimeError(f"bert-score knows no layer for {model}; give one, 17 for a roberta-large in a folder")
        self.batch_size, self.device = batch_size, device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._scorer = bert_score.BERTScorer(model_type=model, num_layers=layer, device=self.device)
        except (OSError, ValueError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(f"its model {model}, layer {layer}, cannot be loaded ({reason})") from error
        if isinstance(self._scorer._tokenizer, (GPT2Tokenizer, RobertaTokenizer)):
            # bert-score asks for the first word to be written like any other, with a space before it, but in a way that
            # the tokenizers of transformers 5 do not hear: scores would not be those that others report.
            self._scorer._tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
        # A tokenizer that states no length would let texts through that the model has no positions for.
        tokenizer, config = self._scorer._tokenizer, self._scorer._model.config
        before = config.pad_token_id + 1 if "roberta" in config.model_type else 0  # positions that RoBERTas leave out
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings - before)
        self.description = f"bert-score {bert_score.__version__}, {model}, layer {layer}, F1, no idf, no baseline"

    def scores(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        allow_empty: bool = False,
    ) -> dict[str, np.ndarray]:
        """
        `precision`, `recall` and `f1` of each row.

        Each token is compared with the most similar one of the other text by the cosine of their vectors: precision is
        the mean over the prediction's tokens, recall over the reference's, F1 their harmonic mean.

        Args:
            predictions: the texts.
            references: of each row one text, or a list of texts: each of the three values is the best over the list.
            allow_empty: takes empty predictions, which score 0.

        Returns:
            three arrays (len(predictions),), each value up to 1.

        Raises:
            ValueError: for a row that is empty or no string, naming it.
        """
        lists = check_pairs(predictions, references, allow_empty)
        said = [row for row, text in enumerate(predictions) if text.strip()]
        values = np.zeros((3, len(predictions)))
        if said:
            given = [predictions[row] for row in said], [lists[row] for row in said]
            tensors = self._scorer.score(*given, batch_size=self.batch_size)
            # The cosine of equal vectors may come out a rounding above one.
            values[:, said] = np.minimum(torch.stack(tensors).double().numpy(), 1.0)
        return dict(zip(("precision", "recall", "f1"), values, strict=True))

    def score(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
        """Mean F1; an empty prediction counts 0."""
        return float(self.scores(predictions, references, allow_empty=True)["f1"].mean())
