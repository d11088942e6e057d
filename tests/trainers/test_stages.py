"""The five stages through their real entry point, on a real folder of recordings and tiny models."""

import importlib
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from empathic import modeling_empathic
from empathic.cli import main as cli
from empathic.composition_empathic import read_stage, resolve_base
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.counter.build import identity_of
from empathic.evaluation.generation import prepare_readable
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.tiny.emotion_classifier import train_emotion_classifier
from empathic.trainers import train
from empathic.trainers.checkpoints.stage_folder import StageRecord, load_model, merge
from empathic.trainers.samples import NOTHING, SampleStream, StageCollator, draw_utterances, emotion_sample
from empathic.trainers.stages import STAGES, TRAINED_PARTS, StageConfig, lora_targets

QFORMER = ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_media, grey_frames, tone):
    """Two dialogues in each split: the first turn has a clip, and another speaker answers."""
    raw = tmp_path_factory.mktemp("recordings")
    lines = []
    for split in ("train", "validation"):
        for number, emotion in enumerate(("happy", "sad")):
            name = f"{split}{number}"
            write_media(raw / f"{name}.mp4", frames=grey_frames(6), samples=tone(0.6, frequency=200 + 300 * number))
            texts = ("hello there", "how are you", "i am fine thanks", "what did he say")
            for turn, text in enumerate(texts):
                line = {"dialogue_id": name, "turn": turn, "speaker": ("clara", "bot")[turn % 2], "text": text}
                line["split"] = split
                if turn % 2 == 0:
                    line |= {"emotion": emotion, "file_name": f"{name}.mp4"}
                lines.append(line)
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path_factory.mktemp("data")
    prepare_folder(raw, out, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, data):
    """Preference rows for stage epo, with the clip in the prompt."""
    from empathic.data_prep.views import DialogueSamples

    rows = [
        {
            "prompt": sample["prompt"],
            "chosen": [{"role": "assistant", "content": sample["reply"]}],
            "rejected": [{"role": "assistant", "content": "the old dog"}],
        }
        for sample in DialogueSamples(load_dataset(data, split="train"))
    ]
    out = tmp_path_factory.mktemp("pairs")
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(out)


def run(stage, data, output, *options):
    common = ["--stage", stage, "--dataset_name", data, "--output_dir", str(output), "--max_steps", "2"]
    common += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--report_to", "none"]
    common += ["--save_strategy", "no", "--disable_tqdm", "True", "--lr_scheduler_type", "constant", "--seed", "3"]
    return train.main([*common, *options])


@pytest.fixture(scope="module")
def stages(tmp_path_factory, parts, data, pairs):
    """Run all five stages, each from the previous stage; return their folders by name."""
    root = tmp_path_factory.mktemp("stages")
    composed = [option for name in train.PART_NAMES for option in (f"--{name}", parts[name])]
    run("emotion", data, root / "emotion", *composed, *QFORMER, "--num_query_tokens", "4", "--num_frames", "2")
    before = "emotion"
    for stage in STAGES[1:]:
        options = ["--model_name_or_path", str(root / before), "--lora_r", "4", "--lora_alpha", "8"]
        run(stage, pairs if stage == "epo" else data, root / stage, *options[: None if stage in ("dialogue",) else 2])
        before = stage
    return {stage: str(root / stage) for stage in STAGES}


def tensors(folder):
    model = load_model(folder)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("before", "stage"), list(itertools.pairwise(STAGES)))
def test_each_stage_trains_exactly_its_parts(stages, before, stage):
    old, new = tensors(stages[before]), tensors(stages[stage])
    changed = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    if stage in ("dialogue", "epo"):
        expected = {name for name in new if ".lora_" in name}
        assert len(expected) == 2 * 7 * 2  # A and B of seven linear layers in each of two layers
        assert all("language_model" in name for name in expected)
    else:
        expected = {name for name in new if name.startswith(TRAINED_PARTS[stage])}
        assert expected
    # Embedding rows and attention queries that the few samples do not use may stay unchanged.
    assert changed <= expected
    assert len(changed) >= 0.9 * len(expected)


def test_the_first_stage_trains_the_extractor_only(stages, parts):
    from transformers import set_seed

    folder = stages["emotion"]
    base = read_stage(folder)["base"]
    assert base["text"] == os.path.relpath(parts["text"], folder)
    fresh = {key: resolve_base(folder, value) if isinstance(value, str) else value for key, value in base.items()}

    set_seed(3)
    old = dict(EmpathicForConditionalGeneration.from_parts_pretrained(**fresh).named_parameters())
    new = tensors(stages["emotion"])
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    expected = {name for name in new if name.startswith(TRAINED_PARTS["emotion"])}
    assert changed <= expected and len(changed) >= 0.9 * len(expected)


def test_stage_folders_hold_their_parts_and_name_their_base(stages):
    for stage, folder in stages.items():
        record = read_stage(folder)
        assert record["stage"] == stage
        files = os.listdir(folder)
        assert ("adapter_model.safetensors" in files) == (stage in ("dialogue", "epo"))
        assert ("trained_parts.safetensors" in files) == (stage not in ("dialogue", "epo"))
        assert "model.safetensors" not in files
    assert read_stage(stages["memory_multi"])["base"] == "../memory_single"
    # Stage epo continues training the adapter of stage dialogue, on the same base.
    assert read_stage(stages["epo"])["base"] == read_stage(stages["dialogue"])["base"] == "../memory_multi"
    assert set(load_file(os.path.join(stages["memory_single"], "trained_parts.safetensors"))) == set(
        read_stage(stages["memory_single"])["trained"]
    )


@pytest.mark.parametrize("stage", ["memory_multi", "epo"])
def test_from_pretrained_and_merge_give_the_same_model(stages, stage, tmp_path, clip):
    processor = EmpathicProcessor.from_pretrained(stages[stage])
    messages = [
        {"role": "user", "content": "hello there"},
        {"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "how are you"}]},
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    trained = load_model(stages[stage]).eval()
    loaded = EmpathicForConditionalGeneration.from_pretrained(stages[stage]).eval()
    merge(stages[stage], str(tmp_path / "whole"))
    whole, info = EmpathicForConditionalGeneration.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = trained(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
        assert torch.allclose(whole.eval()(**inputs).logits, expected, atol=1e-4)


def test_the_memory_stages_may_change_the_number_of_vectors(stages, data, tmp_path):
    run("memory_single", data, tmp_path / "single", "--model_name_or_path", stages["emotion"], "--memory_tokens", "2")
    more = "--model_name_or_path", str(tmp_path / "single")
    run("memory_multi", data, tmp_path / "multi", *more, "--memory_rate", "3")
    run("dialogue", data, tmp_path / "dialogue", "--model_name_or_path", str(tmp_path / "multi"), "--lora_r", "4")
    merge(str(tmp_path / "dialogue"), str(tmp_path / "whole"))
    sizes = {"single": (2, None), "multi": (2, 3), "dialogue": (2, 3), "whole": (2, 3)}
    for name, size in sizes.items():
        config = load_model(str(tmp_path / name)).config
        processor = EmpathicProcessor.from_pretrained(tmp_path / name)
        assert (config.memory_tokens, config.memory_rate) == size
        assert (processor.memory_tokens, processor.memory_rate) == size
    with pytest.raises(ValueError, match="memory_tokens is 2, but has no effect"):
        run("dialogue", data, tmp_path / "d", "--model_name_or_path", str(tmp_path / "multi"), "--memory_tokens", "2")


def test_a_new_model_gets_the_number_of_vectors(parts, data, tmp_path):
    composed = [option for name in train.PART_NAMES for option in (f"--{name}", parts[name])]
    run("memory_single", data, tmp_path / "new", *composed, *QFORMER, "--num_query_tokens", "4", "--memory_rate", "3")
    config = EmpathicForConditionalGeneration.from_pretrained(tmp_path / "new").config
    assert (config.memory_tokens, config.memory_rate) == (1, 3)
    assert EmpathicProcessor.from_pretrained(tmp_path / "new").memory_rate == 3


def test_epo_raises_the_margin(stages, data, pairs, tmp_path):
    options = ["--model_name_or_path", stages["dialogue"], "--max_steps", "12", "--learning_rate", "3e-3"]
    run("epo", pairs, tmp_path / "epo", *options, "--logging_steps", "1")
    logs = json.loads((tmp_path / "epo" / "trainer_state.json").read_text())["log_history"]
    margins = [log["rewards/margins"] for log in logs if "rewards/margins" in log]
    assert margins[-1] > margins[0] + 0.5


@pytest.fixture(scope="module")
def text_data(tmp_path_factory, data):
    """The same dialogues without clips; and preference rows from them."""
    out, rows = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("text_pairs")
    for split, table in load_dataset(data).items():
        table = table.map(
            lambda row: {"audio": None, "video": None}, features=table.features, load_from_cache_file=False
        )
        table.to_parquet(out / f"{split}.parquet")
    prompt, reply = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}], {"role": "assistant"}
    row = {"prompt": prompt, "chosen": [{**reply, "content": "fine"}], "rejected": [{**reply, "content": "the dog"}]}
    (rows / "train.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    return str(out), str(rows)


@pytest.mark.parametrize(
    ("stage", "which", "options", "encodes"),
    [
        ("memory_single", "clips", [], False),
        ("memory_multi", "clips", [], False),
        ("dialogue", "clips", ["--use_media", "False"], False),
        ("dialogue", "clips", [], True),
        ("dialogue", "text", ["--eval_strategy", "steps", "--eval_steps", "1"], False),
        ("epo", "text", [], False),
        ("epo", "clips", [], True),
    ],
)
def test_the_encoders_run_only_where_a_run_may_have_clips(
    stages, data, pairs, text_data, tmp_path, monkeypatch, stage, which, options, encodes
):
    calls = []
    for tower in ("encode_sound", "encode_frames"):
        real = getattr(modeling_empathic, tower)
        monkeypatch.setattr(modeling_empathic, tower, lambda *a, real=real, **k: calls.append(1) or real(*a, **k))
    text, text_pairs = text_data
    name = {"clips": (data, pairs), "text": (text, text_pairs)}[which][stage == "epo"]
    before = STAGES[STAGES.index(stage) - 1]
    run(stage, name, tmp_path / "out", "--model_name_or_path", stages[before], *options)
    assert bool(calls) == encodes


def test_further_rounds_start_from_the_model_after_epo(stages, data, tmp_path, monkeypatch):
    """Its own replies, with its adapter on, become the pairs of the next run, which trains the adapter further."""
    train_emotion_classifier(tmp_path / "classifier", ["a b", "c d"], ["happy", "sad"], steps=1, progress=False)
    replies = ["--data", data, "--classifier", str(tmp_path / "classifier"), "--negatives", "all", "--device", "cpu"]
    replies += ["--threshold", "2", "--near_duplicate", "2", "--max_new_tokens", "8", "--temperature", "0.5"]
    config = tmp_path / "epo.yaml"
    config.write_text("stage: epo\ndataset_name: [a]\noutput_dir: b\nmax_steps: 2\nreport_to: none\n")
    started = []

    def launch(module, line, accelerate_config):
        """What `accelerate launch` runs, in this process."""
        started.append(module.rpartition(".")[2])
        found = importlib.import_module(module).main(line)
        return found if isinstance(found, int) else 0

    def rows_of(folder):
        return load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("empathic.commands.rounds.launch", launch)
    line = ["rounds", "--config", str(config), "--model", stages["epo"], "--out", str(tmp_path), *replies]
    line += ["--rounds", "2", "--clip_negatives", "--use_cpu", "True", "--logging_steps", "1"]
    line += ["--learning_rate", "1e-2", "--save_strategy", "no"]
    assert cli(line) == 0 and started == ["build", "train"] * 2
    models = [str(tmp_path / f"round-{number}" / "model") for number in (1, 2)]
    for number, (before, after) in enumerate(itertools.pairwise([stages["epo"], *models]), start=1):
        rows = rows_of(tmp_path / f"round-{number}" / "pairs")
        assert len(rows) == 6 and sum(len(row["negatives"]) for row in rows) > 6
        logs = json.loads(Path(after, "trainer_state.json").read_text())["log_history"]
        assert {"rewards/margins", "rewards/clip_margins", "rewards/clip_accuracies"} <= logs[0].keys()
        base = resolve_base(after, read_stage(after)["base"])
        assert read_stage(after)["stage"] == "epo" and os.path.samefile(base, stages["memory_multi"])
        first, second = tensors(before), tensors(after)
        changed = {name for name in first if not torch.equal(first[name], second[name])}
        assert first.keys() == second.keys() and changed and all(".lora_" in name for name in changed)

    # The replies are those of the adapter; without it they are others.
    assert cli(["counter", "--model", stages["epo"], "--out", str(tmp_path / "off"), *replies]) == 0
    own, others = (
        [candidate["text"] for row in rows_of(folder) for candidate in row["candidates"]]
        for folder in (tmp_path / "round-1" / "pairs", tmp_path / "off")
    )
    assert own != others
    # Nothing is done twice; new pairs train a new model.
    started.clear()
    assert cli(line) == 0 and started == ["build", "build"]
    started.clear()
    assert cli([*line, "--seed", "1"]) == 0 and started == ["build", "train"] * 2
    assert cli([*line, "--rounds", "0"]) == 1
    assert cli(["rounds", "--config", str(config), "--generator", "b", "--out", str(tmp_path), *replies]) == 1


def test_command_line_overrides_the_file(tmp_path):
    config = tmp_path / "stage.yaml"
    config.write_text("stage: dialogue\ndataset_name: [a]\noutput_dir: b\nlearning_rate: 0.5\nhistory: text\n")
    script, args, _ = train.parse(["--config", str(config), "--learning_rate", "0.25"])
    assert (script.stage, args.learning_rate, args.history) == ("dialogue", 0.25, "text")


@pytest.mark.parametrize(
    ("line", "message"),
    [("stage: emotions", "stage must be one of"), ("stage: dialogue\nhistory: all", "history must be one of")],
)
def test_wrong_values_in_the_file_are_named(tmp_path, line, message):
    config = tmp_path / "stage.yaml"
    config.write_text(f"{line}\ndataset_name: [a]\noutput_dir: b\n")
    with pytest.raises(ValueError, match=message):
        train.parse(["--config", str(config)])


def test_a_stage_needs_a_model(data, tmp_path, parts):
    with pytest.raises(ValueError, match="--memory are missing"):
        run("emotion", data, tmp_path, *(o for n in ("text", "vision", "audio") for o in (f"--{n}", parts[n])))
    with pytest.raises(ValueError, match="starts from an earlier stage"):
        run("dialogue", data, tmp_path)


def test_the_stream_knows_every_sample_by_its_number():
    rows = list(range(7))
    streams = [SampleStream([(1.0, rows, lambda row, rng: {"row": row, "x": rng.random()})], 21, 5) for _ in range(2)]
    forwards, backwards = [streams[0][i] for i in range(21)], [streams[1][i] for i in reversed(range(21))][::-1]
    assert forwards == backwards
    for epoch in range(3):
        assert sorted(sample["row"] for sample in forwards[7 * epoch : 7 * epoch + 7]) == rows
    assert [s["row"] for s in forwards[:7]] != [s["row"] for s in forwards[7:14]]


def test_the_stream_follows_its_weights():
    sources = [(3.0, ["a"], lambda row, rng: {"row": row}), (1.0, ["b"], lambda row, rng: {"row": row})]
    stream = SampleStream(sources, 2000, 0)
    share = sum(stream[i]["row"] == "a" for i in range(2000)) / 2000
    assert 0.71 < share < 0.79


def test_emotion_samples_show_sound_picture_or_both():
    import numpy as np

    row = {"audio": {"path": "a"}, "video": {"path": "v"}, "text": "hi", "speaker": "x", "emotion": "sad"}
    rng, counts = np.random.default_rng(0), {}
    for _ in range(3000):
        kinds = tuple(i["type"] for i in emotion_sample(row, rng)["messages"][0]["content"])
        counts[kinds] = counts.get(kinds, 0) + 1
    assert set(counts) == {("audio", "text"), ("video", "text"), ("audio", "video", "text")}
    assert all(900 < count < 1100 for count in counts.values())
    silent = emotion_sample({**row, "audio": None}, rng)["messages"][0]["content"]
    assert [item["type"] for item in silent] == ["video", "text"]


def test_runs_of_utterances_to_rebuild():
    import numpy as np

    rng, conversation = np.random.default_rng(0), list(range(10))
    lengths = [len(draw_utterances(conversation, rng, 0.3, 5)) for _ in range(2000)]
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert 0.26 < lengths.count(1) / 2000 < 0.34
    assert draw_utterances(conversation, rng, 0.0, None) == conversation


def test_collator_trains_on_the_target_alone(processor, clip):
    sample = {
        "messages": [{"role": "user", "content": [{"type": "audio", "path": clip}, {"type": "text", "text": "hello"}]}],
        "task": "dialogue",
        "history": "memory",
        "target": "i am fine",
        "seed": [0, 1],
    }
    batch = StageCollator(processor)([sample, {**sample, "target": "thanks"}])
    labelled = [row[row != -100].tolist() for row in batch["labels"]]
    assert labelled == [processor.encode_reply("i am fine"), processor.encode_reply("thanks")]
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert not batch["video_mask"].any() and batch["input_features_mask"].any()
    assert not batch["memory_attention_mask"].any()


def test_an_unreadable_clip_is_reported_and_left_out(processor, clip, tmp_path, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"")
    content = [{"type": "audio", "path": str(broken)}, {"type": "video", "path": clip}]
    sample = {"task": "emotion", "history": "memory", "target": "sad", "seed": [0, 1]}
    good = {**sample, "messages": [{"role": "user", "content": content}]}
    lost = {**sample, "messages": [{"role": "user", "content": content[:1]}]}
    collator = StageCollator(processor)
    import logging

    logging.getLogger("empathic").propagate = True
    with caplog.at_level("WARNING"):
        batch = collator([good, lost])
    assert len(batch["input_ids"]) == 1 and not batch["input_features_mask"].any() and batch["video_mask"].all()
    assert "broken.mp4" in caplog.text
    nothing = collator([{**lost, "id": "lost"}])
    assert nothing["left_out"] == [("lost", NOTHING)] and nothing["sample_ids"] == nothing["sample_places"] == []
    assert nothing["input_ids"].shape == (1, 2) and (nothing["labels"] == -100).all()
    assert batch["sample_places"] == [0] and [reason for _, reason in batch["left_out"]] == [NOTHING]


@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]], ids=str)
def test_a_turn_with_nothing_is_left_out(processor, content):
    sample = {"task": "dialogue", "history": "memory", "target": "sad", "seed": None, "id": "silent"}
    said = {**sample, "messages": [{"role": "user", "content": "hello"}], "id": "said"}
    silent = {**sample, "messages": [*said["messages"], {"role": "user", "content": content}]}
    batch = StageCollator(processor)([silent, said])
    assert batch["sample_ids"] == ["said"] and batch["sample_places"] == [1]
    assert batch["left_out"] == [("silent", NOTHING)]
    prepared, note = prepare_readable(processor, silent["messages"])
    assert prepared is None and note.endswith("so there is no reply.")


@pytest.mark.parametrize("more", [[], ["--cache_frozen_gib", "1"]], ids=["plain", "frozen"])
def test_a_clip_that_is_alone_in_its_batch_and_unreadable_does_not_end_the_run(stages, data, tmp_path, caplog, more):
    """In one of two dialogues, the first turn has only an unreadable clip."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")

    def spoil(row):
        if row["dialogue_id"] == "train1" and row["turn"] == 0:
            row |= {"text": "", "audio": {**row["audio"], "path": str(broken)}, "video": None}
        return row

    rows = load_dataset(data, split="train").filter(lambda row: row["turn"] < 2).map(spoil)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    options = ["--model_name_or_path", stages["memory_multi"], "--rebuild_ratio", "0", "--max_steps", "4"]
    options += ["--per_device_train_batch_size", "1", "--logging_steps", "1", "--lora_r", "4", *more]
    run("dialogue", str(tmp_path / "data"), tmp_path / "out", *options)
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sorted(log["loss"] == 0 for log in logs if "loss" in log) == [False, False, True, True]
    assert logs[-1]["left_out_samples"] == 1 and "train1/1 is left out of training" in caplog.text


def test_one_name_in_the_file_is_a_list_of_one(model):
    assert StageConfig(reply_speakers="robot").reply_speakers == ["robot"]
    assert lora_targets(model, "q_proj") == lora_targets(model, ["q_proj"])
    with pytest.raises(ValueError, match=r"is called vproj; see --lora_target_modules"):
        lora_targets(model, ["q_proj", "vproj"])
    given = train.parse(["--stage", "dialogue", "--dataset_name", "a", "--output_dir", "b", "--use_cpu", "True"])[0]
    assert replace(given, dataset_weights=2).dataset_weights == [2]
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0\.3"):
        StageConfig(label_smoothing_factor=0.3)


@pytest.mark.parametrize("stage", ["emotion", "memory_single", "memory_multi"])
def test_a_stage_without_an_adapter_does_not_start_from_one(stages, data, tmp_path, stage):
    with pytest.raises(ValueError, match=f"Stage {stage} trains no adapter, but .*dialogue has one"):
        run(stage, data, tmp_path, "--model_name_or_path", stages["dialogue"])


def test_a_missing_split_is_named_with_its_option(stages, pairs, tmp_path):
    options = ["--model_name_or_path", stages["dialogue"], "--eval_strategy", "steps", "--eval_split", "test"]
    with pytest.raises(ValueError, match=r"has no split test; its splits are train\. Name a split with --eval_split"):
        run("epo", pairs, tmp_path, *options)


def test_runs_may_be_a_link(model, parts, tmp_path):
    """The base is next to the link; the folder of the runs is elsewhere, at another depth."""
    (tmp_path / "disk" / "deep" / "runs" / "stage").mkdir(parents=True)
    (tmp_path / "work" / "base").mkdir(parents=True)
    (tmp_path / "work" / "runs").symlink_to(tmp_path / "disk" / "deep" / "runs")
    folder, base = str(tmp_path / "work" / "runs" / "stage"), str(tmp_path / "work" / "base")
    StageRecord("dialogue", base, []).save(model, folder)
    assert resolve_base(folder, read_stage(folder)["base"]) == base


def test_a_language_model_without_chatml_trains_with_its_tokens_and_template(tmp_path, parts, data):
    tokenizer = AutoTokenizer.from_pretrained(parts["memory"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|header|>", "<|eot|>", "<v>", "<a>", "<m>"]})
    AutoModelForCausalLM.from_pretrained(parts["text"]).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    template = (
        "{% for m in messages %}<|header|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant\n{% endif %}"
    )
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    composed = [o for name, part in {**parts, "text": str(tmp_path / "text")}.items() for o in (f"--{name}", part)]
    options = ["--video_token", "<v>", "--audio_token", "<a>", "--memory_token", "<m>"]
    options += ["--chat_template", str(tmp_path / "chat.jinja")]
    with pytest.raises(ValueError, match=r"none of .* such as <\|header\|>, <\|eot\|>, <v>"):
        run("emotion", data, tmp_path / "one", *composed, *QFORMER, "--chat_template", str(tmp_path / "chat.jinja"))
    with pytest.raises(ValueError, match=r"no chat template"):
        run("emotion", data, tmp_path / "one", *composed, *QFORMER, *options[:-2])
    with pytest.raises(ValueError, match=r"there is no file .*none\.jinja"):
        run("emotion", data, tmp_path / "one", *composed, *QFORMER, "--chat_template", str(tmp_path / "none.jinja"))
    run("emotion", data, tmp_path / "one", *composed, *QFORMER, *options, "--num_query_tokens", "4")
    run("memory_single", data, tmp_path / "two", "--model_name_or_path", str(tmp_path / "one"))
    processor = EmpathicProcessor.from_pretrained(tmp_path / "two")
    prompt = processor.apply_chat_template([{"role": "user", "content": "hello"}], task="memory")
    assert "memory:\n<m><|eot|>" in prompt and processor.end_of_turn == "<|eot|>"
    model = load_model(str(tmp_path / "two"))
    assert model.config.memory_token_id == tokenizer.convert_tokens_to_ids("<m>")
    assert len(identity_of(str(tmp_path / "one"))) == 5  # its own files and the four parts
