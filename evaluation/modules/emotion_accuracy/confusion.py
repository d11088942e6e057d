"""Accuracy of named emotions, each emotion's recall, and what was taken for what."""

from collections.abc import Sequence

from .checked_texts import check_lengths, check_texts

OTHER = "other"


def accuracy(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str], allow_empty: bool = True
) -> dict:
    """
    Accuracy of named emotions (paper's Fig. 6), with each class's recall and the confusion.

    Args:
        predictions: what was named; case and white space around it do not count. What is none of `labels` is wrong, and
            counts as "other" in the confusion.
        references: the true labels.
        labels: all labels.
        allow_empty: takes an empty prediction, which is wrong.

    Returns:
        `accuracy` (0 to 1), `recall` ({label: 0 to 1, or None for a label that no reference has}), `mean_recall` (over
        the labels that occur, also called unweighted average recall or UAR; unlike accuracy it does not reward naming
        the most frequent one), `confusion` ({true label: {named label or "other": count}}).

    Raises:
        ValueError: for a row that is empty or no string, or a reference that is none of `labels`, naming its row.

    Example: happy, sad, sad named for happy, happy, sad: accuracy 2/3, recall of happy 1/2, of sad 1.
    """
    check_texts(predictions, "predictions", allow_empty)
    check_texts(references, "references")
    check_lengths(predictions, references)
    confusion = {label: dict.fromkeys([*labels, OTHER], 0) for label in labels}
    for row, (named, true) in enumerate(zip(predictions, references, strict=True)):
        if true not in confusion:
            raise ValueError(f"references, row {row}: {true!r} is not one of {', '.join(labels)}.")
        named = named.strip().lower()
        confusion[true][named if named in confusion else OTHER] += 1
    totals = {label: sum(counts.values()) for label, counts in confusion.items()}
    recall = {label: confusion[label][label] / totals[label] if totals[label] else None for label in labels}
    present = [value for value in recall.values() if value is not None]
    return {
        "accuracy": sum(confusion[label][label] for label in labels) / len(references),
        "recall": recall,
        "mean_recall": sum(present) / len(present),
        "confusion": confusion,
    }
