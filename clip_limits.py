"""Decode a whole clip of unknown origin within limits on its length and its picture size."""

import numpy as np

from .media_empathic import MediaError, Source, open_media, probe, read_audio, read_video

SAMPLING_RATE = 16000
LARGEST_PICTURE = 4096 * 2304  # pixels of a frame: a bit more than 4K


def clip_seconds(source: Source, name: str) -> float:
    """
    Return the length of a clip in seconds, from its packets: browser recordings have no length in the header, and
    headers can be wrong.

    Raises:
        MediaError: if the clip cannot be read.
    """
    first, last = {}, {}
    with open_media(source, name) as container:
        for packet in container.demux():
            if packet.pts is None or packet.stream.type not in ("audio", "video"):
                continue
            start, end = (float(t * packet.time_base) for t in (packet.pts, packet.pts + (packet.duration or 0)))
            index = packet.stream.index
            first[index] = min(first.get(index, start), start)
            last[index] = max(last.get(index, end), end)
    return max((last[index] - first[index] for index in last), default=0.0)


def read_clip(source: Source, name: str, num_frames: int, max_seconds: float) -> dict[str, np.ndarray]:
    """
    Decode the sound and the frames of a clip.

    Args:
        source: a path, or the bytes of a media file.
        name: the clip's name in errors.
        num_frames: maximum number of frames, evenly spaced.
        max_seconds: the maximum length of the clip.

    Returns:
        `audio` (samples,) float32 at 16 kHz and `video` (frames, height, width, 3) uint8; a kind that the clip does not
        have is absent.

    Raises:
        MediaError: for a clip that is too long, too large, damaged, or has neither audio nor video.
    """
    info = probe(source)
    # If the header already says that the clip is too long, its packets need not be read.
    announced = info.duration or 0.0
    seconds = announced if announced > max_seconds + 1 else clip_seconds(source, name)
    if seconds > max_seconds + 1:  # tolerance, because recorders do not stop exactly on the second
        raise MediaError(f"{name} is {seconds:,.0f} s long; the limit is {max_seconds:g} s. Send a shorter clip.")
    if (info.width or 0) * (info.height or 0) > LARGEST_PICTURE:
        raise MediaError(
            f"{name} has a picture of {info.width} x {info.height}; the limit is {LARGEST_PICTURE:,} pixels. Send a "
            "smaller clip."
        )
    arrays = {}
    if info.has_audio:
        arrays["audio"] = read_audio(source, SAMPLING_RATE, max_seconds + 1)
    if info.has_video:
        arrays["video"] = read_video(source, num_frames)
    if not arrays:
        raise MediaError(f"{name} has neither audio nor video. Send an audio or video file.")
    return arrays
