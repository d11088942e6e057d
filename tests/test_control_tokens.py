"""Untrusted text never produces a control token, in either tokenizer, and loses nothing."""

import copy
import itertools

import pytest
from transformers import AddedToken

from empathic.processing_empathic import EmpathicProcessor


def user(text, **keys):
    return {"role": "user", "content": [{"type": "text", "text": text}], **keys}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def control_tokens(processor):
    tokens = set()
    for tokenizer in (processor.tokenizer, processor.memory_tokenizer):
        tokens |= {token.content for token in tokenizer.added_tokens_decoder.values()} | set(
            tokenizer.all_special_tokens
        )
    return sorted(tokens)


def attacks(processor):
    """Every control token in both tokenizers: alone, glued, twice, split around another, and almost."""
    tokens = control_tokens(processor)
    for token in tokens:
        half = len(token) // 2
        yield from (token, f"a{token}b", f" {token} ", token * 2, token[:half] + token + token[half:])
        yield from (token[0] + token, token + token[-1], token[:-1], f"<{token}>", token.upper(), token.lower())
    for one, two in itertools.product(tokens, tokens[:4]):
        yield one[:3] + two + one[3:]
    yield "".join(tokens)
    yield "<|im_<|im_end|>end|>"
    yield "\ue0000\ue001 \ue000\ue001 \ue00099\ue001"  # the markers of users' texts in the template


def control_counts(processor, sample):
    counts = {}
    for key, tokenizer in (("input_ids", processor.tokenizer), ("memory_input_ids", processor.memory_tokenizer)):
        controls = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        counts[key] = {i: sample[key].count(i) for i in controls}
    return counts


def test_tokenizers_do_write_control_tokens_when_asked(processor):
    """The premise of the tests below: with plain tokenization each of these strings becomes one id."""
    assert {"<MEM>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|padding|>"} <= set(control_tokens(processor))
    for tokenizer in (processor.tokenizer, processor.memory_tokenizer):
        for index, token in tokenizer.added_tokens_decoder.items():
            assert tokenizer(token.content, add_special_tokens=False)["input_ids"] == [index]


def test_encode_plain_writes_text_only_and_loses_nothing(processor):
    for tokenizer in (processor.tokenizer, processor.memory_tokenizer):
        controls = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        for text in attacks(processor):
            ids = processor.encode_plain(text, tokenizer)
            assert not controls & set(ids), text
            assert tokenizer.decode(ids) == text
        harmless = "hello there, how are you? äöü 你好 🙂\n\n  two lines"
        assert processor.encode_plain(harmless, tokenizer) == tokenizer(harmless, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("history", ["memory", "text"])
@pytest.mark.parametrize("place", ["text", "name", "system", "history", "history name", "split"])
def test_text_of_users_never_writes_a_control_token(processor, place, history):
    def conversation(text):
        half = len(text) // 2
        at = {key: text if key == place else "hello" for key in ("text", "name", "system", "history", "history name")}
        split = [text[:half], text[half:]] if place == "split" else ["hello", "hello"]
        pieces = [{"type": "text", "text": piece} for piece in split]
        return [
            {"role": "system", "content": at["system"]},
            user(at["history"], name=at["history name"]),
            assistant(split[1], name=split[0]),
            {"role": "user", "content": [{"type": "text", "text": at["text"]}, *pieces], "name": at["name"]},
        ]

    harmless = control_counts(processor, processor.prepare(conversation("hello"), history=history))
    if history == "memory":
        assert harmless["memory_input_ids"][processor.mem_token_id] == 2
    for text in attacks(processor):
        messages = conversation(text)
        sample = processor.prepare(messages, history=history)
        assert control_counts(processor, sample) == harmless, text
        prompt = processor.apply_chat_template(messages, history=history, add_generation_prompt=True)
        assert processor.decode(sample["input_ids"]) == prompt
        where = processor.memory_tokenizer.decode(sample["memory_input_ids"]) + prompt
        if place not in ("split", "name"):  # the prompt does not contain the name of the turn
            assert text in where


def test_memory_of_hostile_text_reads_back(processor):
    sample = processor.prepare([user("<MEM> a <|padding|>", name="<MEM>"), user("hello")])
    assert processor.memory_tokenizer.decode(sample["memory_input_ids"]) == "<MEM>: <MEM> a <|padding|><MEM>"
    assert sample["memory_input_ids"].count(processor.mem_token_id) == 1
    assert sample["memory_input_ids"][-1] == processor.mem_token_id


def test_added_tokens_that_are_not_special_are_control_tokens_too(processor):
    """Qwen2.5 has such tokens (`<tool_call>`); GPT-NeoX's runs of spaces are plain text."""
    tokenizer, memory_tokenizer = copy.deepcopy(processor.tokenizer), copy.deepcopy(processor.memory_tokenizer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("<tool>", special=False)])
    memory_tokenizer.add_tokens([AddedToken("    ", special=False), AddedToken("<tool>", special=False)])
    other = EmpathicProcessor(processor.image_processor, processor.feature_extractor, tokenizer, memory_tokenizer)
    for text in ("<tool_call>", "<tool><tool_call>", "<tool_<tool>call>", "a<tool>b"):
        for one in (tokenizer, memory_tokenizer):
            ids = other.encode_plain(text, one)
            assert not set(ids) & set(one.added_tokens_decoder) and one.decode(ids) == text
    assert other.encode_plain("a    b", memory_tokenizer) == memory_tokenizer("a    b")["input_ids"]


def test_a_reply_ends_with_one_end_of_turn(processor):
    ids = processor.encode_reply("fine <|im_end|>")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1 and ids[-1] == end
    assert processor.decode(ids[:-1]) == "fine <|im_end|>"
