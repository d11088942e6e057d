"""Greedy decoding takes the likeliest token, whatever a model's own generation config says, wherever we generate."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from empathic.chat import ChatSession
from empathic.data_prep.counter.generators import CausalGenerator, EmpathicGenerator
from empathic.evaluation.generation import generate_texts
from empathic.evaluation.systems import open_system
from empathic.sampling import PLAIN_DECODING, Sampling, plain_decoding

# A generation config as shipped with chat models, but with a stronger effect.
OWN = dict(do_sample=True, temperature=0.7, top_k=2, repetition_penalty=50.0, no_repeat_ngram_size=1, min_new_tokens=9)
ASKED = [{"role": "user", "content": "how are you"}]
CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
SAMPLE = {"corpus": "c", "split": "test", "dialogue_id": "d", "turn": 1, "reply": "fine", "prompt": ASKED}
SHORT = {"device": "cpu", "max_new_tokens": 12}
# What a generation config may hold that changes no token of a greedy reply: lengths that we always give, values of
# sampling, the model's own token ids, caches, outputs, and faster ways to the same tokens.
NO_EFFECT = set(
    "max_length max_new_tokens early_stopping use_mtp use_cache cache_implementation cache_config max_cache_len "
    "min_p top_h typical_p epsilon_cutoff eta_cutoff length_penalty bad_words_ids suppress_tokens output_attentions "
    "output_hidden_states output_scores output_logits return_dict_in_generate pad_token_id bos_token_id eos_token_id "
    "decoder_start_token_id is_assistant num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold max_matching_ngram_size assistant_early_exit assistant_lookbehind "
    "target_lookbehind "
    "assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config low_memory "
    "diversity_penalty num_beam_groups constraints force_words_ids prefill_chunk_size _from_model_config "
    "transformers_version".split()
)


def test_every_option_of_a_generation_config_is_neutral_or_without_effect():
    assert set(vars(GenerationConfig())) - set(PLAIN_DECODING) <= NO_EFFECT


def test_greedy_replies_of_our_model_do_not_follow_its_generation_config(model, processor):
    def replies():
        generator = EmpathicGenerator(model, processor, sampling=Sampling(12, do_sample=False))
        session = ChatSession(model, processor)
        pieces = "".join(ChatSession(model, processor).stream("how are you", max_new_tokens=12, do_sample=False))
        return (
            generate_texts(model, processor, [ASKED], max_new_tokens=12),
            generator.replies([generator.prompt(ASKED, "sad")], ["a"]),
            session.reply("how are you", max_new_tokens=12, do_sample=False),
            pieces,
        )

    plain = replies()
    model.generation_config.update(**OWN)
    assert replies() == plain and plain[2] == plain[3]
    asked = generate_texts(model, processor, [ASKED], max_new_tokens=12, repetition_penalty=50.0)
    assert asked != plain[0]


@pytest.fixture
def chat_folder(parts, tmp_path):
    """A tiny Qwen2 with a chat template."""
    AutoModelForCausalLM.from_pretrained(parts["text"]).save_pretrained(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(parts["text"])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_greedy_replies_of_a_chat_model_do_not_follow_its_generation_config(chat_folder):
    def replies():
        generator = CausalGenerator(str(chat_folder), sampling=Sampling(12, do_sample=False))
        system = open_system(f"chat:{chat_folder}", **SHORT)
        return system.reply([SAMPLE], [0]), generator.replies([generator.prompt(ASKED, "sad")], ["a"])

    plain = replies()
    ids = open_system(f"chat:{chat_folder}", **SHORT).prompts.encode([ASKED], [12])[0]["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    for _ in range(plain[0][0].extra["tokens"]):  # the likeliest token, step by step
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    own = GenerationConfig.from_pretrained(chat_folder)
    own.update(**OWN)
    own.save_pretrained(chat_folder)
    assert AutoModelForCausalLM.from_pretrained(chat_folder).generation_config.repetition_penalty == 50
    assert replies() == plain
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    count = plain[0][0].extra["tokens"]
    assert plain[0][0].text == tokenizer.decode(ids[0, -count:], skip_special_tokens=True).strip()

    asked = open_system(f"chat:{chat_folder},repetition_penalty=50,no_repeat_ngram_size=1", **SHORT)
    assert asked.settings["repetition_penalty"] == 50 and "own_generation_config" in asked.settings
    assert asked.reply([SAMPLE], [0]) != plain[0]
    with pytest.raises(ValueError, match=r"repetition_penalty is 0\.0; it must be above 0"):
        open_system(f"chat:{chat_folder},repetition_penalty=0", **SHORT)


def test_the_options_of_a_model_that_is_sampled_from_are_recorded(chat_folder):
    own = GenerationConfig(do_sample=True, temperature=0.7, top_k=20)
    own.save_pretrained(chat_folder)
    found = Sampling(9, top_p=0.5).recorded(str(chat_folder))
    assert found == {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_p": 0.5, "top_k": 20}
    assert Sampling(9, do_sample=False).recorded(str(chat_folder))["temperature"] is None
    assert plain_decoding(repetition_penalty=2.0)["repetition_penalty"] == 2.0
