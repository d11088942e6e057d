"""Cuts of synthetic recordings: frame i is gray 4 i + 20 on the left and 240 - 4 i on the right, sample i is i."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from empathic.data_prep import cutting
from empathic.data_prep.corpora.base import Clip
from empathic.data_prep.cutting import cut
from empathic.media_empathic import MediaError, probe, read_video

FPS, COUNT = 25, 50
KINDS = {  # every way in which a file gives, or does not give, the presentation times of frames
    "avi": ("x.avi", "mpeg4", {"g": "12", "bf": "0"}),
    "avi-b": ("x.avi", "mpeg4", {"g": "12", "bf": "2"}),
    "avi-h264": ("x.avi", "libx264", {"g": "12", "bf": "2"}),
    "avi-mjpeg": ("x.avi", "mjpeg", {}),
    "mp4": ("x.mp4", "libx264", {"g": "12", "bf": "2"}),
    "mkv": ("x.mkv", "mpeg4", {"g": "12", "bf": "2"}),
    "flv": ("x.flv", "flv1", {"g": "12"}),
    "ts": ("x.ts", "libx264", {"g": "12", "bf": "2"}),
    "h264": ("x.h264", "libx264", {"g": "12", "bf": "2"}),
}


def coded(count=COUNT, height=48, width=64):
    frames = np.empty((count, height, width, 3), np.uint8)
    number = np.arange(count)[:, None, None, None]
    frames[:, :, : width // 2] = 4 * number + 20
    frames[:, :, width // 2 :] = 240 - 4 * number
    return frames


@pytest.fixture(scope="module")
def recording(tmp_path_factory, write_media):
    """A function (kind) -> path of a two-second recording."""
    made = {}

    def make(kind):
        if kind not in made:
            name, codec, options = KINDS[kind]
            path = tmp_path_factory.mktemp(kind) / name
            made[kind] = write_media(path, frames=coded(), fps=FPS, video_codec=codec, video_options=options)
        return made[kind]

    return make


def picture(path, start=None, end=None, crop=None):
    return Clip(path, path.name, start, end, crop)


def frames_of(path):
    """[(time, gray of the left edge, gray of the right edge)], and the duration of the video in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        seen = []
        for frame in container.decode(stream):
            grey = frame.to_ndarray(format="gray")
            seen.append((frame.time, int(grey[24, 4]), int(grey[24, -4])))
        return seen, float(stream.duration * stream.time_base)


def numbers_of(path):
    return [round((left - 20) / 4) for _, left, _ in frames_of(path)[0]]


def expected(start, end, rate=FPS, count=COUNT):
    """[(time, number)] of the frames shown in [start, end)."""
    start, end = Fraction(str(start)), min(Fraction(str(end)), Fraction(count) / rate)
    numbers = [i for i in range(count) if Fraction(i) / rate < end and Fraction(i + 1) / rate > start]
    return [(max(float(Fraction(i) / rate - start), 0.0), i) for i in numbers]


def samples_of(path):
    """(sampling rate, (samples, channels) int16)"""
    with wave.open(str(path)) as file:
        assert file.getsampwidth() == 2
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return file.getframerate(), values.reshape(-1, file.getnchannels())


def write_wav(path, samples, rate=16000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


# ------------------------------------------------------------------------------------------------------------ picture


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_of_exactly_the_seconds_asked_for(recording, tmp_path, kind):
    for start, end in ((0.0, 0.2), (1.0, 1.2), (1.02, 1.5), (1.44, 1.45), (1.9, 2.0)):
        cut(picture(recording(kind), start, end), tmp_path / "cut.mp4")
        seen, seconds = frames_of(tmp_path / "cut.mp4")
        times, numbers = zip(*expected(start, end), strict=True)
        assert numbers_of(tmp_path / "cut.mp4") == list(numbers), (start, end)
        assert [time for time, _, _ in seen] == pytest.approx(times, abs=1e-4), (start, end)
        assert seconds == pytest.approx(end - start, abs=1e-4), (start, end)


def test_a_frame_at_the_border_belongs_to_the_cut_that_it_begins(tmp_path, write_media):
    rate = Fraction(30000, 1001)
    path = write_media(tmp_path / "ntsc.avi", frames=coded(), fps=rate, video_codec="mpeg4", video_options={"g": "12"})
    cut(picture(path, 1.001, 1.2012), tmp_path / "cut.mp4")  # frame 30 is due at 1.001 s, frame 36 at 1.2012 s
    assert numbers_of(tmp_path / "cut.mp4") == [30, 31, 32, 33, 34, 35]


def test_halves_of_the_picture(recording, tmp_path):
    for crop, grey in (("left", 20 + 4 * 25), ("right", 240 - 4 * 25)):
        cut(picture(recording("avi"), 1.0, 1.04, crop), tmp_path / "cut.mp4")
        ((_, left, right),) = frames_of(tmp_path / "cut.mp4")[0]
        assert (left, right) == pytest.approx((grey, grey), abs=3)
        assert (probe(tmp_path / "cut.mp4").width, probe(tmp_path / "cut.mp4").height) == (32, 48)


@pytest.mark.parametrize("width, whole, half", [(65, 64, 32), (66, 66, 32), (67, 66, 32), (64, 64, 32)])
def test_odd_sizes_are_made_even(tmp_path, write_media, width, whole, half):
    path = write_media(tmp_path / "odd.mp4", frames=coded(2, height=49, width=width), fps=FPS)
    for crop, size in ((None, whole), ("left", half), ("right", half)):
        cut(picture(path, crop=crop), tmp_path / "cut.mp4")
        info = probe(tmp_path / "cut.mp4", decode=True)
        assert (info.width, info.height) == (size, 48)
    # A half has no column of the other half.
    with av.open(str(tmp_path / "cut.mp4")) as container:
        grey = next(container.decode(video=0)).to_ndarray(format="gray")
    assert grey[:, 3:].min() > 220


def test_without_times_the_whole_file(recording, tmp_path):
    cut(picture(recording("avi")), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == list(range(COUNT))
    cut(picture(recording("avi"), start=1.6), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == list(range(40, 50))
    cut(picture(recording("avi"), end=0.1), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [0, 1, 2]


@pytest.mark.parametrize("name, codec", [("x.mkv", "libx264"), ("x.mp4", "libx264"), ("x.avi", "mpeg4")])
def test_a_variable_frame_rate_is_kept(tmp_path, write_media, name, codec):
    times = [0, 40, 80, 400, 440, 1000, 1040, 1080]
    if name == "x.avi":  # on a grid of 25 frames/s; gaps are filled with empty packets
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=FPS, options={"bf": "0"})
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
            for place, pixels in enumerate(coded(len(times))):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = times[place] // 40, Fraction(1, FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        path = write_media(tmp_path / name, frames=coded(len(times)), times=times, video_codec=codec)
    cut(picture(path, 0.3, 1.05), tmp_path / "cut.mp4")
    seen, seconds = frames_of(tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [2, 3, 4, 5, 6]
    assert [time for time, _, _ in seen] == pytest.approx([0, 0.1, 0.14, 0.7, 0.74], abs=1e-4)
    assert seconds == pytest.approx(0.75, abs=1e-4)


def test_a_rotated_picture_is_cropped_upright(tmp_path, write_media):
    # Stored with the bright half on top; rotating to the left puts it on the left.
    frames = np.ascontiguousarray(np.rot90(coded(2, height=64, width=64), -1, axes=(1, 2)))
    path = write_media(tmp_path / "phone.mp4", frames=frames, fps=FPS, rotation=90)
    cut(picture(path, crop="right"), tmp_path / "cut.mp4")
    assert frames_of(tmp_path / "cut.mp4")[0][0][1] == pytest.approx(240, abs=3)
    assert (probe(tmp_path / "cut.mp4").width, probe(tmp_path / "cut.mp4").height) == (32, 64)


def test_a_mirrored_picture_is_cropped_as_it_is_shown(tmp_path, write_media):
    frames = np.rot90(coded(2, height=64)[:, :, ::-1], -1, axes=(1, 2))
    path = write_media(tmp_path / "mirror.mp4", frames=frames, fps=FPS, rotation=90, mirrored=True)
    cut(picture(path, crop="right"), tmp_path / "cut.mp4")
    assert frames_of(tmp_path / "cut.mp4")[0][0][1] == pytest.approx(240, abs=3)


def test_pixels_become_square(tmp_path, write_media):
    path = write_media(tmp_path / "wide.mp4", frames=coded(5), fps=FPS, pixel="2/1")
    cut(picture(path), tmp_path / "cut.mp4")
    assert (probe(tmp_path / "cut.mp4").width, probe(tmp_path / "cut.mp4").height) == (128, 48)
    assert numbers_of(tmp_path / "cut.mp4") == [0, 1, 2, 3, 4]
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio in (None, 0, 1)


@pytest.mark.parametrize("matrix", [1, 6, 9])  # BT.709, BT.601, BT.2020
@pytest.mark.parametrize("full", [False, True])
def test_colors_stay_the_same(tmp_path, matrix, full):
    path, color = tmp_path / "color.mp4", np.array([200, 40, 60], np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(np.tile(color, (64, 64, 1)), format="rgb24")
        names = {1: "ITU709", 6: "ITU601", 9: "BT2020"}
        frame = frame.reformat(
            format="yuv420p", dst_colorspace=names[matrix], dst_color_range="JPEG" if full else "MPEG"
        )
        container.mux(stream.encode(frame) + stream.encode(None))
    cut(picture(path), tmp_path / "cut.mp4")
    for file in (path, tmp_path / "cut.mp4"):
        assert np.abs(read_video(file, 1).mean(axis=(0, 1, 2)) - color).max() < 5


def test_a_picture_that_changes_its_size_keeps_the_first(tmp_path, write_media):
    parts = [
        write_media(tmp_path / f"{width}.h264", frames=coded(5, width=width), fps=FPS).read_bytes()
        for width in (64, 128)
    ]
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    cut(picture(tmp_path / "both.h264"), tmp_path / "cut.mp4")
    seen, _ = frames_of(tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [0, 1, 2, 3, 4] * 2
    assert [right for _, _, right in seen] == pytest.approx([240 - 4 * i for i in range(5)] * 2, abs=3)
    assert probe(tmp_path / "cut.mp4").width == 64


def test_a_late_picture_begins_with_its_first_frame(tmp_path, write_media):
    sound = dict(samples=np.zeros((1, 44100)), audio_codec="pcm_s16le")
    path = write_media(tmp_path / "late.mkv", frames=coded(5), times=[500, 540, 580, 620, 660], **sound)
    cut(picture(path, 0.3, 0.56), tmp_path / "cut.mp4")
    seen, seconds = frames_of(tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [0, 1] and seconds == pytest.approx(0.26, abs=1e-3)
    assert [time for time, _, _ in seen] == pytest.approx([0, 0.24], abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- seeking


@pytest.fixture
def decoded(monkeypatch):
    """A list whose only item is the number of packets decoded so far."""
    count, decode = [0], cutting.decode_packet

    def counted(stream, packet):
        count[0] += 1
        return decode(stream, packet)

    monkeypatch.setattr(cutting, "decode_packet", counted)
    return count


@pytest.fixture(scope="module")
def long_avi(tmp_path_factory, write_media):
    """800 frames, a key frame every second; the gray repeats after 50."""
    frames = np.concatenate([coded()] * 16)
    path = tmp_path_factory.mktemp("long") / "long.avi"
    return write_media(path, frames=frames, fps=FPS, video_codec="mpeg4", video_options={"g": "25", "bf": "2"})


def test_a_cut_does_not_decode_the_file_from_its_start(long_avi, tmp_path, decoded):
    cut(picture(long_avi, 30.0, 30.2), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [0, 1, 2, 3, 4]
    assert decoded[0] < 80


def test_a_key_frame_after_the_start_is_not_where_the_cut_begins(tmp_path, write_media):
    options = {"g": "40", "bf": "2", "x264-params": "scenecut=0"}
    path = write_media(tmp_path / "x.ts", frames=coded(), fps=FPS, video_options=options)  # has no index to seek by
    cut(picture(path, 1.4, 1.5), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [35, 36, 37]


def test_a_file_without_an_index_is_decoded_from_its_start(long_avi, tmp_path, decoded):
    data = long_avi.read_bytes()
    path = tmp_path / "cut short.avi"
    path.write_bytes(data[: data.rindex(b"idx1")])
    cut(picture(path, 20.2, 20.4), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [5, 6, 7, 8, 9]


def test_few_frames_are_held(long_avi, tmp_path, decoded, monkeypatch):
    used, ahead, planes = [0], [0], cutting.upright_planes

    def counted(*args):
        used[0] += 1
        ahead[0] = max(ahead[0], decoded[0] - used[0])
        return planes(*args)

    monkeypatch.setattr(cutting, "upright_planes", counted)
    cut(picture(long_avi, 0.0, 8.0), tmp_path / "cut.mp4")
    assert used[0] == 200 and ahead[0] < 10


def test_damage_before_a_cut_does_not_move_it(long_avi, tmp_path):
    data = bytearray(long_avi.read_bytes())
    middle = len(data) // 4
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.avi").write_bytes(data)
    cut(picture(tmp_path / "damaged.avi", 30.0, 30.2), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_samples_of_exactly_the_seconds_asked_for(tmp_path, channels):
    ramp = np.arange(32000)[:, None] - 16000 + np.arange(channels)
    path = write_wav(tmp_path / "ramp.wav", ramp)
    for start, end in ((None, None), (0.0, 0.1), (1.2345, 1.5), (0.00004, 0.0005), (1.9, 9.0)):
        cut(picture(path, start, end), tmp_path / "cut.wav")
        rate, values = samples_of(tmp_path / "cut.wav")
        first, last = round((start or 0) * 16000), round(16000 * (end or 9))
        assert rate == 16000
        np.testing.assert_array_equal(values, ramp[first:last])


def test_a_long_wav_is_sought_in(tmp_path, decoded):
    path = write_wav(tmp_path / "long.wav", np.arange(16000 * 60)[:, None] % 30000)
    cut(picture(path, 50.0, 50.1), tmp_path / "cut.wav")
    assert samples_of(tmp_path / "cut.wav")[1][0] == 16000 * 50 % 30000
    assert decoded[0] < 30


@pytest.mark.parametrize(
    "name, codec",
    [
        ("x.mp4", "aac"),
        ("x.mkv", "aac"),
        ("x.mp3", "libmp3lame"),
        ("x.aac", "aac"),
        ("x.ts", "mp2"),
        ("x.avi", "pcm_s16le"),
        ("x.flac", "flac"),
    ],
)
def test_the_sound_of_any_file_is_cut_where_decoding_all_of_it_puts_it(tmp_path, write_media, name, codec):
    rng = np.random.default_rng(0)
    chirp = np.sin(np.cumsum(np.linspace(0.01, 0.3, 3 * 44100)))[None] * 0.5 + rng.normal(0, 0.01, (1, 3 * 44100))
    chirp[:, :44100] = 0  # few bytes: a time estimated from the bit rate is wrong
    frames = coded(60) if name == "x.avi" else None
    path = write_media(tmp_path / name, frames=frames, fps=20, samples=chirp, audio_codec=codec, video_codec="mpeg4")
    cut(picture(path), tmp_path / "all.wav")
    cut(picture(path, 1.5, 2.25), tmp_path / "cut.wav")
    (rate, all_of_it), (_, values) = samples_of(tmp_path / "all.wav"), samples_of(tmp_path / "cut.wav")
    assert rate == 44100 and values.shape == (33075, 1)
    assert np.argmax(np.abs(all_of_it[:, 0]) > 2000) == pytest.approx(44100, abs=2000)  # except for the codec's delay
    whole = all_of_it[66150:99225].astype(int)
    assert np.abs(whole - values).max() <= 2 and np.abs(whole).max() > 10000


def test_late_sound_keeps_its_place(tmp_path):
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        video, audio = (
            container.add_stream("libx264", rate=FPS),
            container.add_stream("pcm_s16le", rate=16000, layout="mono"),
        )
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for pixels in coded():
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.full((1, 16000), 1000, np.int16), "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 8000, Fraction(1, 16000)
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    cut(picture(path, 0.25, 1.0), tmp_path / "cut.wav")
    values = samples_of(tmp_path / "cut.wav")[1]
    assert len(values) == 12000
    assert set(values[:3990, 0]) == {0} and set(values[4010:, 0]) == {1000}


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("suffix", [".mp4", ".wav"])
def test_two_runs_write_the_same_bytes(tmp_path, write_media, tone, suffix):
    path = write_media(tmp_path / "x.mkv", frames=coded(), fps=FPS, samples=tone(2.0))
    for name in ("a", "b"):
        cut(picture(path, 0.3, 1.2), tmp_path / (name + suffix))
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data == (tmp_path / f"b{suffix}").read_bytes()
    if suffix == ".mp4":  # neither the time nor the version of the writer
        place = data.index(b"mvhd") + 8
        assert data[place : place + 8] == bytes(8) and b"Lavf" not in data


@pytest.mark.parametrize("suffix", [".mp4", ".wav"])
@pytest.mark.parametrize(
    "start, end, message",
    [
        (7.0, 8.0, "from 7.0 s to 8.0 s; it was read up to 2.0"),
        (7.0, None, "it was read up to 2.0"),
        (1.5, 1.5, "Give a start before the end"),
        (1.5, 1.0, "Give a start before the end"),
        (-1.0, 1.0, "Give a start before the end"),
    ],
)
def test_a_cut_of_nothing_is_an_error_that_names_the_file(tmp_path, write_media, tone, suffix, start, end, message):
    path = write_media(tmp_path / "x.mkv", frames=coded(), fps=FPS, samples=tone(2.0), audio_codec="pcm_s16le")
    with pytest.raises(MediaError, match=message) as error:
        cut(picture(path, start, end), tmp_path / f"cut{suffix}")
    assert str(path) in str(error.value)
    assert not (tmp_path / f"cut{suffix}").exists()


def test_an_end_past_the_end_is_the_end(recording, tmp_path):
    cut(picture(recording("avi"), 1.8, 60.0), tmp_path / "cut.mp4")
    assert numbers_of(tmp_path / "cut.mp4") == [45, 46, 47, 48, 49]
    assert frames_of(tmp_path / "cut.mp4")[1] == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("suffix, what", [(".mp4", "no video"), (".wav", "no audio")])
def test_a_missing_stream(tmp_path, write_media, tone, suffix, what):
    write_media(tmp_path / "x.mkv", **({"samples": tone(1.0)} if suffix == ".mp4" else {"frames": coded(5)}))
    with pytest.raises(MediaError, match=f"x.mkv: has {what}"):
        cut(picture(tmp_path / "x.mkv", 0.1, 0.2), tmp_path / f"cut{suffix}")
    assert not (tmp_path / f"cut{suffix}").exists()


@pytest.mark.parametrize("content", [None, b"", b"plain text\n" * 99, b"RIFF\0\0\0\0AVI LIST" + bytes(range(256)) * 20])
@pytest.mark.parametrize("suffix", [".mp4", ".wav"])
def test_a_file_that_cannot_be_read(tmp_path, content, suffix):
    if content is not None:
        (tmp_path / "x.avi").write_bytes(content)
    with pytest.raises(MediaError, match=r"x\.avi"):
        cut(picture(tmp_path / "x.avi", 0.1, 0.2), tmp_path / f"cut{suffix}")
    assert not (tmp_path / f"cut{suffix}").exists()


def test_nothing_half_written_is_left(recording, tmp_path, monkeypatch):
    planes, calls = cutting.upright_planes, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            assert (tmp_path / "cut.mp4").exists()
            raise KeyboardInterrupt
        return planes(*args)

    monkeypatch.setattr(cutting, "upright_planes", fails)
    with pytest.raises(KeyboardInterrupt):
        cut(picture(recording("avi"), 0.0, 1.0), tmp_path / "cut.mp4")
    assert not (tmp_path / "cut.mp4").exists()


def test_what_the_caller_got_wrong(recording, tmp_path):
    with pytest.raises(ValueError, match=r"neither \.wav"):
        cut(picture(recording("avi"), 0.0, 1.0), tmp_path / "cut.mp3")
    with pytest.raises(ValueError, match="crop is 'top'"):
        cut(picture(recording("avi"), 0.0, 1.0, "top"), tmp_path / "cut.mp4")
