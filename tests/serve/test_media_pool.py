"""Clips are decoded in other processes, which may hang, crash and be replaced."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from empathic.media_empathic import MediaError, read_audio, read_video
from empathic.serve import media_pool
from empathic.serve.media_pool import MediaPool


@pytest.fixture
def make_pool():
    pools = []

    def make(workers=1, seconds=30.0, **options):
        pools.append(MediaPool(workers, seconds, **{"num_frames": 3, "max_seconds": 5, **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_clips_are_decoded_as_from_their_files(make_pool, clip, write_media, tone, tmp_path):
    pool = make_pool(workers=2)
    data = Path(clip).read_bytes()
    items = pool.decode(data, "the clip")
    assert np.array_equal(items["video"]["video"], read_video(clip, 3))
    assert np.array_equal(items["audio"]["audio"], read_audio(clip)) and items["audio"]["sampling_rate"] == 16000
    sound = write_media(tmp_path / "a.wav", samples=tone(0.5), audio_codec="pcm_s16le")
    assert pool.decode(sound.read_bytes(), "the clip").keys() == {"audio"}


def test_many_clips_at_once_come_back_to_those_who_asked(make_pool, write_media, grey_frames, tmp_path):
    pool, found = make_pool(workers=2), {}
    files = [write_media(tmp_path / f"{n}.mp4", frames=grey_frames(3, 32 + 16 * n, 64)) for n in range(6)]

    def ask(number):
        found[number] = pool.decode(files[number].read_bytes(), "the clip")["video"]["video"].shape[1]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: 32 + 16 * number for number in range(6)}


@pytest.mark.parametrize(
    "data", [b"", b"hello there, this is no clip", random.Random(0).randbytes(5000), b"\x00" * 10_000]
)
def test_what_is_no_clip_is_refused_and_the_next_clip_is_read(make_pool, clip, data):
    restarts = []
    pool = make_pool(on_restart=lambda: restarts.append(1))
    with pytest.raises(MediaError, match="the clip"):
        pool.decode(data, "the clip")
    assert "video" in pool.decode(Path(clip).read_bytes(), "the clip") and not restarts


def test_a_clip_of_ten_minutes_is_refused_without_decoding_it(make_pool, write_media, grey_frames, tmp_path):
    path = write_media(tmp_path / "long.mp4", frames=grey_frames(2), times=[0, 600_000])
    with pytest.raises(MediaError, match=r"600 s long; the limit is 5 s"):
        make_pool().decode(path.read_bytes(), "the clip")


def test_a_picture_that_is_too_large_is_refused(make_pool, write_media, tmp_path):
    frames = np.zeros((1, 2400, 4096, 3), np.uint8)
    path = write_media(tmp_path / "large.avi", frames=frames, video_codec="mjpeg")
    with pytest.raises(MediaError, match="picture of 4096 x 2400"):
        make_pool().decode(path.read_bytes(), "the clip")


def test_a_process_that_hangs_is_replaced(make_pool, clip):
    restarts = []
    pool = make_pool(on_restart=lambda: restarts.append(1))
    data = Path(clip).read_bytes()
    pool.decode(data, "the clip")
    pool.seconds = 0.5
    process = pool._all[0].process
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(MediaError, match=r"could not be read within 0.5 s"):
        pool.decode(data, "the clip")
    assert restarts == [1] and process.poll() is not None
    pool.seconds = 30
    assert "video" in pool.decode(data, "the clip")
    assert pool._all[0].process.pid != process.pid


def test_a_process_that_dies_is_replaced(make_pool, clip):
    pool = make_pool()
    data = Path(clip).read_bytes()
    pool.decode(data, "the clip")
    process = pool._all[0].process
    process.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(MediaError, match="cannot be read: it is damaged or needs too much memory"):
        pool.decode(data, "the clip")
    assert "video" in pool.decode(data, "the clip")
    pool._all[0].process.kill()
    pool._all[0].process.wait()
    assert "video" in pool.decode(data, "the clip")  # one that died while it was idle


def test_the_processes_end_with_the_pool(make_pool, clip):
    pool = make_pool(workers=2)
    processes = [worker.process for worker in pool._all]
    pool.close()
    assert all(process.poll() is not None for process in processes)
    # One whose server was killed reads the end of its input.
    lone = media_pool._Worker(5.0).start()
    lone.stdin.close()
    until = time.monotonic() + 30
    while lone.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert lone.poll() == 0
    lone.stdout.close()
