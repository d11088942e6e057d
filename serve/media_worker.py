"""
A process that decodes clips of unknown origin, one after the other, so that no clip can hang or crash the server.

    python -m empathic.serve.media_worker DECODE_SECONDS

reads, for each clip, a line of JSON and the bytes of the file from stdin, and writes a line of JSON and an npz file to
stdout. No clip is ever written to a disk. The process ends when stdin is closed.
"""

import io
import json
import resource
import signal
import sys
import time

import numpy as np

from ..clip_limits import read_clip
from ..media_empathic import MediaError

MEMORY = 4 << 30  # limit of the process's address space in bytes


def main(arguments: list[str]) -> int:
    """Decode clips until stdin is closed; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends us
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seconds, hard = float(arguments[0]), resource.getrlimit(resource.RLIMIT_CPU)[1]
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        data = sys.stdin.buffer.read(asked["size"])
        # If the server is killed meanwhile, nothing else ends a decoder that hangs.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 2, hard))
        buffer = io.BytesIO()
        try:
            arrays: dict = read_clip(data, asked["name"], asked["num_frames"], asked["max_seconds"])
            np.savez(buffer, **arrays)
            answer = {"size": buffer.tell()}
        except MediaError as error:
            answer = {"error": str(error).replace(f"<{len(data)} bytes of media>", asked["name"])}
        except MemoryError:
            answer = {"error": f"{asked['name']} needs too much memory. Send a smaller clip."}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        if "size" in answer:
            sys.stdout.buffer.write(buffer.getbuffer())
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
