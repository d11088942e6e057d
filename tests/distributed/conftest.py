"""How runs under several strategies are started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TYPES = {"cpu": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """
    A function (strategy, runs) that starts training runs, as `launch_on_cpu.py` takes them, under one of the
    repository's accelerate files, on two processes of the CPU, with more `environment`. AssertionError, with what they
    printed, if they fail, or with `succeeds=False` if they do not.
    """

    def launch(strategy, runs, succeeds=True, processes=2, timeout=600, environment=None):
        folder = tmp_path_factory.mktemp("launch")
        config = yaml.safe_load((ROOT / "accelerate_configs" / f"{strategy}.yaml").read_text(encoding="utf-8"))
        config |= {"num_processes": processes, "mixed_precision": "no", "use_cpu": TYPES[strategy] != "DEEPSPEED"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        jobs = {"type": TYPES[strategy], "processes": processes, "runs": runs}
        (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
        command += ["--main_process_port", "0", str(ROOT / "tests/distributed/launch_on_cpu.py")]
        done = subprocess.run(
            [*command, str(folder / "jobs.json")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert (done.returncode == 0) == succeeds, done.stdout[-6000:]

    return launch
