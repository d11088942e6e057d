"""The `empathic` command as a user types it."""

import json
import subprocess
import sys

import pytest
from datasets import load_dataset

from empathic.cli import build_parser, main

COMMANDS = ("quickstart", "prepare", "counter", "train", "merge", "chat")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  empathic {command} " in text
    example = text.split("example:\n  empathic ")[1].split()
    known, rest = build_parser().parse_known_args(example)
    assert known.command == command and (command == "train" or not rest)


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
    assert run.returncode != 0
    assert "history must be one of memory, text, none, got 'all'" in run.stderr
    assert "launch" in run.stderr  # the error came through the launcher
