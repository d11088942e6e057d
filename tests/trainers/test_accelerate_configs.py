"""The files of `accelerate_configs/`, read by accelerate itself."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).parents[2] / "accelerate_configs"
NAMES = ("cpu", "fsdp2", "multi_gpu", "multi_node", "zero2", "zero2_offload", "zero3", "zero3_offload")


def test_all_files_are_there():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name):
    file = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(file))  # an unknown key is an error
    wanted = {"cpu": "MULTI_GPU", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type == wanted
    # The launcher takes the keys of the inner tables as its own options, and ignores unknown keys.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    inner = [key for table in ("deepspeed_config", "fsdp_config") for key in given.get(table, {})]
    assert not [key for key in inner if key not in known]
    assert len(inner) > 1 or wanted == "MULTI_GPU"
    assert config.num_processes >= 2 and config.mixed_precision == ("no" if name == "cpu" else "bf16")


def test_the_slurm_script_starts_every_machine(tmp_path):
    """Slurm's and accelerate's commands are replaced by commands that only print."""
    commands = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "accelerate": 'printf "%s|" "$@"; echo',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run(
        ["bash", str(FOLDER / "multi_node.slurm"), "recipes/qwen2.5-7b/dialogue.yaml", "--seed", "a b"],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    assert [line[line.index("--machine_rank") + 1] for line in lines] == ["0", "1"]
    for line in lines:
        options = launch_command_parser().parse_args(line[1:])
        assert (options.num_machines, options.num_processes, options.main_process_ip) == (2, 16, "node1")
        assert options.module and options.training_script == "empathic.trainers.train"
        assert options.training_script_args[:2] == ["--config", "recipes/qwen2.5-7b/dialogue.yaml"]
        assert options.training_script_args[-2:] == ["--seed", "a b"]
        assert "--resume_from_checkpoint auto" in " ".join(options.training_script_args)
    without = subprocess.run(["bash", str(FOLDER / "multi_node.slurm")], capture_output=True, text=True)
    assert without.returncode != 0 and "YAML file" in without.stderr
