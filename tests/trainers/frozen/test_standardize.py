"""Mean and deviation of the encoders' outputs: values by hand, and a stage that measures, saves and resumes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from empathic.composition_empathic import PARTS_FILE
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.trainers import train
from empathic.trainers.checkpoints.stage_folder import load_model
from empathic.trainers.frozen.standardize import LOWEST, measure_standardizers

QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZES = dict(num_query_tokens=2, num_frames=2, video_qformer_config=QFORMER, audio_qformer_config=QFORMER)


@pytest.fixture
def standardizing(parts):
    return EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES, standardize_features=True)


def sound_batch(model, clips, length):
    """A batch with the sound of each clip `(positions, width)`, None where there is none, and without video."""
    width, states = model.config.audio_config.d_model, []
    mask = torch.zeros(len(clips), length, dtype=torch.long)
    for row, clip in enumerate(clips):
        states.append(torch.full((length, width), 1e3))  # after the clip
        if clip is not None:
            states[row][: len(clip)] = clip
            mask[row, : len(clip)] = 1
    video = torch.zeros(len(clips), 2, 5, model.config.vision_config.hidden_size)
    absent = torch.zeros(len(clips), 2, dtype=torch.long)
    sound = {"audio_encoder_states": torch.stack(states), "audio_encoder_mask": mask}
    return {**sound, "video_encoder_states": video, "video_mask": absent}


def test_each_clip_counts_once_and_what_is_absent_not_at_all(standardizing):
    width = standardizing.config.audio_config.d_model
    clips = [3 * torch.randn(length, width) + 7 for length in (4, 9, 1)]
    for clip in clips:
        clip[:, 5] = 2.0  # a channel that never varies
    rows = [clips[0], None, clips[1], clips[2]]
    measure_standardizers(standardizing, lambda samples: sound_batch(standardizing, samples, 9), rows)
    means = torch.stack([clip.mean(0) for clip in clips])
    found = standardizing.model.audio_standardizer
    assert torch.allclose(found.mean, means.mean(0), atol=1e-5)
    varies = torch.arange(width) != 5
    assert torch.allclose(found.deviation[varies], means.std(0)[varies].clamp(min=LOWEST * means.std(0).mean()))
    assert found.deviation[5] == pytest.approx(LOWEST * means.std(0).mean().item())
    assert torch.allclose(found(clips[0])[:, 5], torch.zeros(4), atol=1e-4)
    unmeasured = standardizing.model.video_standardizer
    assert not unmeasured.mean.any() and torch.equal(unmeasured.deviation, torch.ones_like(unmeasured.mean))


def test_a_single_clip_has_no_deviation(standardizing):
    rows = [torch.randn(3, standardizing.config.audio_config.d_model)]
    measure_standardizers(standardizing, lambda samples: sound_batch(standardizing, samples, 3), rows)
    assert not standardizing.model.audio_standardizer.mean.any()


def test_the_first_stage_measures_saves_and_resumes(parts, tmp_path, labeled_clips):
    def run(folder, *more):
        options = [
            "--stage",
            "emotion",
            "--dataset_name",
            labeled_clips,
            "--output_dir",
            str(tmp_path / folder),
        ]
        options += [option for name, part in parts.items() for option in (f"--{name}", part)]
        options += ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32", "--num_query_tokens", "4"]
        options += ["--num_frames", "2", "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "True"]
        options += ["--eval_strategy", "no", "--save_steps", "1", "--report_to", "none", "--disable_tqdm", "True"]
        train.main([*options, "--standardize_features", "True", *more])
        return load_file(tmp_path / folder / PARTS_FILE)

    saved = run("one")
    for kind in ("video", "audio"):
        assert saved[f"model.{kind}_standardizer.mean"].any()
        assert not torch.equal(saved[f"model.{kind}_standardizer.deviation"], torch.ones(1))
    loaded = load_model(str(tmp_path / "one"))
    assert loaded.config.standardize_features
    assert torch.equal(loaded.model.audio_standardizer.mean, saved["model.audio_standardizer.mean"])
    loaded.save_pretrained(tmp_path / "whole")
    whole = EmpathicForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole.model.audio_standardizer.deviation, saved["model.audio_standardizer.deviation"])

    again = run("one", "--resume_from_checkpoint", str(Path(tmp_path, "one", "checkpoint-1")))
    assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)


def test_without_the_option_there_is_no_standardizer(parts):
    model = EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES)
    assert not any("standardizer" in name for name in model.state_dict())
