"""The human evaluation: clips as every browser plays them."""

from pathlib import Path

import av
import numpy as np
import pytest

from empathic.evaluation.study import clips
from empathic.media_empathic import MediaError, probe, read_audio, read_video


def _codecs(path):
    with av.open(str(path)) as container:
        return [(stream.codec_context.name, getattr(stream, "pix_fmt", None)) for stream in container.streams]


def test_a_clip_that_plays_is_copied(clip, tmp_path):
    target, kind = clips.playable(Path(clip), Path(clip), tmp_path / "code")
    assert (target.name, kind) == ("code.mp4", "video") and target.read_bytes() == Path(clip).read_bytes()


@pytest.mark.parametrize("has_h264", [True, False])
def test_other_clips_are_encoded(tmp_path, write_media, grey_frames, tone, monkeypatch, has_h264):
    if not has_h264:
        monkeypatch.setattr(clips.av, "codecs_available", av.codecs_available - {"libx264"})
    source = write_media(
        tmp_path / "a.avi", frames=grey_frames(10, 50, 64), samples=tone(1.0), video_codec="mpeg4", audio_codec="mp3"
    )
    target, kind = clips.playable(source, source, tmp_path / "code")
    wanted = [("h264", "yuv420p"), ("aac", None)] if has_h264 else [("libvpx-vp9", "yuv420p"), ("libopus", None)]
    assert kind == "video" and target.suffix == (".mp4" if has_h264 else ".webm")
    assert [name for name, _ in _codecs(target)] in ([name for name, _ in wanted], ["vp9", "opus"])
    assert probe(target).width == 64 and probe(target).height == 50
    ours, theirs = (read_video(path, 4).astype(float) for path in (target, source))
    assert np.abs(ours - theirs).mean() < 6
    sound, original = (read_audio(path) for path in (target, source))
    assert abs(len(sound) - len(original)) < 0.1 * 16000
    peaks = [np.abs(np.fft.rfft(samples[2000:10000])).argmax() for samples in (sound, original)]
    assert abs(peaks[0] - peaks[1]) <= 1  # the same tone


def test_picture_and_sound_of_two_files_become_one(tmp_path, write_media, grey_frames, tone):
    silent = write_media(tmp_path / "a.mp4", frames=grey_frames(10))
    sound = write_media(tmp_path / "a.wav", samples=tone(1.0), audio_codec="pcm_s16le")
    target, kind = clips.playable(silent, sound, tmp_path / "both")
    info = probe(target, decode=True)
    assert kind == "video" and info.has_audio and info.has_video and 0.9 < info.duration < 1.2
    target, kind = clips.playable(None, sound, tmp_path / "sound")
    assert kind == "audio" and _codecs(target) == [("aac", None)]
    target, kind = clips.playable(silent, None, tmp_path / "picture")
    assert kind == "video" and target.read_bytes() == Path(silent).read_bytes()
    with pytest.raises(MediaError, match=r"nothing\.mp4"):
        clips.playable(tmp_path / "nothing.mp4", None, tmp_path / "none")


# Bright above left, dark elsewhere.
CORNER = np.zeros((10, 48, 64, 3), np.uint8)
CORNER[:, :24, :32] = 200


def _pitch(path):
    samples = read_audio(path)[2000:]
    return np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples)


@pytest.mark.parametrize("sound", [False, True])  # playable as they are but for their orientation, or encoded anyway
def test_a_clip_is_shown_as_we_read_it(tmp_path, write_media, tone, sound):
    more = {"samples": tone(1.0), "audio_codec": "libmp3lame"} if sound else {}
    for name, frames, options in (
        ("mirrored", CORNER[:, :, ::-1], {"mirrored": True}),
        ("turned", np.rot90(CORNER, -1, axes=(1, 2)), {"rotation": 90}),
        ("wide", CORNER, {"pixel": "2/1"}),
    ):
        path = write_media(tmp_path / f"{name}.mp4", frames=frames, **options, **more)
        target, _ = clips.playable(path, path, tmp_path / "code")
        with av.open(str(target)) as container:  # as stored: browsers differ in what they do with a display matrix
            frame = next(container.decode(video=0))
            assert frame.rotation == 0 and container.streams.video[0].sample_aspect_ratio in (None, 0, 1)
            image = frame.to_ndarray(format="rgb24")
        assert image.shape == ((48, 128, 3) if name == "wide" else (48, 64, 3)), name
        height, width = image.shape[0] // 2, image.shape[1] // 2
        assert image[4 : height - 4, 4 : width - 4].min() > 180, name
        assert image[height + 4 :].max() < 20 and image[:, width + 4 :].max() < 20, name


def test_the_default_tracks_are_played(tmp_path, write_tracks, tone):
    flags = av.stream.Disposition
    sounds = [(tone(1.0, 16000, 300), "mono", flags(0)), (tone(1.0, 16000, 600), "mono", flags.default)]
    path = write_tracks(tmp_path / "tracks.mp4", sounds, [(40, flags(0)), (200, flags.default)])
    target, _ = clips.playable(path, path, tmp_path / "code")
    with av.open(str(target)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    assert abs(_pitch(target) - 600) < 5 and abs(int(read_video(target, 1).mean()) - 200) < 5


def test_channels_that_cancel_are_heard_on_one_loudspeaker(tmp_path, write_media, tone):
    both = np.concatenate([tone(1.0), -tone(1.0)])
    path = write_media(tmp_path / "a.mp4", samples=both, layout="stereo")
    target, kind = clips.playable(None, path, tmp_path / "code")
    with av.open(str(target)) as container:
        mixed = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in container.decode(audio=0)])
    assert kind == "audio" and np.abs(mixed).max() > 0.4


@pytest.mark.parametrize("late", ["picture", "sound"])
def test_what_begins_late_stays_late(tmp_path, write_media, late):
    if late == "picture":
        samples = np.zeros((1, 44100), np.float32)
        samples[0, 26460:] = 0.5 * np.sin(np.arange(44100 - 26460) / 20)  # from 0.6 s on, with the second frame
        frames = np.zeros((5, 48, 64, 3), np.uint8)
        frames[1:] = 200
        path = write_media(
            tmp_path / "a.mkv", frames=frames, times=[500, 600, 700, 800, 900], samples=samples, audio_codec="pcm_s16le"
        )
        bright, loud = 0.6, 0.6
    else:
        path = tmp_path / "a.mkv"
        with av.open(str(path), "w") as container:
            video = container.add_stream("libx264", rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
            for place in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * place, np.uint8), format="rgb24")
                frame.pts = place
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
            frame = av.AudioFrame.from_ndarray(np.full((1, 6400), 9000, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 16000, 8000
            container.mux(audio.encode(frame))
        bright, loud = None, 0.5
    target, _ = clips.playable(path, path, tmp_path / "code")
    sound = read_audio(target)
    assert np.flatnonzero(np.abs(sound) > 0.1)[0] / 16000 == pytest.approx(loud, abs=0.03)
    if bright is not None:
        with av.open(str(target)) as container:
            times = [f.time for f in container.decode(video=0) if f.to_ndarray(format="rgb24").mean() > 150]
        assert times[0] == pytest.approx(bright, abs=0.02)


def test_a_stream_that_cannot_be_decoded_is_left_out(tmp_path, write_media, grey_frames, tone):
    good = write_media(tmp_path / "a.mov", frames=grey_frames(5), samples=tone(0.5), audio_codec="pcm_s16le")
    data = good.read_bytes()
    for codec, other, kind in ((b"sowt", "picture", "video"), (b"avc1", "sound", "audio")):
        path = tmp_path / f"{other}.mov"
        path.write_bytes(data.replace(codec, b"XXXX"))
        target, found = clips.playable(path, path, tmp_path / other)
        info = probe(target, decode=True)
        assert found == kind and (info.has_video, info.has_audio) == (kind == "video", kind == "audio")
    mute = tmp_path / "picture.mov"  # the sound is that of the other file
    voice = write_media(tmp_path / "a.wav", samples=tone(0.5), audio_codec="pcm_s16le")
    target, _ = clips.playable(mute, voice, tmp_path / "two")
    info = probe(target, decode=True)
    assert info.has_video and info.has_audio
    nothing = tmp_path / "nothing.mov"
    nothing.write_bytes(data.replace(b"sowt", b"XXXX").replace(b"avc1", b"XXXX"))
    with pytest.raises(MediaError, match=r"nothing\.mov"):
        clips.playable(nothing, nothing, tmp_path / "none")


def test_a_damaged_packet_does_not_end_a_clip(tmp_path, write_media, grey_frames):
    path = write_media(tmp_path / "hurt.avi", frames=grey_frames(32), video_codec="mjpeg", video_options={"g": "1"})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    target, _ = clips.playable(path, None, tmp_path / "code")
    assert probe(target).duration == pytest.approx(3.2, abs=0.2)
