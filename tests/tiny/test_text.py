"""Tests of the tiny preset's text: the grammar's properties, the two tokenizers, the language model's pretraining."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Qwen2ForCausalLM,
    WhisperFeatureExtractor,
)

from empathic.configuration_empathic import EMOTIONS
from empathic.processing_empathic import EmpathicProcessor
from empathic.tiny import dialogues as grammar
from empathic.tiny.language_model import (
    Pretrainer,
    _share,
    pretrain_language_model,
    start_with_copying,
    tiny_text_config,
    utterance_vectors,
    word_weights,
)
from empathic.tiny.pretraining_tasks import MIXTURES, PretrainingTasks, PromptWriter, prompt_texts
from empathic.tiny.vocabulary import QWEN_SPECIAL_TOKENS, build_memory_tokenizer, build_text_tokenizer


@pytest.fixture(scope="module")
def train():
    return grammar.make_dialogues(600, seed=3, split="train")


@pytest.fixture(scope="module")
def test():
    return grammar.make_dialogues(200, seed=3, split="test")


@pytest.fixture(scope="module")
def text_tokenizer():
    return build_text_tokenizer(prompt_texts())


@pytest.fixture(scope="module")
def memory_tokenizer():
    return build_memory_tokenizer(prompt_texts())


def turns_of(dialogues, speaker):
    return [turn for dialogue in dialogues for turn in dialogue if turn["speaker"] == speaker]


# ---------------------------------------------------------------------------------------------------- the grammar


def test_dialogues_are_deterministic_and_differ_by_seed():
    assert grammar.make_dialogues(20, 5, "test") == grammar.make_dialogues(20, 5, "test")
    assert grammar.make_dialogues(20, 5, "test") != grammar.make_dialogues(20, 6, "test")


def test_the_speakers_take_turns(train):
    assert {len(dialogue) for dialogue in train} == {4, 6, 8}
    for dialogue in train:
        assert [turn["speaker"] for turn in dialogue] == [grammar.USER, grammar.ASSISTANT] * (len(dialogue) // 2)


def test_half_of_the_sentences_hide_their_emotion(train):
    turns = turns_of(train, grammar.USER)
    assert {turn["emotion"] for turn in turns} == set(EMOTIONS)
    assert sum(turn["reveals"] for turn in turns) / len(turns) == pytest.approx(0.5, abs=0.04)
    owners = {phrase: emotion for emotion, phrases in grammar.REVEALING.items() for phrase in phrases}
    assert len(owners) == sum(map(len, grammar.REVEALING.values()))  # no phrase belongs to two emotions
    for turn in turns:
        said = {emotion for phrase, emotion in owners.items() if phrase in turn["text"]}
        assert said == ({turn["emotion"]} if turn["reveals"] else set()), turn


def test_the_best_guess_from_text_alone_is_bounded(train):
    """With all phrases known, and the commonest emotion as a guess elsewhere, the accuracy is about 0.57."""
    turns = turns_of(train, grammar.USER)
    hidden = [turn["emotion"] for turn in turns if not turn["reveals"]]
    best = max(hidden.count(emotion) for emotion in EMOTIONS)
    assert (len(turns) - len(hidden) + best) / len(turns) < 0.63


def test_replies_follow_the_emotion_and_the_content(train):
    openers = {opener: emotion for emotion, group in grammar.OPENERS.items() for opener in group}
    assert len(openers) == sum(map(len, grammar.OPENERS.values()))
    for dialogue in train:
        for turn, reply in zip(dialogue[::2], dialogue[1::2], strict=True):
            assert [e for opener, e in openers.items() if reply["text"].startswith(opener)] == [turn["emotion"]]
            if not reply["recall"]:
                assert all(word in grammar.words_of(reply["text"]) for word in turn["pair"])


def test_any_emotion_has_a_reply_to_any_sentence(train):
    rng = random.Random(0)
    for turn in turns_of(train, grammar.USER)[:200]:
        for emotion in EMOTIONS:
            reply = grammar.reply_for(turn["context"], emotion, rng)
            assert any(reply.startswith(opener) for opener in grammar.OPENERS[emotion])
    with pytest.raises(ValueError, match="calm"):
        grammar.reply_for(turn["context"], "calm", rng)


def test_a_reply_without_the_history_recalls_nothing(train):
    rng = random.Random(0)
    asked = [turn for turn in turns_of(train, grammar.ASSISTANT) if turn["recall"]]
    for turn in asked:
        words = grammar.words_of(grammar.reply_for(grammar.forget(turn["context"]), "sad", rng))
        assert not set(turn["recall"]) & set(words)


def test_recalled_words_are_in_the_reply_and_only_in_the_early_history(train):
    replies = 0
    for dialogue in train:
        for k in range(1, len(dialogue), 2):
            for word in dialogue[k]["recall"]:
                replies += 1
                assert word in grammar.words_of(dialogue[k]["text"])
                assert word not in grammar.words_of(dialogue[k - 1]["text"])
                assert any(word in grammar.words_of(turn["text"]) for turn in dialogue[: k - 1])
    assert replies / len(turns_of(train, grammar.ASSISTANT)) == pytest.approx(0.4, abs=0.05)


def test_splits_share_no_content(train, test):
    validation = grammar.make_dialogues(200, seed=3, split="validation")
    for one, other in ((train, test), (train, validation), (validation, test)):
        texts = {turn["text"] for dialogue in one for turn in dialogue if turn["pair"]}
        others = {turn["text"] for dialogue in other for turn in dialogue if turn["pair"]}
        assert not texts & others
    assert {grammar.split_of(t["pair"]) for d in test for t in d if t["pair"]} == {"test"}
    unseen = grammar.unseen_utterances(test, train)
    assert len(unseen) > 0.6 * sum(map(len, test))
    assert not set(unseen) & {turn["text"] for dialogue in train for turn in dialogue}
    with pytest.raises(ValueError, match="dev"):
        grammar.make_dialogues(1, 0, "dev")


def test_two_random_utterances_share_little(test):
    """A small grammar inflates BLEU, so two utterances must have few words in common."""
    rng = random.Random(0)
    texts = [turn["text"] for dialogue in test for turn in dialogue if turn["pair"]]
    shared = total = 0
    for _ in range(2000):
        one, other = grammar.words_of(rng.choice(texts)), grammar.words_of(rng.choice(texts))
        shared += sum(word in other for word in one)
        total += len(one)
    assert shared / total < 0.25


def test_emotion_sentences_are_balanced_and_no_test_sentences(test):
    pairs = grammar.emotion_sentences(700, seed=1)
    counts = [sum(emotion == e for _, emotion in pairs) for e in EMOTIONS]
    assert counts == [100] * 7
    assert not {text for text, _ in pairs} & {turn["text"] for d in test for turn in d if turn["pair"]}
    assert pairs == grammar.emotion_sentences(700, seed=1)


# ---------------------------------------------------------------------------------------------------- tokenizers


def test_every_word_is_one_token(text_tokenizer, memory_tokenizer, train, test):
    words = grammar.grammar_words()
    assert 350 <= len(words) <= 450
    said = {word for dialogue in train + test for turn in dialogue for word in grammar.words_of(turn["text"])}
    assert said <= set(words)
    for tokenizer in (text_tokenizer, memory_tokenizer):
        for word in words:
            assert len(tokenizer(word)["input_ids"]) == 1, word
            assert len(tokenizer(" " + word)["input_ids"]) == 1, word
        assert len(tokenizer) < 1900


@pytest.mark.parametrize("which", ["text_tokenizer", "memory_tokenizer"])
def test_any_text_comes_back(which, request, tmp_path, test):
    tokenizer = request.getfixturevalue(which)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.all_special_ids == tokenizer.all_special_ids
    texts = [turn["text"] for turn in test[0]] + ["Größe 12,5\n\tzweimal — 日本 🙂  <|im_start|>", "<MEM> rex"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == loaded(text)["input_ids"]
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
        assert loaded.decode(ids) == text


def test_special_tokens(text_tokenizer, memory_tokenizer):
    assert text_tokenizer.eos_token == "<|im_end|>"
    assert text_tokenizer.pad_token == "<|endoftext|>"
    for token in QWEN_SPECIAL_TOKENS:
        assert text_tokenizer(token)["input_ids"] == [text_tokenizer.convert_tokens_to_ids(token)]
        assert token in text_tokenizer.all_special_tokens
    assert memory_tokenizer.eos_token_id == 0
    assert "<MEM>" not in memory_tokenizer.get_vocab()


def test_tokenizers_are_reproducible(text_tokenizer):
    assert build_text_tokenizer(prompt_texts()).get_vocab() == text_tokenizer.get_vocab()


# ---------------------------------------------------------------------------------------------------- pretraining


def test_prompts_are_the_processors():
    """The language model's pretraining prompts must equal the prompts of the stages, token by token."""
    # Separate tokenizers, because tokens are added to them.
    text_tokenizer, memory_tokenizer = build_text_tokenizer(prompt_texts()), build_memory_tokenizer(prompt_texts())
    memory_tokenizer.add_special_tokens({"additional_special_tokens": ["<MEM>"]})
    processor = EmpathicProcessor(
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}),
        WhisperFeatureExtractor(chunk_length=1),
        text_tokenizer,
        memory_tokenizer,
        num_query_tokens=4,
    )
    writer = PromptWriter(text_tokenizer, num_query_tokens=4)
    messages = [
        {"role": "user", "content": "my aunt sold the piano."},
        {"role": "assistant", "name": grammar.ASSISTANT, "content": "how lovely!"},
        {"role": "user", "content": "who sold the piano again?"},
    ]

    def encode(**kwargs):
        return processor.prepare(**kwargs)["input_ids"]

    history = [("user", "my aunt sold the piano."), ("assistant", "how lovely!")]
    sentence = messages[-1]["content"]
    assert encode(messages=messages) == writer.prompt("dialogue", sentence, num_memories=2)
    assert encode(messages=messages, history="text") == writer.prompt("dialogue", sentence, history=history)
    assert encode(messages=messages, task="memory") == writer.prompt("memory", num_memories=3)
    assert encode(messages=messages[2:], task="memory") == writer.prompt("memory", num_memories=1)
    assert encode(messages=messages[2:], task="counter", emotion="sad") == writer.prompt(
        "counter", sentence, emotion="sad"
    )
    assert encode(messages=messages[2:], task="emotion", with_text=True) == writer.prompt("emotion", sentence)
    samples = {"path": None, "audio": [0.0] * 16000, "sampling_rate": 16000}
    heard = {"role": "user", "content": [{"type": "audio", **samples}, {"type": "text", "text": sentence}]}
    assert encode(messages=[heard]) == writer.prompt("dialogue", sentence, audio=True)


def test_vectors_keep_the_order_of_words():
    torch.manual_seed(0)
    embeddings, weights = torch.randn(10, 64), torch.linspace(0.1, 1, 10)
    vectors = utterance_vectors(embeddings, [[1, 2, 3], [3, 2, 1], [1, 2]], weights, starts=[9, 9, 9])
    assert vectors.norm(dim=-1).tolist() == pytest.approx([1.0] * 3)
    by_hand = weights[1] * embeddings[1] * (1 + 0.5 * embeddings[9].sign())
    by_hand += weights[2] * embeddings[2] * (1 + 0.5 * embeddings[1].sign())
    assert torch.allclose(vectors[2], by_hand / by_hand.norm(), atol=1e-6)
    assert torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0) < 0.95


def test_common_words_weigh_less(text_tokenizer, train):
    writer = PromptWriter(text_tokenizer)
    weights = word_weights(writer, train)
    assert weights.shape == (len(text_tokenizer),)
    common, rare = (writer.encode(word)[0] for word in (" my", " violin"))
    assert weights[common] < 0.5
    assert weights[rare] > 0.9
    assert 0.25 <= weights.min() <= weights.max() <= 1


def test_the_model_starts_with_copying(text_tokenizer):
    """Before training, a repeated word already predicts its successor; with ordinary initial weights it does not."""
    torch.manual_seed(0)
    words = torch.randint(300, 1500, (8, 20))
    ids = torch.cat([words, words], dim=1)
    surprise = {}
    for start in ("random", "copying"):
        model = Qwen2ForCausalLM(tiny_text_config(text_tokenizer)).eval()
        if start == "copying":
            start_with_copying(model, vector_id=5)
        with torch.no_grad():
            logits = model(ids).logits[:, 20:-1]
        surprise[start] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 21:].flatten()).item()
    assert surprise["random"] > 7
    assert surprise["copying"] < 5


@pytest.mark.parametrize("most", [1, 3])
def test_an_utterance_is_divided_among_its_vectors(text_tokenizer, train, most):
    tasks = PretrainingTasks(PromptWriter(text_tokenizer), train, seed=1, most_vectors=most)
    counts = set()
    for _ in range(30):
        sample = tasks.sample("rebuild_one")
        before, parts = zip(*sample["utterances"], strict=True)
        counts.add(len(parts))
        assert [token for part in parts for token in part] == sample["answer"][:-1]
        assert before == (None, *(part[-1] for part in parts[:-1]))
    assert counts == set(range(1, most + 1))


@pytest.mark.parametrize("most", [1, 3])
def test_every_task_is_in_the_steps(text_tokenizer, train, most):
    tasks = PretrainingTasks(PromptWriter(text_tokenizer), train, seed=1, most_vectors=most)
    for step in range(2):
        groups = tasks.batch(step, 24)
        assert len(groups) == len(MIXTURES[step])
        assert 22 <= sum(map(len, groups)) <= 26
        for sample in (sample for group in groups for sample in group):
            holders = tasks.writer.placeholder_ids
            assert sample["prompt"].count(holders["memory"]) == len(sample["utterances"])
            clips = sample["prompt"].count(holders["audio"]) + sample["prompt"].count(holders["video"])
            assert clips == len(sample["cues"])
            assert sample["answer"][-1] == text_tokenizer.eos_token_id


def test_shared_prompt_starts_do_not_change_the_loss(text_tokenizer, train):
    """The vectors of a sample are never part of the shared prefix."""
    torch.manual_seed(0)
    config = tiny_text_config(text_tokenizer, hidden_size=64, intermediate_size=32)
    model = Qwen2ForCausalLM(config).double().eval()
    writer = PromptWriter(text_tokenizer)
    start_with_copying(model, writer.placeholder_ids["memory"])
    pretrainer = Pretrainer(model, writer, word_weights(writer, train).double())
    tasks = PretrainingTasks(writer, train, seed=1)
    for task in (task for mixture in MIXTURES for task in mixture):
        samples = [tasks.sample(task) for _ in range(3)]
        torch.manual_seed(7)
        embeds, mask, labels = pretrainer.inputs(samples)
        expected = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss * (labels != -100).sum()
        torch.manual_seed(7)
        assert pretrainer.loss_sum(samples).item() == pytest.approx(expected.item(), rel=1e-5), task


def test_processes_add_their_gradients_to_those_of_one(text_tokenizer, train):
    groups = PretrainingTasks(PromptWriter(text_tokenizer), train, seed=1).batch(0, 24)
    shares = [_share(groups, rank, 2) for rank in range(2)]
    assert sorted(map(id, groups)) == sorted(id(samples) for share in shares for samples in share)
    tokens = [sum(len(one["prompt"] + one["answer"]) for samples in share for one in samples) for share in shares]
    assert max(tokens) < 1.5 * min(tokens)
    assert _share(groups, 0, 1) != [] and len(_share(groups, 0, 1)) == len(groups)


def test_pretraining_learns_and_saves(text_tokenizer, train, tmp_path, monkeypatch):
    config = tiny_text_config(text_tokenizer, hidden_size=64, intermediate_size=64)
    options = dict(steps=10, batch_size=12, learning_rate=1e-2, config=config, progress=False)
    losses = pretrain_language_model(text_tokenizer, train, tmp_path / "a", **options)
    assert len(losses) == 10
    assert losses[8] < losses[0] - 0.5  # steps of the same mixture
    assert losses == pretrain_language_model(text_tokenizer, train, tmp_path / "b", **options)
    monkeypatch.chdir(tmp_path)
    together = pretrain_language_model(text_tokenizer, train, "new/c", **options, processes=2)
    assert together[:2] == pytest.approx(losses[:2], rel=0.02)  # other noise, the same samples
    assert together != losses and together[8] < together[0] - 0.5
    assert {path.name for path in (tmp_path / "new" / "c").iterdir()} == {
        path.name for path in (tmp_path / "a").iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.model_type == "qwen2"
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab() == text_tokenizer.get_vocab()
