"""A page in this process, for the tests that need no browser; and Spaces in processes of their own."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (extra `demo`).")


class Page:
    """
    A running page.

    Attributes:
        url: its address, without a slash at the end.
        service: what its routes share.
    """

    def __init__(self, model, compare, options):
        import uvicorn

        from empathic.demo.app import add_page, build_service
        from empathic.hosts import host_names
        from empathic.serve.app import build_app
        from empathic.serve.server import address_of, listen

        self.service = build_service(model, compare, options, "cpu", host_names("127.0.0.1"))
        app = build_app(self.service)
        add_page(app, self.service, options, compare)
        listening = listen("127.0.0.1", 0)
        self.url = address_of(listening)
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join(60)


@pytest.fixture
def serve_page(base_folder):
    """A function (compare, **options of `PageOptions`) that starts a `Page`; all are closed after the test."""
    from empathic.demo.app import PageOptions

    pages = []

    def start(compare=None, **options):
        options = {"megabytes": 0.5, "seconds": 5, "max_new_tokens": 6, **options}
        pages.append(Page(base_folder, compare, PageOptions(**options)))
        return pages[-1]

    yield start
    for page in pages:
        page.close()


@pytest.fixture
def run_space(tmp_path, hub):
    """
    A context manager (files of a Space, port, a text) that runs the Space from its files, with this port, and gives
    what it has printed up to the line with the text.
    """

    @contextmanager
    def run(files, port, until):
        folder = tmp_path / "space"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.replace(b"port=7860", f"port={port}".encode()) if name == "app.py" else content)
        code = "import runpy, empathic.chat; print(empathic.chat.__file__, flush=True); "
        code += "runpy.run_path('app.py', run_name='__main__')"
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            printed = ""
            while until not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            assert printed.startswith(str(folder))  # it needs no installed package
            yield printed
        finally:
            process.kill()
            process.wait(60)
            process.stdout.close()

    return run
