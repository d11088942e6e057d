"""`empathic demo`: a web page for talking to a model."""

import signal
import sys

from . import add_command


def add_limit_options(sub) -> None:
    """Add the options that the local page and a Space share."""
    sub.add_argument("--compare", metavar="MODEL2", help="a second model to compare with, such as the model before EPO")
    sub.add_argument("--concurrency", type=int, default=1, help="turns answered at once; others wait (%(default)s)")
    sub.add_argument("--max_upload_mb", type=float, default=32, help="maximum size of an upload in MB (%(default)s)")
    sub.add_argument("--max_seconds", type=float, default=60, help="maximum length of a clip in seconds (%(default)s)")
    sub.add_argument("--max_new_tokens", type=int, default=128, help="maximum length of a reply (%(default)s)")


def run(arguments) -> int:
    try:
        from ..demo.app import Page
    except ImportError as error:
        print(f"The page needs Gradio ({error}). Install it with `pip install empathic[demo]`.", file=sys.stderr)
        return 1
    from ..demo.examples import read_examples
    from ..demo.session import Chatbot, NamedModel
    from ..demo.uploads import Limits

    examples = read_examples(arguments.examples) if arguments.examples else []
    checkpoint = NamedModel.from_pretrained(arguments.model, arguments.device)
    other = NamedModel.from_pretrained(arguments.compare, arguments.device) if arguments.compare else None
    chatbot = Chatbot(checkpoint, other, arguments.max_new_tokens, arguments.max_memories)
    limits = Limits(megabytes=arguments.max_upload_mb, seconds=arguments.max_seconds)
    page = Page(chatbot, limits, arguments.concurrency, examples=examples)
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        page.launch(arguments.allowed_hosts, server_name=arguments.host, server_port=arguments.port, share=False)
    except KeyboardInterrupt:  # while the server starts; later, Gradio catches it
        pass
    finally:
        page.close()
        signal.signal(signal.SIGTERM, previous)
    return 0


def _end(*_) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "demo",
        run,
        "talk to a model in the browser, with text, voice and face",
        "empathic demo runs/quickstart/model --compare runs/quickstart/dialogue --examples runs/quickstart/recordings",
    )
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    add_limit_options(sub)
    sub.add_argument("--examples", metavar="DIR", help="recordings to start from, such as runs/quickstart/recordings")
    sub.add_argument(
        "--max_memories", type=int, help="maximum number of memory vectors in the prompt (default: no limit)"
    )
    sub.add_argument("--device", help="device of the models, such as cuda:1 (default: a GPU if there is one)")
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all addresses (%(default)s)"
    )
    sub.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names under which browsers reach the page, such as that of a proxy (default: localhost, this "
        "machine's name and IP addresses)",
    )
    sub.add_argument("--port", type=int, help="port to listen on (default: the first free port from 7860)")
