"""
The OpenAI-compatible endpoint: against `transformers serve` with a tiny model, and against a server that misbehaves in
every way that servers do.
"""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import wave
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from empathic.baselines.prompts import SYSTEM_PROMPT
from empathic.cli import main
from empathic.evaluation.replies import read_replies, write_replies
from empathic.evaluation.systems import endpoint
from empathic.evaluation.systems.endpoint import EndpointError
from empathic.evaluation.systems.open import open_system
from empathic.media_empathic import load_audio

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEY = "sk-very-secret"


def sample(number=0, text="i am fine", **media):
    prompt = [
        {"role": "user", "name": "clara", "content": [{"type": "text", "text": "hello there"}]},
        {"role": "assistant", "name": "bot", "content": [{"type": "text", "text": "how are you"}]},
        {"role": "user", "name": "clara", "content": [*media.get("items", []), {"type": "text", "text": text}]},
    ]
    return {"corpus": "c", "split": "test", "dialogue_id": f"d{number}", "turn": 3, "prompt": prompt, "reply": "yes"}


def answer(text="fine", **changes):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage, **changes}


class Server:
    """Answers request number n by `plan[n]`, and all after the last as by the last; keeps what was asked."""

    def __init__(self):
        self.plan, self.requests, self.lock = [answer()], [], threading.Lock()
        self.inside = self.most_inside = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    act = server.plan[min(len(server.requests), len(server.plan) - 1)]
                    server.requests.append(SimpleNamespace(path=self.path, headers=dict(self.headers), body=body))
                    server.inside += 1
                    server.most_inside = max(server.most_inside, server.inside)
                try:
                    act(self, body) if callable(act) else self.send(200, act)
                finally:
                    with server.lock:
                        server.inside -= 1

            def send(self, status, content, **headers):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def status(code, content=b"{}", **headers):
    return lambda handler, body: handler.send(code, content, **headers)


def cut(handler, body):
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def chat_folder(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(parts["text"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def waits(monkeypatch):
    """What is slept, instead of sleeping; the clock goes on by as much."""
    slept, lock = [], threading.Lock()

    def sleep(seconds):
        with lock:
            slept.append(seconds)

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: 1000.0 + sum(slept), time=time.time)
    monkeypatch.setattr(endpoint, "time", clock)
    return slept


def system(server, options="", **common):
    return open_system(f"openai:tiny@{server.url},key=none,concurrency=1{options}", **common)


# ----------------------------------------------------------------------------------------------- what goes there


def test_the_history_goes_as_chat_turns(server):
    found = system(server, max_new_tokens=20).reply([sample()], [7])
    assert [reply.text for reply in found] == ["fine"]
    assert found[0].extra.items() >= {"finish_reason": "stop", "tokens": 10, "prompt_tokens": 100}.items()
    request = server.requests[0]
    assert request.path == "/v1/chat/completions" and "Authorization" not in request.headers
    assert request.body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": "clara: hello there"},
            {"role": "assistant", "content": "how are you"},
            {"role": "user", "content": "clara: i am fine"},
        ],
        "max_tokens": 20,
        "temperature": 0.0,
        "seed": 7,
    }


def test_what_an_endpoint_refuses_is_not_sent(server):
    options = ",tokens_field=max_completion_tokens,sends_temperature=false,sends_seed=false,folded=true"
    system(server, options, temperature=0.5).reply([sample()], [7])
    body = server.requests[0].body
    assert set(body) == {"model", "messages", "max_completion_tokens"}
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    system(server, temperature=0.5, top_p=0.9).reply([sample()], [7])
    assert (server.requests[1].body["temperature"], server.requests[1].body["top_p"]) == (0.5, 0.9)


def test_frames_and_sound_go_along(server, clip, tmp_path):
    items = [{"type": "audio", "path": clip}, {"type": "video", "path": clip}]
    system(server, ",media=both,num_frames=3").reply([sample(items=items)], [0])
    sound, *frames, text = server.requests[0].body["messages"][-1]["content"]
    assert text == {"type": "text", "text": "clara: i am fine"}
    assert sound["type"] == "input_audio" and sound["input_audio"]["format"] == "wav"
    with wave.open(io.BytesIO(base64.b64decode(sound["input_audio"]["data"]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    np.testing.assert_allclose(samples, np.clip(load_audio(items[0]), -1, 1), atol=1e-4)
    assert len(frames) == 3
    pictures = []
    for frame in frames:
        head, data = frame["image_url"]["url"].split(",")
        assert (frame["type"], head) == ("image_url", "data:image/jpeg;base64")
        pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    assert pictures[0].shape == (48, 64, 3)
    greys = [picture.mean() for picture in pictures]
    assert greys == sorted(greys) and greys[2] - greys[0] > 30  # of a clip that grows lighter

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    found = system(server, ",media=both").reply([sample(items=[{"type": "video", "path": str(broken)}])], [0])
    assert found[0].text == "fine" and "broken.mp4" in found[0].extra["note"]
    assert server.requests[1].body["messages"][-1]["content"] == "clara: i am fine"


@pytest.mark.parametrize(
    ("message", "text", "thought"),
    [
        ({"content": "<think>She is sad.</think>\n\nsorry"}, "sorry", "She is sad."),
        ({"content": "She is sad.\n</think>\n\nsorry"}, "sorry", "She is sad."),
        ({"content": "sorry", "reasoning_content": "She is sad."}, "sorry", "She is sad."),
        ({"content": "sorry", "reasoning": "sad", "reasoning_details": [{"text": "sad"}]}, "sorry", "sad"),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "She is sad."}]},
                    {"type": "text", "text": "sor"},
                    {"type": "text", "text": "ry"},
                ]
            },
            "sorry",
            "She is sad.",
        ),
        ({"content": [{"type": "text", "text": "sorry"}]}, "sorry", None),
    ],
)  # fmt: skip
def test_the_reply_is_the_message_without_its_thought(server, message, text, thought):
    server.plan = [answer()]
    server.plan[0]["choices"][0]["message"] = {"role": "assistant", **message}
    found = system(server).reply([sample()], [0])[0]
    assert (found.text, found.extra.get("thought"), found.extra.get("note")) == (text, thought, None)


@pytest.mark.parametrize(
    ("message", "reason", "note"),
    [
        ({"content": "<think>She is sad and"}, "length", "cut off"),
        ({"content": None, "reasoning_content": "She is sad and"}, "length", "cut off"),
        ({"content": "", "reasoning": "She is sad."}, "stop", "only a thought"),
        ({"content": [{"type": "thinking", "thinking": "She is sad"}]}, "stop", "only a thought"),
        ({"content": [], "refusal": "no"}, "stop", "no text"),
    ],
)
def test_a_thought_alone_is_no_reply(server, message, reason, note):
    server.plan = [answer()]
    server.plan[0]["choices"][0] |= {"message": {"role": "assistant", **message}, "finish_reason": reason}
    found = system(server).reply([sample()], [0])[0]
    assert found.text == "" and note in found.extra["note"]


def test_a_thought_that_the_template_begins_is_no_reply_where_that_is_said(server):
    server.plan = [answer("She is sad and")]
    assert system(server).reply([sample()], [0])[0].text == "She is sad and"
    thinker = system(server, ",starts_in_thought=true,repetition_penalty=1.2")
    assert thinker.reply([sample()], [0])[0].text == "" and thinker.settings["starts_in_thought"] is True
    assert "repetition_penalty" not in server.requests[0].body and server.requests[1].body["repetition_penalty"] == 1.2


def test_the_key_goes_into_the_request_alone(server, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    found = open_system(f"paid=openai:tiny@{server.url},key=MY_KEY,retries=0")
    server.plan = [answer(), status(400, f"no such thing for {KEY}".encode()), status(401, f"{KEY} is wrong".encode())]
    path = write_replies(found, [sample()], tmp_path, progress=False)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    refused = found.reply([sample()], [0])
    with pytest.raises(EndpointError, match="MY_KEY") as error:
        found.reply([sample()], [0])
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    shown = [written, str(found.settings), str(vars(found)), str(refused), str(error.value), caplog.text]
    assert path.exists() and "400" in refused[0].extra["note"]
    assert [KEY in text for text in shown] == [False] * len(shown)


def test_a_key_does_not_travel_unencrypted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="unencrypted"):
        open_system("openai:tiny@http://example.org/v1")
    for target in ("tiny@http://example.org/v1,key=none", "tiny@https://example.org/v1", "tiny@http://localhost:1/v1"):
        open_system(f"openai:{target}")
    assert open_system("openai:org/gpt").settings["target"] == "org/gpt@https://api.openai.com/v1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (",media=smell", "media is 'smell'"),
        (",concurrency=0", "concurrency is 0"),
        (",price_in=1", "both or none"),
        (",requests_per_minute=-1", "requests_per_minute is -1"),
        (",colour=red", "unknown option 'colour'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        open_system(f"openai:tiny@https://example.org/v1,key=none{options}")
    with pytest.raises(ValueError, match="not a base URL"):
        open_system("openai:tiny@example.org,key=none")


# ----------------------------------------------------------------------------------------------- when it goes wrong


def test_a_request_is_tried_again_as_the_server_says(server, waits):
    soon = formatdate(time.time() + 300, usegmt=True)
    server.plan = [status(429, Retry_After="7"), status(503, Retry_After=soon), status(500), answer()]
    found = system(server).reply([sample()], [0])[0]
    assert (found.text, found.extra["attempts"], len(server.requests)) == ("fine", 4, 4)
    assert [request.body for request in server.requests] == [server.requests[0].body] * 4
    assert waits[0] == pytest.approx(7) and 290 < waits[1] <= 300
    assert 2 <= waits[2] <= 4  # the third wait of its own: up to 1, 2, 4, 8 s


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (status(200, b"<html>oops"), "not JSON"),
        (status(200, {"choices": []}), "no reply"),
        (status(200, [1]), "no reply"),
        (cut, "RemoteProtocolError"),
        (status(500, b"broken"), "status 500: broken"),
    ],
)
def test_what_passes_is_tried_again_and_what_does_not_is_recorded(server, waits, caplog, wrong, reason):
    server.plan = [wrong, answer()]
    assert system(server).reply([sample()], [0])[0].text == "fine"
    server.requests.clear()
    server.plan = [wrong, wrong, wrong, answer("better")]
    failed, after = system(server, ",retries=2").reply([sample(1), sample(2)], [0, 0])
    assert (failed.text, failed.extra["finish_reason"], failed.extra["attempts"]) == ("", "failed", 3)
    assert reason in failed.extra["note"] and "c/test/d1/3" in caplog.text
    assert after.text == "better"


def test_no_answer_in_time(server, waits):
    def slow(handler, body):
        time.sleep(0.5)

    server.plan = [slow, answer()]
    found = system(server, ",timeout=0.2").reply([sample()], [0])[0]
    assert (found.text, found.extra["attempts"]) == ("fine", 2)


def test_a_refused_request_is_not_tried_again(server, waits):
    server.plan = [status(400, b"the prompt is too long"), answer()]
    failed, after = system(server).reply([sample(1), sample(2)], [0, 0])
    assert "too long" in failed.extra["note"] and failed.extra["attempts"] == 1 and after.text == "fine"
    server.plan = [status(429, Retry_After="86400")]  # tomorrow
    assert system(server).reply([sample()], [0])[0].extra["attempts"] == 1
    assert waits == []


@pytest.mark.parametrize(
    ("wrong", "mend"),
    [
        (status(401), "does not accept a request without a key"),
        (status(404), "has no model 'tiny'"),
        (status(307, Location="http://example.org"), "has no model 'tiny'"),
        (status(429, {"error": {"code": "insufficient_quota"}}), "payment required"),
    ],
)
def test_what_fails_for_every_request_stops_the_job(server, wrong, mend):
    server.plan = [wrong]
    with pytest.raises(EndpointError, match=mend):
        system(server).reply([sample(n) for n in range(8)], list(range(8)))
    assert len(server.requests) == 1


def test_a_server_that_is_not_there(server, waits):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(EndpointError, match="no server answers"):
        system(server, ",retries=1").reply([sample()], [0])


def test_a_job_that_only_fails_is_stopped(server, waits):
    server.plan = [status(400, b"no parameter max_tokens")]
    with pytest.raises(EndpointError, match=r"in a row failed.*no parameter max_tokens"):
        system(server).reply([sample(n) for n in range(40)], list(range(40)))
    assert len(server.requests) == endpoint.FAILURES_IN_A_ROW


def test_an_empty_reply_says_why(server):
    choice = {"message": {"content": None, "refusal": "I would rather not"}, "finish_reason": "stop"}
    server.plan = [answer(choices=[choice]), answer(usage=None)]
    refused, plain = system(server, ",price_in=1,price_out=1").reply([sample(1), sample(2)], [0, 0])
    assert refused.text == "" and "I would rather not" in refused.extra["note"]
    assert plain.text == "fine" and plain.extra["tokens"] is None and "cost" not in plain.extra


# ----------------------------------------------------------------------------------------------- rate, cost, resume


def test_the_rate_limit_counts_every_attempt(server, waits, monkeypatch):
    server.plan = [answer(), status(429, Retry_After="30"), answer()]
    system(server, ",requests_per_minute=20").reply([sample(n) for n in range(3)], [0, 1, 2])
    assert len(server.requests) == 4
    assert waits == [3, 30, 3]  # 60/20 s apart, and after the second the 30 s of the server
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert system(server, ",requests_per_minute=20").turnstile.gap == 12


def test_several_requests_are_in_flight(server):
    meet = threading.Barrier(3, timeout=10)  # goes on only when three are inside at once

    def together(handler, body):
        meet.wait()
        handler.send(200, answer(body["messages"][-1]["content"]))

    server.plan = [together]
    found = open_system(f"openai:tiny@{server.url},key=none,concurrency=3")
    replies = found.reply([sample(n, text=f"number {n}") for n in range(6)], list(range(6)))
    assert [reply.text for reply in replies] == [f"clara: number {n}" for n in range(6)]
    assert server.most_inside == 3


def test_costs_are_counted_and_a_job_resumes(server, tmp_path):
    found = system(server, ",price_in=2.5,price_out=10", batch_size=2)
    samples = [sample(n) for n in range(6)]
    server.plan = [answer()] * 4 + [status(401)]
    with pytest.raises(EndpointError):
        write_replies(found, samples, tmp_path, progress=False)
    assert len(server.requests) == 5
    server.plan = [answer()]
    rows = read_replies(write_replies(found, samples, tmp_path, progress=False))
    assert len(server.requests) == 7  # the four that were answered were not asked for again
    assert [row["cost"] for row in rows] == [pytest.approx((100 * 2.5 + 10 * 10) / 1e6)] * 6


def test_the_table_takes_it_beside_a_local_model(server, chat_folder, recordings, tmp_path, capsys):
    server.plan = [answer("hello there"), status(400, b"not this one"), answer("thanks")]
    specs = [f"far=openai:tiny@{server.url},key=none,concurrency=1,price_in=1,price_out=1", f"near=chat:{chat_folder}"]
    line = ["evaluate", "dialogue", *specs, "--data", recordings.data, "--split=validation", "--device=cpu"]
    try:
        assert main([*line, "--max_new_tokens=4", "--resamples=100", "--metrics", "dist1", f"--output={tmp_path}"]) == 0
    finally:
        PartialState._reset_state()  # `--device cpu` stays set in it
    found = json.loads((tmp_path / "dialogue.json").read_text())["systems"]
    assert {name: system["count"] for name, system in found.items()} == {"far": 9, "near": 9}
    assert found["far"]["settings"]["target"] == f"tiny@{server.url}" and found["near"]["settings"]["kind"] == "chat"
    assert found["far"]["empty"] == 1 and "not this one" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- a real server


@pytest.mark.skipif(not is_serve_available(), reason="needs the packages of transformers[serving]")
def test_a_real_server_gives_the_replies_of_the_model(chat_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", chat_folder]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--device=cpu", "--host=127.0.0.1", f"--port={port}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.2)
        samples = [sample(n, text=text) for n, text in enumerate(("i am fine", "what about the dog", "thanks"))]
        common = {"max_new_tokens": 8, "device": "cpu"}
        served = open_system(f"served=openai:{chat_folder}@http://127.0.0.1:{port}/v1,key=none", **common)
        rows = read_replies(write_replies(served, samples, tmp_path, progress=False))
        loaded = open_system(f"chat:{chat_folder}", **common).reply(samples, [0, 0, 0])
        assert [row["reply"] for row in rows] == [reply.text for reply in loaded]
        assert [row["prompt_tokens"] for row in rows] == [reply.extra["prompt_tokens"] for reply in loaded]
        assert all(0 < row["tokens"] <= 8 for row in rows) and len({row["reply"] for row in rows}) > 1
    finally:
        process.terminate()
        process.wait(30)
