"""Train on the Hub's machines: a stage as a job of the Hub, its data and its results there."""

import shlex
from collections.abc import Sequence
from importlib.metadata import version

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

RECIPE = "EMPATHIC_RECIPE"  # environment variable of the job with the recipe's YAML
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"  # the Hub's own choice for Python scripts
TIMEOUT = "24h"


class JobError(ValueError):
    """Raised if a job cannot be started. The message says why, and how to fix it."""


def default_package() -> str:
    """The requirement that a job installs: this version, from the package index."""
    return f"empathic[train]=={version('empathic')}"


def job_command(package: str, options: list[str]) -> list[str]:
    """Return the job's command: write the recipe to a file, install the package, and train."""
    training = ["uv", "run", "--no-project", "--with", package, "empathic", "train", "--config", "recipe.yaml"]
    return ["bash", "-c", f'printf "%s" "${RECIPE}" > recipe.yaml && exec {shlex.join([*training, *options])}']


def submit_training(
    recipe: str,
    options: list[str],
    flavor: str,
    *,
    package: str | None = None,
    timeout: str = TIMEOUT,
    datasets: Sequence[str] = (),
    models: Sequence[str] = (),
    token: str | None = None,
):
    """
    Start a job that trains a stage, and return huggingface_hub's `JobInfo`.

    Args:
        recipe: the YAML text of the stage.
        options: further options of `empathic train`.
        flavor: the hardware, such as `a100-large`; `hf jobs hardware` lists them.
        package: the requirement that is installed, by default this version of `empathic[train]`.
        timeout: the Hub ends the job after this time.
        datasets, models: ids that the stage reads; that they exist is checked before the job costs anything.

    Raises:
        JobError: without a token, for an id that the token cannot read, or if the Hub rejects the job.
    """
    token = token or get_token()
    api = HfApi(token=token or False)
    if not token:
        raise JobError("There is no token for the job. Log in with `hf auth login`, or set HF_TOKEN.")
    name = ""
    try:
        for kind, names in (("dataset", datasets), ("model", models)):
            for name in names:
                api.repo_info(name, repo_type=kind)
        name = ""
        return api.run_job(
            image=IMAGE,
            command=job_command(package or default_package(), options),
            env={RECIPE: recipe},
            # The job reads private data and pushes with the rights of this token.
            secrets={"HF_TOKEN": token},
            flavor=flavor,
            timeout=timeout,
            labels={"library": "empathic"},
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if name:
            raise JobError(
                f"{name}: the job could not read it ({status}). Push it first (`empathic push`), or use a token that "
                "can read it."
            ) from error
        reasons = {
            401: "The Hub does not know the token. Log in again with `hf auth login`.",
            402: f"Jobs need credit: {api.endpoint}/settings/billing",
            403: f"The token may not start jobs. Create one with this right: {api.endpoint}/settings/tokens",
        }
        raise JobError(reasons.get(status, f"The Hub rejected the job on {flavor!r}: {error}")) from error
    except (HTTPError, OSError) as error:
        raise JobError(f"The Hub cannot be reached ({str(error) or type(error).__name__}). Try again.") from error
    except ValueError as error:
        raise JobError(f"The job cannot be started on {flavor!r} with the time limit {timeout!r}: {error}") from error
