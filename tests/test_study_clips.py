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
