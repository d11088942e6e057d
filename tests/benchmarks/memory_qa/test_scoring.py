"""The benchmarks' own scores, on numbers worked by hand."""

import pytest

from empathic.benchmarks.memory_qa.scoring import es_memeval_score, f1, locomo_score, longmemeval_score
from empathic.benchmarks.memory_qa.sources import Question


def question(answer, category):
    return Question("q", "what?", answer, category)


@pytest.mark.parametrize(
    ("category", "key", "answer", "score"),
    [
        ("single-hop", "the old dogs", "Old dog.", 1.0),  # stems, without articles and punctuation
        ("single-hop", "an old dog", "a dog and cats", 0.5),  # one word of two and of two
        ("single-hop", "a dog", "", 0.0),
        ("temporal", "7 May 2023", "May 7, 2023", 1.0),
        ("open domain", "yes; since she said so", "yes", 1.0),
        ("single-hop", "yes; since she said so", "yes", 2 / 6),
        ("multi-hop", "dogs, cats", "cats", 0.5),  # of each part of the key, the best part of the answer
        ("multi-hop", "dogs, cats", "a cat, a dog", 1.0),
        ("adversarial", "dogs", "Not mentioned in the conversation", 1.0),
        ("adversarial", "dogs", "No information available.", 1.0),
        ("adversarial", "dogs", "dogs", 0.0),
    ],
)
def test_locomo(category, key, answer, score):
    assert locomo_score(question(key, category), answer) == pytest.approx(score)


def test_es_memeval_counts_a_word_once():
    assert es_memeval_score(question("she is sad, sad", "IE"), "Sad she was") == pytest.approx(2 / 3)
    assert es_memeval_score(question("sad", "IE"), "") == 0.0


def test_longmemeval():
    assert longmemeval_score(question("a red bike", "multi-session"), "the red bike!") == 1.0
    assert longmemeval_score(question("you did not tell", "abstention"), "I don't know.") == 1.0
    assert longmemeval_score(question("you did not tell", "abstention"), "a red bike") == 0.0


def test_f1_counts_a_word_as_often_as_it_occurs():
    assert f1(["a", "a", "b"], ["a", "c"]) == pytest.approx(2 / 5)
    assert f1([], ["a"]) == f1(["b"], ["a"]) == 0.0
