"""The `empathic` command."""

import argparse
import sys

from empathic.commands import (
    chat,
    counter,
    demo,
    evaluate,
    merge,
    prepare,
    prepare_features,
    push,
    push_metric,
    push_space,
    quickstart,
    study,
    train,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(prog="empathic", description="An audio-visual chatbot that hears how it is said.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        quickstart,
        prepare,
        prepare_features,
        counter,
        train,
        evaluate,
        study,
        merge,
        push,
        push_metric,
        push_space,
        chat,
        demo,
    ):
        module.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status. What the parser does not know goes to a command that `takes_rest`."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if getattr(arguments, "takes_rest", False):
        return arguments.run(arguments, rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
