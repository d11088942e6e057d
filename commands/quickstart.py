"""`empathic quickstart`."""

from empathic.commands import add_command


def run(arguments) -> int:
    from empathic.quickstart import quickstart

    quickstart(arguments.output)
    return 0


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "quickstart",
        run,
        "train all five stages of the tiny preset and show what each taught",
        "empathic quickstart --output runs/quickstart",
    )
    sub.add_argument("--output", default="runs/quickstart", help="folder; a run that was stopped goes on (%(default)s)")
