"""Replies of several conversations at once: equal to those made alone, and independent of each other."""

import random
import threading
import time

import pytest

from empathic.chat import ChatSession
from empathic.serve.engine import QueueFull
from empathic.serve.replies import Done, Failed, Piece

WORDS = "hello there how are you i am fine thanks what did he say about the old dog of clara".split()


def conversations(count, seed=0):
    """Histories of different lengths, each with a turn."""
    rng = random.Random(seed)

    def sentence():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))

    return [([(sentence(), sentence()) for _ in range(number % 7)], sentence()) for number in range(count)]


def of_a_session(model, processor, history, text, **options):
    """The reply of a fresh `ChatSession` that is given the whole history."""
    session = ChatSession(model, processor)
    roles = ("user", "assistant")
    session.remember(*({"role": roles[i % 2], "content": t} for i, t in enumerate(sum(history, ()))))
    return session.reply(text, do_sample=False, max_new_tokens=8, **options)


def test_sixteen_replies_at_once_are_those_made_alone_and_those_of_fresh_sessions(engines, model, processor):
    talks = conversations(16)
    local = engines(max_batch=16)
    asked = [local.submit(*talk) for talk in talks]
    together = [local.finish(one)[0] for one in asked]
    few = engines(max_batch=3)
    asked = [few.submit(*talk) for talk in talks]
    assert [few.finish(one)[0] for one in asked] == together
    for options in ({"max_batch": 16}, {"max_batch": 1}):
        alone = engines(**options)
        assert [alone.ask(*talk)[0] for talk in talks] == together
    alone.engine.stop()
    assert [of_a_session(model, processor, *talk) for talk in talks] == together
    assert len(set(together)) > 8


def test_interleaved_conversations_never_mix(engines, model, processor):
    local = engines(max_batch=4)
    talks = [[] for _ in range(5)]
    reused = 0
    for turn in range(4):
        texts = [f"{WORDS[(3 * number + turn) % len(WORDS)]} dog" for number in range(5)]
        asked = [local.submit(history, text) for history, text in zip(talks, texts, strict=True)]
        for history, text, one in zip(talks, texts, asked, strict=True):
            reply, done = local.finish(one)
            history.append((text, reply))
            reused += done.cached_tokens
    local.engine.stop()
    assert reused > 0
    for history in talks:
        for turn in range(4):
            assert of_a_session(model, processor, history[:turn], history[turn][0]) == history[turn][1]


def test_forks_and_evictions_do_not_change_a_reply(engines):
    talks = conversations(12, seed=1)
    trunk = [("hello there", "how are you")] * 9
    forks = [([*trunk[:cut], (f"{WORDS[cut]}", "fine")], "what did he say") for cut in (9, 4, 9, 0, 7, 9)]
    replies = {}
    for max_bytes in (10**8, 60_000, 0):
        local = engines(max_batch=4, max_bytes=max_bytes)
        replies[max_bytes] = [local.ask(*talk)[0] for talk in (*forks, *talks, *forks)]
        assert local.front.cache.size <= max_bytes
        assert (local.front.cache.evictions > 0) == (max_bytes == 60_000)
    assert replies[10**8] == replies[60_000] == replies[0]
    assert replies[0][:6] == replies[0][-6:]


def test_a_thousand_short_conversations_stay_within_the_limit(engines):
    limit = 300_000
    local = engines(max_batch=8, max_bytes=limit, max_queue=2000)
    asked = [local.submit([], f"{number} hello", max_tokens=1) for number in range(1000)]
    largest = 0
    for one in asked:
        assert isinstance(local.finish(one)[1], Done)
        largest = max(largest, local.front.cache.size)
    assert 0 < largest <= limit and local.front.cache.evictions > 500
    local.ask([], "hello")
    assert len(local.engine._tasks) <= 1 and not local.engine._replies and not local.engine._beginning


def test_a_reply_joins_and_leaves_while_others_go_on(engines):
    local = engines(max_batch=4)
    order, lock = [], threading.Lock()

    def note(name):
        def emit(event):
            with lock:
                order.append((name, type(event).__name__))

        return emit

    long = local.submit([], "hello", max_tokens=400, emit=note("long"))
    while not order:
        time.sleep(0.001)
    short = local.ask([], "there", max_tokens=3)
    with lock:
        order.append(("short", type(short[1]).__name__))
    while ("long", "Done") not in order and ("long", "Failed") not in order:
        time.sleep(0.005)
    place = order.index(("short", "Done"))
    assert ("long", "Piece") in order[place + 1 :] and ("long", "Done") in order[place + 1 :]
    assert long.request.cancelled is False


def test_a_cancelled_reply_stops_and_frees_its_place(engines):
    local = engines(max_batch=1)
    endless = local.submit([], "hello", max_tokens=7000)
    assert isinstance(endless.events.get(timeout=60), Piece)
    waiting = local.submit([], "there", max_tokens=7000)
    waiting.request.cancelled = True
    endless.request.cancelled = True
    before = time.monotonic()
    assert isinstance(local.ask([], "how are you")[1], Done)
    assert time.monotonic() - before < 30
    assert not local.engine._replies and waiting.events.empty()
    count = endless.events.qsize()
    time.sleep(0.05)
    assert endless.events.qsize() == count  # nothing more comes


def test_a_full_queue_refuses(engines):
    local = engines(max_batch=1, max_queue=2)
    running = local.submit([], "hello", max_tokens=7000)
    running.events.get(timeout=60)
    waiting = [local.submit([], "there") for _ in range(2)]
    assert local.engine.is_full and local.engine.queue_length == 2
    with pytest.raises(QueueFull):
        local.submit([], "there")
    assert local.engine.seconds_to_wait() > 0
    running.request.cancelled = True
    assert all(isinstance(local.finish(one)[1], Done) for one in waiting)


def test_an_error_ends_one_reply_and_not_the_server(engines, monkeypatch):
    local = engines(max_batch=4)
    expected = local.ask([], "hello")[0]
    plain = local.front.prompt

    def broken(system, history, text, clips):
        if text == "break":
            raise RuntimeError("broken")
        return (yield from plain(system, history, text, clips))

    monkeypatch.setattr(local.front, "prompt", broken)
    bad, good = local.submit([], "break"), local.submit([], "hello")
    event = local.finish(bad)[1]
    assert isinstance(event, Failed) and event.status == 500 and "broken" not in event.message
    assert local.finish(good)[0] == expected
    monkeypatch.setattr(local.decoder, "step", lambda replies: 1 / 0)
    assert local.finish(local.submit([], "hello"))[1].status == 500
    monkeypatch.undo()
    assert local.ask([], "hello")[0] == expected


def test_a_prompt_over_the_models_limit_is_refused_and_a_reply_ends_at_it(engines):
    local = engines()
    size = local.ask([], "hello")[1].prompt_tokens
    local.engine.max_positions = size + 5
    _, done = local.ask([], "hello", max_tokens=100)
    assert done.reason == "length" and done.completion_tokens == 5
    local.engine.max_positions = size
    event = local.ask([], "hello")[1]
    assert (event.status, event.code) == (400, "context_length_exceeded")


def test_a_stop_ends_those_who_run_and_those_who_wait(engines):
    local = engines(max_batch=1)
    running = local.submit([], "hello", max_tokens=7000)
    running.events.get(timeout=60)
    waiting = local.submit([], "there")
    local.engine.stop()
    events = [local.finish(one)[1] for one in (running, waiting)]
    assert [event.status for event in events] == [503, 503]
    assert local.ask([], "hello")[1].status == 503


def test_a_long_history_holds_no_short_request_up(engines):
    local = engines(max_batch=2)
    order, both = [], threading.Event()

    def emit(name):
        def note(event):
            if isinstance(event, (Done, Failed)):
                order.append((name, type(event)))
                if len(order) == 2:
                    both.set()

        return note

    local.submit([("hello there how are you", "i am fine thanks")] * 150, "hello", emit("long"), max_tokens=1)
    local.submit([], "hello", emit("short"), max_tokens=1)
    assert both.wait(60) and order == [("short", Done), ("long", Done)]


def test_a_long_history_is_read_between_the_tokens_of_other_replies(engines, monkeypatch):
    local = engines(max_batch=2)
    order = []
    step = local.decoder.step
    monkeypatch.setattr(local.decoder, "step", lambda replies: (order.append("token"), step(replies))[1])
    append = local.front.model.append_to_memory
    monkeypatch.setattr(
        local.front.model, "append_to_memory", lambda *given: (order.append("block"), append(*given))[1]
    )
    running = local.submit([], "hello", max_tokens=7000)
    running.events.get(timeout=60)
    order.clear()
    local.ask([("hello there how are you", "i am fine thanks")] * 100, "hello", max_tokens=1)
    running.request.cancelled = True
    first, last = order.index("block"), len(order) - order[::-1].index("block")
    assert order.count("block") > 20 and order[first:last].count("token") > order.count("block") / 8
