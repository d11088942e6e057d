"""`empathic train`: one stage, through `accelerate launch`."""

import os
import sys

from empathic.commands import add_command


def run(arguments, rest: list[str]) -> int:
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if arguments.accelerate_config is not None:
        launch += ["--config_file", arguments.accelerate_config]
    os.execv(sys.executable, [*launch, "-m", "empathic.trainers.train", "--config", arguments.config, *rest])


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "train",
        run,
        "train one stage; further options override those of the YAML file",
        "empathic train --config recipes/tiny/emotion.yaml --learning_rate 5e-4",
    )
    sub.set_defaults(takes_rest=True)
    sub.add_argument("--config", required=True, help="YAML file of the stage")
    sub.add_argument("--accelerate_config", help="configuration of `accelerate launch`")
