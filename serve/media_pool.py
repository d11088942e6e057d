"""Decode clips in separate processes with a time limit."""

import io
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, cast

import numpy as np

from ..clip_limits import SAMPLING_RATE
from ..media_empathic import MediaError


class _Worker:
    """A decoding process, started when it is needed."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        if self.process is None or self.process.poll() is not None:
            path = os.pathsep.join(place for place in sys.path if place)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "empathic.serve.media_worker", str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        return self.process

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with suppress(OSError):  # there may be something left to write
                    cast(BinaryIO, stream).close()
            self.process = None

    def decode(self, data: bytes, asked: dict) -> dict[str, np.ndarray] | None:
        """Return the arrays of a clip; None if the process died. Raises a MediaError for a clip that is refused."""
        process = self.start()
        to, back = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
        try:
            to.write(json.dumps({"size": len(data), **asked}).encode() + b"\n")
            to.write(data)
            to.flush()
            line = back.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
            if answer is None:
                return None
            if "error" in answer:
                raise MediaError(answer["error"])
            content = back.read(answer["size"])
        except (OSError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            return None
        if len(content) < answer["size"]:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {kind: arrays[kind] for kind in arrays}


class MediaPool:
    """
    Processes that decode clips. Thread-safe.

    Args:
        workers: the number of processes.
        seconds: the maximum time for a clip; a process that needs longer is ended and replaced.
        num_frames: the number of frames of a video.
        max_seconds: the maximum length of a clip.
        on_restart: called when a process was ended or has died.
    """

    def __init__(
        self,
        workers: int,
        seconds: float,
        num_frames: int,
        max_seconds: float,
        on_restart: Callable[[], None] = lambda: None,
    ):
        self.seconds, self.on_restart = seconds, on_restart
        self._asked = {"num_frames": num_frames, "max_seconds": max_seconds}
        self._all = [_Worker(seconds) for _ in range(workers)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._all:
            worker.start()
            self._free.put(worker)

    def decode(self, data: bytes, name: str) -> dict[str, dict]:
        """
        Decode a clip.

        Args:
            data: the bytes of a media file.
            name: the clip's name in errors.

        Returns:
            content items by kind, `audio` and `video`, as far as the clip has them.

        Raises:
            MediaError: for a clip that cannot be used.
        """
        worker = self._free.get()
        late = threading.Event()

        def end():
            late.set()
            if worker.process is not None:
                worker.process.kill()

        timer = threading.Timer(self.seconds, end)
        timer.start()
        broken = True
        try:
            arrays = worker.decode(data, {**self._asked, "name": name})
            broken = arrays is None
        except MediaError:
            broken = False
            raise
        finally:
            timer.cancel()
            if broken or late.is_set():
                worker.kill()
                self.on_restart()
            self._free.put(worker)
        if late.is_set():
            raise MediaError(f"{name} could not be read within {self.seconds:g} s. Export it again, or send less.")
        if arrays is None:
            raise MediaError(f"{name} cannot be read: it is damaged or needs too much memory. Export it again.")
        rate = {"audio": {"sampling_rate": SAMPLING_RATE}, "video": {}}
        return {kind: {kind: array, **rate[kind]} for kind, array in arrays.items()}

    def close(self) -> None:
        """End all processes."""
        for worker in self._all:
            worker.kill()
