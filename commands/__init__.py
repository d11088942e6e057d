"""The commands of `empathic`, one module each. A module imports heavy packages only when its command runs."""

import argparse
from collections.abc import Sequence

from ..errors import OPTION


def add_command(
    commands, name: str, run, help_text: str, example: str, aliases: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add a command whose help shows an example; `run(arguments)` returns the exit status."""
    parser = commands.add_parser(
        name,
        aliases=aliases,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    if run is not None:  # not for a group of commands
        parser.add_argument(OPTION, action="store_true", help="show the traceback of an error")
    return parser
