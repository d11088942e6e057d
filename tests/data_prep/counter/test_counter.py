"""Counter-emotional preference pairs: selection, files, audit page."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational

from empathic.composition_empathic import STAGE_FILE
from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.counter import build as counter
from empathic.data_prep.counter.audit import BINS
from empathic.data_prep.counter.build import counter_pairs, identity_of, write_candidates
from empathic.data_prep.counter.generators import CounterReply, EmpathicGenerator
from empathic.data_prep.counter.pairs import drop_reasons, normalised, overlap, select, select_all
from empathic.data_prep.schema import row_features
from empathic.data_prep.views import DialogueSamples, make_sample
from empathic.evaluation.emotion_features import POOLINGS
from empathic.sampling import Sampling
from empathic.trainers import EPOConfig, EPOTrainer
from empathic.trainers.preference_collator import PreferenceCollator


def turn_row(turn, speaker, text, dialogue="d1", split="train", emotion=None, **media):
    row = dict.fromkeys(row_features())
    row.update(corpus="tests", split=split, dialogue_id=dialogue, turn=turn, utterance_id=f"{dialogue}-{turn}")
    return {**row, "speaker": speaker, "text": text, "emotion": emotion, **media}


def rows_of(*texts, dialogue="d1", split="train", emotion="happy", **media):
    """A sample in which clara and mira take turns; `media` and `emotion` belong to the second-to-last turn."""
    rows = [turn_row(i, ("clara", "mira")[i % 2], text, dialogue, split) for i, text in enumerate(texts)]
    rows[-2].update(emotion=emotion, **media)
    return rows


def sample_of(*texts, **options):
    """The sample whose reply is the last text."""
    rows = rows_of(*texts, **options)
    return make_sample(rows, len(rows) - 1)


class Scripted:
    """A generator that replies `script[emotion]`, or `script[sentence][emotion]` if given, and counts its replies."""

    def __init__(self, script, finished=True):
        self.script, self.finished, self.written = script, finished, 0

    def prompt(self, messages, emotion):
        sentence = messages[-1]["content"]
        sentence = sentence if isinstance(sentence, str) else sentence[-1].get("text")
        if sentence is None:
            raise ValueError("the last message has no text")
        return {"input_ids": [0], "text": self.script.get(sentence, self.script)[emotion]}

    def replies(self, prompts, seeds):
        self.written += len(prompts)
        return [CounterReply(prompt["text"], self.finished) for prompt in prompts]


class Cosines:
    """Features of texts with chosen cosines to `true`; each further pooling halves the cosines."""

    def __init__(self, true, **cosines):
        self.cosines = {true: 1.0, **cosines}

    def encode_all(self, texts):
        result = {}
        for place, pooling in enumerate(POOLINGS):
            cosines = np.array([self.cosines[text] / (1 if self.cosines[text] == 1 else 2**place) for text in texts])
            result[pooling] = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)
        return result


class Hashed:
    """Features that map each text and pooling to a fixed direction."""

    def encode_all(self, texts):
        result = {}
        for place, pooling in enumerate(POOLINGS):
            vectors = [np.random.default_rng([place, *text.encode()]).normal(size=4) for text in texts]
            result[pooling] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        return result


def run(samples, generator, features, out, about=None, **options):
    """The report, and the rows of each split that has rows."""
    samples = samples if isinstance(samples, dict) else {"train": samples}
    report = counter_pairs(
        samples, lambda: generator, lambda: features, out, about or {}, **{"progress": False, **options}
    )
    rows = load_dataset(str(out), cache_dir=f"{out}-cache") if report["pairs"] else {}
    return report, {split: list(part) for split, part in rows.items()}


# ------------------------------------------------------------------------------------------------------ selection


def candidates_of(*similarities):
    return [{"dropped": None, "similarities": {"mean": similarity}} for similarity in similarities]


def test_the_least_similar_is_selected_if_it_is_strictly_below():
    assert select(candidates_of(0.5, -0.25, 0.0625, -0.25), "mean", 0.1) == (1, -0.25)
    assert select(candidates_of(0.5), "mean", 0.5) == (None, 0.5)
    assert select(candidates_of(0.5), "mean", 0.5001) == (0, 0.5)
    dropped = [{"dropped": "empty", "similarities": {"mean": None}}]
    assert select([*dropped, *candidates_of(0.3, 0.2)], "mean", 0.25) == (2, 0.2)
    assert select(dropped, "mean", 1.0) == (None, None)


def test_all_below_the_threshold_are_selected_from_the_lowest_on():
    candidates = candidates_of(0.05, -0.25, 0.1, -0.25, 0.0)
    assert select_all(candidates, "mean", 0.1) == [1, 3, 4, 0]
    assert select_all(candidates, "mean", 0.1, 2) == [1, 3] and select_all(candidates, "mean", -0.3) == []
    candidates[1]["dropped"] = "empty"
    assert select_all(candidates, "mean", 0.1, 1) == [3] and select(candidates, "mean", 0.1)[0] == 3


def test_normalised_texts():
    assert normalised("  I am\nFINE, thanks!") == normalised("i am fine thanks") == "i am fine thanks"
    assert normalised("ｆｉｎｅ") == "fine"
    assert normalised("...") == ""


def test_overlap_is_dices_coefficient_of_trigrams():
    assert overlap("I am sorry!", "i am sorry") == 1.0
    assert overlap("i am sorry", "i am so sorry") == pytest.approx(2 * 10 / 23)
    assert overlap("ab", "ab ab") == pytest.approx(2 * 2 / 7)  # " ab", "ab " of " ab", "ab ", "b a", " ab", "ab "
    assert overlap("hello", "thanks") == 0.0 and overlap("", "thanks") == 0.0


def test_why_candidates_are_dropped():
    texts = ["what a day", " ... ", "I  am FINE!", "What a day.", "what a dayy", "i am fine oh", "the dog"]
    assert drop_reasons("i am fine", texts, near=0.8) == [
        None,
        "empty",
        "same as the true reply",
        "same as another candidate",
        "near duplicate of another candidate",
        "near duplicate of the true reply",
        None,
    ]
    assert drop_reasons("i am fine", texts)[3:] == ["same as another candidate", None, None, None]
    # A candidate close to a dropped candidate is not a duplicate of a kept candidate.
    assert drop_reasons("aaaa bbbb cccc", ["aaaa bbbb cccd", "aaaa bbbb ccdd"], near=0.8) == [
        "near duplicate of the true reply",
        None,
    ]


# ----------------------------------------------------------------------------------------------------------- pairs

SCRIPT = {
    "angry": "what",
    "disgust": "  ",
    "fearful": "I  AM fine!",
    "happy": "thanks",
    "neutral": "hello",
    "sad": "the dog",
    "surprise": "old",
}
COSINES = {"what": 0.4, "thanks": 0.9, "hello": 0.3, "old": 0.08, "the dog": -0.5, "I  AM fine!": 1.0}


def test_pairs_by_a_worked_example(tmp_path):
    sample = sample_of("hello there", "i am fine")
    report, rows = run([sample], Scripted(SCRIPT), Cosines("i am fine", **COSINES), tmp_path, {"seen": 1})
    (row,) = rows["train"]
    assert row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"][0]["text"] == "hello there"
    assert row["chosen"] == [{"role": "assistant", "content": "i am fine"}]
    assert row["rejected"] == [{"role": "assistant", "content": "the dog"}]
    assert row["rejected_emotion"] == "sad" and row["similarity"] == -0.5
    assert (row["corpus"], row["dialogue_id"], row["turn"], row["utterance_id"]) == ("tests", "d1", 1, "d1-1")
    assert row["emotion"] == "happy"
    assert [c["emotion"] for c in row["candidates"]] == list(EMOTIONS)
    assert [c["text"] for c in row["candidates"]] == list(SCRIPT.values())
    assert [c["similarity"] for c in row["candidates"]] == [0.4, None, 1.0, 0.9, 0.3, -0.5, 0.08]
    assert [c["dropped"] for c in row["candidates"][1:3]] == ["empty", "same as the true reply"]
    assert row["candidates"][0]["similarities"] == {"mean": 0.4, "cls": 0.2, "head": 0.1, "probabilities": 0.05}

    assert report["settings"]["seen"] == 1 and report["settings"]["threshold"] == 0.1 and report["pairs"] == 1
    assert json.loads((tmp_path / "report.json").read_text()) == report
    counts = report["splits"]["train"]
    assert (counts["samples"], counts["pairs"], counts["scored"]) == (1, 1, 1)
    assert counts["candidates"] == {
        "written": 7,
        "kept": 5,
        "dropped": {"empty": 1, "same as the true reply": 1},
        "unfinished": 0,
    }
    assert counts["rejected_emotions"]["happy"]["sad"] == 1
    assert sum(sum(row.values()) for row in counts["rejected_emotions"].values()) == 1
    assert counts["passed_threshold"] == dict.fromkeys(POOLINGS, 1.0)
    assert counts["lowest_similarity"]["cls"] == {"least": -0.25, "median": -0.25, "greatest": -0.25}
    bins = dict(zip(BINS, counts["similarities"]["all_candidates"], strict=False))
    assert {edge for edge, count in bins.items() if count} == {-0.5, 0.05, 0.3, 0.4, 0.9}
    assert dict(zip(BINS, counts["similarities"]["lowest_of_each_sample"], strict=False))[-0.5] == 1
    assert counts["warnings"] == [] and counts["left_out"] == []


def test_true_replies_that_miss_the_emotion_can_be_left_out(tmp_path):
    """The reply to a happy sentence resembles the fearful candidate more, or the happy candidate most."""
    cosines, samples = Cosines("i am fine", **COSINES), [sample_of("hello there", "i am fine")]
    generator = Scripted(SCRIPT)
    default, rows = run(samples, generator, cosines, tmp_path)
    assert len(rows["train"]) == 1 and "fitting_only" not in default["settings"]
    report, rows = run(samples, generator, cosines, tmp_path, fitting_only=True)
    (left_out,) = report["splits"]["train"]["left_out"]
    assert not rows and left_out["reason"] == (
        "the true reply does not fit happy: it is more similar to the candidate for fearful (1.000) than to the "
        "candidate for happy (0.900)"
    )
    cosines.cosines["thanks"] = 1.0
    report, rows = run(samples, generator, cosines, tmp_path / "fits", fitting_only=True)
    assert rows["train"][0]["rejected_emotion"] == "sad" and report["settings"]["fitting_only"] is True
    assert "fit the emotion of the sentence" in (tmp_path / "fits" / "README.md").read_text()
    assert generator.written == 2 * len(EMOTIONS)  # the first folder's candidates were reused
    unlabeled = [{**samples[0], "emotion": None}]
    report, rows = run(unlabeled, generator, cosines, tmp_path / "unlabeled", fitting_only=True)
    assert "the emotion of the sentence is None" in report["splits"]["train"]["left_out"][0]["reason"]


def test_rows_keep_several_negatives_from_the_same_candidates(tmp_path):
    """`rejected` stays the lowest; the column has the others below the threshold; the default has no such column."""
    cosines = Cosines("i am fine", **{**COSINES, "hello": 0.0})
    samples = [sample_of("hello there", "i am fine"), sample_of("how are you", "fine", dialogue="d2")]
    generator = Scripted({"hello there": SCRIPT, "how are you": {**dict.fromkeys(EMOTIONS, "zzz"), "sad": "fine"}})
    cosines.cosines |= {"fine": 1.0, "zzz": 0.05}

    def found(**options):
        report, rows = run(samples, generator, cosines, tmp_path, {"seen": 1}, **options)
        return report, rows["train"], (tmp_path / "README.md").read_text(), (tmp_path / "audit.html").read_text()

    default, old, old_card, old_page = found()
    assert "negatives" not in default["settings"] and "negatives" not in default["splits"]["train"]
    assert "negatives" not in old[0] and "`negatives`" not in old_card and "also rejected" not in old_page
    report, rows, card, page = found(negatives="all")
    assert generator.written == 14  # nothing is written again
    assert [[reply["content"] for (reply,) in row["negatives"]] for row in rows] == [["hello", "old"], []]
    assert {reply["role"] for row in rows for (reply,) in row["negatives"]} == {"assistant"}
    for row, before in zip(rows, old, strict=True):
        assert {key: value for key, value in row.items() if key != "negatives"} == before
    assert report["settings"]["negatives"] == "all"
    assert report["splits"]["train"]["negatives"] == {
        "replies": 4,
        "of_pairs": {"1": 1, "3": 1},
        "emotions": {"angry": 1, "disgust": 0, "fearful": 0, "happy": 0, "neutral": 1, "sad": 1, "surprise": 1},
    }
    assert {k: v for k, v in report["splits"]["train"].items() if k != "negatives"} == default["splits"]["train"]
    assert "`negatives` has the further" in card.replace("\n", " ") and "4 rejected replies in all" in card
    text = Page(page).text
    for words in ("also rejected, place 2", "also rejected, place 3", "pairs with 3 rejected replies", "negatives"):
        assert words in text
    assert "with 4 rejected replies" in counter.summary(report, "out")
    report, rows, card, _ = found(negatives=2)
    assert [[reply["content"] for (reply,) in row["negatives"]] for row in rows] == [["hello"], []]
    assert "up to 2 in a row" in card and report["splits"]["train"]["negatives"]["replies"] == 3
    assert found(negatives=1)[:3] == (default, old, old_card)
    with pytest.raises(ValueError, match="negatives must be lowest, all or a whole number from 1, got 'most'"):
        found(negatives="most")


def test_what_is_left_out_is_reported_and_few_pairs_are_said_loudly(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(counter.logger, "warning", said.append)
    silent = sample_of("hello", "thanks", dialogue="silent")
    silent["prompt"] = [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}]
    samples = [
        sample_of("hello", "thanks", dialogue="near"),
        silent,
        sample_of("hello", "Old.", dialogue="same"),
        sample_of("hello", " ", dialogue="wordless"),
    ]
    features = Cosines("thanks", old=0.25, **{"Old.": 1.0})
    report, rows = run(samples, Scripted(dict.fromkeys(EMOTIONS, "old"), finished=False), features, tmp_path)
    counts = report["splits"]["train"]
    assert rows == {} and not list((tmp_path / "data").iterdir()) and not (tmp_path / "README.md").exists()
    assert {item["item"].split("/")[2]: item["reason"] for item in counts["left_out"]} == {
        "near": "no candidate is below the threshold 0.1: the lowest similarity is 0.250",
        "silent": "the last message has no text",
        "same": "every candidate is empty, or a duplicate or near duplicate of the true reply",
        "wordless": "the true reply is empty",
    }
    assert counts["pairs"] + len(counts["left_out"]) == counts["samples"] == 4
    assert counts["candidates"]["written"] == 14 and counts["candidates"]["unfinished"] == 14
    assert counts["candidates"]["dropped"] == {"same as another candidate": 6, "same as the true reply": 7}
    # 0.25, 0.125, 0.0625 and 0.03125: the audit says what other poolings would have given
    assert counts["passed_threshold"] == {"mean": 0.0, "cls": 0.0, "head": 1.0, "probabilities": 1.0}
    assert "Only 0 of 1 samples (0.0%) have a candidate below the threshold 0.1" in counts["warnings"][0]
    assert "mean 0.0%, cls 0.0%, head 100.0%, probabilities 100.0%" in counts["warnings"][0]
    assert "14 of 14 candidates were cut off" in counts["warnings"][1]
    assert "0.5 different candidates of 7 on average" in counts["warnings"][2]
    assert said == [f"train: {warning}" for warning in counts["warnings"]]
    assert "Only 0 of 1 samples" in counter.summary(report, "out")
    page = (tmp_path / "audit.html").read_text()
    assert page.count('<p class="warning">') == 3


def test_five_in_a_hundred_are_not_few(tmp_path):
    """There is no warning exactly at the limit, and a warning with one more sample."""
    for count, is_few in ((20, False), (21, True)):
        samples = [sample_of("pass" if i == 0 else "fail", "true", dialogue=f"d{i}") for i in range(count)]
        low, high = dict.fromkeys(EMOTIONS, "low"), dict.fromkeys(EMOTIONS, "high")
        script = {"pass": {**low, "sad": "zzz"}, "fail": {**high, "sad": "zzz"}}
        report, _ = run(samples, Scripted(script), Cosines("true", low=0.0, high=0.5, zzz=0.6), tmp_path / str(count))
        warnings = [w for w in report["splits"]["train"]["warnings"] if w.startswith("Only 1 of")]
        assert report["pairs"] == 1 and bool(warnings) == is_few


CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ '' + m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXTS = [
    ("hello there", "i am fine"),
    ("how are you", "fine thanks", "what did he say about the old dog", "hello"),
    ("i am clara", "hello clara", "thanks", "fine", "how are you", "i am fine thanks"),
]


def test_candidates_do_not_depend_on_place_or_batch(model, processor):
    samples = [sample_of(*texts, dialogue=f"d{i}") for i, texts in enumerate(TEXTS)]

    def written(samples, batch_size):
        generator = EmpathicGenerator(model, processor, sampling=Sampling(6), batch_size=batch_size)
        return write_candidates(samples, generator, Hashed(), EMOTIONS, 0)

    assert written(samples[::-1], 1) == written(samples, 32)[::-1]


def test_another_threshold_or_pooling_writes_nothing_again_and_another_seed_all(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(counter.logger, "warning", said.append)
    samples = [sample_of("hello there", "i am fine", dialogue=f"d{i}") for i in range(5)]
    generator, features = Scripted(SCRIPT), Cosines("i am fine", **COSINES)

    def rejected(**options):
        _, rows = run(samples, generator, features, tmp_path, chunk_size=2, **options)
        return [row["rejected"][0]["content"] for row in rows["train"]] if rows else []

    assert rejected() == ["the dog"] * 5 and generator.written == 35
    before = (tmp_path / "report.json").stat().st_mtime_ns
    assert rejected() == ["the dog"] * 5 and (tmp_path / "report.json").stat().st_mtime_ns == before
    assert rejected(threshold=-0.5) == [] and rejected(threshold=-0.3, pooling="cls") == []
    assert rejected(threshold=-0.2, pooling="cls") == ["the dog"] * 5
    assert generator.written == 35
    samples.append(sample_of("hello there", "i am fine", dialogue="new"))
    assert len(rejected()) == 6 and generator.written == 49  # the last chunk, which has grown
    said.clear()
    assert len(rejected(seed=1)) == 6 and generator.written == 49 + 42
    assert len(said) == 1 and "other settings (different: seed); they are not reused" in said[0]
    samples[0]["reply"] = "i am fine thanks"
    features.cosines["i am fine thanks"] = 1.0
    assert len(rejected(seed=1)) == 6 and generator.written == 49 + 42 + 14
    (tmp_path / "audit.html").unlink()
    rejected(seed=1)
    assert generator.written == 49 + 42 + 14 and (tmp_path / "audit.html").exists()


def test_bad_settings_are_named(tmp_path):
    for options, message in (
        ({"emotions": ["calm"]}, "emotions are \\['calm'\\]; choose from"),
        ({"pooling": "max"}, "pooling 'max' is not one of"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run([], None, None, tmp_path, **options)


def test_pairs_never_take_the_place_of_a_corpus(tmp_path):
    data = tmp_path / "data"
    row = {"dialogue_id": "d", "turn": 0, "speaker": "a", "text": "hello there", "split": "train"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    prepare_folder(tmp_path, data, progress=False)
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "plain").mkdir()
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    for source, out, message in (
        (data, data, "is the input dataset"),
        (tmp_path / "link", data, "is the input dataset"),
        (tmp_path / "plain", tmp_path / "plain", "is the input dataset"),
        ("me/other", data, "contains a prepared dataset"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*Choose another folder"):
            counter.main(["--model=none", f"--data={source}", f"--out={out}"])
    with pytest.raises(ValueError, match="contains a prepared dataset"):
        run([sample_of("hello", "hi")], Scripted({}), Hashed(), data)
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_a_checkpoint_is_known_by_its_files_and_those_of_its_base(tmp_path):
    base, stage = tmp_path / "base", tmp_path / "stage"
    for folder in (base, stage):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (stage / STAGE_FILE).write_text('{"stage": "dialogue", "base": "../base", "trained": []}')
    first = identity_of(str(stage))
    assert identity_of(str(stage)) == first
    (base / "config.json").write_text('{"a": 1}')
    second = identity_of(str(stage))
    assert second != first
    (stage / "memory_tokenizer").mkdir()
    (stage / "memory_tokenizer" / "tokenizer.json").write_text("{}")
    assert identity_of(str(stage)) != second


def test_an_adapter_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """The layout of the Hub's cache on disk, without a connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--adapter"
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "adapter_config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert identity_of("me/adapter", "adapter_config.json") == ["me/adapter", commit]


# --------------------------------------------------------------------------------------------------------- files


def test_written_pairs_load_and_train(model, processor, clip, tmp_path):
    media = {"video": {"path": clip, "bytes": None}, "audio": {"path": "voice.mp4", "bytes": Path(clip).read_bytes()}}
    samples = {
        "train": [
            sample_of("hello there", "i am fine"),
            sample_of("i am clara", "hello clara", "how are you", "fine", dialogue="d2", **media),
        ],
        "test_freq": [sample_of("hello", "thanks", dialogue="d3", split="test_freq")],
        "empty": [],
    }
    samples["test_freq"][0]["prompt"] = [{"role": "user", "content": "hello"}]  # content may be a plain string
    generator = EmpathicGenerator(model, processor, sampling=Sampling(5))
    report, rows = run(samples, generator, Hashed(), tmp_path / "out", threshold=2.0, near_duplicate=2.0)
    assert samples["test_freq"][0]["prompt"] == [{"role": "user", "content": "hello"}]
    assert {split: len(part) for split, part in rows.items()} == {"train": 2, "test_freq": 1}
    assert report["splits"]["empty"]["samples"] == 0
    row = rows["train"][1]
    assert row["prompt"][2]["content"][0]["bytes"] == media["audio"]["bytes"]
    assert row["chosen"] == [{"role": "assistant", "content": "fine"}]
    assert row["similarity"] == min(c["similarity"] for c in row["candidates"] if c["dropped"] is None)
    for sample, loaded in zip(samples["train"], rows["train"], strict=True):
        built, again = (
            processor.apply_chat_template(prompt, tokenize=True, return_dict=True, return_tensors="pt")
            for prompt in (sample["prompt"], loaded["prompt"])
        )
        assert built.keys() == again.keys()
        assert ("pixel_values_videos" in built) == ("input_features" in built) == (loaded["dialogue_id"] == "d2")
        for key in built:
            assert torch.equal(built[key], again[key])
    batch = PreferenceCollator(processor)(rows["train"])
    assert batch["left_out"] == []
    targets = [processor.tokenizer.decode(ids[ids != -100], skip_special_tokens=True) for ids in batch["labels"]]
    assert targets[:2] == ["i am fine", "fine"]
    args = EPOConfig(output_dir=str(tmp_path / "epo"), max_steps=1, per_device_train_batch_size=2, use_cpu=True)
    EPOTrainer(model=model, args=args, train_dataset=rows["train"], processing_class=processor).train()


def test_plain_text_pairs_train_a_text_model_with_trl(parts, tmp_path):
    """TRL's DPOTrainer trains on the loaded rows without changes."""
    samples = [sample_of(*texts, dialogue=f"d{i}", audio={"path": "a", "bytes": b"a"}) for i, texts in enumerate(TEXTS)]
    options = dict(threshold=2.0, plain_text=True, negatives="all")
    run(samples, Scripted(SCRIPT), Hashed(), tmp_path / "out", **options)
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert is_conversational(rows[0]) and len(rows) == 3 and rows[0]["negatives"]
    assert rows[1]["prompt"][-1] == {"role": "user", "name": "clara", "content": "what did he say about the old dog"}
    tokenizer = AutoTokenizer.from_pretrained(parts["text"])
    tokenizer.chat_template = CHAT
    args = DPOConfig(output_dir=str(tmp_path / "dpo"), max_steps=1, use_cpu=True, bf16=False, report_to="none")
    text_model = AutoModelForCausalLM.from_pretrained(parts["text"])
    trainer = DPOTrainer(model=text_model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert np.isfinite(trainer.train().training_loss)


def test_a_later_run_replaces_the_files(tmp_path):
    for split in ("validation", "train"):
        samples = {split: [sample_of("hello", "i am fine", split=split)]}
        run(samples, Scripted(SCRIPT), Cosines("i am fine", **COSINES), tmp_path)
    (file,) = (tmp_path / "data").iterdir()
    assert file.name.startswith("train-00000-of-00001-")
    run(samples, Scripted(SCRIPT), Cosines("i am fine", **COSINES), tmp_path, threshold=-1.0)
    assert not list((tmp_path / "data").iterdir()) and not (tmp_path / "README.md").exists()


def test_pairs_have_the_clips_of_now_without_new_candidates(tmp_path):
    script = {emotion: f"reply {emotion}" for emotion in EMOTIONS}

    def pairs(audio, **options):
        rows = rows_of("how are you", "fine", dialogue="d", audio=audio)
        samples = DialogueSamples(Dataset.from_list(rows, features=row_features()))
        generator = Scripted(script)
        found = run(samples, generator, Hashed(), tmp_path / "out", threshold=2.0, **options)[1]["train"]
        return [item["bytes"] or item["path"] for item in found[0]["prompt"][0]["content"][:1]], generator.written

    assert pairs({"path": "a.wav", "bytes": b"first"}) == ([b"first"], 7)
    done = (tmp_path / "out" / ".work" / "done.json").stat().st_mtime_ns
    assert pairs({"path": "a.wav", "bytes": b"first"}) == ([b"first"], 0)
    assert (tmp_path / "out" / ".work" / "done.json").stat().st_mtime_ns == done
    assert pairs({"path": "a.wav", "bytes": b"other"}) == ([b"other"], 0)
    assert pairs({"path": "moved/a.wav", "bytes": None}) == (["moved/a.wav"], 0)


def test_media_that_no_column_can_hold_is_an_error(tmp_path):
    sample = sample_of("hello", "i am fine")
    sound = {"type": "audio", "audio": [0.0], "sampling_rate": 16000}
    sample["prompt"] = [{"role": "user", "content": [sound, {"type": "text", "text": "hello"}]}]
    with pytest.raises(ValueError, match=r"tests/train/d1/1: a content item of type audio has audio, sampling_rate"):
        run([sample], Scripted(SCRIPT), Cosines("i am fine", **COSINES), tmp_path)


def test_chunks_of_a_data_set_read_no_clip(tmp_path):
    """Chunks of `DialogueSamples` are named by their texts; a change of a text or of the speakers gives new chunks."""

    class NoItems(DialogueSamples):
        def __getitem__(self, index):
            raise AssertionError("an item was read")

    def names(text="hello", speakers=None):
        rows = [row for i in range(4) for row in rows_of(text, "fine", "thanks", "hello", dialogue=f"d{i}")]
        return [chunk.file for chunk in counter._chunks("train", NoItems(Dataset.from_list(rows), speakers), 5)]

    assert names() == names() and len(names()) == 3 and len(set(names())) == 3
    assert not set(names()) & set(names("hello you"))
    assert not set(names()) & set(names(speakers=["mira"]))


# ---------------------------------------------------------------------------------------------------- audit page


class Page(HTMLParser):
    """Parser that checks that tags are closed in order, and collects the text between them."""

    VOID = {"meta", "br", "path", "use", "image"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def test_the_page_is_whole_escaped_and_readable_in_light_and_dark(tmp_path):
    evil = "<script>alert('x')</script> & <b>"
    script = {"hello there": {**SCRIPT, "sad": evil}, "how are you": {**dict.fromkeys(EMOTIONS, "miss"), "sad": evil}}
    cosines = Cosines("i am fine", **{**COSINES, evil: 0.05, "old": 0.2, "miss": 0.15, "fine <i>": 1.0})
    pair = sample_of("i am clara", evil, "hello there", "i am fine", emotion=None)
    pair["prompt"][0]["name"] = "<script>clara"
    samples = [pair, *(sample_of("how are you", "fine <i>", dialogue=f"<u>{i}") for i in range(15))]
    report, _ = run(samples, Scripted(script), cosines, tmp_path, {"model": "<script>name"}, threshold=0.06)
    text = (tmp_path / "audit.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and report["pairs"] == 16
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "u" not in names and names.count("svg") == 3
    assert evil in page.text and "<script>name" in page.text and "<script>clara" in page.text and "<u>" in page.text
    assert not any("src" in attributes for _, attributes in page.tags)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    places = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert len(links) == 7 and set(links) <= places  # the contents
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and "#123456" not in text
    for words in (
        "similarity to the true reply (cosine, pooling mean)",
        "share of each histogram",
        "threshold 0.06",
        "true emotion of the sentence",
        "samples with a candidate below 0.06 (%)",
        "probabilities",
        "unlabeled",
        *EMOTIONS,
    ):
        assert words in page.text
    assert names.count("article") == 12  # of 16 pairs; there is no near miss
    report, _ = run(samples, Scripted(script), cosines, tmp_path, {"model": "<script>name"}, threshold=-1.0)
    page = Page((tmp_path / "audit.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("article") == 12 and "No pairs." in page.text


@pytest.mark.slow  # starts a browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(tmp_path, violations, width, scheme):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("There is no Chromium on this machine (Debian: apt install chromium).")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`).")
    samples = [sample_of("hello there", "i am fine", dialogue=str(number)) for number in range(3)]
    run(samples, Scripted({"hello there": SCRIPT}), Cosines("i am fine", **COSINES), tmp_path, {"model": "m" * 300})
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        page.goto((tmp_path / "audit.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width and violations(page) == []
        cells = page.locator("table.candidates tbody tr").first.locator("td").all()
        places = [cell.bounding_box() for cell in cells]
        # On a phone, a candidate has the whole width for its text.
        assert (places[1]["y"] > places[0]["y"]) == (width == 390) and places[1]["width"] > 0.3 * width
        assert all(place["x"] + place["width"] <= width for place in places)
        browser.close()
