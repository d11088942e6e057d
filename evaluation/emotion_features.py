"""The emotion of a text as a vector: features of a RoBERTa trained on GoEmotions (paper's Sec. 3.3 and 4.4).

The paper does not say which features it takes. `mean` is the default here, and `EmotionFeatures.description` goes
beside every score. How far apart two emotions lie depends on it much: the vectors of a RoBERTa's last layer may have a
large part that all texts share, and then hardly any pair falls under the paper's threshold of 0.1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from empathic.evaluation.metrics import check_texts, cosine

POOLINGS = ("mean", "cls", "probabilities")
GO_EMOTIONS = "SamLowe/roberta-base-go_emotions"


class EmotionFeatures:
    """
    Encodes texts by a text emotion classifier.

    Args:
        model: Hub id or folder of a sequence classifier.
        pooling: `mean` or `cls`: the last layer's vectors, averaged over the text's tokens or the first one's.
            `probabilities`: those of the classes, each by itself (sigmoid) where the classifier is multi-label as the
            GoEmotions one is, else of one among all (softmax).
        device: where to run; a GPU if there is one by default.
        batch_size: texts at once.

    Raises:
        ValueError: for an unknown pooling, or a model that is no classifier.
    """

    def __init__(
        self, model: str = GO_EMOTIONS, pooling: str = "mean", device: str | None = None, batch_size: int = 64
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"The pooling {pooling!r} is not one of {', '.join(POOLINGS)}.")
        self.model_name, self.pooling, self.batch_size = str(model), pooling, batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        architectures = AutoConfig.from_pretrained(self.model_name).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise ValueError(
                f"{self.model_name} is no text classifier (it holds {', '.join(architectures) or 'nothing named'}). "
                f"Name one that was trained on emotions, such as {GO_EMOTIONS}."
            )
        if pooling == "probabilities":
            self._tokenizer = AutoTokenizer.from_pretrained(self.model_name)
            classifier = AutoModelForSequenceClassification.from_pretrained(self.model_name, dtype=torch.float32)
            self._classifier = classifier.to(self.device).eval()
            self._multi_label = classifier.config.problem_type == "multi_label_classification"
        else:
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()  # without its head the classifier is reported as a broken checkpoint
            try:
                transformer = Transformer(self.model_name, model_kwargs={"dtype": torch.float32})
            finally:
                logging.set_verbosity(verbosity)
            pool = Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)
            self._encoder = SentenceTransformer(modules=[transformer, pool], device=self.device)

    @property
    def description(self) -> str:
        """The model and the pooling, to be printed beside a score."""
        return f"{self.model_name}, pooling {self.pooling}"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """
        Features of the texts; a text that occurs more than once is computed once.

        Returns:
            `(len(texts), dim)` float32, each row of length 1.

        Raises:
            ValueError: for a text that is empty or no string, naming its row.
        """
        check_texts(texts, "texts")
        unique = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        if self.pooling == "probabilities":
            vectors = self._probabilities(list(unique))
        else:
            vectors = self._encoder.encode(list(unique), batch_size=self.batch_size, show_progress_bar=False)
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors.astype(np.float32)[[unique[text] for text in texts]]

    @torch.inference_mode()
    def _probabilities(self, texts: list[str]) -> np.ndarray:
        """(len(texts), classes); texts of like length go together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = np.zeros((len(texts), self._classifier.config.num_labels), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self._tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            logits = self._classifier(**batch.to(self.device)).logits  # (rows, classes)
            result[rows] = (logits.sigmoid() if self._multi_label else logits.softmax(-1)).cpu().numpy()
        return result

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """
        Cosine of the features of text `a[i]` and text `b[i]`: `(n,)`, -1 to 1.

        Raises:
            ValueError: if the lists differ in length, or a text is empty or no string.
        """
        check_texts(a, "a")
        check_texts(b, "b")
        if len(a) != len(b):
            raise ValueError(f"There are {len(a)} texts on one side but {len(b)} on the other.")
        vectors = self.encode([*a, *b])
        return cosine(vectors[: len(a)], vectors[len(a) :])
