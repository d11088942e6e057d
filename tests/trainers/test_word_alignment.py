"""The alignment of clips with the emotions' words: the loss by hand, and a stage that begins with it."""

import math

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

from empathic.composition_empathic import PARTS_FILE
from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.views import EmotionClips
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import train
from empathic.trainers.samples import SampleStream, StageCollator, emotion_sample
from empathic.trainers.stage_trainer import StageTrainer
from empathic.trainers.stages import StageConfig, freeze_for_stage
from empathic.trainers.word_alignment import (
    SHARPNESS,
    align_with_words,
    clips_of_rows,
    contrast,
    distance,
    emotion_labels,
    word_vectors,
)

SIZES = dict(num_query_tokens=2, num_frames=2)
QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
QFORMER |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def small(parts):
    torch.manual_seed(0)
    sizes = SIZES | dict(video_qformer_config=QFORMER, audio_qformer_config=QFORMER)
    model = EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **sizes)
    return model, EmpathicProcessor.from_parts_pretrained(**parts, **SIZES)


def heard(model, sounds):
    """A batch of sounds `(positions, width)`, None for a row without one, and without video."""
    length, width = 6, model.config.audio_config.d_model
    states, mask = torch.zeros(len(sounds), length, width), torch.zeros(len(sounds), length, dtype=torch.long)
    for row, sound in enumerate(sounds):
        if sound is not None:
            states[row, : len(sound)], mask[row, : len(sound)] = sound, 1
    pixels = torch.zeros(len(sounds), 2, 5, model.config.vision_config.hidden_size)
    absent = torch.zeros(len(sounds), 2, dtype=torch.long)
    return {
        "audio_encoder_states": states,
        "audio_encoder_mask": mask,
        "video_encoder_states": pixels,
        "video_mask": absent,
    }


def test_the_loss_is_that_of_hand():
    words = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    # The first clip has its word; the second has, of its two vectors, one in the other direction.
    vectors = torch.tensor([[[5.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]]])
    loss, right = contrast(vectors, words, torch.tensor([0, 1]))
    mean = torch.tensor([1.5, 0.5]) / math.hypot(1.5, 0.5)
    first = math.log(1 + math.exp(-SHARPNESS))
    second = math.log(1 + math.exp(SHARPNESS * (mean[0] - mean[1])))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5) and right == 1
    assert distance(vectors, words, torch.tensor([0, 1])).item() == pytest.approx((0 + 0 + 0 + 1) / 4)


def test_a_word_is_the_mean_of_what_the_embedding_module_gives(small):
    model, processor = small
    ids = processor.tokenizer(" sad", add_special_tokens=False)["input_ids"]
    ids = [token for token in ids if processor.tokenizer.decode([token]).strip()]
    expected = model.get_input_embeddings().weight[ids].mean(0)
    assert torch.allclose(word_vectors(model, processor)[EMOTIONS.index("sad")], expected)
    # A module may scale its weights, as Gemma's does.
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: 3 * output)
    assert torch.allclose(word_vectors(model, processor)[EMOTIONS.index("sad")], 3 * expected)


def test_a_row_without_a_clip_does_not_count(small):
    model, _ = small
    found = clips_of_rows(heard(model, [torch.randn(4, model.config.audio_config.d_model), None]))
    assert found["audio"].tolist() == [True, False] and found["video"].tolist() == [False, False]


def test_clips_move_to_their_words_without_the_language_model(small, tmp_path):
    model, processor = small
    freeze_for_stage(model, "emotion")
    sounds = [torch.randn(5, model.config.audio_config.d_model) for _ in range(4)]
    samples = 30 * [{"target": EMOTIONS[number % 2], "sound": sound} for number, sound in enumerate(sounds)]

    def collate(chosen):
        return {**heard(model, [one["sound"] for one in chosen]), "targets": [one["target"] for one in chosen]}

    steps = StageConfig(
        output_dir=str(tmp_path), alignment_steps=30, learning_rate=1e-2, per_device_train_batch_size=4, use_cpu=True
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.language_model.register_forward_hook(lambda *call: pytest.fail("the language model ran"))
    assert align_with_words(model, processor, collate, samples, steps) > 0.8  # from the first step on
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.audio_") and "tower" not in name for name in changed)
    labels, words = torch.tensor([0, 1, 0, 1]), word_vectors(model, processor)
    batch = heard(model.eval(), sounds)
    sound = {name: batch[name] for name in ("audio_encoder_states", "audio_encoder_mask")}
    _, right = contrast(model.get_audio_features(**sound).pooler_output, words, labels)
    assert right == 4 and all(parameter.grad is None for parameter in model.parameters())


def test_samples_without_a_clip_are_an_error(small, tmp_path):
    model, processor = small
    freeze_for_stage(model, "emotion")
    args = StageConfig(output_dir=str(tmp_path), alignment_steps=2, use_cpu=True)

    def collate(chosen):
        return {**heard(model, [None] * len(chosen)), "targets": [one["target"] for one in chosen]}

    with pytest.raises(ValueError, match="None of the samples of 2 steps"):
        align_with_words(model, processor, collate, 16 * [{"target": "sad"}], args)


def test_the_stage_aligns_first_and_not_again_when_it_resumes(parts, recordings, tmp_path, monkeypatch):
    calls, real = [], train.align_with_words

    def counted(*args):
        calls.append(real(*args))

    monkeypatch.setattr(train, "align_with_words", counted)

    def run(folder, *more):
        options = ["--stage", "emotion", "--dataset_name", recordings.data, "--output_dir", str(tmp_path / folder)]
        options += [option for name, part in parts.items() for option in (f"--{name}", part)]
        options += ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32", "--num_query_tokens", "4"]
        options += ["--num_frames", "2", "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "True"]
        options += ["--eval_strategy", "no", "--save_steps", "1", "--report_to", "none", "--disable_tqdm", "True"]
        train.main([*options, *more])
        return load_file(tmp_path / folder / PARTS_FILE)

    plain = run("plain")
    aligned = run("aligned", "--alignment_steps", "3")
    assert len(calls) == 1
    assert any(not torch.equal(aligned[name], value) for name, value in plain.items())
    (tmp_path / "aligned" / PARTS_FILE).unlink()
    resumed = run("aligned", "--alignment_steps", "3", "--resume_from_checkpoint", "auto")
    assert len(calls) == 1 and all(torch.equal(resumed[name], value) for name, value in aligned.items())


@pytest.mark.parametrize("packs", [True, False])
def test_the_weighted_contrast_is_added_in_training_alone(small, recordings, tmp_path, packs):
    model, processor = small
    freeze_for_stage(model, "emotion")
    clips = EmotionClips(load_dataset(recordings.data, split="train"))
    stream, collator = SampleStream([(1.0, clips, emotion_sample)], 8, 0), StageCollator(processor)
    batch = collator([stream[number] for number in range(6)])
    there, labels, words = (
        clips_of_rows(batch),
        emotion_labels(batch, torch.device("cpu")),
        word_vectors(model, processor),
    )
    assert all(0 < rows.sum() < 6 for rows in there.values())

    def loss(weight, training=True, **more):
        args = StageConfig(output_dir=str(tmp_path), alignment_weight=weight, use_cpu=True, report_to="none")
        options = {"train_dataset": stream, "processing_class": processor, "data_collator": collator}
        trainer = StageTrainer(model=model, args=args, **options)
        trainer._packs = packs
        model.train(training)
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, dict(batch), **more).item()

    with torch.no_grad():
        vectors = {
            "video": model.get_video_features(batch["pixel_values_videos"], batch["video_mask"]).pooler_output,
            "audio": model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output,
        }
    expected = [contrast(vectors[kind][rows], words, labels[rows])[0].item() for kind, rows in there.items()]
    plain, mean = loss(0.0), sum(expected) / 2
    assert loss(2.0) == pytest.approx(plain + 2 * mean, rel=1e-4)
    assert loss(2.0, training=False) == loss(0.0, training=False)
    targets = int((batch["labels"] != -100).sum())
    assert loss(2.0, num_items_in_batch=4 * targets) == pytest.approx((plain + 2 * mean) / 4, rel=1e-4)


def test_other_stages_and_negative_numbers_are_refused(parts, recordings, tmp_path):
    for name in ("alignment_steps", "alignment_weight"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            StageConfig(output_dir=str(tmp_path), **{name: -1})
    options = ["--stage", "memory_single", "--dataset_name", recordings.data, "--output_dir", str(tmp_path / "out")]
    options += [option for name, part in parts.items() for option in (f"--{name}", part)]
    with pytest.raises(ValueError, match="alignment_steps is 3, but stage memory_single trains no Q-former"):
        train.main([*options, "--alignment_steps", "3", "--report_to", "none"])
