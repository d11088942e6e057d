"""What every metric asks of its texts: lists of strings, as many predictions as references, none of them empty."""

from collections.abc import Sequence
from typing import Any


def _check_text(text, place: str, allow_empty: bool) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{place}: {text!r} is not a string.")
    if not allow_empty and not text.strip():
        raise ValueError(f"{place}: the text is empty ({text!r}). Leave the row out, and say so.")


def _check_list(texts, name: str) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"{name} is {texts!r}; give a list of strings.")
    if not texts:
        raise ValueError(f"{name} is an empty list; give at least one string.")


def check_texts(texts: Sequence[str], name: str, allow_empty: bool = False, first_row: int = 0) -> None:
    """
    Raises a ValueError that names the row if `texts` is empty, or holds a value that is empty or no string.

    Args:
        texts: the list.
        name: of it, for the error.
        allow_empty: takes strings without a word.
        first_row: the number of the first row, for the error.
    """
    _check_list(texts, name)
    for row, text in enumerate(texts, first_row):
        _check_text(text, f"{name}, row {row}", allow_empty)


def reference_lists(
    references: Sequence[str | Sequence[str]], allow_empty: bool = False, first_row: int = 0
) -> list[list[str]]:
    """
    The references of each row as a list, where a row may hold one text or a list of texts.

    Raises:
        ValueError: for a row that holds none, or one that is empty or no string; it names the row.
    """
    _check_list(references, "references")
    lists = []
    for row, given in enumerate(references, first_row):
        several = isinstance(given, Sequence) and not isinstance(given, str)
        if several and not given:
            raise ValueError(f"references, row {row}: the list is empty; give at least one text.")
        lists.append(list(given) if several else [given])
        for number, text in enumerate(lists[-1]):
            _check_text(
                text, f"references, row {row}" + (f", number {number}" if len(lists[-1]) > 1 else ""), allow_empty
            )
    return lists


def check_lengths(predictions: Sequence, references: Sequence) -> None:
    """Raises a ValueError with both lengths if they differ."""
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions but {len(references)} references.")


def check_pairs(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], allow_empty: bool = False
) -> list[list[str]]:
    """
    Raises a ValueError for rows that are no pairs of texts; returns the references as `reference_lists` does.

    Args:
        predictions: the texts.
        references: of each row one text, or a list of texts any of which would be right; never empty.
        allow_empty: takes predictions without a word.
    """
    check_texts(predictions, "predictions", allow_empty)
    lists = reference_lists(references)
    check_lengths(predictions, lists)
    return lists


class CheckedRows:
    """
    Stands before `evaluate.Metric` among a module's bases: rows are checked as they come in.

    `evaluate` would write a number down as the text of it, and name no row. Whether empty texts are right, `compute`
    knows. The module's class says in `several_references` whether a row may have a list of references.
    """

    several_references = True

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs):
        """Adds rows. A row that is no string is a ValueError that names it."""
        first, names = len(self), self._feature_names()
        check_texts(predictions, "predictions", allow_empty=True, first_row=first)
        if "references" in names:
            if self.several_references:
                references = reference_lists(references, allow_empty=True, first_row=first)
            else:
                check_texts(references, "references", allow_empty=True, first_row=first)
            check_lengths(predictions, references)
            kwargs["references"] = references
        super().add_batch(predictions=list(predictions), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one row; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)
