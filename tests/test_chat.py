"""Conversations with memory, from Python and in a real terminal process."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LogitsProcessor, TextStreamer

from empathic.chat import ChatSession, Keys, dropped_memories
from empathic.media_empathic import MediaError

GREEDY = {"do_sample": False, "max_new_tokens": 6}
SAMPLED = {"do_sample": True, "max_new_tokens": 6}
TURNS = ["hello there", "how are you", "what did he say", "i am fine thanks"]


@pytest.fixture
def session(model, processor):
    return ChatSession(model.eval(), processor)


@pytest.fixture
def calls(model, monkeypatch):
    """The arguments of each `model.generate` call, and the first token's logits."""
    calls, generate = [], model.generate

    class First(LogitsProcessor):
        def __init__(self, call):
            self.call = call

        def __call__(self, input_ids, scores):
            self.call.setdefault("first", scores[:1].clone())
            return scores

    def spy(**kwargs):
        calls.append(dict(kwargs))
        extra = [*kwargs.pop("logits_processor", []), First(calls[-1])]
        return generate(logits_processor=extra, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    return calls


def whole(processor, messages, turn, **options):
    """The processor's inputs for a whole conversation."""
    return processor.apply_chat_template(
        [*messages, turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def answer(model, processor, inputs, **kwargs):
    output = model.generate(**inputs, **kwargs)
    output = output if isinstance(output, torch.Tensor) else output.sequences
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def user(text, **clips):
    content = [{"type": kind, "path": clip} for kind, clip in clips.items()]
    return {"role": "user", "content": [*content, *([{"type": "text", "text": text}] if text else [])]}


def talk(turns):
    """A history of several turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": TURNS[i % 4]} for i in range(2 * turns)]


def snapshot(session):
    """A copy of all data of a session."""
    prefix = session._memory.prefix
    kept = [] if prefix is None else [t.clone() for layer in prefix.cache.layers for t in (layer.keys, layer.values)]
    tensors = [session.vectors, *session.state.state_dict().values(), *kept]
    return list(session.messages), session.last_turn, [tensor.clone() for tensor in tensors]


def assert_unchanged(session, before):
    messages, cost, tensors = snapshot(session)
    assert (messages, cost) == before[:2] and len(tensors) == len(before[2])
    assert all(torch.equal(one, other) for one, other in zip(tensors, before[2], strict=True))
    assert [thread for thread in threading.enumerate() if thread.name == "reply"] == []


# ------------------------------------------------------------------------------------------- replies with less work


@pytest.mark.parametrize("kwargs", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("system", [None, "the old dog"])
def test_prompts_and_replies_are_those_of_the_whole_conversation(model, processor, clip, calls, kwargs, system):
    session = ChatSession(model.eval(), processor, system=system)
    opening = [] if system is None else [{"role": "system", "content": system}]
    clips = [{}, {"video": clip}, {"audio": clip, "video": clip}, {"audio": clip}, {}]
    for k, (text, media) in enumerate(zip([*TURNS[:3], "", "fine"], clips, strict=True)):
        before = list(session.messages)
        torch.manual_seed(k)
        reply = session.reply(text, **media, **kwargs)
        inputs = whole(processor, [*opening, *before], user(text, **media))
        torch.manual_seed(k)
        assert reply == answer(model, processor, inputs, **kwargs)
        own, other = calls[-2:]
        assert torch.equal(own["input_ids"], inputs["input_ids"])
        assert torch.equal(own["attention_mask"], inputs["attention_mask"])
        assert torch.allclose(own["first"], other["first"], atol=1e-4)
        assert session.last_turn.memory_vectors == 2 * k
        assert session.messages == [*before, {"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        # only the two newest vectors and the positions after them are new
        length = inputs["input_ids"].shape[1]
        tail = length - 1 - max(torch.where(inputs["input_ids"][0] == model.config.memory_token_id)[0], default=-1)
        assert session.last_turn.new_positions <= (tail + 2 if k > 1 else length)
        assert session.last_turn.new_positions + session.last_turn.reused_positions == length
    # Negative control: the memory affects the logits.
    inputs = whole(processor, opening, user("fine"))
    answer(model, processor, inputs, **GREEDY)
    assert not torch.allclose(calls[-1]["first"], own["first"], atol=1e-2)


def test_a_session_equals_a_fresh_one_with_the_same_history(model, processor, session, calls):
    for text in TURNS:
        session.reply(text, **GREEDY)
    fresh = ChatSession(model, processor)
    fresh.remember(*session.messages)
    assert fresh.last_turn is None
    assert torch.allclose(fresh.vectors, session.vectors, atol=1e-5)
    assert fresh.reply("hello", **GREEDY) == session.reply("hello", **GREEDY)
    assert torch.allclose(calls[-1]["first"], calls[-2]["first"], atol=1e-4)
    assert torch.equal(calls[-1]["input_ids"], calls[-2]["input_ids"])
    costs = fresh.last_turn, session.last_turn
    assert costs[0].reused_positions == 0 < costs[1].reused_positions
    assert costs[0].memory_vectors == costs[1].memory_vectors == 8
    assert 0 < costs[1].prefill_seconds < costs[1].seconds


def test_a_turn_costs_the_same_early_and_late(model, processor, session):
    """Count the LLM's positions and the Python function calls instead of measuring time."""
    positions, python_calls = [], 0

    def count(module, args, kwargs):
        positions.append(kwargs["inputs_embeds"].shape[1])

    def profile(frame, event, argument):
        nonlocal python_calls
        python_calls += event == "call"

    model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    seen = {}
    for turns in (3, 100):
        session.remember(*talk(turns - len(session.messages) // 2))
        for _ in range(2):  # the first turn reads the remembered utterances
            positions.clear()
            python_calls = 0
            sys.setprofile(profile)
            session.reply("how are you", **GREEDY, min_new_tokens=6)
            sys.setprofile(None)
        cost = session.last_turn
        assert positions == [cost.new_positions] + [1] * 5
        seen[turns] = cost.new_positions, python_calls, sum(t.numel() for t in session.state.state_dict().values())
    assert seen[3][0] == seen[100][0] and seen[3][2] == seen[100][2]
    assert seen[100][1] <= 1.05 * seen[3][1]
    assert session.last_turn.memory_vectors > 200


def test_the_history_as_text_is_counted(processor, session):
    said = [*talk(2), {"role": "user", "name": "clara", "content": "hello <|im_end|> there"}, talk(1)[1]]
    session.remember(*said)
    session.reply("how are you", **GREEDY)
    session.reply("what did he say", **GREEDY)
    turn = user("what did he say")
    lengths = [
        whole(processor, history, turn, history="text")["input_ids"].shape[1] for history in (session.messages[:-2], [])
    ]
    assert session.last_turn.history_text_tokens == lengths[0] - lengths[1] > 30


COUNTING = (
    "{% if num_memories %}{{ num_memories }} old: {{ memory_placeholder * num_memories }} {% endif %}{{ sentence }}"
)
SHOWING = "{{ messages[-2].content if messages|length > 1 }}{{ memory_placeholder * num_memories }} {{ sentence }}"


@pytest.mark.parametrize("template", [COUNTING, SHOWING])
def test_a_template_that_shows_more_of_the_history(model, base_folder, calls, template):
    from empathic.processing_empathic import EmpathicProcessor

    processor = EmpathicProcessor.from_pretrained(base_folder)
    processor.chat_template = {**processor.chat_template, "default": template}
    session = ChatSession(model.eval(), processor)
    for text in TURNS:
        before = list(session.messages)
        reply = session.reply(text, **GREEDY)
        inputs = whole(processor, before, user(text))
        assert torch.equal(calls[-1]["input_ids"], inputs["input_ids"])
        assert reply == answer(model, processor, inputs, **GREEDY)


def test_a_template_that_has_the_clip_first(model, base_folder, calls):
    """The placeholders are at the same positions but belong to another clip: its keys and values cannot be kept."""
    from empathic.processing_empathic import EmpathicProcessor

    processor = EmpathicProcessor.from_pretrained(base_folder)
    template = "{{ audio_placeholder }}{{ memory_placeholder * num_memories }} {{ sentence }}"
    processor.chat_template = {**processor.chat_template, "default": template}
    session = ChatSession(model.eval(), processor)
    for k, text in enumerate(TURNS):
        audio = {"audio": torch.randn(8000, generator=torch.Generator().manual_seed(k)).numpy(), "sampling_rate": 16000}
        turn = {"role": "user", "content": [{"type": "audio", **audio}, {"type": "text", "text": text}]}
        inputs = whole(processor, session.messages, turn)
        expected = answer(model, processor, inputs, **GREEDY)
        assert session.reply(text, audio=audio, **GREEDY) == expected
        assert torch.allclose(calls[-1]["first"], calls[-2]["first"], atol=1e-4)
        assert session.last_turn.reused_positions == 0


class Streamed(TextStreamer):
    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


@pytest.mark.parametrize(
    ("kwargs", "reuses"),
    [
        ({**GREEDY, "num_beams": 3}, False),
        ({**GREEDY, "num_beams": 3, "num_return_sequences": 2}, False),
        ({**SAMPLED, "num_return_sequences": 2}, False),
        ({**GREEDY, "use_cache": False}, False),
        ({**GREEDY, "cache_implementation": "static"}, False),
        ({**GREEDY, "prompt_lookup_num_tokens": 2}, False),
        ({"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4)}, False),
        ({**GREEDY, "return_dict_in_generate": True}, True),
        ({**GREEDY, "repetition_penalty": 5.0}, True),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_arguments_of_generate(model, processor, session, kwargs, reuses):
    session.remember(*talk(2))
    session.reply("hello", **GREEDY)
    for method in (session.reply, lambda *args, **kw: "".join(session.stream(*args, **kw))):
        inputs = whole(processor, session.messages, user("what did he say"))
        torch.manual_seed(0)
        expected = answer(model, processor, inputs, **kwargs)
        torch.manual_seed(0)
        assert method("what did he say", **kwargs) == expected
        assert (session.last_turn.reused_positions > 0) == reuses
    inputs = whole(processor, session.messages, user("how are you"))
    assert session.reply("how are you", **GREEDY) == answer(model, processor, inputs, **GREEDY)
    assert session.last_turn.reused_positions > 0  # the prefix survived the failed turns


def test_a_language_model_with_sliding_windows(base_folder, processor):
    from empathic.configuration_empathic import EmpathicConfig
    from empathic.modeling_empathic import EmpathicForConditionalGeneration

    config = EmpathicConfig.from_pretrained(base_folder)
    config.text_config.sliding_window = 16
    config.text_config.layer_types = ["sliding_attention"] * config.text_config.num_hidden_layers
    model = EmpathicForConditionalGeneration.from_pretrained(base_folder, config=config).eval()
    session = ChatSession(model, processor)
    for text in TURNS:
        inputs = whole(processor, session.messages, user(text))
        assert session.reply(text, **GREEDY) == answer(model, processor, inputs, **GREEDY)
        assert session.last_turn.reused_positions == 0


def test_a_turn_inside_inference_mode_or_autocast_and_one_outside(model, processor, session):
    with torch.inference_mode():
        session.reply("hello there", **GREEDY)
        assert "".join(session.stream("how are you", **GREEDY)) == session.messages[-1]["content"]
    inputs = whole(processor, session.messages, user("fine"))
    assert session.reply("fine", **GREEDY) == answer(model, processor, inputs, **GREEDY)
    types = []
    model.lm_head.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(session.stream("hello", **GREEDY))
    assert set(types) == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------- pieces of a reply


@pytest.mark.parametrize("kwargs", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_pieces_are_the_reply_and_the_turn_is_remembered(model, processor, session, kwargs):
    streamed = ChatSession(model, processor)
    for k, text in enumerate(TURNS):
        torch.manual_seed(k)
        reply = session.reply(text, **kwargs)
        torch.manual_seed(k)
        own = Streamed(processor.tokenizer)
        pieces = list(streamed.stream(text, **kwargs, streamer=own))
        assert "".join(pieces) == reply == own.text.strip()
        assert len(pieces) > 1 and all(pieces)
    assert streamed.messages == session.messages
    assert torch.equal(streamed.vectors, session.vectors)
    same = ("new_positions", "reused_positions", "memory_vectors", "history_text_tokens")
    assert all(getattr(streamed.last_turn, name) == getattr(session.last_turn, name) for name in same)


class Dictated(LogitsProcessor):
    """Write the given tokens, then the end token; `act` is called before token number `at`."""

    def __init__(self, tokens=None, at=None, act=None):
        self.tokens, self.at, self.act, self.written = tokens, at, act, 0

    def __call__(self, input_ids, scores):
        if self.written == self.at:
            self.act()
        if self.tokens is not None:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.tokens[self.written]] = 0
        self.written += 1
        return scores


@pytest.mark.parametrize("text", ["  h\u00e9llo  \U0001f600 \u65e5\u672c\u8a9e there \n you  ", "\U0001f600", "", " "])
@pytest.mark.parametrize("cut", [0, 1])
def test_pieces_hold_whole_characters(processor, session, text, cut):
    tokens = processor.encode_plain(text)
    tokens = [*(tokens[:-cut] if cut else tokens), processor.tokenizer.eos_token_id]
    assert text.isspace() or not text or len(tokens) > 3  # several tokens per character
    written = processor.decode(tokens, skip_special_tokens=True).strip()
    pieces = list(session.stream("hello", max_new_tokens=99, logits_processor=[Dictated(tokens)]))
    assert "".join(pieces) == written == session.messages[-1]["content"]
    if not cut:
        assert "\ufffd" not in "".join(pieces) and written == text.strip()
    assert all("\ufffd" not in piece for piece in pieces[:-1])


def test_the_first_piece_comes_before_the_reply_is_done(model, session):
    """The generation waits at its fourth token until the first piece has arrived."""
    here = threading.Event()
    forced = Dictated(at=3, act=lambda: here.wait(20) or pytest.fail("no piece came"))
    pieces = session.stream("hello", **GREEDY, min_new_tokens=6, logits_processor=[forced])
    assert next(pieces)
    here.set()
    assert list(pieces)


def test_a_closed_stream_leaves_the_session_as_it_was(model, processor, session, clip):
    session.reply("hello there", **GREEDY)
    session.reply("how are you", video=clip, **GREEDY)
    before, steps = snapshot(session), []
    model.lm_head.register_forward_hook(lambda *call: steps.append(1))
    endless = {"do_sample": False, "max_new_tokens": 400, "min_new_tokens": 400}
    pieces = session.stream("what did he say", audio=clip, **endless)
    assert next(pieces)
    pieces.close()
    assert 0 < len(steps) < 300  # generation was stopped early
    assert_unchanged(session, before)
    for _ in session.stream("what did he say", **endless):
        break  # dropped
    assert_unchanged(session, before)
    session.stream("never started")
    assert_unchanged(session, before)
    inputs = whole(processor, session.messages, user("fine"))
    assert session.reply("fine", **GREEDY) == answer(model, processor, inputs, **GREEDY)
    assert session.last_turn.reused_positions > 0


def test_one_turn_at_a_time(session):
    session.reply("hello there", **GREEDY)
    pieces = session.stream("how are you", **GREEDY, min_new_tokens=6)
    next(pieces)
    for other in (
        lambda: session.reply("fine"),
        lambda: list(session.stream("fine")),
        lambda: session.remember(*talk(1)),
    ):
        with pytest.raises(RuntimeError, match="in the middle of a reply"):
            other()
    list(pieces)
    assert len(session.messages) == 4 and session.reply("fine", **GREEDY)


def fail(error):
    raise error


@pytest.mark.parametrize("error", [KeyError("a bad day"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("at", [0, 3])
def test_an_error_in_generation_leaves_the_session_as_it_was(model, processor, session, error, at):
    session.remember(*talk(3))
    session.reply("hello there", **GREEDY)
    before = snapshot(session)
    for method in (session.reply, lambda *args, **kw: list(session.stream(*args, **kw))):
        forced = Dictated(at=at, act=lambda: fail(error))
        with pytest.raises(type(error)):
            method("how are you", **GREEDY, min_new_tokens=6, logits_processor=[forced])
        assert_unchanged(session, before)
    # in the middle of a forward pass: the cache of the first layer has grown, the cache of the second has not
    layer = model.model.language_model.layers[1]
    hook = layer.register_forward_pre_hook(lambda *call: fail(error))
    with pytest.raises(type(error)):
        session.reply("how are you", **GREEDY)
    hook.remove()
    assert_unchanged(session, before)
    inputs = whole(processor, session.messages, user("fine"))
    assert session.reply("fine", **GREEDY) == answer(model, processor, inputs, **GREEDY)
    assert session.last_turn.reused_positions > 0


def test_an_interrupt_while_a_stream_is_read(session):
    """A real signal, which reaches the reading thread and not the generating thread."""
    session.reply("hello there", **GREEDY)
    before = snapshot(session)
    forced = Dictated(at=3, act=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        for _ in session.stream("how are you", max_new_tokens=400, min_new_tokens=400, logits_processor=[forced]):
            pass
    assert forced.written < 300
    assert_unchanged(session, before)
    assert session.reply("fine", **GREEDY)


def test_an_error_in_remembering_leaves_the_session_as_it_was(model, session, monkeypatch):
    session.reply("hello there", **GREEDY)
    before = snapshot(session)
    hook = model.model.memory.projector.register_forward_hook(lambda *call: fail(KeyError("a bad day")))
    with pytest.raises(KeyError):
        session.reply("how are you", **GREEDY)
    hook.remove()
    assert_unchanged(session, before)
    for wrong in ({"role": "system", "content": "a"}, {"role": "user", "content": None}, {"content": "a"}):
        with pytest.raises(ValueError, match="cannot be remembered"):
            session.remember(*talk(1), wrong)
    assert_unchanged(session, before)
    session.remember()
    assert_unchanged(session, before)


def test_a_bad_clip_leaves_the_session_as_it_was(session, tmp_path):
    session.reply("hello there", **GREEDY)
    before = snapshot(session)
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    for method in (session.reply, lambda *args, **kw: list(session.stream(*args, **kw))):
        with pytest.raises(MediaError, match=r"empty\.mp4"):
            method("how are you", video=str(empty), **GREEDY)
        with pytest.raises(ValueError, match="last message is empty"):
            method("")
        assert_unchanged(session, before)


# ------------------------------------------------------------------------------------------------ names, limits, files


def test_names_are_remembered(model, processor, session):
    session.remember({"role": "user", "name": "clara", "content": "hello there"})
    ids = torch.tensor([processor.encode_utterance("clara", "hello there")])
    assert torch.equal(session.vectors, model.get_memory_features(ids))
    assert session.messages == [{"role": "user", "name": "clara", "content": "hello there"}]
    inputs = whole(processor, session.messages, user("fine"))
    assert session.reply("fine", **GREEDY) == answer(model, processor, inputs, **GREEDY)


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_a_limit_on_memory_vectors(model, processor, calls, limit):
    session, block = ChatSession(model.eval(), processor, max_memories=limit), max(1, limit // 4)
    unlimited, rebuilt = ChatSession(model, processor), 0
    for k in range(max(4, limit)):
        before = list(session.messages)
        reply = session.reply(TURNS[k % 4], **GREEDY)
        cost = session.last_turn
        assert min(len(before), limit - block + 1) <= cost.memory_vectors <= limit
        assert (calls[-1]["input_ids"] == model.config.memory_token_id).sum() == cost.memory_vectors
        first = calls[-1]["input_ids"][0].tolist().index(model.config.memory_token_id) if before else 0
        rebuilt += cost.memory_vectors > 2 and cost.reused_positions == first
        fresh = ChatSession(model, processor, max_memories=limit)
        fresh.remember(*before)
        assert fresh.reply(TURNS[k % 4], **GREEDY) == reply
        assert torch.allclose(calls[-1]["first"], calls[-2]["first"], atol=1e-4)
        unlimited.remember(*session.messages[-2:])
        # the newest vectors of a memory that has read all utterances
        assert torch.allclose(session.vectors, unlimited.vectors[-len(session.vectors) :], atol=1e-5)
    assert len(session.messages) == 2 * max(4, limit)
    if limit == 16:
        assert rebuilt == 4  # of the seven turns at the limit
    with pytest.raises(ValueError, match="max_memories is 0"):
        ChatSession(model, processor, max_memories=0)


def test_several_vectors_an_utterance_give_the_replies_of_the_whole_conversation(sized, calls, clip):
    model, processor = sized
    session, said, newest = ChatSession(model, processor), 0, 0
    for k, text in enumerate(["hello there", "what did he say about the old dog of clara", "", "fine"]):
        before, media = list(session.messages), {} if text else {"video": clip}
        reply = session.reply(text, **media, **GREEDY)
        inputs = whole(processor, before, user(text, **media))
        assert reply == answer(model, processor, inputs, **GREEDY)
        assert torch.equal(calls[-2]["input_ids"], inputs["input_ids"])
        assert torch.allclose(calls[-2]["first"], calls[-1]["first"], atol=1e-4)
        assert session.last_turn.memory_vectors == said
        new = [processor.count_memories(m["role"], m["content"]) for m in session.messages[-2:]]
        said += sum(new)
        assert session.vectors.shape[0] == said
        if k > 1:  # only the vectors of the last two utterances, and what comes after them, are new
            tail = inputs["input_ids"].shape[1] - 1 - max(torch.where(inputs["input_ids"][0] == placeholder(model))[0])
            assert session.last_turn.new_positions <= tail + newest
        newest = sum(new)
    assert said > 8


def placeholder(model):
    return model.config.memory_token_id


def test_several_vectors_are_those_of_one_pass_however_a_conversation_is_read(sized):
    """In float64: one pass over the whole text, utterance by utterance, and all utterances at once."""
    model, processor = sized
    model.double()
    messages = [{"role": ("user", "assistant")[i % 2], "content": TURNS[i % 4] * (1 + i % 3)} for i in range(9)]
    ids = [i for m in messages for i in processor.encode_utterance(m["role"], m["content"])]
    expected = model.get_memory_features(torch.tensor([ids]))
    for group in (1, 2, 9):
        session = ChatSession(model, processor)
        for start in range(0, 9, group):
            session.remember(*messages[start : start + group])
        assert torch.allclose(session.vectors, expected, atol=1e-10, rtol=0)
        assert session._memory.ends[-1] == len(expected) == ids.count(processor.mem_token_id)


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_the_limit_counts_vectors_and_drops_whole_utterances(sized, calls, limit):
    model, processor = sized
    session, unlimited = ChatSession(model, processor, max_memories=limit), ChatSession(model, processor)
    for k in range(6):
        before = list(session.messages)
        reply = session.reply(TURNS[k % 4], **GREEDY)
        fresh = ChatSession(model, processor, max_memories=limit)
        fresh.remember(*before)
        assert fresh.reply(TURNS[k % 4], **GREEDY) == reply
        assert torch.allclose(calls[-1]["first"], calls[-2]["first"], atol=1e-4)
        assert (calls[-1]["input_ids"] == placeholder(model)).sum() == session.last_turn.memory_vectors <= limit
        unlimited.remember(*session.messages[-2:])
        kept = session.vectors
        assert torch.allclose(kept, unlimited.vectors[len(unlimited.vectors) - len(kept) :], atol=1e-5)
        counts = [processor.count_memories(m["role"], m["content"]) for m in reversed(session.messages)]
        assert len(kept) in list(itertools.accumulate(counts)) or len(kept) == min(limit, counts[0])


@pytest.mark.parametrize(
    ("ends", "limit", "dropped"),
    [
        ([], 3, 0),
        ([2, 4, 6], None, 0),
        ([2, 4, 6], 6, 0),
        ([2, 4, 6], 5, 2),  # 1 is at least to drop, which divides an utterance
        ([1, 2, 3, 4, 5], 4, 1),
        (list(range(1, 18)), 16, 4),  # a quarter of the limit at a time
        ([2, 31], 20, 15),  # 31 - 20 rounded up to quarters; the newest utterance is divided
        ([2, 30], 29, 7),
        ([2, 30, 31], 20, 30),
    ],
)
def test_the_vectors_that_a_limit_drops(ends, limit, dropped):
    assert dropped_memories(ends, limit) == dropped


def test_a_template_that_shows_the_history_and_an_utterance_over_the_limit(model, base_folder, calls):
    from empathic.processing_empathic import EmpathicProcessor

    processor = EmpathicProcessor.from_pretrained(base_folder)
    processor.chat_template = {**processor.chat_template, "default": SHOWING}
    processor.memory_rate = model.config.memory_rate = 2
    session = ChatSession(model.eval(), processor, max_memories=3)
    session.remember({"role": "user", "content": "what did he say about the old dog of clara"})
    session.reply("hello", **GREEDY)
    assert (calls[-1]["input_ids"] == placeholder(model)).sum() == session.last_turn.memory_vectors == 3


def test_a_saved_conversation_keeps_the_vectors_of_its_utterances(sized, tmp_path):
    model, processor = sized
    session = ChatSession(model, processor, max_memories=9)
    session.remember(*talk(4))
    session.save(str(tmp_path / "conversation"))
    loaded = ChatSession.load(str(tmp_path / "conversation"), model, processor)
    for text in TURNS:
        assert loaded.reply(text, **GREEDY) == session.reply(text, **GREEDY)
        assert torch.equal(loaded.vectors, session.vectors)


def test_a_conversation_that_was_saved_without_the_ends_has_one_vector_an_utterance(model, processor, tmp_path):
    session = ChatSession(model.eval(), processor, max_memories=5)
    session.remember(*talk(4))
    path = str(tmp_path / "conversation")
    session.save(path)
    with safe_open(path, framework="pt") as file:
        record, saved = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del record["ends"]
    save_file(saved, path, metadata=record)
    loaded = ChatSession.load(path, model, processor)
    assert loaded._memory.ends == session._memory.ends == list(range(1, 9))
    assert loaded.reply("hello", **GREEDY) == session.reply("hello", **GREEDY)


def test_a_processor_with_the_code_of_an_older_checkpoint_still_works(model, processor, calls):
    """A checkpoint brings its own code along, which may know neither several vectors nor recalled utterances."""
    import copy

    older = copy.copy(processor)
    del older.memory_tokens, older.memory_rate
    older.encode_utterance = lambda name, text: [
        *processor.encode_plain(f"{name}: {text}", processor.memory_tokenizer), processor.mem_token_id
    ]  # fmt: skip
    older.prepare = lambda messages, task="dialogue", history="memory": processor.prepare(messages, task, history)
    old, new = ChatSession(model.eval(), older), ChatSession(model, processor)
    for text in TURNS[:3]:
        assert old.reply(text, **GREEDY) == new.reply(text, **GREEDY)
        assert torch.equal(calls[-1]["input_ids"], calls[-2]["input_ids"])


def test_a_processor_of_another_memory_is_an_error(sized, processor):
    with pytest.raises(ValueError, match="Load both from the same checkpoint"):
        ChatSession(sized[0], processor)


# --------------------------------------------------------------------------------------- utterances recalled as text


def letters(texts):
    """An embedding for tests: how often each letter occurs."""
    return [[float(text.count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


@pytest.mark.parametrize("embed", [None, letters], ids=["memory vectors", "embed"])
def test_recalled_utterances_are_in_the_prompt_and_nowhere_else(model, processor, calls, embed):
    session, plain = ChatSession(model.eval(), processor, recall=2, embed=embed), ChatSession(model, processor)
    for k, text in enumerate(TURNS):
        before = list(session.messages)
        reply = session.reply(text, **GREEDY)
        places = session.last_turn.recalled
        assert len(places) == min(2, len(before)) and list(places) == sorted(set(places))
        shown = [before[place] for place in places]
        sample = processor.prepare([*before, user(text)], recalled=shown)
        assert calls[-1]["input_ids"][0].tolist() == sample["input_ids"]
        written = processor.decode(sample["input_ids"])
        assert all(f"\n{m['role']}: {m['content']}\n" in written for m in shown)
        assert ("said before:" in written) == (k > 0)
        assert reply == answer(model, processor, processor.pad([sample]), **GREEDY)
        # The memory is that of a session that recalls nothing, bit for bit.
        plain.remember(*session.messages[-2:])
        assert torch.equal(session.vectors, plain.vectors)
        assert all(torch.equal(one, other) for one, other in zip(
            session.state.state_dict().values(), plain.state.state_dict().values(), strict=True
        ))  # fmt: skip
    assert session.last_turn.reused_positions > 0


def test_the_most_similar_utterances_are_recalled(model, processor):
    session = ChatSession(model.eval(), processor, recall=1, embed=letters)
    session.remember(*talk(2))
    session.reply("thanks i am fine", **GREEDY)
    assert session.messages[session.last_turn.recalled[0]]["content"] == "i am fine thanks"
    own = ChatSession(model.eval(), processor, recall=2)
    own.remember(*talk(4))
    own.reply("", audio={"audio": torch.zeros(1600).numpy(), "sampling_rate": 16000}, **GREEDY)
    assert own.last_turn.recalled == ()  # there is no text to compare


def test_a_speakers_name_is_a_part_of_what_is_compared(model, processor, tmp_path):
    session = ChatSession(model.eval(), processor, recall=1, embed=letters)
    session.remember(*[{"role": "user", "name": name, "content": "fine thanks"} for name in ("anna", "bo", "zoe")])
    session.save(str(tmp_path / "conversation"))
    for one in (session, ChatSession.load(str(tmp_path / "conversation"), model, processor, embed=letters)):
        assert [one.similar(f"{name} fine thanks") for name in ("anna", "bo", "zoe")] == [(0,), (1,), (2,)]


def test_a_turn_that_recalls_costs_the_same_early_and_late(model, processor):
    session, positions = ChatSession(model.eval(), processor, recall=3, embed=letters), []
    session.remember(*[{"role": "user", "content": "how are you"}] * 6)
    for more in (0, 900):
        session.remember(*[{"role": "user", "content": "how are you"}] * more)
        session.reply("how are you", **GREEDY)
        session.reply("how are you", **GREEDY)
        positions.append(session.last_turn.new_positions)
    assert positions[0] == positions[1]


def test_what_is_recalled_survives_saving(sized, tmp_path):
    model, processor = sized
    for embed in (None, letters):
        session = ChatSession(model, processor, recall=2, embed=embed)
        session.remember(*talk(4))
        session.save(str(tmp_path / "conversation"))
        loaded = ChatSession.load(str(tmp_path / "conversation"), model, processor, embed=embed)
        for text in TURNS[:2]:
            assert loaded.reply(text, **GREEDY) == session.reply(text, **GREEDY)
            assert loaded.last_turn.recalled == session.last_turn.recalled
    with pytest.raises(ValueError, match="Give the same function as `embed`"):
        ChatSession.load(str(tmp_path / "conversation"), model, processor)
    with pytest.raises(ValueError, match="recall is -1"):
        ChatSession(model, processor, recall=-1)


def test_nearest_keys_are_those_of_all_keys_at_once():
    vectors, query = torch.randn(700, 5), torch.randn(5)
    keys = Keys(centered=True)
    for part in vectors.split(37):
        keys = keys.plus(part)
    assert torch.equal(keys.tensor(), vectors) and {len(block) for block in keys.blocks[:-1]} == {256}
    mean = vectors.mean(0)
    near = torch.cosine_similarity(vectors - mean, query - mean, dim=-1)
    assert keys.nearest(query, 9) == tuple(sorted(near.topk(9).indices.tolist()))
    assert len(keys.nearest(query, 1000)) == 700 and Keys().nearest(query, 3) == ()


def test_a_template_without_a_slot_for_recalled_utterances_is_an_error(model, base_folder):
    from empathic.processing_empathic import EmpathicProcessor

    processor = EmpathicProcessor.from_pretrained(base_folder)
    processor.chat_template = {**processor.chat_template, "default": SHOWING}
    session = ChatSession(model.eval(), processor, recall=1)
    session.reply("hello", **GREEDY)
    with pytest.raises(ValueError, match="no slot `recalled`"):
        session.reply("hello", **GREEDY)


def test_save_and_load_go_on_alike(model, processor, tmp_path, calls):
    session = ChatSession(model.eval(), processor, system="the old dog", max_memories=5)
    session.remember(*talk(3), {"role": "user", "name": "clara", "content": "fine"})
    session.reply("hello there", **GREEDY)
    session.save(str(tmp_path / "conversation"))
    loaded = ChatSession.load(str(tmp_path / "conversation"), model, processor)
    assert loaded.messages == session.messages
    for text in TURNS:
        assert loaded.reply(text, **GREEDY) == session.reply(text, **GREEDY)
        assert torch.equal(calls[-1]["input_ids"], calls[-2]["input_ids"])
        assert torch.equal(loaded.vectors, session.vectors)
        assert loaded.last_turn.history_text_tokens == session.last_turn.history_text_tokens
    assert loaded.last_turn.reused_positions == session.last_turn.reused_positions > 0
    ChatSession(model, processor).save(str(tmp_path / "empty"))
    assert ChatSession.load(str(tmp_path / "empty"), model, processor).reply("hello", **GREEDY)


@pytest.mark.parametrize("limit", [None, 4])
def test_a_fork_goes_its_own_way(model, processor, clip, limit):
    session = ChatSession(model.eval(), processor, system="the old dog", max_memories=limit)
    session.reply("hello there", **GREEDY)
    session.reply("what did he say", video=clip, **GREEDY)
    fork, before, kept = session.fork(), snapshot(session), session._memory
    assert_unchanged(fork, before)
    others = [each.data_ptr() for each in kept.vectors]
    assert [each.data_ptr() for each in fork._memory.vectors] == others  # a fork costs no memory
    said = [fork.reply("how are you", audio=clip, **GREEDY), fork.reply("i am fine thanks", **GREEDY)]
    assert len(fork.messages) == 8 and fork.last_turn != session.last_turn
    assert_unchanged(session, before)
    assert session._memory is kept
    # The original replies the same to the same input: neither session has the other's turns in its keys and values.
    assert [session.reply("how are you", audio=clip, **GREEDY), session.reply("i am fine thanks", **GREEDY)] == said
    assert torch.equal(session.vectors, fork.vectors)
    after = snapshot(fork)
    session.remember(*talk(2))
    assert_unchanged(fork, after)


def test_a_fork_in_the_middle_of_a_reply(session):
    session.remember(*talk(1))
    before = snapshot(session)
    pieces = session.stream("hello there", **GREEDY)
    next(pieces)
    fork = session.fork()
    reply = fork.reply("hello there", **GREEDY)  # the original is busy, the fork is not
    for _ in pieces:
        pass
    assert session.messages[-1]["content"] == reply and before[0] == fork.messages[:2]
    assert session.messages == fork.messages


# --------------------------------------------------------------------------------------------------- in the terminal


def test_talking_in_the_terminal(base_folder, clip, tmp_path):
    saved = tmp_path / "conversation"
    lines = ["hello there", f"/clip {clip}", "how are you", "/audio nowhere.wav", "/hum", f"/save {saved}", "/new"]
    run = subprocess.run(
        [sys.executable, "-m", "empathic.cli", "chat", base_folder, "--max_new_tokens", "4", "--max_memories", "2"],
        input="\n".join([*lines, f"/load {saved}", "fine thanks", "/quit"]),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("bot: ") == 3
    assert "There is no file 'nowhere.wav'" in run.stdout and "There is no command /hum" in run.stdout
    assert saved.exists()


def test_control_c_stops_a_reply_and_keeps_the_session(base_folder, processor, model, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "talkative")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "min_new_tokens": 900}))
    process = subprocess.Popen(
        [sys.executable, "-m", "empathic.cli", "chat", str(folder), "--max_new_tokens", "900"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    try:
        process.stdin.write("hello there\n")
        process.stdin.flush()
        said = ""
        while not said.partition("bot: ")[2].strip():  # its first word, while the rest is being generated
            said += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate("/save conversation\n/quit\n", timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "(stopped" in rest
    assert ChatSession.load(str(tmp_path / "conversation"), model, processor).messages == []


@pytest.mark.parametrize(
    ("written", "reply"),
    [
        ("<think>she is sad</think>\n\ni am so sorry", "i am so sorry"),
        ("[THINK]she is sad[/THINK]i am so sorry", "i am so sorry"),
        ("<think>she is", ""),
        ("<b> i am", "<b> i am"),
    ],
)
def test_a_thought_is_neither_in_the_reply_nor_in_the_memory(model, processor, written, reply):
    ids = processor.tokenizer(written)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": len(ids)}
    whole, streamed = ChatSession(model, processor), ChatSession(model, processor)
    assert whole.reply("hello", logits_processor=[Dictated(ids)], **options) == reply
    assert "".join(streamed.stream("hello", logits_processor=[Dictated(ids)], **options)) == reply
    for session in (whole, streamed):
        assert [message["content"] for message in session.messages] == ["hello", reply]


def test_a_thought_whose_beginning_was_in_the_prompt_stays_as_it_was_shown(model, processor):
    """While it is written, nothing tells it from a reply; what was shown is what is remembered."""
    ids = processor.tokenizer("she is sad</think> sorry")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": len(ids)}
    session = ChatSession(model, processor)
    shown = "".join(session.stream("hello", logits_processor=[Dictated(ids)], **options))
    assert shown == session.messages[1]["content"] == "she is sad</think> sorry"
    assert ChatSession(model, processor).reply("hello", logits_processor=[Dictated(ids)], **options) == "sorry"


def test_a_prompt_is_processed_without_a_reply(model, processor):
    session = ChatSession(model.eval(), processor, recall=1, embed=lambda texts: [[float(len(text))] for text in texts])
    session.remember({"role": "user", "content": "hello there"}, {"role": "assistant", "content": "i am fine"})
    session.warm_up()
    before, twin = snapshot(session), session.fork()
    found = session.prefill("what did he say")
    assert_unchanged(session, before)
    reply = twin.reply("what did he say", do_sample=False, max_new_tokens=1)
    assert processor.decode(found.logits.argmax(-1)) == reply
    cost = twin.last_turn
    assert len(found.ids) == cost.new_positions + cost.reused_positions == found.cache.get_seq_length()
    assert (found.reused_positions, found.recalled) == (cost.reused_positions, cost.recalled) and found.recalled
    assert session.prefill("what did he say").reused_positions == found.reused_positions > 0
