"""Decode clips with PyAV: frames for CLIP, 16 kHz mono audio for Whisper.

A clip is decoded as a player shows it: the container's default tracks, the picture turned and mirrored upright and with
square pixels. If the channels of a sound cancel each other when they are mixed, the loudest of them is used alone.

A clip is a path or the bytes of a file, in any container and codec that FFmpeg supports. This module needs no
torchvision, librosa or system FFmpeg. Any problem with a clip raises a `MediaError` whose message names the file, what
is wrong with it and how to fix it.

A truncated file is an error if the container reveals it (mp4, mov). In other containers, and if single packets are
damaged, everything that can be decoded is used, as players do. A clip without any decodable content is an error.
"""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps

try:
    import av
except ImportError:  # without PyAV the model still runs on decoded inputs
    av: Any = None

Source = str | os.PathLike | bytes | bytearray | memoryview

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
# Bytes that never occur in text but always in the first kilobytes of a media file.
CONTROL_BYTES = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b") + b"\x7f"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"uuid", b"pnot", b"mfra")
TEXT_DEMUXERS = {"tty"}
AGAIN = "Copy or download it again."
GIVE_MEDIA = "Give the path of an audio or video file."
# The largest accepted distance between a packet's position in the file and in time: B-frames move a packet by a few
# positions, broken timestamps by hundreds.
MAX_REORDERING = 64
# A playlist names further files and URLs, which FFmpeg would open. No other file or URL may be read.
NOTHING_ELSE = {"protocol_whitelist": "none"}
LARGEST_RATE = 2**31 - 1  # hertz; FFmpeg stores the rate as an int
WIDEST_PIXEL = 8  # a pixel with sides of a larger ratio is an error in the file, and is taken as square
# Channels cancel each other if the mix has less than this share of the power of the loudest channel. A sound in only
# one of eight channels keeps more than this in the mix.
CANCELLED = 0.01
SILENT = 1e-8  # power of a sound that counts as silent, 80 dB under full scale: the noise of 16-bit samples


class MediaError(ValueError):
    """Raised for a clip that cannot be used. The message names the file, what is wrong and how to fix it."""


@dataclass(frozen=True)
class MediaInfo:
    """The decodable streams of a clip, according to its header. `duration` is in seconds; any number may be None."""

    format: str
    duration: float | None
    has_audio: bool
    has_video: bool
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    sampling_rate: int | None = None
    channels: int | None = None


# Opening -------------------------------------------------------------------------------------------------------------


def _require_av() -> None:
    if av is None:
        raise ImportError("Decoding audio and video files needs PyAV. Install it with `pip install av`.")


def _name(source: Source) -> str:
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{memoryview(source).nbytes} bytes of media>"
    if not isinstance(source, str | os.PathLike):
        raise MediaError(f"A media source must be a path or bytes, not {type(source).__name__}.")
    return os.fspath(source)


def existing_path(path: str | os.PathLike) -> str:
    """
    Return the path; if there is no such file, one whose names differ only in their Unicode normal form, if there is
    one: macOS and archives made there write "é" as two characters, which look like one.
    """
    path = os.fspath(path)
    if os.path.exists(path) or path.isascii():
        return path
    folder, name = os.path.split(path)
    folder = existing_path(folder) if folder not in ("", path) else folder
    try:
        there = os.listdir(folder or ".")
    except (OSError, ValueError):
        return path
    same = [other for other in there if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)]
    return os.path.join(folder, same[0]) if len(same) == 1 else path


def _open_file(source: Source, name: str) -> BinaryIO:
    """Open the file as a Python stream, so that FFmpeg never interprets a path as a URL or a pattern."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    try:
        return open(existing_path(source), "rb")
    except FileNotFoundError:
        remedy = "Download it first and give the local path" if "://" in name else "Check the path"
        raise MediaError(f"{name}: there is no such file. {remedy}.") from None
    except IsADirectoryError:
        raise MediaError(f"{name}: is a folder, not a media file. Give the path of one file in it.") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: cannot be read ({error}). Check the path and its permissions.") from None


def _check_mp4(stream: BinaryIO, name: str, size: int) -> None:
    """Check the top-level boxes of an mp4 (ISO 14496-12, 4.2): FFmpeg reads a truncated file without any error."""
    position, has_index = 0, False
    while position + 8 <= size:
        stream.seek(position)
        head = stream.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        elif length == 0:  # the box extends to the end of the file
            length = size - position
        has_index |= kind in (b"moov", b"moof")
        if kind in (b"mdat", b"moov", b"moof") and position + length > size:
            raise MediaError(
                f"{name}: the mp4 file is cut short: its {kind.decode()} box ends at byte {position + length:,}, "
                f"but the file ends at byte {size:,}. {AGAIN}"
            )
        if length < 8:
            break
        position += length
    if not has_index:
        raise MediaError(f"{name}: the mp4 file is cut short: its index (moov box) is missing. {AGAIN}")


def _check_bytes(stream: BinaryIO, name: str) -> None:
    """Reject files that are not media before FFmpeg opens them: it renders text as a picture and follows playlists."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size == 0:
        raise MediaError(f"{name}: the file is empty (0 bytes). {AGAIN}")
    head = stream.read(4096)
    if head.startswith(LFS_HEAD):
        raise MediaError(f"{name}: is a Git-LFS pointer, not the file itself. Fetch it with `git lfs pull`.")
    if head.translate(None, CONTROL_BYTES) == head:
        start = head[:40].decode("utf-8", "replace").strip()
        raise MediaError(f"{name}: is a text file, not a media file (it starts with {start!r}). {GIVE_MEDIA}")
    if head[4:8] in MP4_BOXES:
        _check_mp4(stream, name, size)
    stream.seek(0)


@contextmanager
def open_media(source: Source, name: str) -> Iterator[Any]:
    """Open a PyAV container. FFmpeg errors inside the block become MediaError; PyAV silences the log by default."""
    _require_av()
    with _open_file(source, name) as stream:
        _check_bytes(stream, name)
        try:
            # Tags that are not UTF-8 are common in old files and must not stop the decoding.
            with av.open(stream, metadata_errors="replace", options=NOTHING_ELSE) as container:
                if container.format.name in TEXT_DEMUXERS:
                    raise MediaError(f"{name}: is not a media file. {GIVE_MEDIA}")
                yield container
        except av.error.FFmpegError as error:
            raise MediaError(
                f"{name}: cannot be decoded ({error.strerror or error}): it is damaged or not a media file. "
                "Copy or download it again, or convert it, for example to mp4 (H.264, AAC) or wav."
            ) from None


def _pictures(container) -> list:
    """Return the video streams, without attached pictures such as the cover of a song."""
    return [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]


def _preferred(streams: list) -> Any | None:
    """Return the stream that a player plays, or None if none has a decoder: the one that the container marks as the
    default, rather the main program than a commentary or a version for the impaired, else the first."""
    flags = av.stream.Disposition
    aside = flags.comment | flags.hearing_impaired | flags.visual_impaired | flags.descriptions | flags.dependent
    aside |= flags.karaoke | flags.clean_effects | flags.non_diegetic
    usable = [s for s in streams if s.codec_context is not None]
    return max(usable, key=lambda s: (bool(s.disposition & flags.default), not s.disposition & aside), default=None)


def video_stream(container) -> Any | None:
    """Return the video stream to decode, or None."""
    return _preferred(_pictures(container))


def audio_stream(container) -> Any | None:
    """Return the audio stream to decode, or None."""
    return _preferred(container.streams.audio)


def _check_codecs(container, name: str) -> None:
    """Raise a MediaError if there are video streams or audio streams, but no decoder for any of them."""
    for streams, what in ((_pictures(container), "picture"), (container.streams.audio, "sound")):
        if streams and all(s.codec_context is None for s in streams):
            remedy = "Convert it, for example to mp4 (H.264, AAC) or wav."
            raise MediaError(f"{name}: its {what} is in a format that this FFmpeg has no decoder for. {remedy}")


def probe(source: Source, decode: bool = False) -> MediaInfo:
    """Read the properties of a clip from its header.

    Args:
        source: a path, or the bytes of a media file.
        decode: whether to also decode the first video frame and the first audio frame, to check that decoding works.

    Returns:
        `MediaInfo`. `width` and `height` are the size of the stored picture, before it is turned upright and its
        pixels are made square.

    Raises:
        MediaError: if the file is missing, empty, not a media file, or truncated; with `decode` also if one of its
            streams cannot be decoded.
    """
    name = _name(source)
    with open_media(source, name) as container:
        video, audio = video_stream(container), audio_stream(container)
        rate = video.average_rate if video else None
        info = MediaInfo(
            format=container.format.name,
            duration=container.duration / av.time_base if container.duration else None,
            has_audio=audio is not None,
            has_video=video is not None,
            width=video.codec_context.width if video else None,
            height=video.codec_context.height if video else None,
            fps=float(rate) if rate else None,
            sampling_rate=audio.codec_context.sample_rate if audio else None,
            channels=audio.codec_context.channels if audio else None,
        )
        waiting = {stream.index: stream for stream in (video, audio) if stream is not None}
        if decode:
            _check_codecs(container, name)
        if decode and waiting:
            for packet in container.demux(tuple(waiting.values())):
                index = packet.stream.index
                if index in waiting and decode_packet(waiting[index], packet):
                    del waiting[index]
                if not waiting:
                    break
            for stream in waiting.values():
                raise MediaError(f"{name}: no frame of its {stream.type} stream can be decoded. {AGAIN}")
    return info


# Video ---------------------------------------------------------------------------------------------------------------


def _choose(times: np.ndarray, end: int, num_frames: int, generator: np.random.Generator | None) -> list[int]:
    """Choose one moment in each of `num_frames` equal segments of the clip and return the frame indices, without
    repeats.

    Args:
        times (frames,): the sorted times at which the frames appear, as integers.
        end: the time at which the last frame ends.
    """
    # The center of each segment, or a uniform moment in it; rounding down keeps a moment inside its frame.
    within = np.full(num_frames, 0.5) if generator is None else generator.random(num_frames)
    start = int(times[0])
    moments = start + np.floor((np.arange(num_frames) + within) * (end - start) / num_frames)
    indices = np.searchsorted(times, moments, side="right") - 1
    return sorted({int(i) for i in np.clip(indices, 0, len(times) - 1)})


def square_size(stream, frame) -> tuple[int, int]:
    """Return the (width, height) of a stored frame after its pixels are made square, by enlarging the shorter side."""
    width, height, shape = frame.width, frame.height, stream.sample_aspect_ratio
    if not shape or not 1 / WIDEST_PIXEL <= shape <= WIDEST_PIXEL:
        return width, height
    return (round(width * shape), height) if shape > 1 else (width, round(height / shape))


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is shown upright: transposed or not, then mirrored (left-right), then flipped (up-down)."""

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False

    @classmethod
    def of(cls, frame) -> Orientation:
        """Read a frame's display matrix, which cameras write instead of turning or mirroring the picture itself."""
        found = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if found is None:
            return cls()
        # A stored point (x, y) is shown at (a x + c y, b x + d y), up to a translation.
        a, b, _, c, d = (int(value) for value in np.frombuffer(found, np.int32)[:5])
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn an image (height, width, ...) upright."""
        image = image.swapaxes(0, 1) if self.transposed else image
        image = image[:, ::-1] if self.mirrored else image
        return image[::-1] if self.flipped else image


def _picture(frame, size: tuple[int, int]) -> np.ndarray:
    """Convert a decoded frame to (height, width, 3) uint8, upright. `size`: `square_size` of the first frame."""
    # One thread: a frame keeps its scaler, and a process that is forked meanwhile (a data loader's worker) would wait
    # forever for the scaler's threads when it frees the frame.
    pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1], threads=1)
    return Orientation.of(frame).apply(pixels)


@dataclass
class _Packets:
    """Timestamps of the packets of a video stream."""

    times: list[int]  # sorted times of the packets that show a frame
    keys: list[tuple[int, int]]  # (packet number, time) of each packet where decoding can start
    last_duration: int
    by_rank: bool  # the clip has no usable timestamps: frames are counted instead


def _scan(source: Source, name: str) -> _Packets:
    """Read the video packets without decoding them. This is cheap, exact for variable frame rates, and needs no
    seeking, which fails in containers without an index."""
    with open_media(source, name) as container:
        stream = video_stream(container)
        if stream is None:
            _check_codecs(container, name)
            what = container.format.name.split(",")[0]
            audio = audio_stream(container)
            if audio is None:
                raise MediaError(f"{name}: holds neither video nor sound ({what}). {GIVE_MEDIA}")
            raise MediaError(
                f"{name}: holds only sound ({what}, {audio.codec_context.name}), no video. "
                'Pass it as {"type": "audio"}, or give a file with a video stream.'
            )
        times, keys, duration = [], [], 0
        for number, packet in enumerate(container.demux(stream)):
            if packet.size == 0:
                continue
            if not packet.is_discard:
                times.append(packet.pts)
                duration = packet.duration or duration
            if packet.is_keyframe:
                keys.append((number, packet.pts))
    if not times:
        raise MediaError(f"{name}: its video stream has no frames. Copy it again, or leave the video out.")
    by_rank = any(t is None for t in times) or any(t is None for _, t in keys)
    if not by_rank:
        places = np.argsort(np.argsort(times, kind="stable"), kind="stable")
        by_rank = bool(np.abs(places - np.arange(len(times))).max() > MAX_REORDERING)
    if by_rank:
        return _Packets(list(range(len(times))), [], 1, True)
    ordered = sorted(times)
    if not duration and len(ordered) > 1:
        duration = int(np.median(np.diff(ordered)))
    return _Packets(ordered, keys, max(duration, 1), False)


def decode_packet(stream, packet) -> list:
    """Decode a packet (None: flush the decoder) and return the completed frames; no frames if it is damaged."""
    try:
        return stream.decode(packet)
    except av.error.FFmpegError:
        return []


def _decode_at(source: Source, name: str, packets: _Packets, wanted: list[int]) -> list[np.ndarray]:
    """Decode the frames at the times `wanted` (sorted). Only the packets between a wanted frame and the key frame
    before it are decoded, and only the wanted frames are kept in memory."""
    pictures: list[np.ndarray] = []
    size = None
    last = -1

    def keep(frames) -> None:
        nonlocal size, last
        for frame in frames:
            last = frame.pts if frame.pts is not None and not packets.by_rank else last + 1
            while wanted and last >= wanted[0]:
                wanted.pop(0)
                if wanted and last >= wanted[0]:
                    continue  # this frame replaces several damaged frames: take it once
                size = size or square_size(stream, frame)
                pictures.append(_picture(frame, size))

    def next_start(number: int) -> int:
        """Number of the last key packet from which the next wanted frame can be decoded; `number` if there is none."""
        return max((n for n, time in packets.keys if time <= wanted[0]), default=number)

    wanted = list(wanted)
    with open_media(source, name) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1  # a clip is short, and data loaders already use several processes
        start = next_start(0)
        for number, packet in enumerate(container.demux(stream)):
            if packet.size == 0 or number < start:
                continue
            if number == start and number > 0:
                stream.codec_context.flush_buffers()
            before = len(wanted)
            keep(decode_packet(stream, packet))
            if not wanted:
                break
            if len(wanted) < before:
                start = max(next_start(number), number)
        if wanted:
            keep(decode_packet(stream, None))
    return pictures


def _check_num_frames(num_frames: int) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}.")


def read_video(source: Source, num_frames: int = 8, generator: np.random.Generator | None = None) -> np.ndarray:
    """Sample frames from a clip: the clip is divided into `num_frames` equal segments and one frame is taken from each.

    Args:
        source: a path, or the bytes of a media file.
        num_frames: how many frames to take (8 in the paper, section 3.1).
        generator: None takes the frame at the center of each segment; a numpy generator draws a uniform moment in each
            segment.

    Returns:
        uint8 array of shape (frames, height, width, 3), RGB, upright and with square pixels, in temporal order.
        `frames` is less than `num_frames` if several segments of a short clip select the same frame; the caller masks
        the rest.

    Raises:
        MediaError: if the clip cannot be read or has no video.
    """
    _check_num_frames(num_frames)
    name = _name(source)
    packets = _scan(source, name)
    indices = _choose(np.asarray(packets.times), packets.times[-1] + packets.last_duration, num_frames, generator)
    pictures = _decode_at(source, name, packets, [packets.times[i] for i in indices])
    if not pictures:
        raise MediaError(
            f"{name}: none of its {len(packets.times)} video frames can be decoded. Copy or download it again."
        )
    if len({p.shape for p in pictures}) > 1:  # the rotation changes inside the clip
        pictures = [p for p in pictures if p.shape == pictures[0].shape]
    return np.stack(pictures)


# Audio ---------------------------------------------------------------------------------------------------------------


def _has_positions(layout) -> bool:
    """Whether the speaker position of each channel is known, which decides its weight in a mix. Without it, FFmpeg
    guesses from the number of channels, and for example drops the third of three channels as a subwoofer."""
    return layout.nb_channels <= 2 or not layout.name.endswith("channels")


def _unpacked(frame) -> np.ndarray:
    """Return the samples of a packed frame as (channels, samples). PyAV cannot read planar frames of many channels."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T


def _resampled(frames, sampling_rate: int, mixed: bool = True) -> Iterator[np.ndarray]:
    """Yield chunks of float32 audio, mixed to mono (samples,), or (channels, samples) if not `mixed`. A format change
    inside the stream starts a new resampler."""

    def chunks(resampler, frame) -> Iterator[np.ndarray]:
        for chunk in resampler.resample(frame):
            samples = _unpacked(chunk)
            yield samples if not mixed else samples[0] if len(samples) == 1 else samples.mean(axis=0)

    resampler, setup = None, None
    for frame in frames:
        found = (frame.format.name, frame.layout.name, frame.sample_rate)
        if found != setup:
            if resampler is not None:
                yield from chunks(resampler, None)
            if mixed and _has_positions(frame.layout):
                # rematrix_maxval 1 keeps a downmix in range: FFmpeg's weights for float samples sum to more than 1.
                resampler = av.AudioResampler("flt", "mono", sampling_rate, options={"rematrix_maxval": "1.0"})
            else:
                resampler = av.AudioResampler("flt", frame.layout, sampling_rate)
            setup = found
        frame.pts = None  # a gap in the timestamps does not mean silence
        yield from chunks(resampler, frame)
    if resampler is not None:
        yield from chunks(resampler, None)


def _lone_channel(powers: np.ndarray, mix: float, subwoofers: Iterable[int] = ()) -> int | None:
    """Return the channel to use alone, if the channels cancel each other when they are mixed, else None.

    Args:
        powers (channels,): the mean square of each channel.
        mix: the mean square of the mix.
        subwoofers: channels that are used only if all others are silent.
    """
    main = powers.copy()
    main[list(subwoofers)] = 0
    found = main if main.max() > SILENT else powers
    return int(found.argmax()) if found.max() > SILENT and mix < CANCELLED * found.max() else None


class _Powers:
    """The power of each channel of a sound, summed up while its frames pass through."""

    def __init__(self):
        self.sums: np.ndarray | None = None
        self.count, self.subwoofers = 0, ()

    def watch(self, frames) -> Iterator:
        """Yield the frames unchanged. A stream that changes its number of channels is measured up to there."""
        resampler, setup = None, None
        for frame in frames:
            channels = frame.layout.nb_channels
            if channels > 1 and (self.sums is None or len(self.sums) == channels):
                found = (frame.format.name, frame.layout.name, frame.sample_rate)
                if found != setup:
                    resampler, setup = av.AudioResampler("flt", frame.layout, frame.sample_rate), found
                    if _has_positions(frame.layout):
                        names = [channel.name for channel in frame.layout.channels]
                        self.subwoofers = tuple(i for i, name in enumerate(names) if name.startswith("LFE"))
                self._add(resampler, frame, channels)
            yield frame

    def _add(self, resampler, frame, channels: int) -> None:
        if self.sums is None:
            self.sums = np.zeros(channels)
        for chunk in resampler.resample(frame):
            samples = _unpacked(chunk)
            self.sums += np.square(samples, dtype=np.float64).sum(axis=1)
            self.count += samples.shape[1]

    def lone_channel(self, mixed: np.ndarray) -> int | None:
        """Return the channel to use instead of the mix, or None."""
        if self.count == 0 or len(mixed) == 0 or not np.isfinite(self.sums).all():
            return None
        return _lone_channel(self.sums / self.count, _power(mixed), self.subwoofers)


def _power(samples: np.ndarray) -> float:
    return float(np.square(samples, dtype=np.float64).mean())


def _collect(chunks: Iterable[np.ndarray], limit: int | None) -> np.ndarray:
    """Join the chunks up to `limit` samples; decoding stops there."""
    kept, count = [], 0
    for chunk in chunks:
        kept.append(chunk)
        count += len(chunk)
        if limit is not None and count >= limit:
            break
    samples = np.concatenate(kept) if kept else np.zeros(0, np.float32)
    return np.ascontiguousarray(samples[:limit], dtype=np.float32)


def _limit(sampling_rate: int, max_seconds: float | None) -> int | None:
    if sampling_rate != int(sampling_rate) or sampling_rate < 1:
        raise ValueError(f"sampling_rate must be a positive whole number of hertz, got {sampling_rate}.")
    if max_seconds is None:
        return None
    if max_seconds <= 0:
        raise ValueError(f"max_seconds must be above 0, got {max_seconds}.")
    return max(1, round(max_seconds * sampling_rate))


def _check_samples(samples: np.ndarray, name: str) -> np.ndarray:
    if len(samples) == 0:
        raise MediaError(f"{name}: no sound can be decoded from it. Copy it again, or leave the audio out.")
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise MediaError(f"{name}: {bad} of its {len(samples)} samples are NaN or infinite. Export the sound again.")
    return samples


def _read_sound(
    source: Source, sampling_rate: int, max_seconds: float | None, channel: int | None = None
) -> tuple[np.ndarray, int | None]:
    """Return the mono samples, and the channel that should be used alone because the channels cancel in the mix.

    Args:
        source, sampling_rate, max_seconds: see `read_audio`.
        channel: a channel to decode instead of the mix.
    """
    limit = _limit(sampling_rate, max_seconds)
    name = _name(source)
    with open_media(source, name) as container:
        stream = audio_stream(container)
        if stream is None:
            _check_codecs(container, name)
            what = container.format.name.split(",")[0]
            if video_stream(container) is None:
                raise MediaError(f"{name}: holds neither sound nor video ({what}). {GIVE_MEDIA}")
            raise MediaError(
                f"{name}: has no sound track, only video ({what}). "
                'Pass it as {"type": "video"} alone, or give a file with an audio stream.'
            )
        stream.codec_context.thread_count = 1
        frames = (frame for packet in container.demux(stream) for frame in decode_packet(stream, packet))
        if channel is not None:
            chunks = _resampled(frames, int(sampling_rate), mixed=False)
            return _collect((chunk[min(channel, len(chunk) - 1)] for chunk in chunks), limit), None
        powers = _Powers()
        samples = _collect(_resampled(powers.watch(frames), int(sampling_rate)), limit)
    return _check_samples(samples, name), powers.lone_channel(samples)


def lone_channel(source: Source, max_seconds: float | None = None) -> int | None:
    """Return the channel that `read_audio` uses alone because the channels cancel each other when they are mixed, such
    as two with opposite signs. None if the channels are mixed.

    Args:
        source, max_seconds: see `read_audio`.

    Raises:
        MediaError: see `read_audio`.
    """
    return _read_sound(source, 16000, max_seconds)[1]


def read_audio(source: Source, sampling_rate: int = 16000, max_seconds: float | None = None) -> np.ndarray:
    """Decode the sound of an audio file or a video to mono.

    Args:
        source: a path, or the bytes of a media file.
        sampling_rate: sampling rate of the result, in hertz.
        max_seconds: decoding stops there; None decodes all.

    Returns:
        float32 array of shape (samples,), in [-1, 1] except for the overshoot of lossy codecs. All channels are mixed;
        if they cancel each other (the mix is silent, but a channel is not), the loudest channel is used alone.

    Raises:
        MediaError: if the clip cannot be read, has no sound, or has samples that are not finite.
    """
    samples, channel = _read_sound(source, sampling_rate, max_seconds)
    if channel is not None:
        samples = _read_sound(source, sampling_rate, max_seconds, channel)[0]
    return _check_samples(samples, _name(source))


# Items of a conversation ---------------------------------------------------------------------------------------------


def media_item(item: dict) -> dict:
    """
    Return a content item that has its path under "path". Conversations for Qwen's models have it under the kind, as in
    {"type": "video", "video": "clip.mp4"}, perhaps as a `file://` URL.
    """
    kind = item.get("type")
    path = item.get(kind)
    if kind not in ("audio", "video") or not isinstance(path, str | os.PathLike):
        return item
    path = os.fspath(path)
    if path.startswith("file://"):
        path = url2pathname(path.removeprefix("file://"))
    others = {key: value for key, value in item.items() if key != kind}
    return others if others.get("path") is not None or others.get("bytes") is not None else {**others, "path": path}


def _item_source(item: dict, kind: str) -> tuple[Source, str]:
    """Return the source to decode and its name in errors. Bytes take precedence over the path, as in `datasets`."""
    path, data = item.get("path"), item.get("bytes")
    if data is not None:
        return data, f"{path} ({_name(data)})" if path is not None else _name(data)
    if path is not None:
        return path, _name(path)
    present = sorted(key for key, value in item.items() if value is not None)
    raise MediaError(f'A {kind} item of a message needs "path", "bytes" or "{kind}" (decoded), but it has {present}.')


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # numpy rejects torch tensors that require gradients, are bfloat16 or on a GPU
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _named(error: MediaError, source: Source, name: str) -> MediaError:
    return MediaError(str(error).replace(_name(source), name, 1))


def _resample_decoded(samples: np.ndarray, rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """Resample mono float32 samples from `rate` to chunks at `sampling_rate`."""

    def frames():
        for start in range(0, len(samples), rate):  # one second at a time
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + rate], format="flt", layout="mono")
            frame.sample_rate = rate
            yield frame

    if rate == sampling_rate:
        yield samples
    else:
        _require_av()
        yield from _resampled(frames(), sampling_rate)


def load_audio(item: dict, sampling_rate: int = 16000, max_seconds: float | None = None) -> np.ndarray:
    """Load the audio of a message's content item as mono samples.

    Args:
        item: {"type": "audio"} with one of "path", "bytes", or "audio" (decoded: floats in [-1, 1] or signed integers
            of shape (samples,) or (channels, samples)) and its "sampling_rate" in hertz. A key with the value None
            counts as absent.
        sampling_rate, max_seconds: as in `read_audio`.

    Returns:
        float32 array of shape (samples,).

    Raises:
        MediaError: as in `read_audio`, and if decoded samples have another shape or type or no sampling rate.
    """
    limit, item = _limit(sampling_rate, max_seconds), media_item(item)
    if item.get("audio") is None:
        source, name = _item_source(item, "audio")
        try:
            return read_audio(source, sampling_rate, max_seconds)
        except MediaError as error:
            raise _named(error, source, name) from None

    name = "The decoded audio of a message"
    rate = item.get("sampling_rate")
    if rate is None:
        raise MediaError(f'{name} has no sampling rate. Add "sampling_rate" in hertz next to "audio".')
    is_number = isinstance(rate, int | float | np.number) and not isinstance(rate, bool)
    if not is_number or not (1 <= rate <= LARGEST_RATE and rate == int(rate)):
        raise MediaError(f"{name} has the sampling rate {rate!r}. Give a whole number of hertz below 2**31.")
    samples = _array(item["audio"])
    if samples.ndim not in (1, 2) or samples.size == 0 or (samples.ndim == 2 and samples.shape[0] > 64):
        raise MediaError(f"{name} has the shape {samples.shape}. Give (samples,) or (channels, samples).")
    if samples.dtype.kind == "i" and samples.dtype.itemsize <= 4:
        samples = samples / (np.iinfo(samples.dtype).max + 1.0)
    elif samples.dtype.kind != "f":
        raise MediaError(f"{name} has the type {samples.dtype}. Give floats in [-1, 1].")
    if samples.ndim == 2:
        mixed = samples.mean(axis=0)
        channel = _lone_channel(np.square(samples, dtype=np.float64).mean(axis=1), _power(mixed))
        samples = mixed if channel is None else samples[channel]
    samples = _check_samples(samples.astype(np.float32), name)
    # Check again: the resampler may return no samples for a very short input.
    return _check_samples(_collect(_resample_decoded(samples, int(rate), int(sampling_rate)), limit), name)


def _decoded_frame(frame: Any, place: int) -> np.ndarray:
    """Convert a frame, an array or a PIL image, to (height, width, 3) uint8."""
    if isinstance(frame, Image.Image):
        frame = ImageOps.exif_transpose(frame)
        if frame.mode.startswith("I;16"):  # Pillow would clip 16-bit gray instead of scaling it
            frame = Image.fromarray((np.asarray(frame) >> 8).astype(np.uint8))
        return np.asarray(frame.convert("RGB"))
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
        raise MediaError(
            f"Frame {place} of the decoded video of a message is {frame.dtype} of shape {frame.shape}. "
            "Give uint8 frames of shape (height, width, 3), or PIL images."
        )
    return frame


def load_video(item: dict, num_frames: int = 8, generator: np.random.Generator | None = None) -> np.ndarray:
    """Load the frames of a message's content item.

    Args:
        item: {"type": "video"} with one of "path", "bytes", or "video" (decoded: an array (frames, height, width, 3)
            uint8, or a list of such frames or of PIL images, evenly spaced in time). A key with the value None counts
            as absent.
        num_frames, generator: as in `read_video`.

    Returns:
        uint8 array of shape (frames, height, width, 3), frames <= num_frames.

    Raises:
        MediaError: as in `read_video`, and if the decoded frames have another shape or type.
    """
    _check_num_frames(num_frames)
    item = media_item(item)
    video = item.get("video")
    if video is None:
        source, name = _item_source(item, "video")
        try:
            return read_video(source, num_frames, generator)
        except MediaError as error:
            raise _named(error, source, name) from None
    if not isinstance(video, list | tuple):
        video = _array(video)
    if isinstance(video, np.ndarray) and video.ndim != 4:
        shape = video.shape
        raise MediaError(f"The decoded video of a message has the shape {shape}. Give (frames, height, width, 3).")
    if len(video) == 0:
        raise MediaError("The decoded video of a message has no frames. Give at least one, or leave the video out.")
    indices = _choose(np.arange(len(video)), len(video), num_frames, generator)
    frames = [_decoded_frame(video[i], i) for i in indices]
    if len({f.shape for f in frames}) > 1:
        sizes = sorted({f.shape for f in frames})
        raise MediaError(f"The frames of a message's decoded video differ in size: {sizes}. Give one size.")
    return np.stack(frames)
