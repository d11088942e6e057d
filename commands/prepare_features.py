"""`empathic prepare-features`: the frozen encoders' outputs, computed once, through `accelerate launch`."""

import os
import sys

from empathic.commands import add_command


def run(arguments, rest: list[str]) -> int:
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if arguments.accelerate_config is not None:
        launch += ["--config_file", arguments.accelerate_config]
    module = ["-m", "empathic.trainers.prepare_features", "--config", arguments.config]
    os.execv(sys.executable, [*launch, *module, *rest])


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "prepare-features",
        run,
        "store what the frozen encoders make of each clip, so that training decodes and encodes nothing",
        "empathic prepare-features --config recipes/tiny/emotion.yaml --feature_cache runs/features --frame_draws 4",
    )
    sub.set_defaults(takes_rest=True)
    sub.add_argument("--config", required=True, help="YAML file of the stage that will be trained from the cache")
    sub.add_argument("--accelerate_config", help="configuration of `accelerate launch`")
