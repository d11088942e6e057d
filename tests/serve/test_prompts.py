"""Prompts and memory: the same bits however a conversation came about, at a cost that does not grow."""

import random

import pytest
import torch

from empathic.serve import prompts
from empathic.serve.prefix_cache import PrefixCache
from empathic.serve.prompts import FrontEnd, History, Utterance, all_steps, fill_cache

WORDS = "hello there how are you i am fine thanks what did he say about the old dog of clara".split()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["mamba", "mamba2"])
def any_model(request, model, processor):
    """The model with each kind of memory encoder."""
    if request.param == "mamba2":
        from transformers import Mamba2Config

        from empathic.memory_empathic import MambaCompressor

        size = model.config.memory_config.vocab_size
        config = Mamba2Config(
            vocab_size=size, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=2
        )
        torch.manual_seed(2)
        model.model.memory = MambaCompressor(config, 32, model.config.mem_token_id, 0.2)
    return model.eval()


def sentence(rng, most=12):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def talk(turns, seed=0):
    """A history of some turns, always the same one for a seed."""
    rng = random.Random(seed)
    return History([Utterance(("user", "assistant")[i % 2], None, sentence(rng)) for i in range(2 * turns)])


def front_end(model, processor, max_bytes=10**9, **options):
    return FrontEnd(model, processor, PrefixCache(max_bytes), **options)


def process(front, history, text, clips=None, system=None):
    """Process a prompt; return it and the first token's logits."""
    prompt = all_steps(front.prompt(system, history, text, clips or {}))
    return prompt, all_steps(fill_cache(front.model, prompt, front.cache))


@pytest.mark.parametrize("max_bytes", [10**9, 30_000, 0], ids=["all is kept", "little is kept", "nothing is kept"])
def test_a_conversation_that_continues_has_the_bits_of_one_that_is_rebuilt(any_model, processor, max_bytes):
    rng, history = random.Random(0), History()
    front = front_end(any_model, processor, max_bytes)
    reused = 0
    for _ in range(20):
        text = sentence(rng)
        prompt, logits = process(front, history, text)
        fresh, expected = process(front_end(any_model, processor), History(history.utterances), text)
        assert prompt.ids == fresh.ids and torch.equal(logits, expected)
        reused += prompt.reused
        assert fresh.reused == 0 and front.cache.size <= max_bytes
        history = history.plus(Utterance("user", None, text), Utterance("assistant", None, sentence(rng)))
        all_steps(front.hear(history, len(history) - 2))
    assert (reused > 0) == (max_bytes > 0)


@pytest.mark.parametrize("block", [prompts.MEMORY_BLOCK, 5], ids=["", "mems divided"])
@pytest.mark.parametrize("limit", [None, 9])
def test_several_vectors_an_utterance_have_the_bits_of_a_rebuilt_conversation(sized, monkeypatch, block, limit):
    """Blocks of five tokens divide the <MEM> of an utterance."""
    monkeypatch.setattr(prompts, "MEMORY_BLOCK", block)
    model, processor = sized
    rng, history = random.Random(0), History()
    front = front_end(model, processor, 60_000, max_memories=limit)
    for _ in range(8):
        text = sentence(rng)
        prompt, logits = process(front, history, text)
        fresh, expected = process(front_end(model, processor, max_memories=limit), History(history.utterances), text)
        assert prompt.ids == fresh.ids and torch.equal(logits, expected)
        if limit is None:
            inputs = processor.apply_chat_template(
                [*history.messages(), {"role": "user", "content": text}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            assert inputs["input_ids"][0].tolist() == prompt.ids
            assert torch.allclose(logits, model(**inputs).logits[:, -1], atol=1e-4)
        else:
            assert prompt.ids.count(model.config.memory_token_id) <= limit
        history = history.plus(Utterance("user", None, text), Utterance("assistant", None, sentence(rng)))
        all_steps(front.hear(history, len(history) - 2))


def test_the_logits_are_those_of_the_whole_prompt_in_one_pass(any_model, processor):
    for turns in (0, 1, 7):
        history = talk(turns)
        prompt, logits = process(front_end(any_model, processor), history, "hello there")
        inputs = processor.apply_chat_template(
            [*history.messages(), {"role": "user", "content": "hello there"}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        assert inputs["input_ids"][0].tolist() == prompt.ids
        assert torch.allclose(logits, any_model(**inputs).logits[:, -1], atol=1e-4)
    other = process(front_end(any_model, processor), talk(7, seed=1), "hello there")[1]
    assert not torch.allclose(logits, other, atol=1e-2)  # the memory has an effect


def test_forks_share_what_they_have_in_common_and_do_not_change_each_other(model, processor):
    front = front_end(model.eval(), processor)
    trunk = talk(20)
    process(front, trunk, "hello")
    branches = [trunk.plus(Utterance("user", None, text), Utterance("assistant", None, "fine")) for text in WORDS[:4]]
    earlier = History(trunk.utterances[:30])
    read = front.tokens_read
    found = [process(front, branch, "what did he say")[1] for branch in (*branches, earlier, trunk)]
    assert front.tokens_read - read < 6 * 100  # tokens of what is new, and of a block; the trunk has many more
    for branch, logits in zip((*branches, earlier, trunk), found, strict=True):
        assert torch.equal(logits, process(front_end(model, processor), branch, "what did he say")[1])
    assert len({tuple(logits[0].tolist()) for logits in found}) == 6


def test_a_late_turn_costs_what_an_early_one_costs(model, processor):
    costs = {}
    for turns in (10, 200, 1000):
        front = front_end(model.eval(), processor)
        history = talk(turns)
        process(front, history, "hello there")
        for text in ("how are you", "what did he say"):
            history = history.plus(Utterance("user", None, "hello there"), Utterance("assistant", None, "i am fine"))
            before = front.tokens_read
            all_steps(front.hear(history, len(history) - 2))
            prompt, _ = process(front, history, text)
            new = len(prompt.ids) - prompt.reused
            costs.setdefault(turns, []).append((new, front.tokens_read - before))
        assert len(prompt.ids) > 2 * turns
    bound = len(process(front_end(model, processor), History(), "what did he say")[0].ids)  # a prompt without history
    most_read = prompts.MEMORY_BLOCK + len(processor.encode_utterance("user", "hello there")) * 2
    for turn_costs in costs.values():
        for positions, tokens in turn_costs:
            assert positions <= bound + prompts.PROMPT_BLOCK and tokens <= 2 * most_read


def test_a_limited_memory_gives_the_bits_of_a_rebuilt_one(model, processor):
    front, history = front_end(model.eval(), processor, max_memories=8), History()
    rng = random.Random(3)
    for _ in range(12):
        text = sentence(rng)
        prompt, logits = process(front, history, text)
        fresh = front_end(model, processor, max_memories=8)
        assert torch.equal(logits, process(fresh, History(history.utterances), text)[1])
        assert sum(token == model.config.memory_token_id for token in prompt.ids) <= 8
        history = history.plus(Utterance("user", None, text), Utterance("assistant", None, sentence(rng)))
        all_steps(front.hear(history, len(history) - 2))


def test_first_turns_share_the_system_prompt(model, processor):
    front = front_end(model.eval(), processor)
    assert process(front, History(), "hello")[0].reused == 0
    prompt, logits = process(front, History(), "how are you")
    assert prompt.reused > prompts.PROMPT_BLOCK
    assert torch.equal(logits, process(front_end(model, processor), History(), "how are you")[1])
    assert process(front, History(), "how are you", system="the old dog")[0].reused == 0


@pytest.mark.parametrize("encodes_together", [False, True])
def test_clips_of_several_turns_are_encoded_as_those_of_one(
    model, processor, write_media, grey_frames, tone, tmp_path, encodes_together
):
    read, turns = {"video": processor.frames, "audio": processor.sound}, []
    for number in range(3):
        sound = tone(0.5 + number, frequency=300 + number)
        path = write_media(tmp_path / f"{number}.mp4", frames=grey_frames(4 + number), samples=sound)
        turns.append({kind: read[kind]({"type": kind, "path": str(path)}) for kind in read})
    turns += [{"audio": turns[0]["audio"]}, {}]
    front, passes = front_end(model.eval(), processor), []
    model.model.vision_tower.register_forward_hook(lambda *call: passes.append(len(call[1][0])))
    assert front.encodes_together is False  # on a CPU
    front.encodes_together = encodes_together
    together = front.encode_clips(turns)
    assert passes == ([6] if encodes_together else [2, 2, 2])  # frames
    assert [sorted(items) for items in together] == [["audio", "video"]] * 3 + [["audio"], []]
    for turn, items in zip(turns, together, strict=True):
        [alone] = front.encode_clips([turn])
        for kind in items:
            one, other = items[kind]["features"], alone[kind]["features"]
            assert torch.allclose(one, other, atol=1e-5) if encodes_together else torch.equal(one, other)


def test_a_turn_with_clips_has_the_logits_of_the_clips_themselves(model, processor, clip):
    front = front_end(model.eval(), processor)
    item = {"path": clip}
    turn = {"video": processor.frames({"type": "video", **item}), "audio": processor.sound({"type": "audio", **item})}
    [items] = front.encode_clips([turn])
    history = talk(3)
    for kinds in (("audio", "video"), ("audio",), ("video",)):
        prompt, logits = process(front, history, "hello", {kind: items[kind] for kind in kinds})
        content = [*({"type": kind, **item} for kind in kinds), {"type": "text", "text": "hello"}]
        inputs = processor.apply_chat_template(
            [*history.messages(), {"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        assert inputs["input_ids"][0].tolist() == prompt.ids
        assert torch.allclose(logits, model(**inputs).logits[:, -1], atol=1e-4)


def test_the_name_of_a_speaker_and_the_place_of_a_text_matter():
    def digests(*said):
        return History([Utterance(*one) for one in said]).digests[-1]

    plain = digests(("user", None, "hello"), ("assistant", None, "there"))
    assert plain == digests(("user", None, "hello"), ("assistant", None, "there"))
    assert plain != digests(("user", "clara", "hello"), ("assistant", None, "there"))
    assert plain != digests(("assistant", None, "there"), ("user", None, "hello"))
    assert plain != digests(("user", None, "hellothere"), ("assistant", None, ""))
