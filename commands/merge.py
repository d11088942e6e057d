"""`empathic merge`: one whole model of a stage's folder."""

import sys

from empathic.commands import add_command


def run(arguments) -> int:
    from empathic.trainers.checkpoint import merge

    try:
        merge(arguments.folder, arguments.output, dtype=arguments.dtype)
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 1
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
    sub.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="what the model is merged and saved in; auto: as its base",
    )
