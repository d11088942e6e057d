"""A small web server that sends raters their pages and clips, and saves their answers."""

import json
import re
import shutil
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .answers import AnswerStore
from .build import ANSWERS, LINKS, MEDIA, RATERS
from .pages import POLICY, asset, served_page
from .replies import StudyError

TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}
LARGEST = 4096  # maximum size of an answer in bytes
RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


class StudyServer(ThreadingHTTPServer):
    """
    The server of a study. It never reads the study's key, and opens only files that existed when it started.

    Args:
        folder: the study folder written by `build`.
        host, port: address to listen on; port 0 for any free port.

    Raises:
        StudyError: if the folder is not a study, or the address cannot be used.
    """

    daemon_threads = True

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 8000):
        folder = Path(folder)
        if not (folder / RATERS).is_dir():
            raise StudyError(f"{folder}: not a study. Build one with `empathic study build`.")
        studies = {
            path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / RATERS).glob("*.json"))
        }
        self.answers = AnswerStore(folder / ANSWERS, studies)
        self.answers.folder.mkdir(exist_ok=True)
        self.media = {path.name: path for path in (folder / MEDIA).iterdir() if path.suffix in TYPES}
        self.assets = {
            "/page.js": (asset("page.js"), "text/javascript"),
            "/page.css": (asset("page.css"), "text/css"),
        }
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise StudyError(f"{host}:{port}: cannot listen there ({error}). Use another --port.") from None

    def links(self) -> list[str]:
        """The URL of each rater, in the order of `links.txt`."""
        host, port = self.server_address[:2]
        lines = (self.answers.folder.parent / LINKS).read_text(encoding="utf-8").splitlines()
        codes = [Path(line.split("\t")[1]).stem for line in lines]
        return [f"http://{host}:{port}/r/{code}" for code in codes]

    def handle_error(self, request, client_address):
        """Ignore connection errors: a browser may disconnect in the middle of a clip."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The handler of a request. URLs are only looked up, never converted to file paths."""

    server: StudyServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "empathic", ""
    timeout = 60  # seconds without data from the browser

    def do_GET(self):
        path = self.path.partition("?")[0]
        place, _, name = path.removeprefix("/").partition("/")
        if path in self.server.assets:
            self._send(HTTPStatus.OK, *self.server.assets[path])
        elif place == "r" and name in self.server.answers.studies:
            study = self.server.answers.studies[name]
            self._send(HTTPStatus.OK, served_page(study, self.server.answers.latest(name)), "text/html")
        elif place == "media" and name in self.server.media:
            self._send_clip(self.server.media[name])
        elif path == "/":
            self._send(HTTPStatus.OK, "Please open the link that you were given.", "text/plain")
        else:
            self._send(HTTPStatus.NOT_FOUND, "There is no such page. Please check the link.", "text/plain")

    do_HEAD = do_GET

    def do_POST(self):
        parts = self.path.partition("?")[0].split("/")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST or self.headers.get("Transfer-Encoding"):
            self.close_connection = True  # the body is not read
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "This is too long for an answer.", "text/plain")
            return
        body = self.rfile.read(int(length))
        if len(parts) != 4 or parts[1] != "r" or parts[3] != "answers" or parts[2] not in self.server.answers.studies:
            self._send(HTTPStatus.NOT_FOUND, "There is no such rater.", "text/plain")
            return
        # Pages of other sites cannot send this type without a preflight request, which is never answered.
        if self.headers.get_content_type() != "application/json":
            self._send(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Answers are application/json.", "text/plain")
            return
        try:
            self.server.answers.add(parts[2], json.loads(body))
        except (StudyError, ValueError, RecursionError) as error:
            self._send(HTTPStatus.BAD_REQUEST, str(error), "text/plain")
        except OSError as error:
            print(f"An answer of {parts[2]} could not be saved: {error}", file=sys.stderr)
            self._send(
                HTTPStatus.INTERNAL_SERVER_ERROR, "The answer could not be written. Trying again …", "text/plain"
            )
        else:
            self._send(HTTPStatus.OK, "saved", "text/plain")

    def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
        body = text.encode()
        self._head(status, f"{kind}; charset=utf-8", len(body), {"Cache-Control": "no-store"})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int, more: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the URL contains the rater's code
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_clip(self, path: Path) -> None:
        """Send a clip, or the requested byte range (RFC 9110, 14), which players need to seek."""
        size = path.stat().st_size
        start, end, status = 0, size, HTTPStatus.OK
        match = RANGE.fullmatch(self.headers.get("Range", ""))
        if match and any(match.groups()):
            first, last = match.groups()
            start = int(first) if first else max(size - int(last), 0)
            end = min(int(last) + 1, size) if first and last else size
            if start >= end:
                more = {"Content-Range": f"bytes */{size}"}
                self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, TYPES[path.suffix], 0, more)
                return
            status = HTTPStatus.PARTIAL_CONTENT
        more = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=86400"}
        if status == HTTPStatus.PARTIAL_CONTENT:
            more["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._head(status, TYPES[path.suffix], end - start, more)
        if self.command != "HEAD":
            with open(path, "rb") as file:
                file.seek(start)
                if start == 0 and end == size:
                    shutil.copyfileobj(file, self.wfile)
                else:
                    left = end - start
                    while left and (piece := file.read(min(left, 1 << 16))):
                        self.wfile.write(piece)
                        left -= len(piece)

    def log_message(self, format, *args):
        """Log nothing: URLs contain the raters' codes."""


def serve(folder: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Print the raters' links, and serve the study until interrupted."""
    with StudyServer(folder, host, port) as server:
        print(f"The study {folder} is open; Ctrl-C closes it. Answers go to {server.answers.folder}.")
        for number, link in enumerate(server.links(), 1):
            print(f"  rater {number}: {link}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Closed.")
