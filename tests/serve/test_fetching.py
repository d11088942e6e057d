"""Downloads are bounded and never reach a private address."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from empathic.serve import fetching
from empathic.serve.fetching import FetchError, fetch


@pytest.fixture
def web():
    """A web server of this machine; yields its URL and the requested paths."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            if self.path == "/slow":
                try:
                    for _ in range(200):
                        self.wfile.write(b"H")
                        self.wfile.flush()
                        time.sleep(0.05)
                except OSError:
                    pass
                return
            self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()


@pytest.fixture
def local_is_public(monkeypatch):
    monkeypatch.setattr(fetching, "_is_public", lambda address: str(address) == "127.0.0.1")


def test_a_file_is_downloaded(web, local_is_public):
    url, asked = web
    assert fetch(f"{url}/a?b=c", 1000, 10) == b"x" * 1000 and asked == ["/a?b=c"]
    assert fetch(f"{url}/to//a", 1000, 10) == b"x" * 1000


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "localhost", "[::1]", "0.0.0.0", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254",
        "[::ffff:127.0.0.1]", "[fe80::1]", "[fc00::1]", "2130706433", "0x7f000001", "127.1", "224.0.0.1", "100.64.0.1",
    ],
)  # fmt: skip
def test_private_addresses_are_refused(web, address):
    url, asked = web
    port = url.rpartition(":")[2]
    with pytest.raises(FetchError, match=r"not a public address|not known"):
        fetch(f"http://{address}:{port}/", 1000, 5)
    assert not asked


def test_a_redirect_to_a_private_address_is_refused(web, local_is_public):
    url, asked = web
    with pytest.raises(FetchError, match="not a public address"):
        fetch(f"{url}/to/http://127.0.0.2/", 1000, 5)
    with pytest.raises(FetchError, match="no http or https URL"):
        fetch(f"{url}/to/file:///etc/passwd", 1000, 5)
    with pytest.raises(FetchError, match="redirected too often"):
        fetch(f"{url}/to//to//to//to//to//a", 1000, 5)
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("path", "most", "message"),
    [("/a", 999, "has more than"), ("/missing", 1000, "status 404"), ("/slow", 1000, "could not be downloaded")],
)
def test_what_is_too_large_missing_or_slow_is_refused(web, local_is_public, path, most, message):
    before = time.monotonic()
    with pytest.raises(FetchError, match=message):
        fetch(f"{web[0]}{path}", most, 1)
    assert time.monotonic() - before < 8


@pytest.mark.parametrize(
    "url", ["", "clip.mp4", "/etc/passwd", "file:///etc/passwd", "ftp://a/b", "http://", "http://[", "http://a:b@c/", "http://a:x/"]
)  # fmt: skip
def test_what_is_no_url_is_refused(url):
    with pytest.raises(FetchError):
        fetch(url, 1000, 1)
