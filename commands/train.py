"""`empathic train`: train one stage, through `accelerate launch`."""

from ..processes import launch
from . import add_command


def run(arguments, rest: list[str]) -> int:
    return launch("empathic.trainers.train", ["--config", arguments.config, *rest], arguments.accelerate_config)


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
