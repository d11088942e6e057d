"""The preference over the clip: which clips are drawn, the term against a reference, and the sources of the vectors."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from torch.nn.functional import softplus

from empathic.trainers import EPOConfig, EPOTrainer, prepare_features
from empathic.trainers.clip_negatives import NO_CLIP, NO_DONOR, NO_EMOTION, ClipNegatives, _has_items, with_clips
from empathic.trainers.frozen.feature_cache import FeatureCache, describe
from empathic.trainers.preference_collator import PairRows, PreferenceCollator

CLIP_METRICS = ("rewards/clip_accuracies", "rewards/clip_margins")


def config(tmp_path, **changes) -> EPOConfig:
    settings = {"learning_rate": 0.1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "logging_steps": 1}
    return EPOConfig(output_dir=str(tmp_path), **{"clip_negatives": True, "disable_tqdm": True, **settings, **changes})


def row_of(media, emotion, name="ana", chosen="i am fine", rejected="you", history=(), corpus="tests"):
    turn = [{"type": kind, "path": str(path)} for kind, path in media] + [{"type": "text", "text": "what did he say"}]
    return {
        "corpus": corpus,
        "emotion": emotion,
        "prompt": [*history, {"role": "user", "name": name, "content": turn}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_media, grey_frames, tone):
    """Four clips of different pictures and sounds."""
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for number in range(4):
        frames = np.roll(grey_frames(8 + 2 * number), 10 * number, axis=1)
        write_media(
            folder / f"{number}.mp4", frames=frames, samples=tone(0.4 + 0.2 * number, frequency=200 + 400 * number)
        )
        found.append(str(folder / f"{number}.mp4"))
    return found


@pytest.fixture
def rows(clips):
    """The only donors: of row 0 row 1 (by the same speaker), of 1 row 0, of 2 row 0; rows 3 and 4 have none."""
    history = [{"role": "user", "name": "ana", "content": [{"type": "text", "text": "hello there"}]}]
    return [
        row_of([("audio", clips[0]), ("video", clips[0])], "happy", history=history),
        row_of([("audio", clips[1]), ("video", clips[1])], "sad", chosen="the old dog of clara", rejected="fine"),
        row_of([("audio", clips[2])], "sad", name="ben", chosen="hello"),
        row_of([], "happy", chosen="thanks"),
        row_of([("audio", clips[3]), ("video", clips[3])], None, name="ben", chosen="how are you"),
    ]


# ---------------------------------------------------------------------------------------------------- draws


def some_rows(count=60):
    """Rows with made-up paths: three speakers, of whom one has a single emotion."""
    rng = np.random.default_rng(0)
    kinds = ([], ["audio"], ["video"], ["audio", "video"])
    rows = []
    for number in range(count):
        name = ("ana", "ben", "cleo")[number % 3]
        emotion = "sad" if name == "cleo" else (None, "happy", "sad", "angry")[rng.integers(4)]
        media = [(kind, f"{number}.mp4") for kind in kinds[rng.integers(4)]]
        rows.append(row_of(media, emotion, name))
    return rows


def kinds_of(row):
    return {item["type"] for item in row["prompt"][-1]["content"]} - {"text"}


def test_a_donor_has_another_emotion_the_same_kinds_of_clips_and_if_possible_the_same_speaker():
    rows = some_rows()
    draws = ClipNegatives(rows)
    reached = {number: set() for number in range(len(rows))}
    for number, row in enumerate(rows):
        wanted = {
            other
            for other, donor in enumerate(rows)
            if row["emotion"] and donor["emotion"] not in (None, row["emotion"]) and kinds_of(donor) >= kinds_of(row)
        }
        by_speaker = {other for other in wanted if rows[other]["prompt"][-1]["name"] == row["prompt"][-1]["name"]}
        wanted = (by_speaker or wanted) if kinds_of(row) else set()
        reached[number] = {draws.draw(number, (0, epoch)) for epoch in range(300)}
        assert reached[number] == (wanted or {None}), number
        reason = draws.why_not(number)
        expected = NO_CLIP if not kinds_of(row) else NO_EMOTION if row["emotion"] is None else None
        assert reason == expected and (reason is None) == bool(wanted)
    assert sum(len(found) > 1 for found in reached.values()) > 20
    assert draws.without == {
        NO_CLIP: sum(not kinds_of(row) for row in rows),
        NO_EMOTION: sum(bool(kinds_of(row)) and row["emotion"] is None for row in rows),
    }
    assert ClipNegatives(rows[:1] * 3 + [row_of([("audio", "a")], "sad")] * 2).why_not(4) == NO_DONOR


def test_a_draw_depends_on_seed_epoch_and_row_alone(tmp_path):
    rows = some_rows()

    def drawn(seed, epoch, given=rows):
        draws = ClipNegatives(given)
        return [draws.draw(number, (seed, epoch)) for number in range(len(given))]

    assert drawn(1, 2) == drawn(1, 2) and len({str(drawn(*key)) for key in ((1, 2), (1, 3), (2, 2))}) == 3
    stored = Dataset.from_list(rows)
    hello, lines = {"role": "user", "content": "hello"}, []
    for number, row in enumerate(rows):  # contents that are a string or a list make a column of JSON
        lines.append(json.dumps({**row, "prompt": [*[hello] * (number % 2), *row["prompt"]]}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    mixed = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert drawn(1, 2, stored) == drawn(1, 2)
    assert _has_items(stored.features.arrow_schema) and not _has_items(mixed.features.arrow_schema)
    assert drawn(1, 2, mixed) == drawn(1, 2)
    order = np.random.default_rng(1).permutation(len(rows))[:40].tolist()
    assert drawn(1, 2, stored.select(order)) == drawn(1, 2, [rows[number] for number in order])
    assert drawn(1, 2, stored.select(range(13, 50))) == drawn(1, 2, rows[13:50])
    # Speakers of another corpus may have the same name.
    both = [row_of([("audio", "a")], "sad"), row_of([("audio", "b")], "happy", corpus="b")]
    both.append(row_of([("audio", "c")], "angry"))
    assert {ClipNegatives(both).draw(0, (0, epoch)) for epoch in range(50)} == {2}


def test_data_without_clips_or_emotions():
    plain = [{"prompt": "a", "chosen": "b", "rejected": "c", "emotion": "sad"}] * 2
    strings = [{**row_of([], "sad"), "prompt": [{"role": "user", "content": "a"}]}] * 2
    for rows in (plain, strings):
        for given in (rows, Dataset.from_list(rows)):
            assert ClipNegatives(given).without == {NO_CLIP: 2}
    without = [{key: value for key, value in row_of([("audio", "a")], None).items() if key != "emotion"}]
    for given in (without, Dataset.from_list(without)):
        assert ClipNegatives(given).without == {NO_EMOTION: 1}


def test_the_clips_of_a_message_are_replaced_in_their_places():
    messages = [{"role": "user", "content": "a"}, row_of([("audio", "1"), ("video", "2")], "sad")["prompt"][0]]
    before = copy.deepcopy(messages)
    other = {kind: {"type": kind, "path": "other"} for kind in ("audio", "video")}
    found = with_clips(messages, other)
    assert messages == before and found[0] == messages[0] and found[1]["name"] == "ana"
    assert found[1]["content"] == [other["audio"], other["video"], messages[1]["content"][2]]


# ---------------------------------------------------------------------------------------------------- the term


def reference(model, processor, rows, donors, weight, negatives=()):
    """The loss from the full logits of each sequence by itself, and its gradients in the language model."""

    def logps(messages, reply):
        sample, ids = processor.prepare(messages), processor.encode_reply(reply)
        sample["input_ids"] = sample["input_ids"] + ids
        found = model(**processor.pad([sample])).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        return found.gather(1, torch.tensor(ids)[:, None])[:, 0]

    pairs, nll, clip, margins = [], [], [], []
    for row, donor in zip(rows, donors, strict=True):
        chosen = logps(row["prompt"], row["chosen"][0]["content"])
        rejected = logps(row["prompt"], row["rejected"][0]["content"])
        pairs.append(softplus(0.5 - 2 * (chosen.mean() - rejected.mean())))
        nll.append(-chosen)
        if donor is not None:
            items = {item["type"]: item for item in rows[donor]["prompt"][-1]["content"]}
            other = logps(with_clips(row["prompt"], items), row["chosen"][0]["content"])
            margins.append(2 * (chosen.mean() - other.mean()))
            clip.append(softplus(0.5 - margins[-1]))
    loss = torch.stack(pairs).mean() + torch.cat(nll).mean() + weight * torch.stack(clip).mean()
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, torch.stack(margins).detach()


@pytest.mark.parametrize("way", ["packed", "not shared", "padded", "all logits"])
def test_loss_and_gradients_are_those_of_a_reference(tmp_path, model, processor, rows, way):
    model.requires_grad_(False).eval()
    model.model.language_model.requires_grad_(True)
    expected, gradients, margins = reference(model, processor, rows, [1, 0, 0, None, None], 0.7)
    args = config(tmp_path, clip_weight=0.7, share_prompt=way != "not shared")
    trainer = EPOTrainer(model, args, eval_dataset=rows, processing_class=processor)
    trainer._packs = way in ("packed", "not shared")
    trainer._skips_logits = way != "all logits"
    batch = trainer.data_collator([trainer.eval_dataset[number] for number in range(len(rows))])
    assert batch["clip_of"].tolist() == [0, 1, 2] and len(batch["labels"]) == 13
    model.zero_grad()
    loss, metrics = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    assert trainer._packs == (way in ("packed", "not shared"))
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    torch.testing.assert_close(found, gradients, atol=1e-5, rtol=1e-4)
    assert margins.abs().min() > 1e-5  # the clips make a difference
    assert metrics["rewards/clip_margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert metrics["rewards/clip_accuracies"] == pytest.approx((margins > 0).float().mean().item())
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert evaluated["eval_rewards/clip_margins"] == pytest.approx(margins.mean().item(), abs=1e-5)


def test_a_weight_of_0_and_rows_without_a_clip_change_nothing(tmp_path, model, processor, rows):
    """The metrics are there all the same, and the other terms are those of a run without the option."""
    model.eval()
    on, off = (
        EPOTrainer(
            model, config(tmp_path, clip_negatives=use, clip_weight=0.0), eval_dataset=rows, processing_class=processor
        )
        for use in (True, False)
    )
    with torch.no_grad():
        batches = [t.data_collator([t.eval_dataset[number] for number in range(len(rows))]) for t in (on, off)]
        found = [t.compute_loss(model, b, return_outputs=True) for t, b in zip((on, off), batches, strict=True)]
    assert "clip_of" not in batches[1] and set(CLIP_METRICS) == found[0][1].keys() - found[1][1].keys()
    for name, value in found[1][1].items():
        assert found[0][1][name] == pytest.approx(value, abs=1e-5), name


def test_it_goes_with_several_negatives(tmp_path, model, processor, rows):
    """Each term is the one of a run with it alone."""
    model.eval()
    rows = [
        {**row, "negatives": [[{"role": "assistant", "content": "the old dog"}]] * (n % 3)}
        for n, row in enumerate(rows)
    ]
    metrics = {}
    for negatives, clip in (("all", True), ("all", False), ("lowest", True)):
        for packs in (True, False):
            args = config(tmp_path, negatives=negatives, clip_negatives=clip, negatives_loss="listwise")
            trainer = EPOTrainer(model, args, eval_dataset=rows, processing_class=processor)
            trainer._packs = packs
            metrics[negatives, clip, packs] = trainer.evaluate()
    for key, other in ((("all", True, True), ("all", True, False)), (("all", True, True), ("all", False, True))):
        for name in ("eval_rewards/rejected", "eval_nll_loss", "eval_rewards/margins"):
            assert metrics[key][name] == pytest.approx(metrics[other][name], abs=1e-5), name
    for name in ("eval_rewards/clip_margins", "eval_rewards/clip_accuracies", "eval_nll_loss"):
        assert metrics["all", True, True][name] == pytest.approx(metrics["lowest", True, True][name], abs=1e-5), name
    assert metrics["all", True, True]["eval_loss"] == pytest.approx(metrics["all", True, False]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("size, accumulation", [(1, 5), (2, 3)])
def test_any_division_gives_the_same_step(tmp_path, model, processor, rows, size, accumulation):
    """The term is a mean over the rows of the step that have one, wherever they are."""
    results = []
    for settings in (
        {"per_device_train_batch_size": 5},
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation},
    ):
        trainer = EPOTrainer(
            copy.deepcopy(model),
            config(tmp_path, max_steps=1, optim="sgd", lr_scheduler_type="constant", **settings),
            train_dataset=rows,
            processing_class=processor,
            data_collator=PreferenceCollator(processor, frame_draws=0),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
        trainer.train()
        log = trainer.state.log_history[0]
        results.append((log, [p for p in trainer.model.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)
    for name in ("loss", "grad_norm", "nll_loss", *CLIP_METRICS):
        assert results[0][0][name] == pytest.approx(results[1][0][name], abs=1e-4), name


# ---------------------------------------------------------------------------------------------------- media


def test_the_frozen_vectors_of_the_other_row_are_used(tmp_path, model, processor, rows):
    """The run equals one that reads the media, and each clip is encoded once for all epochs and both uses."""
    rows = [rows[0], rows[1], *(dict(row) for row in rows[2:])]
    results = []
    for gib in (0.0, 1.0):
        trainer = EPOTrainer(
            copy.deepcopy(model),
            config(
                tmp_path,
                cache_frozen_gib=gib,
                per_device_train_batch_size=3,
                num_train_epochs=2,
                eval_strategy="epoch",
                dataloader_num_workers=gib > 0,
            ),
            train_dataset=rows,
            eval_dataset=rows[:3],
            processing_class=processor,
            data_collator=PreferenceCollator(processor, frame_draws=0),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        calls = []
        tower = trainer.model.get_base_model().model.audio_tower
        tower.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        trainer.train()
        logs = trainer.state.log_history
        results.append([log[n] for log in logs for n in ("loss", "eval_loss", *CLIP_METRICS) if n in log])
    assert len(calls) == 2  # eight rows a batch: one for training, one for evaluation
    assert results[0] == pytest.approx(results[1], abs=1e-5) and len(results[0]) == 4 * 3 + 2


def test_features_of_the_cache_are_used(tmp_path, base_folder, model, processor, rows):
    data = tmp_path / "pairs"
    data.mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(data / f"{split}.parquet")
    folder = tmp_path / "features"
    options = ["--stage", "epo", "--model_name_or_path", base_folder, "--dataset_name", str(data)]
    options += ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "True"]
    prepare_features.main([*options, "--feature_cache", str(folder), "--feature_dtype", "float32"])
    body = model.model
    cache = FeatureCache(
        folder, describe(body.vision_tower, body.audio_tower, processor, **body.config.sound_options), 0
    )
    model.eval()
    losses = []
    for collator in (PreferenceCollator(processor, frame_draws=0), PreferenceCollator(processor, cache=cache)):
        trainer = EPOTrainer(
            model, config(tmp_path), eval_dataset=rows, processing_class=processor, data_collator=collator
        )
        losses.append(trainer.evaluate())
    for name in ("eval_loss", *(f"eval_{name}" for name in CLIP_METRICS)):
        assert losses[0][name] == pytest.approx(losses[1][name], abs=1e-4), name


# ---------------------------------------------------------------------------------------------------- reports


def test_rows_without_a_term_and_clips_that_cannot_be_read_are_reported(tmp_path, model, processor, rows, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(rows[1]["prompt"][-1]["content"][0]["path"]).read_bytes()[:400])
    rows[1] = row_of([("audio", broken), ("video", broken)], "sad")
    for gib in (0.0, 1.0):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="empathic.trainers"):
            trainer = EPOTrainer(
                copy.deepcopy(model),
                config(tmp_path, num_train_epochs=2, cache_frozen_gib=gib),
                train_dataset=rows,
                processing_class=processor,
                peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
            )
            trainer.train()
        messages = "\n".join(record.getMessage() for record in caplog.records)
        line = f"2 of 5 train rows get no preference over the clip: 1 because {NO_CLIP}; 1 because {NO_EMOTION}."
        assert messages.count(line) == 1
        assert messages.count("train row 0: the clip of another emotion is left out: ") == 1
        assert messages.count("train row 1 is left out: ") == 1 and "broken.mp4" in messages
        assert messages.count("1 train pairs drew a clip of another emotion that cannot be used.") == 1
        last = trainer.state.log_history[-1]
        assert (last["left_out_pairs"], last["left_out_clips"]) == (1, 1)


def test_settings_are_checked(tmp_path, model, processor, rows):
    with pytest.raises(ValueError, match=r"no row of the train data set .* 1 because it has no clip"):
        EPOTrainer(model, config(tmp_path), train_dataset=rows[3:4], processing_class=processor)
    with pytest.raises(ValueError, match=f"2 because {NO_DONOR}"):
        PairRows(rows[1:3], "train", 0, True, clip_negatives=True)
    with pytest.raises(ValueError, match="a text model reads no clips"):
        text = processor.tokenizer
        EPOTrainer(model, config(tmp_path), train_dataset=rows, processing_class=text)
    with pytest.raises(ValueError, match=r"clip_weight must .* got -1"):
        config(tmp_path, clip_weight=-1)
    assert not EPOConfig().clip_negatives and "clip_negative" not in PairRows(rows, "train", 0)[0]
