"""Convert clips to formats that every browser plays."""

import shutil
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ...data_prep.corpora.base import Clip
from ...data_prep.cutting import describe_colors, shown_frames, upright_planes
from ...data_prep.streams import UsableStreams, usable_streams
from ...media_empathic import (
    NOTHING_ELSE,
    MediaError,
    Orientation,
    audio_stream,
    lone_channel,
    read_audio,
    square_size,
)

# Formats that current browsers play: (container, video codecs, audio codecs, suffix).
PLAYED = (("mp4", {"h264"}, {"aac", "mp3"}, ".mp4"), ("webm", {"vp8", "vp9"}, {"opus", "vorbis"}, ".webm"))
PIXELS = {"yuv420p", "yuvj420p"}
HEIGHT = 720  # maximum height in pixels of video that is encoded again
RATE = 48000
CLOCK = 1000  # ticks per second of video that is encoded again; keeps a variable frame rate


@contextmanager
def _reading(path: Path):
    """Open a container without opening other files that it names, as playlists do."""
    with open(path, "rb") as file, av.open(file, metadata_errors="replace", options=NOTHING_ELSE) as container:
        yield container


def _suffix(path: Path) -> str | None:
    """The suffix of the file if every browser plays it unchanged, as we read it, else None. Browsers differ in the
    track that they choose, in mirrored pictures and in pixels that are not square."""
    with _reading(path) as container:
        videos, audios = container.streams.video, container.streams.audio
        streams = [*videos, *audios]
        if len(videos) > 1 or len(audios) > 1 or any(stream.codec_context is None for stream in streams):
            return None
        for name, pictures, sounds, suffix in PLAYED:
            if (
                name in container.format.name.split(",")
                and path.suffix.lower() in (suffix, ".m4a")
                and all(stream.codec_context.name in pictures for stream in videos)
                and all(stream.codec_context.pix_fmt in PIXELS for stream in videos)
                and all(stream.codec_context.name in sounds for stream in audios)
                and all(_is_plain(container, stream) for stream in videos)
            ):
                break
        else:
            return None
    return suffix if not audios or lone_channel(path) is None else None


def _is_plain(container, stream) -> bool:
    """Whether the stored pictures are shown as they are: upright, and with square pixels."""
    frame = next(container.decode(stream), None)
    if frame is None:
        return False
    return Orientation.of(frame) == Orientation() and square_size(stream, frame) == (frame.width, frame.height)


def _encoders() -> tuple[str, str, str]:
    """Return (suffix, video encoder, audio encoder): H.264 if this FFmpeg has it, else VP9."""
    if "libx264" in av.codecs_available:
        return ".mp4", "libx264", "aac"
    return ".webm", "libvpx-vp9", "libopus"


def _usable(path: Path) -> UsableStreams:
    found = usable_streams(path)
    if found.error is not None and not (found.has_audio or found.has_video):
        raise MediaError(found.error)
    return found


def playable(video: Path | None, audio: Path | None, stem: Path) -> tuple[Path, str]:
    """
    Write a clip that browsers can play: a copy if the file is playable already, else encoded again, upright, with
    square pixels, and with the sound as the models hear it, mixed to mono.

    Args:
        video, audio: files with the video and the audio, the same file or two; one may be None. A stream that cannot be
            decoded is left out if another can.
        stem: path of the output without its suffix.

    Returns:
        The file that was written, and its kind, `video` or `audio`.

    Raises:
        MediaError: if a file is missing, or none of its streams can be decoded.
    """
    sound_from = audio if audio is not None else video
    found = {path: _usable(path) for path in (video, sound_from) if path is not None}
    picture, sound = video is not None and found[video].has_video, found[sound_from].has_audio
    if not picture and not sound:
        raise MediaError(f"{video or audio}: has neither video nor audio. Give a file with one of them.")
    kind = "video" if picture else "audio"
    only = video if picture else sound_from
    if (not picture or not sound or video == sound_from) and found[only].error is None:
        suffix = _suffix(only)
        if suffix is not None and (picture or not _has_picture(only)):
            target = stem.with_suffix(suffix)
            shutil.copyfile(only, target)
            return target, kind
    suffix, picture_codec, sound_codec = _encoders()
    target = stem.with_suffix(suffix)
    try:
        with av.open(str(target), "w") as output:
            jobs = []
            if picture:
                jobs.append(_picture(video, output, picture_codec))
            if sound:
                jobs.append(_sound(sound_from, output, sound_codec))
            for job in jobs:  # all streams must be known before the first packet
                next(job)
            while jobs:  # in turn, so that video and audio packets are interleaved in the file
                for job in tuple(jobs):
                    packet = next(job, None)
                    if packet is None:
                        jobs.remove(job)
                    else:
                        output.mux(packet)
    except MediaError:
        target.unlink(missing_ok=True)
        raise
    except av.error.FFmpegError as error:
        target.unlink(missing_ok=True)
        raise MediaError(
            f"{video or audio}: cannot be encoded for browsers ({error.strerror or error}). Convert it to mp4 (H.264, "
            "AAC) yourself."
        ) from None
    return target, kind


def _has_picture(path: Path) -> bool:
    """Whether the file has a video stream; cover art counts."""
    with _reading(path) as container:
        return bool(container.streams.video)


def _picture(path: Path, output, codec: str):
    """Add the stream, then yield its packets."""
    frames = shown_frames(Clip(path, str(path)), Fraction(0), None)
    item = next(frames)
    _, _, first, source = item
    width, height = square_size(source, first)
    scale = min(1.0, HEIGHT / (width if Orientation.of(first).transposed else height))
    size = max(2, round(width * scale)), max(2, round(height * scale))
    planes = upright_planes(first, size)
    stream = output.add_stream(codec, rate=source.average_rate or Fraction(25))
    stream.height, stream.width, stream.pix_fmt = planes.shape[0] * 2 // 3, planes.shape[1], "yuv420p"
    stream.codec_context.time_base = Fraction(1, CLOCK)
    describe_colors(stream.codec_context, first)
    if codec == "libx264":
        stream.options = {"crf": "23", "preset": "fast"}
    yield None
    last = -1
    while item is not None:
        begin, _, frame, _ = item
        picture = av.VideoFrame.from_ndarray(upright_planes(frame, size), format="yuv420p")
        picture.pts = last = max(round(begin * CLOCK), last + 1)
        picture.time_base = Fraction(1, CLOCK)
        yield from stream.encode(picture)
        item = next(frames, None)
    yield from stream.encode(None)


def _delay(path: Path) -> float:
    """Seconds by which the sound begins after the start of the file, which is where its first stream begins."""
    with _reading(path) as container:
        start = audio_stream(container).start_time
        time = (start or 0) * audio_stream(container).time_base - Fraction(container.start_time or 0, av.time_base)
    return max(0.0, float(time))


def _sound(path: Path, output, codec: str):
    """Add the stream, then yield its packets."""
    stream = output.add_stream(codec, rate=RATE, layout="mono")
    yield None
    samples = np.concatenate([np.zeros(round(_delay(path) * RATE), np.float32), read_audio(path, RATE)])
    context = stream.codec_context
    if not context.is_open:  # the first video packet opens all streams
        context.open()
    convert = av.AudioResampler(context.format, "mono", RATE, frame_size=context.frame_size or None)
    for start in range(0, len(samples), RATE):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + RATE], format="flt", layout="mono")
        frame.sample_rate = RATE
        for piece in convert.resample(frame):
            yield from stream.encode(piece)
    for piece in convert.resample(None):
        yield from stream.encode(piece)
    yield from stream.encode(None)
