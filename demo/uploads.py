"""
Check and decode visitors' uploads in a separate process, so that no file can hang the server or exhaust its memory.

    python -m empathic.demo.uploads FILE NUM_FRAMES MAX_SECONDS DECODE_SECONDS

is that process. It prints the model's inputs from FILE (some frames, the audio at 16 kHz) as an npz file, so that
nothing is left on the disk if it is killed.
"""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..clip_limits import SAMPLING_RATE, read_clip
from ..media_empathic import MediaError

SHORTEST_SIDE = 512  # pixels; frames are downscaled to it, still above the input size of our encoders
MEMORY = 4 << 30  # limit of the decoding process's address space, in bytes
REFUSED = 3  # exit status for a refused file: the message is on stdout


class UploadError(ValueError):
    """An upload is invalid. The message is for the visitor."""


@dataclass(frozen=True)
class Limits:
    """
    Limits on what a visitor may send in a turn.

    Attributes:
        megabytes: maximum size of a file.
        seconds: maximum length of a clip.
        characters: maximum length of a text.
        decode_seconds: maximum time for decoding a file.
        upload_seconds: maximum time for uploading a file.
    """

    megabytes: float = 32
    seconds: float = 60
    characters: int = 4000
    decode_seconds: float = 30
    upload_seconds: float = 600

    def check_text(self, text: str) -> None:
        """Raise an `UploadError` if a text is too long."""
        if len(text) > self.characters:
            raise UploadError(
                f"Your text has {len(text):,} characters; the limit is {self.characters:,}. Shorten it and send it "
                "again."
            )


def read_upload(path: str, kinds: Sequence[str], num_frames: int, limits: Limits) -> dict[str, dict]:
    """
    Decode the model's inputs from a file.

    Args:
        path: the file.
        kinds: kinds of content to return: `audio`, `video` or both.
        num_frames: number of video frames.
        limits: limits that the file must meet.

    Returns:
        decoded content items of a message by their kind: `{"audio", "sampling_rate"}` and `{"video"}` with frames
        (frames, height, width, 3) uint8. Kinds that the file does not have are absent.

    Raises:
        UploadError: if the file is missing, too large, too long, damaged, or takes too long to decode.
    """
    name = Path(path).name
    try:
        size = os.path.getsize(path)
    except OSError:
        raise UploadError(f"{name} is no longer on the server. Please upload it again.") from None
    if size > limits.megabytes * 1e6:
        raise UploadError(
            f"{name} has {size / 1e6:,.1f} MB; the limit is {limits.megabytes:g} MB. Send a shorter or smaller clip."
        )
    numbers = map(str, (num_frames, limits.seconds, limits.decode_seconds))
    command = [sys.executable, "-m", "empathic.demo.uploads", path, *numbers]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    environment |= {
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }  # each OpenBLAS thread reserves address space
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
    with np.load(io.BytesIO(ended.stdout), allow_pickle=False) as arrays:
        held = {kind: arrays[kind] for kind in ("audio", "video") if kind in arrays}
    found = {kind: array for kind, array in held.items() if kind in kinds}
    if not found:
        wanted = {"audio": "audio", "video": "video"}
        raise UploadError(f"{name} has no {' and no '.join(wanted[kind] for kind in kinds)}.")
    return {
        kind: {kind: array, **({"sampling_rate": SAMPLING_RATE} if kind == "audio" else {})}
        for kind, array in found.items()
    }


def discard(path: str | None, folder: str) -> None:
    """Delete an upload if it is inside `folder`, together with the parent folders inside `folder` that become empty."""
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


# -------------------------------------------------------------------------------------------- the decoding process


def _smaller(frames: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = SHORTEST_SIDE / min(height, width)
    if scale >= 1:
        return frames
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def _decode(path: str, num_frames: int, max_seconds: float) -> dict[str, np.ndarray]:
    arrays = read_clip(path, Path(path).name, num_frames, max_seconds)
    if "video" in arrays:
        arrays["video"] = _smaller(arrays["video"])
    return arrays


def main(arguments: list[str]) -> int:
    """Run the decoding process; return its exit status."""
    import resource

    path, num_frames, max_seconds, decode_seconds = arguments
    limit = int(float(decode_seconds)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        arrays = _decode(path, int(num_frames), float(max_seconds))
    except MediaError as error:
        print(str(error).replace(path, Path(path).name).encode("utf-8", "replace").decode())
        return REFUSED
    np.savez(sys.stdout.buffer, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
