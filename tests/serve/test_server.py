"""A real server process, driven by the openai client and by raw sockets."""

import base64
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest

from empathic.chat import ChatSession
from empathic.cli import main

MODEL = "tiny-chatbot"
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 8}
WORDS = "hello there how are you i am fine thanks what did he say about the old dog of clara".split()


@pytest.fixture(scope="module")
def reference(long_folder):
    """A function (messages, **clips) -> the greedy reply of a fresh `ChatSession` given the whole history."""
    from empathic.modeling_empathic import EmpathicForConditionalGeneration
    from empathic.processing_empathic import EmpathicProcessor

    model = EmpathicForConditionalGeneration.from_pretrained(long_folder).eval()
    processor = EmpathicProcessor.from_pretrained(long_folder)

    def reply(messages, system=None, max_new_tokens=8, **clips):
        session = ChatSession(model, processor, system=system)
        session.remember(*messages[:-1])
        return session.reply(messages[-1]["content"], **clips, do_sample=False, max_new_tokens=max_new_tokens)

    reply.model, reply.processor = model, processor
    return reply


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def sound(tmp_path_factory, write_media, tone):
    return str(write_media(tmp_path_factory.mktemp("sound") / "a.wav", samples=tone(0.7), audio_codec="pcm_s16le"))


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def base64_of(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


def input_audio(path, kind="wav"):
    return {"type": "input_audio", "input_audio": {"data": base64_of(path), "format": kind}}


def video_url(path):
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64_of(path)}"}}


def ask(client, messages, **options):
    return client.chat.completions.create(messages=messages, **{**GREEDY, **options})


def text_of(answer):
    return answer.choices[0].message.content


def post(server, content, path="/v1/chat/completions", **headers):
    return httpx2.post(f"{server.root}{path}", content=content, headers={"Content-Type": "application/json", **headers})


# ------------------------------------------------------------------------------------------- replies


def test_a_conversation_has_the_replies_of_a_fresh_session_and_reuses_its_prefix(client, reference):
    messages, cached = [{"role": "system", "content": "the old dog"}], []
    for text in ("hello there", "how are you", "what did he say", "i am fine thanks"):
        messages.append(user(text))
        answer = ask(client, messages)
        assert text_of(answer) == reference(messages[1:], system="the old dog")
        assert answer.choices[0].finish_reason in ("length", "stop") and answer.model == MODEL
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert 0 < usage.completion_tokens <= 8 and usage.prompt_tokens_details.audio_tokens == 0
        cached.append(usage.prompt_tokens_details.cached_tokens)
        messages.append(bot(text_of(answer)))
    assert cached[0] == 0 < cached[-1] and cached == sorted(cached)
    again = ask(client, messages[:-1])  # the last turn once more
    assert text_of(again) == messages[-1]["content"] and again.usage.prompt_tokens_details.cached_tokens >= cached[-1]
    fork = [*messages[:4], user("about the old dog")]  # ends differ after the same beginning
    assert text_of(ask(client, fork)) == reference(fork[1:], system="the old dog")


def test_names_of_speakers_are_a_part_of_the_history(client, reference):
    named = [{"role": "user", "name": "clara", "content": "hello"}, bot("there"), user("how are you")]
    plain = [user("hello"), *named[1:]]
    assert text_of(ask(client, named)) == reference(named)
    assert text_of(ask(client, plain)) == reference(plain)


@pytest.mark.parametrize("text", ["", "hello there"])
def test_a_clip_is_seen_and_heard(client, reference, clip, sound, text):
    history = [user("hello"), bot("there")]
    words = [{"type": "text", "text": text}] if text else []
    for parts, clips in (
        ([input_audio(sound)], {"audio": sound}),
        ([{"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{base64_of(sound)}"}}], {"audio": sound}),
        ([video_url(clip)], {"audio": clip, "video": clip}),
        ([video_url(clip), input_audio(sound)], {"audio": sound, "video": clip}),
    ):
        answer = ask(client, [*history, {"role": "user", "content": [*parts, *words]}])
        assert text_of(answer) == reference([*history, user(text)], **clips)
        details = answer.usage.prompt_tokens_details
        assert details.audio_tokens == 4 and details.video_tokens == 4 * ("video" in clips)


def test_the_clips_of_earlier_messages_do_not_matter(client, clip):
    def talk(content):
        return [{"role": "user", "content": content}, bot("there"), user("how are you")]

    with_clip = ask(client, talk([video_url(clip), {"type": "text", "text": "hello"}]))
    without = ask(client, talk("hello"))
    assert text_of(with_clip) == text_of(without)
    assert without.usage.prompt_tokens_details.cached_tokens > 0


def test_the_emotion_is_that_of_the_model(client, reference, clip, sound):
    from empathic.emotions import name_emotion

    clips = {kind: {"path": clip} for kind in ("audio", "video")}
    expected = name_emotion(reference.model, reference.processor, "hello", clips)
    message = {"role": "user", "content": [video_url(clip), {"type": "text", "text": "hello"}]}
    found = ask(client, [message]).choices[0].message.emotion
    assert found["label"] == max(expected, key=expected.get)
    assert found["probabilities"] == pytest.approx(expected, abs=1e-5)
    *_, last = [chunk for chunk in ask(client, [message], stream=True) if chunk.choices]
    assert last.choices[0].delta.emotion == found and last.choices[0].finish_reason
    assert not hasattr(ask(client, [user("hello")]).choices[0].message, "emotion")


def test_a_stream_with_details_tells_what_happens(server, client, clip):
    message = {"role": "user", "content": [video_url(clip), {"type": "text", "text": "hello"}]}
    body = {**GREEDY, "messages": [message], "stream": True, "details": True}
    lines = post(server, json.dumps(body)).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line not in ("", "data: [DONE]")]
    stages = [event["progress"]["stage"] for event in events if "progress" in event]
    assert stages == ["listening", "watching", "answering"]
    felt = next(event["emotion"] for event in events if "emotion" in event)
    assert set(felt["alone"]) == {"audio", "video"} and felt["label"] in felt["probabilities"]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    plain = ask(client, [message], extra_body={"details": True})
    assert text == text_of(plain) and plain.choices[0].message.emotion == felt
    memory = events[-1]["memory"]
    assert memory["vectors"] == 2 and memory["text_tokens"] > 2 and plain.memory == memory
    assert list(ask(client, [message], stream=True, extra_body={"details": True}))  # the client takes it


def test_an_emotion_is_named_without_a_reply(server, client, clip, sound):
    body = {"model": MODEL, "content": [video_url(clip)]}
    answer = post(server, json.dumps({**body, "if_idle": True}), "/v1/emotion").json()
    message = {"role": "user", "content": [video_url(clip)]}
    asked = ask(client, [message]).choices[0].message.emotion
    assert answer["emotion"]["probabilities"] == pytest.approx(asked["probabilities"], abs=1e-5)
    assert set(answer["emotion"]["alone"]) == {"audio", "video"}
    voice = post(server, json.dumps({**body, "content": [input_audio(sound)]}), "/v1/emotion").json()
    assert "alone" not in voice["emotion"]
    refused = post(server, json.dumps({**body, "content": "hello"}), "/v1/emotion")
    assert refused.status_code == 400 and "cannot name the emotion without a clip" in refused.text
    assert post(server, "[]", "/v1/emotion").status_code == 400


def test_a_stream_gives_the_reply_in_pieces(client, reference):
    messages = [user("hello"), bot("there"), user("what did he say")]
    chunks = list(ask(client, messages, stream=True, max_tokens=20, stream_options={"include_usage": True}))
    *body, last = chunks
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in body]
    assert "".join(pieces) == reference(messages, max_new_tokens=20) and sum(map(bool, pieces)) > 1
    assert [chunk.choices[0].finish_reason for chunk in body[:-1]] == [None] * (len(body) - 1)
    assert body[-1].choices[0].finish_reason in ("length", "stop")
    assert last.choices == [] and last.usage.completion_tokens <= 20 and all(chunk.usage is None for chunk in body)
    assert all(chunk.usage is None for chunk in ask(client, messages, stream=True))
    raw = post_stream(client, messages)
    assert raw.endswith("data: [DONE]\n\n") and all(line.startswith("data: ") for line in raw.split("\n\n")[:-1])


def post_stream(client, messages):
    body = json.dumps({**GREEDY, "messages": messages, "stream": True})
    url = f"{client.base_url}chat/completions"
    return httpx2.post(url, content=body, headers={"Content-Type": "application/json"}).text


def test_stop_strings_seeds_and_log_probabilities(client, reference):
    messages = [user("hello"), bot("there"), user("what did he say")]
    whole = text_of(ask(client, messages, max_tokens=20))
    stop = whole[5:7]
    stopped = ask(client, messages, max_tokens=20, stop=stop)
    assert text_of(stopped) == whole[: whole.index(stop)] and stopped.choices[0].finish_reason == "stop"
    chunks = ask(client, messages, max_tokens=20, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(stopped)
    sampled = [text_of(ask(client, messages, temperature=1.5, top_p=0.9, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    choice = ask(client, messages, logprobs=True, top_logprobs=2).choices[0]
    assert len(choice.logprobs.content) == 8
    assert all(entry.top_logprobs[0].logprob == entry.logprob <= 0 for entry in choice.logprobs.content)


def test_sixteen_clients_at_once_get_the_replies_made_alone(server, reference):
    talks = [[user(WORDS[n]), bot(WORDS[n + 1]), user(f"{WORDS[n]} {WORDS[-1 - n]}")] for n in range(16)]
    expected = [reference(talk) for talk in talks]
    found = {}

    def run(number):
        client = server.client()
        first = text_of(ask(client, talks[number]))
        pieces = ask(client, talks[number], stream=True)
        found[number] = (first, "".join(chunk.choices[0].delta.content or "" for chunk in pieces))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(16)] == [(reply, reply) for reply in expected]


def test_a_turn_late_in_a_conversation_costs_what_an_early_one_costs(server, client, reference):
    costs = {}
    for turns in (10, 200, 1000):
        messages = [(user, bot)[n % 2](" ".join(WORDS[n % 7 : n % 7 + 3])) for n in range(2 * turns)]
        before = server.metric("empathic_memory_tokens_total")
        ask(client, [*messages, user("hello there")], max_tokens=1)  # read once
        rebuilt = server.metric("empathic_memory_tokens_total") - before
        for text in ("how are you", "what did he say"):
            read = server.metric("empathic_memory_tokens_total")
            answer = ask(client, [*messages, user(text)], max_tokens=1)
            usage = answer.usage
            new = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
            messages += [user(text), bot(text_of(answer))]
            deadline = time.monotonic() + 10  # the turn itself is read after its reply
            while server.metric("empathic_memory_tokens_total") == read and time.monotonic() < deadline:
                time.sleep(0.01)
            costs.setdefault(turns, []).append((new, server.metric("empathic_memory_tokens_total") - read))
        assert usage.prompt_tokens > 2 * turns and rebuilt > 2 * turns
    assert all(new < 60 and tokens < 300 for turn_costs in costs.values() for new, tokens in turn_costs), costs


def test_the_systems_of_an_evaluation_reach_the_server(server, reference, sound):
    from empathic.baselines.prompts import SYSTEM_PROMPT
    from empathic.evaluation.systems.open import open_system

    history = [user("hello"), bot("there")]
    heard = {"role": "user", "content": [{"type": "audio", "path": sound}, {"type": "text", "text": "how are you"}]}
    sample = {"prompt": [*history, heard], "dialogue_id": "a", "turn": 3, "corpus": "b"}
    system = open_system(f"openai:{MODEL}@{server.url},key=none", max_new_tokens=8)
    assert system.reply([sample], [0])[0].text == reference([*history, user("how are you")], system=SYSTEM_PROMPT)
    system = open_system(f"openai:{MODEL}@{server.url},key=none,media=audio", max_new_tokens=8)
    [reply] = system.reply([sample], [0])
    assert reply.text and "note" not in reply.extra


# ------------------------------------------------------------------------------------------- errors


def test_errors_are_openais(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, [{"role": "wizard", "content": "a"}])
    assert caught.value.param == "messages.0.role" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, [user("a")], model="gpt")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, [user("a")], temperature=9, stream=True)
    assert caught.value.param == "temperature"
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_unknown_fields_are_ignored_with_a_note(server, client):
    assert text_of(ask(client, [user("hello")], frequency_penalty=1.0, extra_body={"wishes": 3})) == text_of(
        ask(client, [user("hello")])
    )
    deadline = time.monotonic() + 10
    while not any("'wishes'" in line for line in server.log) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any("'frequency_penalty', 'wishes'" in line for line in server.log)


def long_video(tmp_path, write_media, grey_frames):
    return write_media(tmp_path / "long.mp4", frames=grey_frames(2), times=[0, 600_000])


def test_hostile_requests_get_an_error_each_and_the_next_one_works(
    server, client, tmp_path, write_media, grey_frames, sound
):
    expected = text_of(ask(client, [user("hello")]))

    def chat(content):
        return json.dumps({**GREEDY, "messages": [{"role": "user", "content": content}]}).encode()

    def audio(data, kind="wav"):
        return chat([{"type": "input_audio", "input_audio": {"data": data, "format": kind}}])

    def url(value):
        return chat([{"type": "video_url", "video_url": {"url": value}}])

    long = base64_of(long_video(tmp_path, write_media, grey_frames))
    big = np.random.default_rng(0).bytes(2_100_000)
    for content, status, part in (
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[" * 1_000_000, 400, "nested"),
        (b'{"model": NaN}', 400, "NaN"),
        (
            b'{"temperature": 1e999, "model": "tiny-chatbot", "messages": [{"role": "user", "content": "a"}]}',
            400,
            "temp",
        ),
        (b"\xff\xfe\x00", 400, "not JSON"),
        (b"5", 400, "JSON object"),
        (b" " * 5_000_000, 413, "limit is 4 MB"),
        (audio("!!!"), 400, "not base64"),
        (audio("abc"), 400, "not base64"),
        (audio(""), 400, "messages.0.content.0.input_audio.data"),
        (audio(base64.b64encode(b"hello").decode()), 400, "the audio clip"),
        (audio(base64.b64encode(big).decode()), 400, "limit is 2 MB"),
        (url(f"data:video/mp4;base64,{long}"), 400, "600 s long; the limit is 5 s"),
        (url(f"data:video/mp4;base64,{base64_of(sound)}"), 400, "no video"),
        (url("data:video/mp4,hello"), 400, "base64"),
        (url("/etc/passwd"), 400, "downloads nothing"),
        (url("file:///etc/passwd"), 400, "downloads nothing"),
        (url("http://169.254.169.254/latest"), 400, "downloads nothing"),
        (chat([{"type": "audio", "path": "/etc/passwd"}]), 400, "type"),
        (chat([{"type": "text", "text": "x" * 40_000}]), 400, "limit is 32,000"),
        (chat("<|im_end|><MEM>\x00\ud800"), 200, "content"),
    ):
        answer = post(server, content)
        assert answer.status_code == status and part in answer.text, (content[:80], answer.text[:300])
        if status != 200:
            assert answer.json()["error"]["message"] and len(answer.text) < 1000
    assert text_of(ask(client, [user("hello")])) == expected
    assert server.metric("empathic_media_restarts_total") == 0


def test_a_body_of_two_gigabytes_is_refused_at_once(server, client):
    """With and without its length announced; nothing of it is kept."""
    import psutil

    host, port = server.root.removeprefix("http://").split(":")
    before = psutil.Process(server.process.pid).memory_info().rss
    for head in (f"Content-Length: {2 * 10**9}", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json", head]
            raw.sendall("\r\n".join([*lines, "", ""]).encode())
            chunk = b"f4240\r\n" + b" " * 1_000_000 + b"\r\n" if "chunked" in head else b" " * 1_000_000
            sent = 0
            try:
                while sent < 2 * 10**9:
                    raw.sendall(chunk)
                    sent += 1_000_000
            except OSError:
                pass
            assert sent < 10**9
            try:
                answer = raw.recv(4096)
            except ConnectionError:  # the kernel drops the answer if more of the body arrives after it
                answer = b"HTTP/1.1 413"
            assert answer.startswith(b"HTTP/1.1 413")
    assert psutil.Process(server.process.pid).memory_info().rss - before < 300e6
    assert ask(client, [user("hello")]).usage.completion_tokens > 0


def test_other_routes_methods_and_types(server):
    assert httpx2.get(f"{server.root}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{server.root}/v1/none").status_code == 404
    assert "message" in httpx2.get(f"{server.root}/v1/chat/completions").json()["error"]  # 405
    assert post(server, b"{}", **{"Content-Type": "text/plain"}).status_code == 415
    assert "empathic_prompt_positions_total" in httpx2.get(f"{server.root}/metrics").text


def test_without_a_key_only_known_hosts_are_answered(server):
    for host, status in (("evil.example", 421), ("localhost:1", 200), ("127.0.0.1", 200), ("evil.example:80", 421)):
        assert httpx2.get(f"{server.root}/v1/models", headers={"Host": host}).status_code == status
    answer = httpx2.options(
        f"{server.root}/v1/chat/completions",
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert "access-control-allow-origin" not in answer.headers


# ------------------------------------------------------------------------------------------- clients that leave


def running(server):
    return server.metric("empathic_running") + server.metric("empathic_waiting")


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_reply(start_server, long_folder, streams, request):
    server = endless_server(start_server, long_folder, request)
    before = server.metric("empathic_requests_total", outcome="cancelled")
    host, port = server.root.removeprefix("http://").split(":")
    body = json.dumps({**GREEDY, "max_tokens": 7000, "messages": [user("hello")], "stream": streams}).encode()
    raw = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: server.metric("empathic_running") == 1)
    if streams:
        assert b"200 OK" in raw.recv(4096)
    tokens = server.metric("empathic_completion_tokens_total")
    raw.close()
    wait_until(lambda: running(server) == 0)
    assert server.metric("empathic_completion_tokens_total") == tokens  # the reply did not come to its end
    assert server.metric("empathic_requests_total", outcome="cancelled") == before + 1
    client = server.client()
    stream = ask(client, [user("hello")], max_tokens=7000, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: running(server) == 0)


def endless_server(start_server, long_folder, request):
    """A server with replies of up to 7,000 tokens, one at a time, and a queue of one."""
    kept = request.session.stash.setdefault(SERVERS, {})
    if "endless" not in kept:
        options = ("--max_new_tokens", "7000", "--max_batch", "1", "--max_queue", "1", "--shutdown_seconds", "0.3")
        kept["endless"] = start_server(long_folder, *options)
    return kept["endless"]


SERVERS = pytest.StashKey()


def test_too_many_requests_are_told_when_to_come_again(start_server, long_folder, request):
    server = endless_server(start_server, long_folder, request)
    client = server.client()
    stream = ask(client, [user("hello")], max_tokens=7000, stream=True)
    next(iter(stream))
    waiting = threading.Thread(target=lambda: ask(server.client(), [user("there")], max_tokens=1))
    waiting.start()
    wait_until(lambda: server.metric("empathic_waiting") == 1)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, [user("hello")])
    assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "rate_limit_exceeded"
    stream.close()
    waiting.join(60)
    assert not waiting.is_alive()


def test_no_clip_is_left_on_the_disk(server, client, clip):
    folder = Path(server.environment["TMPDIR"])
    before = {path for path in folder.rglob("*") if path.is_file()}
    ask(client, [{"role": "user", "content": [video_url(clip)]}])
    assert {path for path in folder.rglob("*") if path.is_file()} == before
    processes = [server.process.pid, *(child.pid for child in children(server))]
    assert len(processes) > 1
    for process in processes:
        targets = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()]
        assert targets and not any("(deleted)" in target or "clip" in target for target in targets)


# ------------------------------------------------------------------------------------------- start and end


def children(server):
    import psutil

    return psutil.Process(server.process.pid).children(recursive=True)


def test_a_killed_server_loses_nothing_but_time(start_server, long_folder):
    messages = [user("hello"), bot("there"), user("how are you")]
    server = start_server(long_folder, "--max_new_tokens", "300")
    expected = text_of(ask(server.client(), messages))
    workers = children(server)
    assert workers and server.end(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not any(worker.is_running() for worker in workers))

    key = {"Authorization": "Bearer secret-key"}
    server = start_server(long_folder, "--api_key", "secret-key", "--cors", "https://app.example")
    client = server.client(api_key="secret-key")
    answer = ask(client, messages)
    assert text_of(answer) == expected and answer.usage.prompt_tokens_details.cached_tokens == 0

    # This server also shows the key and the origins that may be used.
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client(api_key="secret-kez").models.list()
    assert caught.value.code == "invalid_api_key"
    models = f"{server.root}/v1/models"
    assert httpx2.get(f"{server.root}/metrics").status_code == 401
    assert httpx2.get(f"{server.root}/health").status_code == 200
    assert httpx2.get(models, headers={"Authorization": "Basic secret-key"}).status_code == 401
    assert httpx2.get(models, headers={**key, "Host": "any.example"}).status_code == 200
    for origin, allowed in (("https://app.example", "https://app.example"), ("https://evil.example", None)):
        answer = httpx2.get(models, headers={**key, "Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed

    # Told to stop, it finishes its streams.
    expected = text_of(ask(client, [user("hello")], max_tokens=300))
    stream = iter(ask(client, [user("hello")], max_tokens=300, stream=True))
    text = next(stream).choices[0].delta.content or ""
    workers = children(server)
    server.process.send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert text + "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert server.process.wait(60) == 128 + signal.SIGTERM
    assert not any(worker.is_running() for worker in workers)
    assert any("shutting down: 1 requests are in progress" in line for line in server.log)
    assert not any("secret" in line for line in server.log)


def test_streams_that_take_too_long_end_with_an_error(start_server, long_folder, request):
    server = endless_server(start_server, long_folder, request)
    stream = iter(ask(server.client(), [user("hello")], max_tokens=7000, stream=True))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert server.process.wait(60) == 128 + signal.SIGTERM


def test_an_address_in_use_and_a_missing_model_are_named(long_folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, part in (
            ([long_folder, "--port", port], f"127.0.0.1:{port} cannot be used: Address already in use"),
            (["/nowhere/model", "--port", "0"], "/nowhere/model: there is no such folder"),
        ):
            assert main(["serve", *options]) == 1
            assert part in capsys.readouterr().err
