"""
The demo's page in a separate process that reports its live objects, and visitors who talk to it like a browser.

    python tests/demo/demo_server.py MODEL

is that process. It prints its address, and answers each line on stdin with a line of JSON, see `count`.
"""

import json
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx


class DemoServer:
    """
    A page in a separate process, until the `with` block ends.

    Attributes:
        url: address of the page, with a slash at the end.
        uploads: folder of the page's uploads.
    """

    def __init__(self, model: str, folder: Path):
        self.folder, self.uploads = folder, folder / "uploads"
        for place in (self.uploads, folder / "tmp"):
            place.mkdir(parents=True)
        # Gradio looks for visitors who left at each of these intervals, in seconds.
        environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "GRADIO_HEARTBEAT_INTERVAL": "0.2"}
        environment |= {"GRADIO_TEMP_DIR": str(self.uploads), "MALLOC_ARENA_MAX": "2"}
        command = [sys.executable, "-u", __file__, model]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = self._line()

    def __enter__(self) -> "DemoServer":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait(30)
        self.process.stdin.close()
        self.process.stdout.close()

    def _line(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, "the server ended"
        return line

    def count(self) -> dict:
        """Return the counts of live objects in the process."""
        self.process.stdin.write("count\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def files(self) -> list[str]:
        """Return the uploads and the temporary files of the process."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


class Visitor:
    """A visitor with the page open in a browser, who leaves at the end of the `with` block."""

    def __init__(self, url: str):
        self.api, self.session = f"{url}gradio_api/", uuid.uuid4().hex
        self.http = httpx.Client(timeout=120)
        self.config = self.http.get(f"{url}config").json()
        parts = self.config["components"]
        self.ids = {part["props"]["elem_id"]: part["id"] for part in parts if part["props"].get("elem_id")}

    def __enter__(self) -> "Visitor":
        self.left, there = threading.Event(), threading.Event()

        def stay():
            with httpx.stream("GET", f"{self.api}heartbeat/{self.session}", timeout=None) as beats:
                for _ in beats.iter_lines():
                    there.set()
                    if self.left.is_set():
                        return

        self.staying = threading.Thread(target=stay)
        self.staying.start()
        assert there.wait(60)
        return self

    def __exit__(self, *_) -> None:
        self.left.set()
        self.staying.join(60)
        self.http.close()

    def upload(self, path: str) -> dict:
        """Upload a file; return its value in a component."""
        name = Path(path).name
        with open(path, "rb") as file:
            (place,) = self.http.post(f"{self.api}upload", files={"files": (name, file)}).raise_for_status().json()
        return {"path": place, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def event(self, element: str, event: str) -> dict:
        return next(each for each in self.config["dependencies"] if [self.ids[element], event] in each["targets"])

    def change(self, element: str, file: dict) -> None:
        """Show a file in a component, as a page does after the upload."""
        body = {"data": [file], "fn_index": self.event(element, "change")["id"], "session_hash": self.session}
        self.http.post(f"{self.api}run/predict", json=body).raise_for_status()

    def messages(self, element: str, event: str, *data) -> Iterator[dict]:
        """Trigger an event and stream the server's messages; Gradio fills in the states of the page."""
        body = {"data": list(data), "fn_index": self.event(element, event)["id"], "session_hash": self.session}
        self.http.post(f"{self.api}queue/join", json=body).raise_for_status()
        with self.http.stream("GET", f"{self.api}queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def saying(self, text: str, clip: dict | None = None) -> Iterator[dict]:
        """Press Send and stream the server's messages; `clip` is a result of `upload`."""
        return self.messages("send", "click", text, None, clip, [], None, None, None)

    def say(self, text: str, clip: str | None = None) -> str:
        """Complete a turn, optionally with a file; return the conversation that the page shows afterwards."""
        last = [each for each in self.saying(text, clip and self.upload(clip)) if each["msg"] == "process_completed"]
        assert len(last) == 1 and last[0]["success"], last
        shown = dict(zip(self.event("send", "click")["outputs"], last[0]["output"]["data"], strict=True))
        return shown[self.ids["past"]]


# -------------------------------------------------------------------------------------------------- server process


def count() -> dict[str, int]:
    """Count live objects of some kinds, tensors, threads that generate a reply, open files and resident bytes."""
    import ctypes
    import gc

    import torch
    from gradio.state_holder import SessionState
    from transformers import DynamicCache

    from empathic.chat import ChatSession
    from empathic.demo.session import ShownConversation
    from empathic.demo.session import Visitor as Kept
    from empathic.memory_empathic import MemoryState

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    everything = gc.get_objects()  # since the start, see `gc.freeze` below
    types = Counter(map(type, everything))
    kinds = {"sessions": ChatSession, "caches": DynamicCache, "states": MemoryState, "visitors": Kept}
    kinds |= {"conversations": ShownConversation, "pages": SessionState}
    tensors = [each for each in everything if issubclass(type(each), torch.Tensor)]
    opened = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            opened.append(os.readlink(link))
    return {
        **{name: types[kind] for name, kind in kinds.items()},
        "objects": len(everything),
        "tensors": len(tensors),
        "tensor_bytes": sum(each.numel() * each.element_size() for each in tensors),
        "replies": sum(thread.name == "reply" for thread in threading.enumerate()),
        "files": sum(path.startswith("/") and not path.startswith("/dev") for path in opened),
        "resident": int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024,
    }


def main(model: str) -> None:
    import gc

    import torch

    torch.set_num_threads(1)
    from empathic.demo.app import Page
    from empathic.demo.session import Chatbot, NamedModel
    from empathic.demo.uploads import Limits

    page = Page(Chatbot(NamedModel.from_pretrained(model), max_new_tokens=6), Limits(1, 5), keep_seconds=0.5)
    page.launch(prevent_thread_lock=True, quiet=True)
    gc.collect()
    gc.freeze()  # so that half a million objects of the libraries are not counted each time
    print(page.blocks.local_url, flush=True)
    for _ in sys.stdin:
        print(json.dumps(count()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
