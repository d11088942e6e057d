"""Decoding steps of several conversations at once."""

import copy

import pytest
import torch
from transformers import DynamicCache

from empathic.compat_empathic import CACHE
from empathic.decoding import GrowingCache
from empathic.serve.rows import decode, decode_greedily, decodes_in_batches


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def prompts(model, lengths):
    """A cache of each length, and the next token."""
    caches, tokens = [], []
    for number, length in enumerate(lengths):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        ids = torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(number))
        model.model.language_model(input_ids=ids, use_cache=True, **{CACHE: cache})
        caches.append(cache)
        tokens.append(number + 5)
    return tokens, caches


def run(model, tokens, caches, max_rows, steps=3):
    caches, found = copy.deepcopy(caches), []
    for _ in range(steps):
        logits = decode(model, tokens, caches, max_rows)
        found.append(logits)
        tokens = logits.argmax(-1).tolist()
    return torch.stack(found)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(model, set_threads, threads):
    set_threads(threads)
    model.eval()
    assert decodes_in_batches(model)
    tokens, caches = prompts(model, [3, 40, 17, 8, 1, 25, 60])
    together = run(model, tokens, caches, 16)
    for row in range(len(tokens)):
        assert torch.equal(run(model, tokens[row : row + 1], caches[row : row + 1], 16), together[:, row : row + 1])
    for order in ([4, 2, 6, 0, 1], [6, 5, 4, 3, 2, 1], [3, 0]):
        some = run(model, [tokens[row] for row in order], [caches[row] for row in order], 16)
        assert torch.equal(some, together[:, order])


def test_one_row_at_a_time_is_what_the_language_model_gives(model):
    model.eval()
    tokens, caches = prompts(model, [3, 40, 17])
    one_by_one = run(model, tokens, caches, 1)
    for row, token in enumerate(tokens):
        cache, steps = copy.deepcopy(caches[row]), []
        for _ in range(3):
            hidden = model.model.language_model(input_ids=torch.tensor([[token]]), use_cache=True, **{CACHE: cache})
            steps.append(model.lm_head(hidden.last_hidden_state[:, -1]))
            token = int(steps[-1].argmax())
        assert torch.equal(torch.stack(steps)[:, 0], one_by_one[:, row])
    assert torch.allclose(one_by_one, run(model, tokens, caches, 16), atol=1e-4)


def test_a_step_leaves_the_model_as_it_was_also_after_an_error(model):
    model.eval()
    config = model.model.language_model.config
    before = config._attn_implementation
    tokens, caches = prompts(model, [3, 4])
    decode(model, tokens, caches, 8)
    assert config._attn_implementation == before
    assert [cache.get_seq_length() for cache in caches] == [4, 5]
    with pytest.raises(IndexError):
        decode(model, [10**6, 5], caches, 8)
    with pytest.raises(AttributeError):
        decode(model, tokens, [caches[0], None], 8)
    assert config._attn_implementation == before


def test_a_model_with_other_attention_is_decoded_row_by_row(model):
    model.eval()
    model.model.language_model.config._attn_implementation = "eager"
    assert not decodes_in_batches(model)
    tokens, caches = prompts(model, [3, 9])
    assert torch.equal(run(model, tokens, caches, 8), run(model, tokens, caches, 1))


def test_replies_decoded_together_are_those_of_generate(model):
    model.eval()
    model.generation_config.suppress_tokens = [7, 8]
    prompts = [
        torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(length)) for length in (3, 30, 9)
    ]
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}

    def generated(row):
        return model.generate(input_ids=row, **options)[0, row.shape[1] :].tolist()

    model.generation_config.eos_token_id = [generated(prompts[1])[4], 5]
    expected = [generated(row) for row in prompts]
    assert len({len(reply) for reply in expected}) > 1  # they end at different times
    for rows in ([0, 1, 2], [2], [1, 0]):
        logits, caches = [], []
        for row in rows:
            caches.append(GrowingCache.of(model))
            logits.append(model(input_ids=prompts[row], use_cache=True, **{CACHE: caches[-1]}).logits[:, -1])
        assert decode_greedily(model, torch.cat(logits), caches, 9) == [expected[row] for row in rows]
    model.generation_config.suppress_tokens = expected[0][:1]
    assert expected[0][0] not in decode_greedily(model, logits[-1], [caches[-1]], 9)[0]
