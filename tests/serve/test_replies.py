"""How a reply ends, and what of it is handed out."""

import random

import pytest
import torch
from transformers import GenerationConfig

from empathic.serve.prompts import History, Prompt, Utterance
from empathic.serve.replies import Options, Reply, Request, StopStrings
from empathic.thoughts import WrittenDecoder


def handed_out(stop, pieces):
    stops = StopStrings(stop)
    out = [stops.add(piece) for piece in pieces]
    return [*out, stops.add("", ends=True)], stops


def test_text_that_may_begin_a_stop_string_is_held_back():
    out, stops = handed_out(["<end>"], ["a <", "en", "x <e", "nd> more", "more"])
    assert out == ["a ", "", "<enx ", "", "", ""] and stops.found and stops.sent == "a <enx "
    out, stops = handed_out(["<end>"], ["a <en"])
    assert out == ["a ", "<en"] and not stops.found


@pytest.mark.parametrize("seed", range(20))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("ab ", k=60))
    stop = ["".join(rng.choices("ab ", k=rng.randint(2, 5))) for _ in range(rng.randint(1, 4))]
    pieces, rest = [], text
    while rest:
        cut = rng.randint(1, 7)
        pieces, rest = [*pieces, rest[:cut]], rest[cut:]
    out, stops = handed_out(stop, pieces)
    # Of two stop strings, the one that is complete first ends the text.
    complete = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    assert stops.found == (complete is not None)
    assert text.startswith(stops.sent) and "".join(out) == stops.sent
    assert not any(s in stops.sent for s in stop)
    if complete is None:
        assert stops.sent == text
    else:
        assert any(text[len(stops.sent) :].startswith(s) for s in stop)


def reply_of(processor, emitted, most=8, config=None, **options):
    request = Request(None, History(), Utterance("user", None, "a"), {}, Options(**options), emitted.append)
    config = config or GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id)
    return Reply(request, Prompt([1], torch.empty(0)), WrittenDecoder(processor.tokenizer), config, most)


def write(reply, tokens, vocabulary=400, logit=20.0):
    """Let a reply choose these tokens, one after the other, until it ends."""
    for token in tokens:
        logits = torch.zeros(1, vocabulary)
        logits[0, token] = logit
        reply.choose(logits)
        if reply.reason:
            break


def test_a_reply_ends_at_its_end_token_its_length_or_a_stop_string(processor):
    tokens = processor.tokenizer("hello there how are you", add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.eos_token_id
    for given, most, stop, text, reason in (
        ([*tokens, end, *tokens], 99, (), "hello there how are you", "stop"),
        (tokens, len(tokens) - 1, (), "hello there how are", "length"),
        (tokens, 99, (" how",), "hello there", "stop"),
    ):
        emitted = []
        reply = reply_of(processor, emitted, most, temperature=0, stop=stop)
        write(reply, given)
        assert ("".join(piece.text for piece in emitted), reply.reason) == (text, reason)
        assert reply.stops.sent == text


def test_suppressed_tokens_are_never_chosen_and_seeds_repeat_a_sampled_reply(processor):
    config = GenerationConfig(eos_token_id=0, suppress_tokens=[7], do_sample=False, top_k=0)
    reply = reply_of(processor, [], config=config)
    logits = torch.zeros(1, 50)
    logits[0, 7], logits[0, 9] = 9.0, 5.0
    reply.choose(logits)
    assert reply.token == 9
    drawn = []
    for seed in (1, 1, 2):
        reply = reply_of(processor, [], 99, config=config, temperature=1.0, seed=seed)
        for _ in range(30):
            reply.choose(torch.zeros(1, 50))
        drawn.append(reply.text.tokens)
    assert drawn[0] == drawn[1] != drawn[2]
    assert Options().samples(GenerationConfig(do_sample=True)) and not Options().samples(GenerationConfig())
    assert not Options(temperature=0).samples(GenerationConfig(do_sample=True))


def test_every_token_before_the_end_has_its_log_probability(processor):
    tokens = processor.tokenizer("hello there", add_special_tokens=False)["input_ids"]
    emitted = []
    reply = reply_of(processor, emitted, 99, temperature=0, logprobs=3)
    write(reply, [*tokens, processor.tokenizer.eos_token_id], logit=5.0)
    scores = [score for piece in emitted for score in piece.scores]
    assert [score.token for score in scores] == tokens
    assert all(score.top[0] == (score.token, score.logprob) and len(score.top) == 3 for score in scores)
    expected = float(torch.tensor([5.0, *[0.0] * 399]).log_softmax(-1)[0])
    assert all(score.logprob == pytest.approx(expected) for score in scores)
