"""`empathic push-metric`: push a metric as a Space, from which `evaluate.load(ID)` loads it."""

from pathlib import Path

from . import add_command
from .push import add_hub_options, hub_options

MODULES = Path(__file__).parents[1] / "evaluation" / "modules"


def names() -> list[str]:
    """The names of all metrics."""
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
    Push a metric's folder as a Space, in one commit.

    Args:
        name: name of the metric, see `names`.
        repo_id: `owner/name` of the Space, created if it does not exist. `evaluate` loads the file that has the name of
            the Space, so the Space must have the name of the metric.
        private, token, revision, commit_message: see `hub.push_dataset`.

    Returns:
        The address of the Space.

    Raises:
        PushError: if the metric does not exist, the Space has another name, or the Hub refuses the push.
    """
    from ..hub.client import Patterns, PushError, push_files

    if name not in names():
        raise PushError(f"Unknown metric {name!r}; choose one of {', '.join(names())}.")
    if repo_id.split("/")[-1] != name:
        raise PushError(f"{repo_id}: the Space of this metric must be called {name}; give OWNER/{name}.")
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
    url = push_metric(arguments.name, arguments.id, **hub_options(arguments))
    print(f"{arguments.name} is at {url}")
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "push-metric",
        run,
        "push a metric to the Hub as a Space, private by default; `evaluate.load(ID)` loads it from there",
        "empathic push-metric emotion_score me/emotion_score",
    )
    sub.add_argument("name", choices=names(), metavar="NAME", help=", ".join(names()))
    sub.add_argument("id", metavar="ID", help="OWNER/NAME on the Hub")
    add_hub_options(sub)
