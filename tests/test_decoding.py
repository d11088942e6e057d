"""Token after token: the same tokens as `generate`."""

import copy
from threading import Barrier, Thread

import pytest
import torch
from transformers import AutoConfig, DynamicCache, GenerationConfig, StoppingCriteria

from empathic.chat import ChatSession
from empathic.compat_empathic import CACHE
from empathic.decoding import GrowingCache, can_decode, decode_one, fork

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


def process(model, cache, ids):
    """Run the language model over positions after those of a cache."""
    states = model.model.language_model(input_ids=torch.tensor([ids]), use_cache=True, **{CACHE: cache})
    return states.last_hidden_state


def tensors_of(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_same(cache, other):
    assert cache.get_seq_length() == other.get_seq_length()
    assert all(torch.equal(one, two) for one, two in zip(tensors_of(cache), tensors_of(other), strict=True))


@torch.no_grad()
def test_a_growing_cache_is_a_dynamic_one_that_does_not_copy(model):
    caches = [GrowingCache.of(model.eval()), DynamicCache(config=model.config.text_config)]
    assert caches[0].can_be_cut
    for ids in ([5, 6, 7], [8] * 30, [9]):
        assert torch.equal(*(process(model, cache, ids) for cache in caches))
    states = [[], []]
    places = set()
    for step in range(120):
        for cache, kept in zip(caches, states, strict=True):
            kept.append(process(model, cache, [step]))
        places.add(caches[0].layers[0].keys.data_ptr())
    assert torch.equal(torch.cat(states[0]), torch.cat(states[1]))
    assert_same(*caches)
    assert len(places) <= 5  # room for 32 more positions each time; a dynamic cache moves 120 times
    for cache in caches:
        cache.crop(-7)
        cache.reorder_cache(torch.tensor([0, 0]))
        cache.batch_select_indices(torch.tensor([1]))
        process(model, cache, [4, 5])
    assert_same(*caches)
    for cache in caches:
        cache.reset()
        process(model, cache, [4, 5])
    assert_same(*caches)


def test_the_spare_room_of_a_long_cache_is_an_eighth_of_it():
    layer = GrowingCache(AutoConfig.for_model("llama", num_hidden_layers=1)).layers[0]
    part, places = torch.zeros(1, 1, 1, 2), []
    with torch.no_grad():
        for _ in range(4000):
            keys, _ = layer.update(part, part)
            places.append(keys.data_ptr())
            assert keys.untyped_storage().nbytes() // 8 <= keys.shape[-2] * 9 / 8 + 33
    assert len(set(places)) < 60


@torch.no_grad()
def test_parts_of_a_growing_cache_share_what_they_have_and_nothing_else(model):
    whole = GrowingCache.of(model.eval())
    process(model, whole, [5, 6, 7, 8])
    same, shorter, none = fork(whole, 4), fork(whole, 2), fork(whole, 0)
    assert same.layers[0].keys.data_ptr() == whole.layers[0].keys.data_ptr() == shorter.layers[0].keys.data_ptr()
    given = {whole: [5, 6, 7, 8], same: [5, 6, 7, 8], shorter: [5, 6], none: []}
    for cache, more in ((same, [1]), (whole, [2]), (shorter, [3, 4]), (same, [9]), (none, [7]), (whole, [3])):
        process(model, cache, more)
        given[cache] = given[cache] + more
    for cache, ids in given.items():
        fresh = DynamicCache(config=model.config.text_config)
        process(model, fresh, ids)
        assert cache.get_seq_length() == len(ids)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tensors_of(cache), tensors_of(fresh), strict=True))


def test_a_growing_cache_goes_on_outside_of_inference_mode_and_with_gradients(model):
    cache, other = GrowingCache.of(model.eval()), DynamicCache(config=model.config.text_config)
    for kept in (cache, other):
        with torch.inference_mode():
            process(model, kept, [5, 6])
        with torch.no_grad():
            process(model, kept, [7])
            process(model, kept, [8])
        with torch.inference_mode():
            process(model, kept, [9])
    assert_same(cache, other)
    fresh = GrowingCache.of(model)
    process(model, fresh, [5, 6])
    process(model, fresh, [7]).sum().backward()
    assert model.model.language_model.embed_tokens.weight.grad[5].abs().sum() > 0


def test_parts_of_a_growing_cache_grow_in_threads():
    start = GrowingCache(AutoConfig.for_model("llama", num_hidden_layers=1))
    with torch.no_grad():
        start.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    threads, barrier, found = 4, Barrier(4), {}

    @torch.no_grad()
    def grow(number):
        for turn in range(50):
            cache = fork(start, 3)
            barrier.wait()
            part = torch.full((1, 1, 1, 2), float(number))
            for _ in range(4):
                keys, values = cache.update(part, part, 0)
            found[number, turn] = torch.cat([keys, values]).clone()

    running = [Thread(target=grow, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(found) == 200
    assert all((keys[:, :, 3:] == number).all() for (number, _), keys in found.items())
