"""Numbers that stay finite: the memory in bf16, losses that are not finite, samples that are too long."""

import copy
import json
import math

import pytest
import torch
from transformers import Mamba2Config, MambaConfig

from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.messages import sample_id
from empathic.memory_empathic import MambaCompressor
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import train
from empathic.trainers.preference_collator import PreferenceCollator
from empathic.trainers.samples import SampleStream, StageCollator

WORDS = ("hello there", "how are you", "i am fine thanks", "what did he say about the old dog of clara")
TOLERANCE = 0.02  # of the vectors' root mean square; the weights and the matrix products are in bf16


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_media, grey_frames, tone):
    """Three dialogues of four turns; the first turn of each has a clip, and the last is long."""
    raw = tmp_path_factory.mktemp("recordings")
    write_media(raw / "clip.mp4", frames=grey_frames(6), samples=tone(0.6))
    lines = []
    for dialogue in ("one", "two", "three"):
        for turn, text in enumerate(WORDS):
            lines.append({"dialogue_id": dialogue, "turn": turn, "speaker": ("clara", "bot")[turn % 2], "text": text})
        lines[-4] |= {"emotion": "happy", "file_name": "clip.mp4"}
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path_factory.mktemp("data")
    prepare_folder(raw, out, progress=False)
    return str(out)


def options(stage, data, base_folder, output, *more):
    common = ["--stage", stage, "--dataset_name", data, "--output_dir", str(output), "--max_steps", "4"]
    common += ["--model_name_or_path", base_folder, "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    common += ["--save_strategy", "no", "--disable_tqdm", "True", "--seed", "3", "--use_cpu", "True"]
    return [*common, *more]


def stream_of(argv, length):
    script, args, _ = train.parse(argv)
    return SampleStream(train.stage_sources(script, args, train.load_splits(script.dataset_name, ["train"])), length, 3)


# ------------------------------------------------------------------------------------------------------------- memory


def slow_memory(kind):
    """A memory with slow decay, so that its state is the sum of hundreds of small steps: in half precision such a
    sum stops growing once a step is less than a 256th of it."""
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
    if kind == "mamba":
        config = MambaConfig(**settings, state_size=4)
    else:
        config = Mamba2Config(**settings, state_size=8, num_heads=4, head_dim=8, n_groups=2)
    model = MambaCompressor(config, 24, 50, 0.5).eval()
    with torch.no_grad():
        for name, parameter in model.mamba.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(-9)
            elif name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.fill_(-3)
            elif "conv1d" in name or name.endswith(("in_proj.weight", "x_proj.weight")):
                parameter.normal_(std=0.4)
    return model


@pytest.mark.parametrize("scale", [1, 1e3, 1e15])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_the_memory_in_bf16_equals_fp32(kind, scale):
    exact = slow_memory(kind)
    exact.mamba.get_input_embeddings().weight.mul_(scale)
    exact.mem_embedding.mul_(scale)
    half = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(half.state_dict())  # the weights that bf16 can hold
    ids = torch.randint(50, (4, 1)).repeat(1, 600)
    ids[:, -1] = exact.mem_token_id
    wanted = exact(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = {"autocast": exact(ids), "autocast, half": half(ids)}
    vectors["half"] = half(ids)
    assert wanted.isfinite().all() and wanted.square().mean().sqrt() > 0.1
    for name, found in vectors.items():
        assert found.isfinite().all(), name
        assert (found.float() - wanted).square().mean().sqrt() < TOLERANCE * wanted.square().mean().sqrt(), name


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_the_memory_s_gradients_stay_finite_in_bf16(kind):
    model = slow_memory(kind)
    with torch.no_grad():
        model.mamba.get_input_embeddings().weight.mul_(1e15)
    ids = torch.randint(50, (2, 300))
    ids[:, -1] = model.mem_token_id
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids).square().cumsum(-1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------- losses that are not finite


def test_a_loss_that_is_not_finite_stops_with_the_samples(data, base_folder, tmp_path):
    """The first step makes the weights huge, so the second one has no loss."""
    argv = options("memory_single", data, base_folder, tmp_path, "--learning_rate", "1e38")
    with pytest.raises(FloatingPointError) as error:
        train.main(argv)
    stream = stream_of(argv, 8)
    names = [stream[2]["id"], stream[3]["id"]]
    assert f"infinite at step 1, in the batch of the samples {', '.join(names)};" in str(error.value)
    assert not (tmp_path / "stage.json").exists() and not list(tmp_path.glob("*.safetensors"))


def test_samples_are_named_by_stage(data, base_folder):
    names = {}
    for stage, more in (
        ("emotion", []),
        ("memory_single", []),
        ("memory_multi", ["--single_ratio", "0.5", "--max_utterances", "3"]),
        ("dialogue", ["--rebuild_ratio", "0"]),
    ):
        stream = stream_of(options(stage, data, base_folder, "out", *more), 300)
        names[stage] = {stream[i]["id"].removeprefix("folder/train/") for i in range(300)}
    dialogues = ("one", "two", "three")
    assert names["emotion"] == {f"{dialogue}/0" for dialogue in dialogues}
    assert names["memory_single"] == {f"{dialogue}/{turn}" for dialogue in dialogues for turn in range(4)}
    assert names["dialogue"] == {f"{dialogue}/{turn}" for dialogue in dialogues for turn in (1, 2, 3)}
    runs = {"0", "1", "2", "3", "0-1", "1-2", "2-3", "0-2", "1-3"}
    assert names["memory_multi"] == {f"{dialogue}/{run}" for dialogue in dialogues for run in runs}
    assert sample_id({"text": "no ids"}) == ""


# ------------------------------------------------------------------------------------------------- samples too long


def samples_with_media(clip):
    content = [{"type": "audio", "path": clip}, {"type": "video", "path": clip}, {"type": "text", "text": "hello"}]
    sample = {"messages": [{"role": "user", "content": content}], "task": "dialogue", "history": "memory", "seed": None}
    return [{**sample, "target": target, "id": target} for target in ("fine", " ".join(WORDS))]


def test_a_long_sample_is_left_out_whole(processor, clip):
    samples = samples_with_media(clip)
    lengths = [int(StageCollator(processor)([sample])["attention_mask"].sum()) for sample in samples]
    batch = StageCollator(processor, max_length=lengths[0])(samples)
    assert batch["sample_ids"] == ["fine"] and len(batch["input_ids"]) == 1
    reason = f"prompt + target have {lengths[1]} tokens, more than max_length={lengths[0]}"
    assert batch["left_out"] == [(samples[1]["id"], reason)]
    # The prompt is complete, with a placeholder for each query; with one token less, the sample is left out.
    placeholder = processor.tokenizer.convert_tokens_to_ids(processor.video_token)
    assert (batch["input_ids"] == placeholder).sum() == processor.num_query_tokens
    batch = StageCollator(processor, max_length=lengths[0] - 1)(samples)
    assert batch["sample_ids"] == [] and len(batch["left_out"]) == 2
    assert batch["input_ids"].shape == (1, 2) and (batch["labels"] == -100).all()
    assert not batch["video_mask"].any() and not batch["input_features_mask"].any()


def test_a_batch_of_long_samples_is_a_step_of_nothing(data, base_folder, tmp_path, caplog):
    """One sample per batch, so that some batches are empty; the last turn is too long."""
    argv = options("memory_single", data, base_folder, tmp_path, "--max_steps", "12", "--max_length", "80")
    argv += ["--per_device_train_batch_size", "1", "--eval_split", "train", "--eval_strategy", "steps"]
    argv += ["--eval_steps", "12", "--per_device_eval_batch_size", "1", "--log_samples", "0"]
    stream, lengths = stream_of(argv, 12), {}
    collator = StageCollator(EmpathicProcessor.from_pretrained(base_folder))
    for sample in map(stream.__getitem__, range(12)):
        lengths[sample["id"]] = int(collator([sample])["attention_mask"].sum())
    limit = max(length for name, length in lengths.items() if not name.endswith("/3"))
    assert min(length for name, length in lengths.items() if name.endswith("/3")) > limit
    argv[argv.index("--max_length") + 1] = str(limit)
    with caplog.at_level("WARNING"):
        metrics = train.main(argv)
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in logs if "loss" in log]
    names = [stream[i]["id"] for i in range(12)]
    assert [loss == 0 for loss in losses] == [name.endswith("/3") for name in names]
    assert 0 < losses.count(0) < 12 and all(map(math.isfinite, losses)) and math.isfinite(metrics["eval_loss"])
    assert next(log for log in logs if "train_loss" in log)["left_out_samples"] == 3
    assert metrics["eval_left_out_samples"] == 3 and "3 is left out of the evaluation: prompt + target" in caplog.text
    for name in names:
        assert (f"{name} is left out of training: prompt + target have" in caplog.text) == name.endswith("/3")
    assert "3 distinct samples were left out of training." in caplog.text


def test_if_all_are_too_long_the_run_ends(data, base_folder, tmp_path):
    with pytest.raises(ValueError, match=r"All samples so far were left out \(2 distinct samples\)"):
        train.main(options("memory_single", data, base_folder, tmp_path, "--max_length", "5"))
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        train.main(options("memory_single", data, base_folder, tmp_path, "--max_length", "1"))


def test_a_long_pair_with_media_is_left_out_whole(processor, clip):
    rows = [
        {
            "prompt": samples_with_media(clip)[0]["messages"],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for chosen, rejected in (("fine", "thanks"), ("fine", " ".join(WORDS)), (" ".join(WORDS), "fine"))
    ]
    whole = PreferenceCollator(processor)(rows)
    lengths = whole["attention_mask"].sum(1).view(2, 3)  # chosen and rejected of each
    limit = int(lengths[:, 0].max())
    batch = PreferenceCollator(processor, max_length=limit)(rows)
    assert batch["left_out"] == [
        (row, f"prompt + {side} have {lengths[half, row]} tokens, more than max_length={limit}. Raise max_length or "
         "shorten the row")
        for row, side, half in ((1, "rejected", 1), (2, "chosen", 0))
    ]  # fmt: skip
    for token in (processor.video_token, processor.audio_token):
        placeholder = processor.tokenizer.convert_tokens_to_ids(token)
        counts = (batch["input_ids"] == placeholder).sum(1).tolist()
        assert counts == [processor.num_query_tokens, 0, 0] * 2
    assert batch["video_mask"].any(1).tolist() == [True, False, False] * 2
    assert (batch["labels"] != -100).any(1).tolist() == [True, False, False] * 2
