"""`empathic push-space`: the web page with a model of the Hub, as a Space."""

import sys
from pathlib import Path

from empathic.commands import add_command
from empathic.commands.demo import add_limit_options
from empathic.commands.push import add_hub_options, hub_options


def push_space(
    model: str,
    repo_id: str,
    *,
    compare: str | None = None,
    limits=None,
    concurrency: int = 1,
    max_new_tokens: int = 128,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """
    Pushes the page as a Space, in one commit: app, card, requirements and what it needs of this package.

    Args:
        model, compare: ids on the Hub; the Space loads them from there.
        repo_id: `owner/name` of the Space; made if it is not there.
        limits: `empathic.demo.uploads.Limits` of what visitors send.
        concurrency, max_new_tokens: of the page.
        private, token, revision, commit_message: see `hub.push_dataset`.

    Returns:
        The address of the Space.

    Raises:
        PushError: for a model that is not on the Hub, or a Hub that does not take the Space.
    """
    from empathic.demo.space import space_files
    from empathic.hub import Patterns, PushError, push_files

    for name in (model, compare):
        if name is not None and (Path(name).exists() or name.count("/") != 1):
            raise PushError(f"{name}: a Space loads its model from the Hub. Push it with `empathic push`, give its id.")
    stale: Patterns = {folder: ("*.py",) for folder in ("", "empathic", "empathic/demo")}
    return push_files(
        {**space_files(repo_id, model, compare, limits, concurrency, max_new_tokens)},
        stale,
        repo_id,
        repo_type="space",
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message or f"Push the page of {model}",
        needs=[name for name in (model, compare) if name is not None],
    )


def run(arguments) -> int:
    try:
        from empathic.demo.uploads import Limits
        from empathic.hub import PushError
    except ImportError as error:
        print(f"{error}. Install what is missing with `pip install empathic[demo,train]`.", file=sys.stderr)
        return 1

    try:
        url = push_space(
            arguments.model,
            arguments.id,
            compare=arguments.compare,
            limits=Limits(megabytes=arguments.max_upload_mb, seconds=arguments.max_seconds),
            concurrency=arguments.concurrency,
            max_new_tokens=arguments.max_new_tokens,
            **hub_options(arguments),
        )
    except PushError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The page of {arguments.model} is at {url}")
    print("If the model is private, add a token that may read it as the secret HF_TOKEN in the Space's settings.")
    return 0


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "push-space",
        run,
        "push the web page with a model of the Hub as a Space, for your eyes only",
        "empathic push-space me/my-chatbot me/my-chatbot-demo",
    )
    sub.add_argument("model", metavar="MODEL", help="id of the model on the Hub")
    sub.add_argument("id", metavar="ID", help="owner/name of the Space")
    add_limit_options(sub)
    add_hub_options(sub)
