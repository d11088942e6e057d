"""Tests of the tiny preset's corpus and encoders."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.media_empathic import probe, read_audio
from empathic.tiny import corpus, encoders
from empathic.tiny.dialogues import ASSISTANT, OPENERS, SPLITS, USER, make_dialogues

FEW = {"train": 2, "validation": 1, "test": 2}


def read(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "raw"
    summary = corpus.write_corpus(folder, num_dialogues=FEW, progress=False)
    return folder, summary


def test_a_corpus_is_a_folder_of_recordings(folder):
    folder, summary = folder
    rows = read(folder)
    assert summary["dialogues"] == len({row["dialogue_id"] for row in rows}) == 5
    assert summary["turns"] == len(rows) == len({row["utterance_id"] for row in rows})
    recorded = [row for row in rows if row["speaker"] == USER]
    assert summary["clips"] == summary["written"] == len(recorded) == sum(summary["labeled"].values())
    assert {path.relative_to(folder).as_posix() for path in folder.glob("**/*.mp4")} == {r["video"] for r in recorded}
    for row in rows:
        assert row["split"] in SPLITS and row["text"]
        if row["speaker"] == USER:
            info = probe(folder / row["video"], decode=True)
            assert row["emotion"] in EMOTIONS and info.has_audio and info.has_video
        else:
            assert row["emotion"] is None and "video" not in row
    numbers = {}
    for row in rows:
        numbers.setdefault(row["dialogue_id"], []).append(row["turn"])
    assert all(turns == list(range(len(turns))) for turns in numbers.values())


def test_the_folder_adapter_takes_it_as_it_is(folder, tmp_path):
    folder, summary = folder
    report = prepare_folder(folder, tmp_path / "data", progress=False)
    assert report["rows"] == summary["turns"] and report["left_out"] == report["repaired"] == []
    for split, clips in summary["labeled"].items():
        assert report["splits"][split]["with_audio"] == report["splits"][split]["with_video"] == clips


def test_a_clip_fits_one_whisper_window(folder):
    folder, _ = folder
    for row in read(folder):
        if "video" in row:
            assert len(read_audio(folder / row["video"])) <= encoders.feature_extractor().n_samples


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    corpus.write_corpus(tmp_path / "again", num_dialogues=FEW, progress=False)
    assert contents(tmp_path / "again") == contents(folder[0])
    corpus.write_corpus(tmp_path / "other", num_dialogues={"test": 1}, seed=1, progress=False)
    assert set(contents(tmp_path / "other")) & set(contents(folder[0])) == {"metadata.jsonl"}


def test_an_interrupted_corpus_is_completed(folder, tmp_path, monkeypatch):
    written = []
    write = corpus.write_clip

    def stop_in_the_third(path, *args):
        if len(written) == 2:
            path.write_bytes(b"half a clip")
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(corpus, "write_clip", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        corpus.write_corpus(tmp_path, num_dialogues=FEW, progress=False)
    assert len(contents(tmp_path)) == 2  # no partial files, and no metadata.jsonl yet
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("clips/*")}
    monkeypatch.setattr(corpus, "write_clip", write)
    summary = corpus.write_corpus(tmp_path, num_dialogues=FEW, progress=False)
    assert summary["written"] == summary["clips"] - 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path) == contents(folder[0])


def test_conversations_alone(tmp_path):
    summary = corpus.write_corpus(tmp_path, num_dialogues={"train": 3}, with_clips=False, progress=False)
    assert summary["clips"] == 0 and list(contents(tmp_path)) == ["metadata.jsonl"]
    assert not any("video" in row for row in read(tmp_path))


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="dev"):
        corpus.write_corpus(tmp_path, num_dialogues={"dev": 1}, progress=False)


def test_some_replies_of_the_training_split_answer_another_emotion():
    rows = corpus.corpus_rows(with_clips=False)
    share = {}
    for split, number in corpus.NUM_DIALOGUES.items():
        turns = [turn for dialogue in make_dialogues(number, 0, split) for turn in dialogue]
        texts = [row["text"] for row in rows if row["split"] == split]
        emotions = [None, *(turn["emotion"] for turn in turns)]
        replies = [item for item in zip(texts, turns, emotions, strict=False) if item[1]["speaker"] == ASSISTANT]
        fits = [any(text.startswith(opener) for opener in OPENERS[emotion]) for text, _, emotion in replies]
        assert all(text == turn["text"] for (text, turn, _), fit in zip(replies, fits, strict=True) if fit)
        share[split] = 1 - sum(fits) / len(fits)
    assert share["validation"] == share["test"] == 0
    assert share["train"] == pytest.approx(corpus.MISFIT_SHARE, abs=0.04)


def test_splits_share_no_content():
    rows = corpus.corpus_rows(with_clips=False)
    pairs, texts = {}, {}
    for split, number in corpus.NUM_DIALOGUES.items():
        turns = [turn for dialogue in make_dialogues(number, 0, split) for turn in dialogue]
        asked = [turn["text"] for turn in turns if turn["speaker"] == USER]
        assert asked == [row["text"] for row in rows if row["split"] == split and row["speaker"] == USER]
        pairs[split] = {tuple(sorted(turn["pair"])) for turn in turns if turn["pair"]}
        texts[split] = {turn["text"] for turn in turns if turn["pair"]}
        assert len(pairs[split]) > 20
    for held in (pairs, texts):
        assert all(held[a].isdisjoint(held[b]) for a, b in combinations(SPLITS, 2))
    # Enough labeled clips for a stable accuracy.
    assert sum(row["split"] == "test" and row["emotion"] is not None for row in rows) >= 200


def test_renderings_are_what_the_encoders_take():
    pixels, drawn = encoders.pictures(3, seed=1)
    assert pixels.shape == (3, 3, 32, 32) and drawn.shape == (3, 18)
    mel, made = encoders.sounds(2, seed=1)
    assert mel.shape == (2, 80, 100) and made.shape == (2, 48, 9)
    assert torch.equal(encoders.pictures(3, seed=1)[0], pixels) and not torch.equal(encoders.pictures(3)[0], pixels)


def test_the_parameters_of_a_rendering_say_how_it_is_drawn():
    from empathic.tiny.clips import FACE_FEATURES, VOICE_FEATURES, random_picture, random_sound

    drawn = np.stack([random_picture(np.random.default_rng(i))[1] for i in range(200)])
    faces = drawn[:, : len(FACE_FEATURES)]
    assert np.abs(faces).max() <= 1 and np.abs(faces.mean(axis=0)).max() < 0.2 and faces.std(axis=0).min() > 0.45
    samples, made = random_sound(np.random.default_rng(0), seconds=1.0)
    assert (made[:, : len(VOICE_FEATURES)] == made[0, : len(VOICE_FEATURES)]).all()
    # The amplitude parameter follows the loudness of the sound.
    loudness = np.sqrt((samples.reshape(50, 320) ** 2).mean(axis=1))
    assert np.corrcoef(loudness, made[:, -1])[0, 1] > 0.6


def test_encoders_learn_and_load_as_parts(tmp_path, parts):
    from empathic.modeling_empathic import EmpathicForConditionalGeneration
    from empathic.processing_empathic import EmpathicProcessor

    losses = encoders.pretrain_encoders(
        tmp_path, vision_steps=12, audio_steps=12, batch_size=16, num_pictures=96, num_sounds=48, progress=False
    )
    for name, values in losses.items():
        assert len(values) == 12 and np.mean(values[-3:]) < 0.9 * values[0], name
    parts = {**parts, "vision": str(tmp_path / "vision"), "audio": str(tmp_path / "audio")}
    qformer = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = EmpathicForConditionalGeneration.from_parts_pretrained(
        **parts, num_query_tokens=4, num_frames=2, video_qformer_config=qformer, audio_qformer_config=qformer
    )
    processor = EmpathicProcessor.from_parts_pretrained(**parts, num_query_tokens=4, num_frames=2, with_text=True)
    corpus.write_corpus(tmp_path / "raw", num_dialogues={"test": 1}, progress=False)
    row = read(tmp_path / "raw")[0]
    path = str(tmp_path / "raw" / row["video"])
    content = [{"type": "audio", "path": path}, {"type": "video", "path": path}, {"type": "text", "text": row["text"]}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        task="emotion",
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert batch["pixel_values_videos"].shape == (1, 2, 3, 32, 32)
    assert batch["input_features"].shape == (1, 80, 100)  # one window
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
        told = model.model.vision_tower(batch["pixel_values_videos"][0]).last_hidden_state
    saved = type(model.model.vision_tower).from_pretrained(tmp_path / "vision")
    assert torch.equal(saved(batch["pixel_values_videos"][0]).last_hidden_state, told)
