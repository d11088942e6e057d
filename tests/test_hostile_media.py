"""Malicious media and edge cases: playlists, unknown codecs, tiny clips."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
import torch

from empathic.clip_limits import clip_seconds
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.evaluation.study import clips
from empathic.media_empathic import MediaError, load_audio, load_video, probe, read_audio, read_video

# Playlists -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secret(tmp_path_factory, write_media, grey_frames, tone):
    """A clip that must not be reachable through another file."""
    path = tmp_path_factory.mktemp("secret") / "secret.ts"
    return write_media(path, frames=grey_frames(5), samples=tone(0.5), format="mpegts")


@pytest.fixture
def server(secret):
    """Run an HTTP server that serves the secret; yields (its URL, the requested paths)."""
    asked, content = [], secret.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "video/mp2t")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()
        thread.join()


def hls(address):
    # The control byte makes the file look like media.
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1.0,\x01\n{address}\n#EXT-X-ENDLIST\n".encode()


def concat(path):
    return f"ffconcat version 1.0\n# \x01\nfile {path}\n".encode()


def openers(path):
    """Every function that opens an upload or a clip."""
    readers = [(read, source) for read in (probe, read_video, read_audio) for source in (path, path.read_bytes())]
    return [
        *readers,
        (lambda source: clip_seconds(source, "clip"), str(path)),
        (clips._suffix, path),
        (clips._has_picture, path),
    ]


def test_a_playlist_fetches_nothing(server, tmp_path):
    address, asked = server
    playlist = hls(f"{address}/internal.ts")
    (tmp_path / "list.m3u8").write_bytes(playlist)
    with open(tmp_path / "list.m3u8", "rb") as file, av.open(file) as container:  # FFmpeg's default behavior
        assert container.streams.video and asked
    asked.clear()
    for name in ("list.m3u8", "list.mp4"):
        (tmp_path / name).write_bytes(playlist)
        for read, source in openers(tmp_path / name):
            with pytest.raises((MediaError, av.error.FFmpegError)):
                read(source)
    assert asked == []


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4"])
def test_a_playlist_opens_no_file_beside_it(secret, tmp_path, name):
    (tmp_path / "secret.ts").write_bytes(secret.read_bytes())
    for playlist in (concat("secret.ts"), hls("secret.ts"), hls(str(secret)), hls(secret.as_uri())):
        (tmp_path / name).write_bytes(playlist)
        for read, source in openers(tmp_path / name):
            with pytest.raises((MediaError, av.error.FFmpegError)):
                read(source)


def test_a_session_description_listens_on_no_port():
    lines = ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=x\x01", "c=IN IP4 127.0.0.1", "t=0 0", "m=video 5004 RTP/AVP 96"]
    with pytest.raises(MediaError, match="Invalid data found"):  # and not a timeout
        probe("\r\n".join([*lines, "a=rtpmap:96 H264/90000", ""]).encode())


# Codecs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unknown(tmp_path, write_media, grey_frames, tone):
    """A function (name, codecs to make unknown) -> a mov with video and sound."""

    def make(name, *codecs):
        data = write_media(
            tmp_path / name, frames=grey_frames(5), samples=tone(0.5), audio_codec="pcm_s16le"
        ).read_bytes()
        for codec in codecs:
            assert data.count(codec) == 1
            data = data.replace(codec, b"X" * len(codec))
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return make


SOUND, PICTURE = b"sowt", b"avc1"
NO_DECODER = "its {} is in a format that this FFmpeg has no decoder for"


def test_a_codec_that_ffmpeg_lacks_is_named(unknown):
    mute, dark, nothing = unknown("a.mov", SOUND), unknown("b.mov", PICTURE), unknown("c.mov", SOUND, PICTURE)
    assert len(read_video(mute)) == 5 and len(read_audio(dark)) > 7000
    for path, read, what in (
        (mute, read_audio, "sound"),
        (dark, read_video, "picture"),
        (nothing, read_video, "picture"),
        (nothing, read_audio, "picture"),
    ):
        with pytest.raises(MediaError, match=NO_DECODER.format(what)):
            read(path)
        with pytest.raises(MediaError, match="has no decoder for"):
            probe(path, decode=True)
    assert [(i.has_audio, i.has_video) for i in map(probe, (mute, dark, nothing))] == [
        (False, True), (True, False), (False, False),
    ]  # fmt: skip


def test_the_sound_track_that_can_be_decoded_is_taken(tmp_path, tone):
    """As in videos from phones, whose first sound track may be spatial audio."""
    path = tmp_path / "two.mov"
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream(codec, rate=48000, layout="mono") for codec in ("pcm_s16be", "pcm_s16le")]
        for track, pitch in zip(tracks, (300, 700), strict=True):
            samples = (tone(0.5, 48000, pitch) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate = 48000
            convert = av.AudioResampler(track.codec_context.format, "mono", 48000)
            for piece in convert.resample(frame):
                container.mux(track.encode(piece))
    path.write_bytes(path.read_bytes().replace(b"twos", b"XXXX"))
    sound = read_audio(path)
    assert abs(np.abs(np.fft.rfft(sound)).argmax() * 16000 / len(sound) - 700) < 5
    assert probe(path, decode=True).sampling_rate == 48000


def test_a_codec_that_ffmpeg_lacks_does_not_end_the_preparation(unknown, tmp_path):
    files = [unknown("a.mov", SOUND), unknown("b.mov", PICTURE), unknown("c.mov", SOUND, PICTURE), unknown("d.mov")]
    rows = [f'{{"dialogue_id": "d", "turn": {n}, "speaker": "a", "text": "hi", "file_name": "{f.name}"}}' for n, f in
            enumerate(files)]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    report = prepare_folder(tmp_path, tmp_path / "out", progress=False, split_seed=0)
    (counts,) = report["splits"].values()
    assert (report["rows"], counts["with_audio"], counts["with_video"]) == (4, 2, 2)
    lines = {entry["item"]: entry["reason"] for entry in report["without_media"]}
    assert list(lines) == ["metadata.jsonl:1", "metadata.jsonl:2", "metadata.jsonl:3"]
    assert NO_DECODER.format("sound") in lines["metadata.jsonl:1"]
    assert NO_DECODER.format("picture") in lines["metadata.jsonl:2"]


# Decoded media -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_sound_too_short_to_be_resampled_is_an_error(rate):
    with pytest.raises(MediaError, match="no sound can be decoded"):
        load_audio({"audio": np.full(8, 0.1, np.float32), "sampling_rate": rate})
    assert len(load_audio({"audio": np.full(8, 0.1, np.float32), "sampling_rate": 16000})) == 8


@pytest.mark.parametrize("rate", [2**31, 2**40, 1e30, float("inf"), float("nan")])
def test_sampling_rates_that_cannot_be(rate):
    with pytest.raises(MediaError, match=r"sampling rate .* below 2\*\*31"):
        load_audio({"audio": np.zeros(100, np.float32), "sampling_rate": rate})


def test_sound_as_a_tensor():
    values = torch.linspace(-0.5, 0.5, 1600)
    expected = load_audio({"audio": values.numpy(), "sampling_rate": 16000})
    for tensor in (values, values.clone().requires_grad_(), torch.stack([values, values])):
        assert np.allclose(load_audio({"audio": tensor, "sampling_rate": 16000}), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert np.allclose(load_audio({"audio": values.to(dtype), "sampling_rate": 16000}), expected, atol=2e-3)
    whole = (values * 32768).to(torch.int16)
    assert np.allclose(load_audio({"audio": whole, "sampling_rate": 16000}), expected, atol=1e-4)
    with pytest.raises(MediaError, match=r"Frame 0 .* is float32"):
        load_video({"video": torch.zeros(2, 8, 8, 3, dtype=torch.bfloat16)})


def test_sound_under_autocast_is_the_same(processor, tone):
    item = {"type": "audio", "audio": tone(0.5, 16000)[0], "sampling_rate": 16000}
    expected, mask = processor.sound(item)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_mask = processor.sound(item)
    assert torch.equal(found, expected) and torch.equal(found_mask, mask)


@pytest.mark.parametrize("height", [1, 2, 3])
def test_frames_of_few_lines(processor, height):
    frames = np.zeros((2, height, 3, 3), np.uint8)
    frames[..., 0] = 200  # red
    pixels = processor.pixels(frames)
    assert pixels.shape == (2, 3, 32, 32)
    means = pixels.mean((0, 2, 3))
    assert means[0] > 0 > means[1] and pixels[:, 0].std() < 1e-4  # every pixel is red
