"""`empathic evaluate emotion` on tiny models: what each row is shown, scores, bad clips, the quickstart's rows."""

import json

import pytest
from accelerate import PartialState
from datasets import load_dataset

from empathic.cli import main
from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.messages import clip_message
from empathic.evaluation import emotion as e
from empathic.evaluation.generation import generate_texts
from empathic.evaluation.metrics import accuracy
from empathic.evaluation.replies import read_replies
from empathic.evaluation.statistics_of_replies import holm


@pytest.fixture(scope="module", autouse=True)
def forget_the_device():
    """`--device cpu` stays set in accelerate's state; other tests of this process are to choose for themselves."""
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, write_media, grey_frames, tone):
    """DATA of 8 labeled turns of 4 dialogues with sentence, audio and video, and three turns that lack one of them."""
    from empathic.data_prep.corpora.folder import prepare_folder

    raw, data = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("emotion_data")
    for number in range(4):
        samples = tone(0.6, frequency=200 + 100 * number)
        write_media(raw / f"{number}.mp4", frames=grey_frames(4 + number), samples=samples)
    write_media(raw / "seen.mp4", frames=grey_frames(6))
    write_media(raw / "heard.wav", samples=tone(0.5), audio_codec="pcm_s16le")
    lines = []
    for number in range(4):
        for turn in range(2):
            emotion = EMOTIONS[(number + turn) % 3]
            lines.append({"dialogue_id": f"d{number}", "turn": turn, "file_name": f"{number}.mp4", "emotion": emotion})
    lines += [{"dialogue_id": "seen", "turn": 0, "file_name": "seen.mp4", "emotion": "sad"}]
    lines += [{"dialogue_id": "heard", "turn": 0, "file_name": "heard.wav", "emotion": "sad"}]
    for line in lines:
        line |= {"split": "test", "speaker": "clara", "text": "how are you"}
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare_folder(raw, data, progress=False)
    return str(data)


@pytest.fixture(scope="module")
def samples(rows):
    return e.EmotionSamples(load_dataset(rows, split="test"))


def test_the_samples_have_all_that_any_row_shows(samples):
    assert len(samples) == 8 and samples.left_out == 2
    for sample in (samples[place] for place in range(8)):
        (message,) = sample["prompt"]
        assert {item["type"] for item in message["content"]} == {"audio", "video", "text"}
        assert sample["reply"] == sample["emotion"] in EMOTIONS


def test_each_row_is_shown_what_it_is_called(model, processor, samples):
    """Beside the prompts of the processor: A and V without the sentence, T without clips."""
    rows = [samples.dataset[int(place)] for place in samples.places]
    batch, told_apart = [samples[place] for place in range(8)], set()
    for name, (modalities, with_text) in e.SETTINGS.items():
        assert set(name.split("+")) == {kind[0].upper() for kind in (*modalities, *(["text"] if with_text else []))}
        messages = [[clip_message(row, modalities, with_text)] for row in rows]
        inputs = processor.apply_chat_template(
            messages, task="emotion", with_text=with_text, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        assert ("input_features" in inputs) == ("A" in name) and ("pixel_values_videos" in inputs) == ("V" in name)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        expected = [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
        assert [text for text, _ in e.name_emotions(model, processor, batch, name)] == expected
        told_apart.add(tuple(expected))
    assert len(told_apart) == len(e.SETTINGS)  # so that one row's prompts are not taken for another's


def test_the_quickstart_rows_are_those_of_before(model, processor, samples):
    """The sentence alone and with sound, picture or both, as the quickstart's table has had them."""
    rows = [samples.dataset[int(place)] for place in samples.places]
    processor.with_text, before = True, processor.with_text
    try:
        expected = {}
        for name, modalities in {"T": (), "AT": ("audio",), "VT": ("video",), "AVT": ("audio", "video")}.items():
            conversations = [[clip_message(row, modalities)] for row in rows]
            answers = generate_texts(model, processor, conversations, "emotion", max_new_tokens=8, batch_size=64)
            expected[name] = accuracy(answers, [row["emotion"] for row in rows])["accuracy"]
    finally:
        processor.with_text = before
    shown = [samples[place] for place in range(len(samples))]
    for name, setting in e.QUICKSTART_SETTINGS.items():
        named = [text for text, _ in e.name_emotions(model, processor, shown, setting)]
        assert accuracy(named, [sample["emotion"] for sample in shown])["accuracy"] == expected[name]


def test_scores_of_known_answers():
    named = ["happy", "Happy ", "sad", "", "angry", "nonsense"]
    true = ["happy", "happy", "sad", "sad", "sad", "angry"]
    rows = [
        {"id": f"c/test/d{place // 2}/{place}", "reply": reply, "reference": reference}
        for place, (reply, reference) in enumerate(zip(named, true, strict=True))
    ]
    found = e.score_answers(rows, resamples=200)
    assert found["metrics"]["accuracy"]["mean"] == 0.5
    assert found["metrics"]["mean_recall"]["mean"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found["recall"]["happy"] == 1 and found["recall"]["sad"] == pytest.approx(1 / 3)
    assert found["recall"]["angry"] == 0 and found["recall"]["fearful"] is None
    assert found["confusion"]["sad"] | {"sad": 1, "angry": 1, "other": 1} == found["confusion"]["sad"]
    # Draws of the three conversations, whose means are 1, 0.5 and 0.
    assert 0 <= found["metrics"]["accuracy"]["low"] < 0.5 < found["metrics"]["accuracy"]["high"] <= 1
    alone = e.score_answers(rows[:2])["metrics"]["accuracy"]
    assert alone == {"mean": 1.0, "low": None, "high": None}


def test_the_command(base_folder, rows, tmp_path, capsys):
    line = ["emotion", base_folder, f"--data={rows}", "--device=cpu", "--resamples=100", f"--output={tmp_path}"]
    assert main(["evaluate", *line, "--batch_size=3"]) == 0
    results = json.loads((tmp_path / "emotion.json").read_text())
    assert list(results["systems"]) == ["T", "A", "V", "A+T", "V+T", "A+V+T"]
    for name, system in results["systems"].items():
        saved = read_replies(tmp_path / system["replies"])
        found = accuracy([row["reply"] for row in saved], [row["reference"] for row in saved])
        assert system["count"] == len(saved) == 8 and system["metrics"]["accuracy"]["mean"] == found["accuracy"]
        assert system["confusion"] == found["confusion"] and system["notes"] == []
        shown = {"T": "text", "A": "audio", "V": "video"}
        assert set(system["settings"]["shown"]) == {shown[letter] for letter in name.split("+")}
    assert [(found["a"], found["b"]) for found in results["comparisons"]] == [
        ("A+V+T", name) for name in ("T", "A", "V", "A+T", "V+T")
    ]
    assert [found["p_holm"] for found in results["comparisons"]] == holm([row["p"] for row in results["comparisons"]])
    text = capsys.readouterr().out
    assert "(Holm-Bonferroni)" in text
    assert "2 labeled clips are left out" in text and "trained without the sentence" in text and "7.86" in text


def test_a_clip_that_cannot_be_read_is_noted_and_its_row_kept(model, processor, samples, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no film at all" * 9)
    good, sample = samples[0], samples[1]
    (message,) = sample["prompt"]
    content = [
        {"type": i["type"], "path": str(tmp_path / "bad.mp4")} if i["type"] == "audio" else i
        for i in message["content"]
    ]
    bad = {**sample, "prompt": [{**message, "content": content}]}
    (first, note), (second, none) = e.name_emotions(model, processor, [bad, good], "A")
    assert first == "" and "bad.mp4" in note and none is None and second
    (_, note), (_, none) = e.name_emotions(model, processor, [bad, good], "A+V+T")
    assert "audio left out" in note and none is None
    assert e.name_emotions(model, processor, [bad], "V+T")[0][1] is None


def test_no_clip_is_an_error(base_folder, recordings, tmp_path, capsys):
    rows = load_dataset(recordings.data, split="validation").map(lambda row: {"audio": None, "video": None})
    rows.to_parquet(tmp_path / "data" / "test.parquet")
    assert main(["evaluate", "emotion", base_folder, f"--data={tmp_path / 'data'}", f"--output={tmp_path}"]) == 1
    assert "no row of its split test" in capsys.readouterr().err


@pytest.fixture(scope="module")
def heard_or_seen(tmp_path_factory, write_media, grey_frames, tone):
    """Two prepared data sets of a corpus with sound only and of one with pictures only and no words."""
    from empathic.data_prep.corpora.folder import prepare_folder

    folders = {}
    for kind in ("heard", "seen"):
        raw, data = tmp_path_factory.mktemp(kind), tmp_path_factory.mktemp(f"{kind}_data")
        lines = []
        for number in range(4):
            if kind == "heard":
                name = write_media(raw / f"{number}.wav", samples=tone(0.4 + number / 10), audio_codec="pcm_s16le").name
            else:
                name = write_media(raw / f"{number}.mp4", frames=grey_frames(4 + number)).name
            line = {"dialogue_id": f"d{number}", "turn": 0, "file_name": name, "emotion": EMOTIONS[number % 3]}
            lines.append(line | {"split": "test", "speaker": "a", "text": "hello" if kind == "heard" else ""})
        (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        prepare_folder(raw, data, progress=False)
        folders[kind] = str(data)
    return folders


def test_a_corpus_of_sound_alone_or_pictures_alone_is_evaluated(base_folder, heard_or_seen, tmp_path, capsys):
    for kind, expected in (("heard", ["T", "A", "A+T"]), ("seen", ["V"])):
        out = tmp_path / kind
        assert main(["evaluate", "emotion", base_folder, f"--data={heard_or_seen[kind]}", f"--output={out}"]) == 0
        results = json.loads((out / "emotion.json").read_text())
        assert list(results["systems"]) == results["settings"]["inputs"] == expected
        assert {system["count"] for system in results["systems"].values()} == {4}
        assert results["settings"]["left_out"] == 0
        assert "4 clips" in capsys.readouterr().out


def test_inputs_choose_the_rows_and_their_clips(base_folder, rows, tmp_path, capsys):
    line = ["evaluate", "emotion", base_folder, f"--data={rows}", f"--output={tmp_path}"]
    assert main([*line, "--inputs", "A", "A+T"]) == 0
    results = json.loads((tmp_path / "emotion.json").read_text())
    assert (
        list(results["systems"]) == ["A", "A+T"] and results["systems"]["A"]["count"] == 9
    )  # also the one that is heard
    assert [(found["a"], found["b"]) for found in results["comparisons"]] == [("A+T", "A")]
    assert main([*line, "--inputs", "A+V"]) == 0
    capsys.readouterr()
    assert main([*line, "--inputs", "B"]) == 1
    assert "inputs: B is no row; the rows are T, A, V, A+V, A+T, V+T, A+V+T." in capsys.readouterr().err


def test_inputs_that_no_clip_has_are_counted(base_folder, heard_or_seen, tmp_path, capsys):
    line = ["evaluate", "emotion", base_folder, f"--data={heard_or_seen['heard']}", f"--output={tmp_path}"]
    assert main([*line, "--inputs", "V+T"]) == 1
    assert "has an emotion and text and video" in (error := capsys.readouterr().err)
    assert "4 have audio, 0 have video, 4 have text" in error
