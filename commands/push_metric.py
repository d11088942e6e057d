"""`empathic push-metric`: one of the metrics as a Space, from which `evaluate.load(ID)` takes it."""

import sys
from pathlib import Path

from empathic.commands import add_command
from empathic.commands.push import add_hub_options, hub_options

MODULES = Path(__file__).parents[1] / "evaluation" / "modules"


def names() -> list[str]:
    """The metrics that there are."""
    return sorted(path.parent.name for path in MODULES.glob("*/README.md"))


def push_metric(
    name: str,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """
    Pushes a metric's folder as a Space, in one commit.

    Args:
        name: of the metric, see `names`.
        repo_id: `owner/name` of the Space; made if it is not there. `evaluate` loads the file that is called like the
            Space, so it must bear the metric's name.
        private, token, revision, commit_message: see `hub.push_dataset`.

    Returns:
        The address of the Space.

    Raises:
        PushError: for a metric that there is none of, another name, or a Hub that does not take it.
    """
    from empathic.hub import Patterns, PushError, push_files

    if name not in names():
        raise PushError(f"There is no metric {name!r}; there are {', '.join(names())}.")
    if repo_id.split("/")[-1] != name:
        raise PushError(f"{repo_id}: the Space of this metric must be called {name}, as OWNER/{name} is.")
    stale: Patterns = {"": ("*.py",)}
    files = {path.name: path.read_bytes() for path in sorted((MODULES / name).iterdir()) if path.is_file()}
    return push_files(
        files,
        stale,
        repo_id,
        repo_type="space",
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message or f"Push metric {name}",
    )


def run(arguments) -> int:
    from empathic.hub import PushError

    try:
        url = push_metric(
            arguments.name,
            arguments.id,
            **hub_options(arguments),
        )
    except PushError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.name} is at {url}")
    return 0


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "push-metric",
        run,
        "push a metric to the Hub as a Space, for your eyes only; `evaluate.load(ID)` loads it from there",
        "empathic push-metric emotion_score me/emotion_score",
    )
    sub.add_argument("name", choices=names(), metavar="NAME", help=", ".join(names()))
    sub.add_argument("id", metavar="ID", help="owner/NAME on the Hub")
    add_hub_options(sub)
