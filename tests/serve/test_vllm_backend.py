"""
Generation by a vLLM server. The server here is a stub that speaks vLLM's protocol and runs the exported language model
with plain transformers: vLLM itself needs a GPU and other versions of our requirements.
"""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from empathic.chat import ChatSession
from empathic.cli import main
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor


@pytest.fixture(scope="module")
def language_model(long_folder, tmp_path_factory):
    """The exported language model."""
    folder = str(tmp_path_factory.mktemp("export") / "language-model")
    assert main(["export", long_folder, folder]) == 0
    return folder


class Stub:
    """A server with vLLM's routes `/v1/models` and `/v1/completions`, as far as our backend uses them."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bodies, self.broken, self.failure, self.delay = [], 0, None, 0.0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(json.dumps({"object": "list", "data": [{"id": "lm", "object": "model"}]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append((self.path, dict(self.headers), body))
                if stub.failure is not None:
                    self.answer(b'{"error": {"message": "no prompt_embeds"}}', stub.failure)
                    return
                self.send_response(200)
                self.end_headers()
                try:
                    for chunk in stub.generate(body):
                        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                        self.wfile.flush()
                        time.sleep(stub.delay)
                    self.wfile.write(b"data: [DONE]\n\n")
                except OSError:
                    stub.broken += 1

            def answer(self, content, status=200):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def generate(self, body):
        """Yield the chunks of a completion, one a token."""
        embeddings = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        assert embeddings.ndim == 2 and embeddings.shape[1] == self.model.config.hidden_size and body["prompt"] == ""
        assert body["stream"] and body["temperature"] == 0
        given, tokens, text, reason = embeddings[None], [], "", "length"
        with torch.inference_mode():
            while len(tokens) < body["max_tokens"]:
                logits = self.model(inputs_embeds=given).logits[0, -1]
                for token, bias in body["logit_bias"].items():
                    logits[int(token)] += bias
                token = int(logits.argmax())
                tokens.append(token)
                if token in body["stop_token_ids"]:
                    reason = "stop"
                    break
                given = torch.cat([given, self.model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
                whole = self.tokenizer.decode(tokens, skip_special_tokens=True)
                if not whole.endswith("\ufffd"):
                    yield {"choices": [{"index": 0, "text": whole[len(text) :], "finish_reason": None}]}
                    text = whole
        rest = self.tokenizer.decode(tokens, skip_special_tokens=True)[len(text) :]
        yield {"choices": [{"index": 0, "text": rest, "finish_reason": reason}]}
        yield {"choices": [], "usage": {"completion_tokens": len(tokens)}}


@pytest.fixture(scope="module")
def stub(language_model):
    stub = Stub(language_model)
    yield stub
    stub.http.shutdown()


@pytest.fixture(scope="module")
def client(stub, start_server, long_folder):
    options = ("--backend", "vllm", "--vllm_url", stub.url, "--vllm_model", "lm", "--max_seconds", "5")
    return start_server(long_folder, *options, environment={"VLLM_API_KEY": "vllm-key"}).client()


@pytest.fixture(autouse=True)
def working(stub):
    stub.failure, stub.delay = None, 0.0


def ask(client, *texts, **options):
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": text} if isinstance(text, str) else text
        for place, text in enumerate(texts)
    ]
    return client.chat.completions.create(
        model="tiny-chatbot", messages=messages, **{"temperature": 0, "max_tokens": 8, **options}
    )


def test_the_exported_language_model_is_that_of_the_whole_model(long_folder, language_model):
    whole = EmpathicForConditionalGeneration.from_pretrained(long_folder).eval()
    alone = AutoModelForCausalLM.from_pretrained(language_model).eval()
    assert type(alone).__name__ == "Qwen2ForCausalLM"
    ids = torch.arange(4, 30)[None]
    with torch.inference_mode():
        assert torch.equal(alone(ids).logits, whole(input_ids=ids).logits)
    tokenizers = EmpathicProcessor.from_pretrained(long_folder).tokenizer, AutoTokenizer.from_pretrained(language_model)
    assert tokenizers[0]("hello there")["input_ids"] == tokenizers[1]("hello there")["input_ids"]
    assert alone.generation_config.eos_token_id == whole.generation_config.eos_token_id


def test_an_export_does_not_replace_a_folder(long_folder, language_model, capsys):
    assert main(["export", long_folder, language_model]) == 1
    assert "already exists" in capsys.readouterr().err


def test_replies_are_those_of_a_session_of_the_whole_model(client, stub, long_folder, clip):
    model = EmpathicForConditionalGeneration.from_pretrained(long_folder).eval()
    processor = EmpathicProcessor.from_pretrained(long_folder)
    data = base64.b64encode(Path(clip).read_bytes()).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    for texts, clips in (
        (("hello",), {}),
        (("hello", "there", "how are you", "fine", "what did he say"), {}),
        (("hello", "there", "old dog"), {"audio": clip, "video": clip}),
    ):
        session, roles = ChatSession(model, processor), ("user", "assistant")
        session.remember(*({"role": roles[n % 2], "content": text} for n, text in enumerate(texts[:-1])))
        expected = session.reply(texts[-1], **clips, do_sample=False, max_new_tokens=8)
        last = texts[-1]
        if clips:
            last = {"role": "user", "content": [part, {"type": "text", "text": last}]}
        answer = ask(client, *texts[:-1], last)
        assert answer.choices[0].message.content == expected
        assert answer.usage.completion_tokens in (8, len(expected)) or answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens_details.cached_tokens == 0  # vLLM keeps the keys and values
        assert not hasattr(answer.choices[0].message, "emotion")
        chunks = ask(client, *texts[:-1], last, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    path, headers, body = stub.bodies[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer vllm-key" and body["model"] == "lm"
    placeholders = {model.config.video_token_id, model.config.audio_token_id, model.config.memory_token_id}
    assert placeholders <= set(map(int, body["logit_bias"]))


def test_stop_strings_end_a_reply_and_several_replies_come_at_once(client, stub):
    whole = ask(client, "hello there", max_tokens=20).choices[0].message.content
    stop = whole[4:6]
    stopped = ask(client, "hello there", max_tokens=20, stop=stop).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)] and stopped.finish_reason == "stop"
    found = {}

    def run(number):
        found[number] = ask(client, "hello there", max_tokens=20).choices[0].message.content

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(6), whole)


def test_a_client_that_leaves_ends_the_request_to_vllm(client, stub):
    stub.delay, before = 0.05, stub.broken
    stream = ask(client, "hello", max_tokens=500, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while stub.broken == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stub.broken == before + 1


def test_an_error_of_vllm_reaches_the_client_and_the_next_request_works(client, stub):
    stub.failure = 500
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "hello")
    assert caught.value.status_code == 502 and caught.value.code == "backend_error"
    stub.failure = None
    assert ask(client, "hello").choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hello", logprobs=True)
    assert caught.value.param == "logprobs"


def test_a_missing_server_and_a_missing_model_are_named(stub, long_folder, capsys):
    for options, part in (
        (["--vllm_url", "http://127.0.0.1:9/v1"], "No vLLM server answers at http://127.0.0.1:9/v1"),
        (["--vllm_url", stub.url, "--vllm_model", "other"], "has no model 'other', only lm"),
        (["--vllm_url", "localhost"], "The URL of vLLM is 'localhost'"),
    ):
        assert main(["serve", long_folder, "--port", "0", "--backend", "vllm", *options]) == 1
        assert part in capsys.readouterr().err
