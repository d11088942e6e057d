"""The IEMOCAP adapter on a miniature corpus in the layout of the full release."""

import tarfile
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import load_dataset

from empathic.data_prep.corpora import iemocap
from empathic.data_prep.corpora.base import LayoutError, Options, Report
from empathic.data_prep.corpora.iemocap import ABOUT, read
from empathic.data_prep.prepare import prepare_corpus

HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"
RATERS = "C-E2:\tNeutral;\t()\nC-E4:\tNeutral; Sadness;\t(or so)\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
SCENE = [  # name, start, end, label, text; not sorted by time, like the corpus
    ("M000", 0.4, 0.8, "ang", "What do you mean?"),
    ("F000", 0.0, 0.4, "neu", "Excuse me."),
    ("F001", 0.8, 1.2, "fru", "[LAUGHTER]"),
    ("M001", 1.2, 1.8, "exc", "Great; isn't it: yes?"),
]


def write_scene(root, name, scene=SCENE, media=True):
    """The files of one dialogue below Session<n>. media: whether to write empty files as clips."""
    session = root / f"Session{name[4]}"
    transcript, evaluation = [], [HEADER]
    for utterance, start, end, _, text in scene:
        transcript.append(f"{name}_{utterance} [{start:08.4f}-{end:08.4f}]: {text}\n")
    for utterance, start, end, label, _ in sorted(scene, key=lambda line: line[0]):  # all of F, then all of M
        evaluation.append(f"[{start:.4f} - {end:.4f}]\t{name}_{utterance}\t{label}\t[2.5000, 2.5000, 2.5000]\n{RATERS}")
    files = {
        f"dialog/transcriptions/{name}.txt": "".join(transcript),
        f"dialog/EmoEvaluation/{name}.txt": "\n".join(evaluation),
        f"dialog/EmoEvaluation/Categorical/{name}_e2_cat.txt": f"{name}_F000 :Anger; ()\n",
        f"dialog/EmoEvaluation/Self-evaluation/{name}.txt": f"[0.0000 - 0.4000]\t{name}_F000\tsad\t[1, 1, 1]\n",
        f"dialog/MOCAP_head/{name}.txt": "1 2 3\n",
        f"sentences/ForcedAlignment/{name}/{name}_F000.wdseg": "x\n",
    }
    if media:
        files |= {f"sentences/wav/{name}/{name}_{utterance}.wav": "" for utterance, *_ in scene}
        files |= {f"dialog/wav/{name}.wav": "", f"dialog/avi/DivX/{name}.avi": ""}
    for path, text in files.items():
        (session / path).parent.mkdir(parents=True, exist_ok=True)
        (session / path).write_text(text, encoding="utf-8")
    return session


@pytest.fixture
def corpus(tmp_path):
    """Five sessions of two dialogues."""
    root = tmp_path / "raw" / "IEMOCAP_full_release"
    for session in range(1, 6):
        write_scene(root, f"Ses0{session}F_impro01")
        write_scene(root, f"Ses0{session}M_script03_1b")
    return root


def read_all(raw, tmp_path, **options):
    report = Report("iemocap")
    dialogues = list(read(Path(raw), report, Options(unpacked=tmp_path / "unpacked", **options)))
    assert report.found == sum(len(d.turns) for d in dialogues) + len(report.left_out)
    return {d.dialogue_id: d for d in dialogues}, report


def one(tmp_path, scene=SCENE, **options):
    """The dialogue of a corpus with one dialogue, and the report."""
    write_scene(tmp_path / "raw", "Ses02M_impro05a", scene)
    dialogues, report = read_all(tmp_path / "raw", tmp_path, **options)
    return dialogues["Ses02M_impro05a"], report


def edit(tmp_path, folder, change):
    """Change the bytes of a file of `one`, and read the corpus again."""
    path = write_scene(tmp_path / "raw", "Ses02M_impro05a") / "dialog" / folder / "Ses02M_impro05a.txt"
    path.write_bytes(change(path.read_bytes()))
    dialogues, report = read_all(tmp_path / "raw", tmp_path)
    return dialogues.get("Ses02M_impro05a"), report


# ------------------------------------------------------------------------------------------------------- transcripts


def test_turns_in_order_of_time_with_their_speakers_words_and_labels(corpus, tmp_path):
    dialogues, report = read_all(corpus, tmp_path)
    assert len(dialogues) == 10
    turns = dialogues["Ses03F_impro01"].turns
    assert [(t.utterance_id, t.speaker, t.text, t.emotion, t.start, t.end) for t in turns] == [
        ("Ses03F_impro01_F000", "Ses03F", "Excuse me.", "neutral", 0.0, 0.4),
        ("Ses03F_impro01_M000", "Ses03M", "What do you mean?", "angry", 0.4, 0.8),
        ("Ses03F_impro01_F001", "Ses03F", "[LAUGHTER]", None, 0.8, 1.2),
        ("Ses03F_impro01_M001", "Ses03M", "Great; isn't it: yes?", "happy", 1.2, 1.8),
    ]
    assert turns[0].where == "Session3/dialog/transcriptions/Ses03F_impro01.txt:2"
    assert {t.speaker for d in dialogues.values() for t in d.turns} == {
        f"Ses0{n}{x}" for n in range(1, 6) for x in "FM"
    }
    assert report.left_out == report.repaired == report.without_media == []


def test_the_labels(tmp_path):
    names = "ang hap exc sad neu fea sur dis fru xxx oth".split()
    scene = [(f"F{i:03}", i, i + 1, label, "Yes.") for i, label in enumerate(names)]
    dialogue, _ = one(tmp_path, scene)
    meant = ["angry", "happy", "happy", "sad", "neutral", "fearful", "surprise", "disgust", None, None, None]
    assert [turn.emotion for turn in dialogue.turns] == meant
    dialogue, _ = one(tmp_path, scene, emotion_map={"fru": "angry", "exc": None})
    meant[8], meant[2] = "angry", None
    assert [turn.emotion for turn in dialogue.turns] == meant
    assert set(iemocap.MAPPING) == set(names)


def test_the_labels_come_from_the_folder_itself_not_from_single_raters(tmp_path):
    dialogue, _ = one(tmp_path)
    assert dialogue.turns[0].emotion == "neutral"  # anger and sad in the subfolders


def test_turns_of_the_same_start_keep_the_order_of_the_transcript(tmp_path):
    scene = [
        ("M000", 1, 2, "neu", "a"),
        ("F000", 1, 3, "neu", "b"),
        ("M001", 0, 2, "neu", "c"),
        ("F001", 1, 2, "neu", "d"),
    ]
    dialogue, _ = one(tmp_path, scene)
    assert [turn.text for turn in dialogue.turns] == ["c", "a", "b", "d"]


def test_lines_that_are_no_utterances_are_ignored_and_named(tmp_path):
    lines = b"F: Hm.\nM: [BREATHING]\n\nSes02M_impro05a_MXX0 [000.1000-000.2000]: Oh.\n???\n"
    dialogue, report = edit(tmp_path, "transcriptions", lambda data: lines + data)
    assert len(dialogue.turns) == report.found == 4
    name = "Session2/dialog/transcriptions/Ses02M_impro05a.txt"
    assert [item["item"] for item in report.ignored if "no numbered utterance" in item["reason"]] == [
        f"{name}:{n}" for n in (1, 2, 4, 5)
    ]
    assert dialogue.turns[0].where == f"{name}:7"


def test_an_utterance_without_a_label_is_kept_and_one_without_words_is_left_out(tmp_path):
    dialogue, report = edit(tmp_path, "transcriptions", lambda data: data.replace(b"_F001 ", b"_F002 "))
    assert [turn.utterance_id[-4:] for turn in dialogue.turns] == ["F000", "M000", "F002", "M001"]
    assert dialogue.turns[2].emotion is None
    assert report.repaired[0]["reason"] == "Ses02M_impro05a_F002 has no label. The turn is kept without it."
    (entry,) = report.left_out
    assert entry["item"].startswith("Session2/dialog/EmoEvaluation/Ses02M_impro05a.txt:")
    assert "Ses02M_impro05a_F001 is not in" in entry["reason"]


def test_a_dialogue_that_has_one_of_the_two_files_only(corpus, tmp_path):
    (corpus / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt").unlink()
    (corpus / "Session2/dialog/transcriptions/Ses02F_impro01.txt").unlink()
    dialogues, report = read_all(corpus, tmp_path)
    assert [turn.emotion for turn in dialogues["Ses01F_impro01"].turns] == [None] * 4
    assert "there is no dialog/EmoEvaluation/Ses01F_impro01.txt" in report.repaired[0]["reason"]
    assert "Ses02F_impro01" not in dialogues
    assert len(report.left_out) == 4 and "so the text of" in report.left_out[0]["reason"]


def test_an_utterance_that_comes_twice_or_in_another_dialogue(tmp_path):
    more = b"Ses02M_impro05a_F000 [000.0000-000.4000]: Again.\nSes02M_impro06_F000 [000.0000-000.4000]: Elsewhere.\n"
    dialogue, report = edit(tmp_path, "transcriptions", lambda data: data + more)
    assert dialogue.turns[0].text == "Excuse me." and len(dialogue.turns) == 4
    assert [entry["reason"] for entry in report.left_out] == [
        "Ses02M_impro05a_F000 is in Session2/dialog/transcriptions/Ses02M_impro05a.txt:2 already.",
        "Ses02M_impro06_F000 is an utterance of another dialogue, Ses02M_impro06.",
    ]


def test_labels_that_are_none(tmp_path):
    def change(data):
        more = b"[0.0 - 0.4]\tSes02M_impro05a_F000\tsad\t[1, 1, 1]\n[0.0 - 0.4]\tSes02M_impro05a_FXX1\tsad\t[1, 1, 1]\n"
        return data.replace(b"\tneu\t", b"\tbored\t").replace(b"\tang\t", b"\t\t") + more

    dialogue, report = edit(tmp_path, "EmoEvaluation", change)
    assert [turn.emotion for turn in dialogue.turns] == [None, None, None, "happy"]
    reasons = " ".join(entry["reason"] for entry in report.repaired)
    assert "'bored'" in reasons and "the label is empty" in reasons
    ignored = " ".join(entry["reason"] for entry in report.ignored)
    assert "the label of Ses02M_impro05a_F000 is in" in ignored and "Ses02M_impro05a_FXX1" in ignored


@pytest.mark.parametrize("times", [b"[000.0000-000.0000]", b"[000.4000-000.1000]", b"[a-b]", b"[]", b""])
def test_times_that_are_none_are_taken_from_the_label(tmp_path, times):
    dialogue, report = edit(tmp_path, "transcriptions", lambda data: data.replace(b"[000.0000-000.4000]", times))
    turn = dialogue.turns[0]
    assert (turn.text, turn.start, turn.end) == ("Excuse me.", 0.0, 0.4)
    assert "EmoEvaluation/Ses02M_impro05a.txt" in report.repaired[0]["reason"]


def test_a_turn_without_any_times_keeps_its_place_and_has_no_cut(tmp_path):
    scene = [SCENE[1], SCENE[0], ("F001", 1.2, 0.8, "fru", "Oh!"), SCENE[3]]
    dialogue, report = one(tmp_path, scene)
    assert [turn.text for turn in dialogue.turns] == ["Excuse me.", "What do you mean?", "Oh!", "Great; isn't it: yes?"]
    turn = dialogue.turns[2]
    assert (turn.start, turn.end, turn.video) == (None, None, ())
    assert [clip.is_whole for clip in turn.audio] == [True]
    assert "are not a start before an end" in report.repaired[0]["reason"]
    assert "no times to cut its video by" in report.without_media[0]["reason"]


def test_times_of_transcript_and_label_that_differ(tmp_path):
    dialogue, report = edit(tmp_path, "transcriptions", lambda data: data.replace(b"[000.0000-", b"[000.0500-"))
    assert dialogue.turns[0].start == 0.05
    assert "it lasts from 0.05 s to 0.4 s, in" in report.repaired[0]["reason"]


def test_text_in_other_encodings_and_with_stray_characters(tmp_path):
    def change(data):
        data = data.replace(b"Excuse me.", b"Excuse\xe2\x80\xa8me, caf\xe9.").replace(b"do you", b"don\xc2\x92t you")
        return b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n").replace(b"Great", "Größe".encode())

    dialogue, report = edit(tmp_path, "transcriptions", change)
    texts = [turn.text for turn in dialogue.turns]
    assert texts[1:] == ["What don’t you mean?", "[LAUGHTER]", "Größe; isn't it: yes?"]
    assert "café." in texts[0] and len(dialogue.turns) == 4
    assert "was read as cp1252" in " ".join(entry["reason"] for entry in report.repaired)


# ------------------------------------------------------------------------------------------------------------- clips


def test_clips_and_the_half_of_the_speaker(corpus, tmp_path):
    dialogues, _ = read_all(corpus, tmp_path)
    for name in ("Ses01F_impro01", "Ses05M_script03_1b"):
        for turn in dialogues[name].turns:
            session = f"Session{name[4]}"
            whole, cut = turn.audio
            assert whole.name == f"{session}/sentences/wav/{name}/{turn.utterance_id}.wav" and whole.is_whole
            assert whole.path == corpus / whole.name
            assert (cut.name, cut.start, cut.end) == (f"{session}/dialog/wav/{name}.wav", turn.start, turn.end)
            (video,) = turn.video
            assert video.name == f"{session}/dialog/avi/DivX/{name}.avi"
            assert (video.start, video.end) == (turn.start, turn.end)
            assert video.crop == ("left" if turn.speaker[-1] == name[5] else "right")
    dialogues, _ = read_all(corpus, tmp_path, crop=False)
    assert {clip.crop for d in dialogues.values() for t in d.turns for clip in t.video} == {None}


def test_missing_clips_are_named(corpus, tmp_path):
    (corpus / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M001.wav").unlink()
    (corpus / "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_M001.wav").unlink()
    (corpus / "Session2/dialog/wav/Ses02F_impro01.wav").unlink()
    (corpus / "Session3/dialog/avi/DivX/Ses03F_impro01.avi").unlink()
    dialogues, report = read_all(corpus, tmp_path)
    assert [clip.name for clip in dialogues["Ses01F_impro01"].turns[3].audio] == [
        "Session1/dialog/wav/Ses01F_impro01.wav"
    ]
    (entry,) = report.repaired
    assert entry["item"] == "Session1/dialog/transcriptions/Ses01F_impro01.txt"
    assert (
        "lacks the audio of Ses01F_impro01_M001. It is cut from Session1/dialog/wav/Ses01F_impro01.wav."
        in entry["reason"]
    )
    assert dialogues["Ses02F_impro01"].turns[3].audio == ()
    assert [turn.video for turn in dialogues["Ses03F_impro01"].turns] == [()] * 4
    sound, picture = report.without_media
    assert sound["item"] == "Session2/dialog/transcriptions/Ses02F_impro01.txt:4"
    assert "no sentences/wav/Ses02F_impro01/Ses02F_impro01_M001.wav, and no dialog/wav" in sound["reason"]
    assert picture["item"] == "Session3/dialog/transcriptions/Ses03F_impro01.txt" and "Its 4 turns" in picture["reason"]


def test_clips_of_no_utterance_and_files_of_other_kinds_are_named(corpus, tmp_path):
    (corpus / "Session1/dialog/avi/DivX/Ses01F_impro09.avi").touch()
    (corpus / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F099.wav").touch()
    (corpus / "Session1/dialog/transcriptions/Ses01F_impro01 (copy).txt").touch()
    _, report = read_all(corpus, tmp_path)
    ignored = {entry["item"]: entry["reason"] for entry in report.ignored}
    assert "Session1/dialog/avi/DivX/Ses01F_impro09.avi" in ignored
    assert "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F099.wav" in ignored
    assert "not named as" in ignored["Session1/dialog/transcriptions/Ses01F_impro01 (copy).txt"]
    assert "dialog/EmoEvaluation/Categorical/ (10 files)" in ignored and "dialog/MOCAP_head/ (10 files)" in ignored
    assert "sentences/ForcedAlignment/ (10 files)" in ignored


# ------------------------------------------------------------------------------------------------------------- layout


def test_the_folder_its_parent_or_a_nested_copy(corpus, tmp_path):
    expected, _ = read_all(corpus, tmp_path)
    for raw in (corpus.parent, tmp_path):
        found, _ = read_all(raw, tmp_path)
        texts = {name: [turn.text for turn in dialogue.turns] for name, dialogue in found.items()}
        assert texts == {name: [turn.text for turn in dialogue.turns] for name, dialogue in expected.items()}
    for inner in ("IEMOCAP_full_release", "backup"):  # before and after Session1 in the alphabet
        write_scene(corpus / inner, "Ses01F_impro01", [("F000", 0, 1, "neu", "A copy.")])
    found, report = read_all(corpus, tmp_path)
    assert found["Ses01F_impro01"].turns[0].text == "Excuse me."
    assert len(found["Ses01F_impro01"].turns) == 4 and len(found["Ses01F_impro01"].turns[0].video) == 3
    assert found["Ses01F_impro01"].turns[0].video[0].path == corpus / "Session1/dialog/avi/DivX/Ses01F_impro01.avi"
    assert any("more than once" in entry["reason"] for entry in report.ignored)


def test_folder_names_in_another_case_and_what_macos_leaves(corpus, tmp_path):
    session = corpus / "Session1"
    (session / "dialog/EmoEvaluation").rename(session / "dialog/emoevaluation")
    (session / "dialog/avi/DivX").rename(session / "dialog/avi/divx")
    (session / "dialog").rename(session / "Dialog")
    session.rename(corpus / "session1")
    for name in ("transcriptions/._Ses01F_impro01.txt", "EmoEvaluation/._Ses02F_impro01.txt"):
        (corpus / "Session2/dialog" / name).write_bytes(b"\0\5\x16\7")
    (corpus / "__MACOSX/Session9/dialog/transcriptions").mkdir(parents=True)
    (corpus / "__MACOSX/Session9/dialog/transcriptions/Ses01F_impro01.txt").write_bytes(b"\0")
    dialogues, report = read_all(corpus, tmp_path)
    assert len(dialogues) == 10 and all(len(d.turns) == 4 for d in dialogues.values())
    assert all(turn.video for turn in dialogues["Ses01F_impro01"].turns)
    assert [e["item"] for e in report.ignored if "macOS" in e["reason"]] == ["._* and the like (3 files)"]


def test_the_archive(corpus, tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    archive = folder / "IEMOCAP_full_release_withoutVideos.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(corpus, "IEMOCAP_full_release")
    expected, _ = read_all(corpus, tmp_path)
    for raw in (folder, archive):
        found, report = read_all(raw, tmp_path)
        assert found.keys() == expected.keys()
        path = found["Ses01F_impro01"].turns[0].video[0].path
        assert path.is_file() and path.is_relative_to(tmp_path / "unpacked")
    write_scene(folder, "Ses01F_impro01")
    found, report = read_all(folder, tmp_path)
    assert list(found) == ["Ses01F_impro01"]
    assert any(e["item"] == archive.name and "not unpacked" in e["reason"] for e in report.ignored)


def test_a_missing_session_is_reported(corpus, tmp_path):
    for path in sorted((corpus / "Session4").rglob("*.txt")):
        path.unlink()
    dialogues, report = read_all(corpus, tmp_path)
    assert len(dialogues) == 8
    assert [e["item"] for e in report.ignored if "this session" in e["reason"]] == ["Session4"]


def test_layouts_that_are_none(corpus, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.txt").touch()
    with pytest.raises(LayoutError, match=r"dialog/transcriptions/.*only readme\.txt\. Give the folder"):
        read_all(tmp_path / "other", tmp_path)
    for path in corpus.glob("Session*/dialog/EmoEvaluation/*.txt"):
        path.unlink()
    with pytest.raises(LayoutError, match=r"dialog/EmoEvaluation/"):
        read_all(corpus, tmp_path)


@pytest.mark.parametrize("folder", ["transcriptions", "EmoEvaluation"])
def test_a_pointer_in_place_of_a_file(tmp_path, folder):
    with pytest.raises(LayoutError, match="Git-LFS pointer"):
        edit(tmp_path, folder, lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_the_split_is_nine_to_one_by_dialogue_and_seeded(tmp_path):
    root = tmp_path / "raw"
    for session in range(1, 6):
        for number in range(1, 7):
            write_scene(root, f"Ses0{session}F_impro{number:02}", media=False)

    def split_of(seed):
        report = Report("iemocap")
        found = list(read(root, report, Options(unpacked=tmp_path / "unpacked", split_seed=seed)))
        assert [d.split for d in found] == ["train"] * 27 + ["test"] * 3
        assert [d.dialogue_id for d in found[:27]] == sorted(d.dialogue_id for d in found[:27])
        return {d.dialogue_id for d in found if d.split == "test"}

    assert split_of(0) == split_of(0) != split_of(1)


def test_what_the_card_says():
    published = ABOUT.published["all"]
    emotions = {name: count for name, count in published.items() if name not in ("rows", "dialogues")}
    assert sum(emotions.values()) == published["rows"] == 10039 and published["dialogues"] == 151
    assert ABOUT.license == "other" and not ABOUT.redistributable


# ------------------------------------------------------------------------------------------------------- end to end


def test_prepared_clips_are_the_right_half_at_the_right_time(tmp_path, write_media):
    raw, name = tmp_path / "IEMOCAP_full_release", "Ses01M_impro01"
    session = write_scene(raw, name)
    write_scene(raw, "Ses01F_impro02", SCENE[:1], media=False)
    frames = np.empty((45, 48, 64, 3), np.uint8)  # 25 frames/s; the gray encodes the frame and the half
    frames[:, :, :32] = (4 * np.arange(45) + 20)[:, None, None, None]
    frames[:, :, 32:] = (240 - 4 * np.arange(45))[:, None, None, None]
    write_media(session / f"dialog/avi/DivX/{name}.avi", frames=frames, fps=25, video_codec="mpeg4")
    ramp = np.arange(28800, dtype="<i2")
    for path, samples in (
        (session / f"dialog/wav/{name}.wav", ramp),
        *((session / f"sentences/wav/{name}/{name}_{u}.wav", ramp[::-1][:100]) for u in ("F000", "M000", "M001")),
    ):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(samples.tobytes())
    (session / f"sentences/wav/{name}/{name}_F001.wav").write_bytes(b"")  # its audio is cut from the dialogue

    content = prepare_corpus("iemocap", raw, tmp_path / "out", progress=False)
    assert content["found"] == content["rows"] == 5
    rows = {row["utterance_id"]: row for part in load_dataset(str(tmp_path / "out")).values() for row in part}
    assert len(rows) == 5
    turns = sorted((row for row in rows.values() if row["dialogue_id"] == name), key=lambda row: row["turn"])
    assert [(row["turn"], row["speaker"], row["emotion"]) for row in turns] == [
        (0, "Ses01F", "neutral"),
        (1, "Ses01M", "angry"),
        (2, "Ses01F", None),
        (3, "Ses01M", "happy"),
    ]
    for row in turns:
        with av.open(row["video"]["path"]) as container:
            seen = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        numbers = range(round(row["start"] * 25), round(row["end"] * 25))
        values = [4 * n + 20 if row["speaker"] == "Ses01M" else 240 - 4 * n for n in numbers]  # M wears the markers
        assert [image.shape for image in seen] == [(48, 32)] * len(numbers)
        assert [int(image[24, 16]) for image in seen] == pytest.approx(values, abs=2)
    with wave.open(turns[2]["audio"]["path"]) as file:
        np.testing.assert_array_equal(np.frombuffer(file.readframes(99999), "<i2"), ramp[12800:19200])
    assert turns[0]["audio"]["path"] == str(session / f"sentences/wav/{name}/{name}_F000.wav")
    differences = {entry["count"] for entry in content["published"]["differences"]}
    assert "rows" in differences
