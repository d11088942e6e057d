"""Token after token: the same tokens as `generate`."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from empathic.chat import ChatSession
from empathic.decoding import can_decode, decode_one

TURN = {"role": "user", "content": "what did he say"}


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length])


class Pieces:
    def __init__(self):
        self.put_ids, self.ended = [], False

    def put(self, value):
        self.put_ids += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "repetition_penalty": 1.7, "min_new_tokens": 8},
        {"do_sample": True, "min_p": 0.02, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 6]},
    ],
    ids=str,
)
def test_the_tokens_are_those_of_generate(model, processor, clip, options):
    content = [{"type": "video", "path": clip}, {"type": "text", "text": "hello there"}]
    messages = [TURN, {"role": "assistant", "content": "i am fine"}, {"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = []
    for more in ({}, {"custom_generate": decode_one}):
        torch.manual_seed(3)
        cache = DynamicCache(config=model.config.text_config)
        found.append(model.eval().generate(**inputs, past_key_values=cache, max_new_tokens=12, **options, **more))
        found.append(torch.rand(1))  # as many random numbers were drawn
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert found[0].shape[1] > inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("stops", [{"max_time": 1e-9}, {"eos": True}, {"criterion": True}], ids=str)
def test_the_reply_stops_where_that_of_generate_does(model, processor, monkeypatch, stops):
    options = {"do_sample": False, "max_new_tokens": 12}
    first = generated(model, processor, options, monkeypatch)
    if "eos" in stops:
        options["eos_token_id"] = int(first[4])
    elif "criterion" in stops:
        criterion = AtLength()
        criterion.length = 14
        options["stopping_criteria"] = [criterion]
    else:
        options |= stops
    found, expected = (generated(model, processor, options, monkeypatch, own=own) for own in (True, False))
    assert torch.equal(found, expected) and len(found) <= len(first)


def generated(model, processor, options, monkeypatch, own=True):
    """The tokens of a session's turn."""
    session, calls, generate = ChatSession(model.eval(), processor), [], model.generate

    def spy(**arguments):
        assert "custom_generate" in arguments
        if not own:
            del arguments["custom_generate"]
        calls.append(generate(**arguments))
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", spy)
        session.reply("hello there", **copy.copy(options))
    return calls[0][0]


def test_a_streamer_gets_the_prompt_and_each_token(model, processor):
    session, pieces = ChatSession(model.eval(), processor), Pieces()
    session.reply("hello there", do_sample=False, max_new_tokens=5, streamer=pieces)
    whole = ChatSession(model, processor)
    given = list(whole.stream("hello there", do_sample=False, max_new_tokens=5))
    assert pieces.ended and "".join(given) == session.messages[-1]["content"]
    assert len(pieces.put_ids) == session.last_turn.new_positions + 5


@pytest.mark.parametrize(
    "options",
    [{"return_dict_in_generate": True, "output_scores": True}, {"prefill_chunk_size": 4}, {"stop_strings": ["xyz"]}],
    ids=str,
)
def test_what_it_does_not_do_is_left_to_generate(model, processor, options, monkeypatch):
    assert not can_decode(GenerationConfig(**options)) and can_decode(GenerationConfig())
    session = ChatSession(model.eval(), processor)
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **arguments: seen.append(arguments) or generate(**arguments))
    reply = session.reply("hello there", do_sample=False, max_new_tokens=5, tokenizer=processor.tokenizer, **options)
    assert "custom_generate" not in seen[0]
    assert reply == ChatSession(model, processor).reply("hello there", do_sample=False, max_new_tokens=5)
