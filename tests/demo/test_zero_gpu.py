"""The page on ZeroGPU: with a stand-in for `spaces` that forks and pickles like ZeroGPU, and with the real package."""

import base64
import importlib
import json
import os
import pickle
import select
import socket
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import httpx2
import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (extra `demo`).")
pytest.importorskip("gradio", reason="Gradio is not installed (extra `dev`).")

import gradio

from empathic.demo.app import PageOptions, add_page, build_service
from empathic.serve.app import build_app
from empathic.serve.replies import Done, Failed, Piece, Progress, Request

SECONDS = 120  # that a busy machine may need


class Forked:
    """
    `spaces.GPU`: the function runs in a forked process; its arguments and results are pickled.

    Attributes:
        process: the last forked process.
        durations: the seconds that were asked for.
        visitors: the value of the header `x-ip-token` of each call.
        error: an error for the calls instead of a process.
    """

    def __init__(self):
        self.process, self.durations, self.visitors, self.error = 0, [], [], None

    def GPU(self, task=None, duration=None):
        if task is None:
            return lambda task: self.GPU(task, duration)

        def call(*arguments):
            from gradio.context import LocalContext

            self.durations.append(duration(*arguments))
            request = LocalContext.request.get(None)
            self.visitors.append(request and request.headers.get("x-ip-token"))
            if self.error is not None:
                raise self.error
            given = pickle.dumps(arguments)
            reading, writing = os.pipe()
            ask, stop = os.pipe()
            self.process = os.fork()
            if self.process == 0:
                os.close(reading)
                os.close(stop)
                work(task, given, os.fdopen(writing, "wb"), ask)
            os.close(writing)
            os.close(ask)
            try:
                with os.fdopen(reading, "rb") as results:
                    while True:
                        try:
                            kind, value = pickle.load(results)
                        except EOFError:
                            raise gradio.Error("GPU task aborted", title="ZeroGPU worker error") from None
                        if kind == "end":
                            return
                        if kind == "error":
                            raise gradio.Error(value, title="ZeroGPU worker error")
                        yield value
            finally:
                os.close(stop)
                os.waitpid(self.process, 0)

        def work(task, given, results, ask):
            """Do the work of the forked process, which ends when the other end of `ask` is closed."""
            try:
                last: tuple = ("end", None)
                try:
                    for value in task(*pickle.loads(given)):
                        if is_closed(ask):
                            break
                        results.write(pickle.dumps(("value", value)))
                        results.flush()
                except Exception as error:
                    last = ("error", type(error).__name__)
                results.write(pickle.dumps(last))
                results.flush()
            finally:
                os._exit(0)

        return call


def is_closed(reading: int) -> bool:
    return bool(select.select([reading], [], [], 0)[0])


@pytest.fixture
def forked(monkeypatch):
    """The stand-in, in place of the package `spaces`."""
    stand_in, module = Forked(), ModuleType("spaces")
    module.GPU = stand_in.GPU
    monkeypatch.setitem(sys.modules, "spaces", module)
    monkeypatch.delitem(sys.modules, "empathic.demo.zero_gpu", raising=False)
    yield stand_in
    sys.modules.pop("empathic.demo.zero_gpu", None)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def zero_page(forked, base_folder):
    """The page of a tiny model on Gradio's server, on which calls go through the stand-in."""
    zero_gpu = importlib.import_module("empathic.demo.zero_gpu")
    options = PageOptions(megabytes=0.5, seconds=5, max_new_tokens=6, keep_seconds=0)
    service = build_service(base_folder, None, options, "cpu", make_engine=zero_gpu.zero_gpu_engine)
    app = build_app(service)
    add_page(app, service, options)
    server = zero_gpu.ZeroGPUServer(app)
    _, url, _ = server.launch(
        server_name="127.0.0.1",
        server_port=free_port(),
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=True,
        app_kwargs={"lifespan": lambda _: app.router.lifespan_context(app)},
    )
    yield SimpleNamespace(url=url.rstrip("/"), service=service)
    server.blocks.close(verbose=False)


def body_of(model: str, clip: str | None, **more) -> dict:
    content: list = [{"type": "text", "text": "do you remember my horse?"}]
    if clip is not None:
        data = base64.b64encode(Path(clip).read_bytes()).decode()
        content.append({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}})
    messages = [
        {"role": "user", "content": "i have a horse called tiger."},
        {"role": "assistant", "content": "how is tiger the horse?"},
        {"role": "user", "content": content},
    ]
    return {"model": model, "messages": messages, "temperature": 0, **more}


def events_of(answer) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [{key: value for key, value in json.loads(line).items() if key not in ("id", "created")} for line in lines]


def test_the_reply_is_that_of_the_ordinary_engine(zero_page, serve_page, forked, clip):
    body = body_of(zero_page.service.model_name, clip, stream=True, details=True, logprobs=True, top_logprobs=2)
    ordinary = httpx2.post(f"{serve_page().url}/v1/chat/completions", json=body, timeout=SECONDS)
    for _ in range(2):  # nothing is kept, so that the second turn is like the first
        answer = httpx2.post(f"{zero_page.url}/v1/chat/completions", json=body, timeout=SECONDS)
        assert answer.status_code == 200 and events_of(answer) == events_of(ordinary)
    stages = [event["progress"]["stage"] for event in events_of(answer) if "progress" in event]
    assert stages == ["listening", "watching", "answering"] and forked.process not in (0, os.getpid())
    assert any("emotion" in event for event in events_of(answer)) and any(
        "memory" in event for event in events_of(answer)
    )
    assert len(forked.durations) == 2 and all(isinstance(each, int) and 0 < each < 60 for each in forked.durations)


def test_the_visitor_is_known_where_gpu_time_is_counted(zero_page, forked):
    body = body_of(zero_page.service.model_name, None)
    headers = {"x-ip-token": "abc"}
    answer = httpx2.post(f"{zero_page.url}/v1/chat/completions", json=body, headers=headers, timeout=SECONDS)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 6
    httpx2.post(f"{zero_page.url}/v1/chat/completions", json=body, timeout=SECONDS)
    assert forked.visitors == ["abc", None]


def test_there_is_no_live_emotion_and_no_route_of_gradio(zero_page, forked, clip):
    settings = httpx2.get(f"{zero_page.url}/settings.json").json()
    assert settings["live_emotion"] is settings["names_emotion_of_text"] is False and settings["keep_seconds"] == 0
    content = body_of("", clip)["messages"][-1]["content"]
    body = {"model": zero_page.service.model_name, "content": content}
    answer = httpx2.post(f"{zero_page.url}/v1/emotion", json=body, timeout=SECONDS)
    assert answer.status_code == 400 and "Ask for a reply" in answer.json()["error"]["message"]
    assert not forked.durations
    assert "static/page.js" in httpx2.get(zero_page.url).text and httpx2.head(zero_page.url).status_code == 200
    for path in ("/config", "/gradio_api/info", "/gradio_api/upload", "/queue/join"):
        assert httpx2.get(zero_page.url + path).status_code == 404, path


@pytest.mark.parametrize(
    "title, message, status, code",
    [
        ("ZeroGPU quota exceeded", "You have exceeded your free ZeroGPU quota.", 429, "insufficient_quota"),
        ("ZeroGPU queue timeout", "No GPU was available after 60s", 503, "no_gpu"),
        ("ZeroGPU worker error", "GPU task aborted", 503, "gpu_task_aborted"),
        ("ZeroGPU worker error", "OutOfMemoryError", 503, "out_of_memory"),
        ("ZeroGPU illegal duration", "The requested GPU duration (90s) is too large", 400, "gpu_time_too_long"),
        ("Error", "a secret", 500, "server_error"),
    ],
)
def test_errors_of_zero_gpu_are_errors_of_the_api(zero_page, forked, title, message, status, code):
    forked.error = gradio.Error(message, title=title)
    for stream in (False, True):
        body = body_of(zero_page.service.model_name, None, stream=stream)
        answer = httpx2.post(f"{zero_page.url}/v1/chat/completions", json=body, timeout=SECONDS)
        error = answer.json()["error"]
        assert answer.status_code == status and error["code"] == code and "secret" not in error["message"]
        if code not in ("server_error", "out_of_memory"):
            assert error["message"].startswith(message.rstrip(".") + ". ") and len(error["message"]) > len(message) + 20


def test_a_process_that_dies_is_an_error(zero_page, forked, monkeypatch):
    from empathic.demo import zero_gpu

    class Dying:
        def __init__(self, *_):
            os._exit(9)

    class Broken:
        def __init__(self, *_):
            raise ValueError("a secret")

    body = body_of(zero_page.service.model_name, None, stream=True)
    for front in (Dying, Broken):
        monkeypatch.setattr(zero_gpu, "FrontEnd", front)
        answer = httpx2.post(f"{zero_page.url}/v1/chat/completions", json=body, timeout=SECONDS)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "gpu_task_aborted"
        assert "secret" not in answer.text
    monkeypatch.undo()


def make_engine(answer, **options):
    zero_gpu = importlib.import_module("empathic.demo.zero_gpu")
    return zero_gpu.ZeroGPUEngine(answer, SimpleNamespace(), **options)


def request_of(events) -> Request:
    from empathic.serve.prompts import History, Utterance
    from empathic.serve.replies import Options

    return Request(None, History(), Utterance("user", None, "hello"), {}, Options(), events.append, True)


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_goes_away_ends_the_call(forked):
    closed, more = threading.Event(), threading.Event()

    def answer(*_):
        try:
            while True:
                yield Piece("a")
                more.wait(SECONDS)
        finally:
            closed.set()

    events: list = []
    engine, request = make_engine(answer), request_of(events)
    engine.submit(request)
    wait_until(lambda: events)
    request.cancelled = True
    more.set()
    assert closed.wait(SECONDS)
    wait_until(lambda: not engine.is_busy)
    assert events == [Piece("a")]
    engine.stop()


def test_requests_wait_and_are_refused_when_too_many_wait(forked):
    from empathic.serve.engine import ENDING, QueueFull

    go, lists = threading.Event(), [[], [], []]

    def answer(*_):
        go.wait(SECONDS)
        yield Done("stop", 1, 0, 1)

    engine = make_engine(answer, max_queue=2)
    engine.submit(request_of(lists[0]))
    wait_until(lambda: not engine.queue_length)
    engine.submit(request_of(lists[1]))
    engine.submit(request_of(lists[2]))
    assert engine.is_busy and engine.is_full and engine.seconds_to_wait() > 0
    with pytest.raises(QueueFull):
        engine.submit(request_of([]))
    assert lists[1] == [Progress("waiting", 1)] and lists[2] == [Progress("waiting", 2)]
    go.set()
    wait_until(lambda: isinstance(lists[2][-1], Done))
    assert lists[2][:2] == [Progress("waiting", 2), Progress("waiting", 1)]
    go.clear()
    for place in (0, 1):
        lists[place].clear()
        engine.submit(request_of(lists[place]))
    wait_until(lambda: engine.queue_length == 1)
    engine.stop()
    go.set()
    wait_until(lambda: lists[0] and lists[1])
    assert lists[0][-1] == lists[1][-1] == ENDING and not engine.is_alive


def test_a_call_without_an_end_is_an_error(forked):
    events: list = []
    engine = make_engine(lambda *_: (piece for piece in []))
    engine.submit(request_of(events))
    wait_until(lambda: events)
    assert isinstance(events[-1], Failed) and events[-1].status == 500
    engine.stop()


def test_a_space_for_zero_gpu_runs_with_the_real_package(base_folder, hub, clip, run_space, capsys):
    import yaml
    from hub_server import USER

    from empathic.cli import main
    from empathic.hub.models import push_model

    push_model(base_folder, f"{USER}/tiny")
    space = f"{USER}/talk"
    assert main(["push-space", f"{USER}/tiny", space, "--max_new_tokens", "4"]) == 0
    assert "Dockerfile" in hub.files(space, type="space")
    assert main(["push-space", f"{USER}/tiny", space, "--max_new_tokens", "4", "--zero_gpu"]) == 0
    assert "ZeroGPU" in capsys.readouterr().out
    files = hub.files(space, type="space")
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and "app_port" not in card
    assert "Dockerfile" not in files and "empathic/demo/zero_gpu.py" in files
    needed = files["requirements.txt"].decode()
    assert f"gradio>={card['sdk_version'].rsplit('.', 1)[0]}" in needed and "\nspaces>=" in needed
    app = files["app.py"].decode()
    assert app.index("import spaces") < app.index("from empathic")

    pytest.importorskip("spaces", reason="spaces is not installed (extra `dev`).")
    port = free_port()
    with run_space(files, port, "The page of tiny is at"):
        url = f"http://127.0.0.1:{port}"
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body_of("tiny", clip, stream=True), timeout=SECONDS)
        assert len(events_of(answer)) > 2
        assert httpx2.get(f"{url}/settings.json").json()["quota_from"] == "https://huggingface.co"
