"""`empathic merge`: convert a stage's folder into a whole model."""

from . import add_command


def run(arguments) -> int:
    from ..trainers.checkpoints.stage_folder import merge

    merge(arguments.folder, arguments.output, dtype=arguments.dtype)
    print(f"The whole model is in {arguments.output}.")
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "merge",
        run,
        "convert a stage's folder into a whole model: all parts in one folder, adapters merged",
        "empathic merge runs/epo model",
    )
    sub.add_argument("folder", metavar="FOLDER", help="output folder of a stage")
    sub.add_argument("output", metavar="OUT", help="folder to write")
    sub.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="data type of the saved model; auto: that of its base (%(default)s)",
    )
