"""EPOTrainer on the multimodal model, with a real clip: batches, the loss, and what a run changes."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from empathic.trainers import EPOConfig, EPOTrainer
from empathic.trainers.preference_collator import PairRows, PreferenceCollator


def config(tmp_path, **changes) -> EPOConfig:
    settings = {"learning_rate": 0.1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    return EPOConfig(output_dir=str(tmp_path), **settings | changes)


@pytest.fixture
def conversations(clip, tmp_path):
    """Rows with history and clip, with audio only, with text only, and with a truncated clip."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(clip).read_bytes()[:500])

    def row(chosen, rejected, media=(), history=()):
        turn = [{"type": kind, "path": str(path)} for kind, path in media] + [
            {"type": "text", "text": "what did he say"}
        ]
        return {
            "prompt": [*history, {"role": "user", "name": "ana", "content": turn}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        }

    history = [
        {"role": "user", "name": "ana", "content": [{"type": "text", "text": "hello there"}]},
        {"role": "assistant", "name": "ben", "content": [{"type": "text", "text": "how are you"}]},
    ]
    return [
        row("i am fine <|im_end|> thanks", "you", [("audio", clip), ("video", clip)], history),
        row("fine", "the old dog of clara", [("audio", clip)]),
        row("the dog", "you"),
        row("fine", "you", [("video", broken)]),
    ]


def test_multimodal_batch(processor, conversations):
    collate = PreferenceCollator(processor)
    batch = collate(conversations)
    assert [row_id for row_id, _ in batch["left_out"]] == [3] and "broken.mp4" in batch["left_out"][0][1]
    for place, row in enumerate(conversations[:3]):
        prompt = processor.prepare(row["prompt"])["input_ids"]
        for half, reply in ((0, row["chosen"][0]["content"]), (4, row["rejected"][0]["content"][0]["text"])):
            expected = prompt + processor.encode_reply(reply)
            ids, mask, labels = (batch[key][place + half] for key in ("input_ids", "attention_mask", "labels"))
            assert ids[mask.bool()].tolist() == expected and mask[: len(expected)].all()
            assert labels[labels != -100].tolist() == expected[len(prompt) :]
            assert (
                expected.count(processor.tokenizer.eos_token_id) - prompt.count(processor.tokenizer.eos_token_id) == 1
            )
    assert (batch["labels"][[3, 7]] == -100).all()
    assert batch["video_mask"].any(1).tolist() == [True, False, False, False] * 2
    assert batch["input_features_mask"].any(1).tolist() == [True, True, False, False] * 2
    assert batch["memory_attention_mask"].any(1).tolist() == [True, False, False, False] * 2
    torch.testing.assert_close(batch["pixel_values_videos"][:4], batch["pixel_values_videos"][4:])
    # In training, batches have all modalities, even if no row has any.
    assert {"pixel_values_videos", "input_features", "memory_input_ids"} <= set(collate(conversations[2:3]))
    # history="text" puts the earlier turns into the prompt.
    text = PreferenceCollator(processor, history="text")(conversations)
    assert not text["memory_attention_mask"].any()
    assert text["attention_mask"][0].sum() > batch["attention_mask"][0].sum()


def test_frames_are_random_in_training_and_even_in_evaluation(processor, conversations):
    collate = PreferenceCollator(processor)
    rows = PairRows(conversations[:1], "train", seed=0)
    first = collate([rows[0]])["pixel_values_videos"]
    torch.testing.assert_close(first, collate([rows[0]])["pixel_values_videos"])
    rows.set_epoch(1)
    assert not torch.equal(first, collate([rows[0]])["pixel_values_videos"])
    held = PairRows(conversations[:1], "eval")
    even = processor.prepare(conversations[0]["prompt"])["video"][0]
    torch.testing.assert_close(collate([held[0]])["pixel_values_videos"][0], even)


def test_multimodal_loss_is_that_of_its_rows_one_by_one(tmp_path, model, processor, conversations):
    model.eval()
    trainer = EPOTrainer(model, config(tmp_path), processing_class=processor)
    loss, metrics = trainer.compute_loss(model, trainer.data_collator(conversations), return_outputs=True)
    means, sums, counts = [], [], []
    for row in conversations[:3]:
        for side in ("chosen", "rejected"):
            sample = processor.prepare(row["prompt"])
            content = row[side][0]["content"]
            reply = processor.encode_reply(content if isinstance(content, str) else content[0]["text"])
            sample["input_ids"] = sample["input_ids"] + reply
            with torch.no_grad():
                logps = model(**processor.pad([sample])).logits[0, -len(reply) - 1 : -1].log_softmax(-1)
            logps = logps.gather(1, torch.tensor(reply)[:, None])
            means.append(logps.mean())
            sums.append(-logps.sum())
            counts.append(len(reply))
    chosen, rejected = torch.stack(means[::2]), torch.stack(means[1::2])
    expected = torch.log1p(torch.exp(0.5 - 2 * (chosen - rejected))).mean() + sum(sums[::2]) / sum(counts[::2])
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)
    assert metrics["rewards/margins"] == pytest.approx((2 * (chosen - rejected)).mean().item(), abs=1e-5)


def test_clips_and_memory_are_computed_once_a_pair(tmp_path, model, processor, conversations):
    """The loss and gradients equal those of two padded rows per pair, each with its own clips."""
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    trainer = EPOTrainer(model, config(tmp_path), processing_class=processor)
    batch = trainer.data_collator(conversations)
    batch["input_features"][[1, 5]] += 1  # all rows have the same clip
    seen = {"vision_tower": [], "audio_qformer": [], "memory": [], "language_model": []}
    for name, calls in seen.items():
        getattr(model.model, name).register_forward_hook(
            lambda module, args, kwargs, output, calls=calls: calls.append(
                next(value for value in [*args, *kwargs.values()] if torch.is_tensor(value)).shape[0]
            ),
            with_kwargs=True,
        )
    results = []
    for packs, share in ((True, True), (True, False), (False, False)):
        trainer._packs, trainer.args.share_prompt = packs, share
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    frames = processor.num_frames
    assert seen["vision_tower"] == [frames, 2 * frames, 2 * frames]
    assert seen["audio_qformer"] == [2, 4, 4]
    assert seen["memory"] == [4, 8, 8]
    for loss, gradients in results[:2]:
        torch.testing.assert_close(loss, results[2][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradients, results[2][1], atol=1e-5, rtol=1e-4)


def test_pairs_of_two_prompts_are_not_taken_for_one(tmp_path, model, processor, conversations):
    """A custom collator may give each reply its own prompt and clip."""
    model.eval()
    trainer = EPOTrainer(model, config(tmp_path), processing_class=processor)
    batch = trainer.data_collator(conversations[:1])
    batch["pixel_values_videos"][1] += 1
    batch["input_ids"][1, 0] += 1
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        trainer._packs = False
        expected = trainer.compute_loss(model, batch)
        batch["pixel_values_videos"][1] -= 1
        other = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert abs(other - expected) > 1e-4


def counted_calls(model) -> dict[str, int]:
    """Count how often each frozen part runs."""
    counts = dict.fromkeys(("vision_tower", "audio_tower", "video_qformer", "audio_qformer", "memory"), 0)

    def count(name):
        def hook(*args):
            counts[name] += 1

        return hook

    for name in counts:
        getattr(model.model, name).register_forward_hook(count(name))
    return counts


@pytest.mark.parametrize("share", [True, False])
def test_frozen_outputs_are_computed_once_for_all_epochs(tmp_path, model, processor, conversations, share):
    """The run equals a run without cached vectors: frames are evenly spaced here, in every epoch."""
    losses, evaluations = [], []
    for gib in (0.0, 1.0):
        trainer = EPOTrainer(
            copy.deepcopy(model),
            config(
                tmp_path,
                cache_frozen_gib=gib,
                share_prompt=share,
                per_device_train_batch_size=2,
                per_device_eval_batch_size=3,
                num_train_epochs=2,
                logging_steps=1,
                eval_strategy="epoch",
                dataloader_num_workers=gib > 0,
            ),
            train_dataset=conversations,
            eval_dataset=conversations[1:],
            processing_class=processor,
            data_collator=PreferenceCollator(processor, frame_draws=0),
            peft_config=LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
        )
        counts = counted_calls(trainer.model.get_base_model())
        trainer.train()
        history = trainer.state.log_history
        losses.append([log["loss"] for log in history if "loss" in log])
        evaluations.append([log["eval_loss"] for log in history if "eval_loss" in log])
        assert history[-1]["left_out_pairs"] == 1
        rows = trainer.train_dataset.frozen
    # Four rows in two batches of 3, and three rows in one, for any number of epochs; a tower runs once per batch.
    assert set(counts.values()) == {3}
    assert "broken.mp4" in rows[3]["left_out"] and set(rows[3]) == {"left_out"}
    assert rows[0]["video"].shape == rows[1]["audio"].shape == (processor.num_query_tokens, rows[0]["memory"].shape[1])
    assert rows[1]["video"] is None and len(rows[0]["memory"]) == 2 and len(rows[2]["memory"]) == 0
    prompt, _ = trainer.data_collator.prompt_and_target(trainer.train_dataset[0])  # for generation: whole
    assert prompt["video"][0].shape[0] == processor.num_frames and prompt["memory_input_ids"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5) and len(evaluations[0]) == 2


def test_frozen_outputs_have_the_frames_of_the_first_epoch(tmp_path, model, processor, conversations):
    """Also if a resumed run computes them in a later epoch; and nothing is computed twice."""
    model.requires_grad_(False)
    found = []
    for epoch in (0, 2):
        args = config(tmp_path, cache_frozen_gib=1)
        trainer = EPOTrainer(model, args, train_dataset=conversations[:1], processing_class=processor)
        trainer.train_dataset.set_epoch(epoch)
        trainer.compute_frozen(trainer.train_dataset)
        found.append(trainer.train_dataset[0]["frozen"])
        entries = trainer.train_dataset.frozen
        trainer.compute_frozen(trainer.train_dataset)
        assert trainer.train_dataset.frozen is entries
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    drawn = PairRows(conversations[:1], "train", seed=args.seed)[0]
    inputs = processor.pad([trainer.data_collator.prompt(drawn)[0]])
    torch.testing.assert_close(model.eval()(**inputs).video_vectors[0], found[0]["video"], atol=1e-6, rtol=0)


def test_frozen_outputs_have_bounds(tmp_path, model, processor, conversations):
    def train(model, **changes):
        settings = {"max_steps": 1, "per_device_train_batch_size": 1, **changes}
        EPOTrainer(model, config(tmp_path, **settings), train_dataset=conversations, processing_class=processor).train()

    with pytest.raises(ValueError, match="these parameters are trained: video_query_tokens and"):
        train(model, cache_frozen_gib=1)
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"The vectors of 4 rows would need about .* more than cache_frozen_gib=1e-07"):
        train(model, cache_frozen_gib=1e-7)
    with pytest.raises(ValueError, match=r"cache_frozen_gib must .* got -1"):
        config(tmp_path, cache_frozen_gib=-1)
    with pytest.raises(ValueError, match="a text model has no clips"):
        text = processor.tokenizer
        EPOTrainer(model, config(tmp_path, cache_frozen_gib=1), train_dataset=conversations, processing_class=text)


def test_vectors_take_the_place_of_clips(model, processor, conversations):
    """In the model's forward, padded and packed; vectors that do not fit the text are an error."""
    model.eval()
    prepared = [processor.prepare(row["prompt"]) for row in conversations[:3]]
    inputs = processor.pad(prepared, padding_side="right")
    whole = model(**inputs)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    memory = torch.zeros(3, 2, whole.memory_vectors.shape[1])
    memory[0] = whole.memory_vectors
    vectors = {"video_vectors": whole.video_vectors, "audio_vectors": whole.audio_vectors}
    assert len(vectors["video_vectors"]) == 1 and len(vectors["audio_vectors"]) == 2
    kept = inputs["attention_mask"].bool()
    given = model(**text, **vectors, memory_vectors=memory).logits
    torch.testing.assert_close(given[kept], whole.logits[kept], atol=1e-6, rtol=0)

    # One row of text with all prompts; each prompt attends to earlier ones, but the placed vectors are the same.
    packed = {"input_ids": inputs["input_ids"][kept][None]}
    encoded = model(**packed, **{key: value for key, value in inputs.items() if key not in text}).logits
    given = model(**packed, **vectors, memory_vectors=memory[:1]).logits
    torch.testing.assert_close(given, encoded, atol=1e-6, rtol=0)
    torch.testing.assert_close(given[0, : len(prepared[0]["input_ids"])], whole.logits[0][kept[0]], atol=1e-5, rtol=0)

    with pytest.raises(ValueError, match=r"audio placeholders .* do not match"):
        model(**text, video_vectors=vectors["video_vectors"], audio_vectors=vectors["audio_vectors"][:1])
    with pytest.raises(ValueError, match=r"video placeholders .* do not match"):
        model(**packed, audio_vectors=vectors["audio_vectors"], memory_vectors=memory[:1])
    with pytest.raises(ValueError, match="exactly one of video_vectors and a clip"):
        model(**inputs, video_vectors=vectors["video_vectors"])


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}], ids=str)
def test_multimodal_training_changes_the_adapter_only(tmp_path, model, processor, conversations, settings):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = EPOTrainer(
        model,
        config(tmp_path, per_device_train_batch_size=2, num_train_epochs=2, dataloader_num_workers=1, **settings),
        train_dataset=Dataset.from_list(conversations[:3]),  # which fills absent keys with None
        eval_dataset=conversations,
        processing_class=processor,
        peft_config=LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
    )
    trainer.train()
    assert trainer.evaluate()["eval_left_out_pairs"] == 1
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            original = before[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            torch.testing.assert_close(parameter, original, atol=0, rtol=0, msg=name)
        elif "lora_B" in name:
            assert "language_model" in name and parameter.abs().sum() > 0, name


@pytest.mark.parametrize("targets, adapted", [
    (["q_proj", "v_proj"], {"language_model"}),
    ("all-linear", {"language_model"}),
    (["q_proj", "video_projector.linear"], {"language_model", "video_projector"}),
    (r".*\.(vision_tower|language_model)\..*q_proj", {"vision_tower", "language_model"}),
])  # fmt: skip
def test_a_new_adapter_is_in_the_language_model_unless_another_part_is_named(
    tmp_path, model, processor, conversations, targets, adapted
):
    peft_config = LoraConfig(r=2, target_modules=targets, exclude_modules=["k_proj"])
    given = config(tmp_path), conversations, None, processor, peft_config
    names = [name for name, _ in EPOTrainer(model, *given).model.named_parameters() if "lora_A" in name]
    assert {name.split(".")[3] for name in names} == adapted
    assert not [name for name in names if "k_proj" in name]


def test_a_multimodal_model_is_loaded_by_its_name(tmp_path, base_folder, model, conversations):
    trainer = EPOTrainer(base_folder, config(tmp_path), conversations)
    assert trainer.data_collator.is_multimodal
    assert torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)


def test_a_reply_without_content_and_columns_of_other_trainers_are_errors_with_the_row(
    tmp_path, model, processor, conversations
):
    none = [{"role": "assistant", "content": None}]
    for column in ("chosen", "rejected"):
        rows = [conversations[2], {**conversations[2], column: none}]
        with pytest.raises(ValueError, match=f"Row 1: a message of {column} has the content None"):
            PreferenceCollator(processor)(rows)
    for column in ("tools", "images", "video"):
        rows = [{**conversations[2], column: ["a"]}]
        with pytest.raises(ValueError, match=f"has the column {column}"):
            EPOTrainer(model, config(tmp_path), rows, processing_class=processor)


def test_a_path_under_the_kind_of_a_clip_is_read_like_one_under_path(processor, conversations, clip):
    """Conversations for Qwen's models have {"type": "video", "video": "clip.mp4"}."""
    row = copy.deepcopy(conversations[0])
    for item in row["prompt"][-1]["content"]:
        if "path" in item:
            item[item["type"]] = f"file://{item.pop('path')}"
    collate = PreferenceCollator(processor, frame_draws=3)
    batches = [collate([{**given, "sampling_seed": (0, 0, 0)}]) for given in (row, conversations[0])]
    assert not batches[0]["left_out"] and batches[0].keys() == batches[1].keys()
    assert all(torch.equal(value, batches[1][key]) for key, value in batches[0].items() if torch.is_tensor(value))
