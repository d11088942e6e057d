"""One turn out of a longer recording: its seconds of sound, or its seconds and its half of the picture.

The time of a recording is that of a player: 0 where its first stream begins. A cut starts at a key frame that the
container's index gives, not at the start of the file, and holds a few frames at a time.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from empathic.data_prep.corpus import Clip
from empathic.media_empathic import MediaError, _audio_stream, _decode, _open, _video_stream, av

# How many seconds before its start a cut looks for a key frame; None decodes from the start of the file. The first one
# makes up for the places that B-frames move a key frame by, the second is longer than DivX's distance of key frames.
MARGINS = (Fraction(1, 2), Fraction(15), None)
PREROLL = Fraction(1, 2)  # seconds of sound decoded before a cut: a frame of sound builds on those before it
MAX_DELAY = 16  # frames that a decoder may hold back (H.264, A.3.1)
CLOCK = 90_000  # ticks a second of the written picture: whole numbers for 24, 25, 29.97 and 30 frames and milliseconds
ENCODER = {"crf": "18", "preset": "veryfast", "bf": "0"}  # without B-frames, packets come out in the order of time
GUESSED_CLOCKS = ("mp3", "aac")  # where these land after seeking is a guess from the bit rate


def cut(clip: Clip, target: Path) -> None:
    """Writes the seconds [start, end) of a clip, and the half of its picture that `crop` names, as a file of its own.

    The same clip gives the same bytes.

    Args:
        clip: `start` None is the start of the file, `end` None or past its end the end of the file.
        target: `.wav` is written with the sound: 16-bit PCM of the source's sampling rate and channels, from the sample
            at `start`. `.mp4` is written with the picture alone: H.264, each frame shown as long as in the source,
            the first being the one that is seen at `start`; an odd last row or column is left out.

    Raises:
        MediaError: if the clip cannot be read, lacks the stream, or holds nothing between `start` and `end`. No file is
            left then.
        ValueError: if `target` ends on neither `.wav` nor `.mp4`, or `crop` is no half.
    """
    target = Path(target)
    if clip.crop not in (None, "left", "right"):
        raise ValueError(f'crop is {clip.crop!r}. Use "left" or "right", or None for the whole picture.')
    write = {".wav": _cut_sound, ".mp4": _cut_picture}.get(target.suffix)
    if write is None:
        raise ValueError(f"{target}: ends on neither .wav (the sound) nor .mp4 (the picture).")
    # The decimal that was meant, not the float next to it: a frame at exactly `start` belongs to the cut.
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
    """When the first stream begins, in seconds. Before 0 there are only samples that an encoder put there."""
    return max(Fraction(0), Fraction(container.start_time or 0, av.time_base))


def _no_seconds(clip: Clip, what: str, end: Fraction) -> MediaError:
    return MediaError(
        f"{clip.path}: has no {what} from {clip.start} s to {clip.end} s; it was read up to {float(end):.3f} s. "
        "Correct the times, or copy the file again if it was cut short."
    )


def _lacks(clip: Clip, what: str) -> MediaError:
    return MediaError(f"{clip.path}: has no {what} to cut. Give the file that holds it, or leave it out.")


# Picture -------------------------------------------------------------------------------------------------------------


def _decoded(container, stream) -> Iterator:
    for packet in container.demux(stream):  # the last one is empty and brings what the decoder holds back
        yield from _decode(stream, packet)


def _avi_delay(clip: Clip) -> int:
    """How many frames the decoder of an avi is behind its packets."""
    with _open(clip.path, str(clip.path)) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1
        first = next(_decoded(container, stream), None)
        return min(first.dts or 0, MAX_DELAY) if first is not None else 0


def _timed_frames(clip: Clip, position: Fraction | None) -> Iterator[tuple[Fraction, Fraction, object, object]]:
    """(start, end, frame, stream) in the order of time, from the key frame before `position`, or from the first frame
    if it is None. Nothing comes where the file cannot be sought in."""
    with _open(clip.path, str(clip.path)) as container:
        stream = _video_stream(container)
        if stream is None:
            raise _lacks(clip, "picture")
        stream.codec_context.thread_count = 1  # clips are cut in parallel
        origin = _origin(container)
        step = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
        # An avi knows the order of its packets, not when their frames are due. A frame is due in the order in which the
        # decoder gives it out, and that is behind the packets by the same number throughout the file.
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
            if last is not None and (time is None or time <= last):  # no clock, or one that is wrong
                time = last + step
            last = time if time is not None else Fraction(0)
            duration = frame.duration * stream.time_base if frame.duration else step
            yield last, last + duration, frame, stream


def _frames_from(clip: Clip, start: Fraction) -> Iterator:
    """`_timed_frames` from one at or before `start`, if there is one."""
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


def _shown(clip: Clip, start: Fraction, end: Fraction | None) -> Iterator[tuple[Fraction, Fraction, object, object]]:
    """(start, end, frame, stream) of each frame that is seen in the cut, in seconds of the cut, without gaps."""
    held, since = None, Fraction(0)  # a picture that begins later than the sound is seen from the cut's start
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
        raise _no_seconds(clip, "picture", end if held is not None else Fraction(0))
    yield since, end - start, *held[2:]


def _planes(frame, size: tuple[int, int], turns: int, crop: str | None) -> np.ndarray:
    """A frame as 4:2:0 planes one after the other, (height * 3 / 2, width) uint8, upright, cropped, of even size."""
    # A picture that changes its size inside the file keeps the first one's.
    frame = frame.reformat(width=size[0], height=size[1], format="yuv420p", dst_color_range="MPEG", threads=1)
    width, height = (size[1], size[0]) if turns % 2 else size
    width, height = width - width % 2, height - height % 2
    left, right = 0, width
    if crop is not None:
        half = width // 2 - width // 2 % 2
        left, right = (0, half) if crop == "left" else (width - half, width)
    parts = []
    for number, plane in enumerate(frame.planes):
        scale = 2 if number else 1
        values = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        parts.append(np.rot90(values, turns)[: height // scale, left // scale : right // scale].ravel())
    return np.concatenate(parts).reshape(height * 3 // 2, right - left)


def _cut_picture(clip: Clip, start: Fraction, end: Fraction | None, target: Path) -> None:
    shown = _shown(clip, start, end)
    item = next(shown)  # whatever is wrong with the clip is found before a file is made
    stream, first = item[3], item[2]
    size, turns = (first.width, first.height), round(first.rotation / 90) % 4
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

        def mux(packets) -> None:
            for packet in packets:
                packet.duration = durations.pop(packet.pts)
                container.mux(packet)

        tick = -1
        while item is not None:
            begin, until, frame, _ = item
            planes = _planes(frame, size, turns, clip.crop)
            if tick < 0:
                if planes.size == 0:
                    raise MediaError(f"{clip.path}: its picture of {size[0]}x{size[1]} is too small to be cropped.")
                context.height, context.width = planes.shape[0] * 2 // 3, planes.shape[1]
            picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            tick = max(round(begin * CLOCK), tick + 1)
            durations[tick] = max(round(until * CLOCK) - tick, 1)
            picture.pts, picture.time_base = tick, Fraction(1, CLOCK)
            mux(output.encode(picture))
            item = next(shown, None)
        mux(output.encode(None))


# Sound ---------------------------------------------------------------------------------------------------------------


def _decoded_sound(clip: Clip, position: Fraction | None) -> Iterator[tuple[int, int, np.ndarray]]:
    """(number of its first sample in the file, sampling rate, int16 (samples, channels)) of each piece in order, from
    before `position`, or from the first one if it is None. Nothing comes where the file cannot be sought in exactly."""
    with _open(clip.path, str(clip.path)) as container:
        stream = _audio_stream(container)
        if stream is None:
            raise _lacks(clip, "sound")
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
            if setup != (frame.format.name, frame.layout.name, frame.sample_rate):  # it may change inside a stream
                setup = (frame.format.name, frame.layout.name, frame.sample_rate)
                convert = av.AudioResampler("s16", layout, rate)
            frame.pts = None  # a gap in the clock is no silence
            for piece in convert.resample(frame):
                values = piece.to_ndarray().reshape(-1, piece.layout.nb_channels)
                yield place, rate, values
                place += len(values)


def _sound_from(clip: Clip, start: Fraction) -> Iterator[tuple[int, int, np.ndarray]]:
    """`_decoded_sound` from a piece that begins at or before `start`, if there is one."""
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
    """(sampling rate, int16 (samples, channels)) of the sound in the cut."""
    begin, done = None, Fraction(0)
    for place, rate, values in _sound_from(clip, start):
        stop = round(end * rate) if end is not None else place + len(values)
        done = Fraction(place + len(values), rate)
        if begin is None:
            begin = round(start * rate)
        if begin < place < stop:  # where the sound begins later than the picture, silence keeps the two together
            yield rate, np.zeros((place - begin, values.shape[1]), np.int16)
        piece = values[max(begin - place, 0) : max(stop - place, 0)]
        if len(piece):
            yield rate, piece
            begin = place + len(values)
        if end is not None and place + len(values) >= stop:
            break
    if begin is None or begin == round(start * rate):
        raise _no_seconds(clip, "sound", done)


def _cut_sound(clip: Clip, start: Fraction, end: Fraction | None, target: Path) -> None:
    pieces = _heard(clip, start, end)
    rate, values = next(pieces)  # whatever is wrong with the clip is found before a file is made
    with wave.open(str(target), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.astype("<i2").tobytes())
        for _, values in pieces:
            file.writeframes(values.astype("<i2").tobytes())
