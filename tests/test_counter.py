"""Counter-emotional replies: generation, selection, pairs and their files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model

from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep import counter
from empathic.data_prep.counter import (
    SeededSampler,
    build_pairs,
    generate_candidates,
    normalised,
    select_rejected,
    write_pairs,
)
from empathic.data_prep.schema import row_features
from empathic.data_prep.views import make_sample
from empathic.trainers.preference_collator import PreferenceCollator

LORA = dict(r=4, lora_alpha=64, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)


def turn_row(turn, speaker, text, dialogue="d1", split="train", emotion=None, **media):
    row = dict.fromkeys(row_features())
    row.update(corpus="tests", split=split, dialogue_id=dialogue, turn=turn, utterance_id=f"{dialogue}-{turn}")
    return {**row, "speaker": speaker, "text": text, "emotion": emotion, **media}


def sample_of(*texts, dialogue="d1", split="train", emotion="happy", **media):
    """The sample whose reply is the last text; clara and mira take turns, `media` is the sentence's."""
    rows = [turn_row(i, ("clara", "mira")[i % 2], text, dialogue, split) for i, text in enumerate(texts)]
    rows[-2].update(emotion=emotion, **media)
    return make_sample(rows, len(rows) - 1)


TEXTS = [
    ("hello there", "i am fine"),
    ("how are you", "fine thanks", "what did he say about the old dog", "hello"),
    ("i am clara", "hello clara", "thanks", "fine", "how are you", "i am fine thanks"),
]


@pytest.fixture
def conversations():
    return [sample_of(*texts)["prompt"] for texts in TEXTS]


class HashedFeatures:
    """Any text -> a direction of its own, always the same."""

    description = "hashed"

    def encode(self, texts):
        vectors = np.stack([np.random.default_rng(list(text.encode())).normal(size=4) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class CosineFeatures:
    """Texts at a chosen cosine from the true reply `reply`."""

    description = "chosen cosines"

    def __init__(self, reply, **cosines):
        self.cosines = {reply: 1.0, **cosines}

    def encode(self, texts):
        cosines = np.array([self.cosines[text] for text in texts])
        return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)


@pytest.fixture
def scripted(model, processor, monkeypatch):
    """A function: from now on the model says `script[emotion]` to the prompt of an emotion, and then ends its turn."""

    def write(script, ends=True):
        def generate(input_ids, **kwargs):
            prompts = processor.tokenizer.batch_decode(input_ids)
            said = [next(e for e in EMOTIONS if f"feeling:\n{e}\n" in prompt) for prompt in prompts]
            replies = [processor.encode_plain(script[emotion]) for emotion in said]
            longest, pad, end = (
                max(map(len, replies)) + 1,
                processor.tokenizer.pad_token_id,
                processor.tokenizer.eos_token_id,
            )
            rows = [row + [end if ends else pad] + [pad] * (longest - 1 - len(row)) for row in replies]
            return torch.cat([input_ids, torch.tensor(rows)], dim=1)

        monkeypatch.setattr(model, "generate", generate)

    return write


# ---------------------------------------------------------------------------------------------------- generation


def texts_of(candidates):
    return [[candidate["text"] for candidate in row] for row in candidates]


def test_greedy_replies_do_not_depend_on_the_batch(model, processor, conversations):
    def write(conversations, batch_size):
        return generate_candidates(
            model, processor, conversations, batch_size=batch_size, do_sample=False, progress=False, max_new_tokens=8
        )

    together = write(conversations, 64)
    assert [[candidate["emotion"] for candidate in row] for row in together] == [list(EMOTIONS)] * 3
    assert len({text for row in texts_of(together) for text in row}) > 10  # the emotion and the conversation matter
    assert write(conversations, 4) == together
    assert [write([conversation], 1)[0] for conversation in conversations] == together


def test_sampled_replies_depend_on_seed_and_id_alone(model, processor, conversations):
    def write(conversations, ids, batch_size=64, seed=0):
        options = dict(batch_size=batch_size, seed=seed, temperature=0.7, max_new_tokens=8, progress=False)
        return generate_candidates(model, processor, conversations, ids=ids, **options)

    together = write(conversations, "abc")
    torch.manual_seed(123)
    assert write(conversations[::-1], "cba", batch_size=5) == together[::-1]
    assert write([conversations[1]], "b", batch_size=1) == [together[1]]
    assert write(conversations, "abc", seed=1) != together
    assert write(conversations, "xyz") != together


def test_seeded_sampler_draws_from_the_distribution():
    scores = torch.log(torch.tensor([0.5, 0.3, 0.0, 0.2])).expand(4000, 4)

    def shares(**options):
        seeds = [f"row {i}" for i in range(4000)]
        chosen = SeededSampler(seeds, **options)(torch.zeros(4000, 1, dtype=torch.long), scores)
        assert torch.isfinite(chosen).sum(1).eq(1).all()
        return torch.bincount(chosen.argmax(1), minlength=4) / 4000

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.0, 0.2]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)
    squared = torch.tensor([0.25, 0.09, 0.0, 0.04])
    torch.testing.assert_close(shares(temperature=0.5), squared / squared.sum(), atol=0.03, rtol=0)
    assert shares(top_p=0.5).tolist() == [1, 0, 0, 0]


def test_sampling_settings_come_from_the_call_then_from_the_model(model, processor, conversations, monkeypatch):
    seen = []
    monkeypatch.setattr(
        counter, "SeededSampler", lambda seeds, **sampling: seen.append(sampling) or SeededSampler(seeds)
    )
    model.generation_config.update(temperature=0.7, top_k=20)
    for options in ({}, {"temperature": 1.5, "top_p": 0.9}):
        generate_candidates(model, processor, conversations[:1], max_new_tokens=1, progress=False, **options)
    assert seen == [
        {"temperature": 0.7, "top_k": 20, "top_p": 1.0},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    ]
    with pytest.raises(ValueError, match="no num_return_sequences"):
        generate_candidates(model, processor, conversations[:1], num_return_sequences=2)


@pytest.mark.parametrize("kind", ["native", "peft"])
def test_adapters_are_off_while_writing_and_back_afterwards(model, processor, conversations, kind):
    options = dict(do_sample=False, max_new_tokens=6, progress=False)
    plain = generate_candidates(model, processor, conversations, **options)
    torch.manual_seed(0)
    if kind == "native":
        model.add_adapter(LoraConfig(**LORA))
        adapted = model
    else:
        adapted = get_peft_model(model, LoraConfig(**LORA))
    adapted.train()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    with_adapter = generate_candidates(adapted, processor, conversations, use_adapter=True, **options)
    assert with_adapter != plain
    assert generate_candidates(adapted, processor, conversations, **options) == plain
    assert generate_candidates(adapted, processor, conversations, use_adapter=True, **options) == with_adapter
    assert [name for name, parameter in adapted.named_parameters() if parameter.requires_grad] == trained
    assert trained and all("lora" in name for name in trained)
    assert adapted.training


def test_frozen_adapters_stay_frozen(model, processor, conversations):
    model.add_adapter(LoraConfig(**LORA))
    model.requires_grad_(False)
    generate_candidates(model, processor, conversations, do_sample=False, max_new_tokens=1, progress=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.language_model.layers[0].self_attn.q_proj.disable_adapters is False


def test_disabled_adapters_stay_disabled(model, processor, conversations):
    model.add_adapter(LoraConfig(**LORA))
    model.disable_adapters()
    options = dict(do_sample=False, max_new_tokens=4, progress=False, use_adapter=True)
    before = generate_candidates(model, processor, conversations, **options)
    generate_candidates(model, processor, conversations, **{**options, "use_adapter": False})
    assert generate_candidates(model, processor, conversations, **options) == before


def test_the_history_reaches_the_model(model, processor, monkeypatch):
    """In memory by default, as chat turns or not at all on demand; clips are never opened, system messages left out."""
    messages = [
        {"role": "system", "content": "Talk like a pirate."},
        {"role": "user", "name": "clara", "content": "i am clara"},
        {"role": "assistant", "name": "mira", "content": [{"type": "text", "text": "hello clara"}]},
        {
            "role": "user",
            "content": [{"type": "video", "path": "not there.mp4"}, {"type": "text", "text": "how are you"}],
        },
    ]
    batches, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: batches.append(kwargs) or generate(**kwargs))
    written = {}
    for history in ("memory", "text", "none"):
        options = dict(do_sample=False, max_new_tokens=8, progress=False, history=history)
        written[history] = texts_of(generate_candidates(model, processor, [messages], **options))
    memory, text, none = batches
    recalled = processor.memory_tokenizer.batch_decode(memory["memory_input_ids"])
    assert recalled == ["clara: i am clara<MEM>mira: hello clara<MEM>"] * 7
    assert "memory_input_ids" not in text and "memory_input_ids" not in none
    prompts = {
        name: processor.tokenizer.decode(batch["input_ids"][0]) for name, batch in zip(written, batches, strict=True)
    }
    assert "hello clara" in prompts["text"] and "clara" not in prompts["none"] + prompts["memory"]
    assert all("how are you" in prompt and "pirate" not in prompt for prompt in prompts.values())
    assert all("pixel_values_videos" not in batch for batch in batches)
    assert len({str(texts) for texts in written.values()}) == 3


def test_a_conversation_that_cannot_be_answered_is_named(model, processor, conversations):
    silent = [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}]
    with pytest.raises(ValueError, match="conversation 1: the last message has no text"):
        generate_candidates(model, processor, [conversations[0], silent])
    with pytest.raises(ValueError, match="conversation 0: The last message is the assistant's"):
        generate_candidates(model, processor, [[*conversations[0], {"role": "assistant", "content": "hello"}]])
    with pytest.raises(ValueError, match=r"history is 'all'; it is one of memory, text, none"):
        generate_candidates(model, processor, conversations, history="all")


# ----------------------------------------------------------------------------------------------------- selection


def test_the_least_similar_is_selected_if_it_is_strictly_below():
    features = CosineFeatures("true", a=0.5, b=-0.25, c=0.0625, d=-0.25)
    index, similarities = select_rejected("true", ["a", "b", "c", "d"], features, threshold=0.1)
    assert index == 1
    np.testing.assert_allclose(similarities, [0.5, -0.25, 0.0625, -0.25], atol=1e-6)
    # 0.5 and 0.25 are exact in float32
    assert select_rejected("true", ["a"], features, threshold=0.5)[0] is None
    assert select_rejected("true", ["a"], features, threshold=0.5001)[0] == 0


def test_normalised_texts():
    assert normalised("  I am\nFINE, thanks!") == normalised("i am fine thanks") == "i am fine thanks"
    assert normalised("ｆｉｎｅ") == "fine"
    assert normalised("...") == ""


SCRIPT = {
    "angry": "what",
    "disgust": "  ",
    "fearful": "I  AM fine!",
    "happy": "thanks",
    "neutral": "hello",
    "sad": "the dog",
    "surprise": "old",
}


def test_build_pairs_by_a_worked_example(model, processor, scripted):
    scripted(SCRIPT)
    others = {"the dog": -0.5, "I  AM fine!": 1.0}
    features = CosineFeatures("i am fine", what=0.4, thanks=0.9, hello=0.3, old=0.05, **others)
    sample = sample_of("hello there", "i am fine")
    rows, report = build_pairs([sample], model, processor, features, batch_size=3, progress=False)
    (row,) = rows
    assert row["prompt"] is sample["prompt"]
    assert row["chosen"] == [{"role": "assistant", "content": "i am fine"}]
    assert row["rejected"] == [{"role": "assistant", "content": "the dog"}]
    assert row["rejected_emotion"] == "sad" and row["similarity"] == pytest.approx(-0.5, abs=1e-6)
    assert (row["corpus"], row["dialogue_id"], row["turn"], row["utterance_id"]) == ("tests", "d1", 1, "d1-1")
    assert row["emotion"] == "happy"
    expected = [0.4, None, None, 0.9, 0.3, -0.5, 0.05]
    assert [c["emotion"] for c in row["candidates"]] == list(EMOTIONS)
    assert [c["text"] for c in row["candidates"]] == [text.strip() for text in SCRIPT.values()]
    for candidate, similarity in zip(row["candidates"], expected, strict=True):
        assert candidate["similarity"] == (None if similarity is None else pytest.approx(similarity, abs=1e-6))
    assert report["samples"] == report["pairs"] == 1 and report["passed_threshold"] == 1.0
    assert report["candidates"] == {
        "written": 7,
        "distinct": 7.0,
        "dropped": {"empty": 1, "same as the true reply": 1},
        "unfinished": 0,
    }
    assert report["dropped"] == [
        {"item": "tests/train/d1/1", "emotion": "disgust", "reason": "empty"},
        {"item": "tests/train/d1/1", "emotion": "fearful", "reason": "same as the true reply"},
    ]
    assert report["rejected_emotions"]["sad"] == 1 and sum(report["rejected_emotions"].values()) == 1
    assert report["features"] == "chosen cosines" and report["adapters"] == "off" and report["warnings"] == []


def test_what_is_left_out_is_reported_and_few_pairs_are_said_loudly(model, processor, scripted, monkeypatch):
    said = []
    monkeypatch.setattr(counter.logger, "warning", said.append)
    scripted(dict.fromkeys(EMOTIONS, "old"), ends=False)
    silent = sample_of("hello", "thanks", dialogue="silent")
    silent["prompt"] = [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}]
    backwards = sample_of("hello", "thanks", dialogue="backwards")
    backwards["prompt"] = [{"role": "assistant", "content": "hello"}]
    samples = [
        sample_of("hello", "thanks", dialogue="near"),
        silent,
        sample_of("hello", "Old.", dialogue="same"),
        backwards,
        sample_of("hello", " ", dialogue="wordless"),
    ]
    features = CosineFeatures("thanks", old=0.25, **{"Old.": 1.0})
    rows, report = build_pairs(samples, model, processor, features, batch_size=2, progress=False)
    assert rows == []
    assert {item["item"].split("/")[2]: item["reason"] for item in report["left_out"]} == {
        "near": "no candidate is below the threshold 0.1: the lowest similarity is 0.250",
        "silent": "the last message has no text, and a counter-emotional reply is an answer to the text",
        "same": "every candidate is empty or the same as the true reply",
        "backwards": "The last message is the assistant's, but the model answers the user: end with the user's.",
        "wordless": "the true reply is empty",
    }
    assert report["pairs"] + len(report["left_out"]) == report["samples"] == 5
    assert report["candidates"]["written"] == 14 and report["candidates"]["unfinished"] == 14
    assert report["passed_threshold"] == 0.0
    assert "Only 0 of 1 samples (0.0%) have a candidate below the threshold 0.1" in report["warnings"][0]
    assert "14 of 14 candidates were cut off" in report["warnings"][1]
    assert "1.0 different candidates of 7 on average" in report["warnings"][2]
    assert said == report["warnings"]


def test_pairs_do_not_depend_on_place_or_batch(model, processor):
    samples = [sample_of(*texts, dialogue=f"d{i}") for i, texts in enumerate(TEXTS)]
    options = dict(threshold=2.0, max_new_tokens=6, progress=False)
    rows, report = build_pairs(samples, model, processor, HashedFeatures(), **options)
    assert len(rows) == 3 and report["generation"] == {"do_sample": True, "max_new_tokens": 6}
    other, _ = build_pairs(samples[::-1], model, processor, HashedFeatures(), batch_size=1, **options)
    for row, same in zip(rows, other[::-1], strict=True):
        assert row["candidates"] == same["candidates"] and row["rejected"] == same["rejected"]


# ------------------------------------------------------------------------------------------------------- writing


def test_written_pairs_load_and_train(model, processor, clip, tmp_path):
    media = {"video": {"path": clip, "bytes": None}, "audio": {"path": "voice.mp4", "bytes": Path(clip).read_bytes()}}
    samples = [
        sample_of("hello there", "i am fine"),
        sample_of("i am clara", "hello clara", "how are you", "fine", dialogue="d2", **media),
        sample_of("hello", "thanks", dialogue="d3", split="test_freq"),
    ]
    samples[2]["prompt"] = [{"role": "user", "content": "hello"}]  # content may be a plain string
    options = dict(threshold=2.0, max_new_tokens=5, progress=False)
    rows, reports = {}, {}
    for split, part in (("train", samples[:2]), ("test_freq", samples[2:]), ("empty", [])):
        rows[split], reports[split] = build_pairs(part, model, processor, HashedFeatures(), **options)
    write_pairs(rows, reports, tmp_path)
    assert samples[2]["prompt"] == [{"role": "user", "content": "hello"}]

    loaded = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {split: len(data) for split, data in loaded.items()} == {"train": 2, "test_freq": 1}
    row = loaded["train"][1]
    assert row["prompt"][2]["content"][0]["bytes"] == media["audio"]["bytes"]
    assert row["chosen"] == [{"role": "assistant", "content": "fine"}]
    assert row["rejected"][0]["content"] in [candidate["text"] for candidate in row["candidates"]]
    assert row["similarity"] == min(candidate["similarity"] for candidate in row["candidates"])
    for built, loaded_row in zip(rows["train"], loaded["train"], strict=True):
        built, again = (
            processor.apply_chat_template(r["prompt"], tokenize=True, return_dict=True, return_tensors="pt")
            for r in (built, loaded_row)
        )
        assert built.keys() == again.keys()
        assert ("pixel_values_videos" in built) == ("input_features" in built) == (loaded_row["dialogue_id"] == "d2")
        for key in built:
            assert torch.equal(built[key], again[key])
    batch = PreferenceCollator(processor)(list(loaded["train"]))
    assert batch["left_out"] == []
    targets = [processor.tokenizer.decode(ids[ids != -100], skip_special_tokens=True) for ids in batch["labels"]]
    assert targets[:2] == ["i am fine", "fine"]
    assert json.loads((tmp_path / "report.json").read_text()) == reports
    assert (reports["empty"]["samples"], reports["empty"]["pairs"]) == (0, 0)


def test_a_later_run_replaces_the_files(model, processor, tmp_path):
    options = dict(threshold=2.0, max_new_tokens=3, progress=False)
    for split in ("validation", "train"):
        samples = [sample_of("hello", "thanks", split=split)]
        rows, report = build_pairs(samples, model, processor, HashedFeatures(), **options)
        write_pairs({split: rows}, {split: report}, tmp_path)
    (file,) = (tmp_path / "data").iterdir()
    assert file.name.startswith("train-00000-of-00001-")


def test_media_that_no_column_can_hold_is_an_error(tmp_path):
    row = {**sample_of("hello", "thanks"), "chosen": [], "rejected": [], "candidates": []}
    sound = {"type": "audio", "audio": [0.0], "sampling_rate": 16000}
    row["prompt"] = [{"role": "user", "content": [sound, {"type": "text", "text": "hello"}]}]
    with pytest.raises(ValueError, match=r"tests/train/d1/1: a audio item holds audio, sampling_rate"):
        write_pairs({"train": [row]}, {}, tmp_path)
