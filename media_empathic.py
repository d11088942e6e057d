"""Decoding of clips with PyAV: frames for CLIP, 16 kHz mono sound for Whisper.

A clip is a path or the bytes of a file, in any container and codec that FFmpeg knows. Nothing here needs torchvision,
librosa or a system FFmpeg. Whatever is wrong with a clip becomes one `MediaError` whose message names the file, what is
wrong with it and how to mend it.

A file that was cut short is an error where the container says so (mp4, mov). Elsewhere, and where single packets inside
the file are damaged, what can be decoded is used, as players do; a clip of which nothing can be decoded is an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

try:
    import av
except ImportError:  # the model runs without it on inputs that are decoded already
    av = None

Source = str | os.PathLike | bytes | bytearray | memoryview

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
# Bytes that text never holds and that the first kilobytes of a media file always do.
CONTROL_BYTES = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b") + b"\x7f"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"uuid", b"pnot", b"mfra")
TEXT_DEMUXERS = {"tty"}
AGAIN = "Copy or download it again."
GIVE_MEDIA = "Give the path of an audio or video file."
# The largest distance between a packet's place in the file and in time: B-frames move by a few places, a broken clock
# by hundreds.
MAX_REORDERING = 64
# A playlist names further files and addresses, and FFmpeg would open them: a file is only ever read by itself.
NOTHING_ELSE = {"protocol_whitelist": "none"}
LARGEST_RATE = 2**31 - 1  # hertz, an int of FFmpeg's


class MediaError(ValueError):
    """A clip that cannot be used. The message names the file, what is wrong and the mend."""


@dataclass(frozen=True)
class MediaInfo:
    """What a clip holds that can be decoded, as its header says. `duration` is in seconds; a number may be None."""

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


def _open_file(source: Source, name: str) -> BinaryIO:
    """The file as a Python stream, so that FFmpeg never reads a path as a URL or a pattern."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    try:
        return open(source, "rb")
    except FileNotFoundError:
        mend = "Download it first and give the local path" if "://" in name else "Check the path"
        raise MediaError(f"{name}: there is no such file. {mend}.") from None
    except IsADirectoryError:
        raise MediaError(f"{name}: is a folder, not a media file. Give the path of one file in it.") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: cannot be read ({error}). Check the path and its permissions.") from None


def _check_mp4(stream: BinaryIO, name: str, size: int) -> None:
    """Walks the top-level boxes of an mp4 (ISO 14496-12, 4.2): FFmpeg reads one that was cut short without a word."""
    position, has_index = 0, False
    while position + 8 <= size:
        stream.seek(position)
        head = stream.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        elif length == 0:  # up to the end of the file
            length = size - position
        has_index |= kind in (b"moov", b"moof")
        if kind in (b"mdat", b"moov", b"moof") and position + length > size:
            raise MediaError(
                f"{name}: the mp4 file is cut short: its {kind.decode()} box ends at byte {position + length:,}, "
                f"the file at byte {size:,}. {AGAIN}"
            )
        if length < 8:
            break
        position += length
    if not has_index:
        raise MediaError(f"{name}: the mp4 file is cut short: its index (moov box) is missing. {AGAIN}")


def _check_bytes(stream: BinaryIO, name: str) -> None:
    """Refuses what is no media file before FFmpeg guesses: it draws text as a picture and follows playlists."""
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
def _open(source: Source, name: str) -> Iterator[Any]:
    """An open PyAV container. FFmpeg's errors inside the block become MediaError; PyAV silences its log by default."""
    _require_av()
    with _open_file(source, name) as stream:
        _check_bytes(stream, name)
        try:
            # Tags in another encoding than UTF-8 are common in old files and must not stop the decoding.
            with av.open(stream, metadata_errors="replace", options=NOTHING_ELSE) as container:
                if container.format.name in TEXT_DEMUXERS:
                    raise MediaError(f"{name}: is not a media file. {GIVE_MEDIA}")
                yield container
        except av.error.FFmpegError as error:
            raise MediaError(
                f"{name}: cannot be decoded ({error.strerror or error}): it is damaged or no media file. "
                "Copy or download it again, or convert it, for example to mp4 (H.264, AAC) or wav."
            ) from None


def _pictures(container) -> list:
    """The moving pictures; the cover of a song is none."""
    return [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]


def _video_stream(container) -> Any | None:
    """The first moving picture that there is a decoder for."""
    return next((s for s in _pictures(container) if s.codec_context is not None), None)


def _audio_stream(container) -> Any | None:
    """The first sound that there is a decoder for."""
    return next((s for s in container.streams.audio if s.codec_context is not None), None)


def _check_codecs(container, name: str) -> None:
    """MediaError if there are streams of a kind, but a decoder for none of them."""
    for streams, what in ((_pictures(container), "picture"), (container.streams.audio, "sound")):
        if streams and all(s.codec_context is None for s in streams):
            mend = "Convert it, for example to mp4 (H.264, AAC) or wav."
            raise MediaError(f"{name}: its {what} is in a format that this FFmpeg has no decoder for. {mend}")


def probe(source: Source, decode: bool = False) -> MediaInfo:
    """Reads what a clip holds from its header.

    Args:
        source: a path, or the bytes of a media file.
        decode: whether to decode the first frame of the picture and of the sound as well, to prove that it can be done.

    Returns:
        `MediaInfo`. `width` and `height` are those of the stored picture, before any rotation.

    Raises:
        MediaError: if the file is missing, empty, no media file, or cut short; with `decode` also if a stream of it
            cannot be decoded.
    """
    name = _name(source)
    with _open(source, name) as container:
        video, audio = _video_stream(container), _audio_stream(container)
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
                if index in waiting and _decode(waiting[index], packet):
                    del waiting[index]
                if not waiting:
                    break
            for stream in waiting.values():
                raise MediaError(f"{name}: nothing of its {stream.type} stream can be decoded. {AGAIN}")
    return info


# Video ---------------------------------------------------------------------------------------------------------------


def _choose(times: np.ndarray, end: int, num_frames: int, generator: np.random.Generator | None) -> list[int]:
    """Indices of the frames shown at one moment of each of `num_frames` equal segments of the clip, without repeats.

    Args:
        times (frames,): the sorted times at which the frames appear, as integers.
        end: the time at which the last one ends.
    """
    # The centre of each segment, or a uniform moment in it; rounding down keeps a moment inside its frame.
    within = np.full(num_frames, 0.5) if generator is None else generator.random(num_frames)
    start = int(times[0])
    moments = start + np.floor((np.arange(num_frames) + within) * (end - start) / num_frames)
    indices = np.searchsorted(times, moments, side="right") - 1
    return sorted({int(i) for i in np.clip(indices, 0, len(times) - 1)})


def _picture(frame, size: tuple[int, int]) -> np.ndarray:
    """One decoded frame as (height, width, 3) uint8, upright. `size`: the (width, height) of the first frame."""
    image = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    turns = round(frame.rotation / 90) % 4  # phones store the turn beside the picture, counter-clockwise
    return np.rot90(image, turns) if turns else image


@dataclass
class _Packets:
    """Where the packets of a video stream stand in time, in the order of the file."""

    times: list[int]  # of the packets that show a frame
    keys: list[tuple[int, int]]  # (packet number, time) of each packet where decoding can start
    last_duration: int
    by_rank: bool  # the clip has no usable clock: frames are counted instead


def _scan(source: Source, name: str) -> _Packets:
    """Reads the packets of the picture without decoding them: cheap, exact for a variable frame rate, and without the
    seeking that fails in containers without an index."""
    with _open(source, name) as container:
        stream = _video_stream(container)
        if stream is None:
            _check_codecs(container, name)
            what = container.format.name.split(",")[0]
            audio = _audio_stream(container)
            if audio is None:
                raise MediaError(f"{name}: holds neither picture nor sound ({what}). {GIVE_MEDIA}")
            raise MediaError(
                f"{name}: holds only sound ({what}, {audio.codec_context.name}), no picture. "
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
        raise MediaError(f"{name}: its video stream holds no frame. Copy it again, or leave the video out.")
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


def _decode(stream, packet) -> list:
    """The frames that a packet (None: the end) completes; none if it is damaged."""
    try:
        return stream.decode(packet)
    except av.error.FFmpegError:
        return []


def _decode_at(source: Source, name: str, packets: _Packets, wanted: list[int]) -> list[np.ndarray]:
    """The frames at the times `wanted` (sorted). Only the packets between a wanted frame and the key frame before it
    are decoded, and only the wanted frames are held."""
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
                    continue  # this frame stands in for a damaged one: take it once
                size = size or (frame.width, frame.height)
                pictures.append(_picture(frame, size))

    def next_start(number: int) -> int:
        """The number of the last key packet from which the next wanted frame can be decoded, if it is ahead."""
        return max((n for n, time in packets.keys if time <= wanted[0]), default=number)

    wanted = list(wanted)
    with _open(source, name) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1  # a clip is short, and data loaders bring their own processes
        start = next_start(0)
        for number, packet in enumerate(container.demux(stream)):
            if packet.size == 0 or number < start:
                continue
            if number == start and number > 0:
                stream.codec_context.flush_buffers()
            before = len(wanted)
            keep(_decode(stream, packet))
            if not wanted:
                break
            if len(wanted) < before:
                start = max(next_start(number), number)
        if wanted:
            keep(_decode(stream, None))
    return pictures


def _check_num_frames(num_frames: int) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}.")


def read_video(source: Source, num_frames: int = 8, generator: np.random.Generator | None = None) -> np.ndarray:
    """Samples frames over a clip: the clip's time is cut into `num_frames` equal segments, one frame is taken in each.

    Args:
        source: a path, or the bytes of a media file.
        num_frames: how many frames to take (8 in the paper, section 3.1).
        generator: None takes the frame at the centre of each segment; a numpy generator draws a uniform moment of each.

    Returns:
        uint8 array of shape (frames, height, width, 3), RGB, upright, in the order of time. `frames` is less than
        `num_frames` where several segments fall on one frame of a short clip: the caller masks the rest.

    Raises:
        MediaError: if the clip cannot be read or has no picture.
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
    if len({p.shape for p in pictures}) > 1:  # a turn of the picture inside the clip
        pictures = [p for p in pictures if p.shape == pictures[0].shape]
    return np.stack(pictures)


# Audio ---------------------------------------------------------------------------------------------------------------


def _resampled(frames, sampling_rate: int) -> Iterator[np.ndarray]:
    """Chunks (samples,) of mono float32 sound. A new resampler starts wherever the format changes inside a stream."""
    resampler, setup = None, None
    for frame in frames:
        found = (frame.format.name, frame.layout.name, frame.sample_rate)
        if found != setup:
            if resampler is not None:
                yield from (chunk.to_ndarray()[0] for chunk in resampler.resample(None))
            # rematrix_maxval 1 keeps a downmix in range: FFmpeg's weights for float samples add up to more than 1.
            resampler = av.AudioResampler("flt", "mono", sampling_rate, options={"rematrix_maxval": "1.0"})
            setup = found
        frame.pts = None  # a gap in the clock is no silence
        yield from (chunk.to_ndarray()[0] for chunk in resampler.resample(frame))
    if resampler is not None:
        yield from (chunk.to_ndarray()[0] for chunk in resampler.resample(None))


def _collect(chunks: Iterator[np.ndarray], limit: int | None) -> np.ndarray:
    """Joins the chunks up to `limit` samples; decoding stops there."""
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


def read_audio(source: Source, sampling_rate: int = 16000, max_seconds: float | None = None) -> np.ndarray:
    """Decodes the sound of a clip, be it an audio file or the sound track of a video, to mono.

    Args:
        source: a path, or the bytes of a media file.
        sampling_rate: of the result, in hertz.
        max_seconds: decoding stops there; None decodes all.

    Returns:
        float32 array of shape (samples,), all channels mixed, in [-1, 1] but for what a lossy codec overshoots.

    Raises:
        MediaError: if the clip cannot be read, has no sound, or holds samples that are not finite.
    """
    limit = _limit(sampling_rate, max_seconds)
    name = _name(source)
    with _open(source, name) as container:
        stream = _audio_stream(container)
        if stream is None:
            _check_codecs(container, name)
            what = container.format.name.split(",")[0]
            if _video_stream(container) is None:
                raise MediaError(f"{name}: holds neither sound nor picture ({what}). {GIVE_MEDIA}")
            raise MediaError(
                f"{name}: has no sound track, only a picture ({what}). "
                'Pass it as {"type": "video"} alone, or give a file with an audio stream.'
            )
        stream.codec_context.thread_count = 1
        frames = (frame for packet in container.demux(stream) for frame in _decode(stream, packet))
        samples = _collect(_resampled(frames, int(sampling_rate)), limit)
    return _check_samples(samples, name)


# Items of a conversation ---------------------------------------------------------------------------------------------


def _item_source(item: dict, kind: str) -> tuple[Source, str]:
    """(what to decode, its name in errors). Bytes win over the path, which then only names them, as in `datasets`."""
    path, data = item.get("path"), item.get("bytes")
    if data is not None:
        return data, f"{path} ({_name(data)})" if path is not None else _name(data)
    if path is not None:
        return path, _name(path)
    present = sorted(key for key, value in item.items() if value is not None)
    raise MediaError(f'A {kind} item of a message needs "path", "bytes" or "{kind}" (decoded); this one has {present}.')


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor: numpy takes none that needs gradients, is bfloat16 or on a GPU
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _named(error: MediaError, source: Source, name: str) -> MediaError:
    return MediaError(str(error).replace(_name(source), name, 1))


def _resample_decoded(samples: np.ndarray, rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """Mono float32 samples at `rate` -> chunks at `sampling_rate`."""

    def frames():
        for start in range(0, len(samples), rate):  # a second at a time
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + rate], format="flt", layout="mono")
            frame.sample_rate = rate
            yield frame

    if rate == sampling_rate:
        yield samples
    else:
        _require_av()
        yield from _resampled(frames(), sampling_rate)


def load_audio(item: dict, sampling_rate: int = 16000, max_seconds: float | None = None) -> np.ndarray:
    """The sound of one content item of a message, mono.

    Args:
        item: {"type": "audio"} with one of "path", "bytes", or "audio" (decoded: floats in [-1, 1] or signed integers
            of shape (samples,) or (channels, samples)) beside "sampling_rate" in hertz. A key with None is absent.
        sampling_rate, max_seconds: as in `read_audio`.

    Returns:
        float32 array of shape (samples,).

    Raises:
        MediaError: as `read_audio`, and if the decoded samples have another shape or type or lack their sampling rate.
    """
    limit = _limit(sampling_rate, max_seconds)
    if item.get("audio") is None:
        source, name = _item_source(item, "audio")
        try:
            return read_audio(source, sampling_rate, max_seconds)
        except MediaError as error:
            raise _named(error, source, name) from None

    name = "The decoded audio of a message"
    rate = item.get("sampling_rate")
    if rate is None:
        raise MediaError(f'{name} has no sampling rate. Add "sampling_rate" in hertz beside "audio".')
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
    samples = samples if samples.ndim == 1 else samples.mean(axis=0)
    samples = _check_samples(samples.astype(np.float32), name)
    # The resampler makes nothing of a few samples.
    return _check_samples(_collect(_resample_decoded(samples, int(rate), int(sampling_rate)), limit), name)


def _decoded_frame(frame: Any, place: int) -> np.ndarray:
    """One frame, an array or a PIL image, as (height, width, 3) uint8."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
        raise MediaError(
            f"Frame {place} of the decoded video of a message is {frame.dtype} of shape {frame.shape}. "
            "Give uint8 frames of shape (height, width, 3), or PIL images."
        )
    return frame


def load_video(item: dict, num_frames: int = 8, generator: np.random.Generator | None = None) -> np.ndarray:
    """The frames of one content item of a message.

    Args:
        item: {"type": "video"} with one of "path", "bytes", or "video" (decoded: an array (frames, height, width, 3)
            uint8, or a list of such frames or of PIL images, evenly spaced in time). A key with None is absent.
        num_frames, generator: as in `read_video`.

    Returns:
        uint8 array of shape (frames, height, width, 3), frames <= num_frames.

    Raises:
        MediaError: as `read_video`, and if the decoded frames have another shape or type.
    """
    _check_num_frames(num_frames)
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
        raise MediaError("The decoded video of a message has no frame. Give at least one, or leave the video out.")
    indices = _choose(np.arange(len(video)), len(video), num_frames, generator)
    frames = [_decoded_frame(video[i], i) for i in indices]
    if len({f.shape for f in frames}) > 1:
        sizes = sorted({f.shape for f in frames})
        raise MediaError(f"The frames of a message's decoded video differ in size: {sizes}. Give one size.")
    return np.stack(frames)
