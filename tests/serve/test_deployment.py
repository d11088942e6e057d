"""What is deployed with the server: the handler for Inference Endpoints, the container files, and the docs' clients."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from empathic.chat import ChatSession
from empathic.cli import build_parser, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def handler(base_folder):
    """The handler, from its file alone, as an endpoint loads it."""
    spec = importlib.util.spec_from_file_location("handler", ROOT / "serve" / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(base_folder)


def video(path):
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


def test_the_handler_replies_as_a_session(handler, model, processor, clip):
    history = [{"role": "user", "name": "clara", "content": "hello"}, {"role": "assistant", "content": "there"}]
    for clips in ({}, {"audio": clip, "video": clip}):
        session = ChatSession(model.eval(), processor)
        session.remember(*history)
        expected = session.reply("how are you", **clips, do_sample=False, max_new_tokens=6)
        content = [*([video(clip)] if clips else []), {"type": "text", "text": "how are you"}]
        earlier = [{**history[0], "content": [video(clip), {"type": "text", "text": "hello"}]}, history[1]]
        data = {"inputs": [*earlier, {"role": "user", "content": content}], "parameters": {"max_new_tokens": 6}}
        assert handler(json.loads(json.dumps(data))) == {"reply": expected}
    assert handler({"inputs": "hello", "parameters": {"max_new_tokens": 2}})["reply"]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"inputs": 3},
        {"inputs": "hello", "parameters": {"streamer": 1}},
        {"inputs": [{"role": "user", "content": [{"type": "video", "path": "/etc/passwd"}]}]},
        {"inputs": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/etc/passwd"}}]}]},
        {"inputs": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "x"}]}]},
        {"inputs": [{"role": "wizard", "content": "a"}]},
    ],
)
def test_the_handler_refuses_other_requests(handler, data):
    with pytest.raises(ValueError):
        handler(data)


def test_the_handler_is_pushed_on_request(hub, base_folder, capsys):
    assert main(["push", base_folder, "me/plain"]) == 0
    assert "handler.py" not in hub.files("me/plain", "model")
    assert main(["push", base_folder, "me/served", "--handler"]) == 0
    files = hub.files("me/served", "model")
    assert files["handler.py"] == (ROOT / "serve" / "handler.py").read_bytes()
    needed = files["requirements.txt"].decode().splitlines()
    assert {re.split(r"[<>=]", line)[0] for line in needed} >= {"transformers", "av", "jinja2"}
    assert not any(line.startswith(("torch", "trl", "gradio")) for line in needed)


def test_the_handler_needs_nothing_of_this_package(base_folder, tmp_path):
    """A process whose path does not lead to the package."""
    (tmp_path / "handler.py").write_bytes((ROOT / "serve" / "handler.py").read_bytes())
    code = (
        "import sys; from handler import EndpointHandler; "
        "print(EndpointHandler(sys.argv[1])({'inputs': 'hello', 'parameters': {'max_new_tokens': 2}})); "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'empathic']"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", code, base_folder]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "reply" in done.stdout, done.stderr


def test_the_container_files_run_a_command_that_exists():
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    entry, command = (
        json.loads(re.search(rf"^{name} (\[.*\])$", docker, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "CMD")
    )
    arguments = build_parser().parse_args([*entry, *command][1:])
    assert arguments.host == "0.0.0.0" and arguments.model == "/model" and f"EXPOSE {arguments.port}" in docker
    assert "USER empathic" in docker and "TORCH_INDEX" in docker
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    for service in compose["services"].values():
        build_parser().parse_args([*entry, *service["command"]][1:])
        assert service["read_only"] and service["ports"] == ["127.0.0.1:8000:8000"]
        assert float(service["stop_grace_period"].removesuffix("s")) > arguments.shutdown_seconds + 5
        assert service["environment"]["EMPATHIC_API_KEY"].startswith("${EMPATHIC_API_KEY:?")
    assert set(compose["services"]) == {"chatbot", "chatbot-cuda"}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", "runs", "tests"} <= set(ignored)


def test_curl_as_in_the_docs_gets_a_reply(server, write_media, tone, tmp_path):
    """The commands of the page, run in a shell with the server's address."""
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    [script] = [textwrap.dedent(block) for block in blocks if "curl " in block]
    write_media(tmp_path / "voice.wav", samples=tone(0.5), audio_codec="pcm_s16le")
    script = script.replace("http://127.0.0.1:8000", server.root).replace('"model":"model"', '"model":"tiny-chatbot"')
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["emotion"]["label"]
    assert answer["usage"]["prompt_tokens_details"]["audio_tokens"] > 0


def test_pipecats_openai_service_gets_a_streamed_reply(server):
    pytest.importorskip("pipecat")
    import asyncio

    from pipecat.frames.frames import LLMContextFrame, LLMTextFrame
    from pipecat.processors.aggregators.llm_context import LLMContext
    from pipecat.services.openai.llm import OpenAILLMService
    from pipecat.tests.utils import run_test

    service = OpenAILLMService(
        api_key="none", base_url=server.url, settings=OpenAILLMService.Settings(model="tiny-chatbot", temperature=0.0)
    )
    context = LLMContext([{"role": "user", "content": "hello"}])
    frames, _ = asyncio.run(run_test(service, frames_to_send=[LLMContextFrame(context)], expected_down_frames=None))
    assert "".join(frame.text for frame in frames if isinstance(frame, LLMTextFrame))
