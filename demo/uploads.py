"""
Uploads of visitors: checked and decoded in a process of their own, so that no file can hang or fill the server.

    python -m empathic.demo.uploads FILE OUT NUM_FRAMES MAX_SECONDS DECODE_SECONDS

is that process. It writes what the model takes of FILE (some frames, the sound at 16 kHz) to OUT, an npz file.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from empathic.media_empathic import MediaError, _open, probe, read_audio, read_video

SAMPLING_RATE = 16000
SHORTEST_SIDE = 512  # pixels of a kept frame, more than any encoder here looks at
MEMORY = 4 << 30  # bytes of address space that decoding may take
REFUSED = 3  # exit status: the message is on stdout


class UploadError(ValueError):
    """What is wrong with what a visitor sent, in words for the visitor."""


@dataclass(frozen=True)
class Limits:
    """
    What a visitor may send in a turn.

    Attributes:
        megabytes: of a file.
        seconds: of a clip.
        characters: of a text.
        decode_seconds: what reading a file may take.
        upload_seconds: what sending a file may take.
    """

    megabytes: float = 32
    seconds: float = 60
    characters: int = 4000
    decode_seconds: float = 30
    upload_seconds: float = 600

    def check_text(self, text: str) -> None:
        """Raises `UploadError` for a text that is too long."""
        if len(text) > self.characters:
            raise UploadError(
                f"Your text has {len(text):,} characters; {self.characters:,} are the most that fit in a turn. "
                "Shorten it and send it again."
            )


def read_upload(path: str, kinds: Sequence[str], num_frames: int, limits: Limits) -> dict[str, dict]:
    """
    What the model takes of a file.

    Args:
        path: the file.
        kinds: `audio`, `video` or both: what is wanted of it.
        num_frames: of the picture.
        limits: what is allowed.

    Returns:
        content items of a message by their kind, decoded: `{"audio", "sampling_rate"}` and `{"video"}` with frames
        (frames, height, width, 3) uint8. A kind that the file does not hold is absent.

    Raises:
        UploadError: for a file that is gone, too large, too long, damaged, or that takes too long to read.
    """
    name = Path(path).name
    try:
        size = os.path.getsize(path)
    except OSError:
        raise UploadError(f"{name} is no longer on the server. Please upload it again.") from None
    if size > limits.megabytes * 1e6:
        raise UploadError(
            f"{name} has {size / 1e6:,.1f} MB; {limits.megabytes:g} MB are the most. Send a shorter or smaller clip."
        )
    with tempfile.TemporaryDirectory(prefix="empathic-") as folder:
        out = os.path.join(folder, "clip.npz")
        numbers = map(str, (num_frames, limits.seconds, limits.decode_seconds))
        command = [sys.executable, "-m", "empathic.demo.uploads", path, out, *numbers]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # each of its threads takes address space
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=limits.decode_seconds
            )
        except subprocess.TimeoutExpired:
            raise UploadError(
                f"{name} could not be read within {limits.decode_seconds:g} s. Record or export it again."
            ) from None
        if ended.returncode == REFUSED:
            raise UploadError(ended.stdout.decode("utf-8", "replace").strip())
        if ended.returncode != 0:
            raise UploadError(f"{name} cannot be read: it is damaged or needs too much memory. Export it again.")
        with np.load(out, allow_pickle=False) as arrays:
            held = {kind: arrays[kind] for kind in ("audio", "video") if kind in arrays}
    found = {kind: array for kind, array in held.items() if kind in kinds}
    if not found:
        wanted = {"audio": "sound", "video": "picture"}
        raise UploadError(f"{name} holds no {' and no '.join(wanted[kind] for kind in kinds)}.")
    return {
        kind: {kind: array, **({"sampling_rate": SAMPLING_RATE} if kind == "audio" else {})}
        for kind, array in found.items()
    }


def discard(path: str | None, folder: str) -> None:
    """Deletes an upload, if it lies below `folder`, and its own folders there where these are empty then."""
    if path is None:
        return
    place, root = Path(path).resolve(), Path(folder).resolve()
    if root not in place.parents:
        return
    with suppress(OSError):
        place.unlink()
        for parent in place.parents:
            if parent == root:
                break
            parent.rmdir()


# ---------------------------------------------------------------------------------------- in the process of its own


def _seconds(path: str) -> float:
    """How long a clip is by its packets: recordings of browsers have no length in the header, and headers may lie."""
    first, last = {}, {}
    with _open(path, path) as container:
        for packet in container.demux():
            if packet.pts is None or packet.stream.type not in ("audio", "video"):
                continue
            start, end = (float(t * packet.time_base) for t in (packet.pts, packet.pts + (packet.duration or 0)))
            index = packet.stream.index
            first[index] = min(first.get(index, start), start)
            last[index] = max(last.get(index, end), end)
    return max((last[index] - first[index] for index in last), default=0.0)


def _smaller(frames: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = SHORTEST_SIDE / min(height, width)
    if scale >= 1:
        return frames
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def _decode(path: str, num_frames: int, max_seconds: float) -> dict[str, np.ndarray]:
    name = Path(path).name
    info = probe(path)
    # Long clips end here, before all of their packets are read.
    seconds = info.duration if (info.duration or 0) > max_seconds + 1 else _seconds(path)
    if seconds > max_seconds + 1:  # a recording is seldom cut at the second
        raise UploadError(f"{name} is {seconds:,.0f} s long; {max_seconds:g} s are the most. Send a shorter clip.")
    arrays = {}
    if info.has_audio:
        arrays["audio"] = read_audio(path, SAMPLING_RATE, max_seconds + 1)
    if info.has_video:
        arrays["video"] = _smaller(read_video(path, num_frames))
    if not arrays:
        raise UploadError(f"{name} holds neither sound nor picture. Send an audio or video file.")
    return arrays


def main(arguments: list[str]) -> int:
    """The process; returns its exit status."""
    import resource

    path, out, num_frames, max_seconds, decode_seconds = arguments
    limit = int(float(decode_seconds)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        arrays = _decode(path, int(num_frames), float(max_seconds))
    except (MediaError, UploadError) as error:
        print(str(error).replace(path, Path(path).name))
        return REFUSED
    np.savez(out, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
