"""Tests of the tiny stand-in for the GoEmotions RoBERTa, and of the features from any such classifier."""

import random

import numpy as np
import pytest
import torch
from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaTokenizer,
)

from empathic.configuration_empathic import EMOTIONS
from empathic.evaluation.emotion_features import POOLINGS, EmotionFeatures
from empathic.tiny.dialogues import emotion_sentences, make_dialogues, reply_for
from empathic.tiny.emotion_classifier import train_emotion_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier trained with two thirds of the usual steps."""
    folder = tmp_path_factory.mktemp("classifier")
    sentences, labels = zip(*emotion_sentences(2000), strict=True)
    losses = train_emotion_classifier(folder, sentences, labels, steps=200, progress=False)
    assert len(losses) == 200 and losses[-1] < 0.5 < losses[0]
    return str(folder)


@pytest.fixture(scope="module")
def replies():
    """Replies to held-out sentences in the style of each emotion: (texts, emotions), the seven emotions in order."""
    rng, texts = random.Random(5), []
    for dialogue in make_dialogues(12, seed=9, split="test"):
        texts += [reply_for(turn["context"], emotion, rng) for turn in dialogue[::2] for emotion in EMOTIONS]
    return texts, [*EMOTIONS] * (len(texts) // len(EMOTIONS))


def test_it_names_the_emotion_of_held_out_replies(folder, replies):
    texts, emotions = replies
    seen = {sentence for sentence, _ in emotion_sentences(2000)}
    unseen = [i for i, text in enumerate(texts) if text not in seen]
    assert len(unseen) > 100
    named = EmotionFeatures(folder, "probabilities").encode(texts).argmax(1)
    assert np.mean([EMOTIONS[named[i]] == emotions[i] for i in unseen]) >= 0.95


@pytest.mark.parametrize("pooling", POOLINGS)
def test_another_emotion_is_always_below_the_papers_threshold(folder, replies, pooling):
    texts, _ = replies
    vectors = (
        EmotionFeatures(folder, pooling)
        .encode(texts)
        .reshape(-1, len(EMOTIONS), 64 if pooling != "probabilities" else 7)
    )
    cosines = np.einsum("tid,tjd->tij", vectors, vectors)  # replies to one sentence in two emotions
    assert (cosines.min(-1) < 0.1).all()
    same = np.einsum("tid,sid->tsi", vectors, vectors)  # replies to two sentences in one emotion
    assert np.quantile(same, 0.01) > 0.5


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state(tmp_path):
    sentences, labels = zip(*emotion_sentences(70), strict=True)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    runs = [
        train_emotion_classifier(tmp_path / str(i), sentences, labels, steps=3, seed=seed, progress=False)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]
    models = [RobertaForSequenceClassification.from_pretrained(tmp_path / str(i)) for i in range(2)]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_a_wrong_label_is_named(tmp_path):
    with pytest.raises(ValueError, match="labels, row 1: 'calm' is not one of"):
        train_emotion_classifier(tmp_path, ["a", "b"], ["happy", "calm"], steps=1)
    with pytest.raises(ValueError, match="2 sentences but 1 labels"):
        train_emotion_classifier(tmp_path, ["a", "b"], ["happy"], steps=1)


def test_its_tokenizer_is_robertas_and_writes_any_text(folder):
    tokenizer = RobertaTokenizer.from_pretrained(folder)
    text = "Ünïcode, 你好 & <emoji> 🙂 never seen"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


TEXTS = ["i am so sorry.", "hooray for you! how is tiger the horse?", "yuck, how nasty!", "no way!"]


def by_hand(folder, pooling):
    """The features of TEXTS, computed with transformers only, one text at a time."""
    tokenizer, rows = RobertaTokenizer.from_pretrained(folder), []
    model = RobertaForSequenceClassification.from_pretrained(folder).eval()
    for text in TEXTS:
        with torch.no_grad():
            hidden = model.roberta(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # (tokens, hidden)
            head = torch.tanh(model.classifier.dense(hidden[0]))
            probabilities = torch.softmax(model.classifier.out_proj(head), -1)
        rows.append({"cls": hidden[0], "mean": hidden.mean(0), "head": head, "probabilities": probabilities}[pooling])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_are_those_computed_one_by_one(folder, pooling):
    features = EmotionFeatures(folder, pooling, batch_size=3)
    vectors = features.encode([*TEXTS, TEXTS[1]])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:4], by_hand(folder, pooling), atol=2e-6)
    np.testing.assert_array_equal(vectors[4], vectors[1])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    together = features.encode_all([*TEXTS, TEXTS[1]])
    assert list(together) == list(POOLINGS)
    np.testing.assert_array_equal(together[pooling], vectors)
    assert features.description == f"{folder}, pooling {pooling}"
    cosines = features.similarity(TEXTS[:2], [TEXTS[0], TEXTS[2]])
    np.testing.assert_allclose(cosines, [1, vectors[1] @ vectors[2]], atol=1e-6)


def test_a_multi_label_classifier_gives_each_class_by_itself(folder, tmp_path):
    model = RobertaForSequenceClassification.from_pretrained(folder, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path)
    tokenizer = RobertaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(**tokenizer("no way!", return_tensors="pt")).logits.sigmoid()
    vectors = EmotionFeatures(tmp_path, "probabilities").encode(["no way!"])
    np.testing.assert_allclose(vectors, (expected / expected.norm()).numpy(), atol=1e-6)


def test_bad_input_is_named(folder, tmp_path):
    features = EmotionFeatures(folder)
    with pytest.raises(ValueError, match=r"texts, row 1: the text is empty"):
        features.encode(["fine", " "])
    with pytest.raises(ValueError, match=r"texts, row 0: 3 is not a string"):
        features.encode([3])
    with pytest.raises(ValueError, match="2 texts on one side but 1 on the other"):
        features.similarity(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="pooling 'max' is not one of mean, cls, head, probabilities"):
        EmotionFeatures(folder, "max")
    plain = RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    RobertaForMaskedLM(plain).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no text classifier \(it holds RobertaForMaskedLM\)"):
        EmotionFeatures(tmp_path)


def test_a_text_longer_than_the_model_reads_is_cut(folder):
    long = "that is wonderful! " * 200
    for pooling in POOLINGS:
        assert np.isfinite(EmotionFeatures(folder, pooling).encode([long])).all()
