"""The GPU check at its tiny size on a CPU: every part runs for real, so that none fails for a silly reason on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from empathic.benchmarks import gpu_check, gpu_parts
from empathic.benchmarks.gpu_parts import PARTS, Settings


@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests"])
def test_every_part_runs_at_a_tiny_size(name, tmp_path, capsys):
    record = gpu_check.run_part(name, Settings(tmp_path, dry_run=True))
    assert record["problems"] == [] and record["result"]["summary"]
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(record))
    assert gpu_check.finished(name, Settings(tmp_path, dry_run=True))["seconds"] == record["seconds"]
    assert gpu_check.finished(name, Settings(tmp_path / "other", dry_run=True)) is None


def test_a_result_outside_of_its_tolerance_is_a_problem(tmp_path, monkeypatch):
    exact = {"vectors": -1.0, "gradients": 1.0, "streamed": 1.0}
    monkeypatch.setattr(gpu_parts, "TOLERANCES", {"float32": exact, "bfloat16": exact})
    problems = gpu_parts.kernels(Settings(tmp_path, dry_run=True))["problems"]
    assert len(problems) == 4 and all("vectors differ by" in problem for problem in problems)
    monkeypatch.setattr(gpu_parts, "VARLEN_TOLERANCE", -1.0)
    assert len(gpu_parts.varlen(Settings(tmp_path, dry_run=True))["problems"]) == 4


@pytest.fixture
def fake_parts(monkeypatch):
    """Runs without processes: what each part is to do, by name."""
    ran, errors = [], {}

    def run(name, settings, seconds):
        ran.append(name)
        if name in errors:
            return {"part": name, "error": errors[name]}
        record = {"part": name, "identity": gpu_check.identity(settings), "seconds": 1.0, "problems": [], "result": {}}
        (settings.output / f"{name}.json").write_text(json.dumps(record))
        return record

    monkeypatch.setattr(gpu_check, "run_in_process", run)
    return ran, errors


def test_finished_parts_are_kept_and_failed_ones_run_again(fake_parts, tmp_path, capsys):
    ran, errors = fake_parts
    line = ["--dry_run", "--output", str(tmp_path), "--skip", "tests", "efficiency"]
    errors["varlen"] = "out of luck"
    assert gpu_check.main(line) == 1
    assert ran == [name for name in PARTS if name not in ("tests", "efficiency")]
    assert "| varlen | 0 | out of luck |" in (tmp_path / "gpu_check.md").read_text()
    ran.clear()
    errors.clear()
    assert gpu_check.main(line) == 0
    assert ran == ["varlen"]
    ran.clear()
    assert gpu_check.main([*line, "--parts", "turns", "--again"]) == 0 and ran == ["turns"]
    joined = json.loads((tmp_path / "gpu_check.json").read_text())
    assert joined["parts"].keys() == {"turns"} and joined["machine"]["device"] == "cpu"


def test_parts_that_the_time_does_not_allow_are_named(fake_parts, tmp_path, capsys):
    assert gpu_check.main(["--dry_run", "--output", str(tmp_path), "--minutes", "0.1"]) == 1
    assert not fake_parts[0] and "not run, because only" in capsys.readouterr().out


def test_without_a_gpu_the_check_says_what_can_be_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    assert "--dry_run" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_make_runs_the_dry_run_in_processes_of_their_own(tmp_path):
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [
        "make",
        "test-gpu",
        f"GPU_PYTHON={sys.executable}",
        f"GPU_OUTPUT={tmp_path}",
        "ARGS=--dry_run --minutes 60",
    ]
    done = subprocess.run([*command], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    joined = json.loads((tmp_path / "gpu_check.json").read_text())
    assert joined["parts"].keys() == PARTS.keys() and joined["dry_run"]
    assert all(record["problems"] == [] for record in joined["parts"].values())
