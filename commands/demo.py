"""`empathic demo`: a web page on which people talk to a model."""

import sys

from empathic.commands import add_command


def add_limit_options(sub) -> None:
    """The options of the page that a Space has too."""
    sub.add_argument("--compare", metavar="MODEL2", help="a second model, such as the one before EPO, to compare with")
    sub.add_argument("--concurrency", type=int, default=1, help="turns answered at once; others wait (%(default)s)")
    sub.add_argument("--max_upload_mb", type=float, default=32, help="size of an upload at most (%(default)s)")
    sub.add_argument("--max_seconds", type=float, default=60, help="length of a clip at most (%(default)s)")
    sub.add_argument("--max_new_tokens", type=int, default=128, help="length of a reply at most (%(default)s)")


def run(arguments) -> int:
    try:
        from empathic.demo.app import Page
    except ImportError as error:
        print(f"The page needs Gradio ({error}). Install it with `pip install empathic[demo]`.", file=sys.stderr)
        return 1
    from empathic.demo.examples import read_examples
    from empathic.demo.session import Chatbot, Checkpoint
    from empathic.demo.uploads import Limits

    try:
        examples = read_examples(arguments.examples) if arguments.examples else []
        checkpoint = Checkpoint.from_pretrained(arguments.model, arguments.device)
        other = Checkpoint.from_pretrained(arguments.compare, arguments.device) if arguments.compare else None
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    chatbot = Chatbot(checkpoint, other, arguments.max_new_tokens, arguments.max_memories)
    limits = Limits(megabytes=arguments.max_upload_mb, seconds=arguments.max_seconds)
    page = Page(chatbot, limits, arguments.concurrency, examples=examples)
    page.launch(server_name=arguments.host, server_port=arguments.port, share=False)
    return 0


def add(commands) -> None:
    """Adds the command."""
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
    sub.add_argument("--max_memories", type=int, help="utterances kept as vectors in the prompt at most (default: all)")
    sub.add_argument("--device", help="where the models run, such as cuda:1 (default: a GPU if there is one)")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one (%(default)s)")
    sub.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860)")
