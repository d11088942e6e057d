"""`empathic train`: train one stage, through `accelerate launch`, or as a job of the Hub."""

import argparse
from pathlib import Path

from ..files import packaged
from ..processes import launch
from . import add_command

# Options that name what a stage reads, all of which must be on the Hub for a job; and files that a job does not have.
DATA, MODELS = "dataset_name", ("model_name_or_path", "text", "vision", "audio", "memory")
FILES = ("chat_template", "feature_cache")
PACKAGE = Path(__file__).parents[1]


def run(arguments, rest: list[str]) -> int:
    if arguments.hf_jobs is not None:
        return run_job(arguments, rest)
    return launch("empathic.trainers.train", ["--config", arguments.config, *rest], arguments.accelerate_config)


def named_options(recipe: str, rest: list[str]) -> dict:
    """Return the values of a recipe, replaced by those of the command line, for the options that a job depends on."""
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{DATA}", nargs="+")
    for name in (*MODELS, *FILES, "hub_model_id"):
        parser.add_argument(f"--{name}")
    found = yaml.safe_load(recipe) or {}
    given, _ = parser.parse_known_args(rest)
    return found | {name: value for name, value in vars(given).items() if value is not None}


def run_job(arguments, rest: list[str]) -> int:
    """
    Start the stage as a job of the Hub.

    Raises:
        JobError: if the stage reads local files, or its result would be lost, or the Hub rejects the job.
    """
    from ..hub.jobs import JobError, submit_training
    from ..hub.model_card import hub_id

    recipe = Path(packaged(arguments.config)).read_text(encoding="utf-8")
    options = named_options(recipe, rest)
    data = options.get(DATA) or []
    data = [data] if isinstance(data, str) else data
    models = [options[name] for name in MODELS if options.get(name) is not None]
    for name in (*data, *models):
        if hub_id(name) is None:
            raise JobError(
                f"{name}: a job reads its data and its model from the Hub. Push it with `empathic push` and give its "
                f"id: `--{DATA} ID`, `--model_name_or_path ID`."
            )
    for name in FILES:
        if options.get(name) is not None:
            raise JobError(f"{name} is {options[name]}: a job does not have this file. Leave the option out.")
    if not options.get("hub_model_id"):
        raise JobError("hub_model_id is missing: a job's disk is deleted at its end. Give --hub_model_id OWNER/NAME.")
    launcher = arguments.accelerate_config
    if launcher is not None:
        if not launcher.startswith("accelerate_configs/") or not (PACKAGE / launcher).is_file():
            raise JobError(f"{launcher}: a job has only the files of this package. Use one of accelerate_configs/.")
        rest = ["--accelerate_config", launcher, *rest]
    job = submit_training(
        recipe,
        [*rest, "--push_to_hub", "True"] if "--push_to_hub" not in rest else rest,
        arguments.hf_jobs,
        package=arguments.hf_jobs_package,
        timeout=arguments.hf_jobs_timeout,
        datasets=data,
        models=models,
    )
    print(f"The job {job.id} trains on {arguments.hf_jobs}: {job.url}")
    print(f"Its result will be at {job.endpoint}/{options['hub_model_id']}")
    print(f"Follow it with `hf jobs logs {job.id}`, stop it with `hf jobs cancel {job.id}`.")
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "train",
        run,
        "train one stage; further options override those of the YAML file",
        "empathic train --config recipes/tiny/emotion.yaml --learning_rate 5e-4",
    )
    sub.set_defaults(takes_rest=True)
    sub.add_argument("--config", required=True, help="YAML file of the stage")
    sub.add_argument("--accelerate_config", help="configuration file for `accelerate launch`")
    sub.add_argument(
        "--hf_jobs",
        metavar="FLAVOR",
        help="train as a job of the Hub on this hardware (`hf jobs hardware` lists it), with data and models of the "
        "Hub, and push the result to --hub_model_id",
    )
    sub.add_argument(
        "--hf_jobs_timeout", metavar="TIME", default="24h", help="the Hub ends the job after this time (%(default)s)"
    )
    sub.add_argument(
        "--hf_jobs_package",
        metavar="REQUIREMENT",
        help="what the job installs, such as a Git address (default: this version of empathic[train])",
    )
