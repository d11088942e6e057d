"""The RAVDESS adapter on replicas of the downloaded corpus."""

import zipfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from empathic.data_prep.corpora import ravdess
from empathic.data_prep.corpora.base import LayoutError, Options, Report
from empathic.data_prep.prepare import prepare_corpus
from empathic.media_empathic import MediaError, read_audio, read_video

# modality-channel-emotion-intensity-statement-repetition-actor
NESTED = "Audio_Speech_Actors_01-24/audio_speech_actors_01-24/Actor_05/03-01-03-01-01-01-05.wav"


def touch(raw, *names):
    """Create empty files: the adapter reads names, never clips."""
    for name in names:
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def zip_up(path, members):
    """A zip of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def read(tmp_path):
    """A function (options) -> (dialogues, report) of the adapter on tmp_path / "raw", with its counts checked."""

    def run(**options):
        report = Report("ravdess")
        dialogues = list(ravdess.read(tmp_path / "raw", report, Options(tmp_path / "unpacked", **options)))
        assert report.found == len(dialogues) + len(report.left_out)
        return dialogues, report

    return run


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def turns_of(dialogues):
    assert all(len(dialogue.turns) == 1 for dialogue in dialogues)
    return {dialogue.dialogue_id: dialogue.turns[0] for dialogue in dialogues}


def names(clips):
    return [clip.name for clip in clips]


def test_files_that_differ_in_the_modality_only_are_one_row_with_its_best_clips_first(raw, read):
    touch(
        raw,
        "Actor_05/01-01-03-02-02-01-05.mp4",
        "Actor_05/02-01-03-02-02-01-05.mp4",
        "Actor_05/03-01-03-02-02-01-05.wav",
    )
    dialogues, report = read()
    turn = turns_of(dialogues)["01-03-02-02-01-05"]
    assert report.found == 1
    assert names(turn.video) == ["Actor_05/01-01-03-02-02-01-05.mp4", "Actor_05/02-01-03-02-02-01-05.mp4"]
    assert names(turn.audio) == ["Actor_05/03-01-03-02-02-01-05.wav", "Actor_05/01-01-03-02-02-01-05.mp4"]
    assert [clip.path for clip in turn.video] == [raw / name for name in names(turn.video)]
    assert turn.utterance_id == "01-03-02-02-01-05"
    assert turn.speaker == "Actor_05"
    assert turn.text == "Dogs are sitting by the door"
    assert turn.emotion == "happy"
    assert turn.needs_media
    assert all(clip.is_whole for clip in turn.video + turn.audio)


def test_a_silent_film_is_never_the_sound(raw, read):
    touch(raw, "Actor_05/02-01-03-02-02-01-05.mp4", "Actor_05/01-01-04-01-01-01-05.mp4")
    dialogues, report = read()
    turn = turns_of(dialogues)["01-03-02-02-01-05"]
    assert turn.audio == () and len(turn.video) == 1
    assert [item["item"] for item in report.without_media] == ["Actor_05/02-01-03-02-02-01-05.mp4"]
    assert "no audio" in report.without_media[0]["reason"]


def test_emotions_and_statements_follow_the_codes(raw, read):
    touch(raw, *(f"Actor_01/03-01-{emotion:02d}-01-01-01-01.wav" for emotion in (1, 3, 4, 5, 6, 7, 8)))
    dialogues, _ = read()
    assert [dialogue.turns[0].emotion for dialogue in dialogues] == [
        "neutral",
        "happy",
        "sad",
        "angry",
        "fearful",
        "disgust",
        "surprise",
    ]
    assert {dialogue.turns[0].text for dialogue in dialogues} == {"Kids are talking by the door"}


def test_calm_is_left_out_unless_it_is_kept_or_mapped(raw, read):
    touch(raw, "Actor_01/03-01-02-01-01-01-01.wav", "Actor_01/03-01-08-01-01-01-01.wav")
    dialogues, report = read()
    assert list(turns_of(dialogues)) == ["01-08-01-01-01-01"]
    assert report.left_out[0]["item"] == "Actor_01/03-01-02-01-01-01-01.wav"
    assert "calm" in report.left_out[0]["reason"] and "--keep_calm" in report.left_out[0]["reason"]
    assert turns_of(read(keep_calm=True)[0])["01-02-01-01-01-01"].emotion == "neutral"
    assert turns_of(read(emotion_map={"calm": "sad"})[0])["01-02-01-01-01-01"].emotion == "sad"
    assert turns_of(read(emotion_map={"calm": None})[0])["01-02-01-01-01-01"].emotion is None
    # The user's map overrides the adapter's map and the option.
    assert turns_of(read(keep_calm=True, emotion_map={"calm": "sad"})[0])["01-02-01-01-01-01"].emotion == "sad"
    assert turns_of(read(keep_calm=True, emotion_map={"surprised": "happy"})[0])["01-08-01-01-01-01"].emotion == "happy"


def test_songs_are_left_out_once_a_performance(raw, read):
    touch(
        raw,
        "Actor_01/01-02-03-01-01-01-01.mp4",
        "Actor_01/02-02-03-01-01-01-01.mp4",
        "Actor_01/03-02-03-01-01-01-01.wav",
        "Actor_01/03-01-03-01-01-01-01.wav",
    )
    dialogues, report = read()
    assert report.found == 2 and len(dialogues) == 1
    assert len(report.left_out) == 1
    assert "song" in report.left_out[0]["reason"]
    assert report.left_out[0]["item"] == "Actor_01/01-02-03-01-01-01-01.mp4"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("03-03-03-01-01-01-01.wav", "channel 03"),
        ("03-01-09-01-01-01-01.wav", "emotion 09"),
        ("03-01-03-03-01-01-01.wav", "intensity 03"),
        ("03-01-03-01-03-01-01.wav", "statement 03"),
        ("03-01-03-01-01-00-01.wav", "repetition 00"),
        ("03-01-03-01-01-01-25.wav", "actor 25"),
    ],
)
def test_codes_that_the_corpus_does_not_have_are_left_out_with_the_code(raw, read, name, word):
    touch(raw, name, "Actor_01/03-01-03-01-01-01-01.wav")
    dialogues, report = read()
    assert len(dialogues) == 1
    assert [item["item"] for item in report.left_out] == [name]
    assert word in report.left_out[0]["reason"]


def test_other_files_are_named_as_ignored(raw, read):
    touch(
        raw,
        "Actor_01/03-01-03-01-01-01-01.wav",
        "Actor_01/04-01-03-01-01-01-01.wav",
        "Actor_01/03-01-03-01-01-01.wav",
        "Actor_01/03-01-03-01-01-01-01 (1).wav",
        "README.md",
        "Actor_01/._03-01-04-01-01-01-01.wav",
        "__MACOSX/Actor_01/03-01-05-01-01-01-01.wav",
        ".cache/03-01-06-01-01-01-01.wav",
    )
    dialogues, report = read()
    assert list(turns_of(dialogues)) == ["01-03-01-01-01-01"]
    assert report.found == 1
    reasons = {item["item"]: item["reason"] for item in report.ignored}
    assert reasons.keys() == {
        "Actor_01/04-01-03-01-01-01-01.wav",
        "Actor_01/03-01-03-01-01-01.wav",
        "Actor_01/03-01-03-01-01-01-01 (1).wav",
        "README.md",
        "Actor_01/._03-01-04-01-01-01-01.wav",
        "__MACOSX",
        ".cache",
    }
    assert "macOS" in reasons["Actor_01/._03-01-04-01-01-01-01.wav"]
    assert "modality 04" in reasons["Actor_01/04-01-03-01-01-01-01.wav"]
    assert "seven codes" in reasons["Actor_01/03-01-03-01-01-01.wav"]
    assert "seven codes" in reasons["Actor_01/03-01-03-01-01-01-01 (1).wav"]


def test_the_name_wins_over_the_folder(raw, read):
    touch(raw, "Actor_07/03-01-03-01-01-01-05.wav", "actor_05/03-01-04-01-01-01-05.wav")
    dialogues, report = read()
    assert {turn.speaker for turn in turns_of(dialogues).values()} == {"Actor_05"}
    assert [item["item"] for item in report.repaired] == ["Actor_07/03-01-03-01-01-01-05.wav"]
    assert "Actor_07" in report.repaired[0]["reason"] and "Actor_05" in report.repaired[0]["reason"]


def test_nested_copies_are_one_row(raw, read):
    outer = "Audio_Speech_Actors_01-24/Actor_05/03-01-03-01-01-01-05.wav"
    touch(raw, NESTED, outer, "Actor_05/03-01-03-01-01-01-05.wav")
    dialogues, report = read()
    turn = turns_of(dialogues)["01-03-01-01-01-05"]
    assert report.found == 1
    assert names(turn.audio) == ["Actor_05/03-01-03-01-01-01-05.wav", outer, NESTED]
    copies = [item for item in report.ignored if "copies" in item["reason"]]
    assert [item["item"] for item in copies] == [outer] and "2 such files" in copies[0]["reason"]


def test_upper_case_endings_and_links_are_followed(raw, read, tmp_path):
    touch(tmp_path, "elsewhere/Actor_05/03-01-03-01-01-01-05.WAV")
    (raw / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    dialogues, _ = read()
    assert names(turns_of(dialogues)["01-03-01-01-01-05"].audio) == ["linked/Actor_05/03-01-03-01-01-01-05.WAV"]


def test_zips_are_unpacked_and_named_in_the_report(raw, read, tmp_path):
    zip_up(
        raw / "Video_Speech_Actor_05.zip",
        {"Actor_05/01-01-03-01-01-01-05.mp4": b"", "Actor_05/02-01-03-01-01-01-05.mp4": b""},
    )
    zip_up(
        raw / "sound" / "Audio_Speech_Actors_01-24.zip",
        {"Actor_05/03-01-03-01-01-01-05.wav": b"", "__MACOSX/Actor_05/._03-01-03-01-01-01-05.wav": b""},
    )
    dialogues, report = read()
    turn = turns_of(dialogues)["01-03-01-01-01-05"]
    assert names(turn.audio) == [
        "sound/Audio_Speech_Actors_01-24.zip/Actor_05/03-01-03-01-01-01-05.wav",
        "Video_Speech_Actor_05.zip/Actor_05/01-01-03-01-01-01-05.mp4",
    ]
    assert [name.rpartition("/")[2] for name in names(turn.video)] == [
        "01-01-03-01-01-01-05.mp4",
        "02-01-03-01-01-01-05.mp4",
    ]
    for clip in turn.audio + turn.video:
        assert clip.path.is_file() and clip.path.is_relative_to(tmp_path / "unpacked")
    assert report.found == 1
    again, _ = read()
    assert turns_of(again) == turns_of(dialogues)


def test_zips_and_folders_make_one_corpus(raw, read):
    touch(raw, NESTED)
    zip_up(raw / "Video_Speech_Actor_05.zip", {"Actor_05/01-01-03-01-01-01-05.mp4": b""})
    dialogues, report = read()
    turn = turns_of(dialogues)["01-03-01-01-01-05"]
    assert names(turn.audio) == [NESTED, "Video_Speech_Actor_05.zip/Actor_05/01-01-03-01-01-01-05.mp4"]
    assert report.found == 1


def test_zips_of_one_name_in_two_folders_do_not_mix(raw, read):
    for actor in ("05", "06"):
        name = f"Actor_{actor}/03-01-03-01-01-01-{actor}.wav"
        zip_up(raw / f"part_{actor}" / "sound.zip", {name: actor.encode()})
    dialogues, _ = read()
    assert {turn.speaker: turn.audio[0].path.read_text() for turn in turns_of(dialogues).values()} == {
        "Actor_05": "05",
        "Actor_06": "06",
    }


def test_zips_that_are_of_no_use_are_not_unpacked(raw, read, tmp_path):
    touch(raw, "Actor_05/03-01-03-01-01-01-05.wav")
    zip_up(raw / "Audio_Speech_Actors_01-24.zip", {"Actor_05/03-01-03-01-01-01-05.wav": b""})
    zip_up(raw / "Video_Song_Actor_05.zip", {"Actor_05/01-02-03-01-01-01-05.mp4": b""})
    zip_up(raw / "papers.zip", {"paper.pdf": b""})
    (raw / "Video_Speech_Actor_01.zip").write_bytes(b"PK\x03\x04 cut short")
    dialogues, report = read()
    assert len(dialogues) == report.found == 1
    reasons = {item["item"]: item["reason"] for item in report.ignored}
    assert "there already" in reasons["Audio_Speech_Actors_01-24.zip"]
    assert "songs only" in reasons["Video_Song_Actor_05.zip"]
    assert "no clip" in reasons["papers.zip"]
    assert "Download it again" in reasons["Video_Speech_Actor_01.zip"]
    assert not (tmp_path / "unpacked").exists()


def test_what_was_unpacked_below_raw_is_read_once(raw):
    zip_up(raw / "Audio_Speech_Actors_01-24.zip", {"Actor_05/03-01-03-01-01-01-05.wav": b""})
    first, second = (list(ravdess.read(raw, Report("ravdess"), Options(raw / "out" / "unpacked"))) for _ in range(2))
    assert len(second[0].turns[0].audio) == 1
    assert first == second


def test_no_actor_crosses_the_splits_whatever_was_downloaded(raw, read):
    touch(
        raw, *(f"Actor_{actor:02d}/03-01-03-01-01-0{take}-{actor:02d}.wav" for actor in range(1, 25) for take in (1, 2))
    )
    dialogues, _ = read(split_seed=3)
    splits = {}
    for dialogue in dialogues:
        splits.setdefault(dialogue.turns[0].speaker, set()).add(dialogue.split)
    assert all(len(of_actor) == 1 for of_actor in splits.values())
    order = [dialogue.split for dialogue in dialogues]
    assert [order.count(split) for split in ("train", "validation", "test")] == [38, 6, 4]
    assert order == sorted(order, key=["train", "validation", "test"].index)
    whole = {dialogue.dialogue_id: dialogue.split for dialogue in dialogues}
    assert whole != {dialogue.dialogue_id: dialogue.split for dialogue in read(split_seed=4)[0]}
    for actor in range(1, 20):
        for path in (raw / f"Actor_{actor:02d}").iterdir():
            path.unlink()
    part = {dialogue.dialogue_id: dialogue.split for dialogue in read(split_seed=3)[0]}
    assert len(part) == 10 and part.items() <= whole.items()


def test_the_whole_corpus_has_the_published_counts(raw, read, monkeypatch):
    """60 performances per actor: four neutral performances, never strong, and eight of each other emotion."""
    takes = ("01-01-01", "01-01-02", "01-02-01", "01-02-02", "02-01-01", "02-01-02", "02-02-01", "02-02-02")
    stems = [f"03-01-{emotion:02d}-{take}" for emotion in range(1, 9) for take in takes[: 4 if emotion == 1 else 8]]
    names = [f"Actor_{actor:02d}/{stem}-{actor:02d}.wav" for actor in range(1, 25) for stem in stems]
    monkeypatch.setattr(ravdess, "list_files", lambda *args, **kwargs: [(raw / name, name) for name in names])
    dialogues, report = read()
    counts = Counter(dialogue.turns[0].emotion for dialogue in dialogues)
    assert {"rows": len(dialogues), **counts} == ravdess.ABOUT.published["all"]
    assert report.found == 1440


def test_a_corpus_without_pictures_says_so_in_one_line(raw, read):
    touch(raw, "Actor_01/03-01-03-01-01-01-01.wav", "Actor_01/03-01-04-01-01-01-01.wav")
    _, report = read()
    assert [item["item"] for item in report.without_media] == ["all rows"]
    assert "Video_Speech_Actor" in report.without_media[0]["reason"]


@pytest.mark.parametrize("content", [(), ("photos/cat.jpg",)])
def test_another_folder_is_refused_with_what_was_expected_and_seen(raw, read, content):
    touch(raw, *content)
    with pytest.raises(LayoutError) as error:
        read()
    assert str(raw) in str(error.value) and "Video_Speech_Actor_01.zip" in str(error.value)
    for name in content or ("no files",):
        assert name in str(error.value)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    report = Report("ravdess")
    assert ravdess.list_files(tmp_path / "gone", report) == []
    assert [line["item"] for line in report.ignored] == [str(tmp_path / "gone")]


def test_the_published_counts_add_up():
    counts = dict(ravdess.ABOUT.published["all"])
    assert counts.pop("rows") == sum(counts.values()) == 24 * 52
    assert counts["neutral"] == 96 and set(counts.values()) == {96, 192}
    assert ravdess.ABOUT.license == "cc-by-nc-sa-4.0" and ravdess.ABOUT.redistributable


# ----------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_media, grey_frames, tone):
    """Zips and a nested folder with real clips of two actors, in the layout of the download."""
    folder = tmp_path_factory.mktemp("ravdess")
    sources = {
        "01": write_media(folder / "both.mp4", frames=grey_frames(5), samples=tone(0.5, 48000), sampling_rate=48000),
        "02": write_media(folder / "silent.mp4", frames=grey_frames(3)),
        "03": write_media(
            folder / "stereo.wav",
            samples=tone(0.3, 48000, channels=2),
            sampling_rate=48000,
            layout="stereo",
            audio_codec="pcm_s16le",
        ),
    }
    clips = {modality: Path(path).read_bytes() for modality, path in sources.items()}
    raw = folder / "raw"
    whole, no_sound, broken, calm, unusable = (f"01-0{emotion}-01-01-01-05" for emotion in (3, 4, 5, 2, 7))
    film = {f"Actor_05/{modality}-{name}.mp4": clips[modality] for modality in ("01", "02") for name in (whole, calm)}
    film[f"Actor_05/02-{no_sound}.mp4"] = clips["02"]
    film[f"Actor_05/01-{broken}.mp4"] = clips["01"][:2000]
    film[f"Actor_05/02-{broken}.mp4"] = clips["02"]
    film[f"Actor_05/01-{unusable}.mp4"] = b""
    zip_up(raw / "Video_Speech_Actor_05.zip", film)
    sound = {f"Actor_05/03-{name}.wav": clips["03"] for name in (whole, broken)}
    sound["Actor_06/03-01-08-02-02-02-06.wav"] = clips["03"]
    zip_up(raw / "Audio_Speech_Actors_01-24.zip", sound)
    nested = raw / "Audio_Speech_Actors_01-24" / "audio_speech_actors_01-24" / "Actor_05"
    nested.mkdir(parents=True)
    (nested / f"03-{whole}.wav").write_bytes(clips["03"])
    (nested / f"._03-{whole}.wav").write_bytes(b"\0\5\26\7")
    return raw


@pytest.mark.parametrize("embed", [False, True])
def test_prepare_writes_what_load_dataset_reads(corpus, tmp_path, embed):
    out = tmp_path / "out"
    report = prepare_corpus("ravdess", corpus, out, embed=embed, progress=False)
    splits = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    rows = {row["utterance_id"]: row for split in splits.values() for row in split}
    assert rows.keys() == {"01-03-01-01-01-05", "01-04-01-01-01-05", "01-05-01-01-01-05", "01-08-02-02-02-06"}
    assert report["found"] == 6 and report["rows"] == 4
    assert report["found"] == report["rows"] + len(report["left_out"])
    assert report["published"]["splits"]["all"]["rows"] == {"published": 1248, "here": 4}
    left_out = {item["item"].rpartition("/")[2]: item["reason"] for item in report["left_out"]}
    assert left_out.keys() == {"01-01-02-01-01-01-05.mp4", "01-01-07-01-01-01-05.mp4"}
    assert "calm" in left_out["01-01-02-01-01-01-05.mp4"]
    assert all(row["turn"] == 0 and row["dialogue_id"] == row["utterance_id"] for row in rows.values())
    assert {row["speaker"] for row in rows.values()} == {"Actor_05", "Actor_06"}
    assert all(row["corpus"] == "ravdess" for row in rows.values())

    def source(row, kind):
        return row[kind]["bytes"] if embed else row[kind]["path"]

    whole, broken = rows["01-03-01-01-01-05"], rows["01-05-01-01-01-05"]
    assert len(read_audio(source(whole, "audio"))) == pytest.approx(0.3 * 16000, abs=800)  # the wav file
    assert len(read_video(source(whole, "video"), 99)) == 5  # the video with audio
    assert len(read_video(source(broken, "video"), 99)) == 3  # the video with audio is truncated
    assert rows["01-04-01-01-01-05"]["audio"] is None and rows["01-04-01-01-01-05"]["video"] is not None
    assert rows["01-08-02-02-02-06"]["video"] is None
    with pytest.raises(MediaError):
        read_audio(source(broken, "video"))


def test_prepare_keeps_calm_on_demand(corpus, tmp_path):
    report = prepare_corpus("ravdess", corpus, tmp_path / "out", keep_calm=True, progress=False)
    assert report["rows"] == 5
    splits = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    emotions = {row["utterance_id"]: row["emotion"] for split in splits.values() for row in split}
    assert emotions["01-02-01-01-01-05"] == "neutral"
