"""The CREMA-D adapter on replicas of the repository."""

from pathlib import Path

import pytest
from datasets import load_dataset

from empathic.data_prep.corpora import crema_d
from empathic.data_prep.corpora.base import LayoutError, Options, Report
from empathic.data_prep.prepare import prepare_corpus
from empathic.media_empathic import read_audio, read_video

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:c6f94b2592487c7556bd86df7df6e8f4\nsize 72862\n"
HEADER = '"","FileName","VoiceVote","VoiceLevel","FaceVote","FaceLevel","MultiModalVote","MultiModalLevel"\n'
BAD = ("1076_MTI_NEU_XX", "1076_MTI_SAD_XX", "1064_TIE_SAD_XX", "1064_IEO_DIS_MD")


def put(raw, *names, text=""):
    """Write files with the content `text`: the adapter reads names, never clips."""
    for name in names:
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def read(raw, tmp_path):
    """A function (options) -> (turns by name, report) of the adapter, with its counts checked."""

    def run(**options):
        report = Report("crema-d")
        dialogues = list(crema_d.read(raw, report, Options(tmp_path / "unpacked", **options)))
        assert report.found == len(dialogues) + len(report.left_out)
        assert all(len(dialogue.turns) == 1 for dialogue in dialogues)
        return {dialogue.dialogue_id: dialogue.turns[0] for dialogue in dialogues}, report

    return run


def names(clips):
    return [clip.name for clip in clips]


def test_files_of_one_name_are_one_row_with_the_wav_as_sound(raw, read):
    put(raw, "AudioMP3/1001_DFA_ANG_XX.mp3", "AudioWAV/1001_DFA_ANG_XX.wav", "VideoFlash/1001_DFA_ANG_XX.flv")
    turns, report = read()
    turn = turns["1001_DFA_ANG_XX"]
    assert report.found == 1
    assert names(turn.video) == ["VideoFlash/1001_DFA_ANG_XX.flv"]
    assert names(turn.audio) == [
        "AudioWAV/1001_DFA_ANG_XX.wav",
        "AudioMP3/1001_DFA_ANG_XX.mp3",
        "VideoFlash/1001_DFA_ANG_XX.flv",
    ]
    assert [clip.path for clip in turn.audio] == [raw / name for name in names(turn.audio)]
    assert turn.utterance_id == "1001_DFA_ANG_XX"
    assert turn.speaker == "1001"
    assert turn.text == "Don't forget a jacket"
    assert turn.emotion == "angry"
    assert turn.needs_media and all(clip.is_whole for clip in turn.audio + turn.video)


@pytest.mark.parametrize(
    ("name", "video", "audio"),
    [("AudioWAV/{}.wav", 0, 1), ("AudioMP3/{}.mp3", 0, 1), ("VideoFlash/{}.flv", 1, 1)],
)
@pytest.mark.parametrize("above", ["", "CREMA-D/", "CREMA-D-master/CREMA-D/"])
def test_any_of_the_folders_will_do_at_any_depth(raw, read, above, name, video, audio):
    put(raw, *(above + name.format(stem) for stem in ("1001_DFA_ANG_XX", "1001_DFA_NEU_XX")))
    turns, report = read()
    assert len(turns) == 2
    assert all((len(turn.video), len(turn.audio)) == (video, audio) for turn in turns.values())
    assert [item["item"] for item in report.without_media] == ([] if video else ["all rows"])


def test_copies_in_another_folder_are_one_row(raw, read):
    put(raw, "AudioWAV/1001_DFA_ANG_XX.wav", "CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav")
    turns, report = read()
    assert names(turns["1001_DFA_ANG_XX"].audio) == [
        "AudioWAV/1001_DFA_ANG_XX.wav",
        "CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav",
    ]
    assert report.found == 1
    assert [item["item"] for item in report.ignored] == ["CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav"]


def test_emotions_follow_the_name_and_sentences_the_code(raw, read):
    emotions = {
        "ANG": "angry",
        "DIS": "disgust",
        "FEA": "fearful",
        "HAP": "happy",
        "NEU": "neutral",
        "SAD": "sad",
    }
    for place, sentence in enumerate(
        ("IEO", "TIE", "IOM", "IWW", "TAI", "MTI", "IWL", "ITH", "DFA", "ITS", "TSI", "WSI")
    ):
        put(raw, f"AudioWAV/1001_{sentence}_{list(emotions)[place % 6]}_{('LO', 'MD', 'HI', 'XX')[place % 4]}.wav")
    turns, _ = read()
    assert len({turn.text for turn in turns.values()}) == 12
    assert all(turn.emotion == emotions[name.split("_")[2]] for name, turn in turns.items())
    initials = {name.split("_")[1]: [word[0] for word in turn.text.split()[:3]] for name, turn in turns.items()}
    for sentence, letters in initials.items():  # the codes are initials, roughly
        assert sentence[0] == letters[0].upper()
    assert turns["1001_TSI_NEU_HI"].text == "The surface is slick"
    assert read(emotion_map={"ang": "happy", "dis": None})[0]["1001_IEO_ANG_LO"].emotion == "happy"


def test_the_known_bad_recordings_are_left_out_by_name(raw, read, write_media, tone):
    sound = tone(0.2, 16000)
    for name in BAD:
        path = raw / "AudioWAV" / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        write_media(path, samples=sound, sampling_rate=16000, audio_codec="pcm_s16le")
    put(raw, "VideoFlash/1076_MTI_NEU_XX.flv", "AudioWAV/1076_MTI_HAP_XX.wav", "AudioWAV/1064_IEO_DIS_LO.wav")
    turns, report = read()
    assert turns.keys() == {"1076_MTI_HAP_XX", "1064_IEO_DIS_LO"}
    assert report.found == 6
    left_out = {Path(item["item"]).stem: item["reason"] for item in report.left_out}
    assert left_out.keys() == set(BAD)
    assert all("known bad" in reason for reason in left_out.values())


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("1092_DFA_ANG_XX", "actor 1092"),
        ("1001_DFX_ANG_XX", "sentence DFX"),
        ("1001_DFA_SUR_XX", "emotion SUR"),
        ("1001_DFA_ANG_ZZ", "level ZZ"),
    ],
)
def test_codes_that_the_corpus_does_not_have_are_left_out_with_the_code(raw, read, name, word):
    put(raw, f"AudioWAV/{name}.wav", "AudioWAV/1001_DFA_ANG_XX.wav")
    turns, report = read()
    assert list(turns) == ["1001_DFA_ANG_XX"]
    assert [item["item"] for item in report.left_out] == [f"AudioWAV/{name}.wav"]
    assert word in report.left_out[0]["reason"]


def test_the_name_with_one_x_is_mended(raw, read):
    put(raw, "AudioWAV/1040_ITH_SAD_X.wav", "VideoFlash/1040_ITH_SAD_XX.flv")
    turns, report = read()
    assert list(turns) == ["1040_ITH_SAD_XX"]
    assert names(turns["1040_ITH_SAD_XX"].audio)[0] == "AudioWAV/1040_ITH_SAD_X.wav"
    assert [item["item"] for item in report.repaired] == ["AudioWAV/1040_ITH_SAD_X.wav"]


def test_other_files_are_named_as_ignored(raw, read):
    put(
        raw,
        "AudioWAV/1001_DFA_ANG_XX.wav",
        "AudioWAV/1001_DFA_ANG_XX copy.wav",
        "AudioWAV/._1001_DFA_NEU_XX.wav",
        "VideoDemographics.csv",
        "processedResults/summaryTable.csv",
        ".git/lfs/objects/1001_DFA_SAD_XX.wav",
    )
    turns, report = read()
    assert list(turns) == ["1001_DFA_ANG_XX"]
    assert {item["item"] for item in report.ignored} == {
        "AudioWAV/1001_DFA_ANG_XX copy.wav",
        "AudioWAV/._1001_DFA_NEU_XX.wav",
        "VideoDemographics.csv",
        ".git",
    }


# ------------------------------------------------------------------------------------------------- the crowd's labels


def test_the_crowds_vote_takes_the_place_of_the_name_on_demand(raw, read):
    votes = {
        "1001_IEO_ANG_LO": "H",
        "1001_IEO_ANG_MD": "A:D",
        "1001_IEO_ANG_HI": "A",
        "1001_IEO_DIS_LO": "",
        "1001_IEO_FEA_LO": "F",
        "1001_IEO_HAP_LO": "N",
        "1001_IEO_SAD_LO": "S",
        "1001_IEO_DIS_HI": "D",
    }
    table = HEADER + "".join(
        f'"{number}","{name}","N","69.1","N","92.22","{vote}","64.78"\n'
        for number, (name, vote) in enumerate(votes.items())
    )
    put(raw, "processedResults/summaryTable.csv", text=table)
    put(raw, *(f"AudioWAV/{name}.wav" for name in (*votes, "1002_IEO_NEU_XX")))
    turns, report = read()
    assert turns["1001_IEO_ANG_LO"].emotion == "angry" and not report.repaired
    turns, report = read(crowd_labels=True)
    assert {name: turn.emotion for name, turn in turns.items()} == {
        "1001_IEO_ANG_LO": "happy",
        "1001_IEO_ANG_MD": None,
        "1001_IEO_ANG_HI": "angry",
        "1001_IEO_DIS_LO": None,
        "1001_IEO_FEA_LO": "fearful",
        "1001_IEO_HAP_LO": "neutral",
        "1001_IEO_SAD_LO": "sad",
        "1001_IEO_DIS_HI": "disgust",
        "1002_IEO_NEU_XX": None,
    }
    reasons = {Path(item["item"]).stem: item["reason"] for item in report.repaired}
    assert reasons.keys() == {"1001_IEO_ANG_MD", "1001_IEO_DIS_LO", "1002_IEO_NEU_XX"}
    assert "tie, A:D" in reasons["1001_IEO_ANG_MD"]
    assert "no vote on this recording" in reasons["1002_IEO_NEU_XX"]
    assert read(crowd_labels=True, emotion_map={"hap": "surprise"})[0]["1001_IEO_ANG_LO"].emotion == "surprise"


def test_the_crowds_labels_need_their_table(raw, read):
    put(raw, "AudioWAV/1001_IEO_ANG_LO.wav")
    with pytest.raises(LayoutError, match=r"processedResults/summaryTable.csv, which is not there.*--crowd_labels"):
        read(crowd_labels=True)
    put(raw, "processedResults/summaryTable.csv", text="<html>\nNot found")
    with pytest.raises(LayoutError, match="expected the columns FileName and MultiModalVote, saw <html>"):
        read(crowd_labels=True)


# ----------------------------------------------------------------------------------------------------- Git-LFS pointers


@pytest.mark.parametrize("folder", ["AudioWAV", "VideoFlash"])
def test_a_folder_of_pointers_is_refused_with_the_mend(raw, read, folder):
    other, suffix = {"AudioWAV": ("VideoFlash/{}.flv", "wav"), "VideoFlash": ("AudioWAV/{}.wav", "flv")}[folder]
    stems = [f"10{actor:02d}_IEO_ANG_LO" for actor in range(1, 21)]
    put(raw, *(f"{folder}/{stem}.{suffix}" for stem in stems), text=POINTER)
    put(raw, f"{folder}/1021_IEO_ANG_LO.{suffix}", *(other.format(stem) for stem in stems))
    with pytest.raises(LayoutError) as error:
        read()
    assert "git lfs pull" in str(error.value) and str(raw / folder) in str(error.value)
    assert "20 of its 21" in str(error.value)


def test_a_few_pointers_are_left_to_the_reading_of_the_clips(raw, read):
    put(raw, "AudioWAV/1001_IEO_ANG_LO.wav", text=POINTER)
    put(raw, "AudioWAV/1002_IEO_ANG_LO.wav")
    turns, _ = read()
    assert len(turns) == 2


def test_pointers_of_the_mp3s_do_not_matter_beside_the_wavs(raw, read):
    put(raw, "AudioMP3/1001_IEO_ANG_LO.mp3", text=POINTER)
    with pytest.raises(LayoutError, match="AudioMP3"):
        read()
    put(raw, "AudioWAV/1001_IEO_ANG_LO.wav")
    turns, report = read()
    assert len(turns) == 1
    assert [item["item"] for item in report.ignored] == ["AudioMP3"]


def test_another_folder_is_refused_with_what_was_expected_and_seen(raw, read):
    put(raw, "CREMA-D-master.zip")
    with pytest.raises(LayoutError) as error:
        read()
    for part in (str(raw), "CREMA-D-master.zip", "VideoFlash/*.flv", "unpack"):
        assert part in str(error.value)


def test_no_actor_crosses_the_splits_whatever_is_there(raw, read):
    put(raw, *(f"AudioWAV/{actor}_IEO_ANG_{level}.wav" for actor in range(1001, 1092) for level in ("LO", "HI")))

    def split_of(seed):
        options = Options(raw / "unpacked", split_seed=seed)
        return {dialogue.dialogue_id: dialogue.split for dialogue in crema_d.read(raw, Report("crema-d"), options)}

    splits = split_of(0)
    assert len({(name[:4], split) for name, split in splits.items()}) == 91
    order = list(splits.values())
    assert [order.count(split) for split in ("train", "validation", "test")] == [146, 18, 18]
    assert order == sorted(order, key=["train", "validation", "test"].index)
    assert split_of(1) != splits
    for actor in range(1001, 1080):
        for path in (raw / "AudioWAV").glob(f"{actor}_*"):
            path.unlink()
    part = split_of(0)
    assert len(part) == 24 and part.items() <= splits.items()


def test_the_published_counts_add_up():
    counts = dict(crema_d.ABOUT.published["all"])
    assert counts.pop("rows") == sum(counts.values()) == 7442
    assert crema_d.ABOUT.license == "odbl" and crema_d.ABOUT.redistributable


# ----------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_media, grey_frames, tone):
    """A clone of the repository with real clips of two actors."""
    raw = tmp_path_factory.mktemp("crema") / "CREMA-D"
    for folder in ("VideoFlash", "AudioWAV", "AudioMP3"):
        (raw / folder).mkdir(parents=True)

    def flv(name, sound=True):
        write_media(
            raw / "VideoFlash" / f"{name}.flv",
            frames=grey_frames(5),
            samples=tone(0.5) if sound else None,
            video_codec="flv1",
            audio_codec="libmp3lame",
        )

    def wav(name):
        path = raw / "AudioWAV" / f"{name}.wav"
        write_media(path, samples=tone(0.2, 16000), sampling_rate=16000, audio_codec="pcm_s16le")

    def mp3(name):
        write_media(raw / "AudioMP3" / f"{name}.mp3", samples=tone(0.9), audio_codec="libmp3lame")

    for name in ("1001_DFA_ANG_XX", "1076_MTI_SAD_XX"):
        flv(name)
        wav(name)
        mp3(name)
    flv("1001_IEO_HAP_LO", sound=False)  # without audio
    wav("1001_IEO_HAP_LO")
    flv("1001_IEO_SAD_HI")  # the wav is a pointer, the mp3 empty
    put(raw, "AudioWAV/1001_IEO_SAD_HI.wav", text=POINTER)
    put(raw, "AudioMP3/1001_IEO_SAD_HI.mp3")
    put(raw, "VideoFlash/1002_TSI_NEU_XX.flv")
    mp3("1002_TSI_NEU_XX")
    put(raw, "VideoFlash/1002_WSI_FEA_XX.flv", text="no clip at all")
    (raw / "AudioWAV" / "1002_TSI_NEU_XX.wav").symlink_to("nowhere.wav")
    put(raw, "VideoDemographics.csv", text="ActorID,Age,Sex,Race,Ethnicity\n1001,51,Male,Caucasian,Not Hispanic\n")
    put(raw, "processedResults/summaryTable.csv", text=HEADER + '"1","1001_DFA_ANG_XX","N","1","N","1","D","1"\n')
    return raw


@pytest.mark.parametrize("embed", [False, True])
def test_prepare_writes_what_load_dataset_reads(corpus, tmp_path, embed):
    out = tmp_path / "out"
    report = prepare_corpus("crema-d", corpus.parent, out, embed=embed, progress=False)
    splits = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    rows = {row["utterance_id"]: row for split in splits.values() for row in split}
    assert rows.keys() == {"1001_DFA_ANG_XX", "1001_IEO_HAP_LO", "1001_IEO_SAD_HI", "1002_TSI_NEU_XX"}
    assert report["found"] == 6 and report["rows"] == 4
    left_out = {Path(item["item"]).stem: item["reason"] for item in report["left_out"]}
    assert left_out.keys() == {"1076_MTI_SAD_XX", "1002_WSI_FEA_XX"}
    assert "known bad" in left_out["1076_MTI_SAD_XX"]
    assert report["published"]["splits"]["all"]["rows"] == {"published": 7442, "here": 4}
    stood_in = {Path(item["item"]).stem: item["reason"] for item in report["repaired"]}
    assert (
        "git lfs pull" in stood_in["1001_IEO_SAD_HI"]
        and "VideoFlash/1001_IEO_SAD_HI.flv" in stood_in["1001_IEO_SAD_HI"]
    )
    assert {row["corpus"] for row in rows.values()} == {"crema-d"}
    assert {name: row["emotion"] for name, row in rows.items()} == {
        "1001_DFA_ANG_XX": "angry",
        "1001_IEO_HAP_LO": "happy",
        "1001_IEO_SAD_HI": "sad",
        "1002_TSI_NEU_XX": "neutral",
    }

    def source(name, kind):
        return rows[name][kind]["bytes" if embed else "path"]

    seconds = {name: len(read_audio(source(name, "audio"))) / 16000 for name in rows}
    assert seconds["1001_DFA_ANG_XX"] == pytest.approx(0.2, abs=0.1)  # the wav
    assert seconds["1001_IEO_HAP_LO"] == pytest.approx(0.2, abs=0.1)
    assert seconds["1001_IEO_SAD_HI"] == pytest.approx(0.5, abs=0.1)  # the audio of the flv file
    assert seconds["1002_TSI_NEU_XX"] == pytest.approx(0.9, abs=0.1)  # the mp3
    assert len(read_video(source("1001_IEO_HAP_LO", "video"), 99)) == 5
    assert rows["1002_TSI_NEU_XX"]["video"] is None


def test_prepare_takes_the_crowds_labels(corpus, tmp_path):
    prepare_corpus("crema-d", corpus, tmp_path / "out", crowd_labels=True, progress=False)
    splits = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    emotions = {row["utterance_id"]: row["emotion"] for split in splits.values() for row in split}
    assert emotions.pop("1001_DFA_ANG_XX") == "disgust"
    assert set(emotions.values()) == {None}
