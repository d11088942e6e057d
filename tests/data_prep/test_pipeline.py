"""From dialogues to a dataset: shards, candidates, cuts; runs that are killed, repeated or fail; broken clips."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import tracemalloc
import wave
import weakref

import numpy as np
import pytest
from datasets import load_dataset

from empathic.data_prep import pipeline, streams, writer
from empathic.data_prep.corpora.base import Clip, CorpusInfo, Dialogue, Report, Turn
from empathic.data_prep.pipeline import OptionalClip, prepare
from empathic.media_empathic import probe, read_audio

ABOUT = CorpusInfo("toy", "Toy: a corpus", "Two words.", "cc-by-4.0", "Free.", True, "https://example.org")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture(scope="module")
def samples(tmp_path_factory, write_media, grey_frames, tone):
    """A folder with one small clip of each kind."""
    folder = tmp_path_factory.mktemp("samples")
    write_media(folder / "both.mp4", frames=grey_frames(5), samples=tone(0.5))
    write_media(folder / "mute.mp4", frames=grey_frames(5))
    write_media(folder / "voice.wav", samples=tone(0.3, 16000), sampling_rate=16000, audio_codec="pcm_s16le")
    write_media(folder / "six.mkv", samples=tone(0.3, 48000, channels=6), layout="5.1", sampling_rate=48000)
    write_media(folder / "odd.mp4", frames=grey_frames(3, 47, 61), samples=tone(0.3))
    write_media(folder / "blink.wav", samples=tone(0.005, 16000), sampling_rate=16000, audio_codec="pcm_s16le")
    with wave.open(str(folder / "hush.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", None))
        file.writeframes(bytes(2 * 8000 * 305))
    (folder / "cut.mp4").write_bytes((folder / "both.mp4").read_bytes()[:-200])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "lfs.mp4").write_bytes(LFS)
    (folder / "text.mp4").write_text("404: not found")
    (folder / "header.wav").write_bytes((folder / "voice.wav").read_bytes()[:44])
    (folder / "noise.avi").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "folder.mp4").mkdir()
    return folder


def turn(name, audio=(), video=(), emotion="happy", **more):
    return Turn(f"table:{name}", f"u{name}", "ann", f"Text {name}.", emotion, audio=audio, video=video, **more)


def run(out, dialogues, report=None, about=ABOUT, **options):
    """Prepare dialogues as from an adapter: each of their turns counts as found."""
    report = report or Report("toy")

    def read():
        for dialogue in dialogues:
            report.find(len(dialogue.turns))
            yield dialogue

    return prepare(about, read(), out, report, progress=False, **options)


def clip(folder, name, **cut):
    return (Clip(folder / name, name, **cut),)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(folder.rglob("*"))}


def rows_of(out, cache):
    return {name: list(split) for name, split in load_dataset(str(out), cache_dir=str(cache)).items()}


def many(folder, count, per_dialogue=7):
    """`count` clips, in dialogues of train, validation and test."""
    dialogues = []
    for first in range(0, count, per_dialogue):
        number = first // per_dialogue
        turns = []
        for i in range(first, min(count, first + per_dialogue)):
            found = clip(folder, f"{i}.{'wav' if i % 3 else 'mp4'}")
            turns.append(turn(i, found, () if i % 3 else found))
        dialogues.append(Dialogue("train" if number % 4 else "test", f"d{number}", turns))
    return dialogues


def copies(samples, folder, count):
    folder.mkdir()
    for i in range(count):
        shutil.copy(samples / ("voice.wav" if i % 3 else "both.mp4"), folder / f"{i}.{'wav' if i % 3 else 'mp4'}")
    (folder / "4.wav").write_bytes(b"")  # a broken clip
    return folder


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_second_run_does_nothing(tmp_path, samples, monkeypatch, count):
    raw, out = copies(samples, tmp_path / "raw", count), tmp_path / "out"
    monkeypatch.setattr(pipeline, "SHARD_TURNS", count // 6)
    opened = []
    opens = streams.probe
    monkeypatch.setattr(streams, "probe", lambda path, decode: opened.append(path) or opens(path, decode=decode))
    first = run(out, many(raw, count), num_workers=2)
    assert (first["found"], first["rows"], len(first["without_media"])) == (count, count, 1)
    assert sorted(opened) == sorted(raw.iterdir())  # each file once
    before = stamps(out)
    opened.clear()
    assert run(out, many(raw, count), num_workers=2) == first == json.loads((out / "report.json").read_text())
    assert opened == [] and stamps(out) == before
    # One clip has changed: only its shard is written again.
    shutil.copy(samples / "voice.wav", raw / "4.wav")
    again = run(out, many(raw, count))
    assert 0 < len(opened) <= count // 6 and raw / "4.wav" in opened
    assert again["without_media"] == [] and again["splits"]["test"]["with_audio"] == again["splits"]["test"]["rows"]
    shutil.rmtree(tmp_path / "out")
    assert run(out, many(raw, count)) == again and not (out / ".work").exists()


def child(source):
    """A separate process, forked from a process that has imported the pipeline."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["empathic.data_prep.pipeline"])
    process = context.Process(target=exec, args=(source, {"__name__": "child"}))
    process.start()
    return process


SOURCE = """
import os, pickle, shutil, signal
from pathlib import Path
from empathic.data_prep import pipeline, streams
from empathic.data_prep.corpora.base import Report
pipeline.SHARD_TURNS = 12
about, dialogues = pickle.loads(Path({pickled!r}).read_bytes())
report = Report("toy")
def read():
    for dialogue in dialogues:
        report.find(len(dialogue.turns))
        yield dialogue
{patch}
pipeline.prepare(about, read(), Path({out!r}), report, num_workers=2, progress=False, embed={embed})
"""
# Exits at the nth step that changes the disk, just before or after the step.
STEPS = """
import itertools
steps = itertools.count(1)
def wrap(change):
    def step(*args, **kwargs):
        number = next(steps)
        if number == {steps} and {before}:
            os.kill(os.getpid(), signal.SIGKILL)
        done = change(*args, **kwargs)
        if number == {steps}:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return step
os.replace, Path.unlink, os.unlink, os.rmdir = map(wrap, (os.replace, Path.unlink, os.unlink, os.rmdir))
"""


@pytest.fixture
def killable(tmp_path, samples):
    """(out, a function that starts a run in a process), for whole and for cut clips."""
    raw, out = copies(samples, tmp_path / "raw", 30), tmp_path / "out"
    dialogues = many(raw, 30)
    for dialogue in dialogues[:2]:
        for t in dialogue.turns[:2]:
            t.audio, t.video = clip(samples, "both.mp4", start=0.1, end=0.3), clip(samples, "mute.mp4", crop="left")
    (tmp_path / "dialogues").write_bytes(pickle.dumps((ABOUT, dialogues)))

    def start(embed=False, patch=""):
        names = dict(pickled=str(tmp_path / "dialogues"), out=str(out))
        return child(SOURCE.format(**names, patch=patch, embed=embed))

    return out, start


@pytest.mark.parametrize("embed", [False, True])
def test_killed_at_random_and_run_again(killable, embed):
    out, start = killable
    whole = start(embed)
    whole.join()
    expected = tree(out)
    assert whole.exitcode == 0 and "README.md" in expected and len(load_dataset(str(out))["train"]) > 20
    assert ("media/cuts.json" in expected) != embed
    shutil.rmtree(out)
    killed = 0
    for files in (1, *np.random.default_rng().integers(2, 16, size=2)):  # killed once this number of files exists
        process = start(embed)
        while process.is_alive() and sum(len(names) for _, _, names in os.walk(out)) < files:
            time.sleep(0.001)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed > 0
    last = start(embed)
    last.join()
    assert last.exitcode == 0 and tree(out) == expected


def test_killed_at_every_step_and_run_again(killable):
    out, start = killable
    whole = start()
    whole.join()
    expected = tree(out)
    shutil.rmtree(out)
    for number in range(200):
        process = start(patch=STEPS.format(steps=3 + number // 2, before=number % 2))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        # No incomplete output looks complete.
        if (out / "README.md").exists():
            assert {n: d for n, d in tree(out).items() if n.startswith("data/") or n == "README.md"} == {
                n: d for n, d in expected.items() if n.startswith("data/") or n == "README.md"
            }
    assert number > 4 and tree(out) == expected


def test_killed_while_it_replaces_other_output(killable, samples):
    out, start = killable
    run(out, [Dialogue("train", "old", [turn("old", clip(samples, "voice.wav"))]), Dialogue("odd", "o", [turn("o")])])
    for number in range(200):
        process = start(patch=STEPS.format(steps=2 + number // 2, before=number % 2))
        process.join()
        if process.exitcode == 0:
            break
    found = tree(out)
    shutil.rmtree(out)
    start().join()
    assert found == tree(out)


def test_a_failing_adapter_leaves_nothing_that_looks_complete(tmp_path, samples):
    out = tmp_path / "out"
    good = [
        Dialogue("train", f"d{i}", [turn(f"{i}-{j}", clip(samples, "voice.wav")) for j in range(600)]) for i in (0, 1)
    ]

    def bad():
        yield from good
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(out, bad())
    assert not (out / "README.md").exists() and not (out / "report.json").exists()
    assert not list(out.glob("data/*")) and len(list((out / ".work").glob("*.parquet"))) == 1
    assert run(out, good)["rows"] == 1200 and not (out / ".work").exists()
    before = tree(out)
    good.insert(0, Dialogue("train", "new", [turn("new")]))
    with pytest.raises(OSError, match="the disk is gone"):
        run(out, bad())
    shutil.rmtree(out / ".work")
    assert tree(out) == before


def test_rows_that_get_lost_are_an_error(tmp_path):
    report = Report("toy")
    report.find(3)
    with pytest.raises(RuntimeError, match="4 rows were found, but 1 written and 0 left out"):
        run(tmp_path / "out", [Dialogue("train", "d", [turn(0)])], report)
    assert not (tmp_path / "out" / "report.json").exists()
    with pytest.raises(ValueError, match='"d" of split train occurs twice'):
        run(tmp_path / "out", [Dialogue("train", "d", [turn(0)]), Dialogue("train", "d", [turn(1)])])
    with pytest.raises(ValueError, match="table:0: the emotion 'calm' is not one of"):
        run(tmp_path / "out", [Dialogue("train", "d", [turn(0, emotion="calm")])])


def test_nothing_is_held_but_a_shard(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_TURNS", 20)
    monkeypatch.setattr(writer, "GROUP_BYTES", 2**20)
    large = samples / "hush.wav"  # 5 MB
    alive, most = weakref.WeakSet(), 0

    class Counted(Dialogue):
        __hash__ = object.__hash__

    def dialogues(count, media):
        nonlocal most
        for i in range(count):
            dialogue = Counted("train", f"d{i}", [turn(f"{i}-{j}", media) for j in range(4)])
            alive.add(dialogue)
            most = max(most, len(alive))
            yield dialogue

    assert run(tmp_path / "many", dialogues(100, ()))["rows"] == 400
    assert most <= 2 * 20 // 4 + 1  # the shard being written and the shard being filled

    tracemalloc.start()
    run(tmp_path / "large", dialogues(5, (Clip(large, "hush.wav"),)), embed=True, num_workers=2)  # 100 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * large.stat().st_size


# Shards, card and report ---------------------------------------------------------------------------------------------


def test_shards_hold_whole_dialogues(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_TURNS", 10)
    sizes = {"test": [3, 3, 3, 25, 1], "train": [4, 4, 4, 4], "odd/name": [1]}
    dialogues = [
        Dialogue(split, f"d{i}", [turn(f"{i}-{j}") for j in range(size)])
        for split, found in sizes.items()
        for i, size in enumerate(found)
    ]
    dialogues = [d for d in dialogues if d.split != "odd/name"]
    out = tmp_path / "out"
    run(out, dialogues)
    names = sorted(p.name[:-25] for p in (out / "data").iterdir())
    assert names == [f"test-0000{i}-of-00003" for i in range(3)] + [f"train-0000{i}-of-00002" for i in range(2)]
    found = rows_of(out, tmp_path / "cache")
    assert list(found) == ["train", "test"]
    for split, rows in found.items():
        expected = [(f"d{i}", j) for i, size in enumerate(sizes[split]) for j in range(size)]
        assert [(row["dialogue_id"], row["turn"]) for row in rows] == expected
    # Fewer dialogues, fewer shards: no old shard stays.
    run(out, dialogues[:2])
    assert [p.name[:-25] for p in (out / "data").iterdir()] == ["test-00000-of-00001"]


def test_shards_of_embedded_media_are_bounded_by_bytes(tmp_path, samples, monkeypatch):
    size = (samples / "both.mp4").stat().st_size
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 4 * size)
    found = clip(samples, "both.mp4")
    dialogues = [Dialogue("train", f"d{i}", [turn(i, found, found)]) for i in range(6)]  # two copies each
    run(tmp_path / "embedded", dialogues, embed=True)
    assert len(list((tmp_path / "embedded" / "data").iterdir())) == 3
    run(tmp_path / "paths", dialogues)
    assert len(list((tmp_path / "paths" / "data").iterdir())) == 1
    cut = clip(samples, "both.mp4", start=0.1)  # a recording counts once, however many turns are cut out of it
    run(tmp_path / "cut", [Dialogue("train", "d", [turn(i, cut) for i in range(9)]), *dialogues[:1]], embed=True)
    assert len(list((tmp_path / "cut" / "data").iterdir())) == 1


def test_published_counts_and_card(tmp_path):
    published = {
        "train": {"rows": 3, "dialogues": 1, "happy": 2, "none": 0},
        "test": {"rows": 1, "sad": 0},
        "all": {"rows": 4, "dialogues": 2, "happy": 3},
    }
    about = CorpusInfo("toy", "Toy: a corpus", "Words.", "other", "Ask.", False, "https://x.org", published)
    report = Report("toy")

    def dialogues():
        yield Dialogue("train", "d", [turn(0), turn(1), turn(2, emotion=None)])
        report.find(2)
        report.leave_out("row 7", "it is bad")
        report.leave_out("row 8", "it is bad")
        report.ignore("x|y.mp4", "no table names it")
        yield Dialogue("test", "d", [turn(3)])

    content = run(tmp_path, dialogues(), report, about, options={"keep_calm": True})
    assert content["published"]["splits"]["train"]["none"] == {"published": 0, "here": 1}
    assert content["published"]["splits"]["all"]["happy"] == {"published": 3, "here": 3}
    assert content["published"]["differences"] == [{"split": "train", "count": "none", "published": 0, "here": 1}]
    assert (content["found"], content["rows"], content["options"]) == (6, 4, {"keep_calm": True, "embed": False})
    assert content["splits"]["train"]["emotions"] == {"happy": 2, "none": 1}
    card = (tmp_path / "README.md").read_text()
    for text in (
        "license: other\n", "pretty_name: 'Toy: a corpus'", "- n<1K",
        "| train | 1 | 3 | 0 | 0 | 2 | 1 (published: 0) |",
        "Found: 6 rows. Written: 4. Left out: 2.", "- 2 × it is bad", "keep this dataset private", "https://x.org",
        'load_dataset("', "- 1 × no table names it",
    ):  # fmt: skip
        assert text in card, text


# Clips ---------------------------------------------------------------------------------------------------------------


def test_broken_media_never_stops_the_run(tmp_path, samples):
    cases = {  # file -> what is used of it, what the report says
        "six.mkv": ("a", None),
        "odd.mp4": ("av", None),
        "blink.wav": ("a", None),
        "hush.wav": ("a", "lasts 305 s, over 120 s"),
        "mute.mp4": ("v", "has no audio. The turn is kept without its audio."),
        "voice.wav": ("a", "has no video. The turn is kept without its video."),
        "cut.mp4": ("", "the mp4 file is cut short"),
        "empty.mp4": ("", "the file is empty (0 bytes)"),
        "lfs.mp4": ("", "is a Git-LFS pointer"),
        "text.mp4": ("", "is a text file"),
        "header.wav": ("", "header.wav: "),
        "noise.avi": ("", "cannot be decoded"),
        "folder.mp4": ("", "is a folder"),
        "gone.mp4": ("", "there is no such file"),
        "no\0name.mp4": ("", "cannot be read"),
        "no\udce4utf8.wav": ("", "its name is not UTF-8"),
    }
    shutil.copy(samples / "voice.wav", samples / "no\udce4utf8.wav")
    soundless = ("six.mkv", "blink.wav", "hush.wav", "no\udce4utf8.wav")
    turns = [turn(i, clip(samples, n), () if n in soundless else clip(samples, n)) for i, n in enumerate(cases)]
    report = run(tmp_path / "out", [Dialogue("train", "d", turns)], num_workers=3)
    rows = rows_of(tmp_path / "out", tmp_path / "cache")["train"]
    assert [row["turn"] for row in rows] == list(range(len(cases)))
    said = {entry["item"]: entry["reason"] for entry in report["without_media"] + report["repaired"]}
    assert len(report["without_media"]) + len(report["repaired"]) == len(said)  # one entry per turn
    for i, (name, (used, reason)) in enumerate(cases.items()):
        assert "".join(k[0] for k in ("audio", "video") if rows[i][k]) == used, name
        assert (reason in said[f"table:{i}"]) if reason else (f"table:{i}" not in said), name
    assert said["table:7"].endswith("The turn is kept without its audio and video.")
    assert said["table:7"].startswith("empty.mp4: ")  # the name that the user knows, not the path
    assert [entry["item"] for entry in report["repaired"]] == ["table:3"]
    assert json.loads((tmp_path / "out" / "report.json").read_bytes()) == report


def test_sound_whose_channels_cancel_is_repaired_and_reported(tmp_path, write_media, tone):
    both = np.concatenate([tone(1.0, 16000), -tone(1.0, 16000)])
    options = {"layout": "stereo", "sampling_rate": 16000}
    write_media(tmp_path / "whole.mp4", samples=both, **options)
    write_media(tmp_path / "plain.mp4", samples=np.abs(both), **options)
    both[1, 8000:] *= -1  # only the first half cancels
    write_media(tmp_path / "long.wav", samples=both, audio_codec="pcm_s16le", **options)
    turns = [
        turn(0, clip(tmp_path, "whole.mp4")),
        turn(1, clip(tmp_path, "plain.mp4")),
        turn(2, clip(tmp_path, "long.wav", start=0.0, end=0.5)),
        turn(3, clip(tmp_path, "long.wav", start=0.5, end=1.0)),
    ]
    report = run(tmp_path / "out", [Dialogue("train", "d", turns)])
    assert [entry["item"] for entry in report["repaired"]] == ["table:0", "table:2"]
    reason = "whole.mp4: its channels cancel each other when they are mixed. Channel 1 is used alone."
    assert report["repaired"][0]["reason"] == reason
    for row in rows_of(tmp_path / "out", tmp_path / "cache")["train"]:
        assert np.abs(read_audio(row["audio"]["path"])).max() > 0.4


def test_the_first_candidate_that_can_be_read_is_taken(tmp_path, samples):
    broken, plain, mute = (Clip(samples / n, n) for n in ("empty.mp4", "both.mp4", "mute.mp4"))
    optional = OptionalClip(samples / "mute.mp4", "mute.mp4")
    turns = [
        turn(0, (broken, plain), (broken, plain)),
        turn(1, (mute, plain), (mute, plain)),
        turn(2, (optional,), (optional,)),
        turn(3, (broken,), (broken,), needs_media=True),
        turn(4, (broken, mute), (mute,), needs_media=True),
        turn(5, needs_media=True),
        turn(6),
    ]
    report = run(tmp_path / "out", [Dialogue("train", "d", turns)])
    rows = rows_of(tmp_path / "out", tmp_path / "cache")["train"]
    assert [(row["turn"], row["utterance_id"]) for row in rows] == [
        (0, "u0"),
        (1, "u1"),
        (2, "u2"),
        (3, "u4"),
        (4, "u6"),
    ]
    names = [[row[kind] and os.path.basename(row[kind]["path"]) for kind in ("audio", "video")] for row in rows]
    assert names == [["both.mp4"] * 2, ["both.mp4", "mute.mp4"], [None, "mute.mp4"], [None, "mute.mp4"], [None, None]]
    said = {key: {e["item"]: e["reason"] for e in report[key]} for key in ("left_out", "repaired", "without_media")}
    assert said["repaired"]["table:0"].startswith("empty.mp4: the file is empty")
    assert said["repaired"]["table:0"].endswith("both.mp4 is used for its audio and video.")
    assert said["repaired"]["table:1"] == "mute.mp4: has no audio. both.mp4 is used for its audio."
    assert list(said["repaired"]) == ["table:0", "table:1"]
    assert list(said["left_out"]) == ["table:3", "table:5"] and said["left_out"]["table:5"] == "it has no clip."
    assert list(said["without_media"]) == ["table:4"] and "mute.mp4: has no audio" in said["without_media"]["table:4"]
    assert report["found"] == 7 == report["rows"] + 2


def test_clips_are_cut_once(tmp_path, samples, monkeypatch):
    source = tmp_path / "long.mp4"
    shutil.copy(samples / "both.mp4", source)
    calls = []
    cut = pipeline.cut
    monkeypatch.setattr(pipeline, "cut", lambda c, target: calls.append(c) or cut(c, target))
    out = tmp_path / "out"

    def dialogues(end=0.3, text="Hello."):
        sound, picture = (Clip(source, "long.mp4", 0.1, end),), (Clip(source, "long.mp4", 0.1, end, "left"),)
        late = (Clip(source, "long.mp4", 50.0, 51.0),)
        turns = [turn("a", sound, picture), turn("b/../c", sound), turn("b_.._c", sound), turn("late", late)]
        turns[0].text = text
        return [Dialogue("train", "d 1", turns)]

    report = run(out, dialogues(), num_workers=2)
    assert len(report["without_media"]) == 1 and report["without_media"][0]["reason"].startswith("long.mp4: ")
    rows = rows_of(out, tmp_path / "cache")["train"]
    files = [row["audio"]["path"] for row in rows[:3]] + [rows[0]["video"]["path"]]
    assert len(set(files)) == 4 and all(os.path.isabs(f) and os.path.isfile(f) for f in files)
    assert files[0].startswith(str(out / "media" / "train" / "d_1-")) and files[0].endswith("/ua.wav")
    assert files[3] == files[0].replace(".wav", ".mp4")
    video = probe(files[3])
    assert (video.width, video.height, video.has_audio) == (32, 48, False)
    assert probe(files[0]).duration == pytest.approx(0.2, abs=1e-3)
    assert len(calls) == 5
    before = tree(out)
    run(out, dialogues(text="Another text."))  # the shard is written again, its clips are not cut again
    assert len(calls) == 6 and calls[-1].start == 50.0
    assert {k: v for k, v in tree(out).items() if "media" in k} == {k: v for k, v in before.items() if "media" in k}
    run(out, dialogues(end=0.4))
    assert len(calls) == 11 and probe(files[0]).duration == pytest.approx(0.3, abs=1e-3)
    os.utime(source, (1, 1))
    run(out, dialogues(end=0.4))
    assert len(calls) == 16

    (out / "unpacked").mkdir()
    run(out, dialogues(), embed=True)
    row = load_dataset(str(out), cache_dir=str(tmp_path / "cache2"))["train"][0]
    name = next(name for name in before if name.endswith("ua.wav"))
    assert row["audio"] == {"path": name.removeprefix("media/"), "bytes": before[name]}
    assert sorted(p.name for p in out.iterdir()) == [".prepared.json", "README.md", "data", "report.json"]


def test_half_characters_do_not_stop_the_run(tmp_path):
    half = turn("x")
    half.text, half.speaker = "smile \ud83d", "an\udce4"
    report = run(tmp_path / "out", [Dialogue("train", "d\ud83d", [half])])
    row = rows_of(tmp_path / "out", tmp_path / "cache")["train"][0]
    assert (row["text"], row["speaker"], row["dialogue_id"]) == ("smile \ufffd", "an\ufffd", "d\ufffd")
    assert len(report["repaired"]) == 3 and {e["item"] for e in report["repaired"]} == {"table:x"}


def test_file_names_are_safe_and_never_meet():
    names = ["a", "a b", "a_b", "a/b", "../x", ".hidden", "", "ü", "u" * 300, "u" * 301, "A", "..", "-x"]
    safe = [pipeline._file_name(name) for name in names]
    assert len(set(safe)) == len(names) and safe[0] == "a"
    assert all(n and "/" not in n and not n.startswith(".") and len(n.encode()) < 100 for n in safe)
