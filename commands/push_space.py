"""`empathic push-space`: push the web page as a Space that serves a model from the Hub."""

import tempfile
from pathlib import Path

from . import add_command
from .demo import add_page_options, find_examples
from .push import add_hub_options, hub_options


def push_space(
    model: str,
    repo_id: str,
    *,
    compare: str | None = None,
    options=None,
    zero_gpu: bool = False,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """
    Push the page as a Space, in one commit: app, card, requirements and the modules of this package that it needs.

    Args:
        model, compare: Hub ids of the models; the Space loads the models from the Hub.
        repo_id: `owner/name` of the Space, created if it does not exist.
        options: options of the page, an `empathic.demo.app.PageOptions`. Its examples travel to the Space.
        zero_gpu: whether the Space is for ZeroGPU instead of Docker.
        private, token, revision, commit_message: see `hub.push_dataset`.

    Returns:
        The address of the Space.

    Raises:
        PushError: if a model is not on the Hub, or the Hub refuses the push.
    """
    from ..demo.space import space_files
    from ..hub.client import Patterns, PushError, push_files

    for name in (model, compare):
        if name is not None and (Path(name).exists() or name.count("/") != 1):
            raise PushError(f"{name}: a Space loads its model from the Hub. Push it with `empathic push`; give its id.")
    stale: Patterns = {"": ("*.py", "Dockerfile")}
    stale |= {folder: ("*.py",) for folder in ("empathic", "empathic/demo", "empathic/serve")}
    stale |= {"empathic/demo/static": ("*",), "examples": ("*",)}
    return push_files(
        {**space_files(repo_id, model, compare, options, zero_gpu)},
        stale,
        repo_id,
        repo_type="space",
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message or f"Push the page of {model}",
        needs=[name for name in (model, compare) if name is not None],
        space_sdk="gradio" if zero_gpu else "docker",
    )


def run(arguments) -> int:
    from ..demo.app import PageOptions

    with tempfile.TemporaryDirectory() as folder:
        options = PageOptions(
            megabytes=arguments.max_upload_mb,
            seconds=arguments.max_seconds,
            concurrency=arguments.concurrency,
            max_new_tokens=arguments.max_new_tokens,
            compare_name=arguments.compare_name,
            examples=find_examples(arguments.examples, Path(folder)),
        )
        url = push_space(
            arguments.model,
            arguments.id,
            compare=arguments.compare,
            options=options,
            zero_gpu=arguments.zero_gpu,
            **hub_options(arguments),
        )
    print(f"The page of {arguments.model} is at {url}")
    if arguments.zero_gpu:
        print("Choose ZeroGPU as the hardware in the Space's settings; without it, the Space runs on its CPU or GPU.")
    print("If the model is private, add a token with read access as the secret HF_TOKEN in the Space's settings.")
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "push-space",
        run,
        "push the web page as a Space that serves a model from the Hub, private by default",
        "empathic push-space me/my-chatbot me/my-chatbot-demo",
    )
    sub.add_argument("model", metavar="MODEL", help="Hub id of the model")
    sub.add_argument("id", metavar="ID", help="owner/name of the Space")
    sub.add_argument(
        "--zero_gpu",
        action="store_true",
        help="make a Gradio Space for ZeroGPU, which has a GPU only during a reply; nothing is kept between turns, "
        "and there is no live emotion (default: a Docker Space)",
    )
    add_page_options(sub)
    add_hub_options(sub)
