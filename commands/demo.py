"""`empathic demo`: a web page for talking to a model."""

import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from . import add_command

SAMPLE_SECONDS, SAMPLE_SEED = 2.0, 22
# The same words mean different things: only the face and the voice tell how the speaker feels.
SAMPLES = (
    ("happy", "my sister booked the flight."),
    ("sad", "my sister booked the flight."),
    ("angry", "my boss printed the letter."),
    ("surprise", "my boss printed the letter."),
)


def add_page_options(sub) -> None:
    """Add the options that the local page and a Space share."""
    sub.add_argument("--compare", metavar="MODEL2", help="a second model to compare with, such as the model before EPO")
    sub.add_argument(
        "--compare_name", metavar="NAME", help="name of the second model on the page (default: that of its folder)"
    )
    sub.add_argument("--concurrency", type=int, default=1, help="turns answered at once; others wait (%(default)s)")
    sub.add_argument("--max_upload_mb", type=float, default=32, help="maximum size of a clip in MB (%(default)s)")
    sub.add_argument("--max_seconds", type=float, default=60, help="maximum length of a clip in seconds (%(default)s)")
    sub.add_argument("--max_new_tokens", type=int, default=128, help="maximum length of a reply (%(default)s)")
    sub.add_argument(
        "--examples",
        metavar="DIR",
        help="recordings to start from, such as runs/quickstart/recordings (default: four drawn faces)",
    )


def find_examples(given: str | None, folder: Path) -> list:
    """
    Return the examples of the page.

    Args:
        given: folder of recordings; None for drawn faces with a synthetic voice, which are written to `folder`.
        folder: an empty folder.
    """
    from ..demo.examples import Example, read_examples

    if given is not None:
        return read_examples(given)
    import numpy as np

    from ..tiny.clips import write_clip

    rng, examples = np.random.default_rng(SAMPLE_SEED), []
    for emotion, text in SAMPLES:
        clip = folder / f"{emotion}.mp4"
        write_clip(clip, emotion, rng, SAMPLE_SECONDS)
        examples.append(Example((), text, clip))
    return examples


def run(arguments) -> int:
    from ..demo.app import PageOptions, serve_page

    # A signal to stop must not skip the deletion of the folder.
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="empathic-examples-") as folder, suppress(KeyboardInterrupt):
        options = PageOptions(
            megabytes=arguments.max_upload_mb,
            seconds=arguments.max_seconds,
            concurrency=arguments.concurrency,
            max_new_tokens=arguments.max_new_tokens,
            max_memories=arguments.max_memories,
            compare_name=arguments.compare_name,
            examples=find_examples(arguments.examples, Path(folder)),
        )
        serve_page(
            arguments.model,
            arguments.compare,
            options,
            device=arguments.device,
            host=arguments.host,
            port=arguments.port,
            allowed_hosts=arguments.allowed_hosts,
        )
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
    add_page_options(sub)
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
