"""Content hashes of clips: a file is read again only if its size or its times changed."""

import hashlib
import os
import shutil

import pytest

from empathic.data_prep.clip_digests import Digests
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.media_empathic import MediaError


def replace_file(path, content):
    """Put another file of the same size in its place, which keeps the modification time, as `cp -p` does."""
    before = path.stat()
    assert len(content) == before.st_size
    part = path.with_name("part")
    part.write_bytes(content)
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(part, path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


class Counted:
    """A constructor of hashes that counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, data=b""):
        self.count += 1
        return hashlib.sha256(data)


def test_a_file_is_read_again_only_if_it_changed(tmp_path):
    path, made = tmp_path / "clip.wav", Counted()
    path.write_bytes(b"first")
    digests = Digests(new_hash=made)
    first = digests.of({"path": str(path)})
    assert first == hashlib.sha256(b"first").hexdigest() == digests.of({"path": str(path), "bytes": None})
    again = Digests(digests.files, made)
    assert again.of({"path": str(path)}) == first and made.count == 1
    os.utime(path)
    assert again.of({"path": str(path)}) == first and made.count == 2
    replace_file(path, b"other")
    assert again.of({"path": str(path)}) == hashlib.sha256(b"other").hexdigest() and made.count == 3
    assert again.of({"path": str(path), "bytes": b"first"}) == first
    path.unlink()
    with pytest.raises(MediaError, match=r"clip\.wav: cannot be read"):
        again.of({"path": str(path)})


def test_an_entry_of_an_earlier_version_is_not_trusted(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(b"first")
    found = path.stat()
    digests = Digests({str(path): [found.st_size, found.st_mtime_ns, "stale"]})
    assert digests.of({"path": str(path)}) == Digests().of({"bytes": b"first"})


@pytest.mark.parametrize("embed", [False, True])
def test_a_clip_that_keeps_its_size_and_time_is_prepared_again(tmp_path, write_media, tone, embed):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for name, frequency in (("a", 300), ("b", 500)):
        samples = tone(0.3, 16000, frequency)
        write_media(tmp_path / f"{name}.wav", samples=samples, sampling_rate=16000, audio_codec="pcm_s16le")
    shutil.copy(tmp_path / "a.wav", raw / "a.wav")
    line = '{"dialogue_id": "d", "turn": 0, "speaker": "ann", "text": "hi", "emotion": "sad", "file_name": "a.wav"}'
    (raw / "metadata.jsonl").write_text(line)
    prepare_folder(raw, out, embed=embed, progress=False)
    names = {path.name for path in (out / "data").iterdir()}
    state = (out / ".prepared.json").read_text()
    prepare_folder(raw, out, embed=embed, progress=False)
    assert (out / ".prepared.json").read_text() == state
    replace_file(raw / "a.wav", (tmp_path / "b.wav").read_bytes())
    prepare_folder(raw, out, embed=embed, progress=False)
    assert (out / ".prepared.json").read_text() != state
    assert ({path.name for path in (out / "data").iterdir()} != names) == embed  # the names have the content's digest
