"""Replies of several conversations at once: equal to those made alone, and independent of each other."""

import queue
import random
import threading
import time

import pytest
import torch

from empathic.chat import ChatSession
from empathic.emotions import name_emotion
from empathic.serve.engine import QueueFull
from empathic.serve.replies import Done, Failed, Felt, Look, Piece, Progress, Skipped

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

    def full(replies):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(local.decoder, "step", full)
    event = local.finish(local.submit([], "hello"))[1]
    assert (event.status, event.code) == (503, "out_of_memory") and "shorter" in event.message
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


# ------------------------------------------------------------------------------------------- details


@pytest.fixture
def clips(processor, clip):
    return {"audio": processor.sound({"path": clip}), "video": processor.frames({"path": clip})}


def events_of(asked):
    """All events of a request."""
    found = []
    while not found or not isinstance(found[-1], (Done, Failed)):
        found.append(asked.events.get(timeout=60))
    return found


def test_the_stages_of_a_turn_are_told_and_its_emotion_comes_with_the_first_token(engines, model, processor, clips):
    local = engines()
    events = events_of(local.submit([("hello", "there")], "how are you", clips=clips, details=True))
    kinds = [type(event) for event in events]
    assert [event.stage for event in events if isinstance(event, Progress)] == ["listening", "watching", "answering"]
    assert kinds.index(Felt) <= 4 and kinds[-1] is Done and kinds.count(Felt) == 1
    felt = events[kinds.index(Felt)]
    items = {
        kind: {"features": features["features"]} for kind, features in local.front.encode_clips([clips])[0].items()
    }
    assert felt.emotions == pytest.approx(name_emotion(model, processor, "how are you", items))
    for kind in ("audio", "video"):
        assert felt.by_kind[kind] == pytest.approx(name_emotion(model, processor, "", {kind: items[kind]}))
    assert events[-1].felt == felt
    plain = events_of(local.submit([("hello", "there")], "how are you", clips=clips))
    assert {type(event) for event in plain} == {Piece, Done} and plain[-1].memory is None
    assert plain[-1].felt.emotions == felt.emotions and plain[-1].felt.by_kind == {}
    assert [event.text for event in plain[:-1]] == [event.text for event in events if isinstance(event, Piece)]


def test_the_memory_is_told_as_a_session_counts_it(engines, model, processor):
    local, session = engines(max_memories=4), ChatSession(model, processor, max_memories=4)
    history, digests = [], []
    for text in ("hello there", "how are you", "what did he say", "i am fine"):
        asked = local.submit(history, text, details=True)
        reply, memory = "", None
        for event in events_of(asked):
            reply += event.text if isinstance(event, Piece) else ""
            memory = getattr(event, "memory", memory)
        assert session.reply(text, do_sample=False, max_new_tokens=8) == reply
        history.append((text, reply))
        digests.append(memory.digest)
        following = session.fork()
        following.reply("hello", do_sample=False, max_new_tokens=1)
        cost = following.last_turn
        assert (memory.vectors, memory.text_tokens) == (cost.memory_vectors, cost.history_text_tokens)
    assert len(set(digests)) == 4 and all(len(digest) == 32 for digest in digests)
    *_, again = events_of(local.submit(history[:1], history[1][0], details=True))
    assert again.memory.digest == digests[1]


def test_those_who_wait_are_told_how_many_are_before_them(engines):
    local = engines(max_batch=1)
    running = local.submit([], "hello", max_tokens=7000)
    running.events.get(timeout=60)
    waiting = [local.submit([], "there", details=True) for _ in range(3)]
    assert [one.events.get(timeout=60) for one in waiting] == [Progress("waiting", ahead) for ahead in (1, 2, 3)]
    waiting[0].request.cancelled = True
    running.request.cancelled = True
    stages = [[event for event in events_of(one) if isinstance(event, Progress)] for one in waiting[1:]]
    assert all(found[-1].stage == "answering" for found in stages)
    places = [event.ahead for event in stages[1] if event.stage == "waiting"]
    assert places == sorted(places, reverse=True) and places[-1] == 1


def test_a_look_is_answered_alone_and_never_delays_a_reply(engines, model, processor, clips):
    local, seen = engines(max_batch=1), queue.Queue()
    local.engine.look(Look("", clips, seen.put, if_idle=True))
    felt = seen.get(timeout=60)
    items = local.front.encode_clips([clips])[0]
    assert felt.emotions == pytest.approx(name_emotion(model, processor, "", items))
    assert set(felt.by_kind) == {"audio", "video"}
    running = local.submit([], "hello", max_tokens=7000)
    running.events.get(timeout=60)
    assert local.engine.is_busy
    local.engine.look(Look("", clips, seen.put, if_idle=True))
    assert isinstance(seen.get(timeout=60), Skipped)
    local.engine.look(Look("", clips, seen.put))  # one that waits is answered between two tokens
    assert seen.get(timeout=60) == felt and not running.request.cancelled
    running.request.cancelled = True
    local.engine.stop()
    local.engine.look(Look("", clips, seen.put))
    assert seen.get(timeout=60).status == 503


def test_what_was_kept_of_conversations_leaves_after_a_while(engines):
    local = engines(max_seconds=0.2)
    asked = [local.submit([("hello", "there")], f"how are you {number}", details=True) for number in range(3)]
    for one in asked:
        events_of(one)
    deadline = time.monotonic() + 30
    while len(local.front.cache) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(local.front.cache) == local.front.cache.size == 0
    assert local.ask([("hello", "there")], "how are you 0")[0] == of_a_session(
        local.front.model, local.front.processor, [("hello", "there")], "how are you 0"
    )
