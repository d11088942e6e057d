"""Visitors of the demo come, upload files and leave: their data is deleted, and they share no files."""

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
import weakref
from urllib.parse import urlsplit

import httpx
import pytest

from empathic.demo.server_folder import PREFIX, ServerFolder, sweep
from empathic.demo.session import Chatbot, NamedModel
from empathic.demo.uploads import Limits

pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`).")

sys.path.append(os.path.dirname(__file__))
from demo_server import DemoServer, Visitor

MEGABYTE = 1 << 20


def wait_for(what, seconds=30):
    """Return the first true result of `what`, or the last result."""
    end = time.monotonic() + seconds
    while not (answer := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def left(uploads):
    """The files and folders in the folders of the servers."""
    return [path for folder in uploads.iterdir() for path in folder.iterdir()]


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# --------------------------------------------------------------------------------- memory, in a separate server process


@pytest.fixture(scope="module")
def large_clip(tmp_path_factory, write_media, grey_frames, tone):
    """A file of a few kilobytes that has two megabytes when decoded."""
    path = tmp_path_factory.mktemp("large") / "large.mp4"
    return str(write_media(path, frames=grey_frames(10, 480, 640), samples=tone(1.0)))


@pytest.fixture(scope="module")
def server(base_folder, tmp_path_factory):
    with DemoServer(base_folder, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.parametrize("in_a_row, at_once", [(2, 2), pytest.param(20, 8, marks=pytest.mark.slow)])
def test_memory_returns_to_where_it_was(server, large_clip, in_a_row, at_once):
    def visit(kept=None):
        with Visitor(server.url) as visitor:
            assert visitor.say("hello there").count("<article") == 1
            assert visitor.say("how are you", large_clip).count("with voice and face") == 1
            if kept is not None:
                kept.append(server.count())

    def visit_at_once(count):
        threads = [threading.Thread(target=visit) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)

    def settled():
        found = server.count()
        return not any(found[name] for name in ("sessions", "visitors", "pages")) and found

    visit()
    before = wait_for(settled)
    assert before, server.count()
    within = []
    for _ in range(in_a_row):
        visit(within)
    visit_at_once(at_once)
    after = wait_for(settled)
    assert after, server.count()
    # The counts work: while a visitor is present, the session, its KV cache and the page are alive.
    for found in within:
        assert found["sessions"] >= 1 and found["caches"] >= 1 and found["pages"] >= 1
        assert found["tensor_bytes"] > before["tensor_bytes"]
    exact = before.keys() - {"objects", "resident"}
    assert {name: after[name] for name in exact} == {name: before[name] for name in exact}
    assert before["sessions"] == before["caches"] == before["replies"] == 0 and server.files() == []
    # A page kept by Gradio would have 500 objects; a visitor's kept clip would have two megabytes.
    assert after["objects"] - before["objects"] < 200 * (in_a_row + at_once)
    assert after["resident"] - before["resident"] < 32 * MEGABYTE


# ---------------------------------------------------------------------------------------- leaving, in this process


@pytest.fixture
def chatbot(model, processor):
    return Chatbot(NamedModel("tiny", model.eval(), processor), max_new_tokens=6)


@pytest.fixture
def serve(chatbot, monkeypatch, tmp_path):
    """A function (options of `Page`) -> a page in this process; its uploads are in `tmp_path / "uploads"`."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.1")
    from empathic.demo.app import Page

    pages = []

    def start(**options):
        pages.append(Page(chatbot, **{"limits": Limits(0.5, 5), **options}))
        pages[-1].launch(prevent_thread_lock=True, quiet=True)
        return pages[-1]

    yield start
    for page in pages:
        page.blocks.close(verbose=False)


def test_what_is_kept_of_a_visitor_goes_when_they_leave(serve, chatbot, clip, tmp_path):
    page = serve(keep_seconds=0.2)
    uploads, holder = tmp_path / "uploads", page.blocks.app.state_holder
    with Visitor(page.blocks.local_url) as stays:
        stays.say("hello there")
        stays.change("clip", stays.upload(clip))
        with Visitor(page.blocks.local_url) as leaves:
            leaves.say("hello there")
            for element in ("voice", "clip"):
                leaves.change(element, leaves.upload(clip))
            session = weakref.ref(chatbot._visitors[leaves.session].sessions[0])
            assert set(chatbot.visitors) == {stays.session, leaves.session} and len(files(uploads)) == 3
        assert wait_for(lambda: leaves.session not in holder.session_data)
        assert chatbot.visitors == [stays.session] and list(holder.session_data) == [stays.session]
        assert list(page.uploads) == [stays.session] and len(files(uploads)) == 1
        gc.collect()
        assert session() is None
        assert "2 memory vectors" in stays.say("how are you")  # the visitor who stays is remembered
    assert wait_for(lambda: not holder.session_data) and left(uploads) == []


def test_a_visitor_whose_connection_broke_finds_the_conversation(serve, chatbot):
    page = serve()  # keeps visitors' data for half an hour
    with Visitor(page.blocks.local_url) as visitor:
        visitor.say("hello there")
    assert wait_for(lambda: chatbot.visitors == [])
    with Visitor(page.blocks.local_url) as other:
        other.session = visitor.session
        assert other.say("how are you").count("<article") == 2


def test_leaving_in_the_middle_of_a_reply_ends_it(serve, chatbot):
    page = serve(keep_seconds=0.2)
    chatbot.max_new_tokens = 900

    def writing():
        return [thread for thread in threading.enumerate() if thread.name == "reply"]

    with Visitor(page.blocks.local_url) as visitor:
        messages = visitor.saying("hello there")
        while not writing():
            next(messages)
        messages.close()
    chatbot.max_new_tokens = 6
    assert wait_for(lambda: not writing() and not chatbot.visitors and not page.blocks.app.state_holder.session_data)
    with Visitor(page.blocks.local_url) as visitor:
        assert visitor.say("hello there").count("<article") == 1


def test_what_a_program_said_goes_when_it_closes(serve, chatbot):
    from gradio_client import Client

    page = serve()
    client = Client(page.blocks.local_url, verbose=False)
    client.predict("hello there", None, None, None, api_name="/reply")
    assert chatbot.visitors == [f"program {client.session_hash}"]
    client.close()
    assert wait_for(lambda: chatbot.visitors == [])


# ------------------------------------------------------------------------------------------------------ uploads


def test_the_same_file_of_two_visitors(serve, clip):
    url = serve().blocks.local_url
    with Visitor(url) as one, Visitor(url) as two, Visitor(url) as three:
        sent = [visitor.upload(clip) for visitor in (one, two, three)]
        for visitor, file in zip((one, two, three), sent, strict=True):
            visitor.change("clip", file)
        *_, last, _ = one.saying("hello", sent[0])  # the file is deleted once it is decoded
        assert "with voice and face" in str(last["output"])
        three.left.set()
        three.staying.join(60)
        *_, last, _ = two.saying("hello", sent[1])
        assert "with voice and face" in str(last["output"])


@pytest.mark.parametrize("ends", ["by the visitor", "by the clock"])
def test_an_upload_that_breaks_off_leaves_nothing(serve, ends, tmp_path):
    uploads = tmp_path / "uploads"
    url = serve(limits=Limits(0.5, 5, upload_seconds=600 if ends == "by the visitor" else 1)).blocks.local_url
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n' + "a" * 200_000
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        connection.sendall((head + part).encode())
        assert wait_for(lambda: files(uploads) and files(uploads)[0].stat().st_size > 100_000)
        if ends == "by the clock":
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    assert wait_for(lambda: not left(uploads))


def test_too_large_an_upload_gets_a_clear_message(serve, tmp_path):
    url = f"{serve().blocks.local_url}gradio_api/upload"
    sizes = [550_000, 700_000]  # the second is refused because of its content-length header
    for size in sizes:
        answer = httpx.post(url, files={"files": b"a" * size})
        assert answer.status_code == 413 and "the limit is 0.5 MB" in answer.text
    many = httpx.post(url, files=[("files", (f"{i}.mp4", b"a" * 200_000)) for i in range(9)])
    assert many.status_code == 413
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        head = f"POST {place.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2 << 30}\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")  # before the file is sent
    assert httpx.post(url, data={"files": "a"}).status_code == 400
    assert left(tmp_path / "uploads") == []


def chunks(size):
    """The body of an upload whose length is not announced."""
    yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    for _ in range(size // 100_000):
        yield b"a" * 100_000
    yield b"\r\n--x--\r\n"


def test_the_limit_holds_for_bodies_without_a_length(serve, tmp_path):
    url = f"{serve().blocks.local_url}gradio_api/"
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(f"{url}upload", content=chunks(400_000), headers=form).status_code == 200
    assert len(files(tmp_path / "uploads")) == 1

    def two():  # each of them within the limit
        for _ in range(2):
            yield from list(chunks(400_000))[:-1]
            yield b"\r\n"
        yield b"--x--\r\n"

    for body in (chunks(5_000_000), two()):
        answer = httpx.post(f"{url}upload", content=body, headers=form)
        assert answer.status_code == 413 and "the limit is 0.5 MB" in answer.text
    assert len(files(tmp_path / "uploads")) == 1
    words = (b'"' + b"a" * 1_000_000 if i == 0 else b"a" * 1_000_000 for i in range(40))
    answer = httpx.post(f"{url}call/reply", content=words, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_the_page_fetches_no_url(serve, tmp_path):
    """Neither as a clip nor as a saved conversation: the server asked for would see the request."""
    page, asked = serve(), []
    with socket.create_server(("127.0.0.1", 0)) as other, Visitor(page.blocks.local_url) as visitor:
        threading.Thread(target=lambda: asked.append(other.accept()), daemon=True).start()
        link = {"path": f"http://127.0.0.1:{other.getsockname()[1]}/a.json", "meta": {"_type": "gradio.FileData"}}
        for element, event in (("load", "upload"), ("clip", "change"), ("voice", "change"), ("clear", "click")):
            found = visitor.event(element, event)
            body = {"data": [link] * len(found["inputs"]), "fn_index": found["id"], "session_hash": visitor.session}
            answer = visitor.http.post(f"{visitor.api}run/predict", json=body)
            assert answer.status_code == 500 and "URLs are not fetched" in answer.text
        assert asked == [] and left(tmp_path / "uploads") == []


def test_only_the_names_of_the_page_are_answered(serve, monkeypatch):
    from empathic.hosts import host_names, is_known_host

    url = serve().blocks.local_url
    port = urlsplit(url).port
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"localhost:{port}", 200),
        (f"[::1]:{port}", 200),
        (f"192.168.0.7:{port}", 200),
        (f"{socket.gethostname()}:{port}", 200),
        ("evil.example", 421),
        (f"evil.example:{port}", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("a.gradio.live", 421),
        ("me-demo.hf.space", 421),
        ("", 421),
    ):
        answer = httpx.get(f"{url}config", headers={"Host": host})
        assert answer.status_code == status, host
        assert status == 200 or "--allowed_hosts" in answer.text
    assert httpx.post(f"{url}gradio_api/upload", headers={"Host": "evil.example"}).status_code == 421

    def known(host, *options):
        return is_known_host(host, host_names(*options))

    assert known("a.gradio.live", None, True) and known("chat.example.org:443", None, False, ["Chat.example.org"])
    assert known("anything", None, False, ["*"])
    monkeypatch.setenv("SPACE_ID", "me/demo")
    monkeypatch.setenv("SPACE_HOST", "me-demo.hf.space,demo.example.org")
    assert known("me-demo.hf.space", None) and known("demo.example.org", None) and not known("evil.example", None)


def test_a_clip_is_read_while_others_are_answered(serve, clip):
    url, order = serve().blocks.local_url, []
    with Visitor(url) as slow, Visitor(url) as quick:
        started = threading.Event()

        def send():
            for message in slow.saying("hello there", slow.upload(clip)):
                if message["msg"] == "process_starts":
                    started.set()
            order.append("clip")

        thread = threading.Thread(target=send)
        thread.start()
        assert started.wait(30)
        quick.say("hello there")  # reading a clip takes longer than this: it starts a process
        order.append("text")
        thread.join(60)
    assert order == ["text", "clip"]


# ------------------------------------------------------------------------------------------------- the server's folder


def test_folders_of_dead_servers_are_swept_and_no_others(tmp_path):
    code = "import sys, time; from pathlib import Path; from empathic.demo.server_folder import ServerFolder; "
    code += "f = ServerFolder(Path(sys.argv[1])); (f.path / 'clip').write_text('x'); print(f.path, flush=True); "
    code += "sys.stdin.read()"

    def server():
        process = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return process, tmp_path / process.stdout.readline().strip()

    killed, running, ending = server(), server(), server()
    own = ServerFolder(tmp_path)
    elsewhere, other = tmp_path / "elsewhere", tmp_path / f"{PREFIX}file"
    elsewhere.mkdir()
    (elsewhere / "clip").write_text("x")
    other.write_text("x")
    link = tmp_path / f"{PREFIX}link"
    link.symlink_to(elsewhere)
    killed[0].kill()
    killed[0].wait()
    ending[0].stdin.close()
    assert ending[0].wait(30) == 0 and not ending[1].exists()  # deleted when its process ends
    assert (killed[1] / "clip").exists()
    sweep(tmp_path)
    assert not killed[1].exists() and (running[1] / "clip").exists() and own.path.exists()
    assert (elsewhere / "clip").exists() and other.exists() and link.is_symlink()
    place = own.path
    del own
    assert not place.exists()
    running[0].stdin.close()
    running[0].wait(30)
    for process, _ in (killed, running, ending):
        process.stdin.close()
        process.stdout.close()


@pytest.mark.slow  # starts the command three times
def test_nothing_of_a_visitor_is_left_when_the_command_ends(base_folder, clip, tmp_path):
    row = {"dialogue_id": "d", "turn": 0, "speaker": "user", "text": "hello", "video": clip}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    uploads, temporary = tmp_path / "uploads", tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(uploads), "TMPDIR": str(temporary)}
    command = [sys.executable, "-u", "-m", "empathic.cli", "demo", base_folder, "--examples", str(tmp_path)]

    def run(number):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = ""
        while not (address := re.search(r"http://\S+", line)):
            line = process.stdout.readline()
            assert line, "the server ended"
        with open(clip, "rb") as file:
            httpx.post(f"{address[0]}/gradio_api/upload", files={"files": file}).raise_for_status()
        assert len(files(uploads)) == len(files(temporary)) == 1  # the upload, and the clip of the example
        process.send_signal(number)
        assert process.wait(30) is not None
        process.stdout.close()
        return process.returncode

    assert run(signal.SIGKILL) == -signal.SIGKILL and len(files(uploads)) == len(files(temporary)) == 1
    assert run(signal.SIGTERM) == 128 + signal.SIGTERM and files(uploads) == files(temporary) == []
    assert run(signal.SIGINT) == 0 and files(uploads) == files(temporary) == []
