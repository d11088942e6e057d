"""Training on clips that are played faster and slower."""

import json

import numpy as np
import pytest
from datasets import load_dataset

from empathic.data_prep.corpora.folder import prepare_folder
from empathic.media_empathic import load_audio
from empathic.trainers import prepare_features, train
from empathic.trainers.frozen.feature_cache import FeatureCacheError, entry_name, read_entries
from empathic.trainers.samples import emotion_sample
from empathic.trainers.stages import StageConfig


def pitch(samples):
    """The strongest frequency of samples at 16 kHz, in hertz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * 16000 / len(samples)


def test_a_faster_sound_is_shorter_and_higher(tmp_path, write_media, tone):
    write_media(tmp_path / "a.m4a", samples=tone(1.0, frequency=400))
    recorded = load_audio({"type": "audio", "path": str(tmp_path / "a.m4a")})
    for speed in (0.8, 1.25):
        played = load_audio({"type": "audio", "path": str(tmp_path / "a.m4a"), "speed": speed})
        assert len(played) == pytest.approx(len(recorded) / speed, rel=0.01)
        assert pitch(played) == pytest.approx(speed * pitch(recorded), rel=0.02)
        decoded = load_audio({"type": "audio", "audio": recorded, "sampling_rate": 16000, "speed": speed})
        assert len(decoded) == pytest.approx(len(played), rel=0.01)
        cut = load_audio({"type": "audio", "path": str(tmp_path / "a.m4a"), "speed": speed}, max_seconds=0.5)
        assert abs(len(cut) - 8000) <= 1  # the limit is on what is heard


def test_a_speed_is_drawn_for_sounds_only():
    row = {"audio": {"path": "a"}, "video": None, "text": "", "speaker": "x", "emotion": "sad", "turn": 0}
    heard = [emotion_sample(row, np.random.default_rng(seed), [0.9, 1.0]) for seed in range(20)]
    assert {sample["messages"][0]["content"][0]["speed"] for sample in heard} == {0.9, 1.0}
    seen = emotion_sample({**row, "audio": None, "video": {"path": "v"}}, np.random.default_rng(0), [0.9])
    assert "speed" not in seen["messages"][0]["content"][0]
    assert "speed" not in emotion_sample(row, np.random.default_rng(0))["messages"][0]["content"][0]
    assert row["audio"] == {"path": "a"}


def test_options(tmp_path):
    assert StageConfig(output_dir=str(tmp_path), audio_speeds=0.9, use_cpu=True).audio_speeds == [0.9]
    for speeds in ([], [0.1], [1, 3]):
        with pytest.raises(ValueError, match="audio_speeds must be speeds between"):
            StageConfig(output_dir=str(tmp_path), audio_speeds=speeds, use_cpu=True)


def test_training_from_a_cache_of_all_speeds_is_as_from_media(base_folder, tmp_path, write_media, grey_frames, tone):
    (tmp_path / "raw").mkdir()
    lines = []
    for number, split in enumerate(("train", "train", "train", "validation")):
        name = f"{number}.mp4"
        write_media(tmp_path / "raw" / name, frames=grey_frames(2), samples=tone(0.5, frequency=200 + 300 * number))
        line = {"dialogue_id": name, "turn": 0, "speaker": "clara", "text": "hello", "split": split}
        lines.append(line | {"emotion": ("happy", "sad")[number % 2], "file_name": name})
    (tmp_path / "raw" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_folder(tmp_path / "raw", tmp_path / "data", progress=False)
    common = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(base_folder), "--use_cpu", "True"]
    common += ["--disable_tqdm", "True", "--report_to", "none", "--frame_draws", "0"]
    cache = ["--feature_cache", str(tmp_path / "cache")]
    speeds = ["--audio_speeds", "0.9", "1", "1.25"]

    def run(name, *more, stage="emotion"):
        output = ["--stage", stage, "--output_dir", str(tmp_path / name), "--max_steps", "4", "--logging_steps", "1"]
        output += ["--per_device_train_batch_size", "3", "--learning_rate", "1e-2", "--save_strategy", "no"]
        train.main([*common, *output, "--eval_strategy", "steps", "--eval_steps", "9", *more])
        logs = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [log[key] for log in logs for key in ("loss", "eval_loss") if key in log]

    def fill(*more):
        return prepare_features.main(["--stage", "emotion", *common, *cache, "--feature_dtype", "float32", *more])

    assert fill()["encoded"] == 8
    with pytest.raises(FeatureCacheError, match=r"\.mp4 at the speed (0\.9|1\.25) of audio_speeds is not in the"):
        run("early", *cache, *speeds)
    assert fill(*speeds)["encoded"] == 6  # two further speeds of the three training clips
    names = {name for name in read_entries(tmp_path / "cache") if "@" in name}
    assert len(names) == 6 and {name.split("@")[1] for name in names} == {"0.9", "1.25"}
    plain, at_speeds = run("plain", *cache), run("speeds", *cache, *speeds)
    assert at_speeds == pytest.approx(run("media", *speeds), rel=2e-5)
    assert at_speeds[:4] != pytest.approx(plain[:4], rel=1e-4)
    with pytest.raises(ValueError, match="audio_speeds is for stage emotion alone, and this is dialogue"):
        run("dialogue", *speeds, stage="dialogue")
    assert len(load_dataset(str(tmp_path / "data"))["train"]) == 3


def test_a_clip_that_cannot_be_read_is_reported_once_for_all_speeds(base_folder, tmp_path, write_media, tone):
    for name in ("good.m4a", "bad.m4a"):
        write_media(tmp_path / name, samples=tone(0.5))
    lines = [
        {"dialogue_id": name, "turn": 0, "speaker": "x", "text": "hi", "emotion": "sad", "split": "train"}
        | {"file_name": name}
        for name in ("good.m4a", "bad.m4a")
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_folder(tmp_path, tmp_path / "data", progress=False)
    (tmp_path / "bad.m4a").write_bytes(b"nothing")
    arguments = [
        "--stage",
        "emotion",
        "--dataset_name",
        str(tmp_path / "data"),
        "--model_name_or_path",
        str(base_folder),
    ]
    arguments += ["--use_cpu", "True", "--disable_tqdm", "True", "--feature_cache", str(tmp_path / "cache")]
    report = prepare_features.main([*arguments, "--eval_split", "train", "--audio_speeds", "0.9", "1.1"])
    assert report["encoded"] == 3 and len(report["unreadable"]) == 1
    assert report["unreadable"][0]["item"].endswith("bad.m4a")


def test_names_of_entries():
    assert entry_name("audio", "ab") == entry_name("audio", "ab", 1.0) == "audio.ab"
    assert entry_name("audio", "ab", 0.9) == "audio.ab@0.9"
