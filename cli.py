"""The `empathic` command."""

import argparse
import sys
from importlib.metadata import version

from .commands import (
    chat,
    counter,
    demo,
    evaluate,
    export,
    merge,
    prepare,
    prepare_features,
    push,
    push_metric,
    push_space,
    quickstart,
    rounds,
    serve,
    study,
    train,
)
from .errors import OPTION, run_program, take_option
from .processes import leave


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="empathic", description="An audio-visual chatbot that hears how it is said.")
    parser.add_argument(OPTION, action="store_true", help="show the traceback of an error; for every command")
    parser.add_argument("--version", action="version", version=f"empathic {version('empathic')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        quickstart,
        prepare,
        prepare_features,
        counter,
        train,
        rounds,
        evaluate,
        study,
        merge,
        export,
        push,
        push_metric,
        push_space,
        chat,
        demo,
        serve,
    ):
        module.add(commands)
    return parser


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    """Return the names of all options of a parser and its subcommands, as they were declared."""
    names = set()
    for action in parser._actions:
        names.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                names |= option_names(command)
    return names


def as_declared(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """
    Return the command line with every option name as it was declared: `--num-workers` becomes `--num_workers`. Names
    that the parser does not know stay as they are; transformers' parser, which reads them, takes both spellings.
    """
    declared = {name.replace("-", "_"): name for name in option_names(parser)}

    def spelled(token: str) -> str:
        name, equals, value = token.partition("=")
        return declared.get(name.replace("-", "_"), name) + equals + value if name.startswith("--") else token

    return [spelled(token) for token in argv]


def main(argv: list[str] | None = None) -> int:
    """
    Run a command and return its exit status; an error is shown in one or two lines, see `errors.run_program`. A command
    that `takes_rest` also gets the unknown arguments.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    take_option(argv)
    parser = build_parser()
    arguments, rest = parser.parse_known_args(as_declared(parser, argv))
    takes_rest = getattr(arguments, "takes_rest", False)
    if rest and not takes_rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    name = ["empathic", arguments.command, getattr(arguments, "table", None), getattr(arguments, "what", None)]
    rest = [rest] if takes_rest else []
    return run_program(" ".join(filter(None, name)), lambda: arguments.run(arguments, *rest), argv)


if __name__ == "__main__":
    leave(main())
