"""
What a system is given of a clip: the whole clip, one of its modalities, a blank in place of one, or nothing.

A blank sound is silence, a blank picture is gray. All clips of an utterance get the same blank, as long and as large as
the first of them, so that a blank tells nothing about the clip. Blanks are files, which every system reads as it reads
a clip.
"""

import wave
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from ...data_prep.clip_digests import MEDIA_KINDS
from ...files import atomic_path
from ...media_empathic import MediaError, load_audio, load_video

OWN, BLANK, NOTHING = "own", "blank", "nothing"
# condition -> (what the system gets as audio, and as video, title)
CONDITIONS = {
    "full": (OWN, OWN, "whole clip"),
    "absent": (NOTHING, NOTHING, "no clip"),
    "audio": (OWN, NOTHING, "sound only"),
    "video": (NOTHING, OWN, "picture only"),
    "silence": (BLANK, OWN, "silence + picture"),
    "gray": (OWN, BLANK, "sound + gray"),
    "blank": (BLANK, BLANK, "silence + gray"),
}
FULL = "full"
RATE = 16000  # hertz
STEP = 0.05  # seconds; silences of nearly equal length share a file
GRAY, FRAMES, FPS = 128, 8, 8


def treatment(condition: str, kinds: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """What a condition gives of each of `kinds`: ((kind, OWN or BLANK), ...), without the kinds that it leaves out."""
    given: dict[str, str] = dict(zip(MEDIA_KINDS, CONDITIONS[condition][:2], strict=True))
    return tuple((kind, given[kind]) for kind in kinds if given[kind] != NOTHING)


def distinct_conditions(conditions: list[str], kinds: tuple[str, ...]) -> list[str]:
    """The conditions that differ for clips of these kinds; of those that do not differ, the first."""
    found = {treatment(condition, kinds): condition for condition in reversed(conditions)}
    return [condition for condition in conditions if found[treatment(condition, kinds)] == condition]


def blank_clip(item: dict, folder: Path) -> dict:
    """
    Return a content item with a blank in place of an audio or video item; its file is written to `folder` if needed.

    Raises:
        MediaError: if the item cannot be read.
    """
    if item["type"] == "audio":
        seconds = STEP * max(1, -(-len(load_audio(item, RATE)) // round(STEP * RATE)))
        path, write = folder / f"silence-{seconds:.2f}s.wav", partial(_write_silence, seconds=seconds)
    else:
        height, width = load_video(item, 1).shape[1:3]
        size = (max(2, width // 2 * 2), max(2, height // 2 * 2))
        path, write = folder / f"gray-{size[0]}x{size[1]}.mp4", partial(_write_gray, size=size)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as unfinished:
            write(unfinished)
    return {"type": item["type"], "path": str(path.resolve())}


def _write_silence(path: Path, seconds: float) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(bytes(2 * round(seconds * RATE)))


def _write_gray(path: Path, size: tuple[int, int]) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        picture = np.full((size[1], size[0], 3), GRAY, np.uint8)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class Blanks:
    """
    The blanks of utterances, each made once.

    Args:
        folder: folder of the files.

    Attributes:
        problems: {name of an utterance: why it has no blank}; it gets nothing in place of the blank.
    """

    def __init__(self, folder: Path):
        self.folder, self.problems = folder, {}
        self._made: dict[tuple[str, str], dict | None] = {}

    def of(self, name: str, kind: str, items: Iterable[dict]) -> dict | None:
        """The blank of an utterance, made like the first of its items that can be read; None if there is none."""
        if (name, kind) not in self._made:
            blank, reason = None, ""
            for item in items:
                try:
                    blank = blank_clip(item, self.folder)
                    break
                except MediaError as error:
                    reason = str(error)
            self._made[name, kind] = blank
            if blank is None:
                self.problems[name] = reason
        return self._made[name, kind]
