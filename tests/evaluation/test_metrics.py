"""Every metric against numbers worked out by hand."""

import math

import numpy as np
import pytest

from empathic.evaluation.metrics import (
    accuracy,
    bleu,
    bleu_counts,
    bleu_of_counts,
    content_recall,
    corpus_dist_1,
    corpus_dist_n,
    dist_1,
    dist_n_scores,
    emotion_score,
    emotion_scores,
    exact_match,
    mean_dist_n,
    tokens_of,
    word_recall,
    words_of,
)


class FixedFeatures:
    """Texts -> vectors that the test chose."""

    description = "fixed"

    def __init__(self, **vectors):
        self.vectors = vectors

    def encode(self, texts):
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


def test_emotion_score_is_the_mean_cosine_of_each_pair():
    features = FixedFeatures(joy=(1, 0), glee=(0.6, 0.8), grief=(-1, 0))
    assert emotion_score(["joy", "glee"], ["joy", "joy"], features) == pytest.approx(0.8)
    assert emotion_score(["joy", "grief"], ["glee", "joy"], features) == pytest.approx((0.6 - 1) / 2)


def test_emotion_scores_take_the_most_similar_reference_and_give_an_empty_reply_0():
    features = FixedFeatures(joy=(1, 0), glee=(0.6, 0.8), grief=(-1, 0))
    scores = emotion_scores(["joy", " ", "glee"], [["grief", "glee"], "joy", ["glee"]], features, allow_empty=True)
    assert scores == pytest.approx([0.6, 0.0, 1.0])
    assert emotion_scores(["", ""], ["joy", "joy"], features, allow_empty=True).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"references, row 1, number 1: the text is empty"):
        emotion_scores(["joy", "joy"], ["joy", ["joy", ""]], features)


def test_tokens_are_lower_case_words_and_marks():
    assert tokens_of("Don't worry, it's OK... naïve_one!") == (
        ["don't", "worry", ",", "it's", "ok", ".", ".", ".", "naïve", "_", "one", "!"]
    )
    assert words_of("Don't worry: Clara's well-known.") == ["don't", "worry", "clara's", "well-known"]


def test_dist_1_is_averaged_over_replies_and_corpus_dist_1_is_not():
    assert dist_1(["no, no, no!", "I see"]) == pytest.approx((3 / 6 + 1) / 2)
    assert dist_1(["i see", "i see"]) == 1.0
    assert corpus_dist_1(["i see", "I see"]) == pytest.approx(2 / 4)
    assert dist_1(["!!!!"]) == pytest.approx(1 / 4)


def test_dist_n_of_pairs_and_triples():
    # a b a b: ab ba ab, 2 of 3 different; aba bab, both different
    assert mean_dist_n(["a b a b"], 2) == 2 / 3 and mean_dist_n(["a b a b"], 3) == 1.0
    assert corpus_dist_n(["a b a b", "b a", "c"], 2) == 2 / 4
    scores = dist_n_scores(["a b a b", "c", ""], 2, allow_empty=True)
    assert scores[0] == 2 / 3 and np.isnan(scores[1]) and scores[2] == 0.0
    assert mean_dist_n(["a b a b", "c"], 2) == 2 / 3
    assert dist_1(["a b", ""], allow_empty=True) == 0.5 and corpus_dist_1(["a b", ""], allow_empty=True) == 1.0
    for metric in (mean_dist_n, corpus_dist_n):
        with pytest.raises(ValueError, match="No reply has 2 tokens"):
            metric(["c"], 2)


def ngram_precision(predictions, references, n):
    """Clipped matches and n-grams of whole corpora of space-separated words."""
    hits = total = 0
    for prediction, reference in zip(predictions, references, strict=True):
        grams, others = (
            [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            for words in (prediction.split(), reference.split())
        )
        hits += sum(min(grams.count(gram), others.count(gram)) for gram in set(grams))
        total += len(grams)
    return hits / total


@pytest.mark.parametrize("order", [1, 2, 4])
def test_bleu_is_the_geometric_mean_of_corpus_precisions_with_brevity_penalty(order):
    predictions = ["my sister sold the old piano in rome", "the dog of clara is called rex now"]
    references = ["my sister sold the old violin in rome today", "the old dog of clara is called rex"]
    precisions = [ngram_precision(predictions, references, n) for n in range(1, order + 1)]
    penalty = math.exp(1 - 17 / 16)  # 16 words for 17
    expected = penalty * math.exp(sum(map(math.log, precisions)) / order)
    assert bleu(predictions, references, order) == pytest.approx(expected, abs=1e-9)


def test_bleu_counts_add_up_over_any_choice_of_rows():
    predictions = ["my sister sold the piano", "the dog", "", "we met in rome"]
    references = ["my sister sold the old piano", ["a dog", "the dog of clara"], "no", "we met in oslo"]
    counts = bleu_counts(predictions, references, 2)
    assert counts[1].tolist() == [2, 2, 2, 1, 2, 1]  # 2 words for 2; both words and the pair match
    for rows in ([0, 1, 2, 3], [0, 0, 3], [1, 2]):
        chosen = [predictions[row] for row in rows], [references[row] for row in rows]
        assert bleu_of_counts(counts[rows].sum(0)) == bleu(*chosen, 2)


def test_bleu_at_its_ends():
    assert bleu(["the old dog of clara"], ["the old dog of clara"], 4) == 1.0
    assert bleu([""], ["the old dog"], 1) == 0.0
    assert bleu(["the old cat"], ["the old dog"], 1) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="order is 5"):
        bleu(["a"], ["a"], 5)


def test_word_recall_counts_each_wanted_word_once():
    assert word_recall(["you are Clara.", "in rome"], [["clara"], ["oslo", "Rome"]]) == pytest.approx(2 / 3)
    assert word_recall(["no no", "no"], [["no", "no"], ["no", "no"]]) == pytest.approx(3 / 4)
    assert word_recall(["", "clara"], [["rex"], []]) == 0.0
    assert word_recall(["a clarabelle"], [["clara"]]) == 0.0  # whole words only
    with pytest.raises(ValueError, match="nothing to recall"):
        word_recall(["hello"], [[]])
    with pytest.raises(ValueError, match=r"words, row 1: 'rex' is a string"):
        word_recall(["a", "b"], [["x"], "rex"])


def test_content_recall_ignores_the_other_words():
    words = {"clara", "dog", "cat"}
    assert content_recall(["clara has a cat"], ["clara has a dog"], words) == 0.5
    assert content_recall(["", "my dog"], ["clara has a dog", "a dog"], words) == pytest.approx(1 / 3)


def test_exact_match_sees_case_but_not_spacing():
    assert exact_match(["i  see. ", "ok", ""], ["i see.", "OK", "well"]) == pytest.approx(1 / 3)


def test_accuracy_with_recall_and_confusion():
    result = accuracy(["happy", " Sad", "sad", "joyful"], ["happy", "happy", "sad", "sad"])
    assert result["accuracy"] == 0.5
    assert result["recall"]["happy"] == 0.5 and result["recall"]["sad"] == 0.5
    assert result["recall"]["angry"] is None
    assert result["confusion"]["happy"]["sad"] == 1 and result["confusion"]["sad"]["other"] == 1
    assert sum(sum(counts.values()) for counts in result["confusion"].values()) == 4
    unbalanced = accuracy(["sad"] * 4, ["sad", "sad", "sad", "happy"])
    assert unbalanced["accuracy"] == 0.75 and unbalanced["mean_recall"] == 0.5
    assert accuracy(["sad", "other"], ["sad", "sad"])["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"references, row 1: 'calm' is not one of"):
        accuracy(["sad", "sad"], ["sad", "calm"])


@pytest.mark.parametrize("metric", [lambda p, r: emotion_score(p, r, None), bleu, exact_match, accuracy])
def test_errors_name_the_row_and_both_lengths(metric):
    with pytest.raises(ValueError, match=r"predictions, row 1: None is not a string"):
        metric(["a", None], ["a", "b"])
    with pytest.raises(ValueError, match=r"references, row 0: the text is empty"):
        metric(["a", "b"], ["  ", "b"])
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="empty list"):
        metric([], [])
    with pytest.raises(ValueError, match="give a list of strings"):
        metric("happy", "happy")


def test_an_empty_reply_has_no_emotion_and_no_words():
    for metric in (dist_1, corpus_dist_1, lambda p: emotion_score(p, ["a", "b"], None)):
        with pytest.raises(ValueError, match=r"predictions, row 1: the text is empty \('\\n'\)"):
            metric(["a", "\n"])
