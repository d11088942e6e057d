"""Composition with language models of other families: tiny models with random weights, one per family."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor

QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZES = dict(num_query_tokens=4, num_frames=2, video_qformer_config=QFORMER, audio_qformer_config=QFORMER)
COMMON = dict(vocab_size=350, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
SMALL = dict(COMMON, intermediate_size=64, num_key_value_heads=2)
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": dict(SMALL, head_dim=8),
    "gemma": dict(SMALL, head_dim=8),
    "gemma3_text": dict(SMALL, head_dim=8, sliding_window=8),
    "phi3": SMALL,
    "smollm3": SMALL,
    "olmo2": SMALL,
    "falcon": COMMON,
    "gpt_neox": dict(COMMON, intermediate_size=64, max_position_embeddings=512),
    "gpt2": dict(vocab_size=350, n_embd=32, n_layer=2, n_head=4, n_positions=512, pad_token_id=0),
    "opt": dict(COMMON, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=512),
    "stablelm": SMALL,
    "exaone4": SMALL,
    "glm4": dict(SMALL, head_dim=8),
    "ministral": dict(SMALL, head_dim=8),
    "lfm2": SMALL,
    "gpt_oss": dict(SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "qwen3_moe": dict(SMALL, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, parts, tmp_path_factory):
    """A tiny language model of a family, and the four parts with it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **FAMILIES[request.param])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(parts["text"]).save_pretrained(folder)
    return model, {**parts, "text": str(folder)}


def test_text_alone_gives_the_logits_of_the_language_model(family):
    model, parts = family
    composed = EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES)
    ids = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(composed(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)


def test_new_vectors_have_the_size_of_the_vectors_of_words(family):
    _, parts = family
    composed = EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES)
    with torch.no_grad():
        words = composed.get_input_embeddings()(torch.arange(350)).norm(dim=-1).median()
        vectors = composed.get_memory_features(torch.tensor([[5, 6, composed.config.mem_token_id]])).norm(dim=-1)
    assert 0.5 < (vectors / words).item() < 2


def test_it_saves_loads_and_replies(family, tmp_path, clip):
    _, parts = family
    composed = EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES)
    processor = EmpathicProcessor.from_parts_pretrained(**parts, num_query_tokens=4, num_frames=2)
    composed.save_pretrained(tmp_path)
    loaded = EmpathicForConditionalGeneration.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "i am sad"}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    options = dict(do_sample=False, max_new_tokens=12, use_cache=True)
    replies = [one.generate(**inputs, **options)[0].tolist() for one in (composed, loaded)]
    replies.append(composed.generate(**inputs, **{**options, "use_cache": False})[0].tolist())
    assert replies[0] == replies[1] == replies[2]
