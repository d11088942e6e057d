"""One module a command of `empathic`: its options, and what it runs. Heavy imports wait until a command runs."""

import argparse


def add_command(commands, name: str, run, help_text: str, example: str) -> argparse.ArgumentParser:
    """Adds a command whose help shows one example; `run(arguments)` gives the exit status."""
    parser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser
