"""Real server processes, and engines in this process."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

STARTUP_SECONDS = 120


class Server:
    """A server process, with its URL and its log."""

    def __init__(self, model: str, *options: str, environment: dict[str, str] | None = None):
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "empathic.cli", "serve", model, "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        self.log: list[str] = []
        threading.Thread(target=self._keep_log, daemon=True).start()
        timer = threading.Timer(STARTUP_SECONDS, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        found = re.search(r"http://\S+", line)
        assert found, f"the server did not start: {line} {''.join(self.log)}"
        self.url = found[0]

    def _keep_log(self):
        for line in self.process.stderr:
            self.log.append(line)

    @property
    def root(self):
        return self.url.removesuffix("/v1")

    def client(self, **options):
        from openai import OpenAI

        return OpenAI(**{"base_url": self.url, "api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 if it does not exist yet."""
        import httpx2

        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        head = f"{name}{{{shown}}} " if labels else f"{name} "
        lines = httpx2.get(f"{self.root}/metrics").text.splitlines()
        return next((float(line.removeprefix(head)) for line in lines if line.startswith(head)), 0.0)

    def end(self, signum=signal.SIGTERM, timeout: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout)


@pytest.fixture(scope="session")
def start_server():
    """A function (model, *options) that starts a `Server`; all are ended at the end of the session."""
    started = []

    def start(model, *options, **more):
        started.append(Server(model, *options, **more))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def long_folder(base_folder, tmp_path_factory):
    """The checkpoint `base_folder` with room for conversations of 1,000 turns."""
    import json
    import shutil

    folder = tmp_path_factory.mktemp("long") / "tiny-chatbot"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def server(long_folder, start_server, tmp_path_factory):
    """A server for the tests that do not end it."""
    options = ("--max_seconds", "5", "--max_body_mb", "4", "--max_media_mb", "2")
    return start_server(long_folder, *options, environment={"TMPDIR": str(tmp_path_factory.mktemp("temporary"))})


@pytest.fixture
def engines(model, processor):
    """A function (**options) that starts an engine here, after ending the one before: a model has one owner."""
    from empathic.serve.engine import Engine, LocalDecoder
    from empathic.serve.metrics import Metrics
    from empathic.serve.prefix_cache import PrefixCache
    from empathic.serve.prompts import FrontEnd, History, Utterance
    from empathic.serve.replies import Options, Piece, Request

    model.eval()
    model.config.text_config.max_position_embeddings = 8192
    running = []

    class Local:
        def __init__(self, max_batch=4, max_bytes=10**8, max_queue=64, max_memories=None, max_seconds=None):
            cache = PrefixCache(max_bytes, max_seconds)
            self.front = FrontEnd(model, processor, cache, max_memories)
            self.decoder = LocalDecoder(model, cache, max_batch)
            self.engine = Engine(self.front, self.decoder, Metrics(), max_queue)

        def submit(self, history, text, emit=None, clips=None, system=None, details=False, **options):
            """Submit a turn after a history of (user's text, reply) pairs; return the request and its events."""
            said = [Utterance(("user", "assistant")[i % 2], None, t) for i, t in enumerate(sum(history, ()))]
            events = queue.Queue()
            options = Options(**{"max_tokens": 8, "temperature": 0, **options})
            turn = Utterance("user", None, text)
            request = Request(system, History(said), turn, clips or {}, options, emit or events.put, details)
            self.engine.submit(request)
            return SimpleNamespace(request=request, events=events)

        def finish(self, asked):
            """The reply's text and the last event."""
            text = ""
            while isinstance(event := asked.events.get(timeout=60), Piece):
                text += event.text
            return text, event

        def ask(self, history, text, **options):
            return self.finish(self.submit(history, text, **options))

    def start(**options):
        for engine in running:
            engine.stop()
        running.clear()
        local = Local(**options)
        local.engine.start()
        running.append(local.engine)
        return local

    yield start
    for engine in running:
        engine.stop()
