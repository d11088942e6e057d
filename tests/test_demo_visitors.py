"""Visitors of the demo come, send files and leave: nothing of them stays, and none takes another's."""

import gc
import os
import socket
import sys
import threading
import time
import weakref
from urllib.parse import urlsplit

import httpx
import pytest

from empathic.demo.session import Chatbot, Checkpoint
from empathic.demo.uploads import Limits

pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`).")

sys.path.append(os.path.dirname(__file__))
from demo_server import DemoServer, Visitor

MEGABYTE = 1 << 20


def wait_for(what, seconds=30):
    """The first true answer of `what`, or the last one."""
    end = time.monotonic() + seconds
    while not (answer := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------ memory, in a server of its own process


@pytest.fixture(scope="module")
def large_clip(tmp_path_factory, write_media, grey_frames, tone):
    """A file of some kilobytes that is two megabytes once it is read."""
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
    # While a visitor is there, their session, its keys and values and their page are alive: the counts do count.
    for found in within:
        assert found["sessions"] >= 1 and found["caches"] >= 1 and found["pages"] >= 1
        assert found["tensor_bytes"] > before["tensor_bytes"]
    exact = before.keys() - {"objects", "resident"}
    assert {name: after[name] for name in exact} == {name: before[name] for name in exact}
    assert before["sessions"] == before["caches"] == before["replies"] == 0 and server.files() == []
    # A page that Gradio keeps has 500 objects; a visitor whose last clip is kept takes two megabytes.
    assert after["objects"] - before["objects"] < 200 * (in_a_row + at_once)
    assert after["resident"] - before["resident"] < 32 * MEGABYTE


# ---------------------------------------------------------------------------------------- leaving, in this process


@pytest.fixture
def chatbot(model, processor):
    return Chatbot(Checkpoint("tiny", model.eval(), processor), max_new_tokens=6)


@pytest.fixture
def serve(chatbot, monkeypatch, tmp_path):
    """A function (options of `Page`) -> a page in this process; its uploads lie in `tmp_path / "uploads"`."""
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
        assert "2 memory vectors" in stays.say("how are you")  # who stays, is remembered
    assert wait_for(lambda: not holder.session_data) and list(uploads.iterdir()) == []


def test_a_visitor_whose_connection_broke_finds_the_conversation(serve, chatbot):
    page = serve()  # keeps it for half an hour
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
        *_, last, _ = one.saying("hello", sent[0])  # reading it deletes it
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
    assert wait_for(lambda: not list(uploads.iterdir()))


def test_too_large_an_upload_gets_a_clear_message(serve, tmp_path):
    url = f"{serve().blocks.local_url}gradio_api/upload"
    sizes = [550_000, 700_000]  # the second is refused by what the request says of itself
    for size in sizes:
        answer = httpx.post(url, files={"files": b"a" * size})
        assert answer.status_code == 413 and "0.5 MB are the most" in answer.text
    many = httpx.post(url, files=[("files", (f"{i}.mp4", b"a" * 200_000)) for i in range(9)])
    assert many.status_code == 413
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        head = f"POST {place.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2 << 30}\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")  # before the file comes
    assert httpx.post(url, data={"files": "a"}).status_code == 400
    assert list((tmp_path / "uploads").iterdir()) == []
