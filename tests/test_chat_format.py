"""Chat formats: ChatML, or the chat template of the language model's own tokenizer."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from empathic.chat_format_empathic import CHATML, find_chat_format, find_end_of_turn
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor

QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZES = dict(num_query_tokens=2, num_frames=2, video_qformer_config=QFORMER, audio_qformer_config=QFORMER)
TOKENS = dict(video_token="<v>", audio_token="<a>", memory_token="<m>")

# In the styles of Llama 3, Gemma 2 and Mistral: a system message of its own, none, and turns that must alternate.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|header|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|header|>model\n{% endif %}"
)
DROPS_SYSTEM = HEADERS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")

MESSAGES = [
    {"role": "user", "name": "Ann", "content": "hello <|eot|> there"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "how are you"},
]


@pytest.fixture
def text(parts, tmp_path):
    """A function (chat template) that makes a language model whose tokenizer does not know ChatML."""

    def make(chat_template):
        tokenizer = AutoTokenizer.from_pretrained(parts["memory"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|header|>", "<|eot|>", "<v>", "<a>", "<m>"]})
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.chat_template = chat_template
        model = AutoModelForCausalLM.from_pretrained(parts["text"])
        assert len(tokenizer) <= model.config.vocab_size
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return {**parts, "text": str(tmp_path)}

    return make


def prompt_of(processor, **options):
    return processor.apply_chat_template(MESSAGES, add_generation_prompt=True, **options)


def test_the_tokenizers_own_chat_template_writes_every_task(text):
    processor = EmpathicProcessor.from_parts_pretrained(**text(HEADERS), num_query_tokens=2, **TOKENS)
    bos = processor.tokenizer.bos_token
    prompt = prompt_of(processor)
    assert prompt.startswith(f"{bos}<|header|>system\nReply to the sentence.") and prompt.count(bos) == 1
    assert prompt.endswith("<|eot|><|header|>user\nmemory:\n<m><m>\nsentence:\nhow are you<|eot|><|header|>assistant\n")
    assert "im_start" not in prompt
    shown = prompt_of(processor, history="text")
    assert "<|header|>user\nAnn: hello <|eot|> there<|eot|><|header|>assistant\ngood day<|eot|>" in shown
    assert "memory:\n<m><m><m>" in processor.apply_chat_template(MESSAGES, task="memory")
    assert "feeling:\nsad" in prompt_of(processor, task="counter", emotion="sad")
    assert "emotion" in prompt_of(processor, task="emotion")


def test_control_tokens_are_single_tokens_and_texts_cannot_write_them(text):
    processor = EmpathicProcessor.from_parts_pretrained(**text(HEADERS), num_query_tokens=2, **TOKENS)
    ids = processor.prepare(MESSAGES, history="text")["input_ids"]
    count = {token: ids.count(processor.tokenizer.convert_tokens_to_ids(token)) for token in ("<|header|>", "<|eot|>")}
    assert count == {"<|header|>": 5, "<|eot|>": 4}


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_system_messages_gets_them_in_the_first_user_message(text, template):
    processor = EmpathicProcessor.from_parts_pretrained(**text(template), num_query_tokens=2, **TOKENS)
    prompt = prompt_of(processor, history="text")
    first = prompt.split("<|header|>")[1]
    assert first.startswith("user\nReply to the sentence.") and "\n\nAnn: hello <|eot|> there" in first
    assert prompt.count("<|header|>") == 4
    assert "you are a dog" in processor.apply_chat_template(
        [{"role": "system", "content": "you are a dog"}, *MESSAGES], history="text"
    )


def test_replies_end_as_the_template_ends_them(text):
    parts = text(HEADERS)
    processor = EmpathicProcessor.from_parts_pretrained(**parts, num_query_tokens=2, **TOKENS)
    model = EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES, **TOKENS)
    end = processor.tokenizer.convert_tokens_to_ids("<|eot|>")
    assert processor.encode_reply("yes")[-1] == end != processor.tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    assert end in (ends if isinstance(ends, list) else [ends])


def test_it_travels_with_the_processor(text, tmp_path):
    processor = EmpathicProcessor.from_parts_pretrained(**text(NO_SYSTEM), num_query_tokens=2, **TOKENS)
    processor.save_pretrained(tmp_path / "saved")
    loaded = EmpathicProcessor.from_pretrained(tmp_path / "saved")
    for history in ("memory", "text"):
        assert prompt_of(loaded, history=history) == prompt_of(processor, history=history)
    assert loaded.encode_reply("yes") == processor.encode_reply("yes")


def test_chatml_is_used_where_the_vocabulary_has_it(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts["text"])
    tokenizer.chat_template = HEADERS
    assert find_chat_format(tokenizer) == CHATML
    assert find_end_of_turn(tokenizer, CHATML) == "<|im_end|>"


def test_a_model_without_any_chat_format_is_an_error_with_the_remedy(text):
    parts = text(None)
    for make in (
        lambda **more: EmpathicProcessor.from_parts_pretrained(**parts, num_query_tokens=2, **TOKENS, **more),
        lambda **more: EmpathicForConditionalGeneration.from_parts_pretrained(**parts, **SIZES, **TOKENS, **more),
    ):
        with pytest.raises(ValueError, match=r"no chat template.*<\|im_start\|>.*chat_template="):
            make()
        with pytest.raises(ValueError, match=r"leaves out a part.*chat_template="):
            make(chat_template="{{ messages[-1].content }}")
        make(chat_template=HEADERS)
