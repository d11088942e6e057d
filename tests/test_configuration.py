"""EmpathicConfig: the paper's defaults, values derived from the parts, round trips, and the placeholder tokens."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer, Blip2QFormerConfig, LlamaConfig, Mamba2Config

from empathic.configuration_empathic import EMOTIONS, EmpathicConfig, find_placeholder_tokens

PARTS = (
    "text_config",
    "vision_config",
    "audio_config",
    "memory_config",
    "video_qformer_config",
    "audio_qformer_config",
)


def test_defaults_are_the_papers():
    config = EmpathicConfig()
    assert config.num_query_tokens == 32 and config.num_frames == 8
    text = config.text_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("qwen2", 3584, 28, 152064)
    assert (config.vision_config.hidden_size, config.vision_config.patch_size) == (768, 32)
    assert (config.audio_config.d_model, config.audio_config.encoder_layers) == (384, 4)
    memory = config.memory_config
    assert (memory.model_type, memory.hidden_size, memory.num_hidden_layers) == ("mamba", 1024, 48)
    for qformer, width in ((config.video_qformer_config, 768), (config.audio_qformer_config, 384)):
        assert (qformer.num_hidden_layers, qformer.num_attention_heads) == (6, 8)
        assert qformer.encoder_hidden_size == width
    # Qwen2.5's unused special tokens, and the first free row of Mamba-370M's table
    assert (config.video_token_id, config.audio_token_id, config.memory_token_id) == (151656, 151654, 151655)
    assert config.mem_token_id == 50277


def test_the_seven_emotions_are_the_labels(tiny_config, tmp_path):
    assert EMOTIONS == ("angry", "disgust", "fearful", "happy", "neutral", "sad", "surprise")
    config = tiny_config()
    assert tuple(config.id2label[i] for i in range(7)) == EMOTIONS and len(config.id2label) == 7
    assert config.label2id == {emotion: i for i, emotion in enumerate(EMOTIONS)}
    config.save_pretrained(tmp_path)
    loaded = EmpathicConfig.from_pretrained(tmp_path)
    assert loaded.id2label == config.id2label and loaded.label2id == config.label2id
    two = tiny_config(id2label={0: "good", 1: "bad"})
    assert two.id2label == {0: "good", 1: "bad"} and two.label2id == {"good": 0, "bad": 1}


def test_round_trip_keeps_every_part(tiny_config, tmp_path):
    config = tiny_config(embedding_scale=0.125, num_frames=5)
    config.save_pretrained(tmp_path)
    for loaded in (EmpathicConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EmpathicConfig
        before, after = config.to_dict(), loaded.to_dict()
        for key in ("_name_or_path", "architectures", "transformers_version"):
            before.pop(key, None), after.pop(key, None)
        assert before == after
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["auto_map"] == {
        "AutoConfig": "configuration_empathic.EmpathicConfig",
        "AutoModel": "modeling_empathic.EmpathicModel",
        "AutoModelForMultimodalLM": "modeling_empathic.EmpathicForConditionalGeneration",
        "AutoProcessor": "processing_empathic.EmpathicProcessor",
    }
    assert set(PARTS) <= set(raw)


def test_parts_may_be_other_models(tiny_config, tmp_path):
    llama = LlamaConfig(vocab_size=90, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    mamba2 = Mamba2Config(vocab_size=50, hidden_size=32, num_heads=4, head_dim=16, state_size=8, num_hidden_layers=1)
    tiny_config(text_config=llama, memory_config=mamba2).save_pretrained(tmp_path)
    loaded = EmpathicConfig.from_pretrained(tmp_path)
    assert type(loaded.text_config) is LlamaConfig and loaded.text_config.hidden_size == 64
    assert type(loaded.memory_config) is Mamba2Config and loaded.memory_config.head_dim == 16
    assert loaded.get_text_config() is loaded.text_config


@pytest.mark.parametrize("tie", [True, False])
def test_tie_word_embeddings_follows_the_text_model(tiny_config, tie, tmp_path):
    text = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": tie}
    config = tiny_config(text_config=text, tie_word_embeddings=not tie)
    assert config.tie_word_embeddings is tie
    config.save_pretrained(tmp_path)
    assert EmpathicConfig.from_pretrained(tmp_path).tie_word_embeddings is tie


def test_qformers_follow_the_width_of_their_tower(tiny_config):
    config = tiny_config()
    assert config.video_qformer_config.encoder_hidden_size == config.vision_config.hidden_size == 32
    assert config.audio_qformer_config.encoder_hidden_size == config.audio_config.d_model == 48
    given = Blip2QFormerConfig(encoder_hidden_size=48, hidden_size=32, num_attention_heads=2)
    assert tiny_config(audio_qformer_config=given).audio_qformer_config.encoder_hidden_size == 48
    with pytest.raises(ValueError, match=r"audio_qformer_config\.encoder_hidden_size is 32.*48"):
        tiny_config(audio_qformer_config={"encoder_hidden_size": 32})


def test_embedding_scale_defaults_to_the_text_models_initial_one(tiny_config):
    text = {**tiny_config().text_config.to_dict(), "initializer_range": 0.07}
    assert tiny_config(text_config=text).embedding_scale == 0.07
    assert tiny_config(text_config=text, embedding_scale=0.5).embedding_scale == 0.5


def test_one_attention_name_is_spread_over_the_parts_that_have_it(tiny_config):
    def parts(config):
        return [getattr(config, part)._attn_implementation for part in PARTS]

    config = tiny_config()
    config._attn_implementation = "flash_attention_2"
    flash = "flash_attention_2"
    assert config._attn_implementation == flash
    assert parts(config) == [flash, flash, flash, None, "sdpa", "sdpa"]  # neither BLIP-2 nor Mamba has flash attention
    config._attn_implementation = "eager"
    assert parts(config) == ["eager", "eager", "eager", None, "eager", "eager"]
    config._attn_implementation = {"text_config": "sdpa"}  # a dict sets only the parts that it names
    assert parts(config) == ["sdpa", "eager", "eager", None, "eager", "eager"]
    given = tiny_config(attn_implementation="flash_attention_2")
    assert parts(given) == [flash, flash, flash, None, "sdpa", "sdpa"]


def test_placeholders_are_unused_tokens_of_the_text_vocabulary(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts["text"])
    before = len(tokenizer)
    tokens = find_placeholder_tokens(tokenizer)
    assert tokens == {"video": "<|video_pad|>", "audio": "<|vision_pad|>", "memory": "<|image_pad|>"}
    chosen = find_placeholder_tokens(tokenizer, audio="<|quad_start|>")
    assert chosen == {**tokens, "audio": "<|quad_start|>"}
    assert len(tokenizer) == before


def test_missing_placeholders_are_an_error_with_the_mend(parts):
    neox = AutoTokenizer.from_pretrained(parts["memory"])
    with pytest.raises(ValueError, match=r"none of \['<\|video_pad\|>'\].*video_token="):
        find_placeholder_tokens(neox)
    qwen = AutoTokenizer.from_pretrained(parts["text"])
    with pytest.raises(ValueError, match=r"<no such token>.*memory_token="):
        find_placeholder_tokens(qwen, memory="<no such token>")
    with pytest.raises(ValueError, match=r"audio"):  # one token cannot be the placeholder of two modalities
        find_placeholder_tokens(qwen, video="<|quad_end|>", audio="<|quad_end|>")
