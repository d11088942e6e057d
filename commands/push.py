"""`empathic push`: push a data set, preference pairs, a stage or a model to the Hub."""

from . import add_command


def add_push_options(parser) -> None:
    """Add the options of commands that write a data set and can push it."""
    parser.add_argument("--push_to_hub", metavar="ID", help="push the output to this private repository")
    add_licence_option(parser)


def add_licence_option(parser) -> None:
    """Add the option of all commands that push data."""
    parser.add_argument(
        "--i_may_redistribute",
        action="store_true",
        help="confirm that you have the right to redistribute the corpus, whatever its license",
    )


def add_hub_options(parser) -> None:
    """Add the options of all push commands."""
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument("--token", help="Hub token; better: log in with `hf auth login`, or set HF_TOKEN")
    parser.add_argument("--revision", help="branch, created if it does not exist (default: main)")
    parser.add_argument("--message", help="commit message")


def hub_options(arguments) -> dict:
    """Convert the options of `add_hub_options` into arguments of the push functions."""
    return {
        "private": not arguments.public,
        "token": arguments.token,
        "revision": arguments.revision,
        "commit_message": arguments.message,
    }


def push_written(arguments, folder: str) -> int:
    """Push a data set if `--push_to_hub` was given; return the exit status."""
    if arguments.push_to_hub is None:
        return 0
    from ..hub import push_dataset

    url = push_dataset(folder, arguments.push_to_hub, i_may_redistribute=arguments.i_may_redistribute)
    print(f"{folder} is at {url}")
    return 0


def run(arguments) -> int:
    from ..hub import PushError, kind_of, push_dataset

    options = hub_options(arguments)
    if kind_of(arguments.folder) in ("dataset", "pairs"):
        if arguments.base is not None:
            raise PushError(f"{arguments.folder} is a data set and has no base; remove --base.")
        if arguments.handler:
            raise PushError(f"{arguments.folder} is a data set, which no endpoint runs; remove --handler.")
        options["i_may_redistribute"] = arguments.i_may_redistribute
        url = push_dataset(arguments.folder, arguments.id, **options)
    else:
        from ..hub.models import push_model

        url = push_model(arguments.folder, arguments.id, base=arguments.base, handler=arguments.handler, **options)
    print(f"{arguments.folder} is at {url}")
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "push",
        run,
        "push a data set, preference pairs, a stage's folder or a whole model to the Hub, private by default",
        "empathic push runs/quickstart/model me/my-chatbot",
    )
    sub.add_argument("folder", metavar="FOLDER", help="output folder of `prepare`, `counter`, `train` or `merge`")
    sub.add_argument("id", metavar="ID", help="owner/name on the Hub")
    add_licence_option(sub)
    sub.add_argument("--base", help="Hub id of the pushed base, for a stage whose base is a local folder")
    sub.add_argument(
        "--handler",
        action="store_true",
        help="with a model: also push a handler.py for Inference Endpoints",
    )
    add_hub_options(sub)
