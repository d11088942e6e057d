"""`empathic push`: a data set, preference pairs, a stage or a model to the Hub."""

import sys

from empathic.commands import add_command


def add_push_options(parser) -> None:
    """The options of commands that write a data set and may push it at once."""
    parser.add_argument("--push-to-hub", metavar="ID", help="push what was written to this private repository")
    add_licence_option(parser)


def add_licence_option(parser) -> None:
    """The option of all that pushes data."""
    parser.add_argument(
        "--i-may-redistribute",
        action="store_true",
        help="you have the right to pass the corpus on, whatever its licence",
    )


def add_hub_options(parser) -> None:
    """The options of every push."""
    parser.add_argument("--public", action="store_true", help="for everybody's eyes")
    parser.add_argument("--token", help="of the Hub; better: log in with `hf auth login`, or set HF_TOKEN")
    parser.add_argument("--revision", help="branch; made if it is not there (main)")
    parser.add_argument("--message", help="of the commit")


def hub_options(arguments) -> dict:
    """What those say, as the pushing functions take it."""
    return {
        "private": not arguments.public,
        "token": arguments.token,
        "revision": arguments.revision,
        "commit_message": arguments.message,
    }


def push_written(arguments, folder: str) -> int:
    """Pushes a data set if `--push-to-hub` asks for it; returns the exit status."""
    if arguments.push_to_hub is None:
        return 0
    from empathic.hub import PushError, push_dataset

    try:
        url = push_dataset(folder, arguments.push_to_hub, i_may_redistribute=arguments.i_may_redistribute)
    except PushError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder} is at {url}")
    return 0


def run(arguments) -> int:
    from empathic.hub import PushError, kind_of, push_dataset

    options = hub_options(arguments)
    try:
        if kind_of(arguments.folder) in ("dataset", "pairs"):
            if arguments.base is not None:
                raise PushError(f"{arguments.folder}: is a data set and has no base; leave --base out.")
            options["i_may_redistribute"] = arguments.i_may_redistribute
            url = push_dataset(arguments.folder, arguments.id, **options)
        else:
            from empathic.hub_model import push_model

            url = push_model(arguments.folder, arguments.id, base=arguments.base, **options)
    except PushError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.folder} is at {url}")
    return 0


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "push",
        run,
        "push a data set, preference pairs, a stage's folder or a whole model to the Hub, for your eyes only",
        "empathic push runs/quickstart/model me/my-chatbot",
    )
    sub.add_argument("folder", metavar="FOLDER", help="what `prepare`, `counter`, `train` or `merge` wrote")
    sub.add_argument("id", metavar="ID", help="owner/name on the Hub")
    add_licence_option(sub)
    sub.add_argument("--base", help="of a stage that stands on a folder: where that base was pushed to")
    add_hub_options(sub)
