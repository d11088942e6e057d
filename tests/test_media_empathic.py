"""Decoding of real files to frames and samples; every defect of a file becomes an error that names the file."""

import os
import wave

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from empathic import media_empathic
from empathic.media_empathic import MediaError, load_audio, load_video, lone_channel, probe, read_audio, read_video


def places(frames):
    """Return the positions of frames in a `grey_frames` clip, computed from their gray level."""
    return np.round((frames.reshape(len(frames), -1).mean(axis=1) - 20) / 7).astype(int).tolist()


def pitch(samples, sampling_rate=16000):
    """Return the strongest frequency of a sound, in hertz."""
    return np.abs(np.fft.rfft(samples)).argmax() * sampling_rate / len(samples)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, write_media, grey_frames, tone):
    """32 frames of 10 per second with 3.2 s of stereo sound."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return write_media(path, frames=grey_frames(32), samples=tone(3.2, channels=2), layout="stereo")


# Video ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_bytes", [False, True])
def test_frames_are_the_centres_of_equal_segments(clip, as_bytes):
    frames = read_video(clip.read_bytes() if as_bytes else clip, num_frames=8)
    assert frames.dtype == np.uint8 and frames.shape == (8, 48, 64, 3)
    assert places(frames) == [2, 6, 10, 14, 18, 22, 26, 30]


def test_random_frames_lie_in_their_segments(clip):
    seen = set()
    for seed in range(12):
        found = places(read_video(clip, 8, np.random.default_rng(seed)))
        assert [p // 4 for p in found] == list(range(8))
        seen.update(found)
    assert len(seen) > 24  # frames are drawn from the whole clip, not only from the centers
    again = read_video(clip, 8, np.random.default_rng(3))
    assert np.array_equal(again, read_video(clip, 8, np.random.default_rng(3)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.avi", {"video_codec": "mpeg4", "audio_codec": "libmp3lame", "video_options": {"bf": "2"}}),
        ("clip.flv", {"video_codec": "flv", "audio_codec": "libmp3lame"}),  # no index: seeking fails
        ("clip.mkv", {}),
        ("clip.webm", {"video_codec": "libvpx", "audio_codec": "libopus", "sampling_rate": 48000}),
        ("clip.ts", {"video_codec": "mpeg2video", "audio_codec": "mp2", "fps": 25}),
        ("keys.mp4", {"video_options": {"g": "5", "bf": "2"}}),  # many key frames: packets between them are skipped
        ("open.mp4", {"video_options": {"x264-params": "keyint=6:open-gop=1:bframes=2:scenecut=0"}}),
        ("intra.mp4", {"video_codec": "mjpeg"}),
        ("pieces.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ],
)
def test_containers_and_codecs(tmp_path, write_media, grey_frames, tone, name, options):
    rate = options.get("sampling_rate", 44100)
    path = write_media(tmp_path / name, frames=grey_frames(32), samples=tone(3.2, rate), **options)
    assert places(read_video(path, 8)) == [2, 6, 10, 14, 18, 22, 26, 30]
    sound = read_audio(path)
    assert abs(len(sound) / 16000 - 3.2) < 0.1 and abs(pitch(sound) - 440) < 2


def test_packets_without_a_clock_are_counted(tmp_path, write_media, grey_frames):
    path = write_media(tmp_path / "raw.h264", frames=grey_frames(32), format="h264")
    with av.open(str(path)) as container:
        assert all(packet.pts is None for packet in container.demux())
    assert places(read_video(path, 8)) == [2, 6, 10, 14, 18, 22, 26, 30]


def test_variable_frame_rate_follows_time(tmp_path, write_media, grey_frames):
    # Twenty frames in the first second, then one every half second: time counts, not the number of frames.
    times = [*range(0, 1000, 50), *range(1000, 4000, 500), 3900]
    path = write_media(tmp_path / "vfr.mp4", frames=grey_frames(27), times=times)
    # Segments of half a second, centers at 0.25, 0.75, ... 3.75 s (the last frame lasts 0.1 s).
    assert places(read_video(path, 8)) == [5, 15, 20, 21, 22, 23, 24, 25]


def test_short_clips_give_fewer_frames(tmp_path, write_media, grey_frames):
    one = write_media(tmp_path / "one.mp4", frames=grey_frames(1), fps=500)
    assert read_video(one, 8).shape == (1, 48, 64, 3)
    three = write_media(tmp_path / "three.mp4", frames=grey_frames(3), fps=500)
    assert places(read_video(three, 8)) == [0, 1, 2]
    assert len(read_video(three, 8, np.random.default_rng(0))) <= 3


def test_odd_sizes_and_one_frame(tmp_path, write_media, grey_frames):
    path = write_media(tmp_path / "odd.mp4", frames=grey_frames(9, 37, 53))
    frames = read_video(path, 1)
    assert frames.shape == (1, 37, 53, 3) and places(frames) == [4]


def test_rotated_picture_is_turned_upright(tmp_path, write_media):
    upright = np.zeros((4, 64, 48, 3), np.uint8)
    upright[:, :32] = 200  # bright above, dark below, 64 high and 48 wide
    for turn in (90, 180, -90):
        stored = np.rot90(upright, -turn // 90, axes=(1, 2))  # a player rotates it back by `turn`, counterclockwise
        path = write_media(tmp_path / f"turn{turn}.mp4", frames=stored, rotation=turn)
        frames = read_video(path, 2)
        assert frames.shape == (2, 64, 48, 3)
        assert frames[:, :28].mean() > 180 and frames[:, 36:].mean() < 20


def corners(frames):
    """Return the gray levels of the quarters of a picture: top left, top right, bottom left, bottom right."""
    height, width = frames.shape[1] // 2, frames.shape[2] // 2
    parts = (
        frames[:, :height, :width],
        frames[:, :height, width:],
        frames[:, height:, :width],
        frames[:, height:, width:],
    )
    return [round(float(part.mean()) / 60) for part in parts]


def quarters(height=64, width=48, count=4):
    """Frames with a gray level of its own in each quarter."""
    levels = np.array([[0, 60], [120, 180]], np.uint8)
    return np.tile(levels.repeat(height // 2, 0).repeat(width // 2, 1)[None, :, :, None], (count, 1, 1, 3))


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_orientation_becomes_upright(tmp_path, write_media, turn, mirrored):
    upright = quarters()
    stored = upright[:, :, ::-1] if mirrored else upright
    stored = np.rot90(stored, -turn // 90, axes=(1, 2))  # a player turns it back first, and mirrors it then
    path = write_media(tmp_path / "turned.mp4", frames=stored, rotation=turn, mirrored=mirrored)
    frames = read_video(path, 2)
    assert frames.shape == (2, 64, 48, 3) and corners(frames) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("pixel", "turn", "size"),
    [("2/1", None, (64, 128)), ("8/9", None, (72, 64)), ("2/1", 90, (128, 64)), ("1000/1", None, (64, 64))],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_pixels_become_square(tmp_path, write_media, pixel, turn, size, suffix):
    if turn is not None and suffix != ".mp4":
        pytest.skip("this container stores no rotation")
    frames = np.full((5, 64, 64, 3), 40, np.uint8)
    path = write_media(tmp_path / f"wide{suffix}", frames=frames, fps=25, pixel=pixel, rotation=turn)
    assert read_video(path, 1).shape[1:3] == size


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_the_default_tracks_are_decoded(tmp_path, write_tracks, tone, suffix):
    none, default = Disposition(0), Disposition.default
    sounds = [(tone(0.5, 16000, f), "mono", d) for f, d in ((300, none), (600, default), (900, none))]
    path = write_tracks(tmp_path / f"tracks{suffix}", sounds, [(40, none), (200, default)])
    with av.open(str(path)) as container:
        assert [bool(s.disposition & default) for s in container.streams if s.type == "audio"] == [False, True, False]
    assert abs(pitch(read_audio(path)) - 600) < 5
    assert abs(int(read_video(path, 1).mean()) - 200) < 5


def test_a_commentary_is_not_the_sound(tmp_path, write_tracks, tone):
    sounds = [(tone(0.5, 16000, 300), "mono", Disposition.comment), (tone(0.5, 16000, 600), "mono", Disposition(0))]
    assert abs(pitch(read_audio(write_tracks(tmp_path / "talk.mkv", sounds))) - 600) < 5


def test_long_clip_decodes_only_what_it_needs(tmp_path, write_media, monkeypatch):
    import empathic.media_empathic as media

    frames = np.repeat((np.arange(300) % 200 + 20).astype(np.uint8), 16 * 16 * 3).reshape(300, 16, 16, 3)
    path = write_media(tmp_path / "long.mp4", frames=frames, fps=2, video_options={"g": "10", "bf": "0"})
    decoded, plain = [], media.decode_packet
    monkeypatch.setattr(media, "decode_packet", lambda stream, packet: decoded.append(1) or plain(stream, packet))
    assert len(media.read_video(path, 8)) == 8
    assert len(decoded) < 100  # of 300: only from the key frame before each of the eight


def test_damaged_packet_inside_is_survived(tmp_path, write_media, grey_frames):
    options = {"g": "1"}
    path = write_media(tmp_path / "hurt.mkv", frames=grey_frames(32), video_codec="mjpeg", video_options=options)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    assert len(read_video(bytes(data), 8)) >= 6


# Audio ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout", "channels"),
    [
        ("mono.wav", "pcm_s16le", 16000, "mono", 1),
        ("stereo.wav", "pcm_s16le", 48000, "stereo", 2),
        ("low.wav", "pcm_u8", 8000, "mono", 1),
        ("float.wav", "pcm_f32le", 22050, "stereo", 2),
        ("six.mp4", "aac", 48000, "5.1", 6),
        ("seven.wav", "pcm_s16le", 48000, "6.1", 7),
        ("song.mp3", "libmp3lame", 44100, "stereo", 2),
        ("song.flac", "flac", 96000, "stereo", 2),
        ("song.ogg", "libopus", 48000, "mono", 1),
    ],
)
def test_sound_of_any_format_becomes_16_khz_mono(tmp_path, write_media, tone, name, codec, rate, layout, channels):
    samples = tone(1.0, rate, channels=channels)
    path = write_media(tmp_path / name, samples=samples, sampling_rate=rate, layout=layout, audio_codec=codec)
    sound = read_audio(path)
    assert sound.dtype == np.float32 and sound.ndim == 1
    assert abs(len(sound) - 16000) < 1500 and abs(pitch(sound) - 440) < 2
    # The same sound on all channels keeps its level and never clips.
    assert 0.4 < np.abs(sound[3000:-3000]).max() < 0.6


def test_channels_are_mixed_not_dropped(tmp_path, write_media, tone):
    both = np.concatenate([tone(1.0, 16000, 440), tone(1.0, 16000, 1500)])
    options = {"sampling_rate": 16000, "layout": "stereo", "audio_codec": "pcm_s16le"}
    sound = read_audio(write_media(tmp_path / "two.wav", samples=both, **options))
    assert np.allclose(sound, both.mean(axis=0), atol=1e-3)


def write_wav(path, samples, rate=16000):
    """Write (channels, samples) as 16-bit PCM without the positions of the channels."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("difference", [0.0, 0.02])
def test_channels_that_cancel_are_not_mixed(tmp_path, tone, rate, difference):
    voice = tone(1.0, rate)
    path = write_wav(tmp_path / "a.wav", np.concatenate([voice * (1 - difference), -voice]), rate)
    sound = read_audio(path)
    assert lone_channel(path) == (1 if difference else 0)
    assert abs(len(sound) - 16000) <= 2 and abs(pitch(sound) - 440) < 2
    assert 0.45 < np.abs(sound).max() < 0.55
    assert np.array_equal(read_audio(path, max_seconds=0.5), sound[:8000])


def test_channels_that_differ_are_mixed(tmp_path, tone):
    quiet = np.zeros((1, 16000), np.float32)
    for name, channels in (
        ("one", [tone(1.0, 16000), quiet]),
        ("part", [tone(1.0, 16000), -0.5 * tone(1.0, 16000)]),
        ("silent", [quiet, quiet]),
        ("noise", [quiet + 1 / 32767, quiet - 1 / 32767]),
    ):
        samples = np.concatenate(channels)
        path = write_wav(tmp_path / f"{name}.wav", samples)
        assert lone_channel(path) is None
        assert np.allclose(read_audio(path), samples.mean(axis=0), atol=1e-3)


@pytest.mark.parametrize("count", [3, 6, 9, 24])
def test_each_channel_without_a_position_is_heard(tmp_path, tone, count):
    for place in (0, 2, min(3, count - 1), count - 1):
        samples = np.zeros((count, 8000), np.float32)
        samples[place] = tone(0.5, 16000)[0]
        sound = read_audio(write_wav(tmp_path / "many.wav", samples))
        assert abs(pitch(sound) - 440) < 3 and np.abs(sound).max() > 0.45 / count


def test_a_subwoofer_counts_only_if_all_else_is_silent(tmp_path, write_media, tone):
    options = {"layout": "5.1", "sampling_rate": 16000, "audio_codec": "pcm_s16le"}
    samples = np.zeros((6, 16000), np.float32)
    samples[3] = tone(1.0, 16000, 440)[0]  # the subwoofer, which a mix leaves out
    path = write_media(tmp_path / "low.mov", samples=samples, **options)
    assert lone_channel(path) == 3 and abs(pitch(read_audio(path)) - 440) < 3
    samples[2] = 0.01 * tone(1.0, 16000, 1500)[0]
    path = write_media(tmp_path / "film.mov", samples=samples, **options)
    assert lone_channel(path) is None and abs(pitch(read_audio(path)) - 1500) < 3


def test_max_seconds_and_sampling_rate(clip):
    assert len(read_audio(clip, max_seconds=1.5)) == 24000
    assert abs(len(read_audio(clip, max_seconds=100)) - 51200) < 1500
    assert len(read_audio(clip, 8000, 1.0)) == 8000
    assert np.array_equal(read_audio(clip, max_seconds=1.0), read_audio(clip)[:16000])
    with pytest.raises(ValueError, match="max_seconds must be above 0, got 0"):
        read_audio(clip, max_seconds=0)


def test_sound_keeps_its_length(tmp_path, write_media, tone):
    for rate in (16000, 22050, 44100):
        path = tmp_path / f"{rate}.wav"
        write_media(path, samples=tone(2.0, rate), sampling_rate=rate, audio_codec="pcm_s16le")
        assert abs(len(read_audio(path)) - 32000) <= 2


def test_samples_that_are_not_finite(tmp_path, write_media, tone):
    samples = tone(0.5, 16000)
    samples[0, 100] = np.nan
    path = write_media(tmp_path / "nan.wav", samples=samples, sampling_rate=16000, audio_codec="pcm_f32le")
    with pytest.raises(MediaError, match=r"nan\.wav: 1 of its 8000 samples are NaN or infinite"):
        read_audio(path)


# Defects -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_video, read_audio, probe])
def test_files_that_are_no_media(tmp_path, read):
    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    cases = [
        (tmp_path / "gone.mp4", r"gone\.mp4: there is no such file. Check the path"),
        ("https://example.org/a.mp4", r"example\.org/a\.mp4: there is no such file. Download it first"),
        (tmp_path, "is a folder"),
        (write("empty.mp4", b""), r"empty\.mp4: the file is empty \(0 bytes\)"),
        (b"", r"<0 bytes of media>: the file is empty"),
        (write("pointer.mp4", pointer), r"pointer\.mp4: is a Git-LFS pointer.*git lfs pull"),
        (write("notes.mp4", "Grüße, this is a letter.\n".encode()), r"notes\.mp4: is a text file.*starts with 'Grüße"),
        (write("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/secret.ts\n"), r"list\.m3u8: is a text file"),
        (write("noise.mp4", np.random.default_rng(0).bytes(5000)), r"noise\.mp4: cannot be decoded"),
    ]
    for source, message in cases:
        with pytest.raises(MediaError, match=message):
            read(source)
    with pytest.raises(MediaError, match="must be a path or bytes, not list"):
        read([1, 2])


@pytest.mark.parametrize("read", [read_video, read_audio, probe])
@pytest.mark.parametrize("fast_start", [False, True])
def test_truncated_mp4(tmp_path, write_media, grey_frames, tone, read, fast_start, capfd):
    """The index at the end is lost; or, with the index in front, part of the data is."""
    options = {"movflags": "faststart"} if fast_start else {}
    path = write_media(tmp_path / "cut.mp4", frames=grey_frames(32), samples=tone(3.2), container_options=options)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(MediaError, match=r"cut\.mp4: the mp4 file is cut short.*Copy or download it again"):
        read(path)
    assert capfd.readouterr() == ("", "")


def test_damaged_mp4_data(tmp_path, write_media, grey_frames, capfd):
    path = write_media(tmp_path / "noise.mp4", frames=grey_frames(32), video_codec="mjpeg")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - start)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"noise\.mp4: none of its 32 video frames can be decoded"):
        read_video(path)
    assert capfd.readouterr() == ("", "")


def test_missing_streams(tmp_path, write_media, grey_frames, tone):
    song = write_media(tmp_path / "song.mp3", samples=tone(), audio_codec="libmp3lame")
    disguised = song.rename(tmp_path / "song.mp4")
    with pytest.raises(
        MediaError, match=r'song\.mp4: holds only sound \(mp3, mp3\w*\), no video. Pass it as .*"audio"'
    ):
        read_video(disguised)
    assert len(read_audio(disguised)) > 15000  # it can be decoded as sound, whatever its name

    silent = write_media(tmp_path / "silent.mp4", frames=grey_frames(10))
    with pytest.raises(MediaError, match=r'silent\.mp4: has no sound track, only video \(mov\). Pass it as .*"video"'):
        read_audio(silent)
    assert len(read_video(silent)) == 8


def test_cover_of_a_song_is_no_video(tmp_path, tone):
    path = tmp_path / "cover.mp3"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "yuvj420p", Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture) + cover.encode(None))
        for start in range(0, 44100, 1152):
            frame = av.AudioFrame.from_ndarray(tone()[:, start : start + 1152], "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert not probe(path).has_video
    with pytest.raises(MediaError, match=r"cover\.mp3: holds only sound"):
        read_video(path)


def test_tags_in_another_encoding(tmp_path, write_media, tone):
    path = write_media(tmp_path / "tagged.wav", samples=tone(0.5, 16000), sampling_rate=16000, audio_codec="pcm_s16le")
    data = bytearray(path.read_bytes())
    tag = (
        b"LIST"
        + (24).to_bytes(4, "little")
        + b"INFOINAM"
        + (12).to_bytes(4, "little")
        + "Grüße, Jörg".encode("cp1252")
        + b"\0"
    )
    data += tag
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    path.write_bytes(data)
    assert len(read_audio(path)) == 8000


def test_probe(clip, tmp_path, write_media, tone):
    info = probe(clip)
    assert (info.has_video, info.has_audio, info.width, info.height, info.fps) == (True, True, 64, 48, 10)
    assert abs(info.duration - 3.2) < 0.1 and info.sampling_rate == 44100 and info.channels == 2
    sound = probe(
        write_media(tmp_path / "a.wav", samples=tone(0.5, 16000), sampling_rate=16000, audio_codec="pcm_s16le")
    )
    assert (sound.has_video, sound.has_audio, sound.width, sound.fps) == (False, True, None, None)
    assert sound.duration == 0.5 and sound.format == "wav"


# Items of a message --------------------------------------------------------------------------------------------------


def test_items_with_path_or_bytes(clip):
    path, data = str(clip), clip.read_bytes()
    frames, sound = read_video(clip), read_audio(clip)
    for item in (
        {"path": path},
        {"bytes": data},
        {"path": "elsewhere.mp4", "bytes": data},
        {"path": clip, "bytes": None},
    ):
        item = {"text": None, "audio": None, "video": None, "sampling_rate": None, **item}
        assert np.array_equal(load_video({"type": "video", **item}), frames)
        assert np.array_equal(load_audio({"type": "audio", **item}), sound)
    with pytest.raises(MediaError, match=r"elsewhere\.mp4 \(<20 bytes of media>\): the mp4 file is cut short"):
        load_video({"type": "video", "path": "elsewhere.mp4", "bytes": data[:20]})
    with pytest.raises(MediaError, match=r'A video item .* needs "path", "bytes" or "video".*\[\'type\'\]'):
        load_video({"type": "video", "path": None, "bytes": None})
    with pytest.raises(MediaError, match=r'An? audio item .* needs "path", "bytes" or "audio"'):
        load_audio({"type": "audio"})


def test_decoded_audio(tone):
    for rate in (8000, 16000, 44100):
        sound = load_audio({"type": "audio", "audio": tone(1.0, rate)[0], "sampling_rate": rate})
        assert sound.dtype == np.float32 and abs(len(sound) - 16000) <= 2 and abs(pitch(sound) - 440) < 2
    stereo = np.stack([np.full(1600, 0.5), np.full(1600, -0.1)])
    assert np.allclose(load_audio({"audio": stereo, "sampling_rate": 16000}), 0.2)
    opposite = np.concatenate([tone(1.0, 16000), -tone(1.0, 16000)])
    assert np.allclose(load_audio({"audio": opposite, "sampling_rate": 16000}), opposite[0], atol=1e-6)
    assert np.allclose(load_audio({"audio": (stereo[0] * 32768).astype(np.int16), "sampling_rate": 16000.0}), 0.5)
    assert len(load_audio({"audio": list(stereo[0]), "sampling_rate": 16000}, max_seconds=0.05)) == 800


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"audio": np.zeros(100)}, "no sampling rate"),
        ({"audio": np.zeros(100), "sampling_rate": -1}, "sampling rate -1"),
        ({"audio": np.zeros(100), "sampling_rate": "16 kHz"}, "sampling rate '16 kHz'"),
        ({"audio": np.zeros(0), "sampling_rate": 16000}, r"shape \(0,\)"),
        ({"audio": np.zeros((16000, 2)), "sampling_rate": 16000}, r"shape \(16000, 2\)"),
        ({"audio": np.zeros(5, complex), "sampling_rate": 16000}, "type complex128"),
        ({"audio": np.array([0.0, np.inf]), "sampling_rate": 16000}, "1 of its 2 samples are NaN or infinite"),
    ],
)
def test_bad_decoded_audio(item, message):
    with pytest.raises(MediaError, match=message):
        load_audio({"type": "audio", **item})


def test_decoded_video(grey_frames):
    frames = grey_frames(32)
    for video in (frames, list(frames), [Image.fromarray(f) for f in frames], tuple(frames)):
        assert places(load_video({"type": "video", "video": video})) == [2, 6, 10, 14, 18, 22, 26, 30]
    assert places(load_video({"video": frames[:3]})) == [0, 1, 2]
    found = places(load_video({"video": frames}, 8, np.random.default_rng(0)))
    assert [p // 4 for p in found] == list(range(8))
    grey = load_video({"video": [Image.fromarray(frames[0]).convert("L")]})
    assert grey.shape == (1, 48, 64, 3)
    deep = load_video({"video": [Image.fromarray(frames[3, :, :, 0].astype(np.uint16) * 256 + 7)]})
    assert (deep == frames[3]).all()


def test_a_photo_is_turned_as_its_camera_says():
    stored = Image.fromarray(np.rot90(quarters(64, 48)[0]))
    stored.getexif()[0x0112] = 6  # shown after a quarter turn clockwise
    frames = load_video({"video": [stored]})
    assert frames.shape == (1, 64, 48, 3) and corners(frames) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 8, 8, 3)), "Frame 0 .* is float64"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"uint8 of shape \(3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), r"has the shape \(8, 8, 3\)"),
        ([], "has no frame"),
        (
            [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)],
            r"differ in size: \[\(8, 8, 3\), \(9, 8, 3\)\]",
        ),
    ],
)
def test_bad_decoded_video(video, message):
    with pytest.raises(MediaError, match=message):
        load_video({"type": "video", "video": video})


def test_without_pyav(monkeypatch, clip):
    import empathic.media_empathic as media

    monkeypatch.setattr(media, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        media.read_video(clip)
    assert len(media.load_audio({"audio": np.zeros(100), "sampling_rate": 16000})) == 100


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="/proc counts the threads of a process.")
def test_a_frame_keeps_no_threads_which_a_forked_process_would_wait_for(write_media, tmp_path):
    path = write_media(tmp_path / "large.mp4", frames=np.zeros((2, 720, 1280, 3), dtype=np.uint8))
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frame = next(container.decode(video=0))
        before = len(os.listdir("/proc/self/task"))
        assert media_empathic._picture(frame, (640, 360)).shape == (360, 640, 3)
        assert len(os.listdir("/proc/self/task")) == before
