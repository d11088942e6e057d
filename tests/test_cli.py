"""The `empathic` command as a user types it."""

import json
import subprocess
import sys

import pytest
from datasets import load_dataset

from empathic.cli import build_parser, main, option_names

COMMANDS = (
    "quickstart",
    "prepare",
    "prepare-features",
    "counter",
    "train",
    "rounds",
    "evaluate",
    "study",
    "merge",
    "push",
    "push-metric",
    "demo",
    "push-space",
    "chat",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  empathic {command} " in text
    example = text.split("example:\n  empathic ")[1].split()
    known, rest = build_parser().parse_known_args(example)
    assert known.command == command and (command in ("train", "prepare-features", "rounds") or not rest)


def test_unknown_arguments_are_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["merge", "a", "b", "--colour"])
    assert stop.value.code == 2 and "--colour" in capsys.readouterr().err


def test_prepare_reports_and_exits(tmp_path, write_media, grey_frames, tone, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_media(raw / "a.mp4", frames=grey_frames(5), samples=tone(0.5))
    lines = [
        {"dialogue_id": "d", "turn": 0, "speaker": "ann", "text": "hi", "emotion": "happy", "file_name": "a.mp4"},
        {"dialogue_id": "d", "turn": 1, "speaker": "ben", "text": "hello", "emotion": "joyous"},
    ]
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["prepare", "folder", str(raw), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 turns are in" in printed and "metadata.jsonl:2" in printed and "joyous" in printed
    assert sum(len(rows) for rows in load_dataset(str(tmp_path / "out")).values()) == 2
    (raw / "metadata.jsonl").write_text("{}\n")
    assert main(["prepare", "folder", str(raw), str(tmp_path / "empty")]) == 1
    assert "left out: 1\n  metadata.jsonl:1: " in capsys.readouterr().out
    (raw / "metadata.jsonl").unlink()
    for bad in (raw, tmp_path / "nowhere"):
        assert main(["prepare", "folder", str(bad), str(tmp_path / "empty")]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and "there is no such" in printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize(
    "line", ["--split_seed 3 --num_workers=2 --no-crop", "--split-seed 3 --num-workers=2 --no_crop"]
)
def test_options_are_spelled_either_way(line, monkeypatch):
    from empathic.data_prep import prepare

    seen = []
    monkeypatch.setattr(prepare, "prepare_corpus", lambda *args, **options: seen.append(options) or 1 / 0)
    assert main(["prepare", "iemocap", "a_b", "c-d", *line.split()]) == 1
    assert (seen[0]["split_seed"], seen[0]["num_workers"], seen[0]["crop"]) == (3, 2, False)


def test_every_option_is_declared_with_underscores():
    names = {name for name in option_names(build_parser()) if name.startswith("--")}
    assert len(names) > 60 and not {name for name in names if "-" in name.removeprefix("--no-").removeprefix("--")}


def test_prepare_passes_its_options_on(tmp_path, monkeypatch):
    from empathic.data_prep import prepare

    seen = []
    empty = dict(rows=1, found=1, splits={}, published={"differences": []})
    empty |= dict(left_out=[], repaired=[], without_media=[], ignored=[])
    monkeypatch.setattr(prepare, "prepare_corpus", lambda *args, **options: seen.append((args, options)) or empty)
    assert main(["prepare", "meld", "a", "b"]) == 0
    assert seen[0] == (("meld", "a", "b"), dict(
        embed=False, num_workers=1, split_seed=0, emotion_map={}, keep_calm=False, crowd_labels=False, crop=True,
        video_pattern=None, text_only=False,
    ))  # fmt: skip
    options = "--embed --num-workers 3 --split-seed 5 --keep-calm --crowd-labels --no-crop --video-pattern {stem}.mp4"
    mapping = ["--emotion-map", "fru=angry", "exc=Happy", "--emotion-map", "xxx="]
    main(["prepare", "crema-d", "a", "b", *options.split(), *mapping])
    assert seen[1][1] == dict(
        embed=True, num_workers=3, split_seed=5, keep_calm=True, crowd_labels=True, crop=False,
        video_pattern="{stem}.mp4", text_only=False, emotion_map={"fru": "angry", "exc": "happy", "xxx": None},
    )  # fmt: skip
    for wrong in (["--emotion-map", "fru"], ["--num-workers", "0"]):
        with pytest.raises(SystemExit):
            main(["prepare", "meld", "a", "b", *wrong])


def test_train_goes_through_accelerate_launch(tmp_path):
    config = tmp_path / "stage.yaml"
    config.write_text("stage: dialogue\ndataset_name: [a]\noutput_dir: b\n")
    run = subprocess.run(
        [sys.executable, "-m", "empathic.cli", "train", "--config", str(config), "--history", "all"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert run.returncode == 1
    assert run.stderr == "empathic train: history must be one of memory, text, none, got 'all'.\n"


def test_an_unknown_training_option_is_named_with_a_similar_one(tmp_path, capsys):
    from empathic.trainers import train

    config = tmp_path / "stage.yaml"
    config.write_text("stage: dialogue\ndataset_name: [a]\noutput_dir: b\n")
    with pytest.raises(ValueError, match=r"^There is no option --learing_rate\. Do you mean --learning_rate\?$"):
        train.main(["--config", str(config), "--learing_rate", "3"])
