"""Common code of all pushes: errors, file selection, and the commit.

A push is one commit. Large files are uploaded before it, so an interrupted push leaves the repository unchanged, and
calling it again continues with the files that are still missing.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError is from httpx, or httpx2 from version 2 on

CARD = "README.md"

# File name patterns by folder.
Patterns = dict[str, tuple[str, ...]]


class PushError(ValueError):
    """Raised if a push cannot proceed. The message says why, and how to fix it."""


def read_json(path: Path) -> dict:
    """Read a JSON file; `PushError` if it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PushError(f"{path}: is not JSON ({error}). Prepare or save the folder again.") from error


def _belongs(name: str, patterns: Patterns) -> bool:
    path = PurePosixPath(name)
    folder = "" if str(path.parent) == "." else str(path.parent)
    return any(fnmatchcase(path.name, pattern) for pattern in patterns.get(folder, ()))


def select_files(folder: Path, patterns: Patterns) -> list[str]:
    """Return the files below `folder` that match the patterns, sorted."""
    files = [path for place in patterns for path in (folder / place).glob("*") if path.is_file()]
    return sorted(name for file in files if _belongs(name := file.relative_to(folder).as_posix(), patterns))


def push_files(
    files: dict[str, Path | bytes],
    stale: Patterns,
    repo_id: str,
    *,
    repo_type: str,
    private: bool,
    token: str | None,
    revision: str | None,
    commit_message: str,
    needs: Sequence[str] = (),
    space_sdk: str = "gradio",
) -> str:
    """
    Create the repository if it does not exist, and push files to it in one commit.

    Args:
        files: maps each path in the repository to a local path or to the content.
        stale: patterns of files that are removed in the same commit, unless they are in `files`.
        repo_id, private, token, revision, commit_message: see `push_dataset`.
        repo_type: `dataset`, `model` or `space`.
        needs: ids of models that must already be on the Hub.
        space_sdk: how a new Space is run, `gradio` or `docker`; its card must say the same.

    Returns:
        The URL of the repository.

    Raises:
        PushError: if the Hub rejects the push or cannot be reached.
    """
    api = HfApi(token=token or get_token() or False)
    if not api.token:
        raise PushError(
            "There is no token for the push. Log in with `hf auth login`, or set HF_TOKEN. Create a token with write "
            f"access at {api.endpoint}/settings/tokens"
        )
    with _explained(api, repo_id):
        for name in needs:
            api.model_info(name)
        sdk = space_sdk if repo_type == "space" else None
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
        repo_id = url.repo_id
        info = api.repo_info(repo_id, repo_type=repo_type)
        if info.private is not private:
            state, option = ("private", "without --public") if info.private else ("public", "with --public")
            raise PushError(
                f"{repo_id} already exists and is {state}. Push {option} (`private={info.private}`), or change the "
                f"visibility in its settings: {url}/settings"
            )
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
        left = [name for name in there if _belongs(name, stale) and name not in files]
        # Not `upload_folder`: it may split a folder into several commits, and the repository would look complete after
        # the first commit.
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in left]
        api.create_commit(repo_id, operations, commit_message=commit_message, repo_type=repo_type, revision=revision)
    return str(url) if revision is None else f"{url}/tree/{revision}"


@contextmanager
def _explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Convert Hub and network errors to a `PushError` that says what to do."""
    try:
        yield
    except PushError:
        raise
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        tokens = f"{api.endpoint}/settings/tokens"
        if status == 401:
            reason = f"The Hub does not know the token. Log in again (`hf auth login`) or set HF_TOKEN: {tokens}"
        elif status == 403:
            reason = f"The token cannot write to {repo_id}. Use a token with write access, or your own id: {tokens}"
        elif status is not None and status < 500:
            reason = f"The Hub rejected the push to {repo_id}: {cause}"
        else:
            reason = (
                f"The push to {repo_id} was interrupted ({str(cause) or type(cause).__name__}). Either all of it is on "
                "the Hub or nothing. Call it again to continue with the missing files."
            )
        raise PushError(reason) from error
    except ValueError as error:  # an invalid id or card
        raise PushError(f"Cannot push to {repo_id}: {error}") from error
