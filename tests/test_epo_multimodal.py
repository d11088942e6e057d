"""EPOTrainer on the multimodal model, with a real clip: batches, the loss, and what a run changes."""

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
    """A row with history and clip, one with sound only, one of bare text, and one whose clip is cut short."""
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
    # Training gives all modalities, even where a whole batch has none.
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
