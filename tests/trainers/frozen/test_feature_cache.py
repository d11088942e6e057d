"""The feature cache: made by real processes from real clips, and trained from."""

import json
import os
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file, save_file

from empathic.data_prep.clip_digests import Digests
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.media_empathic import load_video
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import prepare_features, train
from empathic.trainers.frozen.feature_cache import (
    FeatureCache,
    FeatureCacheError,
    choose_draw,
    describe,
    draw_generator,
    read_entries,
)
from empathic.trainers.samples import SampleStream, StageCollator, emotion_sample

EMOTIONS = ("happy", "sad", "angry")


def write_recordings(raw, write_media, grey_frames, tone, names, split):
    """One dialogue per one-letter name; its first turn has a clip that depends on the letter."""
    lines = []
    for name in names:
        number = ord(name) - ord("a")
        path = raw / f"{name}.mp4"
        frames = np.roll(grey_frames(9 + 2 * number), number, axis=0)
        write_media(path, frames=frames, samples=tone(0.5 + 0.1 * number, frequency=200 + 90 * number))
        line = {"dialogue_id": name, "turn": 0, "speaker": "clara", "text": "hello there", "split": split}
        lines.append(line | {"emotion": EMOTIONS[number % 3], "file_name": path.name})
        lines.append({"dialogue_id": name, "turn": 1, "speaker": "bot", "text": "i am fine", "split": split})
    return lines


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, write_media, grey_frames, tone):
    """A function (names by split) that returns the folder of a prepared data set with its clips in `raw` next to it."""

    def make(embed=False, **names):
        root = tmp_path_factory.mktemp("recordings")
        (root / "raw").mkdir()
        lines = []
        for split, of_split in names.items():
            lines += write_recordings(root / "raw", write_media, grey_frames, tone, of_split, split)
        (root / "raw" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        prepare_folder(root / "raw", root / "data", embed=embed, progress=False)
        return root / "data"

    return make


@pytest.fixture(scope="module")
def data(recordings):
    return recordings(train=["a", "b", "c", "d"], validation=["e", "f"])


@pytest.fixture(scope="module")
def long_clip_data(tmp_path_factory, write_media, grey_frames, tone):
    """A clip of two Whisper windows of two seconds, and a short one."""
    root = tmp_path_factory.mktemp("long")
    for name, seconds in (("long", 2.7), ("short", 0.3)):
        write_media(root / f"{name}.mp4", frames=grey_frames(6), samples=tone(seconds))
    lines = [
        {"dialogue_id": n, "turn": 0, "speaker": "x", "text": "hi", "emotion": "sad", "split": "train"}
        | {"file_name": f"{n}.mp4"}
        for n in ("long", "short")
    ]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_folder(root, root / "data", progress=False)
    return root / "data"


def options(base_folder, data, *more, stage="emotion"):
    names = [str(name) for name in (data if isinstance(data, list) else [data])]
    common = ["--stage", stage, "--model_name_or_path", str(base_folder), "--dataset_name", *names, "--seed", "3"]
    return [*common, "--disable_tqdm", "True", "--report_to", "none", "--use_cpu", "True", *map(str, more)]


def fill(base_folder, data, cache, *more, stage="emotion"):
    return prepare_features.main(options(base_folder, data, "--feature_cache", cache, *more, stage=stage))


def losses(base_folder, data, output, *more, stage="emotion"):
    """Training and evaluation losses of a short run, and its gradients' norms."""
    run = ["--output_dir", output, "--max_steps", "3", "--per_device_train_batch_size", "3", "--save_strategy", "no"]
    run += ["--learning_rate", "1e-2", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "9"]
    train.main(options(base_folder, data, *run, *more, stage=stage))
    logs = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "eval_loss", "grad_norm")
    values = [log[name] for log in logs for name in names if name in log]
    assert len(values) == 7
    return np.array(values)


def tensors(cache):
    found = {}
    for path in sorted(Path(cache).glob("features-*.safetensors")):
        found |= load_file(path)
    return found


def opened(model, processor, cache, draws=None):
    return FeatureCache(cache, describe(model.model.vision_tower, model.model.audio_tower, processor), draws)


@pytest.fixture(scope="module")
def cache(base_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    report = fill(base_folder, data, folder, "--frame_draws", "3", "--feature_dtype", "float32")
    assert (report["clips"], report["encoded"], report["unreadable"]) == (12, 12, [])
    return folder


# Training from the cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_encoders(monkeypatch):
    """Fail if a clip is decoded or a tower runs."""

    def fail(*args, **kwargs):
        raise AssertionError("a clip was decoded or encoded")

    from empathic import modeling_empathic, processing_empathic

    def forbid():
        for module, name in (
            (processing_empathic, "load_video"),
            (processing_empathic, "load_audio"),
            (modeling_empathic, "encode_frames"),
            (modeling_empathic, "encode_sound"),
        ):
            monkeypatch.setattr(module, name, fail)

    return forbid


@pytest.fixture(scope="module")
def media_losses(base_folder, data, tmp_path_factory):
    return losses(base_folder, data, tmp_path_factory.mktemp("media"), "--frame_draws", "3")


def test_training_gives_the_same_losses_as_from_media(base_folder, data, cache, tmp_path, media_losses, no_encoders):
    no_encoders()
    cached = losses(base_folder, data, tmp_path, "--feature_cache", cache)
    np.testing.assert_allclose(cached, media_losses, rtol=2e-5)
    assert len(np.unique(cached[::2])) > 2


def test_half_precision_is_close(base_folder, data, tmp_path, media_losses):
    fill(base_folder, data, tmp_path / "half", "--frame_draws", "3")
    assert {tensor.dtype for tensor in tensors(tmp_path / "half").values()} == {torch.float16}
    cached = losses(base_folder, data, tmp_path / "run", "--feature_cache", tmp_path / "half")
    np.testing.assert_allclose(cached, media_losses, rtol=5e-3)


def same_batches(base_folder, data, cache, model, processor, draws, *more):
    """Batches of a mixture from media and from the cache: the same texts and, through the model, the same loss."""
    script, args, _ = train.parse(options(base_folder, data, "--output_dir", cache, "--max_steps", "1", *more))
    sources = train.stage_sources(script, args, train.load_splits(script.dataset_name, ["train"]))
    collators = StageCollator(processor, draws), StageCollator(processor, None, opened(model, processor, cache, draws))
    model.eval()
    for random_frames in (True, False):
        stream = SampleStream(sources, 12, 4, random_frames)
        media, cached = (collator([stream[number] for number in range(12)]) for collator in collators)
        assert torch.equal(media["input_ids"], cached["input_ids"]) and torch.equal(media["labels"], cached["labels"])
        assert torch.equal(media["video_mask"], cached["video_mask"])
        assert not {"pixel_values_videos", "input_features"} & set(cached)
        with torch.no_grad():
            torch.testing.assert_close(model(**cached).loss, model(**media).loss, rtol=1e-5, atol=1e-6)
    return sources


def test_evenly_spaced_frames_alone(base_folder, data, cache, model, processor):
    same_batches(base_folder, data, cache, model, processor, 0)


def test_stage_dialogue_trains_from_it(base_folder, data, cache, tmp_path, no_encoders):
    lora = ["--lora_r", "2", "--frame_draws", "3"]
    media = losses(base_folder, data, tmp_path / "media", *lora, stage="dialogue")
    no_encoders()
    cached = losses(base_folder, data, tmp_path / "cache", *lora, "--feature_cache", cache, stage="dialogue")
    np.testing.assert_allclose(cached, media, rtol=2e-5)


def test_stage_epo_trains_from_it(base_folder, data, tmp_path, no_encoders):
    from empathic.data_prep.views import DialogueSamples

    for split in ("train", "validation"):
        rows = [
            {
                "prompt": sample["prompt"],
                "chosen": [{"role": "assistant", "content": sample["reply"]}],
                "rejected": [{"role": "assistant", "content": "the old dog"}],
            }
            for sample in DialogueSamples(load_dataset(str(data), split=split))
        ]
        (tmp_path / "pairs").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "pairs" / f"{split}.parquet")
    pairs = tmp_path / "pairs"
    report = fill(base_folder, pairs, tmp_path / "features", "--feature_dtype", "float32", stage="epo")
    assert report["encoded"] == 12
    lora = ["--lora_r", "2", "--frame_draws", "1"]
    media = losses(base_folder, pairs, tmp_path / "media", *lora, stage="epo")
    no_encoders()
    cached = losses(base_folder, pairs, tmp_path / "c", *lora, "--feature_cache", tmp_path / "features", stage="epo")
    np.testing.assert_allclose(cached, media, rtol=2e-5)


# Contents ------------------------------------------------------------------------------------------------------------


def test_tensors_are_the_towers_outputs(base_folder, data, cache, model, processor):
    features = opened(model, processor, cache)
    model.eval()
    for row in load_dataset(str(data), split="train"):
        if row["video"] is None:
            continue
        values, mask = processor.sound(row["audio"])
        with torch.no_grad():
            heard = model.model.audio_tower(values[None]).last_hidden_state[0]
        length = -(-int(mask.sum()) // 2)
        found = features.features("audio", row["audio"])
        assert found.shape == (length, 32) and length < len(heard)
        torch.testing.assert_close(found, heard[:length])
        digest = Digests().of(row["video"])
        for draw in (None, 0, 1, 2):
            generator = None if draw is None else draw_generator(digest, draw)
            pixels, _ = processor.frames(row["video"], generator)
            with torch.no_grad():
                seen = model.model.vision_tower(pixels).last_hidden_state
            torch.testing.assert_close(features.features("video", row["video"], draw), seen)


def test_draws_differ_by_clip_and_number(data):
    clips = [row["video"] for row in load_dataset(str(data), split="train") if row["video"]]
    digests = [Digests().of(clip) for clip in clips]
    moments = {draw_generator(digest, draw).random() for digest in digests for draw in range(3)}
    assert len(moments) == 3 * len(clips)
    chosen = [choose_draw([3, 2, number], 3) for number in range(300)]
    assert set(chosen) == {0, 1, 2} and all(70 < chosen.count(draw) < 130 for draw in range(3))
    assert choose_draw(None, 3) is None and choose_draw([3, 2, 1], 0) is None
    frames = [load_video(clips[3], 2, draw_generator(digests[3], draw)) for draw in range(6)]
    assert len({draw.tobytes() for draw in frames}) > 2


def test_several_windows(base_folder, long_clip_data, model, processor, tmp_path):
    more = ["--feature_dtype", "float32", "--eval_split", "train"]
    fill(base_folder, long_clip_data, tmp_path / "cache", *more)
    features = opened(model, processor, tmp_path / "cache")
    rows = list(load_dataset(str(long_clip_data), split="train"))
    lengths = [len(features.features("audio", row["audio"])) for row in rows]
    assert lengths[0] > 100 > lengths[1] > 0  # a window is 100 positions
    messages = [[{"role": "user", "content": [{"type": "audio", **row["audio"]}]}] for row in rows]
    model.eval()
    with torch.no_grad():
        media = model(**processor.pad([processor.prepare(m) for m in messages], "right")).logits
        cached = processor.pad([processor.prepare(features.fill(m, None)) for m in messages], "right")
        assert "input_features" not in cached
        torch.testing.assert_close(model(**cached).logits, media, rtol=1e-4, atol=1e-5)


def test_identical_clips_are_encoded_once(base_folder, recordings, tmp_path):
    data = recordings(train=["a", "b"], validation=["c"])
    raw = data.parent / "raw"
    shutil.copy(raw / "a.mp4", raw / "c.mp4")
    report = fill(base_folder, data, tmp_path / "cache")
    assert (report["clips"], report["distinct"], report["encoded"]) == (6, 4, 4)


# A cache that does not fit -------------------------------------------------------------------------------------------


def altered_model(base_folder, target):
    shutil.copytree(base_folder, target)
    path = target / "model.safetensors"
    state = load_file(path)
    name = next(n for n in state if "vision_tower" in n and n.endswith("weight"))
    state[name].view(-1)[0] += 1e-3
    save_file(state, path, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("frames", r"num_frames: the cache has 2, the model 3\. Run `empathic prepare-features` again"),
        ("seconds", r"max_audio_seconds: the cache has 120.0, the model 60.0"),
        ("pictures", r"image_processor\.size\.shortest_edge: the cache has 32, the model 40"),
        ("audio", r"audio\.weights: the cache has"),
        ("dtype", r"audio\.dtype: the cache has 'torch.float32', the model 'torch.bfloat16'"),
        ("draws", r"has 3 random frame draws per clip, but frame_draws is 4"),
        ("absent", r"has no feature cache"),
    ],
)
def test_a_stale_cache_is_refused(base_folder, cache, model, tmp_path, change, message):
    processor, folder, draws = EmpathicProcessor.from_pretrained(base_folder), cache, None
    opened(model, processor, cache, 3)
    if change == "frames":
        processor.num_frames = 3
    elif change == "seconds":
        processor.max_audio_seconds = 60.0
    elif change == "pictures":
        processor.image_processor.size = {"shortest_edge": 40}
    elif change == "audio":
        next(model.model.audio_tower.parameters()).data.view(-1)[0] += 1e-3
    elif change == "dtype":
        model = model.bfloat16()
    elif change == "draws":
        draws = 4
    else:
        folder = tmp_path
    with pytest.raises(FeatureCacheError, match=message):
        opened(model, processor, folder, draws)


def test_a_stale_cache_is_refused_in_training_and_made_anew(base_folder, data, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "notes.part").write_text("not the cache's")
    base = altered_model(base_folder, tmp_path / "altered")
    with pytest.raises(FeatureCacheError, match=r"vision\.weights: the cache has .* Run `empathic prepare-features`"):
        losses(base, data, tmp_path / "run", "--feature_cache", tmp_path / "cache")
    report = fill(base, data, tmp_path / "cache")
    assert (report["encoded"], report["found"]) == (12, 0)
    report = fill(base, data, tmp_path / "cache")
    assert (report["encoded"], report["found"]) == (0, 12)
    assert (tmp_path / "cache" / "notes.part").exists()


def test_a_changed_clip_is_refused(base_folder, recordings, model, processor, write_media, grey_frames, tmp_path):
    data = recordings(train=["a", "b"], validation=["c"])
    fill(base_folder, data, tmp_path / "cache")
    row = load_dataset(str(data), split="train")[0]
    features = opened(model, processor, tmp_path / "cache")
    features.features("video", row["video"])
    write_media(Path(row["video"]["path"]), frames=grey_frames(20))
    with pytest.raises(FeatureCacheError, match=r"the video of .*a\.mp4 is not in the feature cache"):
        features.features("video", row["video"])
    stream = SampleStream([(1.0, [row], emotion_sample)], 4, 0)
    with pytest.raises(FeatureCacheError, match=r"a\.mp4 is not in the feature cache"):  # not reported as unreadable
        StageCollator(processor, None, features)([stream[number] for number in range(4)])


def test_unreadable_clips_are_reported_and_left_out(base_folder, recordings, model, processor, tmp_path, capsys):
    data = recordings(train=["a", "b", "c"], validation=["d"])
    raw = data.parent / "raw"
    (raw / "a.mp4").unlink()
    (raw / "b.mp4").write_bytes((raw / "b.mp4").read_bytes()[:800])
    report = fill(base_folder, data, tmp_path / "cache", "--feature_dtype", "float32")
    assert json.loads((tmp_path / "cache" / "report.json").read_text()) == report
    assert report["encoded"] == 4
    assert [(Path(f["item"]).name, f["kind"]) for f in report["unreadable"]] == [
        ("a.mp4", "audio"), ("a.mp4", "video"), ("b.mp4", "audio"), ("b.mp4", "video"),
    ]  # fmt: skip
    assert "No such file" in report["unreadable"][0]["reason"] and "cut short" in report["unreadable"][2]["reason"]
    assert "cannot be read: audio: " in capsys.readouterr().out
    same_batches(base_folder, data, tmp_path / "cache", model, processor, 1)


# Processes -----------------------------------------------------------------------------------------------------------


def kill_after(work, folder, shards):
    """Runs a function in a process that is killed once the cache has some shards."""
    process = get_context("fork").Process(target=work)
    process.start()
    deadline = time.monotonic() + 120
    while len(list(folder.glob("features-*.safetensors"))) < shards:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()


def test_a_killed_run_goes_on(base_folder, data, cache, tmp_path):
    folder = tmp_path / "cache"
    more = ["--frame_draws", "3", "--feature_dtype", "float32", "--shard_megabytes", "0.00001"]  # one shard per clip
    arguments = options(base_folder, data, "--feature_cache", folder, *more)
    add = prepare_features.ShardWriter.add

    def run_slowly():  # each clip takes a while, so that the kill hits the middle
        prepare_features.ShardWriter.add = lambda *args: (add(*args), time.sleep(0.6))
        prepare_features.main(arguments)

    kill_after(run_slowly, folder, shards=3)
    (folder / "features-0000-99999.part").write_bytes(b"half a shard")
    written = {path: path.stat().st_mtime_ns for path in folder.glob("features-*.safetensors")}
    report = fill(base_folder, data, folder, *more)
    assert report["found"] == len(written) and report["found"] + report["encoded"] == 12 and 3 <= len(written) < 12
    assert all(path.stat().st_mtime_ns == changed for path, changed in written.items())
    assert not list(folder.glob("*.part"))
    same_contents(folder, cache)


def same_contents(one, other):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys() and len(first) == 12
    assert all(torch.equal(first[name], second[name]) for name in first)
    draws = [{name: entry.draws for name, entry in read_entries(Path(folder)).items()} for folder in (one, other)]
    assert draws[0] == draws[1]


def test_a_killed_run_keeps_its_work_although_no_shard_is_full(base_folder, data, cache, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    more = ["--frame_draws", "3", "--feature_dtype", "float32"]  # a shard holds more than all clips
    arguments = options(base_folder, data, "--feature_cache", folder, *more)
    add = prepare_features.ShardWriter.add

    def run_slowly():
        init = prepare_features.ShardWriter.__init__
        monkeypatch.setattr(prepare_features.ShardWriter, "__init__", lambda *args: init(*args, seconds=0.5))
        monkeypatch.setattr(prepare_features.ShardWriter, "add", lambda *args: (time.sleep(0.2), add(*args)))
        prepare_features.main(arguments)

    kill_after(run_slowly, folder, shards=2)
    there = len(read_entries(folder))
    assert 4 <= there < 12
    report = fill(base_folder, data, folder, *more)
    assert report["found"] == there and report["encoded"] == 12 - there
    same_contents(folder, cache)


def test_hashes_of_a_run_that_was_killed_while_it_read_are_used(base_folder, data, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(prepare_features, "SECONDS_BETWEEN_SAVES", 0)
    of, known = Digests.of, []

    def fail_at_the_third(self, item):
        if len(self.files) == 3:
            raise KeyboardInterrupt
        return of(self, item)

    monkeypatch.setattr(Digests, "of", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fill(base_folder, data, folder)
    monkeypatch.setattr(Digests, "of", lambda self, item: known.append(len(self.files)) or of(self, item))
    fill(base_folder, data, folder)
    assert known[0] == 3 and not list(folder.glob("files-*.json")) and (folder / "files.json").exists()


def test_an_error_in_the_middle_keeps_what_was_encoded(base_folder, data, tmp_path, monkeypatch):
    add = prepare_features.ShardWriter.add

    def fail_at_the_third(self, *args):
        if len(self._tensors) == 3:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(prepare_features.ShardWriter, "add", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fill(base_folder, data, tmp_path / "cache")
    assert len(read_entries(tmp_path / "cache")) == 3


@pytest.mark.distributed
def test_two_processes_make_the_same_cache(base_folder, data, cache, tmp_path):
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n")
    probe = (
        "import sys, accelerate, empathic.processes\n"
        "from empathic.trainers import prepare_features as p\n"
        "p.main(sys.argv[1:])\n"
        "state = accelerate.PartialState()\n"
        "with open(f'{sys.path[0]}/process{state.process_index}', 'w') as file:\n"
        "    file.write(f'{state.num_processes} {state.distributed_type.value}')\n"
        "empathic.processes.leave(0)\n"
    )
    script = tmp_path / "probe.py"
    script.write_text(probe)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--main_process_port", "0", str(script)]
    arguments = options(base_folder, data, "--feature_cache", tmp_path / "cache")
    run = subprocess.run(
        [*launch, *arguments, "--frame_draws", "3", "--feature_dtype", "float32"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert [(tmp_path / f"process{rank}").read_text() for rank in (0, 1)] == ["2 MULTI_CPU"] * 2
    assert run.stdout.count("12 clips were encoded") == 1
    ranks = {path.name.split("-")[1] for path in (tmp_path / "cache").glob("features-*.safetensors")}
    assert ranks == {"0000", "0001"}
    same_contents(tmp_path / "cache", cache)


# Mixtures ------------------------------------------------------------------------------------------------------------


def test_a_source_is_passed_through_before_it_starts_again():
    sources = [(3.0, list(range(10)), lambda row, rng: {"row": row}), (1.0, "abcd", lambda row, rng: {"row": row})]
    stream = SampleStream(sources, 400, 5)
    rows = [stream[number]["row"] for number in range(400)]
    numbers, letters = [r for r in rows if isinstance(r, int)], [r for r in rows if isinstance(r, str)]
    assert 270 < len(numbers) < 330
    for part, size in ((numbers, 10), (letters, 4)):
        for start in range(0, len(part) - size, size):
            assert len(set(part[start : start + size])) == size
    assert [stream[n]["row"] for n in reversed(range(400))] == rows[::-1]


def test_data_sets_with_paths_and_with_bytes_mix_by_weight(base_folder, recordings, model, processor, tmp_path):
    paths = recordings(train=["a", "b"], validation=["c"])
    embedded = recordings(embed=True, train=["g", "h", "i", "j"], test=["k"])
    raw = embedded.parent / "raw"
    shutil.rmtree(raw)  # the bytes are in the data set
    report = fill(base_folder, [paths, embedded], tmp_path, "--feature_dtype", "float32", "--eval_split", "test")
    assert (report["clips"], report["encoded"], report["unreadable"]) == (14, 14, [])
    more = ["--dataset_weights", "3", "1"]
    sources = same_batches(base_folder, [paths, embedded], tmp_path, model, processor, 1, *more)
    stream = SampleStream(sources, 1000, 0)
    spoken = [stream[number]["messages"][0]["content"][0] for number in range(1000)]
    share = sum(item["bytes"] is None for item in spoken) / 1000
    assert 0.71 < share < 0.79


def test_a_data_set_may_lack_the_evaluation_split(recordings, caplog):
    import logging

    one, other = (str(recordings(train=["a"], **more)) for more in ({"validation": ["b"]}, {"test": ["c"]}))
    logging.getLogger("empathic").propagate = True
    with caplog.at_level("WARNING"):
        found = train.load_splits([one, other], ["validation"], optional=True)
    assert [rows is None for rows in found] == [False, True]
    assert f"{other} has no split validation; its splits are train, test." in caplog.text
    both = train.load_splits([one, other], ["test", "validation"], optional=True)
    assert [rows[0]["split"] for rows in both] == ["validation", "test"]
    with pytest.raises(ValueError, match=r"has no split dev; .* turn evaluation off"):
        train.load_splits([one, other], ["dev"], optional=True)
    with pytest.raises(ValueError, match="has no split validation; its splits are train, test"):
        train.load_splits([one, other], ["validation"])


# The model -----------------------------------------------------------------------------------------------------------


def test_pixels_and_features_exclude_each_other(model, processor, clip):
    messages = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "audio", "path": clip}]}]
    inputs = processor.pad([processor.prepare(messages)])
    with torch.no_grad():
        seen = model.model.vision_tower(inputs["pixel_values_videos"][0]).last_hidden_state[None]
        heard = model.model.audio_tower(inputs["input_features"]).last_hidden_state
    with pytest.raises(ValueError, match="exactly one of pixel_values_videos and video_encoder_states"):
        model(**inputs, video_encoder_states=seen)
    with pytest.raises(ValueError, match="exactly one of input_features and audio_encoder_states"):
        model(**inputs, audio_encoder_states=heard)
    clips = [{"type": "video", "features": seen[0]}, {"type": "audio", "path": clip}]
    with pytest.raises(ValueError, match="Some video clips of a batch are cached features, others are not"):
        processor.pad([processor.prepare(messages), processor.prepare([{"role": "user", "content": clips}])])
    features = {
        k: v for k, v in inputs.items() if k not in ("pixel_values_videos", "input_features", "input_features_mask")
    }
    features |= {"video_encoder_states": seen, "audio_encoder_states": heard[:, :50]}
    features["audio_encoder_mask"] = inputs["input_features_mask"][:, :100:2]
    model.eval()
    one = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    other = model.generate(**features, max_new_tokens=4, do_sample=False)
    assert torch.equal(one, other)
