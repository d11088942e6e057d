"""Data sets that are given by name: prepared ones are loaded, and for others the error says what to give."""

import json
import shutil
import unicodedata

import pytest

from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.loading import PAIR_COLUMNS, load_prepared
from empathic.media_empathic import existing_path, load_video


def test_what_is_not_prepared_says_what_to_give(recordings, tmp_path):
    assert set(load_prepared(recordings.data)) == {"train", "validation"}
    assert len(load_prepared(recordings.data, "train")) == 12
    assert load_prepared(recordings.pairs, "train", PAIR_COLUMNS)[0]["chosen"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"dialogue_id": "d", "turn": 0}) + "\n")
    with pytest.raises(ValueError, match=r"is a folder of recordings.*empathic prepare folder"):
        load_prepared(str(tmp_path))
    with pytest.raises(ValueError, match=r"no column corpus; it has preference rows, which stage epo trains on"):
        load_prepared(recordings.pairs)
    with pytest.raises(ValueError, match=r"no column prompt; it has turns.*empathic counter"):
        load_prepared(recordings.data, columns=PAIR_COLUMNS)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_prepared(str(tmp_path / "nothing"))


def test_names_that_differ_in_their_unicode_form_are_found(clip, tmp_path):
    name = "caf\u00e9"
    here, written = unicodedata.normalize("NFD", name), unicodedata.normalize("NFC", name)
    raw = tmp_path / here
    raw.mkdir()
    shutil.copy(clip, raw / f"{here}.mp4")
    assert existing_path(tmp_path / written / f"{written}.mp4") == str(raw / f"{here}.mp4")
    missing = str(tmp_path / written / "no\u00e9.mp4")
    assert existing_path(missing) == missing
    assert load_video({"type": "video", "path": str(tmp_path / written / f"{written}.mp4")}, 1).shape[0] == 1
    line = {
        "dialogue_id": "d",
        "turn": 0,
        "speaker": "ann",
        "text": "hi",
        "split": "train",
        "file_name": f"{written}.mp4",
    }
    (raw / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    prepare_folder(raw, tmp_path / "data", progress=False)
    assert load_prepared(str(tmp_path / "data"), "train")[0]["video"]["path"] == str(raw / f"{here}.mp4")
