"""`empathic merge`: one whole model of a stage's folder."""

from empathic.commands import add_command


def run(arguments) -> int:
    from empathic.trainers.checkpoint import merge

    merge(arguments.folder, arguments.output)
    print(f"One whole model is in {arguments.output}.")
    return 0


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "merge",
        run,
        "make one whole model of a stage's folder: adapters merged, all parts in place",
        "empathic merge runs/epo model",
    )
    sub.add_argument("folder", metavar="FOLDER", help="output folder of a stage")
    sub.add_argument("output", metavar="OUT", help="folder to write")
