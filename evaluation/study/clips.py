"""Clips as every browser plays them."""

import shutil
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av

from empathic.media_empathic import NOTHING_ELSE, MediaError, probe

# What current browsers play as it is: formats, codecs of the picture, codecs of the sound.
PLAYED = (("mp4", {"h264"}, {"aac", "mp3"}, ".mp4"), ("webm", {"vp8", "vp9"}, {"opus", "vorbis"}, ".webm"))
PIXELS = {"yuv420p", "yuvj420p"}
HEIGHT = 720  # pixels of a picture that is encoded again, at most
RATE = 48000


@contextmanager
def _reading(path: Path):
    """An open container of the file alone: what else it names, as playlists do, stays closed."""
    with open(path, "rb") as file, av.open(file, metadata_errors="replace", options=NOTHING_ELSE) as container:
        yield container


def _suffix(path: Path) -> str | None:
    """The suffix under which a browser plays the file as it is, or None."""
    with _reading(path) as container:
        for name, pictures, sounds, suffix in PLAYED:
            if (
                name in container.format.name.split(",")
                and path.suffix.lower() in (suffix, ".m4a")
                and all(stream.codec_context.name in pictures for stream in container.streams.video)
                and all(stream.codec_context.pix_fmt in PIXELS for stream in container.streams.video)
                and all(stream.codec_context.name in sounds for stream in container.streams.audio)
            ):
                return suffix
    return None


def _encoders() -> tuple[str, str, str]:
    """Suffix, encoder of the picture and of the sound: H.264 where this FFmpeg has it, else VP9."""
    if "libx264" in av.codecs_available:
        return ".mp4", "libx264", "aac"
    return ".webm", "libvpx-vp9", "libopus"


def playable(video: Path | None, audio: Path | None, stem: Path) -> tuple[Path, str]:
    """
    Writes a clip so that a browser plays it: a copy where it does already, else encoded again.

    Args:
        video, audio: files of the picture and of the sound, the same file or two; one may be None.
        stem: where the clip goes, without its suffix.

    Returns:
        The file that was written, and `video` or `audio`.

    Raises:
        MediaError: for a file that is missing or cannot be decoded.
    """
    picture = video is not None and probe(video, decode=True).has_video
    sound_from = audio if audio is not None else video
    sound = probe(sound_from, decode=True).has_audio
    if not picture and not sound:
        raise MediaError(f"{video or audio}: has neither picture nor sound. Give a file that has.")
    kind = "video" if picture else "audio"
    if not picture or not sound or video == sound_from:
        only = video if picture else sound_from
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
            while jobs:  # in turn, so that picture and sound lie beside each other in the file
                for job in tuple(jobs):
                    packet = next(job, None)
                    if packet is None:
                        jobs.remove(job)
                    else:
                        output.mux(packet)
    except av.error.FFmpegError as error:
        target.unlink(missing_ok=True)
        raise MediaError(
            f"{video or audio}: cannot be encoded for browsers ({error.strerror or error}). Convert it to mp4 (H.264, "
            "AAC) yourself."
        ) from None
    return target, kind


def _has_picture(path: Path) -> bool:
    """Whether the file holds a picture, a cover too."""
    with _reading(path) as container:
        return bool(container.streams.video)


def _picture(path: Path, output, codec: str):
    """Adds the stream, then gives its packets."""
    with _reading(path) as container:
        source = container.streams.video[0]
        source.thread_type = "AUTO"
        rate = source.average_rate or Fraction(25)
        stream = output.add_stream(codec, rate=rate)
        height = min(source.codec_context.height, HEIGHT)
        width = source.codec_context.width * height // source.codec_context.height
        stream.width, stream.height, stream.pix_fmt = width // 2 * 2 or 2, height // 2 * 2 or 2, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)  # keeps a variable frame rate
        if codec == "libx264":
            stream.options = {"crf": "23", "preset": "fast"}
        first, last = None, -1
        frames = container.decode(source)
        frame = next(frames)
        if frame.rotation:
            stream.set_display_rotation(frame.rotation)
        yield None
        while frame is not None:
            time = frame.time if frame.time is not None else (last + 1) / 1000
            first = time if first is None else first
            frame = frame.reformat(stream.width, stream.height, "yuv420p")
            frame.pts, frame.time_base = max(round((time - first) * 1000), last + 1), Fraction(1, 1000)
            last, frame.pict_type = frame.pts, 0
            yield from stream.encode(frame)
            frame = next(frames, None)
        yield from stream.encode(None)


def _sound(path: Path, output, codec: str):
    """Adds the stream, then gives its packets."""
    with _reading(path) as container:
        stream = output.add_stream(codec, rate=RATE, layout="stereo")
        yield None
        context = stream.codec_context
        if not context.is_open:  # the first packet of the picture opens all streams
            context.open()
        convert = av.AudioResampler(context.format, "stereo", RATE, frame_size=context.frame_size or None)
        for frame in container.decode(container.streams.audio[0]):
            frame.pts = None
            for piece in convert.resample(frame):
                yield from stream.encode(piece)
        for piece in convert.resample(None):
            yield from stream.encode(piece)
        yield from stream.encode(None)
