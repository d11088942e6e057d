"""The emotion of a text as a vector: features of a RoBERTa trained on GoEmotions (paper's Sec. 3.3 and 4.4).

The paper does not say which features it takes. `mean` is the default here, and `EmotionFeatures.description` goes
beside every score. How far apart two emotions lie depends on it much: the vectors of a RoBERTa's last layer may have a
large part that all texts share, and then hardly any pair falls under the paper's threshold of 0.1.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig

from .checked_texts import check_texts
from .emotion_similarity import cosine

POOLINGS = ("mean", "cls", "head", "probabilities")
GO_EMOTIONS = "SamLowe/roberta-base-go_emotions"


class _ClassifierOutputs(Module):
    """
    Takes out of a classifier's pass what the poolings need; stands between sentence-transformers' own modules.

    Args:
        classifier: a model of a sequence classifier.
    """

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        linear = [module for module in classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
        if linear.out_features != classifier.config.num_labels:
            raise ValueError(f"{type(classifier).__name__} does not end in a linear layer over its labels.")
        self.multi_label = classifier.config.problem_type == "multi_label_classification"
        self.head: torch.Tensor | None = None
        linear.register_forward_pre_hook(self._keep)

    def _keep(self, _, inputs) -> None:
        self.head = inputs[0]  # (texts, hidden): in a RoBERTa what dense and tanh gave

    def forward(self, features: dict, **kwargs) -> dict:
        logits = features["scores"]  # (texts, classes)
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        features["classifier"] = torch.cat([self.head, probabilities], dim=-1)
        features["token_embeddings"] = features["all_layer_embeddings"][-1]  # (texts, tokens, hidden)
        return features

    def save(self, *args, **kwargs) -> None:
        raise NotImplementedError("The features are computed from the classifier; save that.")


class _Together(Module):
    """Puts the pooled vectors and the classifier's beside each other: (texts, cls + mean + head + classes)."""

    def forward(self, features: dict, **kwargs) -> dict:
        features["sentence_embedding"] = torch.cat([features["sentence_embedding"], features["classifier"]], dim=-1)
        return features

    def save(self, *args, **kwargs) -> None:
        raise NotImplementedError("The features are computed from the classifier; save that.")


def _check_pooling(pooling: str) -> str:
    if pooling not in POOLINGS:
        raise ValueError(f"The pooling {pooling!r} is not one of {', '.join(POOLINGS)}.")
    return pooling


class EmotionFeatures:
    """
    Encodes texts by a text emotion classifier, through sentence-transformers.

    Args:
        model: Hub id or folder of a sequence classifier.
        pooling: `mean` or `cls`: the last layer's vectors, averaged over the text's tokens or the first one's.
            `head`: what the classifier's last linear layer gets, in a RoBERTa the hidden layer of its head.
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
        self.model_name, self.pooling, self.batch_size = str(model), _check_pooling(pooling), batch_size
        self.device = str(device) if device else ("cuda" if torch.cuda.is_available() else "cpu")
        architectures = AutoConfig.from_pretrained(self.model_name).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise ValueError(
                f"{self.model_name} is no text classifier (it holds {', '.join(architectures) or 'nothing named'}). "
                f"Name one that was trained on emotions, such as {GO_EMOTIONS}."
            )
        transformer = Transformer(
            self.model_name,
            transformer_task="sequence-classification",
            model_kwargs={"dtype": torch.float32},
            config_kwargs={"output_hidden_states": True},
        )
        hidden = transformer.get_embedding_dimension()
        modules = [
            transformer,
            _ClassifierOutputs(transformer.auto_model),
            Pooling(hidden, pooling_mode=("cls", "mean")),
            _Together(),
        ]
        self._encoder = SentenceTransformer(modules=modules, device=self.device).eval()
        self._columns = {
            "cls": slice(0, hidden),
            "mean": slice(hidden, 2 * hidden),
            "head": slice(2 * hidden, -transformer.auto_model.config.num_labels),
            "probabilities": slice(-transformer.auto_model.config.num_labels, None),
        }

    def with_pooling(self, pooling: str) -> "EmotionFeatures":
        """The same features under another pooling; the classifier is not loaded again."""
        other = copy(self)
        other.pooling = _check_pooling(pooling)
        return other

    @property
    def labels(self) -> list[str]:
        """The classifier's labels, in the order of the pooling `probabilities`."""
        names = self._encoder[0].auto_model.config.id2label
        return [names[place] for place in range(len(names))]

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
        return self.encode_all(texts)[self.pooling]

    def encode_all(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """As `encode`, under each of `POOLINGS`, out of one pass of the classifier."""
        check_texts(texts, "texts")
        unique = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        vectors = self._encoder.encode(list(unique), batch_size=self.batch_size, show_progress_bar=False)
        places, result = [unique[text] for text in texts], {}
        for pooling in POOLINGS:
            part = vectors[:, self._columns[pooling]]
            part = part / np.maximum(np.linalg.norm(part, axis=-1, keepdims=True), 1e-12)
            result[pooling] = part.astype(np.float32)[places]
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
