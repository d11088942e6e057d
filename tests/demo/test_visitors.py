"""Visitors of the page come, send clips and leave: nothing of theirs mixes, and nothing is left."""

import base64
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import torch

pytest.importorskip("fastapi", reason="FastAPI is not installed (extra `demo`).")


def wait_for(what, seconds=30):
    """Return the first true result of `what`, or the last result."""
    end = time.monotonic() + seconds
    while not (answer := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def said(text, clip=None):
    """A user's message."""
    if clip is None:
        return {"role": "user", "content": text}
    data = base64.b64encode(Path(clip).read_bytes()).decode()
    video = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    return {"role": "user", "content": [video, {"type": "text", "text": text}]}


def ask(page, messages, **more):
    body = {"model": page.service.model_name, "messages": messages, "temperature": 0, **more}
    return httpx2.post(f"{page.url}/v1/chat/completions", json=body, timeout=60)


def talk(page, texts, clip=None):
    """Have a conversation as the page does; return the replies."""
    messages = []
    for place, text in enumerate(texts):
        answer = ask(page, [*messages, said(text, clip if place == len(texts) - 1 else None)], details=True)
        reply = answer.raise_for_status().json()["choices"][0]["message"]["content"]
        messages += [said(text), {"role": "assistant", "content": reply}]
    return [message["content"] for message in messages[1::2]]


def test_visitors_at_once_get_their_own_replies(serve_page, clip):
    page = serve_page(concurrency=4)
    words = "hello there how are you i am fine".split()
    texts = [[words[number], words[-number - 1]] for number in range(8)]
    alone = [talk(page, each, clip) for each in texts]
    page = serve_page(concurrency=4)  # with nothing in its cache
    found = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: talk(page, texts[number], clip)}))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[number] for number in range(8)] == alone and len({tuple(each) for each in alone}) > 4


def test_nothing_of_a_visitor_is_left_after_a_while(serve_page, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    page = serve_page(keep_seconds=0.3)
    (engine,) = page.service.engines.values()
    cache = engine.front.cache

    def live():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    talk(page, ["hello there", "how are you"], clip)
    assert wait_for(lambda: len(cache) == 0)
    before = live()
    for number in range(4):
        talk(page, [f"hello {number}", "how are you"], clip)
    assert len(cache) > 0 and cache.size > 0
    assert wait_for(lambda: len(cache) == 0) and cache.size == 0
    assert wait_for(lambda: live() <= before), (live(), before)
    assert files(tmp_path) == []  # no clip was ever written


def test_a_visitor_who_leaves_ends_the_reply(serve_page):
    page = serve_page(max_new_tokens=900)
    (engine,) = page.service.engines.values()
    body = {"model": page.service.model_name, "messages": [said("hello there")], "stream": True, "details": True}
    body["temperature"] = 0  # a sampled reply may end at once
    with httpx2.stream("POST", f"{page.url}/v1/chat/completions", json=body, timeout=60) as lines:
        next(line for line in lines.iter_lines() if '"content"' in line)
        assert engine.is_busy
    assert wait_for(lambda: not engine.is_busy)


def test_too_large_and_broken_uploads_get_a_clear_message(serve_page, clip, tmp_path, write_media, tone):
    page = serve_page()
    broken, large = tmp_path / "broken.mp4", tmp_path / "large.mp4"
    broken.write_bytes(Path(clip).read_bytes()[:3000])
    large.write_bytes(os.urandom(600_000))
    long = write_media(tmp_path / "long.wav", samples=tone(20, 8000), sampling_rate=8000, audio_codec="pcm_s16le")
    for path, message in ((broken, "cut short"), (large, "the limit is 0.5 MB"), (long, "20 s long; the limit is 5 s")):
        answer = ask(page, [said("hello", path)])
        assert answer.status_code == 400 and message in answer.text, answer.text
    link = {"type": "video_url", "video_url": {"url": "http://127.0.0.1:1/a.mp4"}}
    answer = ask(page, [{"role": "user", "content": [link]}])
    assert answer.status_code == 400 and "this server downloads nothing" in answer.text
    place = urlsplit(page.url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2 << 30}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")  # before the body is sent
    assert ask(page, [said("hello")]).status_code == 200


def test_other_web_sites_cannot_use_the_page(serve_page):
    page = serve_page()
    port = urlsplit(page.url).port
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"localhost:{port}", 200),
        (f"[::1]:{port}", 200),
        (f"{socket.gethostname()}:{port}", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("me-demo.hf.space", 421),
    ):
        for path in ("/", "/settings.json", "/static/page.js", "/v1/models"):
            answer = httpx2.get(f"{page.url}{path}", headers={"Host": host})
            assert answer.status_code == status, (host, path)
    # A form of another site can send only these types without asking, and gets no CORS headers.
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        for path in ("/v1/chat/completions", "/v1/emotion"):
            answer = httpx2.post(f"{page.url}{path}", content="{}", headers={"Content-Type": kind})
            assert answer.status_code == 415
    assert "access-control-allow-origin" not in httpx2.get(page.url, headers={"Origin": "http://evil.example"}).headers


def test_the_hosts_of_a_space_and_of_a_proxy_are_known(monkeypatch):
    from empathic.hosts import host_names, is_known_host

    def known(host, *options):
        return is_known_host(host, host_names(*options))

    assert known("chat.example.org:443", None, ["Chat.example.org"]) and known("anything", None, ["*"])
    assert not known("me-demo.hf.space", None)
    monkeypatch.setenv("SPACE_ID", "me/demo")
    monkeypatch.setenv("SPACE_HOST", "me-demo.hf.space,demo.example.org")
    assert known("me-demo.hf.space", None) and known("demo.example.org", None) and not known("evil.example", None)


@pytest.mark.slow  # starts the command twice
def test_nothing_is_left_when_the_command_ends(base_folder, clip, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-u", "-m", "empathic.cli", "demo", base_folder]

    def run(number):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = ""
        while not (address := re.search(r"http://\S+", line)):
            line = process.stdout.readline()
            assert line, "the server ended"
        assert int(urlsplit(address[0]).port) >= 7860
        body = {"model": Path(base_folder).name, "messages": [said("hello", clip)]}
        answer = httpx2.post(f"{address[0]}/v1/chat/completions", content=json.dumps(body), timeout=60,
                            headers={"Content-Type": "application/json"})  # fmt: skip
        assert answer.status_code == 200
        assert len(files(tmp_path)) == 4  # the drawn examples, and no clip of a visitor
        process.send_signal(number)
        code = process.wait(60)
        process.stdout.close()
        return code

    assert run(signal.SIGTERM) == 128 + signal.SIGTERM and files(tmp_path) == []
    assert run(signal.SIGINT) in (0, -signal.SIGINT, 130) and files(tmp_path) == []
