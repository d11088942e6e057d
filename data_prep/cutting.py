"""Cut one turn out of a longer recording: a time range of the audio, or of the video and one half of its frames.

Times are player times: 0 is where the first stream of the file begins. Decoding starts at a key frame from the
container's index, not at the start of the file, and keeps only a few frames in memory.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..media_empathic import (
    MediaError,
    Orientation,
    audio_stream,
    av,
    decode_packet,
    open_media,
    square_size,
    video_stream,
)
from .corpora.base import Clip

# Seconds before the start of a cut at which to look for a key frame, tried in order; None decodes from the start of the
# file. The first margin covers the shift of key frames by B-frames, the second exceeds the key frame interval of DivX.
MARGINS = (Fraction(1, 2), Fraction(15), None)
PREROLL = Fraction(1, 2)  # seconds of audio decoded before a cut, because audio frames depend on earlier frames
MAX_DELAY = 16  # maximum number of frames that a decoder may delay (H.264, A.3.1)
CLOCK = 90_000  # ticks per second of the output video, integral for 24, 25, 29.97 and 30 frames/s and milliseconds
ENCODER = {"crf": "18", "preset": "veryfast", "bf": "0"}  # without B-frames, packets are in the order of time
YUV_COLORS = (1, 4, 5, 6, 7, 9)  # values of FFmpeg's AVColorSpace that `upright_planes` keeps
GUESSED_CLOCKS = ("mp3", "aac")  # formats whose position after seeking is only estimated from the bit rate


def cut(clip: Clip, target: Path) -> None:
    """Write the seconds [start, end) of a clip to a file, with the video cropped to the half given by `crop`.

    Equal clips give equal bytes.

    Args:
        clip: the clip. `start` None means the start of the file; `end` None or past the end means the end of the file.
        target: the output file. `.wav` contains the audio as 16-bit PCM with the sampling rate and channels of the
            source, from the sample at `start`. `.mp4` contains only the video as H.264, with the frame durations of the
            source, upright and with square pixels; the first frame is the frame shown at `start`, and an odd last row
            or column is dropped.

    Raises:
        MediaError: if the clip cannot be read, lacks the stream, or is empty between `start` and `end`. No file is left
            behind.
        ValueError: if `target` ends in neither `.wav` nor `.mp4`, or `crop` is invalid.
    """
    target = Path(target)
    if clip.crop not in (None, "left", "right"):
        raise ValueError(f'crop is {clip.crop!r}. Use "left" or "right", or None for the whole frame.')
    write = {".wav": _cut_sound, ".mp4": _cut_picture}.get(target.suffix)
    if write is None:
        raise ValueError(f"{target}: ends in neither .wav (audio) nor .mp4 (video). Choose one of them.")
    # Use the decimal number, not its nearest float, so that a frame at exactly `start` is part of the cut.
    start = Fraction(str(clip.start)) if clip.start is not None else Fraction(0)
    end = Fraction(str(clip.end)) if clip.end is not None else None
    if start < 0 or (end is not None and end <= start):
        raise MediaError(
            f"{clip.path}: cannot be cut from {clip.start} s to {clip.end} s. Give a start before the end."
        )
    try:
        write(clip, start, end, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _origin(container) -> Fraction:
    """The start of the first stream in seconds. A negative start is clipped: it is encoder padding."""
    return max(Fraction(0), Fraction(container.start_time or 0, av.time_base))


def _no_seconds(clip: Clip, what: str, end: Fraction) -> MediaError:
    return MediaError(
        f"{clip.path}: has no {what} from {clip.start} s to {clip.end} s; it was read up to {float(end):.3f} s. "
        "Correct the times, or copy the file again if it is truncated."
    )


def _lacks(clip: Clip, what: str) -> MediaError:
    return MediaError(f"{clip.path}: has no {what} to cut. Give a file with this stream, or omit the clip.")


# Video ---------------------------------------------------------------------------------------------------------------


def _decoded(container, stream) -> Iterator:
    for packet in container.demux(stream):  # the last packet is empty and flushes the decoder
        yield from decode_packet(stream, packet)


def _avi_delay(clip: Clip) -> int:
    """The number of frames by which the decoder of an avi lags behind its packets."""
    with open_media(clip.path, str(clip.path)) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        first = next(_decoded(container, stream), None)
        return min(first.dts or 0, MAX_DELAY) if first is not None else 0


def _timed_frames(clip: Clip, position: Fraction | None) -> Iterator[tuple[Fraction, Fraction, object, object]]:
    """Yield (start, end, frame, stream) in the order of time, from the key frame before `position`, or from the first
    frame if `position` is None. Yields nothing if seeking fails."""
    with open_media(clip.path, str(clip.path)) as container:
        stream = video_stream(container)
        if stream is None:
            raise _lacks(clip, "video")
        stream.codec_context.thread_count = 1  # clips are cut in parallel
        origin = _origin(container)
        step = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
        # An avi stores the order of packets but no presentation times. Frames are presented in the order of the decoder
        # output, which lags behind the packets by the same number of frames throughout the file.
        is_avi = container.format.name == "avi"
        delay = _avi_delay(clip) if is_avi else 0
        if position is not None:
            try:
                container.seek(math.floor((position + origin) / stream.time_base), stream=stream, backward=True)
            except av.error.FFmpegError:
                return
        last = None
        for frame in _decoded(container, stream):
            tick = frame.dts if is_avi else frame.pts
            if last is None and tick is None and position is not None:
                return
            time = (tick - delay) * stream.time_base - origin if tick is not None else None
            if last is not None and (time is None or time <= last):  # missing or wrong timestamp
                time = last + step
            last = time if time is not None else Fraction(0)
            duration = frame.duration * stream.time_base if frame.duration else step
            yield last, last + duration, frame, stream


def _frames_from(clip: Clip, start: Fraction) -> Iterator:
    """The frames of `_timed_frames`, from a frame at or before `start` if possible."""
    for margin in MARGINS:
        position = start - margin if margin is not None else None
        if position is not None and position <= 0:
            continue
        frames = _timed_frames(clip, position)
        first = next(frames, None)
        if position is None or (first is not None and first[0] <= start):
            if first is not None:
                yield first
                yield from frames
            return


def shown_frames(
    clip: Clip, start: Fraction, end: Fraction | None
) -> Iterator[tuple[Fraction, Fraction, object, object]]:
    """Yield (start, end, frame, stream) of each frame shown in the cut, in seconds of the cut, without gaps."""
    held, since = None, Fraction(0)  # video that begins later than the audio is shown from the start of the cut
    for item in _frames_from(clip, start):
        if end is not None and item[0] >= end:
            break
        if held is not None and item[0] > start:
            yield since, item[0] - start, *held[2:]
            since = item[0] - start
        held = item
    else:
        if held is not None:  # the file ends first
            end = min(end, held[1]) if end is not None else held[1]
    if held is None or end <= start:
        raise _no_seconds(clip, "video", end if held is not None else Fraction(0))
    yield since, end - start, *held[2:]


def upright_planes(frame, size: tuple[int, int], crop: str | None = None) -> np.ndarray:
    """Convert a frame to concatenated 4:2:0 planes, (height * 3 / 2, width) uint8, upright, cropped, of even size.

    Args:
        frame: the decoded frame.
        size: (width, height) of the result before it is turned upright and cropped. If the size changes within a file,
            all frames are scaled to one size.
        crop: `left` or `right`: the half to keep.
    """
    turn = Orientation.of(frame)
    frame = frame.reformat(width=size[0], height=size[1], format="yuv420p", dst_color_range="MPEG", threads=1)
    width, height = (size[1], size[0]) if turn.transposed else size
    width, height = width - width % 2, height - height % 2
    left, right = 0, width
    if crop is not None:
        half = width // 2 - width // 2 % 2
        left, right = (0, half) if crop == "left" else (width - half, width)
    parts = []
    for number, plane in enumerate(frame.planes):
        scale = 2 if number else 1
        values = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        parts.append(turn.apply(values)[: height // scale, left // scale : right // scale].ravel())
    return np.concatenate(parts).reshape(height * 3 // 2, right - left)


def describe_colors(context, frame) -> None:
    """Write into an encoder's context how the colors of `upright_planes` of a frame are stored: readers would take
    unmarked pictures as BT.601."""
    context.color_range = av.video.reformatter.ColorRange.MPEG
    if not frame.format.is_rgb and frame.colorspace in YUV_COLORS:
        context.colorspace = frame.colorspace
        context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc


def _cut_picture(clip: Clip, start: Fraction, end: Fraction | None, target: Path) -> None:
    shown = shown_frames(clip, start, end)
    item = next(shown)  # errors of the clip are raised before a file is created
    stream, first = item[3], item[2]
    size = square_size(stream, first)
    durations = {}
    with (
        open(target, "wb") as file,
        av.open(file, "w", format="mp4", container_options={"fflags": "bitexact"}) as container,
    ):
        output = container.add_stream("libx264", rate=stream.average_rate or 25, options=ENCODER)
        context = output.codec_context
        context.thread_count = 1
        context.time_base = Fraction(1, CLOCK)
        context.flags |= av.codec.context.Flags.bitexact
        context.pix_fmt = "yuv420p"
        describe_colors(context, first)

        def mux(packets) -> None:
            for packet in packets:
                packet.duration = durations.pop(packet.pts)
                container.mux(packet)

        tick = -1
        while item is not None:
            begin, until, frame, _ = item
            planes = upright_planes(frame, size, clip.crop)
            if tick < 0:
                if planes.size == 0:
                    raise MediaError(f"{clip.path}: its frame size {size[0]}x{size[1]} is too small to be cropped.")
                context.height, context.width = planes.shape[0] * 2 // 3, planes.shape[1]
            picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            tick = max(round(begin * CLOCK), tick + 1)
            durations[tick] = max(round(until * CLOCK) - tick, 1)
            picture.pts, picture.time_base = tick, Fraction(1, CLOCK)
            mux(output.encode(picture))
            item = next(shown, None)
        mux(output.encode(None))


# Audio ---------------------------------------------------------------------------------------------------------------


def _decoded_sound(clip: Clip, position: Fraction | None) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (index of the first sample in the file, sampling rate, int16 (samples, channels)) of each piece in order,
    from before `position`, or from the first piece if it is None. Yields nothing if exact seeking is not possible."""
    with open_media(clip.path, str(clip.path)) as container:
        stream = audio_stream(container)
        if stream is None:
            raise _lacks(clip, "audio")
        stream.codec_context.thread_count = 1
        origin = _origin(container)
        if position is not None:
            coarse = stream.time_base * stream.codec_context.sample_rate > 1
            if coarse or container.format.name in GUESSED_CLOCKS:
                return
            try:
                container.seek(math.floor((position + origin) / stream.time_base), stream=stream, backward=True)
            except av.error.FFmpegError:
                return
        place, rate, layout, setup, convert = None, None, None, None, None
        for frame in _decoded(container, stream):
            if place is None:
                if frame.pts is None and position is not None:
                    return
                rate, layout = frame.sample_rate, frame.layout.name
                place = round((frame.pts * frame.time_base - origin) * rate) if frame.pts is not None else 0
            if setup != (frame.format.name, frame.layout.name, frame.sample_rate):  # it may change within a stream
                setup = (frame.format.name, frame.layout.name, frame.sample_rate)
                convert = av.AudioResampler("s16", layout, rate)
            frame.pts = None  # a gap in the timestamps is not silence
            for piece in convert.resample(frame):
                values = piece.to_ndarray().reshape(-1, piece.layout.nb_channels)
                yield place, rate, values
                place += len(values)


def _sound_from(clip: Clip, start: Fraction) -> Iterator[tuple[int, int, np.ndarray]]:
    """The pieces of `_decoded_sound`, from a piece that begins at or before `start` if possible."""
    for position in (start - PREROLL, None):
        if position is not None and position <= 0:
            continue
        pieces = _decoded_sound(clip, position)
        first = next(pieces, None)
        if position is None or (first is not None and first[0] <= start * first[1]):
            if first is not None:
                yield first
                yield from pieces
            return


def _heard(clip: Clip, start: Fraction, end: Fraction | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (sampling rate, int16 (samples, channels)) of the audio in the cut."""
    begin, done = None, Fraction(0)
    for place, rate, values in _sound_from(clip, start):
        stop = round(end * rate) if end is not None else place + len(values)
        done = Fraction(place + len(values), rate)
        if begin is None:
            begin = round(start * rate)
        if begin < place < stop:  # silence keeps audio that begins later than the video in sync
            yield rate, np.zeros((place - begin, values.shape[1]), np.int16)
        piece = values[max(begin - place, 0) : max(stop - place, 0)]
        if len(piece):
            yield rate, piece
            begin = place + len(values)
        if end is not None and place + len(values) >= stop:
            break
    if begin is None or begin == round(start * rate):
        raise _no_seconds(clip, "audio", done)


def _cut_sound(clip: Clip, start: Fraction, end: Fraction | None, target: Path) -> None:
    pieces = _heard(clip, start, end)
    rate, values = next(pieces)  # errors of the clip are raised before a file is created
    with wave.open(str(target), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.astype("<i2").tobytes())
        for _, values in pieces:
            file.writeframes(values.astype("<i2").tobytes())
