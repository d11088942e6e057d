"""`empathic train --hf_jobs`: the real client starts a job on a server of this machine, and what the job is told to run
is run here, with a stand-in for uv."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from empathic.cli import main
from empathic.hub import jobs
from empathic.trainers import train

ROOT = Path(__file__).parents[2]
USER, TOKEN = "me", "hf_of_me"
MODEL, DATA = f"{USER}/memory", f"{USER}/meld"
BASIC = ["train", "--config", "recipes/tiny/dialogue.yaml", "--hf_jobs", "a10g-small"]
GIVEN = ["--dataset_name", DATA, "--model_name_or_path", MODEL, "--hub_model_id", f"{USER}/dialogue"]


@pytest.fixture(autouse=True)
def on_the_hub(hub):
    """What the job reads."""
    for id, kind in ((MODEL, "model"), (DATA, "dataset")):
        hub.create(USER, id.split("/")[1], None, kind, private=True)


def test_a_job_trains_the_recipe_with_its_data_and_its_result_on_the_hub(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*GIVEN, "--learning_rate", "5e-4", "--run_name", "it's here"]
    assert (
        main([*BASIC, *options, "--hf_jobs_timeout", "90m", "--accelerate_config", "accelerate_configs/cpu.yaml"]) == 0
    )
    [(id, job)] = hub.jobs.items()
    shown = capsys.readouterr().out
    assert f"/jobs/{USER}/{id}" in shown and f"{hub.url}/{USER}/dialogue" in shown and f"hf jobs logs {id}" in shown
    assert (job["flavor"], job["timeoutSeconds"], job["dockerImage"]) == ("a10g-small", 5400, jobs.IMAGE)
    assert job["secrets"] == {"HF_TOKEN": TOKEN} and TOKEN not in str(job["command"]) + str(job["environment"])

    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "uv").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > arguments\n')
    (tools / "uv").chmod(0o755)
    machine = tmp_path / "machine"
    machine.mkdir()
    environment = {**job["environment"], "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([*job["command"], *job["arguments"]], cwd=machine, env=environment, check=True)
    words = (machine / "arguments").read_text().splitlines()
    assert words[:4] == ["run", "--no-project", "--with", jobs.default_package()]
    assert words[4:8] == ["empathic", "train", "--config", "recipe.yaml"]
    recipe = yaml.safe_load((machine / "recipe.yaml").read_text())
    assert recipe == yaml.safe_load((ROOT / "recipes/tiny/dialogue.yaml").read_text())
    monkeypatch.chdir(machine)
    assert words[8:10] == ["--accelerate_config", "accelerate_configs/cpu.yaml"]
    script, args, model_args = train.parse(["--config", "recipe.yaml", *words[10:]])
    assert script.dataset_name == [DATA] and model_args.model_name_or_path == MODEL
    assert args.push_to_hub and args.hub_model_id == f"{USER}/dialogue" and args.hub_private_repo
    assert args.learning_rate == 5e-4 and args.run_name == "it's here"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--dataset_name": "runs/data/meld"}, "a job reads its data and its model from the Hub"),
        ({"--dataset_name": "."}, "a job reads its data and its model from the Hub"),
        ({"--model_name_or_path": "/models/memory"}, "a job reads its data and its model from the Hub"),
        ({"--hub_model_id": None}, "a job's disk is deleted at its end"),
        ({"--chat_template": "mine.jinja"}, "a job does not have this file"),
        ({"--accelerate_config": "setup.cfg"}, "a job has only the files of this package"),
        ({"--dataset_name": f"{USER}/other"}, "Push it first"),
        ({"--model_name_or_path": f"{USER}/other"}, "Push it first"),
        ({"--hf_jobs": "a-thousand-gpus"}, "Invalid flavor: a-thousand-gpus"),
        ({"--hf_jobs_timeout": "soon"}, "the time limit 'soon'"),
    ],
)
def test_what_a_job_could_not_do_is_refused_before_it_costs_anything(hub, capsys, changes, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = dict(zip(GIVEN[::2], GIVEN[1::2], strict=True)) | {"--hf_jobs": "a10g-small"} | changes
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    assert main(["train", "--config", "recipes/tiny/dialogue.yaml", *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not hub.jobs


def test_without_a_token_the_remedy_is_said(hub, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "get_token", lambda: None)
    assert main([*BASIC, *GIVEN]) == 1
    assert "hf auth login" in capsys.readouterr().err and not hub.jobs
    monkeypatch.setattr(jobs, "get_token", lambda: "hf_of_nobody")
    assert main([*BASIC, *GIVEN]) == 1
    assert not hub.jobs
