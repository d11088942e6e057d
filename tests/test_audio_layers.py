"""The layers of Whisper's encoder whose outputs the Q-former gets."""

import json

import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from empathic.composition_empathic import PARTS_FILE
from empathic.configuration_empathic import EmpathicConfig
from empathic.modeling_empathic import EmpathicForConditionalGeneration, encode_sound
from empathic.trainers import prepare_features, train
from empathic.trainers.checkpoints.stage_folder import load_model

POSITIONS, WIDTH, DEPTH = 40, 32, 3


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=DEPTH, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=POSITIONS,
    )  # fmt: skip
    return WhisperEncoder(config).double().eval()


@pytest.fixture(scope="module")
def sounds():
    """Two sounds of one and of half a window, and their mask."""
    features = torch.randn(2, 8, 2 * POSITIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return features, (torch.arange(2 * POSITIONS) < torch.tensor([[2 * POSITIONS], [POSITIONS]])).long()


@torch.no_grad()
def test_layers_are_those_of_the_encoder_side_by_side(tower, sounds):
    features, mask = sounds
    states = tower(features, output_hidden_states=True).hidden_states
    assert len(states) == DEPTH + 1
    for layers in ([0], [2], [3], [1, 3], [3, 1]):
        found = encode_sound(tower, features, mask, "full", layers)
        assert torch.allclose(found, torch.cat([states[layer] for layer in layers], dim=-1))
    last = encode_sound(tower, features, mask, "full")
    assert torch.allclose(last, states[DEPTH]) and torch.allclose(
        last, encode_sound(tower, features, mask, "full", [DEPTH])
    )


@torch.no_grad()
def test_a_clip_alone_has_its_own_layers(tower, sounds):
    features, mask = sounds
    together = encode_sound(tower, features, mask, "clip", [1, 3])
    alone = encode_sound(tower, features[1:], mask[1:], "clip", [1, 3])
    assert together.shape == (2, POSITIONS, 2 * WIDTH)
    assert torch.allclose(together[1], alone[0]) and not together[1, POSITIONS // 2 :].any()
    assert torch.allclose(together[..., WIDTH:], encode_sound(tower, features, mask, "clip"))


@torch.no_grad()
def test_layers_after_the_last_are_not_run(tower, sounds):
    run = []
    hooks = [layer.register_forward_hook(lambda module, *_: run.append(module)) for layer in tower.layers]
    encode_sound(tower, *sounds, "full", [0, 2])
    for hook in hooks:
        hook.remove()
    assert run == list(tower.layers[:2])


def test_layers_that_are_not_there_are_refused():
    whisper = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
    for layers, text in (
        ([1, 3], "names layer 3, but Whisper's encoder has the layers 1 to 2"),
        ([-1], "names layer -1"),
        ([1, 1], "name at least one layer, and each once"),
        ([], "name at least one layer"),
    ):
        with pytest.raises(ValueError, match=text):
            EmpathicConfig(audio_config=whisper, audio_feature_layers=layers)
    config = EmpathicConfig(audio_config=whisper, audio_feature_layers=[1, 2])
    assert config.audio_qformer_config.encoder_hidden_size == 64
    assert EmpathicConfig.from_dict(config.to_dict()).audio_feature_layers == [1, 2]


def test_a_stage_records_its_layers_and_trains_from_a_cache_of_them(parts, tmp_path, labeled_clips):
    common = ["--stage", "emotion", "--dataset_name", labeled_clips, "--report_to", "none", "--use_cpu", "True"]
    common += ["--disable_tqdm", "True", "--eval_strategy", "no", "--eval_split", "train"]
    new = [option for name, part in parts.items() for option in (f"--{name}", part)]
    new += ["--qformer_layers", "2", "--qformer_heads", "2", "--qformer_width", "32", "--num_query_tokens", "4"]
    new += ["--num_frames", "2", "--standardize_features", "True", "--audio_feature_layers", "2", "1"]
    cache = ["--feature_cache", str(tmp_path / "cache"), "--feature_dtype", "float32", "--frame_draws", "0"]

    def run(name, *more):
        steps = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--frame_draws", "0", "--logging_steps", "1"]
        return train.main([*common, *steps, "--output_dir", str(tmp_path / name), *more])["train_loss"]

    from_media = run("media", *new)
    assert prepare_features.main([*common, *new, *cache])["encoded"] == 8
    cached = run("cached", *new, *cache[:2])
    assert cached == pytest.approx(from_media, rel=2e-5)
    loaded = load_model(str(tmp_path / "cached"))
    assert loaded.config.audio_feature_layers == [2, 1]
    assert (tmp_path / "cached" / PARTS_FILE).exists()
    # A run that goes on takes the layers from its start: the cache fits, and another model's does not.
    start = ["--model_name_or_path", str(tmp_path / "cached")]
    assert prepare_features.main([*common, *start, *cache])["encoded"] == 0
    run("further", *start, *cache[:2])
    with pytest.raises(ValueError, match=r"audio_feature_layers: the cache has \[2, 1\], the model None"):
        run("other", *new[:-3], *cache[:2])
    with pytest.raises(ValueError, match="names layer 9"):
        prepare_features.main([*common, *new[:-2], "9", "--feature_cache", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="names layer 9"):
        run("none", *new[:-2], "9")
    loaded.save_pretrained(tmp_path / "whole")
    assert EmpathicForConditionalGeneration.from_pretrained(tmp_path / "whole").config.audio_feature_layers == [2, 1]


def test_old_configs_have_the_whole_encoder(parts, tmp_path):
    qformer = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    EmpathicForConditionalGeneration.from_parts_pretrained(
        **parts, num_query_tokens=2, num_frames=2, video_qformer_config=qformer, audio_qformer_config=qformer
    ).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("audio_feature_layers") is None
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert EmpathicForConditionalGeneration.from_pretrained(tmp_path).config.audio_feature_layers is None
