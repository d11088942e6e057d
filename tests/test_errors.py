"""Errors of a program as its user sees them."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from empathic.cli import main
from empathic.errors import VARIABLE, describe, loading, run_program, without_secrets
from empathic.processes import Stopped

TOKEN = "hf_MadeUpMadeUpMadeUp"


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


def failing(error):
    def work():
        raise error

    return work


def test_an_error_is_a_line_and_the_traceback_an_option(capsys, monkeypatch):
    assert run_program("empathic x", failing(ValueError("beta is -1; give a number above 0.")), []) == 1
    assert capsys.readouterr().err == "empathic x: beta is -1; give a number above 0.\n"
    monkeypatch.setenv(VARIABLE, "1")
    assert run_program("empathic x", failing(ValueError("beta is -1.")), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_option_works_before_and_after_the_command(tmp_path, capsys):
    for line in (["--traceback", "merge", "x", "y"], ["merge", "--traceback", "x", "y"]):
        os.environ[VARIABLE] = ""
        (tmp_path / "file").touch()
        assert main([*line[:-2], str(tmp_path / "no"), str(tmp_path / "file")]) == 1
        assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_the_program_names_its_class(capsys):
    assert run_program("empathic x", failing(KeyError("row")), []) == 1
    error = capsys.readouterr().err
    assert "KeyError" in error and "--traceback" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "module, extra",
    [("datasets", "train"), ("sentence_transformers", "train"), ("fastapi.responses", "serve"), ("mamba_ssm", "cuda")],
)
def test_a_missing_package_names_the_extra_that_installs_it(monkeypatch, module, extra):
    monkeypatch.delitem(sys.modules, module, raising=False)
    # An import of it now fails as if it were not installed.
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(module)
    assert describe(raised.value).endswith(f"pip install 'empathic[{extra}]'")
    unknown = ModuleNotFoundError("No module named 'other'", name="other")
    assert describe(unknown) == "No module named 'other'"


def test_exit_statuses_are_kept():
    assert run_program("x", lambda: None, []) == 0
    assert run_program("x", lambda: 3, []) == 3
    assert run_program("x", failing(KeyboardInterrupt()), []) == 130
    assert run_program("x", failing(Stopped(15)), []) == 143
    with pytest.raises(SystemExit) as stop:
        run_program("x", failing(SystemExit(2)), [])
    assert stop.value.code == 2


def test_an_error_of_the_system_names_the_path_and_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        (tmp_path / "file" / "inside").mkdir()
    assert str(tmp_path / "file" / "inside") in describe(error.value) and "is a file" in describe(error.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named_whoever_raises_the_error():
    with pytest.raises(OSError) as system, open("/dev/full", "w") as file:
        file.write("x")
    assert "disk is full" in describe(system.value)
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = system.value
    assert "disk is full" in describe(wrapped)
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    for save in (
        lambda: torch.save(torch.ones(10**6), "/dev/full"),
        lambda: save_file({"a": torch.ones(9)}, "/dev/full/x"),
    ):
        with pytest.raises(Exception) as error:
            save()
        assert len(describe(error.value).splitlines()) <= 3


def test_a_message_shows_no_token(capsys):
    line = ["--hub_tokn", TOKEN, "--token=very-secret"]
    text = without_secrets(f"unknown: {line}", line)
    assert TOKEN not in text and "very-secret" not in text and "hf_***" in text
    run_program("x", failing(ValueError(f"bad {TOKEN}")), [])
    assert TOKEN not in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named_with_its_option(tmp_path):
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(FileNotFoundError, match=r"--classifier .*empty is no folder of a model"),
        loading(str(tmp_path / "empty"), "--classifier"),
    ):
        raise AssertionError("not reached")
    with (
        pytest.raises(FileNotFoundError, match="--classifier runs/x: there is no such folder"),
        loading("runs/x", "--classifier"),
    ):
        json.loads("no model")  # an error of a library


def test_an_output_that_cannot_be_written_is_a_line_before_any_model_is_loaded(tmp_path, recordings, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "replies.jsonl").write_text(
        json.dumps({"id": "a/b/0", "prompt": [{"role": "user", "content": "hi"}], "reply": "x", "reference": "y"})
        + "\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    inside = str(tmp_path / "file" / "out")
    commands = [
        [
            "counter",
            "--model",
            str(tmp_path / "model"),
            "--data",
            recordings.data,
            "--classifier",
            str(tmp_path / "model"),
        ],
        ["evaluate", "dialogue", f"a=empathic:{tmp_path / 'model'}", "--data", recordings.data],
        ["evaluate", "emotion", str(tmp_path / "model"), "--data", recordings.data],
        ["evaluate", "reconstruction", str(tmp_path / "model"), recordings.data],
        ["merge", str(tmp_path / "model")],
        ["study", "build", str(tmp_path / "replies.jsonl"), "--conversations", "1"],
        ["quickstart"],
    ]
    options = {"counter": "--out", "evaluate": "--output", "study": "--out", "quickstart": "--output"}
    for command in commands:
        for out in (str(tmp_path / "file"), inside):
            option = [options[command[0]]] if command[0] in options else []
            assert main([*command, *option, out]) == 1, command
            error = capsys.readouterr().err
            said = [line for line in error.splitlines() if line.startswith("empathic ")]
            assert len(said) == 1 and str(tmp_path / "file") in said[0] and "Traceback" not in error, error


def test_a_terminal_that_is_not_utf_8_does_not_end_a_command(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "喜.mp4").write_bytes(b"broken")
    row = {"dialogue_id": "d", "turn": 0, "speaker": "a", "text": "hi", "file_name": "喜.mp4"}
    (raw / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "empathic.cli", "prepare", "folder", str(raw), str(tmp_path / "out")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert run.returncode == 0 and b"1 turns are in" in run.stdout and b"?.mp4" in run.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    work = "lambda: print('a' * 10**6)"
    code = f"import sys; from empathic.errors import run_program\nsys.exit(run_program('x', {work}, []))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 141 and error == b""


def test_chat_without_stdin_says_so_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(tmp_path)]) == 1
    assert "stdin is closed" in capsys.readouterr().err
