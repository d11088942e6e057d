"""
F1 of answers as each benchmark defines it.

- LoCoMo: F1 over Porter stems without articles and punctuation. An answer to a multi-hop question is divided at commas,
  and each part of the key gets the best F1 of a part. Of an open-domain key only the part before a semicolon counts. An
  adversarial question is answered well if the answer says that this was not mentioned.
- ES-MemEval: F1 over sets of words.
- LongMemEval is scored by a judge model, which is not used here; the value is the usual F1 over words without articles
  and punctuation (Rajpurkar et al. 2016), and for its abstention questions whether the answer says that this was not
  mentioned. `answers.jsonl` has the two keys that the benchmark's own judge reads, `question_id` and `hypothesis`.
"""

import re
import string
from collections import Counter
from functools import cache

from .sources import ABSTENTION, Question

# How an answer says that the conversation has none. LoCoMo accepts the first two.
NOTHING_SAID = ("not mentioned", "no information available")
MORE_NOTHING_SAID = ("not mention", "no information", "unknown", "don't know", "do not know", "cannot be answered")


@cache
def _stemmer():
    from nltk.stem import PorterStemmer

    return PorterStemmer()


def words(text: str, left_out: str = "a|an|the") -> list[str]:
    """The words of a text in lower case, without punctuation and without the words in `left_out`."""
    text = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return re.sub(rf"\b({left_out})\b", " ", text).split()


def f1(answer: list[str], key: list[str]) -> float:
    """Harmonic mean of precision and recall of words, counted as often as they occur; 0 if none is shared."""
    shared = sum((Counter(answer) & Counter(key)).values())
    return 2 * shared / (len(answer) + len(key)) if shared else 0.0


def _stems(text: str) -> list[str]:
    return [_stemmer().stem(word) for word in words(text, "a|an|the|and")]


def says_nothing(answer: str, phrases: tuple[str, ...] = NOTHING_SAID) -> bool:
    """Whether an answer says that the conversation does not tell."""
    return any(phrase in answer.lower() for phrase in phrases)


def locomo_score(question: Question, answer: str) -> float:
    """LoCoMo's score of an answer, from 0 to 1."""
    key = question.answer
    if question.category == "adversarial":
        return float(says_nothing(answer))
    if question.category == "open domain":
        key = key.split(";")[0]
    if question.category == "multi-hop":
        parts = [_stems(part) for part in answer.split(",")]
        best = [max(f1(part, _stems(one)) for part in parts) for one in key.split(",")]
        return sum(best) / len(best)
    return f1(_stems(answer), _stems(key))


def es_memeval_score(question: Question, answer: str) -> float:
    """ES-MemEval's score of an answer, from 0 to 1."""
    own, key = ({*re.sub(r"\W+", " ", text.lower()).split()} for text in (answer, question.answer))
    return f1(list(own), list(key))


def longmemeval_score(question: Question, answer: str) -> float:
    """F1 of an answer; of an abstention question, whether it says that the conversation does not tell."""
    if question.category == ABSTENTION:
        return float(says_nothing(answer, NOTHING_SAID + MORE_NOTHING_SAID))
    return f1(words(answer), words(question.answer))


SCORES = {"locomo": locomo_score, "longmemeval": longmemeval_score, "es-memeval": es_memeval_score}
