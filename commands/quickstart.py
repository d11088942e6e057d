"""`empathic quickstart`: train and evaluate the tiny preset."""

from . import add_command


def run(arguments) -> int:
    from ..quickstart import quickstart

    quickstart(arguments.output)
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "quickstart",
        run,
        "train all five stages of the tiny preset and show the effect of each stage",
        "empathic quickstart --output runs/quickstart",
    )
    sub.add_argument("--output", default="runs/quickstart", help="folder to write; a stopped run resumes (%(default)s)")
