"""What Whisper's encoder gets of a clip: whole windows, or the clip alone."""

import json

import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from empathic.configuration_empathic import EmpathicConfig
from empathic.modeling_empathic import EmpathicForConditionalGeneration, encode_sound

QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZES = dict(num_query_tokens=2, num_frames=2, video_qformer_config=QFORMER, audio_qformer_config=QFORMER)


def encoder(positions, attention="sdpa"):
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=positions, attn_implementation=attention,
    )  # fmt: skip
    return WhisperEncoder(config).double().eval()


def sounds(lengths, time):
    """Mel features (batch, 8, time) with values everywhere, also after the clips, and the clips' masks."""
    features = torch.randn(len(lengths), 8, time, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return features, (torch.arange(time) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_clip_is_encoded_as_by_an_encoder_whose_window_is_the_clip(attention):
    large, small = encoder(40, attention), encoder(15, attention)
    weights = large.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:15]
    small.load_state_dict(weights)
    features, mask = sounds([30], 80)
    with torch.no_grad():
        found = encode_sound(large, features, mask, "clip")
        expected = small(features[..., :30]).last_hidden_state
    assert found.shape == (1, 40, 32)
    assert torch.allclose(found[:, :15], expected) and not found[:, 15:].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_clip_does_not_depend_on_its_batch_or_on_what_follows_it(attention):
    tower = encoder(40, attention)
    features, mask = sounds([30, 61, 0, 80, 1], 80)
    with torch.no_grad():
        together = encode_sound(tower, features, mask, "clip")
        changed = encode_sound(tower, features + 5 * (1 - mask[:, None]), mask, "clip")
        for row in range(5):
            alone = encode_sound(tower, features[row : row + 1], mask[row : row + 1], "clip")
            assert torch.allclose(together[row], alone[0])
    even = torch.tensor([0, 2, 3])  # a clip of an odd number of frames ends within a position
    assert torch.allclose(together[even], changed[even])
    assert together.isfinite().all()


def test_a_clip_of_several_windows_is_encoded_window_by_window():
    tower = encoder(40)
    features, mask = sounds([130, 20], 160)
    with torch.no_grad():
        found = encode_sound(tower, features, mask, "clip")
        first = tower(features[:1, :, :80]).last_hidden_state
        second = encode_sound(tower, features[:1, :, 80:], mask[:1, 80:], "clip")
    assert torch.allclose(found[0, :40], first[0]) and torch.allclose(found[0, 40:], second[0])
    assert found[0, 64].any() and not found[0, 65:].any() and not found[1, 10:].any()


def test_a_full_clip_is_the_same_with_both_windows():
    tower = encoder(40)
    features, mask = sounds([80, 80], 80)
    with torch.no_grad():
        assert torch.allclose(encode_sound(tower, features, mask, "clip"), encode_sound(tower, features, mask, "full"))


def test_the_window_is_in_the_config_and_reaches_the_encoder(parts, clip, processor, tmp_path):
    with pytest.raises(ValueError, match=r"audio_window is 'short'; it is one of full, clip"):
        EmpathicConfig(audio_window="short")
    seen = {}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio", "path": clip}]}],
        tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    for window in ("full", "clip"):
        torch.manual_seed(0)
        model = EmpathicForConditionalGeneration.from_parts_pretrained(
            **parts, **{**SIZES, "num_query_tokens": 4}, audio_window=window
        )
        model.save_pretrained(tmp_path / window)
        assert json.loads((tmp_path / window / "config.json").read_text())["audio_window"] == window
        loaded = EmpathicForConditionalGeneration.from_pretrained(tmp_path / window)
        widths = []
        loaded.model.audio_tower.layers[0].register_forward_hook(
            lambda module, args, output, widths=widths: widths.append(args[0].shape[1])
        )
        with torch.no_grad():
            seen[window] = loaded(**inputs).logits
        heard = -(-int(inputs["input_features_mask"].sum()) // 2)
        assert widths == [loaded.config.audio_config.max_source_positions if window == "full" else heard]
    assert not torch.allclose(seen["full"], seen["clip"])


def test_old_configs_have_full_windows(parts, tmp_path):
    EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["audio_window"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert EmpathicForConditionalGeneration.from_pretrained(tmp_path).config.audio_window == "full"
