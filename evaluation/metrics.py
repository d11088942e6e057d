"""The metrics of the paper's Sec. 4.4 and Table 8, and those that keep them honest.

Each is a pure function of two lists, row by row. Every score lies between 0 and 1, except `emotion_score` (-1 to 1),
and more is better. A reply that is empty or no string has no emotion and no words: `emotion_score`, `dist_1` and
`corpus_dist_1` raise a ValueError that names its row. The other metrics count an empty prediction as wrong.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from empathic.configuration_empathic import EMOTIONS

# A word with its apostrophes and hyphens, or else any single mark; an underscore is a mark.
_TOKEN = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|[^\s\w]|_")
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


def check_texts(texts: Sequence[str], name: str, allow_empty: bool = False) -> None:
    """Raises a ValueError that names the row if `texts` is empty, or holds a value that is empty or no string."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"{name} is {texts!r}; give a list of strings.")
    if not texts:
        raise ValueError(f"{name} is an empty list; give at least one string.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}, row {row}: {text!r} is not a string.")
        if not allow_empty and not text.strip():
            raise ValueError(f"{name}, row {row}: the text is empty ({text!r}). Leave the row out, and say so.")


def _check_pairs(predictions: Sequence[str], references: Sequence[str], allow_empty: bool = True) -> None:
    check_texts(predictions, "predictions", allow_empty)
    check_texts(references, "references")
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions but {len(references)} references.")


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row cosine (n,) of vectors `a` and `b` (n, dim) of length 1, such as `EmotionFeatures.encode` gives."""
    return np.clip(np.einsum("nd,nd->n", a, b, dtype=np.float64), -1.0, 1.0)


def emotion_score(predictions: Sequence[str], references: Sequence[str], features) -> float:
    """
    EmotionScore (Sec. 4.4): do a reply and the true reply carry the same emotion?

    The cosine of the features of each reply and its reference by a RoBERTa trained on GoEmotions, averaged over the
    rows. The paper does not say which features; print `features.description` beside the score.

    Args:
        predictions: the replies.
        references: the true replies.
        features: an `EmotionFeatures`.

    Returns:
        from -1 to 1; 1 if every reply has the features of its reference.

    Example: features (1, 0) and (0.6, 0.8) for the replies, (1, 0) and (1, 0) for the references: (1 + 0.6) / 2 = 0.8.
    """
    _check_pairs(predictions, references, allow_empty=False)
    vectors = features.encode([*predictions, *references])
    return float(cosine(vectors[: len(predictions)], vectors[len(predictions) :]).mean())


def tokens_of(text: str) -> list[str]:
    """The 1-grams of Dist-1: lower-case words, and each punctuation mark by itself."""
    return _TOKEN.findall(text.lower())


def dist_1(predictions: Sequence[str]) -> float:
    """
    Dist-1 as the paper reports it (Sec. 4.4; Li et al., 2016): unique 1-grams / 1-grams of each reply, averaged.

    The paper's values (Table 1) are possible a reply at a time only: over a whole corpus words repeat. Tokens are
    lower-case words and punctuation marks (`tokens_of`). Short replies score high: compare it at similar lengths.

    Returns:
        above 0, to 1.

    Example: "no, no, no!" has the tokens no , no , no ! of which 3 of 6 are unique; "i see" has 2 of 2. Together 0.75.
    """
    check_texts(predictions, "predictions")
    replies = [tokens_of(text) for text in predictions]
    return float(np.mean([len(set(reply)) / len(reply) for reply in replies]))


def corpus_dist_1(predictions: Sequence[str]) -> float:
    """
    Dist-1 of all replies taken together (Li et al., 2016): unique 1-grams / 1-grams of the whole list.

    It falls as the list grows: compare lists of the same size. Tokens as in `dist_1`.

    Returns:
        above 0, to 1.

    Example: "i see" twice: 2 unique of 4 tokens, 0.5 (where `dist_1` gives 1.0).
    """
    check_texts(predictions, "predictions")
    tokens = [token for text in predictions for token in tokens_of(text)]
    return len(set(tokens)) / len(tokens)


def bleu(predictions: Sequence[str], references: Sequence[str], order: int = 4) -> float:
    """
    BLEU-1 to BLEU-4 of the corpus (Table 8; Papineni et al., 2002), by sacrebleu.

    Cumulative with equal weights: BLEU-n is the geometric mean of the precisions of 1- to n-grams, times the brevity
    penalty. Case counts; tokenisation `13a`; exponential smoothing, which only plays a part where no n-gram of a length
    matches in the whole corpus.

    Args:
        predictions: the texts; an empty one matches nothing.
        references: one a text.
        order: the longest n-grams, 1 to 4.

    Returns:
        0 to 1 (sacrebleu prints 0 to 100).

    Example: order 1, "the old cat" for "the old dog": 2 of 3 words match, and it is not too short: 0.667.
    """
    _check_pairs(predictions, references)
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order is {order!r}; BLEU is taken from 1 to 4.")
    metric = BLEU(max_ngram_order=order, tokenize="13a", smooth_method="exp", lowercase=False, effective_order=False)
    score = metric.corpus_score(list(predictions), [list(references)]).score / 100
    return min(score, 1.0)  # the geometric mean of ones may come out a rounding above one


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def word_recall(predictions: Sequence[str], words: Sequence[Sequence[str]]) -> float:
    """
    The share of the wanted words that are said: each row has its own list of them.

    Use it for what only the history could tell: a name, a city. The words of all rows count alike; a word that is
    wanted twice has to be said twice. Case does not count.

    Args:
        predictions: the texts.
        words: for each text the words that it should say, possibly none.

    Returns:
        0 to 1.

    Raises:
        ValueError: if no row wants a word.

    Example: "you are clara" wants clara, "in rome" wants oslo and rome: 2 of 3 words, 0.667.
    """
    check_texts(predictions, "predictions", allow_empty=True)
    if len(words) != len(predictions):
        raise ValueError(f"There are {len(predictions)} predictions but {len(words)} lists of words.")
    hits = total = 0
    for row, (text, wanted) in enumerate(zip(predictions, words, strict=True)):
        if isinstance(wanted, str):
            raise ValueError(f"words, row {row}: {wanted!r} is a string; give a list of words.")
        needed = Counter(word.lower() for word in wanted)
        hits += (needed & Counter(words_of(text))).total()
        total += needed.total()
    if total == 0:
        raise ValueError("No row wants a word, so there is nothing to recall.")
    return hits / total


def content_recall(predictions: Sequence[str], references: Sequence[str], content_words: Collection[str]) -> float:
    """
    The share of the references' content words that the predictions say (beside BLEU for rebuilt conversations).

    BLEU is high for sentences of the right pattern with the wrong names: two random utterances of a small grammar share
    a third of their words. This counts what carries the content.

    Args:
        predictions: the texts; an empty one recalls nothing.
        references: one a text.
        content_words: the words that count, in lower case.

    Returns:
        0 to 1, see `word_recall`.

    Example: content words clara, dog, oslo; "clara has a cat" for "clara has a dog": 1 of 2, 0.5.
    """
    _check_pairs(predictions, references)
    content = frozenset(content_words)
    return word_recall(predictions, [[word for word in words_of(text) if word in content] for text in references])


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    The share of predictions that equal their reference, runs of white space taken as one space. Case counts.

    Returns:
        0 to 1.

    Example: "i  see." for "i see." and "ok" for "OK": 1 of 2, 0.5.
    """
    _check_pairs(predictions, references)
    return float(np.mean([p.split() == r.split() for p, r in zip(predictions, references, strict=True)]))


def accuracy(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] = EMOTIONS) -> dict:
    """
    Accuracy of named emotions (Fig. 6), with each class's recall and the confusion.

    Args:
        predictions: what was named; case and white space around it do not count. What is none of `labels` is wrong, and
            counts as "other" in the confusion.
        references: the true labels.
        labels: all labels.

    Returns:
        `accuracy` (0 to 1), `recall` ({label: 0 to 1, or None for a label that no reference has}), `mean_recall` (over
        the labels that occur; unlike accuracy it does not reward naming the most frequent one), `confusion` ({true
        label: {named label or "other": count}}).

    Raises:
        ValueError: for a reference that is none of `labels`, naming its row.

    Example: happy, sad, sad named for happy, happy, sad: accuracy 2/3, recall of happy 1/2, of sad 1.
    """
    _check_pairs(predictions, references)
    confusion = {label: dict.fromkeys([*labels, "other"], 0) for label in labels}
    for row, (named, true) in enumerate(zip(predictions, references, strict=True)):
        if true not in confusion:
            raise ValueError(f"references, row {row}: {true!r} is not one of {', '.join(labels)}.")
        named = named.strip().lower()
        confusion[true][named if named in confusion else "other"] += 1
    totals = {label: sum(counts.values()) for label, counts in confusion.items()}
    recall = {label: confusion[label][label] / totals[label] if totals[label] else None for label in labels}
    present = [value for value in recall.values() if value is not None]
    return {
        "accuracy": sum(confusion[label][label] for label in labels) / len(references),
        "recall": recall,
        "mean_recall": sum(present) / len(present),
        "confusion": confusion,
    }
