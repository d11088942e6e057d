"""`empathic prepare-features`: cache the outputs of the frozen encoders, through `accelerate launch`."""

from ..processes import launch
from . import add_command


def run(arguments, rest: list[str]) -> int:
    options = ["--config", arguments.config, *rest]
    return launch("empathic.trainers.prepare_features", options, arguments.accelerate_config)


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "prepare-features",
        run,
        "cache the outputs of the frozen encoders for each clip, so that training need not decode or encode clips",
        "empathic prepare-features --config recipes/tiny/emotion.yaml --feature_cache runs/features --frame_draws 4",
    )
    sub.set_defaults(takes_rest=True)
    sub.add_argument("--config", required=True, help="YAML file of the stage that will be trained from the cache")
    sub.add_argument("--accelerate_config", help="configuration file for `accelerate launch`")
