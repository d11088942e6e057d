"""`empathic export`: write the language model alone."""

from . import add_command


def run(arguments) -> int:
    from ..trainers.checkpoints.stage_folder import export_language_model

    export_language_model(arguments.model, arguments.output, dtype=arguments.dtype)
    print(f"The language model is in {arguments.output}.")
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "export",
        run,
        "write the language model alone, for an engine such as vLLM that runs it",
        "empathic export runs/quickstart/model language-model",
    )
    sub.add_argument("model", metavar="MODEL", help="whole model or output folder of a stage, or a Hub id")
    sub.add_argument("output", metavar="OUT", help="folder to write")
    sub.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="data type of the saved model; auto: that of the model (%(default)s)",
    )
